//! An event count on an eventfd: signalling takes no lock and never blocks.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::event::{Enrolled, Event};
use crate::eventfd::Eventfd;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use crate::sync::{Mutant, mutant};

/// Set in the count when the source hung up.
const HUNG_UP: u64 = 1 << 63;

/// Something that a client polls or sleeps on.
///
/// The discipline is: [`clear`](Notify::clear), look at the condition, and only then sleep on
/// the [`fd`](Notify::fd) or in [`wait`](Notify::wait). Signals are not queued: many may come
/// as one wake-up.
#[derive(Debug)]
pub struct Notify {
    count: AtomicU64,
    /// The descriptor is readable or about to be: signalling again costs no system call.
    raised: AtomicBool,
    fd: Eventfd,
    /// For waits that look at the count and leave the descriptor alone.
    event: Event,
}

impl Notify {
    /// A new event count.
    ///
    /// # Errors
    /// When the process or the machine is out of descriptors.
    pub fn new() -> io::Result<Arc<Notify>> {
        Ok(Arc::new(Notify {
            count: AtomicU64::new(0),
            raised: AtomicBool::new(false),
            fd: Eventfd::new()?,
            event: Event::new(),
        }))
    }

    /// Counts one event and makes the descriptor readable. No lock, never blocks; a system call
    /// only when somebody sleeps or the descriptor was not readable yet.
    pub fn signal(&self) {
        self.count.fetch_add(1, SeqCst);
        self.event.signal();
        // Partner: `clear` empties the descriptor, then takes the raise back. A signal that
        // still finds the raise came before that, and the clearer looks at its condition later.
        if !self.raised.swap(true, SeqCst) {
            self.fd.raise();
        }
    }

    /// The descriptor: readable after a signal until [`clear`](Notify::clear), and for ever
    /// after a hang-up. Do not read it.
    #[cfg(not(loom))]
    #[must_use]
    pub fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.borrow()
    }

    /// Makes the descriptor unreadable, unless the source hung up. Look at the condition
    /// *afterwards*: a signal that came before does not end the next sleep.
    pub fn clear(&self) {
        if mutant(Mutant::ClearEarly) {
            self.raised.swap(false, SeqCst);
            self.fd.empty();
        } else {
            self.fd.empty();
            // A read-modify-write: it orders what follows behind every signal whose raise it
            // takes back.
            self.raised.swap(false, SeqCst);
        }
        // Partner: `hang_up` sets the bit, then raises. If that raise was emptied above, the bit
        // is seen here.
        if self.is_hung_up() && !mutant(Mutant::ClearHangUp) {
            self.fd.raise();
        }
    }

    /// Events so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(SeqCst) & !HUNG_UP
    }

    /// Nothing more will come: the descriptor is readable for ever. Idempotent.
    pub fn hang_up(&self) {
        self.count.fetch_or(HUNG_UP, SeqCst);
        self.event.signal();
        self.fd.raise();
    }

    /// Whether the source hung up.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        self.count.load(SeqCst) & HUNG_UP != 0
    }

    /// Sleeps until the descriptor is readable, and does not clear it. `None` waits without
    /// bound. Answers whether it is readable.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.fd.wait(timeout)
    }

    /// Sleeps until more than `seen` events were counted or the source hung up, whatever the
    /// descriptor says: for several sleepers on one notify. Answers false at the deadline.
    pub fn wait_past(&self, seen: u64, deadline: Option<Instant>) -> bool {
        let waiter = self.event.enroll();
        loop {
            let count = waiter.count();
            if self.count() > seen || self.is_hung_up() {
                return true;
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            waiter.wait(count, left);
        }
    }

    pub(crate) fn enroll(&self) -> Enrolled<'_> {
        self.event.enroll()
    }
}
