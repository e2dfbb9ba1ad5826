//! Services that are no disk: entropy and streams, on the sim, through the real drivers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Arrival, Arrivals, Binding, Completion, Config, EventKind, Handle, HandleSpec, IoError, IoFlags, IoOp, IoRequest,
    LoadSpec, Manager, Offer, OpenError, Outcome, Phase, RestartPolicy, StreamPort, StreamProperties, Transport,
    UnloadOptions, UpgradeSpec,
};
use cofferdam_sim::{Behaviour, ConsoleProfile, Drive, EntropyProfile, Quiescence, SimConsole, SimRng};

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);

fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

fn load(manager: &Manager, component: &str, transport: impl Transport + 'static) -> Arc<Binding> {
    let path = format!("{}/../../target/drivers/{component}", env!("CARGO_MANIFEST_DIR"));
    let driver = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"));
    let mut spec = LoadSpec::new(component, driver, Box::new(transport));
    spec.queues = None;
    // As often as a test has it break down.
    spec.restarts = Some(RestartPolicy { limit: 1000, backoff: Duration::ZERO, ..RestartPolicy::default() });
    manager.load(spec).unwrap()
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What one request is answered.
fn ask(handle: &Handle, op: IoOp, offset: u64, length: u32, payload: &[u8]) -> Completion {
    let buffer = handle.lease(length).unwrap();
    buffer.write_at(0, payload).unwrap();
    let flags = IoFlags::default();
    let mut requests = vec![IoRequest { user: 7, op, offset, length, flags, buffer: Some(buffer) }];
    handle.submit(&mut requests).unwrap();
    let mut out = Vec::new();
    until("an answer", || {
        handle.poll(false, &mut out);
        !out.is_empty()
    });
    out.remove(0)
}

fn is_clean(manager: &Manager, binding: &Arc<Binding>) {
    let certificate = manager.unload_binding(binding, &UnloadOptions::default()).unwrap();
    assert_eq!(certificate.outcome, Outcome::Unloaded, "{certificate:?}");
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
}

#[test]
fn entropy_is_what_the_device_placed_in_order_and_no_more() {
    let seed = 11;
    let sim = SimRng::new(EntropyProfile::default(), Behaviour { seed, ..Behaviour::default() }).unwrap();
    let manager = manager();
    let binding = load(&manager, "virtio-rng.wasm", sim.transport(Drive::Threads).unwrap());
    assert!(matches!(*binding.offer().unwrap(), Offer::Entropy(_)), "{:?}", binding.offer());
    assert!(binding.geometry().is_none());
    let handle = binding.open(HandleSpec::default()).unwrap();
    let mut all = Vec::new();
    for length in [1, 5, 64, 4096, 65_536, 3] {
        let answer = ask(&handle, IoOp::Fill, 0, length, &[]);
        assert_eq!(answer.result, Ok(()));
        assert!((1..=length).contains(&answer.bytes), "{} of {length}", answer.bytes);
        let mut bytes = vec![0; answer.bytes as usize];
        answer.buffer.unwrap().read_at(0, &mut bytes).unwrap();
        all.extend(bytes);
    }
    assert_eq!(all, SimRng::stream(seed, all.len()));
    // What is not this service's is refused by the host.
    assert_eq!(ask(&handle, IoOp::Read, 0, 512, &[]).result, Err(IoError::Unsupported));
    assert_eq!(ask(&handle, IoOp::Fill, 8, 512, &[]).result, Err(IoError::Invalid));
    assert_eq!(sim.violations(), []);
    drop(handle);
    is_clean(&manager, &binding);
}

fn console(profile: ConsoleProfile) -> (SimConsole, Manager, Arc<Binding>) {
    console_of("virtio-console.wasm", profile)
}

fn console_of(driver: &str, profile: ConsoleProfile) -> (SimConsole, Manager, Arc<Binding>) {
    // Posted buffers must not keep a device from silence that is silent when its rings stop.
    let behaviour = Behaviour { quiescence: Quiescence::default(), ..Behaviour::default() };
    let sim = SimConsole::new(profile, behaviour).unwrap();
    let manager = manager();
    let binding = load(&manager, driver, sim.transport(Drive::Threads).unwrap());
    // It is added by a message (section 5.3.6.2).
    until("the console", || port(&binding, 0).is_some_and(|port| port.console));
    (sim, manager, binding)
}

fn streams(binding: &Binding) -> StreamProperties {
    match &*binding.offer().unwrap() {
        Offer::Stream(streams) => streams.clone(),
        other => panic!("{other:?}"),
    }
}

fn port(binding: &Binding, index: u32) -> Option<StreamPort> {
    streams(binding).ports.into_iter().find(|port| port.index == index)
}

fn receiver(binding: &Arc<Binding>, lane: usize) -> Handle {
    binding.open(HandleSpec { lane, receives: true, ..HandleSpec::default() }).unwrap()
}

/// Waits until so many bytes came.
fn read(handle: &Handle, bytes: usize) -> Vec<u8> {
    let mut got = Vec::new();
    let mut arrivals = Arrivals::new();
    until("the bytes", || {
        handle.receive(false, &mut arrivals);
        for arrival in arrivals.iter() {
            arrival.read(&mut got).unwrap();
        }
        arrivals.clear();
        got.len() >= bytes
    });
    got
}

#[test]
fn a_port_carries_bytes_both_ways_in_order() {
    let (sim, manager, binding) = console(ConsoleProfile::default());
    let first = streams(&binding).ports[0].clone();
    let handle = receiver(&binding, usize::from(first.set));
    let _ = binding.set_open(first.index, true);
    let text: Vec<u8> = (0..100_000_u32).map(|at| at as u8).collect();
    let mut fed = 0;
    let mut got = Vec::new();
    while got.len() < text.len() {
        fed += sim.feed(0, &text[fed..]);
        let more = read(&handle, 1);
        got.extend(more);
    }
    assert_eq!(got, text);
    for piece in text.chunks(4096) {
        let answer = ask(&handle, IoOp::Send, first.index.into(), piece.len() as u32, piece);
        assert_eq!(answer.result, Ok(()));
    }
    assert_eq!(sim.wait_written(0, text.len(), PATIENCE).unwrap(), text);
    // A port that the lane does not carry is none.
    assert_eq!(ask(&handle, IoOp::Send, 77, 1, &[0]).result, Err(IoError::Invalid));
    assert_eq!(sim.violations(), []);
    drop(handle);
    is_clean(&manager, &binding);
}

#[test]
fn one_client_at_a_time_takes_what_arrives() {
    let (_sim, manager, binding) = console(ConsoleProfile::default());
    let handle = receiver(&binding, 0);
    let second = binding.open(HandleSpec { receives: true, ..HandleSpec::default() });
    assert!(matches!(second, Err(OpenError::Taken(0))));
    let other = binding.open(HandleSpec::default()).unwrap();
    assert_eq!(other.receive(false, &mut Arrivals::new()), 0);
    drop(handle);
    drop(receiver(&binding, 0));
    drop(other);
    is_clean(&manager, &binding);
}

#[test]
fn a_device_whose_client_does_not_read_runs_out_of_buffers_and_goes_on_when_it_does() {
    let (sim, manager, binding) = console(ConsoleProfile::default());
    let _ = binding.set_open(0, true);
    let handle = receiver(&binding, 0);
    sim.set_flood(0, true);
    // What the client holds is what the device has not.
    let mut held = Arrivals::new();
    let mut quiet = 0;
    until("no more comes", || {
        let found = handle.receive(true, &mut held);
        quiet = if found == 0 { quiet + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(1));
        quiet > 100
    });
    let bytes: usize = held.iter().map(Arrival::len).sum();
    assert!(bytes <= 64 * 4096, "{bytes} bytes were posted");
    let mut got = Vec::new();
    held.iter().for_each(|arrival| arrival.read(&mut got).unwrap());
    held.clear();
    got.extend(read(&handle, 10 * bytes));
    assert!(got.iter().enumerate().all(|(at, byte)| *byte == SimConsole::flood_byte(at as u64)), "out of order");
    drop(handle);
    is_clean(&manager, &binding);
}

#[test]
fn arrivals_that_outlive_their_binding_hold_nothing() {
    let (sim, manager, binding) = console(ConsoleProfile::default());
    let _ = binding.set_open(0, true);
    let handle = receiver(&binding, 0);
    let mut held = Arrivals::new();
    until("something", || {
        sim.feed(0, b"kept");
        handle.receive(false, &mut held) > 0
    });
    is_clean(&manager, &binding);
    assert!(held.first().unwrap().read(&mut Vec::new()).is_err());
    drop(held);
    assert_eq!(handle.receive(false, &mut Arrivals::new()), 0);
}

#[test]
fn another_version_of_the_driver_finds_the_ports_where_they_were() {
    let (sim, manager, binding) = console(ConsoleProfile::default());
    let handle = receiver(&binding, 0);
    let _ = binding.set_open(0, true);
    sim.resize(132, 43);
    until("the size", || port(&binding, 0).is_some_and(|port| port.size == Some((132, 43))));
    // Waits for the call that brought it, which has to tell of it, too.
    let _ = binding.set_open(0, true);
    let before = streams(&binding);
    let mut events = manager.events(None);
    while events.next(Duration::ZERO).is_some() {}
    let path = format!("{}/../../target/drivers/virtio-console.wasm", env!("CARGO_MANIFEST_DIR"));
    for round in 0..5 {
        let component = std::fs::read(&path).unwrap();
        let (deadline, probation) = (Duration::from_secs(2), Duration::ZERO);
        let spec = UpgradeSpec { driver: format!("console-{round}"), component, deadline, probation };
        manager.upgrade(binding.name(), spec).unwrap();
        assert_eq!(streams(&binding), before);
        sim.feed(0, b"still here");
        assert_eq!(read(&handle, 10), b"still here");
    }
    let told = std::iter::from_fn(|| events.next(Duration::ZERO));
    let changes: Vec<_> = told.filter(|event| matches!(event.what, EventKind::ConfigChanged { .. })).collect();
    assert!(changes.is_empty(), "{changes:?}");
    drop(handle);
    is_clean(&manager, &binding);
}

#[test]
fn a_control_lane_that_breaks_down_leaves_the_ports_where_they_were() {
    // It panics whenever it is told that the configuration has changed.
    let (sim, manager, binding) = console_of("test/hostile-stream.wasm", ConsoleProfile::default());
    let handle = receiver(&binding, 0);
    binding.set_open(0, true).unwrap();
    assert!(sim.wait_open(0, true, PATIENCE));
    until("the other side", || port(&binding, 0).is_some_and(|port| port.open));
    let before = streams(&binding);
    let mut events = manager.events(None);
    while events.next(Duration::ZERO).is_some() {}
    for _ in 0..3 {
        let crashes = binding.crash_count();
        sim.announce_config();
        // The driver that came is called once more, and breaks down as well.
        until("two crashes", || binding.crash_count() >= crashes + 2 && binding.phase() == Phase::Serving);
        assert_eq!(streams(&binding), before);
        sim.feed(0, b"still here");
        assert_eq!(read(&handle, 10), b"still here");
    }
    let told = std::iter::from_fn(|| events.next(Duration::ZERO));
    let changes: Vec<_> = told.filter(|event| matches!(event.what, EventKind::ConfigChanged { .. })).collect();
    assert!(changes.is_empty(), "{changes:?}");
    drop(handle);
    is_clean(&manager, &binding);
}

#[test]
fn ports_come_go_and_are_resized_and_whoever_has_a_handle_is_told() {
    let (sim, manager, binding) = console(ConsoleProfile::default());
    let handle = receiver(&binding, 0);
    let seen = handle.notify().count();
    sim.resize(132, 43);
    until("the size", || port(&binding, 0).is_some_and(|port| port.size == Some((132, 43))));
    until("the notice", || handle.notify().count() > seen);
    sim.set_open(0, false);
    until("closed by the other side", || port(&binding, 0).is_some_and(|port| !port.open));
    sim.set_open(0, true);
    until("opened by the other side", || port(&binding, 0).is_some_and(|port| port.open));
    binding.set_open(0, true).unwrap();
    assert!(sim.wait_open(0, true, PATIENCE));
    binding.set_open(0, false).unwrap();
    assert!(sim.wait_open(0, false, PATIENCE));
    sim.remove_port(0);
    until("removed", || port(&binding, 0).is_none());
    assert_eq!(ask(&handle, IoOp::Send, 0, 1, &[0]).result, Err(IoError::Invalid));
    drop(handle);
    is_clean(&manager, &binding);
}

#[test]
fn a_flood_of_control_messages_is_bounded_and_does_not_hold_up_an_unload() {
    let (sim, manager, binding) = console(ConsoleProfile::default());
    sim.flood_control(&[0xff; 8], 100_000);
    let handle = receiver(&binding, 0);
    let answer = ask(&handle, IoOp::Send, 0, 1, b"x");
    assert_eq!(answer.result, Ok(()));
    drop(handle);
    is_clean(&manager, &binding);
}
