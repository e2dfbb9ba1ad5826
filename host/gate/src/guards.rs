//! What a batch of admissions is held by: one look and one count for all of it.
//!
//! ```
//! use cofferdam_gate::Gate;
//!
//! let gate = Gate::new();
//! let handle = gate.open_handle(None)?;
//! let mut guards = handle.admit_many(8)?; // all eight or none
//! guards.leave(5); // five are answered
//! assert_eq!((guards.count(), handle.calls()), (3, 3));
//! guards.join(handle.admit_many(2)?).expect("of the same handle");
//! drop(guards); // and so are the other five
//! assert_eq!(handle.calls(), 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::count::{By, LEFT};
use crate::gate::Gate;
use crate::handle::Handle;
use crate::holders::Tag;
use crate::sync::{Mutant, mutant};

/// The most operations that one [`Handle::admit_many`] lets in: those of the largest virtqueue
/// (virtio 1.2, 2.7).
///
/// The counters are 64 bits wide and are compared modulo 2^64, so that a sum which wraps does no
/// harm; 2^64 operations *inside at once* would look like none. Each of at most 2^15 needs a
/// [`Guards`] that is alive, which 2^49 are in no machine's memory, or one that was leaked, which
/// takes a core more than a week of nothing else; without the bound it would take seconds.
pub const MAX_BATCH: u32 = 1 << 15;

/// Several admitted operations of one handle. May be stored, and sent to and dropped on any thread
/// or core (G3); each counts as inside until [`leave`](Guards::leave) or the drop.
///
/// Leaking it is safe, as with a [`Guard`](crate::Guard): what was inside counts for ever.
#[derive(Debug)]
#[must_use = "dropping the guards ends the operations"]
pub struct Guards {
    /// By value: with nothing inside any more, its place and its slot may be another's.
    handle: Handle,
    /// Still inside. Zero touches nothing.
    count: u32,
    tag: Tag,
}

impl Guards {
    /// Of `count` operations that were counted in.
    #[inline(always)]
    #[cfg_attr(feature = "trace-holders", track_caller)]
    pub(crate) fn new(handle: Handle, count: u32) -> Guards {
        Guards { handle, count, tag: handle.gate().slot.holders.enter(count) }
    }

    /// Operations that are still inside.
    #[inline]
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The gate that admitted them.
    #[must_use]
    pub fn gate(&self) -> Gate {
        self.handle.gate()
    }

    /// The handle that they came by.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle
    }

    /// `count` operations are answered: counts them out at once, and wakes who drains if gate or
    /// handle is turned. No more than are inside; zero does nothing.
    #[inline]
    pub fn leave(&mut self, count: u32) {
        let leaving = count.min(self.count);
        if leaving == 0 {
            return;
        }
        self.count -= leaving;
        let slot = self.handle.gate().slot;
        // Before the count: after it, the gate may be anybody's.
        slot.holders.leave(&self.tag, leaving);
        let counted = if mutant(Mutant::BatchLeavesWhole) { leaving + self.count } else { leaving };
        slot.leave::<LEFT>(Some(self.handle.entry()), By::Many(counted));
    }

    /// Takes over the operations of `other`. Counts nothing: they stay inside.
    ///
    /// # Errors
    /// `other` itself, when it came by another handle (or one that had the same place before),
    /// or when both together are more than a `u32` counts.
    #[inline]
    pub fn join(&mut self, mut other: Guards) -> Result<(), Guards> {
        match self.count.checked_add(other.count) {
            Some(count) if self.handle == other.handle => {
                self.handle.gate().slot.holders.join(&mut self.tag, &other.tag);
                self.count = count;
                other.count = 0;
                Ok(())
            }
            _ => Err(other),
        }
    }
}

impl Drop for Guards {
    #[inline]
    fn drop(&mut self) {
        self.leave(self.count);
    }
}
