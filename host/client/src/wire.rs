//! The protocol of the data socket, version 1: enough to write a client in any language.
//!
//! A Unix socket of type `SOCK_SEQPACKET`. All numbers are little-endian. A packet's first byte is its tag; no packet is longer than
//! [`PACKET_MAX_BYTES`], and none is empty.
//!
//! | tag | from | bytes | |
//! | --- | --- | --- | --- |
//! | [`TAG_WAKE`] | both | 1 | look at the ring |
//! | [`TAG_REVOKED`] | host | 1 | nothing more is answered; the memory goes |
//! | [`TAG_VIOLATION`] | host | 1 | the client broke the protocol |
//! | [`TAG_HELLO`] | client | 24 | [`Hello`], the first packet and only once |
//! | [`TAG_WELCOME`] | host | 88 | [`Welcome`], with two descriptors: region, rings |
//! | [`TAG_REFUSED`] | host | 8 and text | [`Refused`], then the host closes; may come before the hello |
//!
//! Descriptors that a client sends are closed unseen. Each memfd is sealed against shrinking, growing and further sealing. The rings' layout is in
//! [`crate::ring`].
//!
//! ```text
//! connect -> HELLO -> WELCOME -> (rings; WAKE both ways) -> REVOKED, hang-up
//!                 \-> REFUSED, hang-up                   \-> VIOLATION, hang-up
//! ```

/// What this module describes. A host refuses other versions with [`Refusal::Version`].
pub const VERSION: u16 = 1;
/// In every hello and welcome: `CFDD`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"CFDD");
/// Longest packet.
pub const PACKET_MAX_BYTES: usize = 256;
/// Most entries of a ring; a ring has a power of two of them.
pub const ENTRIES_MAX: u32 = 1024;
/// A region is a multiple of this.
pub const PAGE_BYTES: u64 = 4096;
/// Bytes of a device's id, for [`Op::GetId`].
pub const ID_BYTES: u32 = 20;

/// See the table.
pub const TAG_WAKE: u8 = 1;
/// See the table.
pub const TAG_REVOKED: u8 = 2;
/// See the table.
pub const TAG_VIOLATION: u8 = 3;
/// See the table.
pub const TAG_HELLO: u8 = 16;
/// See the table.
pub const TAG_WELCOME: u8 = 17;
/// See the table.
pub const TAG_REFUSED: u8 = 18;

/// Bytes of a hello.
pub const HELLO_BYTES: usize = 24;
/// Bytes of a welcome.
pub const WELCOME_BYTES: usize = 88;
/// Bytes of a submit entry.
pub const SUBMIT_BYTES: usize = 32;
/// Bytes of a complete entry.
pub const COMPLETE_BYTES: usize = 16;

/// Request flag, write-zeroes only: the range may be deallocated.
pub const FLAG_MAY_UNMAP: u16 = 1;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn put(into: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = into.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// tag u8, 0 u8, version u16, magic u32, region bytes u64, entries u32, 0 u32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u16,
    /// Bytes of memory wanted, a multiple of [`PAGE_BYTES`], not 0.
    pub region_bytes: u64,
    /// Entries of each ring, a power of two up to [`ENTRIES_MAX`].
    pub entries: u32,
}

impl Hello {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut out = [0; HELLO_BYTES];
        put(&mut out, 0, &[TAG_HELLO]);
        put(&mut out, 2, &self.version.to_le_bytes());
        put(&mut out, 4, &MAGIC.to_le_bytes());
        put(&mut out, 8, &self.region_bytes.to_le_bytes());
        put(&mut out, 16, &self.entries.to_le_bytes());
        out
    }

    /// From a packet; `None` if it is no hello. Version and numbers are still to be judged: another version's hello is read as far as its magic, so
    /// that it can be told so.
    #[must_use]
    pub fn decode(packet: &[u8]) -> Option<Hello> {
        if packet.first() != Some(&TAG_HELLO) || u32_at(packet, 4) != Some(MAGIC) {
            return None;
        }
        let version = u16_at(packet, 2)?;
        if version != VERSION {
            return Some(Hello { version, region_bytes: 0, entries: 0 });
        }
        if packet.len() != HELLO_BYTES || packet.get(1) != Some(&0) || u32_at(packet, 20) != Some(0) {
            return None;
        }
        Some(Hello { version, region_bytes: u64_at(packet, 8)?, entries: u32_at(packet, 16)? })
    }
}

/// What the device can do. Offsets and lengths of requests are multiples of the logical block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the medium.
    pub capacity_bytes: u64,
    /// Smallest addressable unit, a power of two from 512.
    pub logical_block_bytes: u32,
    /// Best unit for writes; a hint.
    pub physical_block_bytes: u32,
    /// Longest read or write of one request.
    pub max_transfer_bytes: u32,
    /// Longest discard of one request; 0: not served.
    pub max_discard_bytes: u32,
    /// Useful alignment of a discard; a hint.
    pub discard_align_bytes: u32,
    /// Longest write-zeroes of one request; 0: not served.
    pub max_write_zeroes_bytes: u32,
    /// Writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Whether flush is served; if not, there is no volatile cache.
    pub can_flush: bool,
    /// Whether write-zeroes may deallocate when it is allowed to.
    pub write_zeroes_may_unmap: bool,
    /// Whether get-id is served.
    pub has_id: bool,
}

/// tag u8, 0 u8, version u16, magic u32, region bytes u64, entries u32, 0 u32, handle u64, then the geometry: capacity u64, and from 40 on u32 each:
/// logical block, physical block, longest transfer, longest discard, discard alignment, longest write-zeroes, flags (1 read-only, 2 flush, 4 write-zeroes may unmap,
/// 8 get-id), and zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Bytes of the region, as asked for.
    pub region_bytes: u64,
    /// Entries of each ring, as asked for.
    pub entries: u32,
    /// The number by which `cofferdam handles` knows this client.
    pub handle: u64,
    /// What the device can do.
    pub geometry: Geometry,
}

impl Welcome {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; WELCOME_BYTES] {
        let mut out = [0; WELCOME_BYTES];
        let g = &self.geometry;
        put(&mut out, 0, &[TAG_WELCOME]);
        put(&mut out, 2, &VERSION.to_le_bytes());
        put(&mut out, 4, &MAGIC.to_le_bytes());
        put(&mut out, 8, &self.region_bytes.to_le_bytes());
        put(&mut out, 16, &self.entries.to_le_bytes());
        put(&mut out, 24, &self.handle.to_le_bytes());
        put(&mut out, 32, &g.capacity_bytes.to_le_bytes());
        let flags = u32::from(g.read_only)
            | u32::from(g.can_flush) << 1
            | u32::from(g.write_zeroes_may_unmap) << 2
            | u32::from(g.has_id) << 3;
        let words = [
            g.logical_block_bytes,
            g.physical_block_bytes,
            g.max_transfer_bytes,
            g.max_discard_bytes,
            g.discard_align_bytes,
            g.max_write_zeroes_bytes,
            flags,
        ];
        for (index, word) in words.iter().enumerate() {
            put(&mut out, 40 + 4 * index, &word.to_le_bytes());
        }
        out
    }

    /// From a packet; `None` if it is no welcome of this version.
    #[must_use]
    pub fn decode(packet: &[u8]) -> Option<Welcome> {
        if packet.len() != WELCOME_BYTES
            || packet.first() != Some(&TAG_WELCOME)
            || u16_at(packet, 2) != Some(VERSION)
            || u32_at(packet, 4) != Some(MAGIC)
        {
            return None;
        }
        let word = |index: usize| u32_at(packet, 40 + 4 * index);
        let flags = word(6)?;
        let geometry = Geometry {
            capacity_bytes: u64_at(packet, 32)?,
            logical_block_bytes: word(0)?,
            physical_block_bytes: word(1)?,
            max_transfer_bytes: word(2)?,
            max_discard_bytes: word(3)?,
            discard_align_bytes: word(4)?,
            max_write_zeroes_bytes: word(5)?,
            read_only: flags & 1 != 0,
            can_flush: flags & 2 != 0,
            write_zeroes_may_unmap: flags & 4 != 0,
            has_id: flags & 8 != 0,
        };
        Some(Welcome {
            region_bytes: u64_at(packet, 8)?,
            entries: u32_at(packet, 16)?,
            handle: u64_at(packet, 24)?,
            geometry,
        })
    }
}

/// Why a client is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// A limit is reached.
    Busy = 1,
    /// The binding is going or gone.
    Revoked = 2,
    /// The device takes no memory of clients.
    Unsupported = 3,
    /// Another version of the protocol.
    Version = 4,
    /// Region or rings of this size are not to be had.
    Size = 5,
    /// The socket is for the host's own user and root.
    NotAllowed = 6,
    /// What came was no hello, or came too late.
    Malformed = 7,
    /// The host failed.
    Host = 8,
}

/// tag u8, reason u8, 0 u16, magic u32, then text in UTF-8 to the packet's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For the program.
    pub reason: Refusal,
    /// For people.
    pub text: String,
}

impl Refused {
    /// As bytes; a text that is too long is cut.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![TAG_REFUSED, self.reason as u8, 0, 0];
        out.extend_from_slice(&MAGIC.to_le_bytes());
        let mut end = self.text.len().min(PACKET_MAX_BYTES - out.len());
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        out.extend_from_slice(&self.text.as_bytes()[..end]);
        out
    }

    /// From a packet; `None` if it is no refusal. A reason that is not known is [`Refusal::Host`].
    #[must_use]
    pub fn decode(packet: &[u8]) -> Option<Refused> {
        if packet.first() != Some(&TAG_REFUSED) || u32_at(packet, 4) != Some(MAGIC) {
            return None;
        }
        let reason = match packet.get(1)? {
            1 => Refusal::Busy,
            2 => Refusal::Revoked,
            3 => Refusal::Unsupported,
            4 => Refusal::Version,
            5 => Refusal::Size,
            6 => Refusal::NotAllowed,
            7 => Refusal::Malformed,
            _ => Refusal::Host,
        };
        Some(Refused { reason, text: String::from_utf8_lossy(packet.get(8..)?).into_owned() })
    }
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// The device writes memory.
    Read = 1,
    /// The device reads memory.
    Write = 2,
    /// Makes earlier, answered writes durable. Offset and length are 0.
    Flush = 3,
    /// The range's contents are no longer needed.
    Discard = 4,
    /// The range reads as zeroes afterwards.
    WriteZeroes = 5,
    /// The device writes its id into [`ID_BYTES`] bytes of memory. Offset is 0.
    GetId = 6,
}

impl Op {
    /// From an entry.
    #[must_use]
    pub fn from_wire(value: u16) -> Option<Op> {
        [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes, Op::GetId]
            .into_iter()
            .find(|op| *op as u16 == value)
    }

    /// Whether a request of this kind names memory.
    #[must_use]
    pub fn has_payload(self) -> bool {
        matches!(self, Op::Read | Op::Write | Op::GetId)
    }
}

/// A submit entry: user u64, offset u64, memory offset u64, length u32, op u16, flags u16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submit {
    /// Given back in the answer; the host attaches no meaning to it.
    pub user: u64,
    /// First byte on the medium.
    pub offset: u64,
    /// First byte in the region; ignored without payload.
    pub memory_offset: u64,
    /// Bytes of payload or of the range.
    pub length: u32,
    /// [`Op`].
    pub op: u16,
    /// [`FLAG_MAY_UNMAP`]; others are refused.
    pub flags: u16,
}

impl Submit {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; SUBMIT_BYTES] {
        let mut out = [0; SUBMIT_BYTES];
        put(&mut out, 0, &self.user.to_le_bytes());
        put(&mut out, 8, &self.offset.to_le_bytes());
        put(&mut out, 16, &self.memory_offset.to_le_bytes());
        put(&mut out, 24, &self.length.to_le_bytes());
        put(&mut out, 28, &self.op.to_le_bytes());
        put(&mut out, 30, &self.flags.to_le_bytes());
        out
    }

    /// From bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; SUBMIT_BYTES]) -> Submit {
        // Every place is inside the array, so no default is ever taken.
        Submit {
            user: u64_at(bytes, 0).unwrap_or_default(),
            offset: u64_at(bytes, 8).unwrap_or_default(),
            memory_offset: u64_at(bytes, 16).unwrap_or_default(),
            length: u32_at(bytes, 24).unwrap_or_default(),
            op: u16_at(bytes, 28).unwrap_or_default(),
            flags: u16_at(bytes, 30).unwrap_or_default(),
        }
    }
}

/// How a request ended, in a complete entry. No status is 0, so that memory which was taken away is never mistaken for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(i32)]
pub enum Status {
    /// Done.
    #[error("done")]
    Ok = 1,
    /// The device reports an error.
    #[error("the device failed the request")]
    Io = -1,
    /// The device does not do this, or there is no such operation.
    #[error("the device does not support this operation")]
    Unsupported = -2,
    /// Out of range or misaligned, on the medium or in the region, or too long.
    #[error("the request is out of range, misaligned or too long")]
    Invalid = -3,
    /// The device has no room.
    #[error("no space left on the device")]
    NoSpace = -4,
    /// The device is read-only.
    #[error("the device is read-only")]
    ReadOnly = -5,
    /// The device or its driver broke its specification.
    #[error("the device or its driver answered out of specification")]
    DeviceFault = -6,
    /// The disk was taken away before the request was done. Whether a write reached the medium is unknown.
    #[error("the disk was taken away before the request was done")]
    Shutdown = -7,
}

impl Status {
    /// From an entry. `None` for 0 and what this version does not know.
    #[must_use]
    pub fn from_wire(value: i32) -> Option<Status> {
        use Status::*;
        [Ok, Io, Unsupported, Invalid, NoSpace, ReadOnly, DeviceFault, Shutdown]
            .into_iter()
            .find(|status| *status as i32 == value)
    }
}

/// A complete entry: user u64, status i32, 0 u32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Complete {
    /// The request's.
    pub user: u64,
    /// [`Status`].
    pub status: i32,
}

impl Complete {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; COMPLETE_BYTES] {
        let mut out = [0; COMPLETE_BYTES];
        put(&mut out, 0, &self.user.to_le_bytes());
        put(&mut out, 8, &self.status.to_le_bytes());
        out
    }

    /// From bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; COMPLETE_BYTES]) -> Complete {
        Complete {
            user: u64_at(bytes, 0).unwrap_or_default(),
            status: u32_at(bytes, 8).unwrap_or_default().cast_signed(),
        }
    }
}
