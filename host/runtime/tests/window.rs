//! The window: where it may be, who writes there, and what a guest that lies about it gets.

mod support;

use cofferdam_runtime::{CallError, FaultKind, GuestFault, Instance, LaneDriver};
use support::{Guest, WINDOW, instance, module, requests, runtime, setup, spec};

/// Bytes of the window, as the contract has it.
const BYTES: usize = 4864;
/// Bytes of the guest's memory.
const MEMORY: usize = 2 << 16;

/// Answers the first six words of the window, from where they are.
const ECHO: &str =
    "(i32.store (i32.const 256) (i32.const 65536)) (i32.store (i32.const 260) (i32.const 6)) (i32.const 256)";

fn window_at(offset: usize) -> Guest {
    Guest { window: format!("(i32.const {})", offset as u32 as i32), ..Guest::default() }
}

fn fault<T: std::fmt::Debug>(result: Result<T, CallError>) -> GuestFault {
    match result {
        Err(CallError::Fault(fault)) => fault,
        other => panic!("a fault was expected, not {other:?}"),
    }
}

/// Submits, and must get the same fault again and for everything else: the instance is dead.
fn dies_of_layout(mut lane: Instance, says: &str) {
    let first = fault(lane.submit(&requests(1), &mut Vec::new()));
    assert_eq!(first.kind, FaultKind::Layout, "{first}");
    assert!(first.message.contains(says), "{first}");
    assert_eq!(fault(lane.submit(&requests(1), &mut Vec::new())), first);
    assert_eq!(fault(lane.complete(&[7, 0, 0], &mut Vec::new())), first);
    assert_eq!(fault(lane.properties()), first);
}

#[test]
fn a_window_that_is_not_whole_inside_the_memory_is_a_layout_fault() {
    let runtime = runtime();
    for offset in [MEMORY - BYTES + 8, MEMORY - 8, MEMORY, 1 << 31, 0xffff_fff8] {
        let mut lane = instance(&runtime, &window_at(offset));
        lane.start(&setup()).unwrap();
        dies_of_layout(lane, "beyond the driver's memory");
    }
}

#[test]
fn responses_need_the_whole_window_too() {
    let mut lane = instance(&runtime(), &window_at(MEMORY - BYTES + 8));
    assert_eq!(fault(lane.complete(&[7, 0, 0], &mut Vec::new())).kind, FaultKind::Layout);
}

#[test]
fn a_window_at_the_very_end_of_the_memory_or_at_its_beginning_is_one() {
    let runtime = runtime();
    let mut out = Vec::new();
    for offset in [MEMORY - BYTES, 0] {
        let echo = format!(
            "(i32.store (i32.const 8192) (i32.const {offset})) (i32.store (i32.const 8196) (i32.const 6)) (i32.const 8192)"
        );
        let mut lane = instance(&runtime, &Guest { submit: echo, ..window_at(offset) });
        lane.submit(&requests(1), &mut out).unwrap();
        assert_eq!(out, [7, 0, 0, 0, 512, 0]);
    }
}

#[test]
fn a_window_that_is_not_aligned_is_a_fault_of_start() {
    for offset in [WINDOW + 1, WINDOW + 4, 0xffff_ffff] {
        let mut lane = instance(&runtime(), &window_at(offset));
        let first = fault(lane.start(&setup()));
        assert_eq!(first.kind, FaultKind::Layout);
        assert!(first.message.contains("multiple of 8"), "{first}");
        dies_of_layout(lane, "multiple of 8");
    }
}

#[test]
fn a_guest_that_traps_or_loops_when_it_is_asked_for_its_window_is_dead() {
    let runtime = runtime();
    let cases = [("unreachable", FaultKind::Trap), ("(loop $l (br $l)) (unreachable)", FaultKind::Deadline)];
    for (window, kind) in cases {
        let mut lane = instance(&runtime, &Guest { window: window.into(), ..Guest::default() });
        let first = fault(lane.start(&setup()));
        assert_eq!(first.kind, kind, "{first}");
        assert_eq!(fault(lane.submit(&requests(1), &mut Vec::new())), first);
    }
}

#[test]
fn a_window_is_asked_for_once_and_stays_where_it_was() {
    // Each answer is a window further on; what `submit` reads is the first one.
    let guest = Guest {
        window: "(global.set $asked (i32.add (global.get $asked) (i32.const 1)))
            (i32.add (i32.const 60672) (i32.mul (global.get $asked) (i32.const 4864)))"
            .into(),
        more: "(global $asked (mut i32) (i32.const 0))".into(),
        ..Guest::submit(ECHO)
    };
    let mut lane = instance(&runtime(), &guest);
    lane.start(&setup()).unwrap();
    let mut out = Vec::new();
    for token in 1..100 {
        lane.submit(&[token, 2, 3], &mut out).unwrap();
        assert_eq!(out, [token as u32, 0, 2, 0, 3, 0]);
        lane.complete(&[9, 0, 0], &mut out).unwrap();
    }
}

#[test]
fn an_answer_may_lie_over_the_window() {
    let mut lane = instance(&runtime(), &Guest::submit(ECHO));
    let mut out = Vec::new();
    for _ in 0..3 {
        // The guest spoils the answer in its post-return function, and so its own window.
        lane.submit(&[1 << 32 | 7, 2 << 32, 3], &mut out).unwrap();
        assert_eq!(out, [7, 1, 0, 2, 3, 0]);
    }
}

#[test]
fn only_the_words_of_the_call_are_written() {
    let mut lane = instance(&runtime(), &Guest { complete: ECHO.into(), ..Guest::submit(ECHO) });
    let mut out = Vec::new();
    lane.submit(&[1, 2, 3], &mut out).unwrap();
    lane.complete(&[8], &mut out).unwrap();
    // The guest spoils the first word when the call is over; the host has written one over it, and no more.
    assert_eq!(out, [8, 0, 2, 0, 3, 0]);
}

#[test]
fn every_lane_has_a_window_of_its_own() {
    let runtime = runtime();
    let module = module(&runtime, &Guest { complete: ECHO.into(), ..Guest::default() });
    let (mut a, mut b) = (module.instantiate(spec()).unwrap(), module.instantiate(spec()).unwrap());
    let mut out = Vec::new();
    a.submit(&[1, 2, 3], &mut out).unwrap();
    b.submit(&[4, 5, 6], &mut out).unwrap();
    a.complete(&[], &mut out).unwrap();
    assert_eq!(out, [1, 0, 2, 0, 3, 0]);
    b.complete(&[], &mut out).unwrap();
    assert_eq!(out, [4, 0, 5, 0, 6, 0]);
}

#[test]
fn a_window_survives_the_growth_of_the_memory() {
    let grow = "(drop (memory.grow (i32.const 64)))";
    let mut lane = instance(&runtime(), &Guest::submit(&format!("{grow} {ECHO}")));
    let mut out = Vec::new();
    for token in 1..10 {
        lane.submit(&[token, 2, 3], &mut out).unwrap();
        assert_eq!(out[0], token as u32);
    }
}

#[test]
fn a_window_beyond_the_memory_may_grow_into_it_before_it_is_used() {
    let window = "(drop (memory.grow (i32.const 1))) (i32.const 131072)";
    let mut lane = instance(&runtime(), &Guest { window: window.into(), ..Guest::default() });
    lane.start(&setup()).unwrap();
    lane.submit(&requests(64), &mut Vec::new()).unwrap();
}

#[test]
fn more_words_than_the_window_holds_are_not_written() {
    let mut lane = instance(&runtime(), &Guest::default());
    lane.complete(&[1; BYTES / 4], &mut Vec::new()).unwrap();
    let fault = fault(lane.complete(&[1; BYTES / 4 + 1], &mut Vec::new()));
    assert_eq!(fault.kind, FaultKind::Layout);
}
