//! Two of them at once.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use cofferdam_manager::{HandleSpec, HandleState, LoadError, OpenError, Outcome, UnloadError, UnloadOptions};

use crate::support::*;

/// Two unloaders at once, and more: while the kernel's `delete_module` drops its lock for the module's exit, a second one
/// finds it GOING; drivers that tore down by a flag of their own freed twice. All here wait for the same teardown and get
/// the same certificate.
#[test]
fn many_unloaders_at_once() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "many", BLK)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let ready = Arc::new(Barrier::new(8));
    let unloaders: Vec<_> = (0..8)
        .map(|_| {
            let (manager, binding, ready) = (manager.clone(), Arc::clone(&binding), Arc::clone(&ready));
            std::thread::spawn(move || {
                ready.wait();
                manager.unload_binding(&binding, &deadline(LONG))
            })
        })
        .collect();
    until("draining", || phase(&binding) == "draining");
    sim.open_gate(1);
    let first = left_clean(&binding);
    for unloader in unloaders {
        assert_eq!(unloader.join().unwrap().unwrap(), first);
    }
    assert_eq!((first.outcome, first.handles_revoked, first.requests_failed), (Outcome::Unloaded, 1, 0));
    assert_eq!(ends(&manager, "many"), 1);
    assert_eq!(answers(&handle, 1)[0].result, Ok(()));
}

/// One of the two unloaders loses patience; the other one and the teardown do not notice.
#[test]
fn an_unloader_that_gives_up_takes_nothing_from_the_other() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "impatient", BLK)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let (patient, leaving) = (manager.clone(), Arc::clone(&binding));
    let patient = std::thread::spawn(move || patient.unload_binding(&leaving, &deadline(PATIENCE)));
    until("draining", || phase(&binding) == "draining");
    let begun = Instant::now();
    let gave_up = manager.unload_binding(&binding, &deadline(Duration::from_millis(50)));
    assert!(matches!(gave_up, Err(UnloadError::StillDraining { .. })), "{gave_up:?}");
    assert!(begun.elapsed() < AT_ONCE);
    assert_eq!(phase(&binding), "draining");
    sim.open_gate(1);
    assert_eq!(patient.join().unwrap().unwrap(), left_clean(&binding));
}

/// Double detach (a hub that notices the unplug while drvctl detaches the same device: NetBSD's autoconf ran the second
/// `config_detach` on freed memory): the loss of the device and an unload at the same moment, and an unload of what is
/// gone.
#[test]
fn double_detach() {
    for round in 0..20 {
        let (manager, sim) = (manager(), sim(Vec::new()));
        let name = format!("double-{round}");
        let binding = manager.load(spec(&sim, &name, BLK)).unwrap();
        let handle = open(&binding);
        start(&handle, 0);
        let meeting = Arc::new(Barrier::new(2));
        let unplug = {
            let (sim, meeting) = (sim.clone(), Arc::clone(&meeting));
            std::thread::spawn(move || {
                meeting.wait();
                sim.die();
            })
        };
        meeting.wait();
        let (unloading, leaving) = (manager.clone(), Arc::clone(&binding));
        let result = bounded("the unload", PATIENCE, move || unloading.unload_binding(&leaving, &deadline(LONG)));
        unplug.join().unwrap();
        let certificate = result.unwrap();
        assert_eq!(certificate, left_clean(&binding));
        assert!(matches!(certificate.outcome, Outcome::Unloaded | Outcome::Removed), "{certificate:?}");
        assert_eq!(ends(&manager, &name), 1, "{certificate:?}");
        // Once more, of what is over: the same certificate, and nothing happens.
        assert_eq!(manager.unload_binding(&binding, &deadline(LONG)).unwrap(), certificate);
        assert_eq!(ends(&manager, &name), 1);
        until("the name is free", || manager.get(&name).is_none());
        answers(&handle, 1);
    }
}

/// Detach during open (NetBSD before `device_lookup_acquire`: `xyzopen` looks its softc up, `xyz_detach` frees it, and the
/// open goes on with it): opens from many threads run into the unload. Each is refused, or gets a handle that is revoked;
/// none is admitted afterwards, none is missed by the teardown.
#[test]
fn detach_during_open() {
    for round in 0..10 {
        let (manager, sim) = (manager(), sim(Vec::new()));
        let name = format!("open-{round}");
        let binding = manager.load(spec(&sim, &name, BLK)).unwrap();
        let opened = Arc::new(AtomicU32::new(0));
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let (binding, opened) = (Arc::clone(&binding), Arc::clone(&opened));
                std::thread::spawn(move || {
                    let begun = Instant::now();
                    loop {
                        assert!(begun.elapsed() < PATIENCE, "opens do not end");
                        match binding.open(HandleSpec::default()) {
                            Ok(handle) => {
                                opened.fetch_add(1, Ordering::Relaxed);
                                // Used and closed, or kept over the end by every other one.
                                if handle.id() % 2 == 0 {
                                    continue;
                                }
                                let buffer = handle.lease(4096);
                                if handle.state() == HandleState::Revoked {
                                    return Some(handle);
                                }
                                drop(buffer);
                            }
                            Err(error) => {
                                assert_eq!(error, OpenError::Revoked);
                                return None;
                            }
                        }
                    }
                })
            })
            .collect();
        until("clients come and go", || opened.load(Ordering::Relaxed) > 100);
        manager.unload(&name, &deadline(LONG)).unwrap();
        assert_eq!(binding.open(HandleSpec::default()).map(drop), Err(OpenError::Revoked));
        for client in clients {
            if let Some(handle) = client.join().unwrap() {
                assert_eq!(handle.state(), HandleState::Revoked);
            }
        }
        left_clean(&binding);
    }
}

/// Open during detach (FreeBSD devfs, before `si_threadcount` and `dead_cdevsw`: an open that slept behind the teardown
/// went on into a freed driver): while the drain waits, an open is refused at once. It does not wait for the drain, and a
/// port cannot be attached either.
#[test]
fn open_during_detach() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "late-open", BLK)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let (unloading, leaving) = (manager.clone(), Arc::clone(&binding));
    let unload = std::thread::spawn(move || unloading.unload_binding(&leaving, &deadline(PATIENCE)));
    until("the handle is revoked", || handle.state() == HandleState::Revoked);
    let opening = Arc::clone(&binding);
    let (took, opened) = bounded("the open", LONG, move || {
        let begun = Instant::now();
        let opened = opening.open(HandleSpec::default()).map(drop);
        (begun.elapsed(), opened)
    });
    assert_eq!(opened, Err(OpenError::Revoked));
    assert!(took < AT_ONCE, "{took:?}");
    assert_eq!(phase(&binding), "draining");
    sim.open_gate(1);
    unload.join().unwrap().unwrap();
    left_clean(&binding);
    let port = HookedPort { address: "test:late".into(), shutdown: Box::new(|| ()) };
    assert!(binding.attach_port(Box::new(port)).is_err(), "a port of a binding that is over");
}

/// Unload during load, at every stage of it (a module in its init is COMING, and its removal must neither find half a
/// module nor wait without a bound): an unload with little patience says that it is under way, the load is called off and
/// rolled back, name and device are free.
#[test]
fn unload_during_load() {
    for call in [Call::Negotiate, Call::Map, Call::SetupQueue, Call::Start] {
        for force in [false, true] {
            let (manager, sim) = (manager(), sim(Vec::new()));
            let (entered, is_in) = channel();
            let (go, gone) = channel::<()>();
            let pause = move || {
                entered.send(()).unwrap();
                let _ = gone.recv_timeout(PATIENCE);
            };
            let spec = hooked(spec(&sim, "slow", BLK), call, pause);
            let loading = manager.clone();
            let loading = std::thread::spawn(move || loading.load(spec));
            is_in.recv_timeout(PATIENCE).unwrap();
            let begun = Instant::now();
            let options = UnloadOptions { force, ..deadline(Duration::from_millis(50)) };
            let gave_up = manager.unload("slow", &options);
            assert!(matches!(gave_up, Err(UnloadError::StillDraining { .. })), "{call:?}, {force}: {gave_up:?}");
            assert!(begun.elapsed() < AT_ONCE, "{call:?}, {force}: {:?}", begun.elapsed());
            go.send(()).unwrap();
            let loaded = loading.join().unwrap();
            assert!(loaded.is_err(), "{call:?}, {force}: it serves");
            until("the name is free", || manager.get("slow").is_none());
            assert_eq!(ends(&manager, "slow"), 1, "{call:?}, {force}");
            manager.load(crate::support::spec(&sim, "slow", BLK)).expect("name and device are free");
        }
    }
}

/// The unload has patience: it waits for the load to end, and then there is nothing, whichever way the load ended.
#[test]
fn a_patient_unload_during_load() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let (entered, is_in) = channel();
    let (go, gone) = channel::<()>();
    let pause = move || {
        entered.send(()).unwrap();
        let _ = gone.recv_timeout(PATIENCE);
    };
    let spec = hooked(spec(&sim, "awaited", BLK), Call::Map, pause);
    let loading = manager.clone();
    let loading = std::thread::spawn(move || loading.load(spec));
    is_in.recv_timeout(PATIENCE).unwrap();
    let binding = manager.get("awaited").expect("it is known while it loads");
    let begins = Arc::new(AtomicBool::new(false));
    let (unloading, begun) = (manager.clone(), Arc::clone(&begins));
    let unload = std::thread::spawn(move || {
        begun.store(true, Ordering::SeqCst);
        unloading.unload("awaited", &deadline(PATIENCE))
    });
    until("the unload is asked for", || begins.load(Ordering::SeqCst));
    go.send(()).unwrap();
    let loaded = loading.join().unwrap();
    // Its own certificate, or that of the load's roll-back, which came first.
    let unloaded = unload.join().unwrap();
    let certificate = left_clean(&binding);
    match &unloaded {
        Ok(unloaded) => assert_eq!(unloaded, &certificate),
        Err(error) => assert!(matches!(error, UnloadError::NoSuchBinding(_)), "{error:?}"),
    }
    assert!(loaded.is_err() || unloaded.is_ok(), "{loaded:?}, {unloaded:?}");
    assert_eq!(binding.open(HandleSpec::default()).map(drop), Err(OpenError::Revoked));
    assert_eq!(ends(&manager, "awaited"), 1);
}

/// A load under a name that is on its way out, and one that is not taken yet: the one is refused, the other is not.
#[test]
fn load_during_unload() {
    let (manager, sim, fresh) = (manager(), gated(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "again", BLK)).unwrap();
    let handle = open(&binding);
    start(&handle, 0);
    let (unloading, leaving) = (manager.clone(), Arc::clone(&binding));
    let unload = std::thread::spawn(move || unloading.unload_binding(&leaving, &deadline(PATIENCE)));
    until("draining", || phase(&binding) == "draining");
    let early = manager.load(spec(&fresh, "again", BLK));
    assert!(matches!(early, Err(LoadError::NameTaken(_))), "{early:?}");
    sim.open_gate(1);
    unload.join().unwrap().unwrap();
    let second = manager.load(spec(&fresh, "again", BLK)).expect("the name is free when the unload has returned");
    left_clean(&binding);
    assert_eq!(handle.state(), HandleState::Revoked, "the old handle is not the new binding's");
    assert_eq!(phase(&second), "serving");
}

/// The driver faults while its unload drains, in the completion that the drain itself brings: by a trap, and by a loop
/// that its deadline ends. The fault's own way out and the unload are one ladder.
#[test]
fn a_driver_fault_while_the_unload_is_under_way() {
    for (name, component) in [("traps-late", TRAPS_IN_COMPLETE), ("loops-late", LOOPS_IN_COMPLETE)] {
        let (manager, sim) = (manager(), gated());
        let binding = manager.load(spec(&sim, name, component)).unwrap();
        let handle = open(&binding);
        for number in 0..4 {
            start(&handle, number * 4096);
        }
        let (unloading, leaving) = (manager.clone(), Arc::clone(&binding));
        let unload = std::thread::spawn(move || unloading.unload_binding(&leaving, &deadline(LONG)));
        until("draining", || phase(&binding) == "draining");
        let begun = Instant::now();
        sim.open_gate(4);
        let certificate = left_clean(&binding);
        assert!(begun.elapsed() < LONG, "{name}: {:?}", begun.elapsed());
        assert_eq!(unload.join().unwrap().unwrap(), certificate, "{name}");
        assert!(matches!(certificate.outcome, Outcome::Unloaded | Outcome::Failed), "{name}: {certificate:?}");
        answers(&handle, 4);
        assert_eq!(ends(&manager, name), 1, "{name}");
        until("the name is free", || manager.get(name).is_none());
    }
}

/// A fault, the device's loss and an unload, all in one moment.
#[test]
fn everything_at_once() {
    for round in 0..10 {
        let (manager, sim) = (manager(), gated());
        let name = format!("everything-{round}");
        let binding = manager.load(spec(&sim, &name, TRAPS_IN_COMPLETE)).unwrap();
        let handle = open(&binding);
        for number in 0..8 {
            start(&handle, number * 4096);
        }
        let meeting = Arc::new(Barrier::new(4));
        let act = |act: Box<dyn FnOnce() + Send>| {
            let meeting = Arc::clone(&meeting);
            std::thread::spawn(move || {
                meeting.wait();
                act();
            })
        };
        let (opening, dying, unloading, leaving) = (sim.clone(), sim.clone(), manager.clone(), Arc::clone(&binding));
        let acts = [
            act(Box::new(move || opening.open_gate(4))),
            act(Box::new(move || dying.die())),
            act(Box::new(move || {
                let _ = unloading.unload_binding(&leaving, &UnloadOptions { force: true, ..deadline(LONG) });
            })),
        ];
        meeting.wait();
        // The client goes away meanwhile.
        drop(handle);
        for act in acts {
            bounded("one of them", PATIENCE, move || act.join().unwrap());
        }
        left_clean(&binding);
        assert_eq!(ends(&manager, &name), 1);
    }
}
