//! Available buffer notifications: the queue's index, written to the queue's notification address (virtio 1.2, sections 4.1.4.4 and 4.1.5.2).
//!
//! ```text
//! WAITING -> RINGING -> SILENT      start; lost, or asked to be silent
//! ```
//!
//! The transport owns the bell and with it the mapping of the BAR; who rings has a weak reference, so the mapping goes when the transport lets go of it.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Weak};

use cofferdam_device::{Doorbell, Width};

use super::part::Part;

/// Not started: a device is not to be notified before DRIVER_OK (section 3.1.1).
const WAITING: u8 = 0;
const RINGING: u8 = 1;
const SILENT: u8 = 2;

/// One queue's.
pub(super) struct Bell {
    notify: Part,
    offset: u64,
    queue: u16,
    state: AtomicU8,
    /// Rung while it was waiting.
    early: AtomicBool,
}

impl Bell {
    /// `offset` in `notify` was checked.
    pub(super) fn new(notify: Part, offset: u64, queue: u16) -> Arc<Self> {
        let (state, early) = (AtomicU8::new(WAITING), AtomicBool::new(false));
        Arc::new(Self { notify, offset, queue, state, early })
    }

    /// Where it is rung.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// What the queue's owner is given.
    pub(super) fn handle(self: &Arc<Self>) -> Box<dyn Doorbell> {
        Box::new(Handle(Arc::downgrade(self)))
    }

    /// The device has started. What was rung before reaches it now.
    pub(super) fn start(&self) {
        // SeqCst here and in `ring`: of the two, which each write one word and then read the other's, at least one sees the other.
        self.state.store(RINGING, Ordering::SeqCst);
        if self.early.load(Ordering::SeqCst) {
            self.write();
        }
    }

    /// From here on it does nothing; a ring that has begun may still be on its way.
    pub(super) fn silence(&self) {
        self.state.store(SILENT, Ordering::SeqCst);
    }

    fn ring(&self) {
        match self.state.load(Ordering::SeqCst) {
            RINGING => self.write(),
            WAITING => {
                self.early.store(true, Ordering::SeqCst);
                if self.state.load(Ordering::SeqCst) == RINGING {
                    self.write();
                }
            }
            _ => {}
        }
    }

    /// The write is posted: nothing waits for the device, and one that is gone drops it.
    fn write(&self) {
        let _ = self.notify.write(self.offset, Width::U16, u64::from(self.queue));
    }
}

struct Handle(Weak<Bell>);

impl Doorbell for Handle {
    fn ring(&self) {
        if let Some(bell) = self.0.upgrade() {
            bell.ring();
        }
    }
}
