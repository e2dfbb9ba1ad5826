//! Networks and consoles: buffers lie with the device while another process takes over, and the control lane has queues of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{
    Adopted, Arrivals, Binding, ExportedBinding, Handle, HandleSpec, IoFlags, IoOp, IoRequest, LoadSpec, Manager,
    Offer, Outcome, StreamPort, SubmitError, UnloadOptions,
};
use cofferdam_sim::{
    Behaviour, ConsoleProfile, Frame, NetProfile, OnDeath, PortProfile, Server, SimConsole, SimDevice, SimNet,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

use crate::{PATIENCE, adopt, component, hand_over, manager, take_over};

/// A device behind a socket.
struct Bed {
    server: Option<Server>,
    _folder: TempDir,
    address: String,
    driver: &'static str,
}

impl Bed {
    fn new(device: &SimDevice, driver: &'static str) -> Bed {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sim.sock");
        let server = device.serve(Path::new(&path), OnDeath::End).unwrap();
        Bed { server: Some(server), _folder: folder, address: format!("vhost-user:{}", path.display()), driver }
    }

    fn load(&self, manager: &Manager, change: impl FnOnce(&mut LoadSpec)) -> Arc<Binding> {
        let device = VhostUser::connect(&self.address).unwrap();
        let mut spec = LoadSpec::new(self.driver, component(self.driver), Box::new(device));
        (spec.name, spec.queues) = (Some("device".into()), Some(4));
        change(&mut spec);
        manager.load(spec).unwrap()
    }

    fn ends_clean(mut self, device: &SimDevice, manager: &Manager, binding: &Arc<Binding>) {
        let certificate = manager.unload_binding(binding, &UnloadOptions::default()).unwrap();
        assert_eq!(certificate.outcome, Outcome::Unloaded, "{certificate:?}");
        let left = &certificate.residual;
        assert_eq!((left.calls, left.handles, left.requests, left.buffers), (0, 0, 0, 0), "{certificate:?}");
        assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
        assert_eq!(device.violations(), []);
        self.server.take().unwrap().stop().unwrap();
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn receiver(binding: &Arc<Binding>, lane: usize) -> Handle {
    binding.open(HandleSpec { lane, receives: true, ..HandleSpec::default() }).unwrap()
}

/// A request with `payload`.
fn request(handle: &Handle, op: IoOp, offset: u64, payload: &[u8]) -> Vec<IoRequest> {
    let length = payload.len() as u32;
    let buffer = handle.lease(length).unwrap();
    buffer.write_at(0, payload).unwrap();
    vec![IoRequest { user: 1, op, offset, length, flags: IoFlags(0), buffer: Some(buffer) }]
}

/// Sends or transmits `payload` and waits for the answer.
fn send(handle: &Handle, op: IoOp, offset: u64, payload: &[u8]) {
    let mut requests = request(handle, op, offset, payload);
    let mut out = Vec::new();
    until("an answer", || {
        match handle.submit(&mut requests) {
            Ok(()) | Err(SubmitError::Held | SubmitError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        handle.poll(true, &mut out);
        !out.is_empty()
    });
    assert_eq!(out[0].result, Ok(()));
}

/// Frame `number`, whose length depends on it: some take one buffer, some many.
fn frame(number: u32) -> Vec<u8> {
    let bytes = if number.is_multiple_of(7) { 8000 } else { 60 + number as usize % 700 };
    let mut frame = SimNet::test_frame(bytes);
    frame[20..24].copy_from_slice(&number.to_le_bytes());
    frame
}

/// A wire on which frames are numbered, and what has been received of them.
struct Wire {
    sim: SimNet,
    injected: u32,
    received: u32,
}

impl Wire {
    fn inject(&mut self, count: u32) {
        for _ in 0..count {
            assert!(self.sim.inject(Frame::plain(&frame(self.injected))), "there is room for frame {}", self.injected);
            self.injected += 1;
        }
    }

    /// Receives until so many are missing, each of them once and in order. Returns the handle with what it last got, so that buffers are a client's.
    fn receive(&mut self, handle: &Handle, but: u32) -> Arrivals {
        let mut arrivals = Arrivals::new();
        until("the frames", || {
            if self.received + but >= self.injected {
                return true;
            }
            arrivals.clear();
            handle.receive(true, &mut arrivals);
            for arrival in arrivals.iter() {
                let mut bytes = Vec::new();
                arrival.read(&mut bytes).unwrap();
                assert!(bytes == frame(self.received), "frame {} is another one", self.received);
                self.received += 1;
            }
            false
        });
        arrivals
    }
}

fn net(profile: NetProfile) -> (Wire, Bed) {
    let sim = SimNet::new(profile, Behaviour::default()).unwrap();
    let bed = Bed::new(&sim, "virtio-net");
    (Wire { sim, injected: 0, received: 0 }, bed)
}

#[test]
fn frames_that_come_before_while_and_after_another_takes_over_arrive_once_and_in_order() {
    // With several buffers for a frame and with one, on rings that wrap often, and on large ones.
    for (mergeable, entries) in [(true, 64), (false, 16), (true, 256)] {
        let (mut wire, bed) = net(NetProfile { mtu: Some(9000), mergeable, ..NetProfile::default() });
        let mut manager_now = manager();
        let mut binding = bed.load(&manager_now, |spec| spec.ring_entries = entries);
        for turn in 0..8 {
            let handle = receiver(&binding, 0);
            wire.inject(50);
            let kept = wire.receive(&handle, 0);
            send(&handle, IoOp::Transmit, 0, &frame(turn));
            // What is with the client and what nobody has looked at are there when it begins.
            wire.inject(turn * 5);
            until("the device has them", || {
                let stats = wire.sim.net_stats();
                // A client that has most of the buffers of a short ring leaves the device none.
                stats.waiting == 0 || stats.received > u64::from(wire.received) || kept.len() >= 8
            });
            let next = manager();
            let mut over = hand_over(&manager_now).unwrap();
            wire.inject(7);
            assert_eq!(handle.receive(true, &mut Arrivals::new()), 0, "nobody looks");
            let mut adopted = adopt(&next, &mut over).unwrap();
            wire.inject(7);
            let since = over.0.since();
            assert_eq!(over.0.commit(), 1);
            drop((kept, handle));
            binding = adopted.remove(0).serve(since.elapsed()).unwrap();
            manager_now = next;
            wire.inject(7);
            let handle = receiver(&binding, 0);
            drop(wire.receive(&handle, 0));
            assert_eq!(handle.receive(true, &mut Arrivals::new()), 0, "no more came than were sent");
            assert_eq!(wire.sim.sent().len(), 1);
        }
        assert_eq!(wire.sim.net_stats().dropped, 0);
        bed.ends_clean(&wire.sim, &manager_now, &binding);
    }
}

#[test]
fn a_network_that_is_not_taken_over_in_the_end_goes_on_and_whoever_sleeps_is_woken() {
    let (mut wire, bed) = net(NetProfile { mtu: Some(9000), pairs: 2, ..NetProfile::default() });
    let (one, two) = (manager(), manager());
    let binding = bed.load(&one, |_| {});
    let handle = receiver(&binding, 0);
    for turn in 0..4 {
        wire.inject(20);
        drop(wire.receive(&handle, 0));
        let mut over = hand_over(&one).unwrap();
        wire.inject(5);
        let adopted = if turn % 2 == 0 { adopt(&two, &mut over).unwrap() } else { Vec::new() };
        assert_eq!(handle.receive(true, &mut Arrivals::new()), 0);
        wire.inject(5);
        if turn < 2 {
            drop(adopted);
            drop(over);
        } else {
            drop(over);
            drop(adopted);
        }
        let mut fds = [PollFd::from_borrowed_fd(handle.arrival_fd().unwrap(), PollFlags::IN)];
        let patience = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut fds, Some(&patience)).unwrap(), 1, "turn {turn}");
        drop(wire.receive(&handle, 0));
        send(&handle, IoOp::Transmit, 0, &frame(turn));
    }
    drop(handle);
    bed.ends_clean(&wire.sim, &one, &binding);
}

/// A handle on what was adopted, and a frame: nothing can be done with either before the commit.
fn held(adopted: &Adopted) -> (Handle, Vec<IoRequest>) {
    let handle = receiver(adopted.binding(), 0);
    assert_eq!(handle.receive(true, &mut Arrivals::new()), 0);
    handle.give_back();
    assert_eq!(handle.poll(true, &mut Vec::new()), 0);
    let mut requests = request(&handle, IoOp::Transmit, 0, &frame(1));
    assert_eq!(handle.submit(&mut requests), Err(SubmitError::Held));
    (handle, requests)
}

#[test]
fn whoever_has_adopted_touches_no_ring_before_the_commit() {
    let (mut wire, bed) = net(NetProfile::default());
    let (one, two) = (manager(), manager());
    let binding = bed.load(&one, |_| {});
    let handle = receiver(&binding, 0);
    let adopted_with_frames = |wire: &mut Wire| {
        let mut over = hand_over(&one).unwrap();
        wire.inject(10);
        until("the device has used buffers", || wire.sim.net_stats().received == u64::from(wire.injected));
        let adopted = adopt(&two, &mut over).unwrap().remove(0);
        (over.0, adopted)
    };
    let (over, adopted) = adopted_with_frames(&mut wire);
    drop((held(&adopted), adopted, over));
    drop(wire.receive(&handle, 0));
    let (over, adopted) = adopted_with_frames(&mut wire);
    let (theirs, mut requests) = held(&adopted);
    assert_eq!(over.commit(), 1);
    let second = adopted.serve(Duration::ZERO).unwrap();
    drop(wire.receive(&theirs, 0));
    assert_eq!(theirs.submit(&mut requests), Ok(()));
    assert!(wire.sim.wait_sent(1, PATIENCE).is_some());
    drop((handle, binding, theirs));
    bed.ends_clean(&wire.sim, &two, &second);
}

#[test]
fn a_device_that_was_handed_over_is_given_nothing_and_its_handles_are_revoked() {
    let (wire, bed) = net(NetProfile::default());
    let (one, two) = (manager(), manager());
    let binding = bed.load(&one, |_| {});
    let handle = receiver(&binding, 0);
    let manifests = one.manifests().unwrap();
    let mut over = (one.hand_over(Duration::from_secs(1)).unwrap(), manifests);
    let mut requests = request(&handle, IoOp::Transmit, 0, &frame(1));
    handle.notify().clear();
    assert_eq!(handle.submit(&mut requests), Err(SubmitError::Held));
    // The gate holds clients for some seconds, and opens then, whatever the other one does.
    assert!(handle.notify().wait(Some(PATIENCE)), "it is held for ever");
    assert_eq!(handle.submit(&mut requests), Err(SubmitError::Held));
    let mut adopted = adopt(&two, &mut over).unwrap();
    assert_eq!(over.0.commit(), 1);
    assert_eq!(handle.submit(&mut requests), Err(SubmitError::Revoked));
    assert_eq!(handle.receive(true, &mut Arrivals::new()), 0);
    drop((requests, handle, binding));
    let second = adopted.remove(0).serve(Duration::ZERO).unwrap();
    assert_eq!(wire.sim.sent().len(), 0);
    bed.ends_clean(&wire.sim, &two, &second);
}

#[test]
fn pairs_of_queues_are_in_use_afterwards_and_each_has_its_own_frames() {
    let (mut wire, bed) = net(NetProfile { pairs: 4, ..NetProfile::default() });
    let (one, two) = (manager(), manager());
    let pairs = |binding: &Arc<Binding>| match binding.offer().as_deref() {
        Some(Offer::Net(net)) => net.pairs,
        other => panic!("{other:?}"),
    };
    let first = bed.load(&one, |_| {});
    assert_eq!(pairs(&first), 4);
    drop(first);
    let second = take_over(&one, &two);
    assert_eq!(pairs(&second), 4);
    // Each said so once: VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
    let commands = wire.sim.commands();
    let told = commands.into_iter().map(|command| (command.class, command.command, command.data));
    assert_eq!(told.collect::<Vec<_>>(), [(4, 0, vec![4, 0]), (4, 0, vec![4, 0])]);
    for pair in 0..4 {
        let handle = receiver(&second, usize::from(pair));
        let frame = Frame { pair, ..Frame::plain(&frame(u32::from(pair))) };
        assert!(wire.sim.inject(frame.clone()));
        let mut arrivals = Arrivals::new();
        until("the frame", || handle.receive(true, &mut arrivals) > 0);
        let mut bytes = Vec::new();
        arrivals.first().unwrap().read(&mut bytes).unwrap();
        assert_eq!(bytes, frame.bytes);
    }
    wire.injected = 0;
    bed.ends_clean(&wire.sim, &two, &second);
}

#[test]
fn posted_buffers_that_cannot_be_as_they_are_said_to_be_are_an_error_and_the_first_serves_on() {
    let (mut wire, bed) = net(NetProfile::default());
    let (one, two) = (manager(), manager());
    let binding = bed.load(&one, |spec| spec.ring_entries = 16);
    let handle = receiver(&binding, 0);
    type Change = fn(&str) -> String;
    let changes: [(&str, Change); 6] = [
        ("a buffer less", |state| state.replacen("\"posted\":[[0,0],", "\"posted\":[", 1)),
        ("a buffer twice", |state| state.replacen("\"posted\":[[0,0],[1,1]", "\"posted\":[[0,0],[1,0]", 1)),
        ("a descriptor twice", |state| state.replacen("\"posted\":[[0,0],[1,1]", "\"posted\":[[0,0],[0,1]", 1)),
        ("a buffer that there is not", |state| state.replacen("\"posted\":[[0,0]", "\"posted\":[[0,4000000000]", 1)),
        ("buffers somewhere else", |state| state.replacen("\"places\":[", "\"places\":[4096,", 1)),
        ("a ring somewhere else", |state| state.replacen("\"available\":16", "\"available\":17", 1)),
    ];
    for (what, change) in changes {
        let (mut over, manifests) = hand_over(&one).unwrap();
        let ExportedBinding { state, descriptors, transport, .. } = over.take_exported().remove(0);
        let changed = change(&state);
        assert_ne!(changed, state, "{what}: {state}");
        let (manifest, component) = &manifests[0];
        let prepared = two.prepare(manifest.clone(), component).unwrap();
        let device = VhostUser::adopt(transport).unwrap();
        assert!(two.adopt(prepared, &changed, descriptors, Box::new(device)).is_err(), "{what}");
        drop(over);
    }
    wire.inject(100);
    drop(wire.receive(&handle, 0));
    drop(handle);
    bed.ends_clean(&wire.sim, &one, &binding);
}

fn console() -> (SimConsole, Bed) {
    let log = PortProfile { name: Some("org.example.log".into()), console: false };
    let profile =
        ConsoleProfile { ports: vec![PortProfile { name: None, console: true }, log], ..ConsoleProfile::default() };
    let sim = SimConsole::new(profile, Behaviour::default()).unwrap();
    let bed = Bed::new(&sim, "virtio-console");
    (sim, bed)
}

fn ports(binding: &Arc<Binding>) -> Vec<StreamPort> {
    match binding.offer().as_deref() {
        Some(Offer::Stream(stream)) => stream.ports.clone(),
        other => panic!("{other:?}"),
    }
}

/// Takes what has arrived for the port until there is so much of it.
fn read(handle: &Handle, into: &mut Vec<u8>, bytes: usize) {
    let mut arrivals = Arrivals::new();
    until("the bytes", || {
        handle.receive(true, &mut arrivals);
        arrivals.iter().for_each(|arrival| arrival.read(into).unwrap());
        arrivals.clear();
        into.len() >= bytes
    });
    assert_eq!(into.len(), bytes);
}

#[test]
fn bytes_of_a_console_arrive_whole_and_in_order_and_its_ports_stay() {
    let (sim, bed) = console();
    let mut manager_now = manager();
    let mut binding = bed.load(&manager_now, |_| {});
    until("both ports", || ports(&binding).len() == 2 && ports(&binding).iter().all(|port| port.open));
    let known = ports(&binding);
    binding.set_open(0, true).unwrap();
    binding.set_open(1, true).unwrap();
    let byte = |at: usize| (at * 31 % 251) as u8;
    let (mut fed, mut got) = (0, Vec::new());
    let mut feed = |bytes: usize| {
        let piece: Vec<u8> = (fed..fed + bytes).map(byte).collect();
        assert_eq!(sim.feed(1, &piece), bytes);
        fed += bytes;
        fed
    };
    for turn in 0..6_u8 {
        let handle = receiver(&binding, 1);
        let sum = feed(70_000);
        read(&handle, &mut got, sum);
        send(&handle, IoOp::Send, 1, &[turn; 5000]);
        // More than there are buffers for.
        feed(150_000);
        let next = manager();
        let mut over = hand_over(&manager_now).unwrap();
        feed(100);
        let mut adopted = adopt(&next, &mut over).unwrap();
        assert_eq!(ports(adopted[0].binding()), known, "before the device is asked");
        let (over, since) = (over.0, Instant::now());
        assert_eq!(over.commit(), 1);
        drop(handle);
        binding = adopted.remove(0).serve(since.elapsed()).unwrap();
        manager_now = next;
        let sum = feed(100);
        let handle = receiver(&binding, 1);
        read(&handle, &mut got, sum);
        assert_eq!(sim.wait_written(1, 5000, PATIENCE).unwrap(), [turn; 5000]);
        drop(handle);
    }
    assert!(got.iter().enumerate().all(|(at, is)| *is == byte(at)));
    assert_eq!(ports(&binding), known);
    bed.ends_clean(&sim, &manager_now, &binding);
}

#[test]
fn what_a_console_says_of_itself_while_another_takes_over_is_heard_by_whoever_has_it() {
    let (sim, bed) = console();
    let (one, two) = (manager(), manager());
    let first = bed.load(&one, |_| {});
    until("both ports", || ports(&first).len() == 2 && ports(&first).iter().all(|port| port.open));
    let is =
        |binding: &Arc<Binding>, open: bool| ports(binding).iter().any(|port| port.index == 1 && port.open == open);
    // Heard before, while it is held, and heard by this one, which has it back.
    let over = hand_over(&one).unwrap();
    sim.set_open(1, false);
    drop(over);
    until("the port is closed", || is(&first, false));
    let mut over = hand_over(&one).unwrap();
    sim.set_open(1, true);
    sim.add_port(2, PortProfile { name: Some("late".into()), console: false });
    let mut adopted = adopt(&two, &mut over).unwrap();
    assert!(is(adopted[0].binding(), false), "nobody has looked");
    let told = sim.control().len();
    let refused = adopted[0].binding().set_open(1, true).unwrap_err().to_string();
    assert!(refused.contains("on its way to another process"), "{refused}");
    assert_eq!(sim.control().len(), told, "the device was told something");
    assert_eq!(over.0.commit(), 1);
    drop(first);
    let second = adopted.remove(0).serve(Duration::ZERO).unwrap();
    until("the port is open", || is(&second, true));
    until("the third port", || ports(&second).iter().any(|port| port.name.as_deref() == Some("late")));
    second.set_open(2, true).unwrap();
    assert!(sim.wait_open(2, true, PATIENCE));
    bed.ends_clean(&sim, &two, &second);
}

#[test]
fn a_control_queue_that_was_given_up_keeps_its_binding_where_it_is() {
    let (sim, bed) = console();
    let one = manager();
    let binding = bed.load(&one, |_| {});
    until("a port", || !ports(&binding).is_empty());
    assert_eq!(one.obstacles(), Vec::<String>::new());
    // A command that the device does not answer: the driver is told so, and the queue is not used again.
    sim.hang(false);
    assert!(binding.set_open(0, true).is_err());
    sim.release();
    let error = hand_over(&one).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("queue for commands was given up"), "{error}");
    let _ = binding.set_open(0, true);
    drop(one.unload_binding(&binding, &UnloadOptions::default()));
    drop(bed);
}
