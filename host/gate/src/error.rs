//! What can be answered instead of success.

/// Why [`Gate::admit`](crate::Gate::admit) turned an operation away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The gate is held for a moment. Register with
    /// [`Gate::register_held`](crate::Gate::register_held), stop reading new requests, and try
    /// again in order when woken.
    #[error("the gate is held; try again when woken")]
    Held,
    /// The gate is closed for good (or belongs to an older generation). Nothing was counted.
    #[error("the gate is closed for good")]
    Closed,
}

/// Why [`Handle::admit`](crate::Handle::admit) turned a call away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandleRefused {
    /// The gate is held for a moment; as [`Refused::Held`].
    #[error("the gate is held; try again when woken")]
    Held,
    /// The handle was revoked or closed, or its gate was closed. It will never work again.
    #[error("the handle was revoked")]
    Revoked,
}

/// Why [`Gate::open_handle`](crate::Gate::open_handle) opened none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    /// The gate is closed for good.
    #[error("the gate is closed for good")]
    Closed,
    /// All places are taken, by live handles or by calls of revoked ones.
    #[error("the gate has all its {capacity} handles")]
    Full {
        /// The bound in force.
        capacity: u32,
    },
}

/// Why [`Gate::hold_for`](crate::Gate::hold_for) did not hold the gate, or
/// [`Hold::open`](crate::Hold::open) found it no longer held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HoldError {
    /// Somebody else holds the gate.
    #[error("the gate is held already")]
    Held,
    /// The gate is closed for good.
    #[error("the gate is closed for good")]
    Closed,
    /// The hold outlived its bound: the gate was opened or closed as was asked for that case,
    /// and what the hold protected may have been entered again.
    #[error("the hold outlived its bound")]
    Expired,
    /// The thread that ends overdue holds could not be started.
    #[error("no thread to end the hold in time")]
    NoTimer,
}

/// Why a drain returned before everything was out. It can always be called again (G5).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DrainError {
    /// The deadline passed.
    #[error("deadline passed with {operations} operations and {crossings} crossings still inside")]
    Deadline {
        /// Guards admitted and not yet dropped.
        operations: u64,
        /// Crossings begun and not yet ended.
        crossings: u64,
    },
    /// Somebody cancelled the wait.
    #[error("cancelled with {operations} operations and {crossings} crossings still inside")]
    Cancelled {
        /// Guards admitted and not yet dropped.
        operations: u64,
        /// Crossings begun and not yet ended.
        crossings: u64,
    },
    /// The caller is inside a crossing of this very gate and would wait for itself (G8). Leave
    /// the crossing first, or drain from another thread.
    #[error("this thread is inside a crossing of the gate that it wants to drain")]
    InsideCrossing,
    /// The gate is open (or was opened during the wait), so the count has no reason to reach
    /// zero. Hold, close or revoke first.
    #[error("the gate is open; hold or close it before draining")]
    Open,
    /// The gate is pinned: nothing was counted, so nothing can be proved.
    #[error("the gate is pinned and counts nothing")]
    Pinned,
}
