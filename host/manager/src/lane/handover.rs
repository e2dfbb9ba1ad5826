//! A lane on its way to another process: no request is in it, so that the queue for those is two numbers and two descriptors. The buffers of a posted queue stay where they are, most of them with the device.

use std::os::fd::{BorrowedFd, OwnedFd};

use cofferdam_device::{Doorbell, QueueAddresses, QueueConfig, SplitQueue, Standing};
use serde::{Deserialize, Serialize};

use super::Lane;
use super::exchange::Vacant;
use super::posted::ShownState;

/// Which queue a ring is of, and where it lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RingState {
    /// Queue index at the device.
    index: u16,
    /// Entries.
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// I/O addresses of descriptor table, available ring and used ring.
    addresses: [u64; 3],
}

impl RingState {
    pub(crate) fn of(ring: &SplitQueue) -> RingState {
        let (QueueConfig { index, size, event_idx, indirect }, at) = (ring.config(), ring.addresses());
        RingState { index, size, event_idx, indirect, addresses: [at.descriptors, at.available, at.used] }
    }

    /// How the queue is said to be.
    pub(crate) fn config(&self) -> QueueConfig {
        let RingState { index, size, event_idx, indirect, .. } = *self;
        QueueConfig { index, size, event_idx, indirect }
    }

    /// Where it is said to lie.
    pub(crate) fn addresses(&self) -> QueueAddresses {
        let [descriptors, available, used] = self.addresses;
        QueueAddresses { descriptors, available, used }
    }
}

/// A queue on which nothing is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EmptyState {
    pub(crate) ring: RingState,
    /// Where it stands ([`SplitQueue::position`]).
    pub(crate) position: u16,
}

impl EmptyState {
    pub(crate) fn of(ring: &SplitQueue) -> Result<EmptyState, String> {
        let position = ring.position().ok_or("a ring is not empty, or the device broke it")?;
        Ok(EmptyState { ring: RingState::of(ring), position })
    }
}

/// A queue of posted buffers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PostedState {
    pub(crate) ring: RingState,
    /// Where it stands ([`SplitQueue::standing`]).
    available: u16,
    used_next: u16,
    posted: Vec<(u16, u32)>,
    /// I/O address of each buffer.
    pub(crate) places: Vec<u64>,
}

impl PostedState {
    pub(crate) fn of(ring: &SplitQueue, places: impl Iterator<Item = u64>) -> Result<PostedState, String> {
        let Standing { available, used_next, posted } = ring.standing().ok_or("the device broke a ring")?;
        Ok(PostedState { ring: RingState::of(ring), available, used_next, posted, places: places.collect() })
    }

    pub(crate) fn standing(&self) -> Standing {
        Standing { available: self.available, used_next: self.used_next, posted: self.posted.clone() }
    }

    /// The buffers that are with the device, or used and not looked at.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = u32> + '_ {
        self.posted.iter().map(|(_, token)| *token)
    }
}

/// Where a lane's queues are and stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LaneState {
    pub(crate) requests: EmptyState,
    /// The one that it keeps filled, and what of it is to be shown to a driver again.
    pub(crate) posted: Option<(PostedState, Vec<ShownState>)>,
}

/// Duplicates of a queue's doorbell and call descriptor.
pub(crate) fn channels(doorbell: &dyn Doorbell, call: BorrowedFd<'_>) -> Result<[OwnedFd; 2], String> {
    // A doorbell that is a register is the transport's to find again; what stands in its place says nothing.
    let kick = doorbell.descriptor().unwrap_or(call);
    let copied = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| format!("dup: {error}"));
    Ok([copied(kick)?, copied(call)?])
}

impl Lane {
    /// The rings are this process's: nothing came of an export, or what was adopted serves.
    pub(crate) fn keep(&self) {
        if std::mem::take(&mut self.lease().handed_over) {
            // Whoever takes what arrives may have looked meanwhile, and was not told.
            self.wake_receiver();
        }
    }
}

impl Vacant<'_> {
    /// Whether no request is in the lane: neither with the driver, nor on the ring, nor waiting for either.
    pub(crate) fn is_empty(&self) -> bool {
        let inside = &self.0;
        let nothing_waits = inside.parked.is_empty() && inside.unjudged.is_empty() && inside.aside.is_empty();
        let on_ring = inside.ring.as_ref().map_or(0, |ring| ring.in_flight());
        inside.ledger.len() == 0 && nothing_waits && on_ring == 0
    }

    /// The state of an empty lane, and of each of its queues the doorbell and the call descriptor. From here on nobody in this process touches rings or descriptors, also not to look, and
    /// requests are held, until [`Lane::keep`].
    pub(crate) fn export(&mut self, lane: &Lane) -> Result<(LaneState, Vec<OwnedFd>), String> {
        let (ring, bell) = self.0.ring.as_ref().zip(self.0.doorbell.as_ref()).ok_or("its rings are gone")?;
        let requests = EmptyState::of(ring)?;
        let mut descriptors = Vec::from(channels(bell.as_ref(), lane.device_fd())?);
        let posted = match self.0.posted.as_ref().zip(lane.posted_fd()) {
            None => None,
            Some((posted, call)) => {
                let (state, shown, channels) = posted.export(call)?;
                descriptors.extend(channels);
                Some((state, shown))
            }
        };
        self.0.handed_over = true;
        Ok((LaneState { requests, posted }, descriptors))
    }
}
