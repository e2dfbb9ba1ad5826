//! What a batch of admissions promises, one claim per test. Waits are on conditions; deadlines
//! only end what would otherwise hang.

mod support;

use std::sync::mpsc;
use std::time::Duration;

use cofferdam_gate::{Cancel, DrainError, Gate, Guards, Handle, HandleRefused, MAX_BATCH, Notify};
use support::{at_once, drain, long};

fn opened() -> (Gate, Handle) {
    let gate = Gate::new();
    (gate, gate.open_handle(None).expect("open"))
}

#[test]
fn a_batch_counts_for_gate_and_handle_until_each_has_left() {
    let (gate, handle) = opened();
    let other = gate.open_handle(None).expect("open");
    let mut guards = handle.admit_many(64).expect("live");
    assert_eq!((guards.count(), handle.calls(), other.calls(), gate.operations()), (64, 64, 0, 64));
    guards.leave(1);
    guards.leave(30);
    guards.leave(0);
    assert_eq!((guards.count(), handle.calls(), gate.operations()), (33, 33, 33));
    assert_eq!((guards.gate(), guards.handle()), (gate, handle));
    drop(guards);
    assert_eq!((handle.calls(), gate.operations()), (0, 0));
    let sum = gate.stats().iter().fold((0, 0), |sum, core| (sum.0 + core.entered, sum.1 + core.left));
    assert_eq!(sum, (64, 64));
}

#[test]
fn no_more_leave_a_batch_than_are_inside() {
    let (gate, handle) = opened();
    let call = handle.admit().expect("live");
    let mut guards = handle.admit_many(3).expect("live");
    guards.leave(2);
    guards.leave(u32::MAX);
    assert_eq!((guards.count(), handle.calls()), (0, 1));
    guards.leave(1);
    drop(guards);
    assert_eq!(gate.operations(), 1);
    drop(call);
}

#[test]
fn a_batch_is_refused_whole_and_leaves_nothing_behind() {
    let (gate, handle) = opened();
    gate.hold();
    assert_eq!(handle.admit_many(5).err(), Some(HandleRefused::Held));
    assert_eq!(handle.admit_many(0).err(), Some(HandleRefused::Held));
    gate.open();
    let inside = handle.admit_many(2).expect("live");
    handle.revoke();
    assert_eq!(handle.admit_many(5).err(), Some(HandleRefused::Revoked));
    assert_eq!((handle.calls(), gate.operations()), (2, 2));
    let (held, refused) = gate.stats().iter().fold((0, 0), |sum, core| (sum.0 + core.held, sum.1 + core.refused));
    assert_eq!((held, refused), (2, 1), "a refused batch is one refusal");
    drop(inside);
    gate.close();
    assert_eq!(handle.admit_many(1).err(), Some(HandleRefused::Revoked));
    assert_eq!(drain(gate, at_once()), Ok(()));
}

#[test]
fn an_empty_batch_keeps_nothing_inside_and_outlives_its_gate() {
    let (gate, handle) = opened();
    let mut empty = handle.admit_many(0).expect("live");
    let mut left = handle.admit_many(2).expect("live");
    left.leave(2);
    gate.close();
    assert_eq!(drain(gate, at_once()), Ok(()));
    gate.retire().expect("closed and drained");
    // The slot is another's now, and so may the handle's place be.
    let others: Vec<Gate> = (0..200).map(|_| Gate::new()).collect();
    let calls: Vec<Guards> =
        others.iter().map(|other| other.open_handle(None).expect("open").admit_many(1).expect("live")).collect();
    empty.leave(1);
    left.leave(1);
    assert_eq!(empty.gate(), gate);
    drop((empty, left));
    assert!(others.iter().all(|other| other.operations() == 1));
    drop(calls);
}

#[test]
fn drain_waits_for_the_last_of_a_batch_that_leaves_on_another_thread() {
    let (gate, handle) = opened();
    let mut guards = handle.admit_many(3).expect("live");
    let (draining, drains) = mpsc::channel();
    let drainer = std::thread::spawn(move || {
        gate.close();
        draining.send(()).expect("the test listens");
        drain(gate, long())
    });
    drains.recv().expect("the drainer speaks");
    let guards = std::thread::spawn(move || {
        guards.leave(2);
        guards
    })
    .join()
    .expect("leaver");
    let early = drain(gate, at_once());
    assert_eq!(early, Err(DrainError::Deadline { operations: 1, crossings: 0 }));
    drop(guards);
    assert_eq!(drainer.join().expect("drainer"), Ok(()));
}

#[test]
fn each_leave_of_a_turned_gate_signals_who_cannot_block() {
    let (gate, handle) = opened();
    let notify = Notify::new().expect("notify");
    let mut guards = handle.admit_many(3).expect("live");
    gate.close();
    gate.wake_drain_with(&notify);
    for (leaving, inside) in [(2, 1), (1, 0)] {
        notify.clear();
        guards.leave(leaving);
        assert!(notify.wait(Some(Duration::ZERO)), "signalled before it returned");
        assert_eq!(gate.operations(), inside);
    }
}

#[test]
fn revoking_waits_for_the_batches_of_its_handle_alone() {
    let (gate, handle) = opened();
    let other = gate.open_handle(None).expect("open");
    let others_calls = other.admit_many(7).expect("live");
    let mut guards = handle.admit_many(2).expect("live");
    handle.revoke();
    guards.leave(1);
    let early = handle.drain(at_once(), &Cancel::new());
    assert_eq!(early, Err(DrainError::Deadline { operations: 1, crossings: 0 }));
    guards.leave(1);
    assert_eq!(handle.drain(at_once(), &Cancel::new()), Ok(()));
    assert_eq!(gate.operations(), 7);
    drop(others_calls);
}

#[test]
fn batches_of_one_handle_join_and_of_another_are_given_back() {
    let (gate, handle) = opened();
    let other = gate.open_handle(None).expect("open");
    let mut guards = handle.admit_many(2).expect("live");
    guards.join(handle.admit_many(3).expect("live")).expect("of the same handle");
    guards.join(handle.admit_many(0).expect("live")).expect("of the same handle");
    assert_eq!((guards.count(), handle.calls()), (5, 5));
    let back = guards.join(other.admit_many(4).expect("live")).expect_err("of another handle");
    assert_eq!((guards.count(), back.count(), other.calls(), gate.operations()), (5, 4, 4, 9));
    drop(guards);
    assert_eq!((handle.calls(), other.calls()), (0, 4));
    drop(back);
    assert_eq!(gate.operations(), 0);
}

#[test]
fn a_batch_does_not_join_that_of_the_handle_that_had_its_place() {
    let gate = Gate::new();
    gate.limit_handles(1);
    let first = gate.open_handle(None).expect("open");
    let mut empty = first.admit_many(0).expect("live");
    first.close();
    let second = gate.open_handle(None).expect("vacant");
    assert_eq!(second.id().index, first.id().index);
    let back = empty.join(second.admit_many(2).expect("live")).expect_err("of another generation");
    assert_eq!((empty.count(), back.count(), second.calls()), (0, 2, 2));
    drop(back);
    assert_eq!(second.calls(), 0);
}

#[test]
#[cfg_attr(miri, ignore = "takes too long there")]
fn more_than_a_count_can_say_are_given_back() {
    let (_, handle) = opened();
    let mut guards = handle.admit_many(0).expect("live");
    for _ in 0..u32::MAX / MAX_BATCH {
        guards.join(handle.admit_many(MAX_BATCH).expect("live")).expect("it fits");
    }
    let back = guards.join(handle.admit_many(MAX_BATCH).expect("live")).expect_err("it does not fit");
    assert_eq!(back.count(), MAX_BATCH);
    assert_eq!(handle.calls(), u64::from(guards.count()) + u64::from(MAX_BATCH));
    drop((guards, back));
    assert_eq!(handle.calls(), 0);
}

#[test]
fn a_batch_above_the_bound_is_a_panic_that_counts_nothing() {
    let (gate, handle) = opened();
    assert!(std::panic::catch_unwind(|| handle.admit_many(MAX_BATCH + 1)).is_err());
    assert_eq!(gate.operations(), 0);
    assert!(handle.admit_many(MAX_BATCH).is_ok());
}

#[test]
fn a_leaked_batch_is_reported_with_its_number() {
    let (gate, handle) = opened();
    std::mem::forget(handle.admit_many(5));
    gate.close();
    let early = drain(gate, at_once());
    assert_eq!(early, Err(DrainError::Deadline { operations: 5, crossings: 0 }));
    assert_eq!(gate.retire(), Err(gate));
}

#[test]
fn a_batch_at_a_pinned_gate_is_counted_by_nobody_but_itself() {
    let gate = Gate::pinned();
    let handle = gate.open_handle(None).expect("open");
    let mut guards = handle.admit_many(4).expect("live");
    guards.leave(1);
    assert_eq!((guards.count(), handle.calls(), gate.operations()), (3, 0, 0));
    handle.revoke();
    assert_eq!(handle.admit_many(1).err(), Some(HandleRefused::Revoked));
    drop(guards);
}

#[test]
fn a_batch_can_be_sent_and_kept() {
    fn travels<T: Send + 'static>() {}
    travels::<Guards>();
    #[cfg(not(feature = "trace-holders"))]
    assert!(size_of::<Guards>() <= 40, "five words: no heap, and cheap to hand on");
}

#[cfg(feature = "trace-holders")]
#[test]
fn a_batch_is_one_holder_with_its_count() {
    let (gate, handle) = opened();
    let counts = || gate.holders().iter().map(|holder| holder.count).collect::<Vec<_>>();
    let mut first = handle.admit_many(4).expect("live");
    let since = gate.holders()[0].since;
    assert!(gate.holders()[0].location.file().ends_with("batch.rs"));
    let mut second = handle.admit_many(2).expect("live");
    let empty = handle.admit_many(0).expect("live");
    let call = handle.admit().expect("live");
    assert_eq!(counts(), [4, 2, 1]);
    first.leave(3);
    assert_eq!(counts(), [1, 2, 1]);
    // The later one takes the earlier one over: the earlier one's name goes on.
    second.join(first).expect("of the same handle");
    second.join(empty).expect("of the same handle");
    assert_eq!(counts(), [3, 1]);
    assert_eq!(gate.holders()[0].since, since);
    second.leave(3);
    assert_eq!(counts(), [1]);
    // With nothing inside it takes over the name as well.
    second.join(handle.admit_many(6).expect("live")).expect("of the same handle");
    assert_eq!(counts(), [1, 6]);
    drop(call);
    drop(second);
    assert!(gate.holders().is_empty());
}
