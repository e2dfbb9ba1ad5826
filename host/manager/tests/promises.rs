//! What the ladder promises besides taking a binding down: bounds that hold whoever is in the way, and certificates and records whose every word is true.

#[path = "teardown/support.rs"]
#[allow(dead_code)]
mod support;

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam_device::transport::{Silence, Transport};
use cofferdam_device::{DmaRegion, TransportError};
use cofferdam_manager::{LoadSpec, Port, PortReport, UnloadError, UnloadOptions};
use cofferdam_sim::{Drive, Hooked, Hooks, Options, Profile, Rule, Sim, Storage};
use rustix::time::{ClockId, clock_gettime};

use crate::support::*;

type OnMap = Box<dyn FnMut(&mut dyn Transport, Arc<DmaRegion>) -> Result<(), TransportError> + Send>;

/// A say in what happens to memory that is mapped while it runs, and in its silence.
struct Slow {
    started: bool,
    on_map: Option<OnMap>,
    /// It is never silent, and takes all the time it is given to say so: a hung vhost-user backend.
    hung: bool,
}

impl Hooks for Slow {
    fn map(&mut self, device: &mut dyn Transport, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        match &mut self.on_map {
            Some(on_map) if self.started => on_map(device, region),
            _ => device.map(region),
        }
    }
    fn start(&mut self, device: &mut dyn Transport) -> Result<(), TransportError> {
        self.started = true;
        device.start()
    }
    fn quiesce(&mut self, device: &mut dyn Transport, unanswered: usize, deadline: Instant) -> Silence {
        if self.hung {
            std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
            return Silence::Unconfirmed { reason: "it hangs".to_owned() };
        }
        // A backend has to be asked, and nobody answers in no time.
        if deadline <= Instant::now() {
            return Silence::Unconfirmed { reason: "there was no time to ask".to_owned() };
        }
        device.quiesce(unanswered, deadline)
    }
}

fn slow(sim: &Sim, name: &str, hung: bool, on_map: Option<OnMap>) -> LoadSpec {
    let mut spec = spec(sim, name, BLK);
    spec.transport = Box::new(Hooked::new(spec.transport, Slow { started: false, on_map, hung }));
    spec
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// `Handle::drain` of a gate that counts nothing answers at once, so the wait for the last answers has no sleep in it.
#[test]
fn a_revocation_on_a_pinned_binding_sleeps_while_it_waits() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(LoadSpec { pinned: true, ..spec(&sim, "pinned-revoke", BLK) }).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let before = cpu_time();
    manager.revoke("pinned-revoke", handle.id(), Duration::from_millis(500)).expect_err("the device does not answer");
    let used = cpu_time() - before;
    assert!(used < Duration::from_millis(100), "{used:?} of processor time in a wait of 500 ms");
}

/// The same from inside a call, which the gate refuses to drain: asked for by a listener of a log line.
#[test]
fn a_revocation_from_inside_a_call_sleeps_while_it_waits() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "inside-revoke", LOGS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let (answer, answered) = channel();
    let (inside, id) = (manager.clone(), handle.id());
    at_line("inside-revoke", move || {
        let before = cpu_time();
        let _ = inside.revoke("inside-revoke", id, Duration::from_millis(500));
        answer.send(cpu_time() - before).unwrap();
    });
    bounded("the call", LONG, move || start(&handle, 0));
    let used = answered.recv_timeout(PATIENCE).unwrap();
    assert!(used < Duration::from_millis(100), "{used:?} of processor time in a wait of 500 ms");
}

/// `unload --deadline D` waits at most D. A client's `map` holds the device for as long as the bus gives the backend.
#[test]
fn an_unload_keeps_its_deadline_while_a_client_maps() {
    let (manager, sim) = (manager(), gated());
    let (begun, has_begun) = channel();
    let on_map: OnMap = Box::new(move |_, _| {
        begun.send(()).unwrap();
        // The bus's own limit: `ANSWER_LIMIT` of vhost-user.
        std::thread::sleep(Duration::from_secs(2));
        Err(TransportError::Timeout)
    });
    let binding = manager.load(slow(&sim, "mapping", false, Some(on_map))).unwrap();
    let (handle, other) = (open(&binding), open(&binding));
    start(&handle, 0);
    let mapper = std::thread::spawn(move || other.map(4096).map(drop));
    has_begun.recv_timeout(PATIENCE).unwrap();
    let asked = Instant::now();
    let result = manager.unload("mapping", &deadline(Duration::from_millis(100)));
    let took = asked.elapsed();
    sim.open_gate(1);
    let _ = mapper.join();
    assert!(matches!(result, Err(UnloadError::StillDraining { .. })), "{result:?}");
    assert!(took < Duration::from_millis(700), "a deadline of 100 ms took {took:?}");
}

/// New maps are refused before anything else, and what a client waits for costs nobody his memory: the second client's turn comes after the revocation, and the time
/// in which the device could have become silent is over when the ladder gets hold of it.
#[test]
fn a_client_that_maps_during_an_unload_is_refused_and_has_no_memory_retired() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let (begun, has_begun) = channel();
    let on_map: OnMap = Box::new(move |_, _| {
        begun.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(1200));
        Err(TransportError::Timeout)
    });
    let binding = manager.load(slow(&sim, "maps-late", false, Some(on_map))).unwrap();
    let mappers: Vec<_> = (0..2)
        .map(|number| {
            let handle = open(&binding);
            let mapper = std::thread::spawn(move || handle.map(4096).map(drop));
            until("its region is counted", || binding.mapped_use().regions == number + 1);
            mapper
        })
        .collect();
    has_begun.recv_timeout(PATIENCE).unwrap();
    let asked = Instant::now();
    let certificate = manager.unload("maps-late", &deadline(LONG)).unwrap();
    let took = asked.elapsed();
    mappers.into_iter().for_each(|mapper| drop(mapper.join()));
    let later = has_begun.try_iter().count();
    assert_eq!(
        (later, certificate.leaked.bytes),
        (0, 0),
        "maps after the revocation, bytes retired; after {took:?}: {certificate:?}"
    );
}

/// The epoll event of a loss comes once. The look for it gives up after 20 ms when somebody else has the device, and never looks again.
#[test]
fn a_loss_that_comes_while_a_client_maps_is_noticed() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let dying = sim.clone();
    let on_map: OnMap = Box::new(move |_, _| {
        dying.die();
        std::thread::sleep(Duration::from_millis(300));
        Err(TransportError::Lost)
    });
    let binding = manager.load(slow(&sim, "lost-mapping", false, Some(on_map))).unwrap();
    let handle = open(&binding);
    handle.map(4096).expect_err("the device is lost");
    let begun = Instant::now();
    while phase(&binding) != "detached" && begun.elapsed() < Duration::from_secs(4) {
        std::thread::yield_now();
    }
    assert_eq!(phase(&binding), "detached", "the device is gone, and the binding does not know");
}

/// SIGTERM: politely first, then by force, all of it within five seconds. Somebody's unload is waiting with the parts in its hands.
#[test]
fn a_shutdown_sees_the_end_of_what_another_unload_had_begun() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(slow(&sim, "waited-for", true, None)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let waiting = {
        let manager = manager.clone();
        std::thread::spawn(move || manager.unload("waited-for", &deadline(Duration::from_secs(60))))
    };
    until("it drains", || phase(&binding) == "draining");
    let begun = Instant::now();
    let certificates = manager.shutdown(Duration::from_millis(4500));
    let (took, there) = (begun.elapsed(), phase(&binding));
    let _ = waiting.join();
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!((there.as_str(), certificates.len()), ("detached", 1), "after {took:?} of 4.5 s");
}

/// Exit code 4 says what is waited for: also to whoever comes second.
#[test]
fn a_second_unload_is_told_what_it_waits_for() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "told-twice", BLK)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let first = {
        let manager = manager.clone();
        std::thread::spawn(move || manager.unload("told-twice", &deadline(Duration::from_secs(60))))
    };
    until("the first one drains", || binding.status().stage == "draining");
    let second = manager.unload("told-twice", &deadline(Duration::from_millis(100)));
    sim.open_gate(1);
    first.join().unwrap().unwrap();
    let Err(UnloadError::StillDraining { waiting_for, so_far, .. }) = second else { panic!("{second:?}") };
    assert!(waiting_for.contains("1 request on the ring"), "{waiting_for}");
    assert_eq!((so_far.handles_revoked, so_far.requests_at_close), (1, 1), "{so_far:?}");
}

/// Who unloads a binding that is not there is told so, and not of another one's end that had the name before.
#[test]
fn a_certificate_that_nobody_fetched_is_not_told_for_a_later_binding() {
    let manager = manager();
    let first = sim(Vec::new());
    manager.load(spec(&first, "same-name", BLK)).unwrap();
    first.die();
    until("the first has left by itself", || manager.get("same-name").is_none());
    let second = sim(Vec::new());
    manager.load(spec(&second, "same-name", BLK)).unwrap();
    let own = manager.unload("same-name", &deadline(LONG)).unwrap();
    assert_eq!(own.outcome, cofferdam_manager::Outcome::Unloaded);
    let again = manager.unload("same-name", &deadline(LONG));
    assert!(matches!(again, Err(UnloadError::NoSuchBinding(_))), "{again:?}");
}

/// G8 for the way out of everything: a callback that stops the host would otherwise wait for its own call.
#[test]
fn a_shutdown_from_inside_a_call_does_not_wait_for_that_call() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "inside-shutdown", LOGS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let (answer, answered) = channel();
    let inside = manager.clone();
    at_line("inside-shutdown", move || {
        let begun = Instant::now();
        inside.shutdown(Duration::from_secs(5));
        answer.send(begun.elapsed()).unwrap();
    });
    bounded("the call", PATIENCE, move || start(&handle, 0));
    let took = answered.recv_timeout(PATIENCE).unwrap();
    until("it has left", || phase(&binding) == "detached");
    let certificate = binding.certificate().unwrap();
    assert_eq!(certificate.leaked.bytes, 0, "after {took:?}: {certificate:?}");
    assert!(took < AT_ONCE, "{took:?}");
}

struct Stubborn {
    _listener: UnixListener,
    go: Receiver<()>,
}

impl Port for Stubborn {
    fn address(&self) -> String {
        "test:stubborn".into()
    }
    fn shutdown(self: Box<Self>, _grace: Duration) -> PortReport {
        let _ = self.go.recv();
        PortReport::default()
    }
}

/// `left: nothing` is a proof. A port that did not end has its thread and its sockets still, and `ports.rs` says that the residue finds them.
#[test]
fn a_port_that_was_left_behind_is_in_the_certificate() {
    let (manager, sim, folder) = (manager(), sim(Vec::new()), tempfile::tempdir().unwrap());
    let binding = manager.load(spec(&sim, "stubborn", BLK)).unwrap();
    let (stop, go) = channel();
    let listener = UnixListener::bind(folder.path().join("port")).unwrap();
    assert!(binding.attach_port(Box::new(Stubborn { _listener: listener, go })).is_ok());
    let certificate = manager.unload("stubborn", &deadline(LONG)).unwrap();
    drop(stop);
    let nothing = certificate.residual.is_zero() && certificate.leaked.reason.is_empty();
    assert!(!nothing, "a thread and a listening socket are there: {certificate:?}");
}

/// The drain reaps by itself, and so crosses into the driver on the ladder's own thread, for as long as a call may take.
#[test]
fn an_unload_keeps_its_deadline_while_it_reaps_itself() {
    let (manager, sim) = (manager(), gated());
    let mut spec = spec(&sim, "own-reap", LOOPS_IN_COMPLETE);
    spec.limits.call_deadline_ms = 4000;
    let binding = manager.load(spec).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let asked = Instant::now();
    let unload = {
        let manager = manager.clone();
        std::thread::spawn(move || {
            let result = manager.unload("own-reap", &deadline(Duration::from_millis(500)));
            (result, asked.elapsed())
        })
    };
    until("it drains", || binding.status().stage == "draining");
    sim.open_gate(1);
    let (result, took) = unload.join().unwrap();
    assert!(took < Duration::from_millis(1200), "a deadline of 500 ms took {took:?}: {result:?}");
}

/// Keeps every call that logs, until told to let go.
fn keep(name: &'static str, kept: &Arc<Mutex<usize>>, go: &Arc<AtomicBool>) {
    let (kept, go) = (Arc::clone(kept), Arc::clone(go));
    at_line(name, move || {
        *kept.lock().unwrap() += 1;
        keep(name, &kept, &go);
        while !go.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

/// `--force` ends a binding in about three seconds, however many lanes cannot be had: their bounds run at the same time.
#[test]
fn a_forced_unload_waits_for_stuck_lanes_together() {
    const LANES: usize = 3;
    let manager = manager();
    let sim = Sim::new(Options {
        profile: Profile { queues: LANES as u16, ..Profile::default() },
        storage: Storage::Memory(16 << 20),
        rules: Vec::<Rule>::new(),
        ..Options::default()
    })
    .unwrap();
    let transport = Box::new(sim.transport(Drive::Threads).unwrap());
    let mut spec = LoadSpec::new(LOGS_IN_SUBMIT, driver(LOGS_IN_SUBMIT), transport);
    (spec.name, spec.queues) = (Some("stuck-lanes".into()), Some(LANES as u16));
    let binding = manager.load(spec).unwrap();
    assert_eq!(binding.lanes(), LANES);
    let (kept, go) = (Arc::new(Mutex::new(0)), Arc::new(AtomicBool::new(false)));
    keep("stuck-lanes", &kept, &go);
    let clients: Vec<_> = (0..LANES)
        .map(|lane| {
            let handle = binding.open(cofferdam_manager::HandleSpec { lane, ..Default::default() }).unwrap();
            std::thread::spawn(move || start(&handle, 0))
        })
        .collect();
    until("every lane is kept", || *kept.lock().unwrap() == LANES);
    let begun = Instant::now();
    let options = UnloadOptions { force: true, ..deadline(LONG) };
    let result = manager.unload("stuck-lanes", &options);
    let took = begun.elapsed();
    go.store(true, Ordering::Release);
    clients.into_iter().for_each(|client| drop(client.join()));
    let certificate = result.unwrap();
    assert!(took < Duration::from_secs(5), "{took:?}: {:?}", certificate.stages);
}

/// A trap is an entry to the ladder of its own. An operator's patience with a healthy driver, and his losing it, do not end that.
#[test]
fn a_binding_whose_driver_failed_leaves_though_the_unload_that_waited_is_called_off() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "failed-waiting", TRAPS_IN_COMPLETE)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    start(&handle, 4096);
    let cancel = cofferdam_manager::Cancel::new();
    let waiting = {
        let (manager, cancel) = (manager.clone(), cancel.clone());
        let options = UnloadOptions { cancel: Some(cancel), ..deadline(Duration::from_secs(60)) };
        std::thread::spawn(move || manager.unload("failed-waiting", &options))
    };
    until("it drains", || binding.status().stage == "draining");
    sim.open_gate(1);
    until("the driver has trapped", || binding.status().fault.is_some());
    // What a binding that leaves by itself gives its device is five seconds.
    std::thread::sleep(Duration::from_millis(5500));
    cancel.cancel();
    let _ = waiting.join();
    let begun = Instant::now();
    while phase(&binding) != "detached" && begun.elapsed() < Duration::from_secs(4) {
        std::thread::yield_now();
    }
    assert_eq!(binding.status().stage, "detached", "its driver has failed, and nobody takes it down");
}

/// Order guaranteed: nothing is detached before it is attached.
#[test]
fn a_port_is_attached_before_it_is_detached() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "port-order", BLK)).unwrap();
    let mut events = manager.events(None);
    let stop = Arc::new(AtomicBool::new(false));
    let attacher = {
        let (binding, stop) = (Arc::clone(&binding), Arc::clone(&stop));
        std::thread::spawn(move || {
            let mut number = 0;
            while !stop.load(Ordering::Acquire) {
                number += 1;
                let port = HookedPort { address: format!("test:{number}"), shutdown: Box::new(|| ()) };
                let _ = binding.attach_port(Box::new(port));
                while binding.ports().len() > 8 && !stop.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
            }
        })
    };
    let detacher = {
        let (binding, stop) = (Arc::clone(&binding), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                for port in binding.ports() {
                    let _ = binding.detach_port(&port);
                }
            }
        })
    };
    let (mut attached, mut wrong) = (std::collections::HashSet::new(), None);
    let begun = Instant::now();
    while wrong.is_none() && begun.elapsed() < Duration::from_secs(5) {
        let Some(record) = events.next(Duration::from_millis(100)) else { continue };
        match record.what {
            cofferdam_manager::EventKind::PortAttached { port } => drop(attached.insert(port)),
            cofferdam_manager::EventKind::PortDetached { port, .. } if !attached.remove(&port) => wrong = Some(port),
            cofferdam_manager::EventKind::Gap { .. } => break,
            _ => {}
        }
    }
    stop.store(true, Ordering::Release);
    attacher.join().unwrap();
    detacher.join().unwrap();
    assert_eq!(wrong, None, "it was detached before it was attached");
}

/// *Completed* is what the device has answered: not what it still has, when the wait is over.
#[test]
fn what_is_still_with_the_device_is_not_completed() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "so-far", BLK)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let result = manager.unload("so-far", &deadline(Duration::from_millis(50)));
    sim.open_gate(1);
    let Err(UnloadError::StillDraining { so_far, .. }) = result else { panic!("{result:?}") };
    assert_eq!((so_far.residual.requests, so_far.requests_completed), (1, 0), "{so_far:?}");
}

/// Nor is what stays in a lane that cannot be looked into; and a call that has not left was not drained.
#[test]
fn what_is_left_in_a_stuck_lane_is_neither_completed_nor_drained() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "stuck-count", LOGS_IN_SUBMIT)).unwrap();
    let (kept, go) = (Arc::new(Mutex::new(0)), Arc::new(AtomicBool::new(false)));
    keep("stuck-count", &kept, &go);
    let handle = open(&binding);
    let client = std::thread::spawn(move || start(&handle, 0));
    until("the lane is kept", || *kept.lock().unwrap() == 1);
    let result = manager.unload("stuck-count", &UnloadOptions { force: true, ..deadline(LONG) });
    go.store(true, Ordering::Release);
    drop(client.join());
    let c = result.unwrap();
    assert_eq!((c.calls_at_close, c.residual.calls, c.requests_at_close, c.residual.requests), (1, 1, 1, 1), "{c:?}");
    assert_eq!((c.requests_completed, c.calls_drained), (0, 0), "{c:?}");
}
