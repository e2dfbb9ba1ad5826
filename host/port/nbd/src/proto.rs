//! The numbers of the NBD protocol and nothing else (NBD `doc/proto.md`, section "Values" unless another is named).

/// First eight bytes of the server's greeting ("Newstyle negotiation").
pub(crate) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of the greeting, and the first of every option ("Newstyle negotiation").
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First bytes of every option reply ("Fixed newstyle negotiation").
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First bytes of every request ("Request message").
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First bytes of a simple reply ("Simple reply message").
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First bytes of a structured reply chunk ("Structured reply chunk message").
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Length of a request without its payload.
pub(crate) const REQUEST_BYTES: usize = 28;
/// Longest head of a reply that this server sends: a structured chunk's 20 bytes and the 8 of its offset.
pub(crate) const REPLY_HEAD_BYTES: usize = 28;
/// Longest string of the protocol ("Conventions").
pub(crate) const MAX_STRING_BYTES: usize = 4096;

/// Handshake and client flag, bit 0.
pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake and client flag, bit 1.
pub(crate) const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Transmission flags.
pub(crate) mod flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Option types.
pub(crate) mod opt {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
}

/// Option reply types.
pub(crate) mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const ERR_UNSUP: u32 = (1 << 31) + 1;
    pub(crate) const ERR_POLICY: u32 = (1 << 31) + 2;
    pub(crate) const ERR_INVALID: u32 = (1 << 31) + 3;
    pub(crate) const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    pub(crate) const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    pub(crate) const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Information types of `NBD_REP_INFO`.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Request types.
pub(crate) mod cmd {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const WRITE_ZEROES: u16 = 6;
}

/// Command flags.
pub(crate) mod cmd_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
}

/// Structured reply flag, bit 0: the last chunk of a reply.
pub(crate) const REPLY_FLAG_DONE: u16 = 1;

/// Structured reply types.
pub(crate) mod reply_type {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
}

/// Error values that a reply may carry ("Error values"). Zero is success and not one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Errno {
    /// A write to a read-only export.
    Perm = 1,
    /// The device failed.
    Io = 5,
    /// The request breaks a rule that the client was told.
    Inval = 22,
    /// Writing beyond the end, or the device has no room.
    NoSpc = 28,
    /// Too long for one answer.
    Overflow = 75,
    /// The export is going away.
    Shutdown = 108,
}

impl Errno {
    /// The one of this number.
    pub(crate) fn of(number: u32) -> Option<Errno> {
        let all = [Errno::Perm, Errno::Io, Errno::Inval, Errno::NoSpc, Errno::Overflow, Errno::Shutdown];
        all.into_iter().find(|errno| *errno as u32 == number)
    }
}
