//! Packets both ways.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};

use cofferdam_sim::{Frame, NetProfile};

use crate::bed::{Bed, PATIENCE, until};
use crate::peer::{self, FAR, TCP, TRANSPORT, UDP};

fn payload(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 + length) as u8).collect()
}

#[test]
fn datagrams_of_every_length_pass_both_ways_with_each_kind_of_buffer() {
    for (mtu, mergeable, guest_tso) in
        [(1500, true, true), (1500, false, false), (9000, true, false), (9000, false, false)]
    {
        let profile = NetProfile { mtu: Some(mtu), mergeable, guest_tso, ..NetProfile::default() };
        let bed = Bed::new(profile);
        bed.serve("lan0");
        let socket = bed.socket();
        // Headers of IPv4 and UDP are 28 bytes.
        let most = usize::from(mtu) - 28;
        for length in [0, 1, 17, 18, 19, 1000, most - 1, most] {
            bed.sends(&socket, &payload(length));
            bed.hears(&socket, &payload(length));
        }
        assert_eq!(bed.sim.violations(), []);
        bed.unload();
    }
}

#[test]
fn a_connection_passes_unsegmented_both_ways() {
    let bed = Bed::new(NetProfile::default());
    bed.serve("lan0");
    let (here, there) = (payload(60_000), payload(60_000));
    let done = AtomicBool::new(false);
    let mut largest = 0;
    std::thread::scope(|scope| {
        let client = {
            let (here, there, done) = (&here, &there, &done);
            // Inherits this thread's network.
            scope.spawn(move || {
                let mut stream = TcpStream::connect((Ipv4Addr::from(FAR), 7)).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(here).unwrap();
                let mut got = vec![0; there.len()];
                let read = stream.read_exact(&mut got);
                done.store(true, Ordering::Relaxed);
                read.unwrap();
                assert_eq!(&got, there);
            })
        };
        let (mut ours, mut theirs, mut got, mut sent) = (1000u32, 0u32, Vec::new(), false);
        until("the connection is over", || {
            for frame in peer::attend(&bed.sim, TCP) {
                let tcp = &frame.bytes[TRANSPORT..];
                let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
                let port = u16::from_be_bytes([tcp[0], tcp[1]]);
                let data = &tcp[usize::from(tcp[12] >> 4) * 4..];
                let mut answer = |flags, payload: &[u8], acknowledged| {
                    let (header, bytes) = peer::segment(port, ours, acknowledged, flags, payload);
                    ours += payload.len() as u32 + u32::from(flags & 2 != 0);
                    assert!(bed.sim.inject(Frame { pair: 0, header, bytes }));
                };
                if tcp[13] & 2 != 0 {
                    theirs = word(4) + 1;
                    answer(0x12, &[], theirs);
                } else if !data.is_empty() && word(4) == theirs {
                    if data.len() > 1460 {
                        assert_eq!((frame.header.gso_type, frame.header.flags & 1), (1, 1), "{:?}", frame.header);
                        assert!(frame.header.gso_size > 0 && frame.header.hdr_len >= 54, "{:?}", frame.header);
                        largest = largest.max(data.len());
                    }
                    got.extend_from_slice(data);
                    theirs += data.len() as u32;
                    answer(0x10, &[], theirs);
                    if got.len() == here.len() && !sent {
                        sent = true;
                        answer(0x18, &there, theirs);
                    }
                }
            }
            done.load(Ordering::Relaxed)
        });
        client.join().unwrap();
        assert_eq!(got, here);
    });
    assert!(largest > 1460, "the kernel was never allowed to leave the segmentation to the device");
    bed.unload();
}

#[test]
fn with_two_pairs_both_are_switched_on_and_carry_packets() {
    let bed = Bed::new(NetProfile { pairs: 2, ..NetProfile::default() });
    assert_eq!((bed.binding.lanes(), bed.sim.control_state().pairs), (2, 2));
    bed.serve("lan0");
    let _ = bed.socket();
    // The kernel spreads flows over the interface's queues; one of many flows goes by the other.
    let mut seen = BTreeSet::new();
    until("packets on both pairs", || {
        let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
        socket.send_to(b"which way", (Ipv4Addr::from(FAR), 7)).unwrap();
        seen.extend(peer::attend(&bed.sim, UDP).iter().map(|frame| frame.pair));
        seen.len() == 2
    });
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    for pair in [0, 1] {
        let frame = Frame { pair, ..Frame::plain(&peer::datagram(socket.local_addr().unwrap().port(), &[pair as u8])) };
        assert!(bed.sim.inject(frame));
        let mut byte = [9];
        assert_eq!((socket.recv(&mut byte).unwrap(), byte), (1, [pair as u8]));
    }
    bed.unload();
}
