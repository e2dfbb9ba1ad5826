//! A device that breaks its specification, and packets that cannot be: nothing panics, nothing stays stuck, and the next good packet passes.

use cofferdam_manager::Phase;
use cofferdam_sim::{Frame, NetHeader, NetProfile};

use crate::bed::{Bed, is_gone, until};
use crate::peer;

#[test]
fn after_each_lie_about_a_packet_the_next_good_one_passes() {
    for mergeable in [true, false] {
        let bed = Bed::new(NetProfile { mergeable, guest_tso: mergeable, ..NetProfile::default() });
        bed.serve("lan0");
        let socket = bed.socket();
        let lies = [
            "buffers-zero",
            "buffers-more",
            "buffers-huge",
            "flags-unknown",
            "gso-unknown",
            "gso-unasked",
            "checksum-beyond",
            "frame-empty",
            "length-zero",
            "length-one",
            "payload-unwritten",
        ];
        for lie in lies {
            bed.sim.add_rule(format!("lie:{lie},op=receive").parse().unwrap());
            let before = bed.sim.net_stats().received;
            for length in [1, 60, 1400] {
                bed.sim.inject(Frame::plain(&peer::datagram(9, &vec![3; length])));
            }
            until("the lies are told", || bed.sim.net_stats().received >= before + 3);
            bed.sim.clear_rules();
            bed.hears(&socket, lie.as_bytes());
            bed.sends(&socket, lie.as_bytes());
            assert_eq!(bed.binding.phase(), Phase::Serving, "{lie}");
        }
        bed.unload();
    }
}

#[test]
fn packets_that_cannot_be_are_dropped_and_counted_and_the_next_one_passes() {
    let bed = Bed::new(NetProfile::default());
    let port = bed.start("tap:lan0").unwrap();
    crate::bed::ip("addr add 10.9.0.1/24 dev lan0");
    let socket = bed.socket();
    let good = peer::datagram(9, &[1; 100]);
    let odd: Vec<Frame> = [
        // Segments of what is no TCP, of one byte each, and headers of any length.
        NetHeader { flags: 1, gso_type: 1, gso_size: 1, hdr_len: 54, csum_start: 34, csum_offset: 16, num_buffers: 0 },
        NetHeader { flags: 0, gso_type: 4, gso_size: 1400, hdr_len: 0xffff, ..NetHeader::default() },
        NetHeader {
            flags: 1,
            gso_type: 4,
            gso_size: 0xffff,
            hdr_len: 1,
            csum_start: 0,
            csum_offset: 0,
            num_buffers: 0,
        },
        NetHeader { flags: 1, csum_start: 139, csum_offset: 1, ..NetHeader::default() },
        NetHeader { flags: 1, csum_start: 0, csum_offset: 0, ..NetHeader::default() },
    ]
    .into_iter()
    .map(|header| Frame { header, ..Frame::plain(&good) })
    .chain([Frame::plain(&[]), Frame::plain(&[1]), Frame::plain(&good[..13]), Frame::plain(&good[..14])])
    .chain([Frame::plain(&vec![0xff; 65_550]), Frame::plain(&vec![0xff; 20_000])])
    .collect();
    for frame in odd {
        let what = format!("{:?}, {} bytes", frame.header, frame.bytes.len());
        assert!(bed.sim.inject(frame), "{what}");
        bed.hears(&socket, what.as_bytes());
        bed.sends(&socket, what.as_bytes());
    }
    let counts = port.counts();
    assert!(counts.refused_by_kernel > 0 && counts.to_kernel > 0, "{counts:?}");
    drop(port);
    is_gone("lan0");
    bed.unload();
}

#[test]
fn a_device_that_writes_past_its_buffers_takes_the_interface_down_with_the_binding() {
    let bed = Bed::new(NetProfile::default());
    bed.serve("lan0");
    let _ = bed.socket();
    bed.sim.add_rule("lie:length-long,op=receive".parse().unwrap());
    assert!(bed.sim.inject(Frame::plain(&peer::datagram(9, b"too much"))));
    until("the binding has left", || bed.binding.certificate().is_some());
    is_gone("lan0");
    let certificate = bed.binding.certificate().unwrap();
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    assert!(bed.binding.status().fault.is_some());
}
