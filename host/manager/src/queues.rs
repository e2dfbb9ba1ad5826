//! From a driver's plan to rings: where they lie, what they are told to the device, and what the posted ones are filled with.

pub(crate) mod resumed;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cofferdam_device::queue::{QueueConfig, SplitQueue};
use cofferdam_device::transport::{QueueSetup, Transport};
use cofferdam_device::{Buffer, DmaArena, DmaRegion, TransportError};
use cofferdam_runtime::{Attachment, Posting, QueueOwner, QueuePlan};

use crate::control::ControlQueues;
use crate::device::{F_EVENT_IDX, F_INDIRECT_DESC, host_features};
use crate::lane::posted::Posted;
use crate::lane::{Fresh, LaneQueue};
use crate::residue::Marks;

/// Memory that is scattered is so in pages of at least this size (huge pages of x86-64 and of most others).
const RUN_BYTES: u64 = 2 << 20;

/// Where each ring lies.
pub(crate) struct Layout {
    places: Vec<u64>,
    /// Where a device tells what it is ([`crate::lane::Place`]): a page of its own, the last.
    pub(crate) identity: u64,
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
        Layout { places, identity: bytes, bytes: bytes + 4096, event_idx, indirect }
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
        let share = share(attachment, arena);
        let mut made = self.make(attachment, region, transport, marks, &|_| None)?;
        let mut take = |owner: QueueOwner, is_posted: bool| made.take(owner, is_posted);
        let mut sets = Vec::new();
        while let Some((plan, (ring, events))) = take(QueueOwner::Set(sets.len() as u16), false) {
            let requests = LaneQueue::new(ring, events, plan.ordinary_response.clone());
            let mut indices = vec![plan.index];
            let mut posted = None;
            if let Some((plan, (ring, events))) = take(QueueOwner::Set(sets.len() as u16), true) {
                let posting = plan.posting.ok_or_else(|| QueuesError::Plan("no posting".to_owned()))?;
                let buffers = buffers(posting, share, arena)?;
                let filled = Posted::new(ring, events.doorbell, buffers, posting.head_bytes);
                posted = Some((filled, events.call));
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
                Some(ControlQueues::new(commands, posted))
            }
        };
        Ok(Queues { sets, control })
    }

    /// The same rings once more, empty, for a device that came back. It tells of used buffers by the descriptors that `call` knows.
    pub(crate) fn make<'a>(
        &self,
        attachment: &'a Attachment,
        region: &Arc<DmaRegion>,
        transport: &mut dyn Transport,
        marks: &mut Marks,
        call: &dyn Fn(&QueuePlan) -> Option<OwnedFd>,
    ) -> Result<Made<'a>, QueuesError> {
        let mut made = Vec::with_capacity(attachment.queues.len());
        for (plan, place) in attachment.queues.iter().zip(&self.places) {
            let config =
                QueueConfig { index: plan.index, size: plan.size, event_idx: self.event_idx, indirect: self.indirect };
            let queue = SplitQueue::new(config, Arc::clone(region), *place);
            let queue = queue.map_err(|error| QueuesError::Plan(error.to_string()))?;
            let setup = QueueSetup { index: plan.index, size: plan.size, addresses: queue.addresses() };
            let events = match call(plan) {
                Some(call) => transport.setup_queue_with(setup, call),
                None => transport.setup_queue(setup),
            };
            let events = events.map_err(QueuesError::Device)?;
            marks.note(events.call.as_fd());
            if let Some(fd) = events.doorbell.descriptor() {
                marks.note(fd);
            }
            made.push((plan, Some((queue, events))));
        }
        Ok(Made(made))
    }
}

/// Rings of a plan that nobody has taken yet.
pub(crate) struct Made<'a>(Vec<(&'a QueuePlan, Option<Fresh>)>);

impl<'a> Made<'a> {
    /// The next one of this owner.
    pub(crate) fn take(&mut self, owner: QueueOwner, is_posted: bool) -> Option<(&'a QueuePlan, Fresh)> {
        let is_it = |plan: &QueuePlan| plan.owner == owner && plan.posting.is_some() == is_posted;
        let found = self.0.iter_mut().find(|(plan, made)| is_it(plan) && made.is_some())?;
        Some((found.0, found.1.take()?))
    }
}

/// What a posted queue is filled with.
fn buffers(posting: Posting, share: u64, arena: &DmaArena) -> Result<Vec<Buffer>, QueuesError> {
    let buffers = lease(posting, share, arena)?;
    // A packet that the device cuts short must not show what was there before.
    buffers.iter().for_each(|buffer| drop(buffer.fill(0, buffer.len(), 0)));
    Ok(buffers)
}

/// The same as they are. They are the first leases of a new arena, and so in the same places whenever this is done for the same plan.
fn lease(posting: Posting, share: u64, arena: &DmaArena) -> Result<Vec<Buffer>, QueuesError> {
    let most = share / u64::from(posting.buffer_bytes).next_multiple_of(4096);
    let count = u64::from(posting.buffers).min(most).max(1);
    let one = |_| arena.lease(posting.buffer_bytes).map_err(|error| QueuesError::Plan(error.to_string()));
    (0..count).map(one).collect()
}

/// How much of the arena each posted queue may take: half of it is for all of them together.
fn share(attachment: &Attachment, arena: &DmaArena) -> u64 {
    let posted = attachment.queues.iter().filter(|queue| queue.posting.is_some()).count() as u64;
    arena.region().len() / 2 / posted.max(1)
}
