//! A control lane's queues on their way to another process: no command is under way, and posted buffers stay with the device.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cofferdam_device::{Buffer, QueueEvents, SplitQueue};
use serde::{Deserialize, Serialize};

use super::{Control, ControlLane};
use crate::binding::Binding;
use crate::control::queues::{ControlQueues, Posted, Queue};
use crate::lane::{EmptyState, Fresh, PostedState, channels};

/// Where a control lane's queues are and stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ControlState {
    pub(crate) commands: EmptyState,
    pub(crate) posted: Option<PostedState>,
}

impl ControlQueues {
    /// Queues that another process exported, and that are its own until [`ControlLane::keep`]. Nothing is posted: what this driver was not told of is still on the ring.
    pub(crate) fn adopt(commands: Fresh, posted: Option<(SplitQueue, QueueEvents, Vec<Buffer>)>) -> ControlQueues {
        let queue = |(ring, events)| Queue { ring, events };
        let posted = posted.map(|(ring, events, buffers)| Posted { queue: queue((ring, events)), buffers });
        ControlQueues { commands: Some(queue(commands)), posted, given_up: None, is_away: false, handed_over: true }
    }

    /// Everything of them, with doorbell and call descriptor of each. From here on they are not touched, until [`ControlLane::keep`].
    fn export(&mut self) -> Result<(ControlState, Vec<OwnedFd>), String> {
        if let Some(why) = &self.given_up {
            return Err(format!("its queue for commands was given up: {why}"));
        }
        let commands = self.commands.as_ref().filter(|_| !self.is_away).ok_or("its control queues are gone")?;
        let of = |queue: &Queue| channels(queue.events.doorbell.as_ref(), queue.events.call.as_fd());
        let mut descriptors = Vec::from(of(commands)?);
        let state = EmptyState::of(&commands.ring)?;
        let posted = match &self.posted {
            None => None,
            Some(Posted { queue, buffers }) => {
                descriptors.extend(of(queue)?);
                Some(PostedState::of(&queue.ring, buffers.iter().map(Buffer::iova))?)
            }
        };
        self.handed_over = true;
        Ok((ControlState { commands: state, posted }, descriptors))
    }
}

impl Control {
    /// Its queues, if it has any. Whoever has it locked has seen to it that its driver has been told everything that was taken off them.
    pub(crate) fn export_queues(&self) -> Result<Option<(ControlState, Vec<OwnedFd>)>, String> {
        self.queues.as_ref().map(|queues| queues.lock().export()).transpose()
    }
}

impl ControlLane {
    /// The queues are this process's: nothing came of an export, or what was adopted serves. What the device said meanwhile, or to the process before this one, may not have been taken.
    pub(crate) fn keep(&self) {
        let queues = self.queues.lock().clone();
        if let Some(queues) = queues {
            let mut queues = queues.lock();
            if std::mem::take(&mut queues.handed_over) {
                queues.look_again();
            }
        }
    }
}

impl Binding {
    /// The device is this process's: a driver that has queues to speak with it, and has only attached so far, is told that it runs. What is offered afterwards is what it says then.
    pub(crate) fn go_live(self: &Arc<Self>) {
        let mut locked = self.control.control.lock();
        let Some(control) = locked.as_mut().filter(|control| control.queues.is_some()) else { return };
        let live = control.live();
        if let Some(fault) = control.instance.fault().cloned() {
            self.bring_control_up(control, Some(fault));
            return;
        }
        let offered = self.serving.get().and_then(|serving| Some((serving, serving.offer.as_ref()?)));
        match (live, offered) {
            (Ok(offer), Some((serving, current))) => {
                let offer = Arc::new(offer);
                *current.lock() = Arc::clone(&offer);
                serving.lanes.iter().for_each(|lane| lane.set_offer(&offer));
            }
            (Ok(_), None) => {}
            (Err(error), _) => tracing::warn!(binding = self.name(), %error, "the driver could not go live"),
        }
    }
}
