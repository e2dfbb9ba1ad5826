//! Ending a drain from another thread.

use std::sync::Arc;

use crate::event::Event;
use crate::sync::atomic::{AtomicBool, Ordering::SeqCst};
use crate::sync::{Mutant, Mutex, lock, mutant};

/// A switch that ends the drains it was given to (G5). Clones share the switch, which stays
/// thrown for good.
#[derive(Clone, Debug)]
pub struct Cancel {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    /// What the drains that use this switch sleep on. Bounded by the threads in `drain`.
    events: Mutex<Vec<&'static Event>>,
}

impl Cancel {
    /// A switch that was not thrown.
    #[must_use]
    pub fn new() -> Cancel {
        Cancel { inner: Arc::new(Inner { cancelled: AtomicBool::new(false), events: Mutex::new(Vec::new()) }) }
    }

    /// Throws the switch and wakes every drain that waits with it. Idempotent.
    pub fn cancel(&self) {
        if !mutant(Mutant::CancelLate) {
            self.inner.cancelled.store(true, SeqCst);
        }
        // Partner: `Gate::drain` enrols and then looks at the flag. One that enrols after this
        // loop sees the flag, through the lock.
        for event in lock(&self.inner.events).iter() {
            event.signal();
        }
        self.inner.cancelled.store(true, SeqCst);
    }

    /// Whether the switch was thrown.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.inner.cancelled.load(SeqCst)
    }

    /// Has `event` signalled by `cancel` until the result is dropped.
    pub(crate) fn enroll(&self, event: &'static Event) -> Enrolled<'_> {
        lock(&self.inner.events).push(event);
        Enrolled { cancel: self, event }
    }
}

impl Default for Cancel {
    fn default() -> Cancel {
        Cancel::new()
    }
}

/// A drain that a switch knows about.
pub(crate) struct Enrolled<'a> {
    cancel: &'a Cancel,
    event: &'static Event,
}

impl Drop for Enrolled<'_> {
    fn drop(&mut self) {
        let mut events = lock(&self.cancel.inner.events);
        // Several drains of one gate may share a switch: any one of their entries will do.
        if let Some(at) = events.iter().position(|event| std::ptr::eq(*event, self.event)) {
            events.swap_remove(at);
        }
    }
}
