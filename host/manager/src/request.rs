//! What a client asks of a binding, whatever the service, and what it is answered.

pub use cofferdam_device::IoOp;
use cofferdam_device::{Buffer, Status};

/// Modifiers of a request, by its service (`wit/`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoFlags(pub u8);

impl IoFlags {
    /// Block, write-zeroes only: the device may deallocate the range.
    pub const MAY_UNMAP: IoFlags = IoFlags(cofferdam_device::words::FLAG_UNMAP);
}

/// One operation.
#[derive(Debug)]
pub struct IoRequest {
    /// The client's own name for it, given back in the [`Completion`]; the host attaches no meaning to it.
    pub user: u64,
    /// What to do.
    pub op: IoOp,
    /// What its service says. Block: the first byte, a multiple of the logical block; 0 for flush and get-id. Stream: the port. Net: what is left to the device.
    pub offset: u64,
    /// Bytes of payload or of the range; 0 for flush.
    pub length: u32,
    /// Modifiers.
    pub flags: IoFlags,
    /// For what has a payload ([`IoOp::payload`]): at least `length` bytes, leased from the same binding. `None` for the others.
    pub buffer: Option<Buffer>,
}

/// The answer to one admitted [`IoRequest`]; there is exactly one.
#[derive(Debug)]
#[repr(C)] // The buffer first: a move copies from the front, in pieces that a load of a field then finds whole. In the middle of two, a processor waits for both (4 ns per request).
pub struct Completion {
    /// The request's buffer. After a failed read its contents are not the device's answer and must not be shown to anyone.
    pub buffer: Option<Buffer>,
    /// The request's `user`.
    pub user: u64,
    /// Bytes that the device wrote, for fill: fewer than were asked for, and at least one, are a success. 0 for the others.
    pub bytes: u32,
    /// How it ended.
    pub result: Result<(), IoError>,
}

/// Why an operation was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The device reports an error for this request.
    #[error("the device failed the request")]
    Io,
    /// The device does not do this operation.
    #[error("the device does not support this operation")]
    Unsupported,
    /// Out of range, misaligned, without the buffer it needs, or too long: the client's mistake.
    #[error("the request is out of range, misaligned or without a buffer that fits")]
    Invalid,
    /// The device has no room.
    #[error("no space left on the device")]
    NoSpace,
    /// The device is read-only.
    #[error("the device is read-only")]
    ReadOnly,
    /// The device broke its specification while serving this request, or its driver broke the contract.
    #[error("the device or its driver answered out of specification")]
    DeviceFault,
    /// The binding went away before the request was done. Whether a write reached the medium is unknown.
    #[error("the binding was closed before the request was done")]
    Revoked,
}

impl IoError {
    /// From a driver's judgement.
    pub(crate) fn from_status(status: Status) -> Result<(), IoError> {
        match status {
            Status::Ok => Ok(()),
            Status::Io => Err(IoError::Io),
            Status::Unsupported => Err(IoError::Unsupported),
            Status::Invalid => Err(IoError::Invalid),
            Status::NoSpace => Err(IoError::NoSpace),
            Status::ReadOnly => Err(IoError::ReadOnly),
            Status::DeviceFault => Err(IoError::DeviceFault),
        }
    }
}
