//! A block driver: the control lane ([`BlockDriver`]) and its data lanes ([`BlockLane`]).

use crate::device::{QueuePlan, VirtioDevice};
use crate::error::DriverError;
use crate::words::{Answers, ChainWriter, Requests, Responses};

/// The control lane of a block driver, and the way to make its data lanes.
///
/// One instance of the component is the control lane; it attaches and then only answers for properties and configuration changes. Every
/// data lane is an instance of its own and shares nothing with it but the bytes of [`Attachment::state`].
pub trait BlockDriver: Sized + 'static {
    /// What serves requests.
    type Lane: BlockLane;

    /// Decides whether the device is one of this driver's, negotiates features and plans queues. Called once.
    ///
    /// # Errors
    /// [`DriverError::NotMine`] lets the host ask another driver; the others end the load with their text.
    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError>;

    /// What the device can do; asked after [`attach`](Self::attach) and after [`config_changed`](Self::config_changed).
    fn properties(&self) -> BlockProperties;

    /// Configuration space may have changed; the host asks for the properties again afterwards.
    ///
    /// # Errors
    /// When the device now says what it must not; the host then gives the device up.
    fn config_changed(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DriverError>;

    /// Starts a data lane. An instance that replaces a crashed one is started with the same words, and its lane may then be asked to
    /// `complete` requests that its predecessor submitted.
    ///
    /// # Errors
    /// When the setup is not one that this driver's `attach` could have made.
    fn start(setup: &LaneSetup) -> Result<Self::Lane, DriverError>;
}

/// One data lane: turns requests into descriptor chains and judges responses. Never called from two threads, never re-entered.
pub trait BlockLane: 'static {
    /// For every request exactly one chain or one refusal, in any order. 1 to 64 requests.
    ///
    /// This is the hot path: no allocation, no logging and no formatting per request.
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>);

    /// For every response exactly one answer. Only responses that were not the ordinary one of their queue come here. 1 to 64 responses.
    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>);
}

/// What the driver made of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Feature bits that were negotiated, as given to [`VirtioDevice::negotiate`].
    pub features: u64,
    /// The queues to set up: 1 to 64, indices not repeated. The host shares them out among lanes.
    pub queues: Vec<QueuePlan>,
    /// What the data lanes need to know, in the driver's own encoding: at most 4,096 bytes.
    pub state: Vec<u8>,
}

/// What a data lane is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneSetup {
    /// Negotiated device-type feature bits.
    pub features: u64,
    /// [`Attachment::state`], unchanged.
    pub state: Vec<u8>,
    /// The queues this lane serves, at least one.
    pub queues: Vec<u16>,
}

/// What a block device can do: `block.properties` of the WIT, where each field's bounds are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockProperties {
    /// Size of the medium in bytes, a multiple of `logical_block_bytes`.
    pub capacity_bytes: u64,
    /// Smallest addressable unit: a power of two from 512 to 65,536.
    pub logical_block_bytes: u32,
    /// Best unit for writes, a power of two not below `logical_block_bytes`; a hint.
    pub physical_block_bytes: u32,
    /// Largest payload of one read or write: a multiple of `logical_block_bytes`, at least one block.
    pub max_transfer_bytes: u32,
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Whether flush is served.
    pub can_flush: bool,
    /// Largest range of one discard; 0: not served.
    pub max_discard_bytes: u32,
    /// Alignment of a useful discard, at least one block when discard is served; a hint.
    pub discard_align_bytes: u32,
    /// Largest range of one write-zeroes; 0: not served.
    pub max_write_zeroes_bytes: u32,
    /// Whether write-zeroes may deallocate when asked to.
    pub write_zeroes_may_unmap: bool,
    /// Whether get-id is served.
    pub has_id: bool,
}
