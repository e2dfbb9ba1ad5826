//! From a driver's plan to rings: where they lie, what they are told to the device, and what the posted ones are filled with.

use std::os::fd::AsFd;
use std::sync::Arc;

use cofferdam_device::queue::{QueueConfig, SplitQueue};
use cofferdam_device::transport::{QueueEvents, QueueSetup, Transport};
use cofferdam_device::{Buffer, DmaArena, DmaRegion, TransportError};
use cofferdam_runtime::{Attachment, Posting, QueueOwner, QueuePlan};

use crate::control::ControlQueues;
use crate::device::{F_EVENT_IDX, F_INDIRECT_DESC, host_features};
use crate::lane::LaneQueue;
use crate::lane::posted::Posted;
use crate::residue::Marks;

/// Memory that is scattered is so in pages of at least this size (huge pages of x86-64 and of most others).
const RUN_BYTES: u64 = 2 << 20;

/// Where each ring lies.
pub(crate) struct Layout {
    places: Vec<u64>,
    /// Bytes of all of them.
    pub(crate) bytes: u64,
    event_idx: bool,
    indirect: bool,
}

/// The queues of one data lane, set up.
pub(crate) struct SetQueues {
    /// Their indices, in the order of the plan.
    pub(crate) indices: Vec<u16>,
    pub(crate) requests: LaneQueue,
    pub(crate) posted: Option<(Posted, std::os::fd::OwnedFd)>,
}

/// Every queue of a plan, set up.
pub(crate) struct Queues {
    /// By the number of their lane.
    pub(crate) sets: Vec<SetQueues>,
    pub(crate) control: Option<ControlQueues>,
}

/// Why a plan came to nothing.
pub(crate) enum QueuesError {
    /// The plan itself, or the memory that it needs.
    Plan(String),
    /// The device.
    Device(TransportError),
}

impl Layout {
    /// Rings one behind the other, none over the end of a page.
    pub(crate) fn new(attachment: &Attachment, offered: u64) -> Layout {
        let ring_features = host_features(offered);
        let (event_idx, indirect) = (ring_features & F_EVENT_IDX != 0, ring_features & F_INDIRECT_DESC != 0);
        let mut bytes = 0;
        let mut places = Vec::with_capacity(attachment.queues.len());
        for queue in &attachment.queues {
            let ring = SplitQueue::bytes(queue.size, indirect).next_multiple_of(4096);
            if bytes % RUN_BYTES + ring > RUN_BYTES {
                bytes = bytes.next_multiple_of(RUN_BYTES);
            }
            places.push(bytes);
            bytes += ring;
        }
        Layout { places, bytes, event_idx, indirect }
    }

    /// Makes the rings in `region`, tells the device of them, and fills the posted ones from `arena`. What is open afterwards is noted in `marks`.
    pub(crate) fn set_up(
        &self,
        attachment: &Attachment,
        region: &Arc<DmaRegion>,
        arena: &DmaArena,
        transport: &mut dyn Transport,
        marks: &mut Marks,
    ) -> Result<Queues, QueuesError> {
        let posted: u64 = attachment.queues.iter().filter(|queue| queue.posting.is_some()).count() as u64;
        // Half of the memory is for all of them together.
        let share = arena.region().len() / 2 / posted.max(1);
        let mut made: Vec<(&QueuePlan, Option<(SplitQueue, QueueEvents)>)> = Vec::new();
        for (plan, place) in attachment.queues.iter().zip(&self.places) {
            let config =
                QueueConfig { index: plan.index, size: plan.size, event_idx: self.event_idx, indirect: self.indirect };
            let queue = SplitQueue::new(config, Arc::clone(region), *place);
            let queue = queue.map_err(|error| QueuesError::Plan(error.to_string()))?;
            let setup = QueueSetup { index: plan.index, size: plan.size, addresses: queue.addresses() };
            let events = transport.setup_queue(setup).map_err(QueuesError::Device)?;
            marks.note(events.call.as_fd());
            if let Some(fd) = events.doorbell.descriptor() {
                marks.note(fd);
            }
            made.push((plan, Some((queue, events))));
        }
        let mut take = |owner: QueueOwner, is_posted: bool| {
            let found = made
                .iter_mut()
                .find(|(plan, made)| plan.owner == owner && plan.posting.is_some() == is_posted && made.is_some())?;
            Some((found.0, found.1.take()?))
        };
        let mut sets = Vec::new();
        while let Some((plan, (ring, events))) = take(QueueOwner::Set(sets.len() as u16), false) {
            let requests = LaneQueue::new(ring, events, plan.ordinary_response.clone());
            let mut indices = vec![plan.index];
            let mut posted = None;
            if let Some((plan, (ring, events))) = take(QueueOwner::Set(sets.len() as u16), true) {
                let posting = plan.posting.ok_or_else(|| QueuesError::Plan("no posting".to_owned()))?;
                let buffers = buffers(posting, share, arena)?;
                let filled = Posted::new(ring, events.doorbell, buffers, posting.head_bytes);
                posted = Some((filled.map_err(|error| QueuesError::Plan(error.to_string()))?, events.call));
                indices.push(plan.index);
            }
            // In the order of the plan.
            indices.sort_by_key(|index| attachment.queues.iter().position(|plan| plan.index == *index));
            sets.push(SetQueues { indices, requests, posted });
        }
        let control = match take(QueueOwner::Control, false) {
            None => None,
            Some((_, commands)) => {
                let posted = match take(QueueOwner::Control, true) {
                    None => None,
                    Some((plan, (ring, events))) => {
                        let posting = plan.posting.ok_or_else(|| QueuesError::Plan("no posting".to_owned()))?;
                        Some((ring, events, buffers(posting, share, arena)?))
                    }
                };
                let queues = ControlQueues::new(commands, posted);
                Some(queues.map_err(|error| QueuesError::Plan(error.to_string()))?)
            }
        };
        Ok(Queues { sets, control })
    }
}

/// What a posted queue is filled with.
fn buffers(posting: Posting, share: u64, arena: &DmaArena) -> Result<Vec<Buffer>, QueuesError> {
    let most = share / u64::from(posting.buffer_bytes).next_multiple_of(4096);
    let count = u64::from(posting.buffers).min(most).max(1);
    (0..count)
        .map(|_| {
            let buffer = arena.lease(posting.buffer_bytes).map_err(|error| QueuesError::Plan(error.to_string()))?;
            // A packet that the device cuts short must not show what was there before.
            let _ = buffer.fill(0, buffer.len(), 0);
            Ok(buffer)
        })
        .collect()
}
