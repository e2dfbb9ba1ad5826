//! When the device tells the host that chains are used, and when the host would tell the device. The table in [`super`] has the order of both.

use std::sync::atomic::{Ordering, fence};

use super::SplitQueue;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the host wants no used buffer notification.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Whether moving an index from `old` to `new` passes `event`: the specification's `vring_need_event` (section 2.7.10.1), right across the wrap at 2^16.
#[must_use]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl SplitQueue {
    /// Asks the device to notify the host of the next used chain. True: something is there already (or the queue is poisoned), so `pop` before sleeping.
    #[must_use = "sleeping while something is there waits for ever"]
    pub fn arm(&mut self) -> bool {
        self.arm_after(1)
    }

    /// As [`SplitQueue::arm`], but for the `count`th used chain from here, to gather completions. `count` is cut to 1 to what is published, so that the device
    /// always gets there. Without `VIRTIO_RING_F_EVENT_IDX` it is the same as `arm`.
    #[must_use = "sleeping while something is there waits for ever"]
    pub fn arm_after(&mut self, count: u16) -> bool {
        if self.fault.is_some() {
            return true;
        }
        if self.config.event_idx {
            let count = count.min(self.in_flight - self.unpublished()).max(1);
            self.armed_at = self.used_next.wrapping_add(count - 1);
            self.ring.store_used_event(self.armed_at);
        } else {
            self.ring.store_available_flags(0);
        }
        self.armed = true;
        // Pairs with the device's fence between its store of `used.idx` and its load of `used_event` (or `avail.flags`); see the table above.
        fence(Ordering::SeqCst);
        self.ring.used_index() != self.used_next
    }

    /// Asks the device to notify the host of the used chain after the last one that was popped, without a look whether it is there already: then no notification comes, so
    /// this is not for one who is going to sleep, but for a poller that keeps the device's own loop awake. Cheap when that is what is armed, and needs no fence: the poller
    /// finds the chain whether or not it is notified.
    #[inline]
    pub fn arm_next(&mut self) {
        if self.armed && (self.armed_at == self.used_next || !self.config.event_idx) {
            return;
        }
        self.armed = true;
        if self.config.event_idx {
            self.armed_at = self.used_next;
            self.ring.store_used_event(self.used_next);
        } else {
            self.ring.store_available_flags(0);
        }
    }

    /// Tells the device that no notification is wanted while the host polls. A hint: one may come all the same, and with
    /// `VIRTIO_RING_F_EVENT_IDX` one in 65,536 chains does. Cheap when nothing is armed. Needs no fence: a late notification is only superfluous.
    pub fn disarm(&mut self) {
        if !self.armed {
            return;
        }
        self.armed = false;
        if self.config.event_idx {
            // Behind the index: passed again only after a whole turn.
            self.ring.store_used_event(self.used_next.wrapping_sub(1));
        } else {
            self.ring.store_available_flags(AVAIL_NO_INTERRUPT);
        }
    }
}
