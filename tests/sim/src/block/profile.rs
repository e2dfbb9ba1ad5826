//! What the device offers: feature bits and configuration space (virtio 1.2, sections 5.2.3 and 5.2.4).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// The unit of `capacity` and of request offsets, whatever the block size (section 5.2.4).
pub(crate) const SECTOR_BYTES: u64 = 512;

/// Length of the configuration space in bytes (`struct virtio_blk_config` up to and with `unused1`).
pub(crate) const CONFIG_BYTES: usize = 60;

/// Limits of discard or of write-zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLimits {
    /// Largest range of one segment, in sectors.
    pub max_sectors: u32,
    /// Most segments of one request.
    pub max_segments: u32,
}

impl Default for RangeLimits {
    /// 4 MiB and one segment.
    fn default() -> Self {
        Self { max_sectors: 8192, max_segments: 1 }
    }
}

/// What the device offers. The default is a plain writable disk of 512-byte blocks with one queue and everything that a
/// driver may use.
#[derive(Clone, Debug)]
pub struct Profile {
    /// VIRTIO_BLK_F_RO.
    pub read_only: bool,
    /// VIRTIO_BLK_F_BLK_SIZE with this many bytes; requests must be multiples of it, and torn writes are torn at it.
    pub block_bytes: Option<u32>,
    /// VIRTIO_BLK_F_SEG_MAX: most data segments of one request. A driver that gives more is served, and put on record
    /// ([`crate::SimDevice::violations`]).
    pub seg_max: Option<u32>,
    /// VIRTIO_BLK_F_SIZE_MAX: longest data segment in bytes; the same holds.
    pub size_max: Option<u32>,
    /// VIRTIO_BLK_F_FLUSH, and with it the volatile write cache.
    pub flush: bool,
    /// VIRTIO_BLK_F_DISCARD.
    pub discard: Option<RangeLimits>,
    /// `discard_sector_alignment`.
    pub discard_alignment_sectors: u32,
    /// VIRTIO_BLK_F_WRITE_ZEROES.
    pub write_zeroes: Option<RangeLimits>,
    /// `write_zeroes_may_unmap`.
    pub write_zeroes_may_unmap: bool,
    /// VIRTIO_BLK_F_TOPOLOGY: the physical block is 2 to this power logical ones.
    pub physical_block_exp: Option<u8>,
    /// Number of queues; above 1 with VIRTIO_BLK_F_MQ.
    pub queues: u16,
    /// Largest ring, a power of two.
    pub queue_size: u16,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// The answer to get-id (section 5.2.6): ASCII, padded with zeroes.
    pub id: [u8; 20],
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            read_only: false,
            block_bytes: Some(512),
            seg_max: Some(126),
            size_max: None,
            flush: true,
            discard: Some(RangeLimits::default()),
            discard_alignment_sectors: 8,
            write_zeroes: Some(RangeLimits::default()),
            write_zeroes_may_unmap: true,
            physical_block_exp: Some(3),
            queues: 1,
            queue_size: 256,
            event_idx: true,
            indirect: true,
            id: *b"cofferdam-sim\0\0\0\0\0\0\0",
        }
    }
}

impl Profile {
    /// The unit in which requests must come.
    pub fn logical_block_bytes(&self) -> u64 {
        self.block_bytes.map_or(SECTOR_BYTES, u64::from).max(SECTOR_BYTES)
    }

    /// All feature bits on offer, VIRTIO_F_VERSION_1 among them.
    pub fn features(&self) -> u64 {
        [
            (true, VIRTIO_F_VERSION_1),
            (self.read_only, VIRTIO_BLK_F_RO),
            (self.block_bytes.is_some(), VIRTIO_BLK_F_BLK_SIZE),
            (self.seg_max.is_some(), VIRTIO_BLK_F_SEG_MAX),
            (self.size_max.is_some(), VIRTIO_BLK_F_SIZE_MAX),
            (self.flush, VIRTIO_BLK_F_FLUSH),
            (self.discard.is_some(), VIRTIO_BLK_F_DISCARD),
            (self.write_zeroes.is_some(), VIRTIO_BLK_F_WRITE_ZEROES),
            (self.physical_block_exp.is_some(), VIRTIO_BLK_F_TOPOLOGY),
            (self.queues > 1, VIRTIO_BLK_F_MQ),
            (self.event_idx, VIRTIO_RING_F_EVENT_IDX),
            (self.indirect, VIRTIO_RING_F_INDIRECT_DESC),
        ]
        .iter()
        .filter(|(offered, _)| *offered)
        .fold(0, |bits, (_, bit)| bits | 1 << bit)
    }

    /// Configuration space for a medium of `capacity_bytes`, honest.
    pub fn config(&self, capacity_bytes: u64) -> [u8; CONFIG_BYTES] {
        let mut bytes = [0; CONFIG_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &(capacity_bytes / SECTOR_BYTES).to_le_bytes());
        put(8, &self.size_max.unwrap_or(0).to_le_bytes());
        put(12, &self.seg_max.unwrap_or(0).to_le_bytes());
        put(20, &self.block_bytes.unwrap_or(0).to_le_bytes());
        put(24, &[self.physical_block_exp.unwrap_or(0), 0]);
        put(26, &1u16.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        let discard = self.discard.unwrap_or(RangeLimits { max_sectors: 0, max_segments: 0 });
        put(36, &discard.max_sectors.to_le_bytes());
        put(40, &discard.max_segments.to_le_bytes());
        put(44, &self.discard_alignment_sectors.to_le_bytes());
        let zeroes = self.write_zeroes.unwrap_or(RangeLimits { max_sectors: 0, max_segments: 0 });
        put(48, &zeroes.max_sectors.to_le_bytes());
        put(52, &zeroes.max_segments.to_le_bytes());
        put(56, &[u8::from(self.write_zeroes_may_unmap)]);
        bytes
    }
}
