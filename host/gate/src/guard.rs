//! What an admission and a crossing are held by.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

use crate::cells::Column;
use crate::count::{By, LEFT};
use crate::gate::Gate;
use crate::handle::Entry;
use crate::holders::Tag;
use crate::inside;
use crate::notify::Notify;
use crate::sleep::{self, Woken};
use crate::slot::Slot;

/// One admitted operation. May be stored in a request, sent to and dropped on any thread or core
/// (G3); dropping it counts the operation as answered.
///
/// Leaking one (`std::mem::forget`) is safe: it counts as inside for ever, which a drain reports.
#[derive(Debug)]
#[must_use = "dropping the guard ends the operation"]
pub struct Guard {
    slot: &'static Slot,
    /// The handle it came by. Two words in all: requests carry one of these each.
    entry: Option<&'static Entry>,
    tag: Tag,
}

impl Guard {
    #[inline(always)]
    #[cfg_attr(feature = "trace-holders", track_caller)]
    pub(crate) fn new(slot: &'static Slot, entry: Option<&'static Entry>) -> Guard {
        Guard { slot, entry, tag: slot.holders.enter(1) }
    }

    /// The gate that admitted this operation.
    #[must_use]
    pub fn gate(&self) -> Gate {
        self.slot.gate()
    }

    /// Waits inside the operation until `notify` has counted more than `seen`, and no longer
    /// than the gate is not closed and the handle (if it came by one) not revoked.
    #[must_use]
    pub fn sleep(&self, notify: &Arc<Notify>, seen: u64, deadline: Option<Instant>) -> Woken {
        sleep::sleep(self.gate(), self.entry.map(Entry::live), notify, seen, deadline)
    }
}

impl Drop for Guard {
    #[inline]
    fn drop(&mut self) {
        // Before the count: after it, the gate may be anybody's.
        self.slot.holders.leave(&self.tag, 1);
        self.slot.leave::<LEFT>(self.entry, By::One);
    }
}

/// One call from the host into the guarded module. Stays on its thread, which remembers that it
/// is inside (G8).
#[derive(Debug)]
#[must_use = "dropping the crossing ends it"]
pub struct Crossing {
    gate: Gate,
    stays: PhantomData<*const ()>,
}

impl Crossing {
    #[inline]
    pub(crate) fn new(gate: Gate) -> Crossing {
        inside::enter(gate.key());
        gate.count::<{ Column::In as usize }>();
        Crossing { gate, stays: PhantomData }
    }

    /// Waits inside the crossing (a host call made for a guest) until `notify` has counted more
    /// than `seen`, and no longer than the gate is not closed.
    #[must_use]
    pub fn sleep(&self, notify: &Arc<Notify>, seen: u64, deadline: Option<Instant>) -> Woken {
        sleep::sleep(self.gate, None, notify, seen, deadline)
    }
}

impl Drop for Crossing {
    #[inline]
    fn drop(&mut self) {
        inside::leave(self.gate.key());
        self.gate.slot.leave::<{ Column::Out as usize }>(None, By::One);
    }
}
