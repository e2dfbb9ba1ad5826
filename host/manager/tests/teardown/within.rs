//! Asked for by the driver, or by what runs inside its calls.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use cofferdam_manager::{HandleSpec, HandleState, IoOp, RevokeError, SubmitError};

use cofferdam_sim::{Effect, Rule, When};

use crate::support::*;

/// FreeBSD, destroy_dev(9): `destroy_dev` waits until no thread is inside a method of the device (`si_threadcount`). Called
/// from the device's own `d_close` it waits for its caller, for ever; `destroy_dev_sched`, which leaves the wait to another
/// thread, was made for that. Here a log line of the driver is the callback, and its listener unloads the driver.
#[test]
fn destroy_dev_from_a_method_of_the_device() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "from-submit", LOGS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let (answer, answered) = channel();
    let inside = manager.clone();
    at_line("from-submit", move || answer.send(Asked::unload(&inside, "from-submit")).unwrap());
    let handle = bounded("the call that asked", LONG, move || {
        start(&handle, 0);
        handle
    });
    answered.recv_timeout(PATIENCE).expect("it asked").assert_deferred();
    left_clean(&binding);
    // What it was asked from was admitted, so it was answered, and nothing is admitted any more.
    assert_eq!(answers(&handle, 1)[0].user, 0);
    assert_eq!(handle.state(), HandleState::Revoked);
    until("the name is free", || manager.get("from-submit").is_none());
    assert_eq!(ends(&manager, "from-submit"), 1);
}

/// The same by force, which would interrupt the very call that it was asked from.
#[test]
fn a_forced_unload_from_inside_a_call() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "force-submit", LOGS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let (answer, answered) = channel();
    let inside = manager.clone();
    at_line("force-submit", move || {
        let begun = Instant::now();
        let options = cofferdam_manager::UnloadOptions { force: true, ..deadline(LONG) };
        let result = inside.unload("force-submit", &options);
        answer.send(Asked { result, took: begun.elapsed() }).unwrap();
    });
    bounded("the call that asked", LONG, move || start(&handle, 0));
    answered.recv_timeout(PATIENCE).expect("it asked").assert_deferred();
    left_clean(&binding);
}

/// destroy_dev(9) again, from the close itself: the client unloads what it has open on its way out, with requests in
/// flight. An unload that waited for the close (a count of open files) would wait for its caller.
#[test]
fn destroy_dev_from_d_close() {
    struct Session {
        handle: cofferdam_manager::Handle,
        manager: cofferdam_manager::Manager,
        device: cofferdam_sim::Sim,
    }
    impl Drop for Session {
        fn drop(&mut self) {
            self.device.open_gate(4);
            let certificate = self.manager.unload("from-close", &deadline(LONG)).expect("it waits for no close");
            assert_eq!(certificate.handles_revoked, 1);
            assert_eq!(self.handle.state(), HandleState::Revoked);
        }
    }
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "from-close", BLK)).unwrap();
    let session = Session { handle: open(&binding), manager: manager.clone(), device: sim.clone() };
    for number in 0..4 {
        start(&session.handle, number * 4096);
    }
    bounded("the close", LONG, move || drop(session));
    assert_eq!(left_clean(&binding).requests_failed, 0, "the device was healthy and had answered");
}

/// A driver core holds the device's lock over the first probe, and an unbind needs the same lock: asked for from inside
/// the probe it never returns (Linux: `device_release_driver` under `device_lock`; NetBSD allows the attaching thread alone
/// to look its device up). Once through a log line of `attach`, once from the transport below it.
#[test]
fn unload_from_inside_the_first_probe() {
    for (name, by_line) in [("probe-line", true), ("probe-transport", false)] {
        let (manager, sim) = (manager(), sim(Vec::new()));
        let (answer, answered) = channel();
        let inside = manager.clone();
        let ask = move || answer.send((Asked::unload(&inside, name), inside.get(name))).unwrap();
        let mut spec = spec(&sim, name, LOGS_IN_ATTACH);
        if by_line {
            at_line(name, ask);
        } else {
            spec = hooked(spec, Call::Negotiate, ask);
        }
        let loading = manager.clone();
        let loaded = bounded("the load", PATIENCE, move || loading.load(spec));
        let (asked, binding) = answered.recv_timeout(PATIENCE).expect("it asked");
        asked.assert_deferred();
        let binding = binding.expect("it is known while it loads");
        left_clean(&binding);
        // Whoever came first at the end of the load, nothing serves now.
        assert!(loaded.is_err() || binding.open(HandleSpec::default()).is_err());
        until("the name is free", || manager.get(name).is_none());
        assert_eq!(ends(&manager, name), 1);
        drop(binding);
        manager.load(crate::support::spec(&sim, name, BLK)).expect("the device is free again");
    }
}

/// From the thread that handles completions, in the middle of them, with more in flight: the teardown needs these
/// requests answered, and the thread that would have taken the answers is the one that waits for it.
#[test]
fn unload_from_a_completion_handler_with_requests_in_flight() {
    let (manager, sim) = (manager(), gated());
    let binding = manager.load(spec(&sim, "from-completion", BLK)).unwrap();
    let handle = open(&binding);
    for number in 0..32 {
        start(&handle, number * 4096);
    }
    sim.open_gate(1);
    let device = sim.clone();
    let (unloading, own) = (manager.clone(), open(&binding));
    let (certificate, handle, first) = bounded("the completion handler", PATIENCE, move || {
        let first = answers(&handle, 1).len();
        device.open_gate(31);
        let certificate = unloading.unload("from-completion", &deadline(LONG)).expect("it reaps by itself (L3)");
        drop(own);
        (certificate, handle, first)
    });
    left_clean(&binding);
    assert_eq!(certificate.requests_failed, 0);
    let rest = answers(&handle, 32 - first);
    assert!(rest.iter().all(|answer| answer.result.is_ok()), "answered with what the device said");
    drop(rest);
}

/// A client's handle goes away inside a call of the driver that serves it: the close must not wait for the lane that its
/// own thread is in.
#[test]
fn a_handle_dropped_inside_a_call() {
    // The first request of all takes its time.
    let slow = Rule { when: When::Nth(1), ..Rule::always(Effect::Gate) };
    let (manager, sim) = (manager(), sim(vec![slow]));
    let binding = manager.load(spec(&sim, "drop-in-call", LOGS_IN_SUBMIT)).unwrap();
    let (handle, other) = (open(&binding), open(&binding));
    start(&other, 8192);
    let (dropped, is_dropped) = channel();
    at_line("drop-in-call", move || {
        let begun = Instant::now();
        drop(other);
        dropped.send(begun.elapsed()).unwrap();
    });
    let unloading = manager.clone();
    // Its first request has used up the driver's lines for a second.
    let took = bounded("the call", PATIENCE, move || {
        loop {
            start(&handle, 0);
            answers(&handle, 1);
            if let Ok(took) = is_dropped.try_recv() {
                return took;
            }
        }
    });
    assert!(took < AT_ONCE, "{took:?}");
    sim.open_gate(1);
    bounded("the unload", PATIENCE, move || unloading.unload("drop-in-call", &deadline(LONG))).unwrap();
    left_clean(&binding);
}

/// The last manager goes away inside a call of one of its drivers: its end is a shutdown, and that waits for the call.
#[test]
fn the_last_manager_dropped_inside_a_call() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "drop-manager", LOGS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let (dropped, is_dropped) = channel();
    at_line("drop-manager", move || {
        let begun = Instant::now();
        drop(manager);
        dropped.send(begun.elapsed()).unwrap();
    });
    bounded("the call", LONG, move || start(&handle, 0));
    assert!(is_dropped.recv_timeout(PATIENCE).expect("it was dropped") < AT_ONCE);
    left_clean(&binding);
}

/// The whole shutdown, asked for from inside a call: the answer cannot wait for the call either.
#[test]
fn a_shutdown_from_inside_a_call() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "stop-in-call", LOGS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let (asked, was_asked) = channel();
    let inside = manager.clone();
    at_line("stop-in-call", move || {
        let begun = Instant::now();
        inside.shutdown(LONG);
        asked.send(begun.elapsed()).unwrap();
    });
    bounded("the call", PATIENCE, move || start(&handle, 0));
    let took = was_asked.recv_timeout(PATIENCE).expect("it asked");
    left_clean(&binding);
    assert!(took < AT_ONCE, "{took:?}");
}

/// One handle, revoked from inside a call that carries its own request: it cannot be drained here, and says so at once.
#[test]
fn a_revoke_from_inside_a_call_of_the_same_handle() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "revoke-in-call", LOGS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let (asked, was_asked) = channel();
    let (inside, id) = (manager.clone(), handle.id());
    at_line("revoke-in-call", move || {
        let begun = Instant::now();
        let result = inside.revoke("revoke-in-call", id, LONG);
        asked.send((result, begun.elapsed())).unwrap();
    });
    let handle = bounded("the call", PATIENCE, move || {
        start(&handle, 0);
        handle
    });
    let (result, took) = was_asked.recv_timeout(PATIENCE).expect("it asked");
    assert!(took < AT_ONCE, "{took:?}: {result:?}");
    assert!(matches!(&result, Err(RevokeError::StillDraining(report)) if report.requests_left == 1), "{result:?}");
    assert_eq!(handle.submit(&mut vec![flush()]), Err(SubmitError::Revoked));
    assert_eq!(answers(&handle, 1)[0].user, 0, "what was admitted is answered");
    assert_eq!(phase(&binding), "serving");
    manager.unload("revoke-in-call", &deadline(LONG)).unwrap();
    left_clean(&binding);
}

fn flush() -> cofferdam_manager::IoRequest {
    let flags = Default::default();
    cofferdam_manager::IoRequest { user: 9, op: IoOp::Flush, offset: 0, length: 0, flags, buffer: None }
}

/// A driver that gets stuck in its call while that call's own listener has asked for the unload: the interruption, not
/// the driver, ends it.
#[test]
fn a_driver_that_loops_does_not_keep_the_unload_that_waits_for_it() {
    let (manager, sim) = (manager(), sim(Vec::new()));
    let binding = manager.load(spec(&sim, "loops", LOOPS_IN_SUBMIT)).unwrap();
    let handle = open(&binding);
    let stuck = std::thread::spawn(move || {
        start_unchecked(&handle);
        handle
    });
    until("it is in the call", || binding.status().calls_running > 0 || binding.certificate().is_some());
    let unloading = manager.clone();
    let begun = Instant::now();
    let result = bounded("the unload", PATIENCE, move || unloading.unload("loops", &deadline(LONG)));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}: {result:?}", begun.elapsed());
    left_clean(&binding);
    answers(&stuck.join().unwrap(), 1);
}

/// As [`start`]; the driver's fault may end the binding before it is over.
fn start_unchecked(handle: &cofferdam_manager::Handle) {
    let buffer = handle.lease(4096).unwrap();
    let (flags, op) = (Default::default(), IoOp::Write);
    let request = cofferdam_manager::IoRequest { user: 0, op, offset: 0, length: 4096, flags, buffer: Some(buffer) };
    let _ = handle.submit(&mut vec![request]);
}
