//! The models of batches: many operations let in by one look and one count.

use cofferdam_gate::model::{Mechanism, Mutant};
use cofferdam_gate::{Cancel, Gate, HandleRefused, HandleState, State};

use crate::scenes::{Payload, Scene, drained, thread};

use Mechanism::{Rseq, Xadd};
use Mutant::{
    BatchBacksOutOne, BatchCountsOne, BatchLeavesWhole, HandleLeaveLooksAtGateOnly, HandleLookedAtEarly, LeaveRelaxed,
    LeaveSilently, LookBeforeCount, NoBarrier, NoRestart, RefuseSilently,
};

pub(crate) const SCENES: &[Scene] = &[
    Scene {
        name: "batch_against_close",
        act: batch_against_close,
        preemptions: 5,
        kills: &[
            (NoBarrier, None),
            (NoRestart, Some(Rseq)),
            (LookBeforeCount, Some(Xadd)),
            (LeaveSilently, None),
            (RefuseSilently, Some(Xadd)),
            (BatchCountsOne, None),
            (BatchBacksOutOne, Some(Xadd)),
            (BatchLeavesWhole, None),
        ],
    },
    Scene {
        name: "batch_against_revoke",
        act: batch_against_revoke,
        preemptions: 5,
        kills: &[(NoBarrier, None), (HandleLookedAtEarly, None), (BatchCountsOne, None), (BatchLeavesWhole, None)],
    },
    Scene {
        name: "joined_batches_leave_elsewhere",
        act: joined_batches_leave_elsewhere,
        preemptions: 5,
        kills: &[(LeaveRelaxed, None), (HandleLeaveLooksAtGateOnly, None), (BatchLeavesWhole, None)],
    },
];

/// Either the drain waits for both, the one that leaves first and the one that leaves last, or
/// neither is let in and nothing stays behind of them.
fn batch_against_close() {
    let gate = Gate::new();
    let payload = Payload::new();
    let handle = gate.open_handle(None).expect("open");
    let caller = thread(1, 1, {
        let payload = payload.share();
        move || {
            if let Ok(mut guards) = handle.admit_many(2) {
                payload.used();
                guards.leave(1);
                payload.used();
            }
        }
    });
    gate.close();
    drained(gate);
    payload.ended();
    assert_eq!(handle.admit_many(2).err(), Some(HandleRefused::Revoked));
    caller.join().expect("caller");
    assert_eq!(handle.calls(), 0);
}

/// The same when the handle goes and its gate stays open.
fn batch_against_revoke() {
    let gate = Gate::new();
    let payload = Payload::new();
    let handle = gate.open_handle(None).expect("open");
    let caller = thread(1, 1, {
        let payload = payload.share();
        move || {
            if let Ok(mut guards) = handle.admit_many(2) {
                guards.leave(1);
                payload.used();
            }
        }
    });
    handle.revoke();
    handle.drain(None, &Cancel::new()).expect("drains");
    payload.ended();
    assert_eq!(handle.state(), HandleState::Revoked);
    assert_eq!(gate.state(), State::Open);
    caller.join().expect("caller");
}

/// What one thread let in and another took over keeps its handle from being drained until the
/// last of it has left.
fn joined_batches_leave_elsewhere() {
    let gate = Gate::new();
    let payload = Payload::new();
    let handle = gate.open_handle(None).expect("open");
    let mut guards = handle.admit_many(1).expect("live");
    let more = handle.admit_many(2).expect("live");
    let leaver = thread(1, 1, {
        let payload = payload.share();
        move || {
            guards.join(more).expect("of the same handle");
            guards.leave(2);
            payload.used();
            drop(guards);
        }
    });
    handle.revoke();
    handle.drain(None, &Cancel::new()).expect("drains");
    payload.ended();
    leaver.join().expect("leaver");
}
