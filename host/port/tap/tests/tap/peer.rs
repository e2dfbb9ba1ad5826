//! The other end of the wire: a host at 10.9.0.2 with a hardware address of its own, as frames.

use std::time::Duration;

use cofferdam_sim::{Frame, NetHeader, SimNet};

/// Of the interface, and of the peer.
pub(crate) const NEAR: [u8; 4] = [10, 9, 0, 1];
pub(crate) const FAR: [u8; 4] = [10, 9, 0, 2];
/// What the sim says that its address is, and the peer's.
pub(crate) const NEAR_MAC: [u8; 6] = [0x02, 0xcf, 0xda, 0, 0, 1];
const FAR_MAC: [u8; 6] = [0x02, 0xcf, 0xda, 0, 0, 2];
pub(crate) const UDP: u8 = 17;
pub(crate) const TCP: u8 = 6;
/// Where the header behind those of Ethernet and IPv4 begins.
pub(crate) const TRANSPORT: usize = 34;

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = bytes
        .chunks(2)
        .fold(start, |sum, two| sum + (u32::from(two[0]) << 8 | two.get(1).map_or(0, |low| u32::from(*low))));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A frame to the interface: Ethernet, IPv4, and `body` behind them.
pub(crate) fn ip(protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = [&NEAR_MAC[..], &FAR_MAC, &[8, 0]].concat();
    let length = (20 + body.len()) as u16;
    let mut header =
        [&[0x45, 0][..], &length.to_be_bytes(), &[0, 0, 0x40, 0, 64, protocol, 0, 0], &FAR, &NEAR].concat();
    let check = !sum(&header, 0);
    header[10..12].copy_from_slice(&check.to_be_bytes());
    frame.extend_from_slice(&header);
    frame.extend_from_slice(body);
    frame
}

/// A datagram to `port` of the interface, without a checksum.
pub(crate) fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    let length = (8 + payload.len()) as u16;
    let header = [&7u16.to_be_bytes()[..], &port.to_be_bytes(), &length.to_be_bytes(), &[0, 0]].concat();
    ip(UDP, &[&header, payload].concat())
}

/// A segment of a connection, and the header that leaves its checksum open.
pub(crate) fn segment(port: u16, sequence: u32, acknowledged: u32, flags: u8, payload: &[u8]) -> (NetHeader, Vec<u8>) {
    let length = (20 + payload.len()) as u16;
    // The sum of the pseudo header, as in a packet of a Linux guest.
    let pseudo = sum(&[&FAR[..], &NEAR, &[0, TCP], &length.to_be_bytes()].concat(), 0);
    let header = [
        &7u16.to_be_bytes()[..],
        &port.to_be_bytes(),
        &sequence.to_be_bytes(),
        &acknowledged.to_be_bytes(),
        &[0x50, flags, 0xff, 0xff],
        &pseudo.to_be_bytes(),
        &[0, 0],
    ]
    .concat();
    let mut net = NetHeader { flags: 1, csum_start: TRANSPORT as u16, csum_offset: 16, ..NetHeader::default() };
    if payload.len() > 1460 {
        (net.gso_type, net.gso_size, net.hdr_len) = (1, 1460, 54);
    }
    (net, ip(TCP, &[&header, payload].concat()))
}

/// Answers who asks for the peer's address; the frames that are IPv4 and `protocol`.
pub(crate) fn attend(sim: &SimNet, protocol: u8) -> Vec<Frame> {
    let frames = sim.wait_sent(1, Duration::from_millis(20)).unwrap_or_default();
    let (mut kept, mut asked) = (Vec::new(), false);
    for frame in frames {
        match frame.bytes.get(12..14) {
            Some([8, 6]) if frame.bytes.get(38..42) == Some(&FAR[..]) => asked = true,
            Some([8, 0]) if frame.bytes.get(23) == Some(&protocol) => kept.push(frame),
            _ => {}
        }
    }
    if asked {
        let arp = [&[0, 1, 8, 0, 6, 4, 0, 2][..], &FAR_MAC, &FAR, &NEAR_MAC, &NEAR].concat();
        sim.inject(Frame::plain(&[&NEAR_MAC[..], &FAR_MAC, &[8, 6], &arp].concat()));
    }
    kept
}
