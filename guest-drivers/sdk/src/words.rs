//! Typed views of the flat words that cross between host and driver. Their layout is documented in `wit/words.wit`.
//!
//! Plain integers cross as one copy, which is why they are flat: the host writes requests into the lane's window, and copies the chains from where they were
//! written. Nobody but this module needs to know their bits.

mod arrival;
mod chain;
mod request;
mod response;

pub use arrival::{Arrivals, ControlBuffers, Piece, Received, ReceivedBuffer};
pub use chain::{Chain, ChainError, ChainWriter, MAX_HEADER_BYTES, MAX_SEGMENT_BYTES, MAX_SEGMENTS, MAX_STATUS_BYTES};
#[doc(hidden)]
pub use chain::{KIND_HEADER_OUT, KIND_PAYLOAD_IN, KIND_PAYLOAD_OUT, KIND_STATUS_IN, QUEUE_REFUSED};
pub use request::{Operation, Request, Requests, WORDS_PER_REQUEST};
pub use response::{Answers, Response, Responses, StatusBytes};

/// Most requests or responses in one call.
pub const MAX_BATCH: usize = 64;

/// How a request ended (`wit/words.wit`, "Status").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The device failed the request.
    Io = 1,
    /// Neither driver nor device does this.
    Unsupported = 2,
    /// Range or alignment.
    Invalid = 3,
    /// The medium is full.
    NoSpace = 4,
    /// The medium cannot be written.
    ReadOnly = 5,
    /// The device broke its specification.
    DeviceFault = 6,
}

impl Status {
    /// The status of a code of the WIT, or `None` for a code that has no meaning.
    #[must_use]
    pub const fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::Ok,
            1 => Self::Io,
            2 => Self::Unsupported,
            3 => Self::Invalid,
            4 => Self::NoSpace,
            5 => Self::ReadOnly,
            6 => Self::DeviceFault,
            _ => return None,
        })
    }

    /// The code that crosses.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }
}
