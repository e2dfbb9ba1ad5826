//! Queues, and who serves them.

use crate::bindings::cofferdam::driver::virtio as wit;
use crate::bindings::exports::cofferdam::driver::driver as wit_driver;
use crate::fault::GuestFault;

const MAX_QUEUES: usize = 64;
/// Most bytes of [`Attachment::state`] and of [`ExportedState::bytes`].
pub const MAX_STATE_BYTES: usize = 4096;
const MAX_ORDINARY_BYTES: usize = 64;
/// Bytes of a posted buffer, of a data lane's and of the control lane's.
const MAX_BUFFER_BYTES: u32 = 65_536;
const MAX_CONTROL_BUFFER_BYTES: u32 = 4096;
/// Bytes of a posted buffer's head.
const MAX_HEAD_BYTES: u8 = 64;

/// Who serves a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueOwner {
    /// The data lane of this number.
    Set(u16),
    /// The control lane.
    Control,
}

/// How a queue is kept filled (`wit/virtio.wit`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posting {
    /// Bytes of each buffer, 1 to 65,536, and to 4,096 for the control lane's.
    pub buffer_bytes: u32,
    /// Buffers, 1 to the size of the queue.
    pub buffers: u16,
    /// Bytes at the head of each that cross by value, at most 64.
    pub head_bytes: u8,
}

/// One virtqueue that a driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuePlan {
    /// Queue index; whether the device has it is for the caller to check.
    pub index: u16,
    /// Ring size in entries, a power of two.
    pub size: u16,
    /// Status bytes of a success that needs no call of `complete`, at most 64 bytes.
    pub ordinary_response: Option<Vec<u8>>,
    /// Who serves it.
    pub owner: QueueOwner,
    /// If given, the host keeps it filled.
    pub posting: Option<Posting>,
}

/// What a driver made of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Feature bits, as the driver says it negotiated them.
    pub features: u64,
    /// 1 to 64 queues, indices not repeated, in sets without a gap.
    pub queues: Vec<QueuePlan>,
    /// The driver's own words for its data lanes, at most 4,096 bytes.
    pub state: Vec<u8>,
}

impl Attachment {
    pub(crate) fn check(words: wit_driver::Attachment) -> Result<Attachment, GuestFault> {
        let breach = |what: String| Err(GuestFault::layout(format!("attach: {what}")));
        if words.queues.is_empty() || words.queues.len() > MAX_QUEUES {
            return breach(format!("{} queues; 1 to {MAX_QUEUES} are allowed", words.queues.len()));
        }
        if words.state.len() > MAX_STATE_BYTES {
            return breach(format!("{} bytes of state; {MAX_STATE_BYTES} are allowed", words.state.len()));
        }
        let mut queues: Vec<QueuePlan> = Vec::with_capacity(words.queues.len());
        for plan in words.queues {
            if queues.iter().any(|other| other.index == plan.index) {
                return breach(format!("queue {} is named twice", plan.index));
            }
            if !plan.size.is_power_of_two() {
                return breach(format!("queue {} has {} entries; a power of two is needed", plan.index, plan.size));
            }
            if plan.ordinary_response.as_ref().is_some_and(|bytes| bytes.len() > MAX_ORDINARY_BYTES) {
                return breach(format!(
                    "queue {} has an ordinary response over {MAX_ORDINARY_BYTES} bytes",
                    plan.index
                ));
            }
            let owner = match plan.owner {
                wit::QueueOwner::Set(set) => QueueOwner::Set(set),
                wit::QueueOwner::Control => QueueOwner::Control,
            };
            let posting = plan.posting.map(|posting| Posting {
                buffer_bytes: posting.buffer_bytes,
                buffers: posting.buffers,
                head_bytes: posting.head_bytes,
            });
            if let Some(posting) = posting {
                let most = if owner == QueueOwner::Control { MAX_CONTROL_BUFFER_BYTES } else { MAX_BUFFER_BYTES };
                let fits = (1..=most).contains(&posting.buffer_bytes) && (1..=plan.size).contains(&posting.buffers);
                if !fits || posting.head_bytes > MAX_HEAD_BYTES || plan.ordinary_response.is_some() {
                    return breach(format!("queue {} cannot be posted so", plan.index));
                }
            }
            if queues.iter().any(|other| other.owner == owner && other.posting.is_some() == posting.is_some()) {
                return breach(format!("queue {} is one too many of its kind for {owner:?}", plan.index));
            }
            queues.push(QueuePlan {
                index: plan.index,
                size: plan.size,
                ordinary_response: plan.ordinary_response,
                owner,
                posting,
            });
        }
        // Each set has a queue for requests: who else would speak first?
        let has = |set: usize| {
            queues.iter().any(|queue| queue.owner == QueueOwner::Set(set as u16) && queue.posting.is_none())
        };
        let sets = queues.iter().filter_map(|queue| match queue.owner {
            QueueOwner::Set(set) => Some(usize::from(set)),
            QueueOwner::Control => None,
        });
        match sets.max() {
            None => return breach("no queue is a data lane's".to_owned()),
            // Each set has a queue of its own, so there are at most 64 to look for.
            Some(last) if last >= MAX_QUEUES || !(0..=last).all(has) => {
                return breach(format!("sets up to {last} are named, and not all of them have a queue for requests"));
            }
            Some(_) => {}
        }
        Ok(Attachment { features: words.features, queues, state: words.state })
    }
}

/// What a control lane left to the one that takes its place: a hint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportedState {
    /// The driver's own number for what the bytes mean.
    pub version: u32,
    /// At most 4,096 bytes.
    pub bytes: Vec<u8>,
}

impl ExportedState {
    pub(crate) fn check(words: wit_driver::ExportedState) -> Result<ExportedState, GuestFault> {
        if words.bytes.len() > MAX_STATE_BYTES {
            let bytes = words.bytes.len();
            return Err(GuestFault::layout(format!("suspend: {bytes} bytes of state; {MAX_STATE_BYTES} are allowed")));
        }
        Ok(ExportedState { version: words.version, bytes: words.bytes })
    }
}

impl From<&ExportedState> for wit_driver::ExportedState {
    fn from(state: &ExportedState) -> wit_driver::ExportedState {
        wit_driver::ExportedState { version: state.version, bytes: state.bytes.clone() }
    }
}

/// What a data lane is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSetup {
    /// Negotiated device-type feature bits.
    pub features: u64,
    /// [`Attachment::state`], unchanged.
    pub state: Vec<u8>,
    /// The queues that the lane serves, in the order of the plan.
    pub queues: Vec<u16>,
}

impl From<&LaneSetup> for wit_driver::LaneSetup {
    fn from(setup: &LaneSetup) -> wit_driver::LaneSetup {
        wit_driver::LaneSetup { features: setup.features, state: setup.state.clone(), queues: setup.queues.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_checked_for_shape() {
        let plan = |index, size, response: usize| wit_driver::QueuePlan {
            index,
            size,
            ordinary_response: Some(vec![0; response]),
            owner: wit::QueueOwner::Set(index),
            posting: None,
        };
        let attachment = |queues, state: usize| {
            Attachment::check(wit_driver::Attachment { features: 1, queues, state: vec![0; state] })
        };
        assert!(attachment(vec![plan(0, 128, 64), plan(1, 1, 0)], 4096).is_ok());
        assert!(attachment(vec![], 0).is_err());
        assert!(attachment((0..65).map(|i| plan(i, 1, 0)).collect(), 0).is_err());
        assert!(attachment(vec![plan(0, 128, 0), plan(0, 128, 0)], 0).is_err());
        assert!(attachment(vec![plan(0, 100, 0)], 0).is_err());
        assert!(attachment(vec![plan(0, 0, 0)], 0).is_err());
        assert!(attachment(vec![plan(0, 128, 65)], 0).is_err());
        assert!(attachment(vec![plan(0, 128, 0)], 4097).is_err());
    }

    #[test]
    fn queues_are_in_sets_without_a_gap_and_posted_within_bounds() {
        let plan = |index, owner, posting: Option<(u32, u16, u8)>| wit_driver::QueuePlan {
            index,
            size: 16,
            ordinary_response: None,
            owner,
            posting: posting.map(|(buffer_bytes, buffers, head_bytes)| wit::Posting {
                buffer_bytes,
                buffers,
                head_bytes,
            }),
        };
        let check =
            |queues| Attachment::check(wit_driver::Attachment { features: 0, queues, state: Vec::new() }).is_ok();
        let (set, control) = (wit::QueueOwner::Set, wit::QueueOwner::Control);
        assert!(check(vec![plan(0, set(0), Some((65_536, 16, 64))), plan(1, set(0), None), plan(2, control, None)]));
        assert!(check(vec![plan(0, set(1), None), plan(1, set(0), None)]), "in any order");
        assert!(!check(vec![plan(0, set(1), None)]), "set 0 has none");
        assert!(!check(vec![plan(0, set(u16::MAX), None)]));
        assert!(!check(vec![plan(0, set(0), None), plan(1, set(0), None)]), "two for requests");
        assert!(!check(vec![plan(0, control, None)]), "no lane");
        assert!(!check(vec![plan(0, set(0), Some((64, 1, 0)))]), "nothing to send on");
        for posting in [(0, 1, 0), (65_537, 1, 0), (64, 0, 0), (64, 17, 0), (64, 1, 65)] {
            assert!(!check(vec![plan(0, set(0), Some(posting)), plan(1, set(0), None)]), "{posting:?}");
        }
        assert!(!check(vec![plan(0, set(0), None), plan(1, control, Some((4097, 1, 0)))]));
    }
}
