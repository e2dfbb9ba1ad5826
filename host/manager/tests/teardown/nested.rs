//! Asked for by a part of a teardown that is under way.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam_manager::{Binding, Manager, PortError};

use crate::support::*;

/// What the ladder gives a port that does not come back, and a busy machine on top.
const LEFT_BEHIND: Duration = Duration::from_secs(3);

/// Unloads on a thread of its own, within a limit that no wait for itself would keep.
fn unload(manager: &Manager, name: &'static str) -> cofferdam_manager::Certificate {
    let manager = manager.clone();
    bounded(name, PATIENCE, move || manager.unload(name, &deadline(LONG))).unwrap()
}

/// Rust-for-Linux, `Devres` (broken by f5d3ef25d238, mended by ba268514ea14): a registration that devres tears down held
/// the last reference to a `drm::Device`, which held a `Devres` of its own. Dropping that one inside the first one's
/// callback waited for a callback that could only run when the first had returned: rmmod hung. Here the port of one
/// binding owns the other binding's last user, and unloads it on its way out.
#[test]
fn nested_devres_teardown() {
    let manager = manager();
    let (outer_sim, inner_sim) = (sim(Vec::new()), sim(Vec::new()));
    let outer = manager.load(spec(&outer_sim, "outer", BLK)).unwrap();
    let inner = manager.load(spec(&inner_sim, "inner", BLK)).unwrap();
    let (asked, was_asked) = channel();
    let (inside, handle, owned) = (manager.clone(), open(&inner), Arc::clone(&inner));
    attach(&outer, move || {
        drop(handle);
        asked.send(Asked::unload(&inside, owned.name())).unwrap();
        drop(owned);
    });
    unload(&manager, "outer");
    was_asked.recv_timeout(PATIENCE).expect("it asked").assert_deferred();
    left_clean(&outer);
    left_clean(&inner);
    assert_eq!((ends(&manager, "outer"), ends(&manager, "inner")), (1, 1));
}

/// The same registration, three deep, and the innermost asks for the outermost: a chain that closes.
#[test]
fn a_chain_of_teardowns_that_closes() {
    let names = ["chain-0", "chain-1", "chain-2"];
    let manager = manager();
    let sims = names.map(|_| sim(Vec::new()));
    let bindings: Vec<_> =
        names.iter().zip(&sims).map(|(name, sim)| manager.load(spec(sim, name, BLK)).unwrap()).collect();
    let (asked, was_asked) = channel();
    for (number, binding) in bindings.iter().enumerate() {
        let (inside, asked, next) = (manager.clone(), asked.clone(), names[(number + 1) % names.len()]);
        attach(binding, move || asked.send(Asked::unload(&inside, next)).unwrap());
    }
    unload(&manager, names[0]);
    for binding in &bindings {
        left_clean(binding);
        assert_eq!(ends(&manager, binding.name()), 1);
    }
    // The last of them may ask for one that is over already, and have its certificate.
    for _ in names {
        let asked = was_asked.recv_timeout(PATIENCE).expect("it asked");
        assert!(asked.took < AT_ONCE, "{asked:?}");
    }
}

/// Two that each wait for the other: A's port unloads B and B's port unloads A, both at the same time, each after the
/// other has begun.
#[test]
fn two_bindings_that_unload_each_other_from_their_ports() {
    let manager = manager();
    let (one, two) = (sim(Vec::new()), sim(Vec::new()));
    let a = manager.load(spec(&one, "mutual-a", BLK)).unwrap();
    let b = manager.load(spec(&two, "mutual-b", BLK)).unwrap();
    let meeting = Arc::new(std::sync::Barrier::new(2));
    let (asked, was_asked) = channel();
    for (own, other) in [(&a, "mutual-b"), (&b, "mutual-a")] {
        let (inside, meeting, asked) = (manager.clone(), Arc::clone(&meeting), asked.clone());
        attach(own, move || {
            meeting.wait();
            asked.send(Asked::unload(&inside, other)).unwrap();
            // Neither is over before the other has asked for it.
            meeting.wait();
        });
    }
    let both = ["mutual-a", "mutual-b"].map(|name| {
        let manager = manager.clone();
        std::thread::spawn(move || manager.unload(name, &deadline(LONG)))
    });
    for binding in [&a, &b] {
        left_clean(binding);
        assert_eq!(ends(&manager, binding.name()), 1);
    }
    for thread in both {
        thread.join().unwrap().expect("its own unload comes to an end");
    }
    for _ in 0..2 {
        was_asked.recv_timeout(PATIENCE).expect("it asked").assert_deferred();
    }
}

/// A port that unloads its own binding from its shutdown, which is that binding's unload.
#[test]
fn unload_from_inside_the_shutdown_of_its_own_port() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "own-port", BLK)).unwrap();
    let (asked, was_asked) = channel();
    let inside = manager.clone();
    attach(&binding, move || asked.send(Asked::unload(&inside, "own-port")).unwrap());
    let certificate = unload(&manager, "own-port");
    let asked = was_asked.recv_timeout(PATIENCE).expect("it asked");
    asked.assert_deferred();
    assert_eq!(&certificate, &left_clean(&binding), "one teardown, one certificate");
    assert_eq!(ends(&manager, "own-port"), 1);
}

/// The port is detached alone, the binding serves on; its shutdown unloads the binding, whose ladder waits for the ports
/// that are being detached.
#[test]
fn unload_from_inside_a_detach_of_the_port() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "detached-port", BLK)).unwrap();
    let (asked, was_asked) = channel();
    let inside = manager.clone();
    attach(&binding, move || asked.send(Asked::unload(&inside, "detached-port")).unwrap());
    let detaching = Arc::clone(&binding);
    bounded("the detach", LEFT_BEHIND, move || detaching.detach_port("test:detached-port")).expect("it ended");
    was_asked.recv_timeout(PATIENCE).expect("it asked").assert_deferred();
    left_clean(&binding);
}

/// A port that detaches itself, or another, from its own shutdown: one is not there any more, the other is done.
#[test]
fn a_detach_from_inside_a_detach() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "detach-twice", BLK)).unwrap();
    let other = HookedPort { address: "test:other".into(), shutdown: Box::new(|| ()) };
    assert!(binding.attach_port(Box::new(other)).is_ok());
    let (asked, was_asked) = channel();
    let inside = Arc::downgrade(&binding);
    attach(&binding, move || {
        let binding = inside.upgrade().expect("it serves");
        let results = (binding.detach_port("test:detach-twice"), binding.detach_port("test:other"));
        asked.send(results).unwrap();
    });
    let detaching = Arc::clone(&binding);
    bounded("the detach", LEFT_BEHIND, move || detaching.detach_port("test:detach-twice")).expect("it ended");
    let (own, other) = was_asked.recv_timeout(PATIENCE).expect("it asked");
    assert!(matches!(own, Err(PortError::NoSuchPort(_))), "{own:?}");
    assert!(other.is_ok(), "{other:?}");
    assert_eq!(binding.ports(), Vec::<String>::new());
    unload(&manager, "detach-twice");
    left_clean(&binding);
}

/// A port with a worker, whose shutdown joins it.
struct Worker {
    unload: Sender<()>,
    unloaded: Receiver<Asked>,
    thread: std::thread::JoinHandle<()>,
}

/// The worker that unloads its binding when it is told to.
fn worker(manager: &Manager, name: &'static str) -> Worker {
    let (unload, told) = channel::<()>();
    let (asked, unloaded) = channel();
    let manager = manager.clone();
    let thread = std::thread::spawn(move || {
        if told.recv().is_ok() {
            let _ = asked.send(Asked::unload(&manager, name));
        }
    });
    Worker { unload, unloaded, thread }
}

/// The ladder joins a worker of the port, and the worker waits for the ladder (the classic of `flush_work` from the work
/// itself, over two threads, so that no thread can see it alone). The port is left behind after its second; the ladder
/// ends, so the worker's wait ends, so the port ends too.
#[test]
fn a_worker_that_unloads_while_the_ladder_joins_it() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "joined", BLK)).unwrap();
    let Worker { unload, unloaded, thread } = worker(&manager, "joined");
    let (ended, has_ended) = channel();
    attach(&binding, move || {
        unload.send(()).unwrap();
        thread.join().unwrap();
        ended.send(()).unwrap();
    });
    let begun = Instant::now();
    let unloading = manager.clone();
    let certificate = bounded("the unload", LEFT_BEHIND, move || unloading.unload("joined", &deadline(LONG))).unwrap();
    assert!(begun.elapsed() < LEFT_BEHIND);
    let asked = unloaded.recv_timeout(PATIENCE).expect("the worker's wait ended");
    // Whether it came to wait for the ladder or found it over, there is one certificate.
    assert_eq!(asked.result.expect("the same teardown"), certificate);
    has_ended.recv_timeout(PATIENCE).expect("the port ended when its worker had");
    left_clean(&binding);
    assert_eq!(ends(&manager, "joined"), 1);
}

/// The worker began first: its unload is the ladder, which shuts down the port that joins this worker.
#[test]
fn a_worker_whose_own_unload_joins_it() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "self-joined", BLK)).unwrap();
    let Worker { unload, unloaded, thread } = worker(&manager, "self-joined");
    let (ended, has_ended) = channel();
    attach(&binding, move || {
        thread.join().unwrap();
        ended.send(()).unwrap();
    });
    unload.send(()).unwrap();
    let asked = unloaded.recv_timeout(LEFT_BEHIND).expect("it comes back, without its port");
    asked.result.expect("the teardown is complete");
    has_ended.recv_timeout(PATIENCE).expect("then the port ends as well");
    left_clean(&binding);
}

/// A handle with requests in flight, closed by a part of the ladder of its own binding: close is infallible and waits for
/// nothing, whoever calls it.
#[test]
fn a_handle_dropped_inside_the_ladder() {
    let manager = manager();
    for (name, calls) in
        [("drop-in-port", None), ("drop-in-quiesce", Some(Call::Quiesce)), ("drop-in-release", Some(Call::Release))]
    {
        let sim = gated();
        let slot: Arc<Mutex<Option<cofferdam_manager::Handle>>> = Arc::default();
        let (dropped, was_dropped) = channel();
        let given = Arc::clone(&slot);
        let hook = move || {
            let begun = Instant::now();
            drop(given.lock().unwrap().take().expect("it is open"));
            dropped.send(begun.elapsed()).unwrap();
        };
        let binding = match calls {
            Some(call) => manager.load(hooked(spec(&sim, name, BLK), call, hook)).unwrap(),
            None => {
                let binding = manager.load(spec(&sim, name, BLK)).unwrap();
                attach(&binding, hook);
                binding
            }
        };
        let handle = open(&binding);
        start(&handle, 0);
        *slot.lock().unwrap() = Some(handle);
        sim.open_gate(1);
        unload(&manager, name);
        assert!(was_dropped.recv_timeout(PATIENCE).expect("it was dropped") < AT_ONCE, "{name}");
        left_clean(&binding);
    }
}

/// Waits for a binding that the hooks cannot name before it is loaded.
fn ask(manager: &Manager, name: &'static str) -> (impl FnOnce() + Send + 'static, Receiver<Asked>) {
    let (asked, was_asked) = channel();
    let manager = manager.clone();
    (move || asked.send(Asked::unload(&manager, name)).unwrap(), was_asked)
}

/// From inside the device's transport, on each thread of the host that calls it: the one that loads, the one that
/// watches, the one that is on the ladder. Each holds locks that the teardown needs (Linux `__device_attach`: the lock of
/// the device, taken again by what it calls).
#[test]
fn unload_from_inside_the_transport_on_the_ladder() {
    let manager = manager();
    for (name, call) in [("in-quiesce", Call::Quiesce), ("in-release", Call::Release)] {
        let sim = sim(Vec::new());
        let (hook, was_asked) = ask(&manager, name);
        let binding = manager.load(hooked(spec(&sim, name, BLK), call, hook)).unwrap();
        unload(&manager, name);
        was_asked.recv_timeout(PATIENCE).expect("it asked").assert_deferred();
        left_clean(&binding);
        assert_eq!(ends(&manager, name), 1);
    }
}

/// See above.
#[test]
fn unload_from_inside_the_transport_on_the_loading_thread() {
    let manager = manager();
    for (name, call) in [("in-map", Call::Map), ("in-setup", Call::SetupQueue), ("in-start", Call::Start)] {
        let sim = sim(Vec::new());
        let (hook, was_asked) = ask(&manager, name);
        let loading = manager.clone();
        let spec = hooked(spec(&sim, name, BLK), call, hook);
        let loaded = bounded("the load", PATIENCE, move || loading.load(spec));
        let asked = was_asked.recv_timeout(PATIENCE).expect("it asked");
        assert!(asked.took < AT_ONCE, "{name}: {asked:?}");
        assert!(asked.result.is_err(), "{name}: {asked:?}");
        until("the name is free", || manager.get(name).is_none());
        if let Ok(binding) = loaded {
            left_clean(&binding);
        }
        manager.load(crate::support::spec(&sim, name, BLK)).expect("name and device are free");
    }
}

/// See above: the thread that noticed the loss holds the transport while it asks it.
#[test]
fn unload_from_inside_the_transport_on_the_watching_thread() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let (hook, was_asked) = ask(&manager, "in-is-lost");
    let binding = manager.load(hooked(spec(&sim, "in-is-lost", BLK), Call::IsLost, hook)).unwrap();
    sim.die();
    let asked = was_asked.recv_timeout(PATIENCE).expect("it asked and came back");
    assert!(asked.took < AT_ONCE, "{asked:?}");
    left_clean(&binding);
    assert_eq!(ends(&manager, "in-is-lost"), 1);
}

/// A listener of the log that unloads at whatever the ladder itself says first: on the ladder's thread, under its locks.
#[test]
fn unload_from_a_log_line_of_the_ladder() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "ladder-line", BLK)).unwrap();
    let (hook, was_asked) = ask(&manager, "ladder-line");
    let unloading = manager.clone();
    let certificate = bounded("the unload", PATIENCE, move || {
        at_event_here(hook);
        unloading.unload("ladder-line", &deadline(LONG))
    });
    certificate.expect("the outer one goes on");
    let asked = was_asked.recv_timeout(PATIENCE).expect("the ladder says what it does");
    assert!(asked.took < AT_ONCE, "{asked:?}");
    left_clean(&binding);
    assert_eq!(ends(&manager, "ladder-line"), 1);
}

/// The last manager goes away on a thread of the ladder: of a port, and of the transport. The binding leaves by itself,
/// because its device is lost, so nobody else holds the manager.
#[test]
fn the_last_manager_dropped_inside_the_ladder() {
    for call in [None, Some(Call::Quiesce), Some(Call::Release)] {
        let (manager, sim) = (manager(), sim(Vec::new()));
        let slot: Arc<Mutex<Option<Manager>>> = Arc::default();
        let (dropped, was_dropped) = channel();
        let given = Arc::clone(&slot);
        let hook = move || {
            let begun = Instant::now();
            drop(given.lock().unwrap().take().expect("it is the last"));
            dropped.send(begun.elapsed()).unwrap();
        };
        let plain = spec(&sim, "last-manager", BLK);
        let binding: Arc<Binding> = match call {
            Some(call) => manager.load(hooked(plain, call, hook)).unwrap(),
            None => {
                let binding = manager.load(plain).unwrap();
                attach(&binding, hook);
                binding
            }
        };
        *slot.lock().unwrap() = Some(manager);
        sim.die();
        let took = was_dropped.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("{call:?}: it does not come back"));
        assert!(took < AT_ONCE, "{call:?}: {took:?}");
        until("the binding has left", || binding.certificate().is_some());
        assert!(binding.certificate().unwrap().residual.is_zero(), "{:?}", binding.certificate());
    }
}

/// A shutdown of everything, asked for by a port that is being shut down by it.
#[test]
fn a_shutdown_from_inside_a_shutdown() {
    let (manager, one, two) = (manager(), sim(Vec::new()), sim(Vec::new()));
    let a = manager.load(spec(&one, "stop-a", BLK)).unwrap();
    let b = manager.load(spec(&two, "stop-b", BLK)).unwrap();
    let (asked, was_asked) = channel();
    let inside = manager.clone();
    attach(&a, move || {
        let begun = Instant::now();
        inside.shutdown(LONG);
        asked.send(begun.elapsed()).unwrap();
    });
    let stopping = manager.clone();
    let certificates = bounded("the shutdown", PATIENCE, move || stopping.shutdown(LONG));
    assert_eq!(certificates.len(), 2);
    left_clean(&a);
    left_clean(&b);
    let took = was_asked.recv_timeout(PATIENCE).expect("it came back");
    assert!(took < AT_ONCE, "{took:?}");
}
