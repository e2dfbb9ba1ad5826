//! Granted WASI: what it gives, and that a guest cannot sleep in it beyond its deadline.

mod support;

use std::time::{Duration, Instant};

use cofferdam_runtime::{CallError, FaultKind, Grants, Instance, KillSwitch, LaneDriver};
use support::{Guest, module, requests, runtime, spec};

/// Sleeps `nanoseconds` in `submit`, by way of wasi:clocks and wasi:io.
fn sleeper(nanoseconds: u64) -> Guest {
    Guest {
        world: "package wasi:io@0.2.6 { interface poll { resource pollable { block: func(); } } }
            package wasi:clocks@0.2.6 { interface monotonic-clock { use wasi:io/poll@0.2.6.{pollable}; subscribe-duration: func(when: u64) -> pollable; } }
            world wide { THE-DRIVER import wasi:clocks/monotonic-clock@0.2.6; }"
            .into(),
        imports: r#"(import "wasi:clocks/monotonic-clock@0.2.6" "subscribe-duration" (func $subscribe (param i64) (result i32)))
            (import "wasi:io/poll@0.2.6" "[method]pollable.block" (func $block (param i32)))
            (import "wasi:io/poll@0.2.6" "[resource-drop]pollable" (func $drop-pollable (param i32)))"#
            .into(),
        submit: format!(
            "(local $p i32) (local.set $p (call $subscribe (i64.const {nanoseconds}))) (call $block (local.get $p)) (call $drop-pollable (local.get $p))
            (i64.store (i32.const 256) (i64.const 0)) (i32.const 256)"
        ),
        ..Guest::default()
    }
}

fn lane(guest: &Guest, grant: &str, kill: &KillSwitch, deadline_ms: u64) -> Instance {
    let mut spec = spec();
    spec.grants = Grants::parse(grant).unwrap();
    spec.kill = kill.clone();
    spec.limits.call_deadline_ms = deadline_ms;
    module(&runtime(), guest).instantiate(spec).unwrap()
}

#[test]
fn a_short_sleep_is_slept() {
    let mut lane = lane(&sleeper(20_000_000), "wasi:clocks", &KillSwitch::new(), 10_000);
    let begun = Instant::now();
    lane.submit(&requests(1), &mut Vec::new()).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(20));
}

#[test]
fn a_sleep_ends_at_the_deadline() {
    let mut lane = lane(&sleeper(u64::MAX), "wasi:clocks", &KillSwitch::new(), 100);
    let begun = Instant::now();
    let Err(CallError::Fault(fault)) = lane.submit(&requests(1), &mut Vec::new()) else { panic!() };
    assert_eq!(fault.kind, FaultKind::Deadline, "{fault}");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[test]
fn a_sleep_ends_at_the_kill_switch() {
    let kill = KillSwitch::new();
    let mut lane = lane(&sleeper(u64::MAX), "wasi:clocks", &kill, 600_000);
    let caller = std::thread::spawn(move || lane.submit(&requests(1), &mut Vec::new()));
    kill.kill();
    let Err(CallError::Fault(fault)) = caller.join().unwrap() else { panic!() };
    assert_eq!(fault.kind, FaultKind::Killed, "{fault}");
}

#[test]
fn a_granted_directory_is_the_only_one_and_survives_being_renamed() {
    let home = tempfile::tempdir().unwrap();
    let granted = home.path().join("granted");
    std::fs::create_dir(&granted).unwrap();
    // Traps unless there is exactly one directory.
    let guest = Guest {
        world: "package wasi:filesystem@0.2.6 { interface types { resource descriptor { sync: func() -> result; } }
                interface preopens { use types.{descriptor}; get-directories: func() -> list<tuple<descriptor, string>>; } }
            world wide { THE-DRIVER import wasi:filesystem/preopens@0.2.6; }"
            .into(),
        imports: r#"(import "wasi:filesystem/preopens@0.2.6" "get-directories" (func $get (param i32)))"#.into(),
        submit: "(call $get (i32.const 512)) (if (i32.ne (i32.load (i32.const 516)) (i32.const 1)) (then unreachable))
            (i64.store (i32.const 256) (i64.const 0)) (i32.const 256)"
            .into(),
        ..Guest::default()
    };
    let module = module(&runtime(), &guest);
    let mut spec = spec();
    spec.grants = Grants::parse(&format!("wasi:filesystem={}", granted.display())).unwrap();
    std::fs::rename(&granted, home.path().join("renamed")).unwrap();
    let mut lane = module.instantiate(spec).unwrap();
    lane.submit(&requests(1), &mut Vec::new()).unwrap();
}
