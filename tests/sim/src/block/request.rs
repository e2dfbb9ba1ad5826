//! Block requests (virtio 1.2, section 5.2.6): what a chain asks for, and doing it.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::profile::{Profile, RangeLimits, SECTOR_BYTES};
use super::store::Store;
use crate::kinds::{Lie, Op};
use crate::memory::{Memory, Segment};
use crate::model::{gather, slice};
use crate::ring::{Chain, Violation};
use crate::script::Fate;

pub(crate) const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IO_ERROR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPPORTED: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// Bytes of a request's header: type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// Bytes of one range of a discard or write-zeroes request: sector, number of sectors, flags.
const RANGE_BYTES: u64 = 16;

/// What a request is carried out on.
pub(crate) struct Target<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) store: &'a Store,
    pub(crate) profile: &'a Profile,
    /// Negotiated.
    pub(crate) features: u64,
}

impl Target<'_> {
    fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// Without VIRTIO_BLK_F_FLUSH negotiated a device has to write through (section 5.2.5.2).
    fn cached(&self) -> bool {
        self.has(VIRTIO_BLK_F_FLUSH)
    }
}

/// A chain with a header that was read once.
#[derive(Clone, Debug)]
pub(crate) struct Request<'a> {
    pub(crate) chain: &'a Chain,
    pub(crate) op: Op,
    pub(crate) sector: u64,
}

impl<'a> Request<'a> {
    pub(crate) fn read(memory: &Memory, chain: &'a Chain) -> Result<Self, Violation> {
        if chain.readable_bytes < HEADER_BYTES || chain.writable_bytes == 0 {
            let Chain { head, readable_bytes, writable_bytes, .. } = *chain;
            return Err(Violation::NotARequest { head, readable_bytes, writable_bytes });
        }
        let mut header = [0; HEADER_BYTES as usize];
        gather(memory, &slice(&chain.readable, 0, HEADER_BYTES), &mut header);
        let [kind, _reserved, low, high] =
            [0, 4, 8, 12].map(|at| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
        let op = match kind {
            VIRTIO_BLK_T_IN => Op::Read,
            VIRTIO_BLK_T_OUT => Op::Write,
            VIRTIO_BLK_T_FLUSH => Op::Flush,
            VIRTIO_BLK_T_GET_ID => Op::GetId,
            VIRTIO_BLK_T_DISCARD => Op::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Op::WriteZeroes,
            _ => Op::Unknown,
        };
        Ok(Self { chain, op, sector: u64::from(low) | u64::from(high) << 32 })
    }

    /// Bytes of payload in the direction of the request.
    pub(crate) fn payload_bytes(&self) -> u64 {
        match self.op {
            Op::Read | Op::GetId => self.chain.writable_bytes - 1,
            _ => self.chain.readable_bytes - HEADER_BYTES,
        }
    }

    /// Whether the driver kept to the limits that the device named (section 5.2.6.1).
    pub(crate) fn check_limits(&self, profile: &Profile) -> Result<(), Violation> {
        let data = match self.op {
            Op::Read => self.incoming(),
            Op::Write => self.outgoing(),
            _ => return Ok(()),
        };
        let longest = data.iter().map(|segment| segment.bytes).max().unwrap_or(0);
        let within = profile.seg_max.is_none_or(|most| data.len() as u64 <= u64::from(most))
            && profile.size_max.is_none_or(|most| longest <= most);
        if within {
            return Ok(());
        }
        Err(Violation::Limits { head: self.chain.head, segments: data.len(), longest_bytes: longest })
    }

    fn outgoing(&self) -> Vec<Segment> {
        slice(&self.chain.readable, HEADER_BYTES, u64::MAX)
    }

    fn incoming(&self) -> Vec<Segment> {
        slice(&self.chain.writable, 0, self.chain.writable_bytes - 1)
    }

    /// Carries the request out, lies about effect and payload included. The answer is the status byte and the number of
    /// bytes of payload that were written to the driver's memory. Every way to fail is a status: the driver cannot make the
    /// device stop from here.
    pub(crate) fn execute(&self, target: &Target<'_>, fate: &Fate) -> (u8, u64) {
        if let Some(status) = fate.status {
            return (status, 0);
        }
        let outcome = match self.op {
            Op::Read => return self.execute_read(target, fate),
            Op::GetId => return (OK, self.execute_get_id(target)),
            Op::Write => self.execute_write(target, fate),
            Op::Flush if !target.has(VIRTIO_BLK_F_FLUSH) => Err(UNSUPPORTED),
            Op::Flush if fate.lies(Lie::FlushForgotten) => Ok(()),
            Op::Flush => target.store.flush().map_err(|_| IO_ERROR),
            Op::Discard if target.has(VIRTIO_BLK_F_DISCARD) => self.execute_ranges(target, target.profile.discard, 0),
            Op::WriteZeroes if target.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.execute_ranges(target, target.profile.write_zeroes, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
            }
            _ => Err(UNSUPPORTED),
        };
        (outcome.err().unwrap_or(OK), 0)
    }

    fn execute_read(&self, target: &Target<'_>, fate: &Fate) -> (u8, u64) {
        let bytes = self.payload_bytes();
        let Ok(offset) = offset_of(target, self.sector, bytes) else { return (IO_ERROR, 0) };
        if fate.lies(Lie::PayloadUnwritten) {
            return (OK, bytes);
        }
        let segments = self.incoming();
        if target.store.read(target.memory, &segments, offset).is_err() {
            return (IO_ERROR, 0);
        }
        if fate.lies(Lie::PayloadFlipped)
            && let Some(first) = segments.first()
        {
            let mut byte = [0];
            let _ = target.memory.read(first.address, &mut byte);
            let _ = target.memory.write(first.address, &[byte[0] ^ 1]);
        }
        (OK, bytes)
    }

    fn execute_get_id(&self, target: &Target<'_>) -> u64 {
        let id = &target.profile.id;
        let mut at = 0;
        for segment in slice(&self.chain.writable, 0, self.payload_bytes().min(id.len() as u64)) {
            let _ = target.memory.write(segment.address, &id[at..at + segment.bytes as usize]);
            at += segment.bytes as usize;
        }
        at as u64
    }

    fn execute_write(&self, target: &Target<'_>, fate: &Fate) -> Result<(), u8> {
        let bytes = self.payload_bytes();
        let offset = offset_of(target, self.sector, bytes)?;
        if target.profile.read_only {
            return Err(IO_ERROR);
        }
        if fate.lies(Lie::WriteForgotten) {
            return Ok(());
        }
        target.store.write(target.memory, &self.outgoing(), offset, bytes, target.cached()).map_err(|_| IO_ERROR)
    }

    fn execute_ranges(&self, target: &Target<'_>, limits: Option<RangeLimits>, known_flags: u32) -> Result<(), u8> {
        let limits = limits.ok_or(UNSUPPORTED)?;
        let bytes = self.payload_bytes();
        // Checked before the copy below: it bounds it.
        if bytes == 0
            || !bytes.is_multiple_of(RANGE_BYTES)
            || bytes / RANGE_BYTES > u64::from(limits.max_segments)
            || target.profile.read_only
        {
            return Err(IO_ERROR);
        }
        let mut payload = vec![0; bytes as usize];
        gather(target.memory, &self.outgoing(), &mut payload);
        for range in payload.chunks_exact(RANGE_BYTES as usize) {
            let word = |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
            let (sector, sectors, flags) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(8), word(12));
            if flags & !known_flags != 0 {
                return Err(UNSUPPORTED);
            }
            if sectors > limits.max_sectors {
                return Err(IO_ERROR);
            }
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset = offset_of(target, sector, bytes)?;
            target.store.zero(offset, bytes, target.cached()).map_err(|_| IO_ERROR)?;
        }
        Ok(())
    }
}

/// Byte offset of a range, if it is a positive number of whole blocks inside the medium.
fn offset_of(target: &Target<'_>, sector: u64, bytes: u64) -> Result<u64, u8> {
    let block = target.profile.logical_block_bytes();
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(IO_ERROR)?;
    let end = offset.checked_add(bytes).ok_or(IO_ERROR)?;
    if bytes == 0
        || end > target.store.capacity_bytes()
        || !offset.is_multiple_of(block)
        || !bytes.is_multiple_of(block)
    {
        return Err(IO_ERROR);
    }
    Ok(offset)
}
