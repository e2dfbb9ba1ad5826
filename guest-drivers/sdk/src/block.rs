//! The service `block`: what a disk can do.

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
