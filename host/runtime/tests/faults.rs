//! A guest can end its own instance and nothing else.

mod support;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use cofferdam_runtime::{
    CallError, DeviceCapability, DeviceError, FaultKind, GuestFault, InstantiateError, KillSwitch, LaneDriver,
    MAX_CHAIN_WORDS, Properties,
};
use support::{FakeDevice, Guest, exported, instance, module, requests, runtime, setup, spec};

const FOREVER: &str = "(loop $forever (br $forever)) (unreachable)";

fn fault(result: Result<(), CallError>) -> GuestFault {
    match result {
        Err(CallError::Fault(fault)) => fault,
        other => panic!("a fault was expected, not {other:?}"),
    }
}

#[test]
fn a_driver_attaches_starts_and_answers() {
    let runtime = runtime();
    let mut control = instance(&runtime, &Guest::default());
    let attachment = control.attach(Box::new(FakeDevice)).unwrap();
    assert_eq!((attachment.features, attachment.queues.len(), attachment.queues[0].size), (0x20, 1, 128));
    assert!(matches!(control.properties().unwrap(), Properties::Block(block) if block.capacity_bytes == 1 << 20));
    control.config_changed(Box::new(FakeDevice)).unwrap();

    let mut lane = instance(&runtime, &Guest::default());
    lane.start(&setup()).unwrap();
    let mut out = vec![99; 5];
    for _ in 0..1_000 {
        lane.submit(&requests(2), &mut out).unwrap();
        assert_eq!(out, [7, 0x10000, 0x13, 8, 0x10000, 0x13]);
    }
    lane.submit(&requests(64), &mut out).unwrap();
    assert_eq!(out.len(), 64 * 3);
    lane.complete(&[7, 0, 0], &mut out).unwrap();
    assert!(out.is_empty());
    assert!(lane.memory_bytes() >= 2 << 16);
}

#[test]
fn what_a_driver_exports_is_bounded_and_handed_to_the_next() {
    let runtime = runtime();
    let exports = |bytes| {
        let mut old = instance(&runtime, &Guest { suspend: exported(7, bytes), ..Guest::default() });
        old.attach(Box::new(FakeDevice)).unwrap();
        let suspended = old.suspend();
        (old, suspended)
    };
    let (mut old, state) = exports(4096);
    let state = state.unwrap();
    assert_eq!((state.version, state.bytes.len()), (7, 4096));
    assert_eq!(instance(&runtime, &Guest::default()).resume(Box::new(FakeDevice), &state).unwrap().features, 0x20);
    // It goes on if the next one does not want to.
    old.properties().unwrap();
    let (old, too_much) = exports(4097);
    assert_eq!(fault(too_much.map(drop)).kind, FaultKind::Layout);
    assert!(old.fault().is_some());
}

#[test]
fn an_endless_loop_ends_at_the_deadline() {
    let mut lane = instance(&runtime(), &Guest::submit(FOREVER));
    let begun = Instant::now();
    let fault = fault(lane.submit(&requests(1), &mut Vec::new()));
    let took = begun.elapsed();
    assert_eq!(fault.kind, FaultKind::Deadline, "{fault}");
    // The deadline is 100 ms and two ticks of 10 ms; the rest is what a loaded machine may take.
    assert!(took >= Duration::from_millis(100) && took < Duration::from_secs(2), "{took:?}");
    assert!(fault.backtrace.iter().any(|line| line.contains("submit")), "{:?}", fault.backtrace);
}

#[test]
fn an_endless_start_function_ends_at_the_deadline() {
    let guest = Guest { start_function: "(loop $forever (br $forever))".into(), ..Guest::default() };
    let error = module(&runtime(), &guest).instantiate(spec()).unwrap_err();
    assert!(matches!(&error, InstantiateError::Fault(fault) if fault.kind == FaultKind::Deadline), "{error}");
}

#[test]
fn a_kill_switch_ends_one_instance_while_another_lives() {
    let runtime = runtime();
    let mut doomed = spec();
    // Far beyond this test's patience: only the switch can end it.
    doomed.limits.call_deadline_ms = 600_000;
    let kill = doomed.kill.clone();
    let mut doomed = module(&runtime, &Guest::submit(FOREVER)).instantiate(doomed).unwrap();
    let mut other = instance(&runtime, &Guest::default());
    let (entered, wait) = mpsc::channel();
    let caller = std::thread::spawn(move || {
        entered.send(()).unwrap();
        let fault = fault(doomed.submit(&requests(1), &mut Vec::new()));
        (fault, Instant::now())
    });
    wait.recv().unwrap();
    other.submit(&requests(1), &mut Vec::new()).unwrap();
    let thrown = Instant::now();
    kill.kill();
    let (fault, ended) = caller.join().unwrap();
    assert_eq!(fault.kind, FaultKind::Killed);
    assert!(ended.saturating_duration_since(thrown) < Duration::from_secs(1));
    other.submit(&requests(1), &mut Vec::new()).unwrap();
}

#[test]
fn a_switch_thrown_while_nothing_runs_stops_the_next_call() {
    let mut spec = spec();
    let kill = KillSwitch::new();
    spec.kill = kill.clone();
    let mut lane = module(&runtime(), &Guest::default()).instantiate(spec).unwrap();
    kill.kill();
    assert_eq!(fault(lane.submit(&requests(1), &mut Vec::new())).kind, FaultKind::Killed);
}

#[test]
fn a_trap_has_a_backtrace_and_the_instance_is_never_entered_again() {
    let runtime = runtime();
    // The first call notes that it was there, then traps in a function with a name; were it entered again, the second call would loop for ever.
    let guest = Guest {
        submit: "(if (global.get $been-here) (then (loop $forever (br $forever)))) (global.set $been-here (i32.const 1)) (call $broken-part) (i32.const 0)".into(),
        more: "(global $been-here (mut i32) (i32.const 0)) (func $broken-part unreachable)".into(),
        ..Guest::default()
    };
    let mut lane = instance(&runtime, &guest);
    let gate_before = lane.submit(&requests(1), &mut Vec::new());
    let first = fault(gate_before);
    assert_eq!(first.kind, FaultKind::Trap);
    assert!(
        first.backtrace[0].contains("broken-part") && first.backtrace[1].contains("submit"),
        "{:?}",
        first.backtrace
    );
    let begun = Instant::now();
    assert_eq!(fault(lane.submit(&requests(1), &mut Vec::new())), first);
    assert_eq!(fault(lane.complete(&[7, 0, 0], &mut Vec::new())), first);
    assert_eq!(lane.properties().unwrap_err(), CallError::Fault(first.clone()));
    assert_eq!(lane.attach(Box::new(FakeDevice)).unwrap_err(), CallError::Fault(first.clone()));
    assert!(begun.elapsed() < Duration::from_millis(100));
    assert_eq!(lane.fault(), Some(&first));
}

#[test]
fn an_overrun_of_the_stack_is_a_trap() {
    let guest = Guest {
        submit: "(call $deeper (i32.const 0))".into(),
        more: "(func $deeper (param i32) (result i32) (i32.add (call $deeper (local.get 0)) (i32.const 1)))".into(),
        ..Guest::default()
    };
    let mut lane = instance(&runtime(), &guest);
    let fault = fault(lane.submit(&requests(1), &mut Vec::new()));
    assert_eq!(fault.kind, FaultKind::Trap);
    assert!(fault.message.contains("stack"), "{fault}");
    assert!(fault.backtrace.len() <= 32);
}

#[test]
fn lists_beyond_their_bounds_are_layout_faults() {
    let answer = |pointer: i64, words: usize| {
        let body = format!(
            "(i32.store (i32.const 256) (i32.const {pointer})) (i32.store (i32.const 260) (i32.const {words})) (i32.const 256)"
        );
        Guest { pages: 600, ..Guest::submit(&body) }
    };
    let runtime = runtime();
    let mut out = Vec::new();
    instance(&runtime, &answer(1024, MAX_CHAIN_WORDS)).submit(&requests(1), &mut out).unwrap();
    assert_eq!(out.len(), MAX_CHAIN_WORDS);
    let bad = [
        (1024, MAX_CHAIN_WORDS + 1),
        // Inside the guest's memory of 37 MiB, but more than the host is willing to lift.
        (1024, 8 << 20),
        // Outside of it.
        (1024, 0x3fff_ffff),
        (-4, 2),
        // Not aligned.
        (1025, 1),
    ];
    for (pointer, words) in bad {
        let fault = fault(instance(&runtime, &answer(pointer, words)).submit(&requests(1), &mut out));
        assert_eq!(fault.kind, FaultKind::Layout, "{pointer} {words}: {fault}");
    }
}

#[test]
fn too_much_memory_at_the_start_is_refused() {
    let guest = Guest { pages: 1025, ..Guest::default() };
    let error = module(&runtime(), &guest).instantiate(spec()).unwrap_err();
    assert!(matches!(&error, InstantiateError::Fault(fault) if fault.kind == FaultKind::OutOfMemory), "{error}");
}

#[test]
fn a_table_that_is_too_large_is_refused() {
    let guest = Guest { more: "(table 100001 funcref)".into(), ..Guest::default() };
    let error = module(&runtime(), &guest).instantiate(spec()).unwrap_err();
    assert!(matches!(&error, InstantiateError::Fault(fault) if fault.kind == FaultKind::OutOfMemory), "{error}");
}

#[test]
fn properties_out_of_bounds_end_the_instance() {
    let properties = "(memory.fill (i32.const 256) (i32.const 0) (i32.const 64)) (i32.const 256)";
    let mut control = instance(&runtime(), &Guest { properties: properties.into(), ..Guest::default() });
    let Err(CallError::Fault(fault)) = control.properties() else { panic!() };
    assert_eq!(fault.kind, FaultKind::Layout);
    assert_eq!(control.attach(Box::new(FakeDevice)).unwrap_err(), CallError::Fault(fault));
}

#[test]
fn a_drivers_error_is_an_answer_and_its_text_is_made_safe() {
    // result::err at 256, variant not-mine at 264 with its text at 512.
    let attach = r#"(call $drop-device (local.get $dev))
        (i32.store8 (i32.const 256) (i32.const 1)) (i32.store8 (i32.const 264) (i32.const 0))
        (i32.store (i32.const 268) (i32.const 512)) (i32.store (i32.const 272) (i32.const 6)) (i32.const 256)"#;
    let guest =
        Guest { attach: attach.into(), more: r#"(data (i32.const 512) "no\1b[2J")"#.into(), ..Guest::default() };
    let mut control = instance(&runtime(), &guest);
    for _ in 0..2 {
        let error = control.attach(Box::new(FakeDevice)).unwrap_err();
        assert!(matches!(&error, CallError::Driver(_)), "{error}");
        assert!(error.to_string().ends_with("no\\u{1b}[2J"), "{error}");
    }
}

#[test]
fn a_device_that_is_kept_beyond_the_call_is_a_fault() {
    // Does not drop its borrow: the component model forbids that.
    let attach = "(i32.store8 (i32.const 256) (i32.const 1)) (i32.store8 (i32.const 264) (i32.const 0)) (i64.store (i32.const 268) (i64.const 0)) (i32.const 256)";
    let mut control = instance(&runtime(), &Guest { attach: attach.into(), ..Guest::default() });
    assert!(matches!(control.attach(Box::new(FakeDevice)), Err(CallError::Fault(_))));
}

/// A device whose configuration takes its time, as a backend behind a socket may.
struct SlowDevice(Duration);

impl DeviceCapability for SlowDevice {
    fn device_type(&mut self) -> Option<u32> {
        None
    }
    fn offered_features(&mut self) -> u64 {
        0
    }
    fn negotiate(&mut self, _: u64) -> Result<(), DeviceError> {
        let begun = Instant::now();
        while begun.elapsed() < self.0 {
            std::hint::spin_loop();
        }
        Ok(())
    }
    fn read_config(&mut self, _: u32, _: u32) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }
    fn max_lanes(&mut self) -> u16 {
        1
    }

    fn max_queues(&mut self) -> u16 {
        1
    }
    fn max_queue_size(&mut self, _: u16) -> u16 {
        1
    }
}

#[test]
fn a_slow_device_is_not_the_guests_fault_but_has_a_budget() {
    let runtime = runtime();
    // Runs for 30 ms or so by itself, before and after the device.
    let attach = Guest::default().attach;
    let slow = || Box::new(SlowDevice(Duration::from_millis(250)));
    instance(&runtime, &Guest::default()).attach(slow()).unwrap();

    let again =
        format!("(loop $again (call $negotiate (local.get $dev) (i64.const 0) (i32.const 512)) (br $again)) {attach}");
    let mut spec = spec();
    spec.limits.host_budget_ms = 400;
    let mut control = module(&runtime, &Guest { attach: again, ..Guest::default() }).instantiate(spec).unwrap();
    let Err(CallError::Fault(fault)) = control.attach(slow()) else { panic!() };
    assert_eq!(fault.kind, FaultKind::Deadline);
    assert!(fault.message.contains("host"), "{fault}");
}

/// A device whose implementation panics: a defect of the host, which must not leave an instance half-entered.
struct Panics;

impl DeviceCapability for Panics {
    fn device_type(&mut self) -> Option<u32> {
        None
    }
    fn offered_features(&mut self) -> u64 {
        0
    }
    fn negotiate(&mut self, _: u64) -> Result<(), DeviceError> {
        panic!("on purpose")
    }
    fn read_config(&mut self, _: u32, _: u32) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }
    fn max_lanes(&mut self) -> u16 {
        1
    }

    fn max_queues(&mut self) -> u16 {
        1
    }
    fn max_queue_size(&mut self, _: u16) -> u16 {
        1
    }
}

#[test]
fn an_instance_whose_capability_panicked_is_dead() {
    let gate = cofferdam_gate::Gate::new();
    let mut spec = spec();
    spec.gate = gate;
    let mut control = module(&runtime(), &Guest::default()).instantiate(spec).unwrap();
    let call = std::panic::AssertUnwindSafe(|| control.attach(Box::new(Panics)));
    assert!(std::panic::catch_unwind(call).is_err());
    assert_eq!(gate.crossings(), 0);
    assert!(matches!(control.properties(), Err(CallError::Fault(_))));
}
