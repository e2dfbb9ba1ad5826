//! Waits made inside an admitted call: closing and revoking wake them.

use std::sync::Arc;
use std::time::Instant;

use crate::gate::{Gate, State};
use crate::handle::Live;
use crate::notify::Notify;
use crate::slot::Sleeping;
use crate::sync::{Mutant, lock, mutant};

/// Why a wait inside an admitted call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The notify counted on, or its source hung up.
    Signalled,
    /// The gate was closed or the handle revoked: finish with an error, soon.
    Revoked,
    /// The deadline passed.
    TimedOut,
}

pub(crate) fn sleep(
    gate: Gate,
    live: Option<Live>,
    notify: &Arc<Notify>,
    seen: u64,
    deadline: Option<Instant>,
) -> Woken {
    let revoked = || gate.state() == State::Closed || live.is_some_and(|live| !live.is_live());
    let early = mutant(Mutant::SleeperLooksEarly).then(&revoked);
    let _registered = Registered::new(gate, live, notify);
    let waiter = notify.enroll();
    loop {
        let count = waiter.count();
        // After registering. Partner: close and revoke change the word, then walk the list.
        if early.unwrap_or_else(&revoked) {
            return Woken::Revoked;
        }
        if notify.count() != seen || notify.is_hung_up() {
            // The signal may be that of the closer, who changed the word before.
            return if revoked() { Woken::Revoked } else { Woken::Signalled };
        }
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Woken::TimedOut;
        }
        waiter.wait(count, left);
    }
}

/// A wait that closers know about.
struct Registered<'a> {
    gate: Gate,
    live: Option<Live>,
    notify: &'a Arc<Notify>,
}

impl<'a> Registered<'a> {
    fn new(gate: Gate, live: Option<Live>, notify: &'a Arc<Notify>) -> Registered<'a> {
        lock(&gate.slot.lists).sleepers.push(Sleeping { live, notify: Arc::clone(notify) });
        Registered { gate, live, notify }
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        let sleepers = &mut lock(&self.gate.slot.lists).sleepers;
        let own = |sleeping: &Sleeping| sleeping.live == self.live && Arc::ptr_eq(&sleeping.notify, self.notify);
        // Equal registrations are interchangeable.
        if let Some(at) = sleepers.iter().position(own) {
            sleepers.swap_remove(at);
        }
    }
}
