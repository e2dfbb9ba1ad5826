//! What drivers and host tell each other, as host types: checked against the bounds in `wit/` before anybody else sees it.

use crate::bindings::exports::cofferdam::driver::{block as wit_block, driver as wit_driver};
use crate::fault::{CallError, GuestFault};

/// Requests or responses in one call, at most (`wit/block.wit`).
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

/// Bytes of a lane's window (`wit/block.wit`): 64 responses of the longest kind, which is more than 64 requests.
pub(crate) const WINDOW_BYTES: usize = MAX_BATCH_REQUESTS * MAX_RESPONSE_WORDS * size_of::<u32>();

/// Alignment of a lane's window.
pub(crate) const WINDOW_ALIGN_BYTES: u32 = 8;

const MAX_QUEUES: usize = 64;
const MAX_STATE_BYTES: usize = 4096;
const MAX_ORDINARY_BYTES: usize = 64;

/// One virtqueue that a driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuePlan {
    /// Queue index; whether the device has it is for the caller to check.
    pub index: u16,
    /// Ring size in entries, a power of two.
    pub size: u16,
    /// Status bytes of a success that needs no call of `complete`, at most 64 bytes.
    pub ordinary_response: Option<Vec<u8>>,
}

/// What a driver made of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Feature bits, as the driver says it negotiated them.
    pub features: u64,
    /// 1 to 64 queues, indices not repeated.
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
            queues.push(QueuePlan { index: plan.index, size: plan.size, ordinary_response: plan.ordinary_response });
        }
        Ok(Attachment { features: words.features, queues, state: words.state })
    }
}

/// What a data lane is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSetup {
    /// Negotiated device-type feature bits.
    pub features: u64,
    /// [`Attachment::state`], unchanged.
    pub state: Vec<u8>,
    /// The queues that the lane serves, at least one.
    pub queues: Vec<u16>,
}

impl From<&LaneSetup> for wit_driver::LaneSetup {
    fn from(setup: &LaneSetup) -> wit_driver::LaneSetup {
        wit_driver::LaneSetup { features: setup.features, state: setup.state.clone(), queues: setup.queues.clone() }
    }
}

/// What a block device can do, checked against the bounds in `wit/block.wit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockProperties {
    /// Size of the medium in bytes, a multiple of `logical_block_bytes`.
    pub capacity_bytes: u64,
    /// Smallest addressable unit: a power of two from 512 to 65,536.
    pub logical_block_bytes: u32,
    /// Best unit for writes: a power of two, at least `logical_block_bytes`.
    pub physical_block_bytes: u32,
    /// Largest payload of one read or write: a multiple of `logical_block_bytes`, at least one block.
    pub max_transfer_bytes: u32,
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Whether flush is served.
    pub can_flush: bool,
    /// Largest range of one discard; 0: not served.
    pub max_discard_bytes: u32,
    /// Alignment of a useful discard; at least one block when discard is served.
    pub discard_align_bytes: u32,
    /// Largest range of one write-zeroes; 0: not served.
    pub max_write_zeroes_bytes: u32,
    /// Whether write-zeroes may deallocate.
    pub write_zeroes_may_unmap: bool,
    /// Whether get-id is served.
    pub has_id: bool,
}

impl BlockProperties {
    pub(crate) fn check(words: &wit_block::Properties) -> Result<BlockProperties, GuestFault> {
        let block = words.logical_block_bytes;
        let breach = |what: &str, value: u64| {
            Err(GuestFault::layout(format!("get-properties: {what} {value} is out of its bounds")))
        };
        if !block.is_power_of_two() || !(512..=65_536).contains(&block) {
            return breach("logical-block-bytes", block.into());
        }
        if !words.capacity_bytes.is_multiple_of(block.into()) {
            return breach("capacity-bytes", words.capacity_bytes);
        }
        if !words.physical_block_bytes.is_power_of_two() || words.physical_block_bytes < block {
            return breach("physical-block-bytes", words.physical_block_bytes.into());
        }
        if words.max_transfer_bytes < block || !words.max_transfer_bytes.is_multiple_of(block) {
            return breach("max-transfer-bytes", words.max_transfer_bytes.into());
        }
        if words.max_discard_bytes != 0 && words.discard_align_bytes < block {
            return breach("discard-align-bytes", words.discard_align_bytes.into());
        }
        Ok(BlockProperties {
            capacity_bytes: words.capacity_bytes,
            logical_block_bytes: block,
            physical_block_bytes: words.physical_block_bytes,
            max_transfer_bytes: words.max_transfer_bytes,
            read_only: words.read_only,
            can_flush: words.can_flush,
            max_discard_bytes: words.max_discard_bytes,
            discard_align_bytes: words.discard_align_bytes,
            max_write_zeroes_bytes: words.max_write_zeroes_bytes,
            write_zeroes_may_unmap: words.write_zeroes_may_unmap,
            has_id: words.has_id,
        })
    }
}

/// The block service of one data lane. [`Instance`](crate::Instance) is one; so can a native driver be, as the yardstick.
pub trait BlockDriver: Send {
    /// Turns 1 to 64 requests (3 words each, `wit/block.wit`) into chains. `out` is replaced by chain words, which the caller must check before it uses
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

    /// Bytes of memory that only this driver has.
    fn memory_bytes(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties() -> wit_block::Properties {
        wit_block::Properties {
            capacity_bytes: 1 << 20,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            max_transfer_bytes: 1 << 16,
            read_only: false,
            can_flush: true,
            max_discard_bytes: 1 << 20,
            discard_align_bytes: 4096,
            max_write_zeroes_bytes: 0,
            write_zeroes_may_unmap: false,
            has_id: true,
        }
    }

    #[test]
    fn properties_within_their_bounds_are_taken() {
        assert_eq!(BlockProperties::check(&properties()).unwrap().capacity_bytes, 1 << 20);
    }

    #[test]
    fn every_property_out_of_its_bounds_is_a_layout_fault() {
        type Spoil = fn(&mut wit_block::Properties);
        let spoils: [Spoil; 8] = [
            |p| p.logical_block_bytes = 0,
            |p| p.logical_block_bytes = 256,
            |p| p.logical_block_bytes = 131_072,
            |p| p.capacity_bytes = 513,
            |p| p.physical_block_bytes = 0,
            |p| p.max_transfer_bytes = 0,
            |p| p.max_transfer_bytes = 1000,
            |p| p.discard_align_bytes = 0,
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let mut words = properties();
            spoil(&mut words);
            let fault = BlockProperties::check(&words).expect_err(&format!("case {number}"));
            assert_eq!(fault.kind, crate::FaultKind::Layout, "case {number}");
        }
    }

    #[test]
    fn an_attachment_is_checked_for_shape() {
        let plan = |index, size, response: usize| wit_driver::QueuePlan {
            index,
            size,
            ordinary_response: Some(vec![0; response]),
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
}
