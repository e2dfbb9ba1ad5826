//! Waiting until everything is out.

use std::time::Instant;

use crate::cancel::Cancel;
use crate::error::DrainError;
use crate::gate::{Gate, State};
use crate::sync::{Mutant, mutant};

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Guards: operations from admission to answer, by the gate itself and by all its handles.
    Operations,
    /// Crossings: calls into the module. They pass a closed gate (G9), so this says that none
    /// that began before the gate turned is left, not that none can begin: who wants that takes
    /// away what they begin with.
    Crossings,
    /// Both at one moment: operations first, then crossings.
    Both,
}

impl Gate {
    /// Waits until everything asked for is out (G2). Several threads may drain at once, and a
    /// drain that ended early may be called again (G5).
    ///
    /// A guard that was leaked with [`std::mem::forget`] counts as inside for ever: the drain
    /// ends by its deadline and says how many there are. A guard in the hands of the very thread
    /// that drains does the same; only crossings know their thread (G8).
    ///
    /// # Errors
    /// See [`DrainError`]. With nothing inside, a deadline that has passed is not an error.
    pub fn drain(&self, what: Drain, deadline: Option<Instant>, cancel: &Cancel) -> Result<(), DrainError> {
        let inside = || (self.operations(), self.crossings());
        self.wait_until_out(what, inside, || self.state() == State::Open, deadline, cancel)
    }

    /// The wait behind [`Gate::drain`] and [`Handle::drain`](crate::Handle::drain): `inside`
    /// answers operations and crossings, `open` whether newcomers are let in.
    pub(crate) fn wait_until_out(
        &self,
        what: Drain,
        inside: impl Fn() -> (u64, u64),
        open: impl Fn() -> bool,
        deadline: Option<Instant>,
        cancel: &Cancel,
    ) -> Result<(), DrainError> {
        if self.is_pinned() {
            return Err(DrainError::Pinned);
        }
        if self.in_crossing() {
            return Err(DrainError::InsideCrossing);
        }
        let event = &self.slot.event;
        let waiter = event.enroll();
        let _cancel = cancel.enroll(event);
        loop {
            // The count before the counters. Partner: a leaver counts out, then signals.
            let mut seen = waiter.count();
            if open() {
                return Err(DrainError::Open);
            }
            let (operations, crossings) = inside();
            if mutant(Mutant::CountLate) {
                seen = waiter.count();
            }
            let rest = match what {
                Drain::Operations => operations,
                Drain::Crossings => crossings,
                Drain::Both => operations | crossings,
            };
            if rest == 0 {
                return Ok(());
            }
            if cancel.is_cancelled() {
                return Err(DrainError::Cancelled { operations, crossings });
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(DrainError::Deadline { operations, crossings });
            }
            waiter.wait(seen, left);
        }
    }
}
