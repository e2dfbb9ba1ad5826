//! The event count that sleepers of this crate wait on: a futex.

use std::time::Duration;

use crate::sync::atomic::{AtomicU32, Ordering::SeqCst};
use crate::sync::load_sc;

/// Waiters enrol, read the count, look at their condition, and sleep only while the count stands
/// still.
#[derive(Debug)]
pub(crate) struct Event {
    count: AtomicU32,
    waiters: AtomicU32,
    #[cfg(loom)]
    kernel: crate::model::Kernel,
}

impl Event {
    pub(crate) fn new() -> Event {
        Event {
            count: AtomicU32::new(0),
            waiters: AtomicU32::new(0),
            #[cfg(loom)]
            kernel: crate::model::Kernel::default(),
        }
    }

    /// Wakes everybody. Never blocks.
    #[inline]
    pub(crate) fn signal(&self) {
        // Partner: `enroll`, then `Enrolled::count`. Either this sees the waiter, or the waiter
        // sees the new count and does not sleep.
        self.count.fetch_add(1, SeqCst);
        if load_sc(&self.waiters) > 0 {
            self.wake();
        }
    }

    /// Announces a waiter until the result is dropped.
    pub(crate) fn enroll(&self) -> Enrolled<'_> {
        self.waiters.fetch_add(1, SeqCst);
        Enrolled(self)
    }

    #[cold]
    #[cfg(not(loom))]
    fn wake(&self) {
        use rustix::thread::futex::{Flags, wake};
        // It can only fail for an address that is not mapped.
        let _ = wake(&self.count, Flags::PRIVATE, i32::MAX as u32);
    }

    #[cfg(loom)]
    fn wake(&self) {
        self.kernel.wake();
    }
}

/// A waiter that was announced.
pub(crate) struct Enrolled<'a>(&'a Event);

impl Enrolled<'_> {
    /// The count, to be read before the condition.
    pub(crate) fn count(&self) -> u32 {
        load_sc(&self.0.count)
    }

    /// Sleeps while the count is `seen`, at most `timeout`. May return early.
    #[cfg(not(loom))]
    pub(crate) fn wait(&self, seen: u32, timeout: Option<Duration>) {
        use rustix::thread::futex::{Flags, Timespec, wait};
        // A timeout beyond what the kernel can express is none.
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        // Interrupted, timed out, or the count moved: the caller looks again in each case.
        let _ = wait(&self.0.count, Flags::PRIVATE, seen, timeout.as_ref());
    }

    #[cfg(loom)]
    pub(crate) fn wait(&self, seen: u32, _: Option<Duration>) {
        self.0.kernel.wait(|| load_sc(&self.0.count) == seen);
    }
}

impl Drop for Enrolled<'_> {
    fn drop(&mut self) {
        self.0.waiters.fetch_sub(1, SeqCst);
    }
}
