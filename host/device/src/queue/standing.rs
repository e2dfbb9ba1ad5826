//! A queue of posted buffers on its way to another process: buffers are with the device, and stay there.
//!
//! Every chain on it is one device-writable descriptor, so a chain is a head and a token; descriptors are not read back from memory that the device could have written to.
//! What the device has used and nobody has popped stays on the used ring, for whoever goes on.

use std::sync::Arc;

use super::{NO_CHAIN, Slot, SplitQueue};
use crate::dma::DmaRegion;
use crate::error::QueueError;
use crate::queue::QueueConfig;
use crate::ring::Ring;

/// Where a queue of posted buffers stands ([`SplitQueue::standing`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// `avail.idx`.
    pub available: u16,
    /// Next position of the used ring to read.
    pub used_next: u16,
    /// Head and token of each buffer that is with the device, or used and not popped.
    pub posted: Vec<(u16, u32)>,
}

impl SplitQueue {
    /// Where a queue stands on which there is nothing but published chains of one descriptor, as [`SplitQueue::add_buffer`] makes them. `None` of any other, and of a poisoned
    /// queue.
    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        if self.fault.is_some() || self.unpublished() > 0 {
            return None;
        }
        let live = || (0..).zip(&self.slots).filter(|(_, slot)| slot.sequence != NO_CHAIN);
        if live().any(|(_, slot)| slot.descriptors != 1 || slot.status_len != 0) {
            return None;
        }
        let posted = live().map(|(head, slot)| (head, slot.token)).collect();
        Some(Standing { available: self.published as u16, used_next: self.used_next, posted })
    }

    /// As [`SplitQueue::resume`], for a queue that stands as [`SplitQueue::standing`] told. `length` says how many bytes the buffer of a token has, if there is such a buffer.
    ///
    /// # Errors
    /// As [`SplitQueue::resume`], and [`QueueError::Standing`] for what cannot be.
    pub fn resume_posted(
        config: QueueConfig,
        region: Arc<DmaRegion>,
        offset: u64,
        standing: &Standing,
        length: impl Fn(u32) -> Option<u32>,
    ) -> Result<Self, QueueError> {
        let ring = Ring::there(config, region, offset)?;
        let Standing { available, used_next, ref posted } = *standing;
        let in_flight = available.wrapping_sub(used_next);
        if in_flight > config.size || usize::from(in_flight) != posted.len() {
            return Err(QueueError::Standing("not as many buffers are named as are posted"));
        }
        let (now, used) = (ring.available_index(), ring.used_index());
        // The device goes on meanwhile, but no further than it was given.
        if now != available || used.wrapping_sub(used_next) > in_flight {
            return Err(QueueError::Moved { available: now, used, expected: available });
        }
        let mut queue = Self::at(config, ring, available);
        // Every chain that is there was published before any that will be.
        queue.added += 1 << 16;
        queue.published = queue.added;
        (queue.used_next, queue.used_seen) = (used_next, used_next);
        for (head, token) in posted {
            let offered = length(*token).ok_or(QueueError::Standing("a buffer is named that there is not"))?;
            let slot = queue.slots.get_mut(usize::from(*head)).filter(|slot| slot.sequence == NO_CHAIN);
            let slot = slot.ok_or(QueueError::Standing("a descriptor is named twice, or does not exist"))?;
            let area = slot.area;
            *slot = Slot { sequence: 0, token: *token, offered, tail: *head, descriptors: 1, ..Slot::new(area) };
        }
        let free: Vec<u16> =
            (0..config.size).filter(|head| queue.slots[usize::from(*head)].sequence == NO_CHAIN).collect();
        for pair in free.windows(2) {
            queue.next[usize::from(pair[0])] = pair[1];
        }
        queue.free_head = free.first().copied().unwrap_or(0);
        queue.free = config.size - in_flight;
        queue.in_flight = in_flight;
        Ok(queue)
    }
}
