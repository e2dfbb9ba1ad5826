//! The block service as a client sees it. All offsets and lengths are bytes.

use cofferdam_device::Buffer;
use cofferdam_device::words::ID_BYTES;
use cofferdam_runtime::BlockProperties;

use crate::request::{IoError, IoOp};

/// What the device can do, as its driver described it and the host checked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockGeometry {
    /// Size of the medium, a multiple of `logical_block_bytes`.
    pub capacity_bytes: u64,
    /// Smallest addressable unit, a power of two from 512 to 65,536.
    pub logical_block_bytes: u32,
    /// Best unit for writes; a hint.
    pub physical_block_bytes: u32,
    /// Longest read or write of one request.
    pub max_transfer_bytes: u32,
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Whether flush is served; if not, the device has no volatile cache to write back.
    pub can_flush: bool,
    /// Whether discard is served.
    pub can_discard: bool,
    /// Whether write-zeroes is served.
    pub can_write_zeroes: bool,
    /// Longest discard of one request.
    pub max_discard_bytes: u32,
    /// Useful alignment of a discard; a hint.
    pub discard_align_bytes: u32,
    /// Longest write-zeroes of one request.
    pub max_write_zeroes_bytes: u32,
    /// Whether write-zeroes may deallocate when it is allowed to.
    pub write_zeroes_may_unmap: bool,
    /// Whether get-id is served.
    pub has_id: bool,
}

impl BlockGeometry {
    /// That of what is no disk.
    pub(crate) const NONE: BlockGeometry = BlockGeometry {
        capacity_bytes: 0,
        logical_block_bytes: 512,
        physical_block_bytes: 512,
        max_transfer_bytes: 0,
        read_only: true,
        can_flush: false,
        can_discard: false,
        can_write_zeroes: false,
        max_discard_bytes: 0,
        discard_align_bytes: 0,
        max_write_zeroes_bytes: 0,
        write_zeroes_may_unmap: false,
        has_id: false,
    };

    pub(crate) fn from_properties(p: &BlockProperties, arena_bytes: u64, max_lease: u32) -> BlockGeometry {
        let block = p.logical_block_bytes;
        // One request must leave room for others in the arena, whatever the driver says.
        let arena_share = u32::try_from(arena_bytes / 4).unwrap_or(u32::MAX).min(max_lease);
        let max_transfer = p.max_transfer_bytes.min(arena_share).max(block);
        BlockGeometry {
            capacity_bytes: p.capacity_bytes,
            logical_block_bytes: block,
            physical_block_bytes: p.physical_block_bytes,
            max_transfer_bytes: max_transfer - max_transfer % block,
            read_only: p.read_only,
            can_flush: p.can_flush,
            can_discard: p.max_discard_bytes > 0 && !p.read_only,
            can_write_zeroes: p.max_write_zeroes_bytes > 0 && !p.read_only,
            max_discard_bytes: p.max_discard_bytes - p.max_discard_bytes % block,
            discard_align_bytes: p.discard_align_bytes,
            max_write_zeroes_bytes: p.max_write_zeroes_bytes - p.max_write_zeroes_bytes % block,
            write_zeroes_may_unmap: p.write_zeroes_may_unmap,
            has_id: p.has_id,
        }
    }

    /// What is another than in `now`, each in words: `capacity-bytes 1024 -> 2048`.
    pub(crate) fn changes(&self, now: &BlockGeometry) -> Vec<String> {
        fn is<T: PartialEq + std::fmt::Display>(name: &str, before: T, now: T) -> Option<String> {
            (before != now).then(|| format!("{name} {before} -> {now}"))
        }
        [
            is("capacity-bytes", self.capacity_bytes, now.capacity_bytes),
            is("logical-block-bytes", self.logical_block_bytes, now.logical_block_bytes),
            is("physical-block-bytes", self.physical_block_bytes, now.physical_block_bytes),
            is("max-transfer-bytes", self.max_transfer_bytes, now.max_transfer_bytes),
            is("read-only", self.read_only, now.read_only),
            is("can-flush", self.can_flush, now.can_flush),
            is("max-discard-bytes", self.max_discard_bytes, now.max_discard_bytes),
            is("discard-align-bytes", self.discard_align_bytes, now.discard_align_bytes),
            is("max-write-zeroes-bytes", self.max_write_zeroes_bytes, now.max_write_zeroes_bytes),
            is("write-zeroes-may-unmap", self.write_zeroes_may_unmap, now.write_zeroes_may_unmap),
            is("has-id", self.has_id, now.has_id),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Checks a client's request once, so that nothing behind it has to (who can forge this: any client).
    #[inline]
    pub(crate) fn check(&self, op: IoOp, offset: u64, length: u32, buffer: Option<&Buffer>) -> Result<(), IoError> {
        // Reads and writes in one look; what is wrong with one is found out the long way.
        let holds = buffer.is_some_and(|buffer| length <= buffer.len());
        let is_transfer = op == IoOp::Read || (op == IoOp::Write && !self.read_only);
        if is_transfer & holds & (length <= self.max_transfer_bytes) & self.contains(offset, length) {
            return Ok(());
        }
        self.check_any(op, offset, length, holds)
    }

    /// Whether these are whole blocks of the medium, one at least.
    #[inline]
    fn contains(&self, offset: u64, length: u32) -> bool {
        // A power of two: a mask, where a division would be as dear as all the rest.
        let beyond = u64::from(self.logical_block_bytes) - 1;
        let length = u64::from(length);
        let is_inside = offset.checked_add(length).is_some_and(|end| end <= self.capacity_bytes);
        (length != 0) & ((offset | length) & beyond == 0) & is_inside
    }

    /// `holds`: there is a buffer that is long enough.
    #[inline(never)]
    fn check_any(&self, op: IoOp, offset: u64, length: u32, holds: bool) -> Result<(), IoError> {
        let writes = matches!(op, IoOp::Write | IoOp::Discard | IoOp::WriteZeroes);
        if writes && self.read_only {
            return Err(IoError::ReadOnly);
        }
        let is_valid = match op {
            IoOp::Read | IoOp::Write => length <= self.max_transfer_bytes && self.contains(offset, length),
            IoOp::Discard if self.can_discard => length <= self.max_discard_bytes && self.contains(offset, length),
            IoOp::WriteZeroes if self.can_write_zeroes => {
                length <= self.max_write_zeroes_bytes && self.contains(offset, length)
            }
            IoOp::Flush if self.can_flush => offset == 0 && length == 0,
            IoOp::GetId if self.has_id => offset == 0 && length == ID_BYTES,
            _ => return Err(IoError::Unsupported),
        };
        if is_valid && (holds || op.payload().is_none()) { Ok(()) } else { Err(IoError::Invalid) }
    }
}
