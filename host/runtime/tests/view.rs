//! What a guest is doing can be seen from outside while it does it.

mod support;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use cofferdam_runtime::{
    CallError, CallView, DeviceCapability, DeviceError, FaultKind, Grants, InstantiateError, KillSwitch, LaneDriver,
    RunningCall,
};
use support::{FakeDevice, Guest, module, requests, runtime, spec};

const FOREVER: &str = "(loop $forever (br $forever)) (unreachable)";

/// Looks until a running call is as wanted.
fn until(view: &CallView, what: &str, wanted: impl Fn(&RunningCall) -> bool) -> RunningCall {
    let begun = Instant::now();
    let mut last = None;
    loop {
        last = view.running().or(last);
        match view.running() {
            Some(call) if wanted(&call) => return call,
            _ => assert!(begun.elapsed() < Duration::from_secs(20), "{what}: not within 20 s, the last was {last:?}"),
        }
        std::thread::yield_now();
    }
}

/// A thread with a name, which calls `submit` once.
fn submit_on_a_thread(
    mut lane: cofferdam_runtime::Instance,
) -> std::thread::JoinHandle<(Result<(), CallError>, cofferdam_runtime::Instance)> {
    std::thread::Builder::new()
        .name("lane thread".into())
        .spawn(move || (lane.submit(&requests(1), &mut Vec::new()), lane))
        .unwrap()
}

#[test]
fn a_guest_that_loops_is_seen_with_thread_age_and_backtrace_and_goes_on() {
    let mut spec = spec();
    // Far beyond this test's patience: whatever is seen is seen of a guest that nobody has stopped.
    spec.limits.call_deadline_ms = 600_000;
    let (view, kill) = (spec.view.clone(), spec.kill.clone());
    let guest = Guest {
        more: format!("(func $lost-in-here {FOREVER})"),
        ..Guest::submit("(call $lost-in-here) (unreachable)")
    };
    let lane = module(&runtime(), &guest).instantiate(spec).unwrap();
    assert_eq!(view.running(), None);
    let caller = submit_on_a_thread(lane);

    let call = until(&view, "an age", |call| call.age >= Duration::from_millis(50));
    assert_eq!((call.export, call.import, call.interrupted), ("submit", None, false));
    let place = view.whereabouts(&call).unwrap();
    assert_eq!(place.thread, "lane thread");
    assert!((place.core as usize) < 4096, "{place:?}");
    for _ in 0..3 {
        view.ask_backtrace();
        let frames = view.backtrace(&call, Instant::now() + Duration::from_secs(20)).unwrap();
        assert!(frames[0].contains("lost-in-here") && frames[1].contains("submit"), "{frames:?}");
    }
    let later = until(&view, "still there", |_| true);
    assert!(view.is_in(&call) && later.age >= call.age && view.fault().is_none());

    kill.kill();
    let (result, _lane) = caller.join().unwrap();
    assert!(matches!(result, Err(CallError::Fault(_))));
    let fault = view.fault().unwrap();
    assert_eq!(fault.kind, FaultKind::Killed);
    assert!(fault.backtrace[0].contains("lost-in-here"), "{:?}", fault.backtrace);
    assert_eq!((view.running(), view.is_in(&call), view.whereabouts(&call)), (None, false, None));
    // Nobody is left to answer: a wait ends at once, not at its bound.
    view.ask_backtrace();
    let begun = Instant::now();
    let _ = view.backtrace(&later, begun + Duration::from_secs(10));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

/// A device whose `negotiate` waits to be sent on.
struct Waits(Sender<()>, Receiver<()>);

impl DeviceCapability for Waits {
    fn device_type(&mut self) -> Option<u32> {
        Some(2)
    }
    fn offered_features(&mut self) -> u64 {
        0x20
    }
    fn negotiate(&mut self, _: u64) -> Result<(), DeviceError> {
        self.0.send(()).unwrap();
        self.1.recv_timeout(Duration::from_secs(20)).map_err(|error| DeviceError::Device(error.to_string()))
    }
    fn read_config(&mut self, _: u32, length: u32) -> Result<Vec<u8>, DeviceError> {
        Ok(vec![0; length as usize])
    }
    fn max_lanes(&mut self) -> u16 {
        1
    }

    fn max_queues(&mut self) -> u16 {
        1
    }
    fn max_queue_size(&mut self, _: u16) -> u16 {
        128
    }
}

#[test]
fn a_guest_in_a_device_call_is_seen_there_also_while_it_is_told_to_stop() {
    let spec = spec();
    let (view, kill) = (spec.view.clone(), spec.kill.clone());
    let mut control = module(&runtime(), &Guest::default()).instantiate(spec).unwrap();
    let (entered, is_in) = channel();
    let (go, gone) = channel();
    let caller = std::thread::spawn(move || {
        let _ = control.attach(Box::new(Waits(entered, gone)));
        control
    });
    is_in.recv_timeout(Duration::from_secs(20)).unwrap();
    let call = view.running().unwrap();
    assert_eq!((call.export, call.import, call.interrupted), ("attach", Some("virtio.device.negotiate"), false));
    kill.kill();
    let call = view.running().unwrap();
    assert_eq!((call.export, call.import, call.interrupted), ("attach", Some("virtio.device.negotiate"), true));
    // It is in no code of its own, so it cannot say where.
    view.ask_backtrace();
    assert_eq!(view.backtrace(&call, Instant::now() + Duration::from_millis(50)), None);
    go.send(()).unwrap();
    // With a loop or a call before it the rest of `attach` would be cut off; the next call is in any case.
    let mut control = caller.join().unwrap();
    assert_eq!(view.running(), None);
    assert!(matches!(control.properties(), Err(CallError::Fault(fault)) if fault.kind == FaultKind::Killed));
    assert_eq!(view.fault().map(|fault| fault.kind), Some(FaultKind::Killed));
}

#[test]
fn a_guest_asleep_in_wasi_is_seen_there() {
    let guest = Guest {
        world: "package wasi:io@0.2.6 { interface poll { resource pollable { block: func(); } } }
            package wasi:clocks@0.2.6 { interface monotonic-clock { use wasi:io/poll@0.2.6.{pollable}; subscribe-duration: func(when: u64) -> pollable; } }
            world wide { THE-DRIVER import wasi:clocks/monotonic-clock@0.2.6; }"
            .into(),
        imports: r#"(import "wasi:clocks/monotonic-clock@0.2.6" "subscribe-duration" (func $subscribe (param i64) (result i32)))
            (import "wasi:io/poll@0.2.6" "[method]pollable.block" (func $block (param i32)))
            (import "wasi:io/poll@0.2.6" "[resource-drop]pollable" (func $drop-pollable (param i32)))"#
            .into(),
        submit: "(local $p i32) (local.set $p (call $subscribe (i64.const -1))) (call $block (local.get $p)) (unreachable)".into(),
        ..Guest::default()
    };
    let mut spec = spec();
    spec.grants = Grants::parse("wasi:clocks").unwrap();
    spec.limits.call_deadline_ms = 600_000;
    let (view, kill) = (spec.view.clone(), spec.kill.clone());
    let caller = submit_on_a_thread(module(&runtime(), &guest).instantiate(spec).unwrap());
    let asleep = |call: &RunningCall| call.import == Some("wasi:io/poll") && call.age >= Duration::from_millis(30);
    let call = until(&view, "asleep", asleep);
    assert_eq!(call.export, "submit");
    kill.kill();
    caller.join().unwrap().0.unwrap_err();
}

#[test]
fn a_guest_that_came_back_from_wasi_is_not_said_to_be_there_for_long() {
    let home = tempfile::tempdir().unwrap();
    let guest = Guest {
        world: "package wasi:filesystem@0.2.6 { interface types { resource descriptor { sync: func() -> result; } }
                interface preopens { use types.{descriptor}; get-directories: func() -> list<tuple<descriptor, string>>; } }
            world wide { THE-DRIVER import wasi:filesystem/preopens@0.2.6; }"
            .into(),
        imports: r#"(import "wasi:filesystem/preopens@0.2.6" "get-directories" (func $get (param i32)))"#.into(),
        submit: format!("(call $get (i32.const 512)) {FOREVER}"),
        ..Guest::default()
    };
    let mut spec = spec();
    spec.grants = Grants::parse(&format!("wasi:filesystem={}", home.path().display())).unwrap();
    spec.limits.call_deadline_ms = 600_000;
    let (view, kill) = (spec.view.clone(), spec.kill.clone());
    let caller = submit_on_a_thread(module(&runtime(), &guest).instantiate(spec).unwrap());
    // An age of more than one tick: the mark has gone by then, or it would stay for ever.
    let call = until(&view, "more than a tick", |call| call.age >= Duration::from_millis(100));
    assert_eq!((call.export, call.import), ("submit", None));
    kill.kill();
    caller.join().unwrap().0.unwrap_err();
}

#[test]
fn a_guest_that_logs_without_end_is_seen_in_log_write() {
    let mut spec = spec();
    spec.limits.call_deadline_ms = 600_000;
    let (view, kill) = (spec.view.clone(), spec.kill.clone());
    let guest = Guest::submit(
        "(loop $forever (call $log (i32.const 0) (i32.const 0) (i32.const 4000)) (br $forever)) (unreachable)",
    );
    let caller = submit_on_a_thread(module(&runtime(), &guest).instantiate(spec).unwrap());
    let call = until(&view, "logging", |call| call.import.is_some());
    assert_eq!((call.export, call.import), ("submit", Some("log.write")));
    kill.kill();
    caller.join().unwrap().0.unwrap_err();
}

#[test]
fn a_start_function_is_seen_before_there_is_an_instance() {
    let mut spec = spec();
    spec.limits.call_deadline_ms = 600_000;
    let (view, kill) = (spec.view.clone(), spec.kill.clone());
    let guest = Guest { start_function: "(loop $forever (br $forever))".into(), ..Guest::default() };
    let runtime = runtime();
    let caller = std::thread::spawn(move || module(&runtime, &guest).instantiate(spec));
    assert_eq!(until(&view, "started", |_| true).export, "instantiate");
    kill.kill();
    let made = caller.join().unwrap();
    assert!(matches!(made, Err(InstantiateError::Fault(fault)) if view.fault() == Some(&fault)));
}

#[test]
fn a_view_kills_its_instance_also_before_there_is_one() {
    let runtime = runtime();
    let (early, late) = (spec(), spec());
    early.view.kill();
    let made = module(&runtime, &Guest::default()).instantiate(early);
    assert!(matches!(made, Err(InstantiateError::Fault(fault)) if fault.kind == FaultKind::Killed));
    let view = late.view.clone();
    let mut lane = module(&runtime, &Guest::default()).instantiate(late).unwrap();
    lane.submit(&requests(1), &mut Vec::new()).unwrap();
    view.kill();
    lane.submit(&requests(1), &mut Vec::new()).unwrap_err();
    assert_eq!(view.fault().map(|fault| fault.kind), Some(FaultKind::Killed));
}

#[test]
fn a_view_shows_the_first_instance_that_it_was_given_to() {
    let runtime = runtime();
    let first = spec();
    let view = first.view.clone();
    let mut second = spec();
    second.view = view.clone();
    second.kill = KillSwitch::new();
    let mut one = module(&runtime, &Guest::submit("(unreachable)")).instantiate(first).unwrap();
    let mut two = module(&runtime, &Guest::submit("(unreachable)")).instantiate(second).unwrap();
    two.submit(&requests(1), &mut Vec::new()).unwrap_err();
    assert!(two.fault().is_some() && view.fault().is_none(), "the second one's fault");
    one.attach(Box::new(FakeDevice)).unwrap();
    one.submit(&requests(1), &mut Vec::new()).unwrap_err();
    assert_eq!(view.fault(), one.fault());
}

#[test]
fn the_last_one_that_has_a_view_can_tell() {
    let runtime = runtime();
    let spec = spec();
    let view = spec.view.clone();
    assert!(!view.is_last(), "somebody is about to make an instance");
    let instance = module(&runtime, &Guest::default()).instantiate(spec).unwrap();
    assert!(!view.is_last(), "it lives");
    drop(instance);
    assert!(view.is_last());
}
