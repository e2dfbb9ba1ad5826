//! The models. Each is one small scene of two or three threads, run in every order that loom
//! finds within the bound on preemptions.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use cofferdam_gate::model::{Mechanism, Mutant, begin_hold, overdue, thread_on, wander};
use cofferdam_gate::{Cancel, Drain, DrainError, Gate, HandleRefused, HandleState, Notify, Refused, State, Woken};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread::{JoinHandle, spawn};

use Mechanism::{Rseq, Xadd};
use Mutant::{
    CancelLate, ClearEarly, ClearHangUp, CoreByCore, CountLate, EnteredFirst, ExpireBlindly,
    HandleLeaveLooksAtGateOnly, HandleLookedAtEarly, LeaveRelaxed, LeaveSilently, LookBeforeCount, NoBarrier,
    NoRestart, OpenBlindly, RefuseSilently, RegisterBlindly, RetireBlindly, RetireResets, ReuseEarly,
    SleeperLooksEarly,
};

/// A model: its name, what it does, its bound on preemptions, and the mutants that it kills
/// (with one mechanism only, where the other does not have the mistake to make).
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) act: fn(),
    pub(crate) preemptions: usize,
    pub(crate) kills: &'static [(Mutant, Option<Mechanism>)],
}

pub(crate) const SCENES: &[Scene] = &[
    Scene {
        name: "close_against_admission",
        act: close_against_admission,
        preemptions: 5,
        kills: &[
            (NoBarrier, None),
            (NoRestart, Some(Rseq)),
            (LookBeforeCount, Some(Xadd)),
            (LeaveRelaxed, None),
            (LeaveSilently, None),
            (RefuseSilently, Some(Xadd)),
            (CountLate, None),
        ],
    },
    Scene {
        name: "guard_dropped_elsewhere",
        act: guard_dropped_elsewhere,
        preemptions: 5,
        kills: &[(LeaveRelaxed, None), (LeaveSilently, None), (CountLate, None)],
    },
    Scene {
        name: "refused_entrant_migrates",
        act: refused_entrant_migrates,
        preemptions: 5,
        kills: &[(EnteredFirst, Some(Xadd)), (CoreByCore, Some(Xadd))],
    },
    Scene {
        name: "crossings_pass_a_closed_gate",
        act: crossings_pass_a_closed_gate,
        preemptions: 5,
        kills: &[(EnteredFirst, None)],
    },
    Scene {
        name: "hold_and_open_again",
        act: hold_and_open_again,
        preemptions: 5,
        kills: &[(NoBarrier, None), (RegisterBlindly, None), (LookBeforeCount, Some(Xadd))],
    },
    Scene { name: "open_races_close", act: open_races_close, preemptions: 5, kills: &[(OpenBlindly, None)] },
    Scene {
        name: "overdue_hold_ends_no_other",
        act: overdue_hold_ends_no_other,
        preemptions: 5,
        kills: &[(ExpireBlindly, None)],
    },
    Scene {
        name: "two_closers_and_drainers",
        act: two_closers_and_drainers,
        preemptions: 3,
        kills: &[(NoBarrier, None), (LeaveSilently, None)],
    },
    Scene {
        name: "revoke_one_handle",
        act: revoke_one_handle,
        preemptions: 5,
        kills: &[
            (NoBarrier, None),
            (NoRestart, Some(Rseq)),
            (HandleLookedAtEarly, None),
            (HandleLeaveLooksAtGateOnly, None),
            (LeaveRelaxed, None),
        ],
    },
    Scene {
        name: "close_waits_for_handles",
        act: close_waits_for_handles,
        preemptions: 5,
        kills: &[(NoBarrier, None), (NoRestart, Some(Rseq)), (LeaveSilently, None)],
    },
    Scene {
        name: "place_is_reused_when_vacant",
        act: place_is_reused_when_vacant,
        preemptions: 5,
        kills: &[(ReuseEarly, None)],
    },
    Scene {
        name: "sleeper_is_woken_by_close",
        act: sleeper_is_woken_by_close,
        preemptions: 5,
        kills: &[(SleeperLooksEarly, None)],
    },
    Scene {
        name: "sleeper_is_woken_by_revoke",
        act: sleeper_is_woken_by_revoke,
        preemptions: 5,
        kills: &[(SleeperLooksEarly, None)],
    },
    Scene { name: "cancel_ends_a_drain", act: cancel_ends_a_drain, preemptions: 5, kills: &[(CancelLate, None)] },
    Scene {
        name: "notify_loses_no_wake_up",
        act: notify_loses_no_wake_up,
        preemptions: 5,
        kills: &[(ClearEarly, None)],
    },
    Scene { name: "hang_up_is_for_ever", act: hang_up_is_for_ever, preemptions: 5, kills: &[(ClearHangUp, None)] },
    Scene {
        name: "late_entrant_of_a_retired_gate",
        act: late_entrant_of_a_retired_gate,
        preemptions: 5,
        kills: &[(RetireResets, Some(Xadd))],
    },
    Scene {
        name: "late_call_of_a_retired_gate",
        act: late_call_of_a_retired_gate,
        preemptions: 5,
        kills: &[(RetireBlindly, Some(Rseq))],
    },
];

/// What the gate guards. Loom reports any use that is not ordered before the end.
pub(crate) struct Payload(Arc<UnsafeCell<bool>>);

impl Payload {
    pub(crate) fn new() -> Payload {
        Payload(Arc::new(UnsafeCell::new(true)))
    }

    pub(crate) fn share(&self) -> Payload {
        Payload(Arc::clone(&self.0))
    }

    pub(crate) fn used(&self) {
        // SAFETY: loom checks that no `ended` runs at the same time.
        assert!(self.0.with(|alive| unsafe { *alive }), "used after the end");
    }

    pub(crate) fn ended(&self) {
        // SAFETY: loom checks that nothing else runs at the same time.
        self.0.with_mut(|alive| unsafe { *alive = false });
    }
}

pub(crate) fn thread(number: usize, core: usize, act: impl FnOnce() + 'static) -> JoinHandle<()> {
    spawn(move || {
        thread_on(number, core);
        act();
    })
}

/// Waits without bound: a lost wake-up shows itself as a deadlock.
pub(crate) fn drained(gate: Gate) {
    gate.drain(Drain::Operations, None, &Cancel::new()).expect("drains");
}

/// A deadline that has passed: one look, no wait.
fn at_once() -> Option<Instant> {
    Some(Instant::now().checked_sub(Duration::from_secs(1)).unwrap_or_else(Instant::now))
}

fn close_against_admission() {
    let gate = Gate::new();
    let payload = Payload::new();
    let entrant = thread(1, 1, {
        let payload = payload.share();
        move || {
            if let Ok(_guard) = gate.admit() {
                payload.used();
            }
        }
    });
    gate.close();
    drained(gate);
    payload.ended();
    assert_eq!(gate.admit().err(), Some(Refused::Closed));
    entrant.join().expect("entrant");
}

fn guard_dropped_elsewhere() {
    let gate = Gate::new();
    let payload = Payload::new();
    let guard = gate.admit().expect("open");
    let dropper = thread(1, 1, {
        let payload = payload.share();
        move || {
            payload.used();
            drop(guard);
        }
    });
    gate.close();
    drained(gate);
    payload.ended();
    dropper.join().expect("dropper");
}

fn refused_entrant_migrates() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    gate.close();
    let entrant = thread(1, 0, move || {
        wander();
        assert!(gate.admit().is_err());
    });
    // The guard is in, so no order of reading may come to zero.
    let early = gate.drain(Drain::Operations, at_once(), &Cancel::new());
    assert!(matches!(early, Err(DrainError::Deadline { .. })), "drained with a guard inside");
    drop(guard);
    entrant.join().expect("entrant");
}

fn crossings_pass_a_closed_gate() {
    let gate = Gate::new();
    let crossing = gate.cross();
    gate.close();
    let drainer = thread(1, 0, move || {
        let early = gate.drain(Drain::Crossings, at_once(), &Cancel::new());
        assert!(matches!(early, Err(DrainError::Deadline { .. })), "drained with a crossing inside");
    });
    let other = thread(2, 1, move || drop(gate.cross()));
    let own = gate.drain(Drain::Crossings, at_once(), &Cancel::new());
    assert_eq!(own, Err(DrainError::InsideCrossing));
    drainer.join().expect("drainer");
    other.join().expect("other");
    drop(crossing);
}

fn hold_and_open_again() {
    let gate = Gate::new();
    let payload = Payload::new();
    let entrant = thread(1, 1, {
        let payload = payload.share();
        move || {
            let notify = Notify::new().expect("notify");
            loop {
                match gate.admit() {
                    Ok(_guard) => return payload.used(),
                    Err(Refused::Held) => {
                        notify.clear();
                        gate.register_held(&notify);
                        notify.wait(None);
                    }
                    Err(Refused::Closed) => unreachable!("never closed"),
                }
            }
        }
    });
    gate.hold();
    drained(gate);
    // Nobody is inside, and nobody will be until it opens.
    payload.0.with_mut(|_| ());
    gate.open();
    entrant.join().expect("entrant");
}

fn open_races_close() {
    let gate = Gate::new();
    let holder = thread(1, 1, move || {
        gate.hold();
        gate.open();
    });
    gate.close();
    assert_eq!(gate.admit().err(), Some(Refused::Closed));
    holder.join().expect("holder");
    assert_eq!(gate.state(), State::Closed);
}

fn overdue_hold_ends_no_other() {
    let gate = Gate::new();
    let first = begin_hold(gate).expect("open");
    let clock = thread(1, 1, move || overdue(gate, first));
    gate.open();
    let second = begin_hold(gate);
    clock.join().expect("clock");
    assert!(second.is_some());
    assert_eq!(gate.state(), State::Held);
}

fn two_closers_and_drainers() {
    let gate = Gate::new();
    let payload = Payload::new();
    let entrant = thread(1, 1, {
        let payload = payload.share();
        move || {
            if let Ok(_guard) = gate.admit() {
                payload.used();
            }
        }
    });
    let closer = thread(2, 1, move || {
        gate.close();
        drained(gate);
    });
    gate.close();
    drained(gate);
    payload.ended();
    entrant.join().expect("entrant");
    closer.join().expect("closer");
}

fn revoke_one_handle() {
    let gate = Gate::new();
    let payload = Payload::new();
    let handle = gate.open_handle(None).expect("open");
    let caller = thread(1, 1, {
        let payload = payload.share();
        move || {
            if let Ok(_guard) = handle.admit() {
                payload.used();
            }
        }
    });
    handle.revoke();
    handle.drain(None, &Cancel::new()).expect("drains");
    payload.ended();
    assert_eq!(handle.admit().err(), Some(HandleRefused::Revoked));
    assert_eq!(gate.state(), State::Open);
    caller.join().expect("caller");
}

fn close_waits_for_handles() {
    let gate = Gate::new();
    let payload = Payload::new();
    let handle = gate.open_handle(None).expect("open");
    let caller = thread(1, 1, {
        let payload = payload.share();
        move || {
            if let Ok(_guard) = handle.admit() {
                payload.used();
            }
        }
    });
    gate.close();
    drained(gate);
    payload.ended();
    assert_eq!(handle.state(), HandleState::Revoked);
    caller.join().expect("caller");
}

fn place_is_reused_when_vacant() {
    let gate = Gate::new();
    let payload = Payload::new();
    let first = gate.open_handle(None).expect("open");
    let guard = first.admit().expect("live");
    let caller = thread(1, 1, {
        let payload = payload.share();
        move || {
            payload.used();
            drop(guard);
        }
    });
    first.revoke();
    let second = gate.open_handle(None).expect("open");
    first.drain(None, &Cancel::new()).expect("drains");
    payload.ended();
    assert_eq!(first.state(), HandleState::Revoked);
    assert_eq!(second.state(), HandleState::Open);
    caller.join().expect("caller");
}

fn sleeper_is_woken_by_close() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    let sleeper = thread(1, 1, move || {
        let notify = Notify::new().expect("notify");
        assert_eq!(guard.sleep(&notify, notify.count(), None), Woken::Revoked);
    });
    gate.close();
    drained(gate);
    sleeper.join().expect("sleeper");
}

fn sleeper_is_woken_by_revoke() {
    let gate = Gate::new();
    let handle = gate.open_handle(None).expect("open");
    let guard = handle.admit().expect("live");
    let sleeper = thread(1, 1, move || {
        let notify = Notify::new().expect("notify");
        assert_eq!(guard.sleep(&notify, notify.count(), None), Woken::Revoked);
    });
    handle.revoke();
    handle.drain(None, &Cancel::new()).expect("drains");
    sleeper.join().expect("sleeper");
}

fn cancel_ends_a_drain() {
    let gate = Gate::new();
    let guard = gate.admit().expect("open");
    gate.close();
    let cancel = Cancel::new();
    let canceller = thread(1, 1, {
        let cancel = cancel.clone();
        move || cancel.cancel()
    });
    let ended = gate.drain(Drain::Both, None, &cancel);
    assert_eq!(ended, Err(DrainError::Cancelled { operations: 1, crossings: 0 }));
    drop(guard);
    canceller.join().expect("canceller");
}

fn notify_loses_no_wake_up() {
    let notify = Notify::new().expect("notify");
    let done = Arc::new(AtomicUsize::new(0));
    let signaller = thread(1, 1, {
        let (notify, done) = (std::sync::Arc::clone(&notify), Arc::clone(&done));
        move || {
            for step in 1..=2 {
                done.store(step, Ordering::Release);
                notify.signal();
            }
        }
    });
    loop {
        notify.clear();
        if done.load(Ordering::Acquire) == 2 {
            break;
        }
        notify.wait(None);
    }
    assert!(notify.wait_past(1, None));
    signaller.join().expect("signaller");
}

fn hang_up_is_for_ever() {
    let notify = Notify::new().expect("notify");
    let source = thread(1, 1, {
        let notify = std::sync::Arc::clone(&notify);
        move || notify.hang_up()
    });
    notify.clear();
    source.join().expect("source");
    assert!(notify.wait(None));
    notify.clear();
    assert!(notify.wait(None));
    assert!(notify.is_hung_up());
}

fn late_entrant_of_a_retired_gate() {
    let gate = Gate::new();
    gate.close();
    let entrant = thread(1, 0, move || {
        wander();
        assert_eq!(gate.admit().err(), Some(Refused::Closed));
    });
    if gate.retire().is_ok() {
        let next = Gate::new();
        let guard = next.admit().expect("open");
        next.close();
        let early = next.drain(Drain::Operations, at_once(), &Cancel::new());
        assert!(early.is_err(), "drained with a guard inside");
        drop(guard);
    }
    entrant.join().expect("entrant");
}

fn late_call_of_a_retired_gate() {
    let gate = Gate::new();
    let handle = gate.open_handle(None).expect("open");
    gate.close();
    let caller = thread(1, 1, move || {
        assert_eq!(handle.admit().err(), Some(HandleRefused::Revoked));
    });
    if gate.retire().is_ok() {
        // The same slot, open again for somebody else.
        let next = Gate::new();
        assert_eq!(next.state(), State::Open);
    }
    caller.join().expect("caller");
}
