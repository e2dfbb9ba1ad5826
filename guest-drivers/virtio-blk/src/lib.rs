//! A driver for virtio block devices: virtio 1.2, section 5.2.
//!
//! | module | about |
//! | --- | --- |
//! | `config` | configuration space, from allegation to checked geometry (section 5.2.4) |
//! | `plan` | features and queues: the control lane (sections 5.2.2, 5.2.3, 5.2.5) |
//! | `state` | what the control lane tells the data lanes |
//! | `lane` | requests to chains, responses to answers (section 5.2.6) |
//!
//! Not served: secure erase, lifetime metrics, zoned devices and SCSI pass-through; their features are never accepted, so a device
//! behaves as if it did not have them.

mod config;
mod lane;
mod plan;
mod state;

pub use lane::VirtioBlkLane;
pub use plan::VirtioBlk;

/// The virtio device id of a block device (section 5).
pub const DEVICE_TYPE: u32 = 2;
/// The unit of capacity, offsets and range lengths on the device, whatever its block size (section 5.2.4).
pub const SECTOR_BYTES: u32 = 512;
/// Length of what get-id reads (section 5.2.6).
pub const ID_BYTES: u32 = 20;
/// Most payload segments of one chain: [`MAX_SEGMENTS`](cofferdam_sdk::words::MAX_SEGMENTS) less header and status.
pub const MAX_PAYLOAD_SEGMENTS: u32 = cofferdam_sdk::words::MAX_SEGMENTS - 2;
/// Largest payload of one request even where the device sets no limit. A longer one gains nothing (Linux stops at 1,280 KiB) and would let
/// one request hold much of the arena.
pub const MAX_TRANSFER_BYTES: u32 = 1 << 20;

/// Feature bits (section 5.2.3) that this driver knows.
pub mod feature {
    /// `size_max` is there: the largest segment.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `seg_max` is there: the most segments in a request.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Legacy geometry is there. Never accepted: nothing uses cylinders.
    pub const GEOMETRY: u64 = 1 << 4;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is there: the logical block size.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The flush command is served.
    pub const FLUSH: u64 = 1 << 9;
    /// `topology` is there: the physical block size.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `writeback` is there: the mode of the cache.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `num_queues` is there.
    pub const MQ: u64 = 1 << 12;
    /// The discard command is served.
    pub const DISCARD: u64 = 1 << 13;
    /// The write-zeroes command is served.
    pub const WRITE_ZEROES: u64 = 1 << 14;

    /// What this driver can make use of.
    pub const WANTED: u64 =
        SIZE_MAX | SEG_MAX | RO | BLK_SIZE | FLUSH | TOPOLOGY | CONFIG_WCE | MQ | DISCARD | WRITE_ZEROES;
    /// Every device-type bit that a block device has ever had, legacy ones and those of virtio 1.3 included: barrier 0, geometry 4, SCSI 7,
    /// secure erase, lifetime and zoned 15 to 17. A device that offers another is hardly a block device.
    pub const OF_A_BLOCK_DEVICE: u64 = WANTED | GEOMETRY | 1 | 1 << 7 | 1 << 15 | 1 << 16 | 1 << 17;
}

#[cfg(feature = "component")]
cofferdam_sdk::export_block_driver!(VirtioBlk, devices: [cofferdam_sdk::DeviceId::virtio(DEVICE_TYPE)]);
