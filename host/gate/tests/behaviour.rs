//! What a gate promises, one claim per test. Waits are on conditions; deadlines only end what
//! would otherwise hang.

mod support;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use cofferdam_gate::{
    Cancel, Drain, DrainError, Gate, Guard, HandleError, HandleId, HandleRefused, HandleState, HoldError, Notify,
    Overdue, Refused, State, Woken, in_crossing,
};
use support::{at_once, drain, long};

#[test]
fn a_closed_gate_refuses_for_good() {
    let gate = Gate::new();
    drop(gate.admit().expect("open"));
    gate.close();
    gate.open();
    gate.close();
    assert_eq!(gate.admit().err(), Some(Refused::Closed));
    assert_eq!(gate.state(), State::Closed);
    assert_eq!(drain(gate, None), Ok(()));
}

#[test]
fn a_held_gate_refuses_until_it_opens() {
    let gate = Gate::new();
    gate.hold();
    assert_eq!(gate.admit().err(), Some(Refused::Held));
    let notify = Notify::new().expect("notify");
    gate.register_held(&notify);
    assert!(!notify.wait(Some(Duration::ZERO)));
    gate.open();
    assert!(notify.wait(Some(Duration::from_secs(60))));
    assert!(gate.admit().is_ok());
}

#[test]
fn registering_at_an_open_gate_is_answered_at_once() {
    let gate = Gate::new();
    let notify = Notify::new().expect("notify");
    gate.register_held(&notify);
    assert!(notify.wait(Some(Duration::ZERO)));
}

#[test]
fn close_wakes_who_waits_for_the_end_of_a_hold() {
    let gate = Gate::new();
    gate.hold();
    let notify = Notify::new().expect("notify");
    gate.register_held(&notify);
    gate.close();
    assert!(notify.wait(Some(Duration::ZERO)));
    assert_eq!(gate.admit().err(), Some(Refused::Closed));
}

#[test]
fn drain_waits_for_a_guard_dropped_by_another_thread() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    let (draining, drains) = mpsc::channel();
    let drainer = std::thread::spawn(move || {
        gate.close();
        draining.send(()).expect("the test listens");
        drain(gate, long())
    });
    drains.recv().expect("the drainer speaks");
    assert_eq!(gate.operations(), 1);
    drop(guard);
    assert_eq!(drainer.join().expect("drainer"), Ok(()));
}

#[test]
fn drain_ends_at_its_deadline_and_can_be_called_again() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    let crossing = gate.cross();
    gate.close();
    let outside = move |deadline| std::thread::spawn(move || drain(gate, deadline)).join().expect("drainer");
    let early = outside(at_once());
    assert_eq!(early, Err(DrainError::Deadline { operations: 1, crossings: 1 }));
    drop(crossing);
    drop(guard);
    assert_eq!(outside(at_once()), Ok(()));
}

#[test]
fn a_leaked_guard_is_reported_and_never_forgiven() {
    let gate = Gate::new();
    std::mem::forget(gate.admit());
    gate.close();
    let early = drain(gate, at_once());
    assert_eq!(early, Err(DrainError::Deadline { operations: 1, crossings: 0 }));
    assert_eq!(gate.retire(), Err(gate));
}

#[test]
fn cancel_ends_a_drain_from_another_thread_and_before_it() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    gate.close();
    let cancel = Cancel::new();
    let drainers: Vec<_> = (0..2)
        .map(|_| {
            let cancel = cancel.clone();
            std::thread::spawn(move || gate.drain(Drain::Operations, long(), &cancel))
        })
        .collect();
    cancel.cancel();
    let ended = Err(DrainError::Cancelled { operations: 1, crossings: 0 });
    for drainer in drainers {
        assert_eq!(drainer.join().expect("drainer"), ended);
    }
    assert_eq!(gate.drain(Drain::Operations, None, &cancel), ended);
    drop(guard);
    // With nothing inside there is nothing to cancel.
    assert_eq!(gate.drain(Drain::Operations, None, &cancel), Ok(()));
}

#[test]
fn a_drain_from_inside_a_crossing_is_refused() {
    let gate = Gate::new();
    let other = Gate::new();
    gate.close();
    other.close();
    let crossing = gate.cross();
    assert!(in_crossing() && gate.in_crossing() && !other.in_crossing());
    assert_eq!(drain(gate, None), Err(DrainError::InsideCrossing));
    assert_eq!(drain(other, None), Ok(()));
    let nested = gate.cross();
    drop(crossing);
    assert_eq!(drain(gate, None), Err(DrainError::InsideCrossing));
    drop(nested);
    assert!(!in_crossing());
    assert_eq!(drain(gate, None), Ok(()));
}

#[test]
fn crossings_nest_deeper_than_is_remembered() {
    let gates: Vec<Gate> = (0..20).map(|_| Gate::new()).collect();
    let crossings: Vec<_> = gates.iter().map(Gate::cross).collect();
    assert!(gates[19].in_crossing() && gates[0].in_crossing());
    drop(crossings);
    assert!(!in_crossing());
}

#[test]
fn crossings_pass_a_closed_gate_and_are_drained() {
    let gate = Gate::new();
    gate.close();
    let (begun, begins) = mpsc::channel();
    let (end, ends) = mpsc::channel::<()>();
    let crosser = std::thread::spawn(move || {
        let _crossing = gate.cross();
        begun.send(()).expect("the test listens");
        ends.recv().expect("the test speaks");
    });
    begins.recv().expect("the crosser speaks");
    assert_eq!(gate.crossings(), 1);
    assert!(gate.drain(Drain::Operations, None, &Cancel::new()).is_ok());
    assert!(gate.drain(Drain::Crossings, at_once(), &Cancel::new()).is_err());
    end.send(()).expect("the crosser listens");
    assert_eq!(drain(gate, long()), Ok(()));
    crosser.join().expect("crosser");
}

#[test]
fn draining_an_open_gate_is_refused_and_opening_ends_a_drain() {
    let gate = Gate::new();
    assert_eq!(drain(gate, None), Err(DrainError::Open));
    let _guard = gate.admit().expect("open");
    gate.hold();
    let drainer = std::thread::spawn(move || drain(gate, long()));
    gate.open();
    assert_eq!(drainer.join().expect("drainer"), Err(DrainError::Open));
}

#[test]
fn two_drainers_both_return() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    gate.close();
    let drainers: Vec<_> = (0..2).map(|_| std::thread::spawn(move || drain(gate, long()))).collect();
    drop(guard);
    for drainer in drainers {
        assert_eq!(drainer.join().expect("drainer"), Ok(()));
    }
}

#[test]
fn a_leaver_signals_who_cannot_block() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    let notify = Notify::new().expect("notify");
    gate.close();
    gate.wake_drain_with(&notify);
    assert!(notify.wait(Some(Duration::ZERO)));
    notify.clear();
    assert_eq!(gate.operations(), 1);
    drop(guard);
    assert!(notify.wait(Some(Duration::from_secs(60))));
    assert_eq!(gate.operations(), 0);
}

#[test]
fn a_retired_gate_stays_closed_while_its_slot_serves_another() {
    let gate = Gate::new();
    let handle = gate.open_handle(None).expect("open");
    assert_eq!(gate.retire(), Err(gate));
    gate.close();
    gate.retire().expect("closed and drained");
    let mut others: Vec<Gate> = (0..200).map(|_| Gate::new()).collect();
    let guards: Vec<Guard> = others.iter().map(|other| other.admit().expect("open")).collect();
    assert_eq!(gate.admit().err(), Some(Refused::Closed));
    assert_eq!(handle.admit().err(), Some(HandleRefused::Revoked));
    gate.close();
    gate.open();
    handle.revoke();
    assert_eq!(drain(gate, at_once()), Ok(()));
    assert_eq!(gate.retire(), Err(gate));
    assert!(others.iter().all(|other| other.state() == State::Open && other.operations() == 1));
    drop(guards);
    for other in others.drain(..) {
        other.close();
        other.retire().expect("closed and drained");
    }
}

#[test]
fn statistics_begin_anew_with_the_generation() {
    for _ in 0..3 {
        let gate = Gate::new();
        let handle = gate.open_handle(None).expect("open");
        drop((gate.admit(), gate.cross(), handle.admit()));
        gate.hold();
        assert!(gate.admit().is_err());
        gate.close();
        assert!(gate.admit().is_err() && handle.admit().is_err());
        let sum = gate.stats().into_iter().fold([0; 6], |sum, core| {
            let row = [core.entered, core.left, core.crossings_in, core.crossings_out, core.refused, core.held];
            std::array::from_fn(|at| sum[at] + row[at])
        });
        // The portable form also counts, and takes back, what it refuses.
        assert_eq!(sum[0], sum[1]);
        assert!(sum[0] >= 2);
        assert_eq!(&sum[2..], &[1, 1, 2, 1]);
        gate.retire().expect("closed and drained");
    }
}

#[test]
fn a_pinned_gate_counts_nothing_and_can_be_closed() {
    let gate = Gate::pinned();
    let guard = gate.admit().expect("open");
    let handle = gate.open_handle(None).expect("open");
    let call = handle.admit().expect("live");
    drop(gate.cross());
    assert_eq!((gate.operations(), gate.crossings()), (0, 0));
    gate.hold();
    assert_eq!(gate.admit().err(), Some(Refused::Held));
    gate.open();
    handle.revoke();
    assert_eq!(handle.admit().err(), Some(HandleRefused::Revoked));
    gate.close();
    assert_eq!(gate.admit().err(), Some(Refused::Closed));
    assert_eq!(drain(gate, None), Err(DrainError::Pinned));
    drop((guard, call));
    assert_eq!(gate.retire(), Err(gate));
    assert!(gate.stats().iter().all(|core| core.entered == 0));
}

#[test]
fn revoking_one_handle_waits_for_its_calls_alone() {
    let gate = Gate::new();
    let revoked = gate.open_handle(None).expect("open");
    let other = gate.open_handle(None).expect("open");
    let call = revoked.admit().expect("live");
    let others_call = other.admit().expect("live");
    let own = gate.admit().expect("open");
    assert_eq!(revoked.drain(None, &Cancel::new()), Err(DrainError::Open));
    assert!(revoked.revoke());
    assert!(!revoked.revoke());
    let early = revoked.drain(at_once(), &Cancel::new());
    assert_eq!(early, Err(DrainError::Deadline { operations: 1, crossings: 0 }));
    let drainer = std::thread::spawn(move || revoked.drain(long(), &Cancel::new()));
    drop(call);
    assert_eq!(drainer.join().expect("drainer"), Ok(()));
    assert_eq!(revoked.admit().err(), Some(HandleRefused::Revoked));
    assert_eq!(other.state(), HandleState::Open);
    assert_eq!(gate.operations(), 2);
    drop((others_call, own));
}

#[test]
fn closing_the_gate_waits_for_calls_of_all_handles() {
    let gate = Gate::new();
    let handles: Vec<_> = (0..300).map(|_| gate.open_handle(None).expect("open")).collect();
    let calls: Vec<_> = handles.iter().map(|handle| handle.admit().expect("live")).collect();
    gate.close();
    assert_eq!(gate.operations(), 300);
    assert!(drain(gate, at_once()).is_err());
    drop(calls);
    assert_eq!(drain(gate, None), Ok(()));
}

#[test]
fn revocation_hangs_up_for_ever() {
    let gate = Gate::new();
    let bell = Notify::new().expect("notify");
    let handle = gate.open_handle(Some(Arc::clone(&bell))).expect("open");
    let kept = gate.open_handle(None).expect("open");
    assert!(!bell.is_hung_up());
    assert_eq!(gate.handles(), 2);
    assert_eq!(gate.revoke_handles(), 2);
    assert_eq!(gate.handles(), 0);
    for _ in 0..3 {
        assert!(bell.is_hung_up() && bell.wait(Some(Duration::ZERO)));
        bell.clear();
    }
    handle.close();
    kept.close();
    assert!(gate.admit().is_ok());
}

#[test]
fn a_place_is_used_again_only_when_its_calls_are_out() {
    let gate = Gate::new();
    gate.limit_handles(1);
    let first = gate.open_handle(None).expect("open");
    let call = first.admit().expect("live");
    first.close();
    assert_eq!(gate.open_handle(None), Err(HandleError::Full { capacity: 1 }));
    drop(call);
    let second = gate.open_handle(None).expect("vacant");
    assert_eq!(second.id().index, first.id().index);
    assert_ne!(second.id().generation, first.id().generation);
    assert_eq!(first.state(), HandleState::Revoked);
    // A late revocation of the old handle does not touch the new one.
    assert!(!first.revoke());
    assert_eq!(second.state(), HandleState::Open);
    assert_eq!(first.drain(at_once(), &Cancel::new()), Ok(()));
    assert_eq!(gate.handle(second.id()), Some(second));
    assert_eq!(gate.handle(first.id()), None);
    for forged in [u64::MAX, u64::MAX / 16, 0] {
        assert_eq!(gate.handle(HandleId { index: 0, generation: forged }), None);
        assert_eq!(gate.handle(HandleId { index: u32::MAX, generation: forged }), None);
    }
    gate.close();
    assert_eq!(gate.open_handle(None), Err(HandleError::Closed));
}

#[test]
fn a_sleeping_call_is_woken_by_revocation_by_its_condition_and_by_time() {
    let gate = Gate::new();
    let handle = gate.open_handle(None).expect("open");
    let call = handle.admit().expect("live");
    let notify = Notify::new().expect("notify");
    let seen = notify.count();
    assert_eq!(call.sleep(&notify, seen, at_once()), Woken::TimedOut);
    notify.signal();
    assert_eq!(call.sleep(&notify, seen, long()), Woken::Signalled);
    let sleeper = std::thread::spawn({
        let notify = Arc::clone(&notify);
        move || call.sleep(&notify, notify.count(), long())
    });
    handle.revoke();
    assert_eq!(sleeper.join().expect("sleeper"), Woken::Revoked);
    let guard = gate.admit().expect("open");
    let crosser = std::thread::spawn(move || gate.cross().sleep(&notify, notify.count(), long()));
    gate.close();
    assert_eq!(crosser.join().expect("crosser"), Woken::Revoked);
    drop(guard);
    assert_eq!(drain(gate, long()), Ok(()));
}

#[test]
fn a_hold_ends_with_its_bound() {
    let gate = Gate::new();
    let hold = gate.hold_for(Duration::from_millis(20), Overdue::Open).expect("open");
    assert_eq!(gate.hold_for(Duration::ZERO, Overdue::Open).err(), Some(HoldError::Held));
    let notify = Notify::new().expect("notify");
    gate.register_held(&notify);
    assert!(notify.wait(Some(Duration::from_secs(60))));
    assert_eq!(gate.state(), State::Open);
    assert_eq!(hold.open(), Err(HoldError::Expired));

    let hold = gate.hold_for(Duration::from_millis(20), Overdue::Close).expect("open");
    notify.clear();
    gate.register_held(&notify);
    assert!(notify.wait(Some(Duration::from_secs(60))));
    assert_eq!(gate.state(), State::Closed);
    assert_eq!(hold.open(), Err(HoldError::Closed));
}

#[test]
fn a_hold_that_ends_in_time_is_forgotten_by_the_clock() {
    let gate = Gate::new();
    let first = gate.hold_for(Duration::from_millis(30), Overdue::Close).expect("open");
    first.open().expect("in time");
    let second = gate.hold_for(Duration::from_secs(60), Overdue::Open).expect("open");
    // Another gate's bound, later than the first, has passed: so has the first.
    let clock = Gate::new();
    let notify = Notify::new().expect("notify");
    let _kept = clock.hold_for(Duration::from_millis(60), Overdue::Open).expect("open");
    clock.register_held(&notify);
    assert!(notify.wait(Some(Duration::from_secs(60))));
    assert_eq!(gate.state(), State::Held);
    drop(second);
    assert_eq!(gate.state(), State::Open);
}

#[test]
fn notify_counts_and_is_readable_until_cleared() {
    let notify = Notify::new().expect("notify");
    assert!(!notify.wait(Some(Duration::ZERO)));
    for _ in 0..1000 {
        notify.signal();
    }
    assert_eq!(notify.count(), 1000);
    assert!(notify.wait(None));
    notify.clear();
    assert!(!notify.wait(Some(Duration::ZERO)));
    assert!(!notify.wait_past(1000, at_once()));
    let waiter = std::thread::spawn({
        let notify = Arc::clone(&notify);
        move || notify.wait_past(1000, long())
    });
    notify.signal();
    assert!(waiter.join().expect("waiter"));
    notify.hang_up();
    assert_eq!(notify.count(), 1001);
    assert!(notify.wait_past(5000, None) && notify.is_hung_up());
}

#[cfg(feature = "trace-holders")]
#[test]
fn holders_are_named_with_the_feature() {
    let gate = Gate::new();
    let guard = std::thread::Builder::new()
        .name("culprit".to_owned())
        .spawn(move || gate.admit().expect("open"))
        .expect("a thread")
        .join()
        .expect("culprit");
    let holders = gate.holders();
    assert_eq!(holders.len(), 1);
    assert_eq!(holders[0].thread, "culprit");
    assert!(holders[0].location.file().ends_with("behaviour.rs"));
    drop(guard);
    assert!(gate.holders().is_empty());
}
