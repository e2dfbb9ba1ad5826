//! The virtio device as its driver sees it during `attach` and `config_changed`.

use crate::error::VirtioError;

/// Largest number of bytes that one [`VirtioDevice::read_config`] may ask for.
pub const MAX_CONFIG_READ_BYTES: u32 = 4096;
/// Largest number of queues in one plan.
pub const MAX_PLANNED_QUEUES: u16 = 64;
/// Longest [`QueuePlan::ordinary_response`] in bytes.
pub const MAX_ORDINARY_RESPONSE_BYTES: usize = 64;

/// `virtio.device` of the WIT: what a driver may ask of the device. Everything that comes back is the device's allegation.
///
/// The host owns the status register, the rings and every address (DESIGN D1), so none of them is here.
pub trait VirtioDevice {
    /// The virtio device id (virtio 1.2, section 5), or `None` where the transport cannot tell (vhost-user).
    fn device_type(&self) -> Option<u32>;

    /// The device-type feature bits on offer (0 to 23 and 50 to 63); bits 24 to 49 read as 0.
    fn offered_features(&self) -> u64;

    /// Accepts a subset of [`offered_features`](Self::offered_features) (section 3.1.1). Once per attach, before
    /// [`read_config`](Self::read_config). Blocks for 2 s at most.
    ///
    /// # Errors
    /// `OutOfOrder` the second time, `Invalid` for a bit that is not on offer, `Device` when the device refuses or is gone.
    fn negotiate(&mut self, features: u64) -> Result<(), VirtioError>;

    /// Reads `length` bytes (1 to [`MAX_CONFIG_READ_BYTES`]) of device configuration space at `offset` bytes. Blocks for 2 s at most.
    ///
    /// # Errors
    /// `OutOfOrder` before `negotiate`, `Invalid` for a length out of its bound, `Device` when the device refuses or is gone.
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, VirtioError>;

    /// How many queues the device has, at least 1.
    fn max_queues(&self) -> u16;

    /// How many data lanes the operator allows, at least 1.
    fn max_lanes(&self) -> u16;

    /// Largest ring size of queue `queue` in entries; 0 for a queue that does not exist.
    fn max_queue_size(&self, queue: u16) -> u16;
}

/// The device from DRIVER_OK on, for a control lane with queues of its own: `virtio.live-device` of the WIT.
pub trait LiveDevice {
    /// As [`VirtioDevice::read_config`].
    ///
    /// # Errors
    /// As there.
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, VirtioError>;

    /// Sends `request` (1 to 64 bytes) on the control lane's queue for commands; what the device wrote, at most `response_bytes` (0 to 64). Blocks for 2 s at most.
    ///
    /// # Errors
    /// `Invalid` for a length out of its bound, `Device` when there is no such queue, or no answer in time: then of every later call, too.
    fn command(&mut self, request: &[u8], response_bytes: u32) -> Result<Vec<u8>, VirtioError>;
}

/// Who serves a queue: `virtio.queue-owner` of the WIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueOwner {
    /// The data lane of this number.
    Set(u16),
    /// The control lane.
    Control,
}

/// How the host keeps a queue filled with device-writable buffers: `virtio.posting` of the WIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posting {
    /// Bytes of each buffer, 1 to 65,536 (4,096 for the control lane's).
    pub buffer_bytes: u32,
    /// Buffers to keep on the ring, at most the size of the queue.
    pub buffers: u16,
    /// Bytes at the head of each that cross by value, 0 to 64.
    pub head_bytes: u8,
}

/// One virtqueue that the driver wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueuePlan {
    /// Queue index, below [`VirtioDevice::max_queues`].
    pub index: u16,
    /// Ring size in entries: a power of two, at most [`VirtioDevice::max_queue_size`]. The host may choose a smaller one.
    pub size: u16,
    /// If given: a used element whose written length is all that its chain offered and whose status bytes equal these is a success that
    /// the host answers without calling the driver. At most [`MAX_ORDINARY_RESPONSE_BYTES`].
    pub ordinary_response: Option<Vec<u8>>,
    /// Who serves it.
    pub owner: QueueOwner,
    /// If given: the host fills the queue, and the driver never submits to it.
    pub posting: Option<Posting>,
}

impl QueuePlan {
    /// A queue for requests, served by lane `set`.
    #[must_use]
    pub fn requests(index: u16, size: u16, ordinary_response: Option<Vec<u8>>, set: u16) -> Self {
        Self { index, size, ordinary_response, owner: QueueOwner::Set(set), posting: None }
    }

    /// A queue that the host keeps filled.
    #[must_use]
    pub fn posted(index: u16, size: u16, owner: QueueOwner, posting: Posting) -> Self {
        Self { index, size, ordinary_response: None, owner, posting: Some(posting) }
    }
}
