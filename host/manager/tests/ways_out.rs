//! What must hold when bindings leave in unusual company.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam_device::transport::{QueueEvents, QueueSetup, Transport};
use cofferdam_device::{DmaRegion, TransportError};
use cofferdam_manager::{
    Binding, Buffer, Cause, Completion, Config, Handle, HandleSpec, HandleState, IoError, IoOp, IoRequest, LoadError,
    LoadSpec, Manager, Outcome, Phase, UnloadError, UnloadOptions,
};
use cofferdam_sim::{Drive, Effect, Hooked, Hooks, Lie, Options, Rule, Sim, Storage};

fn driver(name: &str) -> Vec<u8> {
    let path = format!("{}/../../target/drivers/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"))
}

fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

fn sim(rules: Vec<Rule>) -> Sim {
    Sim::new(Options { storage: Storage::Memory(16 << 20), rules, ..Options::default() }).unwrap()
}

/// Every request takes the device about this many milliseconds.
fn slow(ticks: u64) -> Vec<Rule> {
    vec![Rule::always(Effect::Slow { from: ticks, below: ticks + 1 })]
}

fn spec(sim: &Sim, name: &str) -> LoadSpec {
    let transport = Box::new(sim.transport(Drive::Threads).unwrap());
    LoadSpec { name: Some(name.into()), ..LoadSpec::new("virtio-blk.wasm", driver("virtio-blk.wasm"), transport) }
}

fn request(user: u64, op: IoOp, offset: u64, buffer: Option<Buffer>) -> IoRequest {
    let length = buffer.as_ref().map_or(0, Buffer::len);
    IoRequest { user, op, offset, length, flags: Default::default(), buffer }
}

fn start(handle: &Handle, op: IoOp, offset: u64) {
    let buffer = handle.lease(4096).unwrap();
    handle.submit(&mut vec![request(offset, op, offset, Some(buffer))]).unwrap();
}

fn answers(handle: &Handle, count: usize) -> Vec<Completion> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut out = Vec::new();
    while out.len() < count && Instant::now() < deadline {
        handle.poll(true, &mut out);
        std::thread::yield_now();
    }
    out
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(4);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within 4 s");
        std::thread::yield_now();
    }
}

fn gate() -> Vec<Rule> {
    vec![Rule::always(Effect::Gate)]
}

fn options(millis: u64) -> UnloadOptions {
    UnloadOptions { deadline: Duration::from_millis(millis), ..UnloadOptions::default() }
}

/// Says that it has come, and waits to be sent on.
type Pause = (Sender<()>, Arc<Mutex<Receiver<()>>>);

struct InMap(Option<Pause>);

impl Hooks for InMap {
    fn map(&mut self, device: &mut dyn Transport, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        if let Some((entered, go)) = self.0.take() {
            let _ = entered.send(());
            let _ = go.lock().unwrap().recv();
        }
        device.map(region)
    }
}

struct BlockingCall;

impl Hooks for BlockingCall {
    fn setup_queue(
        &mut self,
        device: &mut dyn Transport,
        setup: QueueSetup,
        call: OwnedFd,
    ) -> Result<QueueEvents, TransportError> {
        let events = device.setup_queue_with(setup, call)?;
        // What a backend can do to the descriptor it was sent: the flags are shared.
        rustix::fs::fcntl_setfl(events.call.as_fd(), rustix::fs::OFlags::empty()).unwrap();
        Ok(events)
    }
}

fn paused_load(sim: &Sim, manager: &Manager) -> (Sender<()>, std::thread::JoinHandle<Result<Arc<Binding>, LoadError>>) {
    let (entered, is_in) = channel();
    let (go, gone) = channel();
    let mut spec = spec(sim, "slow");
    let pause = InMap(Some((entered, Arc::new(Mutex::new(gone)))));
    spec.transport = Box::new(Hooked::new(spec.transport, pause));
    let manager = manager.clone();
    let loading = std::thread::spawn(move || manager.load(spec));
    is_in.recv().unwrap();
    (go, loading)
}

#[test]
fn dropping_the_last_manager_takes_its_bindings_down() {
    let sim = sim(Vec::new());
    let manager = manager();
    let binding = manager.load(spec(&sim, "dropped")).unwrap();
    drop(manager);
    assert!(binding.certificate().is_some(), "still {:?}", binding.phase());
}

#[test]
fn a_buffer_of_another_binding_is_refused() {
    let (one, two) = (sim(Vec::new()), sim(Vec::new()));
    let manager = manager();
    let a = manager.load(spec(&one, "one")).unwrap();
    let b = manager.load(spec(&two, "two")).unwrap();
    let (a, b) = (a.open(HandleSpec::default()).unwrap(), b.open(HandleSpec::default()).unwrap());
    let foreign = a.lease(4096).unwrap();
    let victim = b.lease(4096).unwrap();
    victim.write_at(0, b"secret of another client").unwrap();
    b.submit(&mut vec![request(1, IoOp::Read, 0, Some(foreign))]).unwrap();
    let answer = answers(&b, 1).remove(0);
    let mut now = [0; 6];
    victim.read_at(0, &mut now).unwrap();
    assert_eq!(
        (answer.result, &now),
        (Err(IoError::Invalid), b"secret"),
        "the device was sent into somebody else's lease"
    );
}

#[test]
fn a_pinned_binding_drains_too() {
    let sim = sim(slow(100));
    let manager = manager();
    let binding = manager.load(LoadSpec { pinned: true, ..spec(&sim, "pinned") }).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    start(&handle, IoOp::Write, 0);
    let stop = UnloadOptions { cause: Cause::Shutdown, ..options(5000) };
    let (other, leaving) = (manager.clone(), Arc::clone(&binding));
    let unload = std::thread::spawn(move || other.unload_binding(&leaving, &stop));
    until("draining", || binding.phase() != Phase::Serving);
    let certificate = unload.join().unwrap().unwrap();
    assert_eq!(answers(&handle, 1)[0].result, Ok(()), "{certificate:?}");
}

#[test]
fn a_pinned_binding_is_not_unloaded_and_keeps_its_memory_when_its_device_goes_away() {
    let sim = sim(Vec::new());
    let manager = manager();
    let binding = manager.load(LoadSpec { pinned: true, ..spec(&sim, "pinned") }).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    for force in [false, true] {
        let refused = manager.unload("pinned", &UnloadOptions { force, ..options(1000) }).unwrap_err();
        assert!(matches!(&refused, UnloadError::Pinned(name) if name == "pinned"), "{refused:?}");
    }
    assert_eq!(binding.phase(), Phase::Serving, "a refusal changes nothing");
    // Nor later: for longer than a force gives a driver.
    let refused = Instant::now();
    while refused.elapsed() < Duration::from_millis(400) {
        start(&handle, IoOp::Write, 0);
        assert_eq!(answers(&handle, 1)[0].result, Ok(()));
    }
    let arena_bytes = 8 << 20;
    assert!(binding.geometry().is_some());
    sim.die();
    until("it has left", || binding.certificate().is_some());
    assert_eq!(handle.state(), HandleState::Revoked);
    let certificate = binding.certificate().unwrap();
    assert_eq!(certificate.outcome, Outcome::Removed, "{certificate:?}");
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    // What clients and driver had, and the driver's own memory: all of it stays, and all of it is counted.
    assert!(certificate.leaked.bytes > arena_bytes, "{certificate:?}");
    assert!(certificate.leaked.reason.contains("--pinned"), "{certificate:?}");
    until("it is gone", || manager.get("pinned").is_none());
    let listed = manager.statuses();
    assert_eq!((listed.len(), listed[0].retired_bytes), (1, certificate.leaked.bytes), "{listed:?}");
}

#[test]
fn a_backend_cannot_make_the_call_descriptor_block_the_host() {
    let sim = sim(Vec::new());
    let manager = manager();
    let mut spec = spec(&sim, "blocking");
    spec.transport = Box::new(Hooked::new(spec.transport, BlockingCall));
    let binding = manager.load(spec).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        handle.poll(true, &mut Vec::new());
        let _ = done.send(());
    });
    let polled = is_done.recv_timeout(Duration::from_secs(2));
    let (left, is_left) = channel();
    std::thread::spawn(move || {
        let result = manager.unload_binding(&binding, &UnloadOptions { force: true, ..options(500) });
        let _ = left.send(result.is_ok());
        std::mem::forget((manager, binding));
    });
    let unloaded = is_left.recv_timeout(Duration::from_secs(4));
    assert!(polled.is_ok() && unloaded.is_ok(), "poll {polled:?}, forced unload of 500 ms after 4 s: {unloaded:?}");
}

#[test]
fn force_cuts_an_unload_short_that_is_running() {
    let sim = sim(gate());
    let manager = manager();
    let binding = manager.load(spec(&sim, "forced")).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    start(&handle, IoOp::Write, 0);
    let (other, leaving) = (manager.clone(), Arc::clone(&binding));
    let polite = std::thread::spawn(move || other.unload_binding(&leaving, &options(4000)).map_err(|e| e.to_string()));
    until("draining", || binding.phase() == Phase::Draining);
    let forced = manager.unload_binding(&binding, &UnloadOptions { force: true, ..options(1500) });
    let polite = polite.join().unwrap();
    let forced = forced.map_err(|error| error.to_string());
    let _ = manager.unload_binding(&binding, &UnloadOptions { force: true, ..options(1500) });
    assert!(forced.is_ok(), "forced: {forced:?}; polite: {polite:?}");
}

#[test]
fn a_device_lost_after_an_unload_gave_up_ends_the_binding() {
    let sim = sim(gate());
    let manager = manager();
    let binding = manager.load(spec(&sim, "given-up")).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    start(&handle, IoOp::Write, 0);
    let gave_up = manager.unload_binding(&binding, &options(50));
    assert!(matches!(gave_up, Err(UnloadError::StillDraining { .. })));
    sim.die();
    until("leaves by itself", || binding.certificate().is_some());
}

#[test]
fn a_device_lost_during_an_unload_is_what_the_certificate_says() {
    let sim = sim(gate());
    let manager = manager();
    let binding = manager.load(spec(&sim, "lost")).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    start(&handle, IoOp::Write, 0);
    let (other, leaving) = (manager.clone(), Arc::clone(&binding));
    let unload = std::thread::spawn(move || other.unload_binding(&leaving, &options(4000)));
    until("draining", || binding.phase() == Phase::Draining);
    sim.die();
    let certificate = unload.join().unwrap().unwrap();
    assert_eq!((certificate.outcome, certificate.requests_failed), (Outcome::Removed, 1));
}

#[test]
fn a_device_that_lies_while_an_unload_drains_does_not_hold_it_up() {
    let sim = sim(vec![Rule::always(Effect::Gate), Rule::always(Effect::Lie(Lie::NAMES[0].1))]);
    let manager = manager();
    let binding = manager.load(spec(&sim, "lies")).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    for number in 0..4 {
        start(&handle, IoOp::Write, number * 4096);
    }
    let (other, leaving) = (manager.clone(), Arc::clone(&binding));
    let unload = std::thread::spawn(move || other.unload_binding(&leaving, &options(3000)).map_err(|e| e.to_string()));
    until("draining", || binding.phase() == Phase::Draining);
    sim.open_gate(4);
    let result = unload.join().unwrap();
    let fault = binding.status().fault;
    let _ = manager.unload_binding(&binding, &UnloadOptions { force: true, ..options(1500) });
    assert!(result.is_ok(), "{result:?}, fault {fault:?}");
}

#[test]
fn a_name_that_continues_another_name_is_not_its_rest() {
    let (one, two) = (sim(Vec::new()), sim(Vec::new()));
    let manager = manager();
    manager.load(spec(&one, "prefix")).unwrap();
    manager.load(spec(&two, "prefix-rings")).unwrap();
    let certificate = manager.unload("prefix", &UnloadOptions::default()).unwrap();
    assert!(certificate.residual.is_zero(), "counted the other one's memory: {:?}", certificate.residual);
}

#[test]
fn a_load_that_ends_after_the_shutdown_does_not_serve() {
    let sim = sim(Vec::new());
    let manager = manager();
    let (go, loading) = paused_load(&sim, &manager);
    manager.shutdown(Duration::from_millis(200));
    go.send(()).unwrap();
    let loaded = loading.join().unwrap();
    assert!(loaded.is_err(), "{:?} after shutdown", loaded.map(|binding| binding.phase()));
}

#[test]
fn an_unload_during_a_load_sticks() {
    let sim = sim(Vec::new());
    let manager = manager();
    let (go, loading) = paused_load(&sim, &manager);
    let gave_up = manager.unload("slow", &options(50));
    assert!(matches!(gave_up, Err(UnloadError::StillDraining { .. })));
    go.send(()).unwrap();
    let loaded = loading.join().unwrap();
    let opened = loaded.as_ref().map(|binding| binding.open(HandleSpec::default()).is_ok());
    assert!(!matches!(opened, Ok(true)), "admits after 'still draining: admits nothing any more'");
}

#[test]
fn a_driver_that_traps_leaves_the_device_time_to_answer() {
    // Well below the five seconds that a binding gives its device when it leaves by itself.
    let sim = sim(slow(400));
    let manager = manager();
    let mut spec = spec(&sim, "trapped");
    (spec.component, spec.restarts) = (driver("test/trap-at-100.wasm"), None);
    let binding = manager.load(spec).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    let mut sent = 0;
    while binding.status().fault.is_none() && sent < 120 {
        let buffer = handle.lease(4096).unwrap();
        let _ = handle.submit(&mut vec![request(sent, IoOp::Write, sent * 4096, Some(buffer))]);
        sent += 1;
    }
    until("draining", || binding.phase() != Phase::Serving);
    until("detached", || binding.certificate().is_some());
    let lost = answers(&handle, sent as usize).iter().filter(|answer| answer.result == Err(IoError::Revoked)).count();
    assert_eq!(lost, 0, "of {sent}: {:?}", binding.certificate());
}
