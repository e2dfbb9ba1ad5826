//! The same rings in another process: nothing is laid out, told or filled, only found where it was said to be.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cofferdam_device::queue::{QueueConfig, SplitQueue};
use cofferdam_device::transport::{QueueEvents, Transport};
use cofferdam_device::{Buffer, DmaArena, DmaRegion};
use cofferdam_runtime::{Attachment, QueueOwner, QueuePlan};

use super::{Layout, Queues, QueuesError, SetQueues, lease, share};
use crate::control::{ControlQueues, ControlState};
use crate::lane::posted::Posted;
use crate::lane::{EmptyState, Fresh, LaneQueue, LaneState, PostedState, RingState};
use crate::residue::Marks;

/// Doorbell and call descriptor of a queue.
pub(crate) type Channels = [OwnedFd; 2];

/// What the process before this one said of every queue.
pub(crate) struct Said {
    pub(crate) lanes: Vec<(LaneState, Channels, Option<Channels>)>,
    pub(crate) control: Option<(ControlState, Channels, Option<Channels>)>,
}

/// One queue of the plan, found where it was said to be.
struct Found<'a> {
    plan: &'a QueuePlan,
    place: u64,
    config: QueueConfig,
}

/// What the rings are found with.
struct Finder<'a> {
    layout: &'a Layout,
    attachment: &'a Attachment,
    region: &'a Arc<DmaRegion>,
    arena: &'a DmaArena,
    transport: &'a mut dyn Transport,
    marks: &'a mut Marks,
    found: usize,
}

impl<'a> Finder<'a> {
    fn find(&mut self, owner: QueueOwner, is_posted: bool, said: &RingState) -> Result<Found<'a>, String> {
        let mut planned = self.attachment.queues.iter().zip(&self.layout.places);
        let is_it = |plan: &QueuePlan| plan.owner == owner && plan.posting.is_some() == is_posted;
        let found = planned.find(|(plan, _)| is_it(plan));
        let (plan, place) = found.ok_or_else(|| format!("the driver plans no queue for {owner:?} that runs"))?;
        let (event_idx, indirect) = (self.layout.event_idx, self.layout.indirect);
        let config = QueueConfig { index: plan.index, size: plan.size, event_idx, indirect };
        if config != said.config() {
            return Err(format!("the driver plans {config:?} for {owner:?}, the device runs with {:?}", said.config()));
        }
        self.found += 1;
        Ok(Found { plan, place: *place, config })
    }

    fn events(&mut self, ring: &SplitQueue, said: &RingState, channels: Channels) -> Result<QueueEvents, String> {
        let index = ring.config().index;
        if ring.addresses() != said.addresses() {
            return Err(format!("queue {index} lies where this version of the host would not lay it"));
        }
        let [kick, call] = channels;
        let doorbell = self.transport.adopt_queue(index, kick).map_err(|error| error.to_string())?;
        self.marks.note(call.as_fd());
        if let Some(fd) = doorbell.descriptor() {
            self.marks.note(fd);
        }
        Ok(QueueEvents { doorbell, call })
    }

    fn empty(
        &mut self,
        owner: QueueOwner,
        said: &EmptyState,
        channels: Channels,
    ) -> Result<(&'a QueuePlan, Fresh), String> {
        let Found { plan, place, config } = self.find(owner, false, &said.ring)?;
        let ring = SplitQueue::resume(config, Arc::clone(self.region), place, said.position);
        let ring = ring.map_err(|error| format!("queue {}: {error}", plan.index))?;
        let events = self.events(&ring, &said.ring, channels)?;
        Ok((plan, (ring, events)))
    }

    fn posted(
        &mut self,
        owner: QueueOwner,
        said: &PostedState,
        channels: Channels,
    ) -> Result<(&'a QueuePlan, Fresh, Vec<Buffer>), String> {
        let Found { plan, place, config } = self.find(owner, true, &said.ring)?;
        let posting = plan.posting.ok_or("no posting")?;
        let buffers = match lease(posting, share(self.attachment, self.arena), self.arena) {
            Ok(buffers) => buffers,
            Err(QueuesError::Plan(why)) => return Err(why),
            Err(QueuesError::Device(error)) => return Err(error.to_string()),
        };
        if !buffers.iter().map(Buffer::iova).eq(said.places.iter().copied()) {
            return Err(format!("the buffers of queue {} are where this version of the host has none", plan.index));
        }
        let length = |token: u32| buffers.get(token as usize).map(Buffer::len);
        let ring = SplitQueue::resume_posted(config, Arc::clone(self.region), place, &said.standing(), length);
        let ring = ring.map_err(|error| format!("queue {}: {error}", plan.index))?;
        let events = self.events(&ring, &said.ring, channels)?;
        Ok((plan, (ring, events), buffers))
    }

    fn set(
        &mut self,
        number: u16,
        (state, channels, of_posted): (LaneState, Channels, Option<Channels>),
    ) -> Result<SetQueues, String> {
        let owner = QueueOwner::Set(number);
        let (plan, (ring, events)) = self.empty(owner, &state.requests, channels)?;
        let requests = LaneQueue::new(ring, events, plan.ordinary_response.clone());
        let mut indices = vec![plan.index];
        let mut posted = None;
        if let Some(((state, shown), channels)) = state.posted.zip(of_posted) {
            let (plan, (ring, events), buffers) = self.posted(owner, &state, channels)?;
            let head_bytes = plan.posting.map_or(0, |posting| posting.head_bytes);
            let adopted = Posted::adopt(ring, events.doorbell, buffers, head_bytes, &state, shown)?;
            posted = Some((adopted, events.call));
            indices.push(plan.index);
        }
        // In the order of the plan.
        indices.sort_by_key(|index| self.attachment.queues.iter().position(|plan| plan.index == *index));
        Ok(SetQueues { indices, requests, posted })
    }
}

impl Layout {
    /// The rings that the process before this one has set up in `region`, with the posted buffers in `arena`, in which nothing is leased. What is open afterwards is noted in `marks`.
    ///
    /// # Errors
    /// A sentence; the device has heard of nothing.
    pub(crate) fn resume(
        &self,
        attachment: &Attachment,
        region: &Arc<DmaRegion>,
        arena: &DmaArena,
        said: Said,
        transport: &mut dyn Transport,
        marks: &mut Marks,
    ) -> Result<Queues, String> {
        let mut finder = Finder { layout: self, attachment, region, arena, transport, marks, found: 0 };
        // Posted buffers are leased in the order of `Layout::set_up`.
        let sets = (0..).zip(said.lanes).map(|(number, lane)| finder.set(number, lane));
        let sets = sets.collect::<Result<Vec<_>, _>>()?;
        let mut control = None;
        if let Some((state, channels, of_posted)) = said.control {
            let (_, commands) = finder.empty(QueueOwner::Control, &state.commands, channels)?;
            let posted = match state.posted.zip(of_posted) {
                None => None,
                Some((state, channels)) => {
                    let (_, (ring, events), buffers) = finder.posted(QueueOwner::Control, &state, channels)?;
                    Some((ring, events, buffers))
                }
            };
            control = Some(ControlQueues::adopt(commands, posted));
        }
        let (planned, runs) = (attachment.queues.len(), finder.found);
        if planned != runs {
            return Err(format!("the driver plans {planned} queues, {runs} run"));
        }
        Ok(Queues { sets, control })
    }
}
