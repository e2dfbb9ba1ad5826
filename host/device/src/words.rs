//! The numbers that cross between host and driver, as laid out in `wit/words.wit`: operations, statuses, and the encoders of
//! what the host sends. The check of a driver's chains is in [`crate::chain`].

use crate::chain::Direction;
use crate::error::AnswerError;

/// Most requests or responses in one call.
pub const MAX_BATCH: usize = 64;
/// Words of one request.
pub const REQUEST_WORDS: usize = 3;
/// Most segments of one chain.
pub const MAX_SEGMENTS: usize = 130;
/// Most `header-out` bytes of one chain.
pub const MAX_HEADER_BYTES: usize = 64;
/// Most `status-in` bytes of one chain.
pub const MAX_STATUS_BYTES: usize = 64;
/// The queue index that means "refused".
pub const REFUSED: u16 = 0xffff;
/// Bytes of a device's id (virtio 1.2, section 5.2.6).
pub const ID_BYTES: u32 = 20;
/// Request flag: the range may be unmapped (write-zeroes only).
pub const FLAG_UNMAP: u8 = 1;
/// Most chain words that a well-formed answer to [`MAX_BATCH`] requests can have: two, and a word and its payload offset or header word per
/// segment, and never more than 16 further header words (64 bytes).
pub const MAX_CHAIN_WORDS: usize = MAX_BATCH * (2 + 2 * MAX_SEGMENTS + MAX_HEADER_BYTES / 4);

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum IoOp {
    /// The device writes the payload.
    Read = 0,
    /// The device reads the payload.
    Write = 1,
    /// Writes back the device's volatile cache.
    Flush = 2,
    /// The range's contents are no longer needed.
    Discard = 3,
    /// The range reads as zeroes afterwards.
    WriteZeroes = 4,
    /// The device writes its id, [`ID_BYTES`] bytes.
    GetId = 5,
    /// Entropy: the device writes random bytes into the payload, one at least.
    Fill = 6,
    /// Stream: the device reads the payload; the argument is the port.
    Send = 7,
    /// Net: the device reads the payload, one packet; the argument is what is left to the device.
    Transmit = 8,
}

impl IoOp {
    /// Whether a request of this kind carries payload, and which way it goes.
    #[inline]
    #[must_use]
    pub fn payload(self) -> Option<Direction> {
        // Asked of every request: each line is a look at one bit, where a `match` would be a jump by table.
        if matches!(self, Self::Read | Self::GetId | Self::Fill) {
            Some(Direction::In)
        } else if matches!(self, Self::Write | Self::Send | Self::Transmit) {
            Some(Direction::Out)
        } else {
            None
        }
    }
}

/// How a request ended, by its driver's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The device failed the request.
    Io = 1,
    /// The device or driver does not do this.
    Unsupported = 2,
    /// Range or alignment is wrong.
    Invalid = 3,
    /// The medium has no space left.
    NoSpace = 4,
    /// The device is read-only.
    ReadOnly = 5,
    /// The device broke its specification.
    DeviceFault = 6,
}

impl Status {
    /// The status of a number, if it is one.
    #[must_use]
    pub fn from_word(word: u32) -> Option<Self> {
        Some(match word {
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
}

/// Appends the words of one request. `argument` is what the service says (an offset in bytes), `length` is bytes.
#[inline]
pub fn push_request(words: &mut Vec<u64>, token: u32, op: IoOp, flags: u8, argument: u64, length: u64) {
    // A slice, not the array by itself: three stores, where that is a call that copies.
    words.extend_from_slice(&[u64::from(token) | (op as u64) << 32 | u64::from(flags) << 40, argument, length]);
}

/// Appends the words of one response: what the device wrote for `token`, and the `status-in` bytes.
pub fn push_response(words: &mut Vec<u32>, token: u32, written: u32, status: &[u8]) {
    words.extend([token, written, status.len() as u32]);
    push_bytes(words, status);
}

/// Checks answer words: exactly one pair per token of `responses`, in any order. On success `out` holds one (position in `responses`, status) per
/// response; on error it is empty. Allocates nothing once `out` has grown to [`MAX_BATCH`].
///
/// # Errors
/// [`AnswerError`]; the guest is to blame, but for `TooManyResponses`.
pub fn parse_answers(words: &[u32], responses: &[u32], out: &mut Vec<(usize, Status)>) -> Result<(), AnswerError> {
    out.clear();
    let result = answers(words, responses, out);
    if result.is_err() {
        out.clear();
    }
    result
}

fn answers(words: &[u32], responses: &[u32], out: &mut Vec<(usize, Status)>) -> Result<(), AnswerError> {
    if responses.len() > MAX_BATCH {
        return Err(AnswerError::TooManyResponses(responses.len()));
    }
    if words.len() != 2 * responses.len() {
        return Err(AnswerError::Count { words: words.len(), responses: responses.len() });
    }
    let mut seen = Seen::default();
    for pair in words.chunks_exact(2) {
        let (token, status) = (pair[0], pair[1]);
        let index = match seen.take(token, responses.len(), |index| responses[index]) {
            Ok(index) => index,
            Err(Unseen::Unknown) => return Err(AnswerError::UnknownToken(token)),
            Err(Unseen::Duplicate) => return Err(AnswerError::DuplicateToken(token)),
        };
        let status = Status::from_word(status).ok_or(AnswerError::Status { token, status })?;
        out.push((index, status));
    }
    // As many pairs as responses and none twice: every one is answered.
    Ok(())
}

/// One segment for [`push_chain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentWords<'a> {
    /// `header-out` with these bytes.
    HeaderOut(&'a [u8]),
    /// `payload-out`.
    PayloadOut {
        /// Offset into the payload in bytes.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// `payload-in`.
    PayloadIn {
        /// Offset into the payload in bytes.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// `status-in` of this many bytes.
    StatusIn(u32),
}

/// Appends the words of one chain, unchecked: for native stand-ins of a driver and for tests.
pub fn push_chain(words: &mut Vec<u32>, token: u32, queue: u16, segments: &[SegmentWords<'_>]) {
    words.extend([token, u32::from(queue) | (segments.len() as u32) << 16]);
    for segment in segments {
        match *segment {
            SegmentWords::HeaderOut(bytes) => {
                words.push((bytes.len() as u32) << 4);
                push_bytes(words, bytes);
            }
            SegmentWords::PayloadOut { offset, length } => words.extend([1 | length << 4, offset]),
            SegmentWords::PayloadIn { offset, length } => words.extend([2 | length << 4, offset]),
            SegmentWords::StatusIn(length) => words.push(3 | length << 4),
        }
    }
}

/// Appends the words of one refusal.
pub fn push_refusal(words: &mut Vec<u32>, token: u32, status: Status) {
    words.extend([token, u32::from(REFUSED) | (status as u32) << 24]);
}

fn push_bytes(words: &mut Vec<u32>, bytes: &[u8]) {
    for chunk in bytes.chunks(4) {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        words.push(u32::from_le_bytes(word));
    }
}

/// Which of at most [`MAX_BATCH`] tokens were met.
#[derive(Default)]
pub(crate) struct Seen {
    bits: u64,
    next: usize,
}

pub(crate) enum Unseen {
    Unknown,
    Duplicate,
}

impl Seen {
    /// The position of `token` among `count` tokens, met for the first time. A driver that keeps the order costs one compare.
    #[inline]
    pub(crate) fn take(&mut self, token: u32, count: usize, at: impl Fn(usize) -> u32) -> Result<usize, Unseen> {
        let is_free = |index: usize| self.bits & (1 << index) == 0;
        let index = if self.next < count && at(self.next) == token && is_free(self.next) {
            self.next
        } else if let Some(index) = (0..count).find(|&index| at(index) == token && is_free(index)) {
            index
        } else if (0..count).any(|index| at(index) == token) {
            return Err(Unseen::Duplicate);
        } else {
            return Err(Unseen::Unknown);
        };
        self.bits |= 1 << index;
        self.next = index + 1;
        Ok(index)
    }

    /// The position after the one that was met last, if there is one and it was not met.
    #[inline(always)]
    pub(crate) fn next_of<'a, T>(&self, all: &'a [T]) -> Option<(usize, &'a T)> {
        let item = all.get(self.next)?;
        (self.bits >> self.next & 1 == 0).then_some((self.next, item))
    }

    /// Meets what [`Seen::next_of`] answered.
    #[inline(always)]
    pub(crate) fn take_next(&mut self) {
        self.bits |= 1 << self.next;
        self.next += 1;
    }

    /// The first position of `count` that was not met.
    pub(crate) fn first_missing(&self, count: usize) -> Option<usize> {
        let index = (!self.bits).trailing_zeros() as usize;
        (index < count).then_some(index)
    }
}
