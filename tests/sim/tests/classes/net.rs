//! The net device.

use std::time::Instant;

use cofferdam_device::{DeviceFault, Silence};
use cofferdam_sim::net::{ControlState, HEADER_BYTES, NEEDS_CHECKSUM};
use cofferdam_sim::ring::Violation;
use cofferdam_sim::{Behaviour, Drive, Frame, NetHeader, NetProfile, Quiescence, SimNet, Transmit};

use crate::rig::{LIMIT, Rig, behaviour};

const GUEST_CHECKSUM: u64 = 1 << 1;
const GUEST_TSO: u64 = 1 << 7 | 1 << 8;
const MERGEABLE: u64 = 1 << 15;

fn rig(rules: &[&str], without: u64) -> (SimNet, Rig) {
    let sim = SimNet::new(NetProfile::default(), behaviour(rules)).unwrap();
    let rig = Rig::new(sim.transport(Drive::Stepped).unwrap(), without);
    (sim, rig)
}

fn framed(header: NetHeader, frame: &[u8]) -> Vec<u8> {
    [&header.to_bytes(), frame].concat()
}

fn received(buffers: u16) -> NetHeader {
    NetHeader { num_buffers: buffers, ..NetHeader::default() }
}

#[test]
fn configuration_space_has_address_link_pairs_and_mtu() {
    let (sim, mut rig) = rig(&[], 0);
    assert_eq!(rig.transport.device_type(), Some(1));
    let bits = [0, 1, 3, 5, 7, 8, 11, 12, 15, 16, 17, 18, 28, 29, 32];
    assert_eq!(rig.transport.offered_features(), bits.iter().fold(0, |all, bit| all | 1 << bit));
    assert_eq!(rig.config(12), [0x02, 0xcf, 0xda, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5]);
    sim.set_link(false);
    assert!(rig.is_told());
    assert_eq!(rig.config(8)[6..], [0, 0]);
    assert!(!sim.inject(Frame::plain(&[1; 60])));
    rig.send(1, 0, &framed(NetHeader::default(), &[2; 60]));
    sim.step();
    assert!(rig.pop(1).unwrap().is_some(), "the buffer comes back, the frame is lost");
    assert_eq!((sim.sent(), sim.net_stats().dropped), (vec![], 2));
    sim.set_link(true);
    assert!(rig.is_told() && sim.inject(Frame::plain(&[1; 60])));
}

#[test]
fn an_injected_frame_arrives_with_its_header() {
    let (sim, mut rig) = rig(&[], 0);
    let header = NetHeader { flags: NEEDS_CHECKSUM, csum_start: 34, csum_offset: 6, ..NetHeader::default() };
    assert!(sim.inject(Frame { header, ..Frame::plain(b"first") }));
    assert_eq!(sim.step(), 0, "no buffer is posted");
    rig.post(0, 0, 2048);
    rig.post(0, 1, 2048);
    assert_eq!(sim.step(), 1);
    assert_eq!(rig.receive(0), (0, framed(NetHeader { num_buffers: 1, ..header }, b"first")));
    assert_eq!((sim.step(), rig.in_flight(0)), (0, 1), "the other buffer waits on the ring");
    assert!(sim.inject(Frame::plain(b"second")));
    sim.step();
    assert_eq!(rig.receive(0), (1, framed(received(1), b"second")));
    assert_eq!(sim.violations(), []);
}

#[test]
fn a_frame_lies_over_several_buffers_and_waits_until_there_are_enough() {
    let (sim, mut rig) = rig(&[], 0);
    let frame = SimNet::test_frame(1000);
    assert!(sim.inject(Frame::plain(&frame)) && sim.inject(Frame::plain(b"next")));
    for token in 0..2 {
        rig.post(0, token, 400);
        assert_eq!(sim.step(), 0);
    }
    rig.post(0, 2, 400);
    rig.post(0, 3, 400);
    assert_eq!(sim.step(), 4);
    let parts: Vec<_> = (0..3).map(|_| rig.receive(0)).collect();
    assert_eq!(
        parts.iter().map(|(token, bytes)| (*token, bytes.len())).collect::<Vec<_>>(),
        [(0, 400), (1, 400), (2, 212)]
    );
    let whole: Vec<u8> = parts.into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(whole, framed(received(3), &frame));
    assert_eq!(rig.receive(0), (3, framed(received(1), b"next")));
}

#[test]
fn enough_buffers_are_noticed_by_a_thread_that_waits_for_more() {
    let sim = SimNet::new(NetProfile::default(), behaviour(&[])).unwrap();
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    let frame = SimNet::test_frame(3000);
    for round in 0..200 {
        assert!(sim.inject(Frame::plain(&frame)));
        for part in 0..4 {
            rig.post(0, 4 * round + part, 800);
        }
        let whole: Vec<u8> = (0..4).flat_map(|_| rig.receive(0).1).collect();
        assert_eq!(whole, framed(received(4), &frame));
    }
}

#[test]
fn without_mergeable_buffers_what_does_not_fit_is_dropped_and_small_buffers_are_on_record() {
    let (sim, mut rig) = rig(&[], MERGEABLE | GUEST_TSO);
    assert!(sim.inject(Frame::plain(&[1; 500])) && sim.inject(Frame::plain(&[2; 100])));
    rig.post(0, 0, 400);
    sim.step();
    assert_eq!(rig.receive(0), (0, framed(received(1), &[2; 100])));
    assert_eq!(sim.net_stats().dropped, 1);
    assert_eq!(sim.violations(), [Violation::Buffer { head: 0, writable_bytes: 400, least_bytes: 1526 }]);
}

#[test]
fn transmitted_frames_are_seen_by_the_peer() {
    let (sim, mut rig) = rig(&[], 0);
    let header = NetHeader { gso_type: 1, gso_size: 1448, hdr_len: 54, ..NetHeader::default() };
    rig.send(1, 0, &framed(header, b"out"));
    rig.send(1, 1, &framed(NetHeader::default(), b""));
    sim.step();
    assert_eq!((rig.next(1).written, rig.next(1).written), (0, 0));
    assert_eq!(sim.sent(), [Frame { pair: 0, header, bytes: b"out".to_vec() }, Frame::plain(b"")]);
    assert_eq!(sim.sent(), []);
    rig.send(1, 2, &[0; HEADER_BYTES - 1]);
    sim.step();
    assert_eq!(sim.violations().len(), 1, "not even a header");
}

#[test]
fn echo_brings_every_frame_back_in_order() {
    let sim = SimNet::new(NetProfile::default(), behaviour(&[])).unwrap();
    sim.set_transmit(Transmit::Echo);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    for token in 0..32 {
        rig.post(0, token, 256);
    }
    for number in 0..2000u32 {
        rig.send(1, number % 32, &framed(NetHeader::default(), &number.to_le_bytes()));
        let (token, bytes) = rig.receive(0);
        assert_eq!(bytes, framed(received(1), &number.to_le_bytes()));
        rig.post(0, token, 256);
        rig.next(1);
    }
    assert_eq!(sim.net_stats().dropped, 0);
}

#[test]
fn echo_completes_what_the_driver_does_not_offer_to() {
    for (without, completed) in [(0, false), (GUEST_CHECKSUM | GUEST_TSO, true)] {
        let (sim, mut rig) = rig(&[], without);
        sim.set_transmit(Transmit::Echo);
        let header = NetHeader { flags: NEEDS_CHECKSUM, csum_start: 2, csum_offset: 2, ..NetHeader::default() };
        rig.send(1, 0, &framed(header, &[0, 0, 0x12, 0x34, 0, 0]));
        let large = NetHeader { gso_type: 1, gso_size: 1, ..header };
        rig.send(1, 1, &framed(large, &[0; 6]));
        rig.post(0, 0, 2048);
        rig.post(0, 1, 2048);
        // Transmit comes after receive in a step.
        sim.step();
        sim.step();
        let (_, bytes) = rig.receive(0);
        if completed {
            assert_eq!(bytes, framed(received(1), &[0, 0, 0x12, 0x34, 0xed, 0xcb]));
            assert_eq!((rig.pop(0), sim.net_stats().dropped), (Ok(None), 1), "a frame that is too large for it");
        } else {
            assert_eq!(bytes, framed(NetHeader { num_buffers: 1, ..header }, &[0, 0, 0x12, 0x34, 0, 0]));
            assert!(rig.pop(0).unwrap().is_some());
        }
    }
}

#[test]
fn sink_and_generator_serve_unread_and_with_rules_alike() {
    for rules in [&[][..], &["reorder"]] {
        let (sim, mut rig) = rig(rules, 0);
        let frame = SimNet::test_frame(64);
        sim.set_transmit(Transmit::Sink);
        sim.set_generator(Some(&frame));
        for token in 0..40 {
            rig.post(0, token, 128);
            rig.send(1, token, &framed(NetHeader::default(), &[9; 64]));
        }
        let _: u64 = (0..3).map(|_| sim.step()).sum();
        for _ in 0..40 {
            assert_eq!(rig.receive(0).1, framed(received(1), &frame));
            assert_eq!(rig.next(1).written, 0);
        }
        let stats = sim.net_stats();
        assert_eq!((stats.transmitted, stats.received, sim.stats().answered), (40, 40, 80));
        assert_eq!(sim.sent(), []);
        sim.set_generator(None);
        rig.post(0, 0, 128);
        assert_eq!(sim.step(), 0);
    }
}

#[test]
fn the_control_queue_answers_and_pairs_are_used_when_they_are_set() {
    let profile = NetProfile { pairs: 2, ..NetProfile::default() };
    let sim = SimNet::new(profile, behaviour(&["fail:io@nth=6,op=control"])).unwrap();
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    let on_second = || Frame { pair: 1, ..Frame::plain(b"second pair") };
    assert!(!sim.inject(on_second()));
    let mut ack = |bytes: &[u8]| {
        rig.command(4, 0, bytes);
        rig.next(4).status()[0]
    };
    let acks = [&[0, 0, 1][..], &[0, 1, 1], &[4, 0, 3, 0], &[77, 0], &[4, 0, 2, 0], &[4, 0, 1, 0]].map(&mut ack);
    assert_eq!(acks, [0, 0, 1, 1, 0, 1]);
    assert_eq!(sim.control_state(), ControlState { promiscuous: true, all_multicast: true, pairs: 2 });
    let commands: Vec<_> = sim.commands().into_iter().map(|one| (one.class, one.command, one.data, one.ack)).collect();
    assert_eq!(commands[2..5], [(4, 0, vec![3, 0], 1), (77, 0, vec![], 1), (4, 0, vec![2, 0], 0)]);
    rig.post(2, 0, 2048);
    assert!(sim.inject(on_second()));
    assert_eq!(rig.receive(2), (0, framed(received(1), b"second pair")));
    rig.send(3, 0, &framed(NetHeader::default(), b"back"));
    assert_eq!(sim.wait_sent(1, LIMIT).unwrap()[0].pair, 1);
}

/// What a driver gets of one frame, 64 bytes long, in a buffer of 128.
fn one(lie: &str) -> Result<(u32, NetHeader), DeviceFault> {
    let (sim, mut rig) = rig(&[&format!("lie:{lie},op=receive")], 0);
    assert!(sim.inject(Frame::plain(&[7; 64])));
    rig.post(0, 0, 128);
    sim.step();
    let used = rig.pop(0)?.unwrap();
    let header = rig.data(0, 0, HEADER_BYTES as u32);
    Ok((used.written, NetHeader::from_bytes(&header.try_into().unwrap())))
}

#[test]
fn every_lie_about_a_received_frame_is_told() {
    let honest = (76, received(1));
    assert_eq!(one("notification-spurious"), Ok(honest));
    for (lie, buffers) in [("buffers-zero", 0), ("buffers-more", 2), ("buffers-huge", u16::MAX)] {
        assert_eq!(one(lie), Ok((76, received(buffers))), "{lie}");
    }
    let header = |lie| one(lie).unwrap().1;
    assert!(header("flags-unknown").flags & !7 != 0);
    assert!(!matches!(header("gso-unknown").gso_type & 0x7f, 0 | 1 | 3 | 4 | 5));
    let unasked = header("gso-unasked");
    assert!(matches!(unasked.gso_type, 1 | 4) && unasked.gso_size == 0);
    let beyond = header("checksum-beyond");
    assert!(beyond.flags & NEEDS_CHECKSUM != 0 && beyond.csum_start > 64);
    assert_eq!(one("frame-empty"), Ok((12, received(1))));
    assert_eq!(one("length-zero"), Ok((0, received(1))));
    assert_eq!(one("length-one"), Ok((1, received(1))));
    assert!(matches!(one("length-long"), Err(DeviceFault::Overrun { .. })));
}

#[test]
fn posted_buffers_do_not_keep_a_draining_device_from_silence_and_nothing_is_put_into_them_after_it() {
    let behaviour = Behaviour { quiescence: Quiescence::Drains, ..behaviour(&[]) };
    let sim = SimNet::new(NetProfile::default(), behaviour).unwrap();
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    rig.post(0, 0, 2048);
    let deadline = Instant::now() + LIMIT;
    assert_eq!(rig.transport.quiesce(1, deadline), Silence::Confirmed);
    assert!(sim.inject(Frame::plain(b"late")));
    assert_eq!(rig.data(0, 0, 8), [0xee; 8]);
    assert_eq!((rig.pop(0), sim.net_stats().received), (Ok(None), 0));
    // A new driver finds the frame waiting, and what the old one set forgotten.
    rig.transport.release();
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    rig.post(0, 0, 2048);
    assert_eq!(rig.receive(0).1, framed(received(1), b"late"));
}
