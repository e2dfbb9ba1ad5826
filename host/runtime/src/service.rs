//! What drivers and host tell each other, as host types: checked against the bounds in `wit/` before anybody else sees it.

mod block;
mod entropy;
mod net;
mod plan;
mod stream;

pub use block::BlockProperties;
pub use entropy::EntropyProperties;
pub use net::{NetProperties, Offloads};
pub use plan::{Attachment, ExportedState, LaneSetup, MAX_STATE_BYTES, Posting, QueueOwner, QueuePlan};
pub use stream::{StreamPort, StreamProperties};

use crate::bindings;
use crate::fault::{CallError, GuestFault};

/// Requests or responses in one call, at most (`wit/words.wit`).
pub const MAX_BATCH_REQUESTS: usize = 64;

/// Words of one chain, at most: 2 of head, 2 for each of 130 segments, and 16 more for the 64 bytes of header.
///
/// A segment takes one word and either one more (payload), none (status) or `ceil(length / 4)` (header); headers are 64 bytes together, so they exceed one word each
/// by 16 words in sum.
pub const MAX_CHAIN_WORDS: usize = 2 + 130 * 2 + 16;

/// Words of one answer of `complete`: token and status.
pub const MAX_ANSWER_WORDS: usize = 2;

/// Words of one response, at most: 3 of head and 16 for the 64 bytes of status.
const MAX_RESPONSE_WORDS: usize = 3 + 16;

/// Bytes of a lane's window (`wit/words.wit`): 64 responses of the longest kind, which is more than 64 requests.
pub(crate) const WINDOW_BYTES: usize = MAX_BATCH_REQUESTS * MAX_RESPONSE_WORDS * size_of::<u32>();

/// Alignment of a lane's window.
pub(crate) const WINDOW_ALIGN_BYTES: u32 = 8;

/// What a device can do, in the words of its driver's service, checked against the bounds in `wit/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Properties {
    /// A disk.
    Block(BlockProperties),
    /// A source of entropy.
    Entropy(EntropyProperties),
    /// Byte streams.
    Stream(StreamProperties),
    /// A network.
    Net(NetProperties),
}

/// As the guest said it.
pub(crate) enum WitProperties {
    Block(bindings::block::exports::cofferdam::driver::block::Properties),
    Entropy(bindings::entropy::exports::cofferdam::driver::entropy::Properties),
    Stream(bindings::stream::exports::cofferdam::driver::stream::Properties),
    Net(bindings::net::exports::cofferdam::driver::net::Properties),
}

impl Properties {
    pub(crate) fn check(words: WitProperties) -> Result<Properties, GuestFault> {
        Ok(match words {
            WitProperties::Block(words) => Properties::Block(BlockProperties::check(&words)?),
            WitProperties::Entropy(words) => Properties::Entropy(EntropyProperties::check(&words)?),
            WitProperties::Stream(words) => Properties::Stream(StreamProperties::check(words)?),
            WitProperties::Net(words) => Properties::Net(NetProperties::check(&words)?),
        })
    }
}

/// The fault of a driver whose properties are out of their bounds.
fn breach<T>(what: &str, value: impl std::fmt::Display) -> Result<T, GuestFault> {
    Err(GuestFault::layout(format!("get-properties: {what} {value} is out of its bounds")))
}

/// The service of one data lane. [`Instance`](crate::Instance) is one; so can a native driver be, as the yardstick.
pub trait LaneDriver: Send {
    /// Turns 1 to 64 requests (3 words each, `wit/words.wit`) into chains. `out` is replaced by chain words, which the caller must check before it uses
    /// them; at most [`MAX_CHAIN_WORDS`] per request.
    ///
    /// # Errors
    /// [`CallError::Fault`] when the driver faulted.
    fn submit(&mut self, requests: &[u64], out: &mut Vec<u32>) -> Result<(), CallError>;

    /// Judges 1 to 64 responses. `out` is replaced by answer words, which the caller must check before it uses them; at most [`MAX_ANSWER_WORDS`] for each of 64.
    ///
    /// # Errors
    /// [`CallError::Fault`] when the driver faulted.
    fn complete(&mut self, responses: &[u32], out: &mut Vec<u32>) -> Result<(), CallError>;

    /// Says what 1 to 64 used buffers of the lane's posted queue mean. `out` is replaced by arrival words, which the caller must check before it uses them; at most [`MAX_CHAIN_WORDS`] for
    /// each of 64.
    ///
    /// # Errors
    /// [`CallError::Fault`] when the driver faulted, or has no such queue.
    fn received(&mut self, buffers: &[u32], out: &mut Vec<u32>) -> Result<(), CallError> {
        let _ = buffers;
        out.clear();
        Err(CallError::Fault(GuestFault::layout("received: this driver has no posted queue".to_owned())))
    }

    /// The core dump of a driver that trapped, once: see [`Instance::core_dump`](crate::Instance::core_dump).
    fn core_dump(&mut self) -> Option<Vec<u8>> {
        None
    }

    /// Bytes of memory that only this driver has.
    fn memory_bytes(&self) -> u64 {
        0
    }
}
