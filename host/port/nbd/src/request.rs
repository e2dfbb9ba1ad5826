//! Requests of the transmission phase: bytes to fields, and fields to something that the device may be asked.
//!
//! Everything here is forged by the client at will. [`Rules::judge`] is the one place that decides; what leaves it as
//! [`Action`] is inside the export, aligned, and of a kind that the export serves.

use crate::proto::{Errno, REQUEST_BYTES, REQUEST_MAGIC, cmd, cmd_flag, flag};
use crate::service::BlockGeometry;

/// Longest payload that this server takes or gives in one request, and what it advertises (`NBD_INFO_BLOCK_SIZE`): the
/// 2^25 bytes that every client may assume ("Size constraints").
pub(crate) const MAX_PAYLOAD_BYTES: u32 = 1 << 25;
/// Longest payload of a refused write that is read and thrown away so that the connection lives on; a longer one ends
/// it.
pub(crate) const MAX_DRAIN_BYTES: u32 = 2 * MAX_PAYLOAD_BYTES;

/// A request as it came, unchecked but for its magic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawRequest {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl RawRequest {
    /// Reads "Request message"; `None` is a wrong magic, after which nothing on the stream can be trusted.
    pub(crate) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<RawRequest> {
        let (magic, rest) = take::<4>(bytes)?;
        let (flags, rest) = take::<2>(rest)?;
        let (kind, rest) = take::<2>(rest)?;
        let (cookie, rest) = take::<8>(rest)?;
        let (offset, rest) = take::<8>(rest)?;
        let (length, _) = take::<4>(rest)?;
        (u32::from_be_bytes(magic) == REQUEST_MAGIC).then_some(RawRequest {
            flags: u16::from_be_bytes(flags),
            kind: u16::from_be_bytes(kind),
            cookie: u64::from_be_bytes(cookie),
            offset: u64::from_be_bytes(offset),
            length: u32::from_be_bytes(length),
        })
    }

    /// Bytes of payload that follow the request on the stream.
    pub(crate) fn payload_bytes(&self) -> u32 {
        if self.kind == cmd::WRITE { self.length } else { 0 }
    }
}

/// Splits `N` bytes off the front.
pub(crate) fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
    bytes.split_first_chunk::<N>().map(|(head, rest)| (*head, rest))
}

/// A request that the device may be asked. Offsets and lengths are inside the export and multiples of its logical
/// block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Read {
        df: bool,
    },
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
        may_unmap: bool,
    },
    /// Nothing to do: answer success (a length of 0, whose effect the protocol leaves open).
    Nothing,
    /// `NBD_CMD_DISC`: finish what is outstanding, answer nothing, close.
    Disconnect,
}

/// What one export lets one connection ask.
#[derive(Clone, Debug)]
pub(crate) struct Rules {
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u32,
    pub(crate) transmission_flags: u16,
    /// Longest read that is answered in one piece. At least 64 KiB, as `NBD_CMD_FLAG_DF` requires.
    pub(crate) window_bytes: u32,
}

impl Rules {
    /// `structured`: negotiated on this connection, on which `NBD_FLAG_SEND_DF` depends.
    pub(crate) fn new(geometry: &BlockGeometry, structured: bool, window_bytes: u32) -> Rules {
        let block = geometry.logical_block_bytes.max(1);
        Rules {
            size_bytes: geometry.capacity_bytes - geometry.capacity_bytes % u64::from(block),
            block_bytes: block,
            transmission_flags: transmission_flags(geometry, structured),
            window_bytes,
        }
    }

    fn structured(&self) -> bool {
        self.transmission_flags & flag::SEND_DF != 0
    }

    /// Decides about a request.
    ///
    /// # Errors
    /// The error value to answer with ("Error values" says which for what). A write's payload has to be read all the
    /// same.
    pub(crate) fn judge(&self, raw: &RawRequest) -> Result<Action, Errno> {
        let offers = |bit: u16| self.transmission_flags & bit != 0;
        let fua_flag = if offers(flag::SEND_FUA) { cmd_flag::FUA } else { 0 };
        let fua = raw.flags & fua_flag != 0;
        let known = match raw.kind {
            cmd::READ if self.structured() => fua_flag | cmd_flag::DF,
            cmd::WRITE_ZEROES => fua_flag | cmd_flag::NO_HOLE,
            _ => fua_flag,
        };
        if raw.kind == cmd::DISC {
            return Ok(Action::Disconnect);
        }
        if raw.flags & !known != 0 {
            return Err(Errno::Inval);
        }
        let read_only = offers(flag::READ_ONLY);
        let action = match raw.kind {
            cmd::READ => Action::Read { df: raw.flags & cmd_flag::DF != 0 },
            cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES if read_only => return Err(Errno::Perm),
            cmd::WRITE => Action::Write { fua },
            cmd::FLUSH if offers(flag::SEND_FLUSH) && raw.offset == 0 && raw.length == 0 => return Ok(Action::Flush),
            cmd::TRIM if offers(flag::SEND_TRIM) => Action::Trim { fua },
            cmd::WRITE_ZEROES if offers(flag::SEND_WRITE_ZEROES) => {
                Action::WriteZeroes { fua, may_unmap: raw.flags & cmd_flag::NO_HOLE == 0 }
            }
            _ => return Err(Errno::Inval),
        };
        self.place(raw)?;
        self.extent(raw, action)?;
        Ok(if raw.length == 0 { Action::Nothing } else { action })
    }

    /// "Size constraints", last paragraph, and "Error values".
    fn place(&self, raw: &RawRequest) -> Result<(), Errno> {
        let block = u64::from(self.block_bytes);
        if !raw.offset.is_multiple_of(block) || !u64::from(raw.length).is_multiple_of(block) {
            return Err(Errno::Inval);
        }
        let inside = raw.offset.checked_add(u64::from(raw.length)).is_some_and(|end| end <= self.size_bytes);
        match raw.kind {
            _ if inside => Ok(()),
            cmd::WRITE | cmd::WRITE_ZEROES => Err(Errno::NoSpc),
            _ => Err(Errno::Inval),
        }
    }

    /// The bounds on payload. `NBD_EOVERFLOW` is for structured reads alone; others get `NBD_EINVAL` ("Error values").
    fn extent(&self, raw: &RawRequest, action: Action) -> Result<(), Errno> {
        match action {
            Action::Read { df: true } if raw.length > self.window_bytes => Err(Errno::Overflow),
            Action::Read { .. } if raw.length > MAX_PAYLOAD_BYTES && self.structured() => Err(Errno::Overflow),
            Action::Read { .. } | Action::Write { .. } if raw.length > MAX_PAYLOAD_BYTES => Err(Errno::Inval),
            _ => Ok(()),
        }
    }
}

/// What the export offers: nothing that its device does not honour (DESIGN section 10).
///
/// `NBD_FLAG_CAN_MULTI_CONN` is always there: every connection reaches the same device, whose cache is one. FUA is a
/// flush after the write, so it is offered where flush is.
pub(crate) fn transmission_flags(geometry: &BlockGeometry, structured: bool) -> u16 {
    let writable = !geometry.read_only;
    let mut flags = flag::HAS_FLAGS | flag::CAN_MULTI_CONN;
    let mut set = |when: bool, bits: u16| {
        if when {
            flags |= bits;
        }
    };
    set(geometry.read_only, flag::READ_ONLY);
    set(geometry.can_flush, flag::SEND_FLUSH | flag::SEND_FUA);
    set(writable && geometry.can_discard, flag::SEND_TRIM);
    set(writable && geometry.can_write_zeroes, flag::SEND_WRITE_ZEROES);
    set(structured, flag::SEND_DF);
    flags
}

#[cfg(test)]
mod tests;
