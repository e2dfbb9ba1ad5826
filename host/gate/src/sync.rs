//! The one place that chooses between the standard library's primitives and loom's, and where
//! the mutants of the model-checked build are named.

#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

/// Locks, and goes on after a panic elsewhere: every value behind a lock of this crate is
/// consistent between statements, so a poisoned lock carries no broken invariant.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Reads what a partner reads and writes in the other order, where one of the two must see the
/// other (sequential consistency). Loom knows no sequentially consistent loads, so its build
/// reads with a read-modify-write.
pub(crate) fn load_sc(word: &atomic::AtomicU32) -> u32 {
    #[cfg(loom)]
    return word.fetch_add(0, atomic::Ordering::SeqCst);
    #[cfg(not(loom))]
    word.load(atomic::Ordering::SeqCst)
}

/// A deliberate mistake. The model-checked build can be run with one of them made, and a test
/// expects each to be found; in every other build [`mutant`] is the constant `false`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[cfg_attr(not(loom), allow(dead_code, unreachable_pub, reason = "for the model-checked build"))]
pub enum Mutant {
    /// Close, hold and revoke change the word and go on without a barrier.
    NoBarrier = 1,
    /// The barrier orders memory but does not restart sections (the plain flavour).
    NoRestart,
    /// Look at the state first and count afterwards.
    LookBeforeCount,
    /// Read `entered` before `left`.
    EnteredFirst,
    /// Read both counters core by core, as one signed counter per core would be.
    CoreByCore,
    /// Count out without release.
    LeaveRelaxed,
    /// A leaver that finds the gate not open wakes nobody.
    LeaveSilently,
    /// A refused entrant backs out and wakes nobody.
    RefuseSilently,
    /// The drainer reads the event count after the counters.
    CountLate,
    /// `register_held` does not look at the state after it registered.
    RegisterBlindly,
    /// `open` does not look whether the gate was closed meanwhile.
    OpenBlindly,
    /// A call by handle looks at the handle outside of the section, before it counts.
    HandleLookedAtEarly,
    /// A leaving call by handle looks only at the gate.
    HandleLeaveLooksAtGateOnly,
    /// The index of a handle is given out again while its calls are still inside.
    ReuseEarly,
    /// A sleeper looks whether it was revoked before it registers.
    SleeperLooksEarly,
    /// `cancel` sets its flag after it woke the drains.
    CancelLate,
    /// `clear` forgets the raise before it empties the descriptor.
    ClearEarly,
    /// `clear` does not look for a hang-up.
    ClearHangUp,
    /// Retiring sets the counters back to zero.
    RetireResets,
    /// Retiring has no barrier between revoking the handles and opening the slot again.
    RetireBlindly,
    /// The end of a hold's bound does not look whose hold it ends.
    ExpireBlindly,
    /// A batch is let in and counted as one operation.
    BatchCountsOne,
    /// A batch that is refused after it was counted takes back one operation.
    BatchBacksOutOne,
    /// The first that leaves a batch counts all of it out.
    BatchLeavesWhole,
}

#[cfg(not(loom))]
#[inline(always)]
pub(crate) const fn mutant(_: Mutant) -> bool {
    false
}
#[cfg(loom)]
pub(crate) use crate::model::mutant;
