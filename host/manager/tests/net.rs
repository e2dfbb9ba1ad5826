//! The network service: packets both ways, whose the posted buffers are, and what becomes of them.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Arrival, Arrivals, Binding, Config, Handle, HandleSpec, IoError, IoFlags, IoOp, IoRequest, LoadSpec, Manager,
    Offer, OpenError, Phase, UnloadOptions,
};
use cofferdam_sim::{Behaviour, Drive, Frame, NetProfile, SimNet};

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);

struct Bed {
    sim: SimNet,
    manager: Manager,
    binding: Arc<Binding>,
}

impl Bed {
    fn new(profile: NetProfile) -> Bed {
        let sim = SimNet::new(profile, Behaviour::default()).unwrap();
        let root = format!("{}/../../target", env!("CARGO_MANIFEST_DIR"));
        let manager = Manager::new(Config { cache_dir: Some(format!("{root}/test-cache").into()) }).unwrap();
        let path = format!("{root}/drivers/virtio-net.wasm");
        let driver =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"));
        let spec = LoadSpec::new("virtio-net.wasm", driver, Box::new(sim.transport(Drive::Threads).unwrap()));
        let binding = manager.load(spec).unwrap();
        Bed { sim, manager, binding }
    }

    fn receiver(&self) -> Handle {
        self.binding.open(HandleSpec { receives: true, ..HandleSpec::default() }).unwrap()
    }

    fn inject(&self, number: u32) {
        assert!(self.sim.inject(Frame::plain(&frame(number))));
    }

    fn unload(&self) {
        let certificate = self.manager.unload(self.binding.name(), &UnloadOptions::default()).unwrap();
        assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    }
}

/// A frame of 100 bytes with a number in it.
fn frame(number: u32) -> Vec<u8> {
    let mut frame = SimNet::test_frame(100);
    frame[20..24].copy_from_slice(&number.to_le_bytes());
    frame
}

fn bytes(arrival: Arrival<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    arrival.read(&mut bytes).unwrap();
    bytes
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The next `count` packets.
fn receive(handle: &Handle, count: usize) -> Arrivals {
    let mut arrivals = Arrivals::new();
    until("the packets", || {
        handle.receive(true, &mut arrivals);
        arrivals.len() >= count
    });
    assert_eq!(arrivals.len(), count);
    arrivals
}

fn transmit(handle: &Handle, payload: &[u8], flags: u8, offset: u64) -> Result<(), IoError> {
    let buffer = handle.lease(payload.len() as u32).unwrap();
    buffer.write_at(0, payload).unwrap();
    let (op, length, flags) = (IoOp::Transmit, payload.len() as u32, IoFlags(flags));
    handle.submit(&mut vec![IoRequest { user: 5, op, offset, length, flags, buffer: Some(buffer) }]).unwrap();
    let mut out = Vec::new();
    until("the answer", || {
        handle.poll(true, &mut out);
        !out.is_empty()
    });
    assert_eq!((out.len(), out[0].user), (1, 5));
    out.remove(0).result
}

#[test]
fn packets_pass_both_ways_and_what_was_not_negotiated_is_refused() {
    let bed = Bed::new(NetProfile { host_tso: false, ..NetProfile::default() });
    let Some(Offer::Net(net)) = bed.binding.offer().as_deref().cloned() else { panic!("no network") };
    assert_eq!((net.mac, net.mtu, net.link_up, net.pairs), (Some([2, 0xcf, 0xda, 0, 0, 1]), 1500, true, 1));
    assert!(net.offloads.transmit_checksum && !net.offloads.transmit_tcp4);
    let handle = bed.receiver();
    assert_eq!(transmit(&handle, &frame(1), 0, 0), Ok(()));
    assert_eq!(transmit(&handle, &frame(2), 1, 34 | 16 << 16), Ok(()));
    assert_eq!(transmit(&handle, &frame(3), 0x11, 34 | 16 << 16 | 40 << 32 | 54 << 48), Err(IoError::Invalid));
    assert_eq!(transmit(&handle, &[0; 13], 0, 0), Err(IoError::Invalid));
    assert_eq!(transmit(&handle, &vec![0; 1515], 0, 0), Err(IoError::Invalid));
    let sent = bed.sim.sent();
    assert_eq!(sent.iter().map(|sent| &sent.bytes[..]).collect::<Vec<_>>(), [&frame(1)[..], &frame(2)]);
    assert_eq!((sent[1].header.flags, sent[1].header.csum_start, sent[1].header.csum_offset), (1, 34, 16));
    for number in 0..1000 {
        bed.inject(number);
        assert_eq!(bytes(receive(&handle, 1).first().unwrap()), frame(number));
    }
    assert_eq!(bed.sim.violations(), []);
    drop(handle);
    bed.unload();
}

#[test]
fn one_client_of_a_lane_receives_and_another_may_when_it_is_gone() {
    let bed = Bed::new(NetProfile::default());
    let (first, plain) = (bed.receiver(), bed.binding.open(HandleSpec::default()).unwrap());
    let spec = HandleSpec { receives: true, ..HandleSpec::default() };
    assert!(matches!(bed.binding.open(spec.clone()), Err(OpenError::Taken(0))));
    bed.inject(1);
    assert_eq!(plain.receive(true, &mut Arrivals::new()), 0, "it did not ask to receive");
    drop(receive(&first, 1));
    drop(first);
    let second = bed.binding.open(spec).unwrap();
    bed.inject(2);
    assert_eq!(bytes(receive(&second, 1).first().unwrap()), frame(2));
    drop((second, plain));
    bed.unload();
}

#[test]
fn arrivals_that_a_client_keeps_over_an_unload_hold_nothing_and_read_as_errors() {
    let bed = Bed::new(NetProfile::default());
    let handle = bed.receiver();
    (0..10).for_each(|number| bed.inject(number));
    let kept = receive(&handle, 10);
    // With the client's handle still open, too.
    bed.unload();
    let (_reader, writer) = std::io::pipe().unwrap();
    for arrival in kept.iter() {
        let mut into = vec![1];
        assert_eq!(arrival.read(&mut into).unwrap_err().kind(), ErrorKind::NotConnected);
        assert_eq!((into, arrival.len()), (vec![1], 100));
        let written = arrival.write_to(writer.as_fd(), b"head", 0);
        assert_eq!(written.unwrap_err().kind(), ErrorKind::NotConnected);
    }
    assert_eq!(handle.receive(true, &mut Arrivals::new()), 0);
    handle.give_back();
    drop(kept);
    handle.give_back();
}

#[test]
fn arrivals_are_let_go_of_one_by_one_or_together_also_those_of_two_devices() {
    let (bed, other) = (Bed::new(NetProfile::default()), Bed::new(NetProfile::default()));
    let handles = [bed.receiver(), other.receiver()];
    let mut kept = Arrivals::new();
    assert!(!kept.pop_front() && kept.first().is_none());
    // Far more than there are buffers.
    for round in 0..300 {
        (0..3).for_each(|number| bed.inject(3 * round + number));
        other.inject(round);
        until("all of them", || {
            for handle in &handles {
                handle.receive(true, &mut kept);
            }
            kept.len() == 4
        });
        let mut numbers: Vec<_> = kept.iter().map(bytes).collect();
        assert!(numbers.contains(&frame(3 * round)), "round {round}");
        assert!(kept.pop_front() && kept.pop_front());
        assert_eq!(kept.iter().map(bytes).collect::<Vec<_>>(), numbers.split_off(2), "round {round}");
        if round % 2 == 0 {
            kept.clear();
        } else {
            assert!(kept.pop_front() && kept.pop_front());
        }
        assert!(kept.is_empty() && !kept.pop_front());
    }
    drop(handles);
    bed.unload();
    other.unload();
}

#[test]
fn with_nobody_receiving_the_device_runs_out_of_buffers_and_nothing_else_happens() {
    let bed = Bed::new(NetProfile::default());
    bed.sim.set_generator(Some(&frame(7)));
    let taken = || bed.sim.net_stats().received;
    until("some packets", || taken() > 0);
    // Every posted buffer is used once, a ring's worth at the most.
    let mut last = 0;
    until("it stops", || {
        std::thread::sleep(Duration::from_millis(50));
        std::mem::replace(&mut last, taken()) == taken()
    });
    assert!(last <= 256, "{last} packets went into 256 entries");
    // A client that takes packets and keeps them is no other: so many, and no more.
    let handle = bed.receiver();
    let kept = receive(&handle, last as usize);
    for _ in 0..100 {
        assert_eq!(handle.receive(true, &mut Arrivals::new()), 0);
    }
    assert_eq!(taken(), last);
    // What it lets go of is the device's again.
    drop(kept);
    handle.give_back();
    until("more packets", || taken() > last);
    bed.sim.set_generator(None);
    drop(handle);
    bed.unload();
}

#[test]
fn a_device_that_says_it_wrote_more_than_a_buffer_holds_takes_the_binding_down() {
    let bed = Bed::new(NetProfile::default());
    let handle = bed.receiver();
    bed.sim.add_rule("lie:length-long,op=receive".parse().unwrap());
    bed.inject(1);
    let mut arrivals = Arrivals::new();
    until("the binding has left", || {
        handle.receive(true, &mut arrivals);
        bed.binding.certificate().is_some()
    });
    assert_eq!((arrivals.len(), bed.binding.phase()), (0, Phase::Detached));
    assert!(bed.binding.status().fault.is_some());
    assert!(bed.binding.certificate().unwrap().residual.is_zero());
}
