//! The check of a guest's chain words ("Chain words" of `wit/block.wit`).
//!
//! A guest says what to put on a ring; nothing of it is believed before [`ChainBatch::parse`] has been over all of it. What comes out are
//! [`Chain`]s: there is no other way to make one, and [`crate::SplitQueue::add`] takes nothing else. A payload segment of a `Chain` is an I/O address inside
//! the buffer that the host leased for that very request (DESIGN D1).
//!
//! A batch is believed whole or not at all: a guest that breaks a rule once is at fault, and what else it said is not worth acting on.
//!
//! ```
//! use cofferdam_device::words::{self, SegmentWords};
//! use cofferdam_device::{ChainBatch, Direction, Expected, Outcome, Payload};
//!
//! let request = Expected { token: 7, payload: Some(Payload { iova: 0x10_0000, length: 4096, direction: Direction::In }) };
//! let mut words = Vec::new();
//! let read = [SegmentWords::HeaderOut(&[0; 16]), SegmentWords::PayloadIn { offset: 0, length: 4096 }, SegmentWords::StatusIn(1)];
//! words::push_chain(&mut words, 7, 0, &read);
//!
//! let mut batch = ChainBatch::new();
//! batch.parse(&words, &[request], &[0])?;
//! let Some(Outcome::Chain(chain)) = batch.get(0) else { panic!("not a chain") };
//! assert_eq!((chain.token(), chain.writable_bytes()), (7, 4097));
//!
//! // One byte too far, and nothing of the batch is believed.
//! words[8] = 1;
//! assert!(batch.parse(&words, &[request], &[0]).is_err());
//! assert_eq!(batch.len(), 0);
//! # Ok::<(), cofferdam_device::ChainError>(())
//! ```

use std::ops::Range;

use crate::error::{ChainError, ChainRule};
use crate::words::{MAX_BATCH, MAX_HEADER_BYTES, MAX_SEGMENTS, MAX_STATUS_BYTES, REFUSED, Seen, Status, Unseen};

/// Which way a payload goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads it (a write).
    Out,
    /// The device writes it (a read, get-id).
    In,
}

/// The memory of one request's payload. The caller vouches that it is leased for the request until the device has used its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// I/O address of the first byte; `iova + length` does not run over 2^64.
    pub iova: u64,
    /// Bytes.
    pub length: u32,
    /// Who writes it.
    pub direction: Direction,
}

/// One request that a guest was given and has to answer for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Its token; no two of one call are the same.
    pub token: u32,
    /// Its payload; `None` for flush, discard and write-zeroes.
    pub payload: Option<Payload>,
}

/// One piece of a checked chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Part of the chain's header bytes, by offset in them.
    Header { offset: u8, length: u8 },
    /// Part of the payload, by I/O address.
    Payload { iova: u64, length: u32, direction: Direction },
    /// Part of the chain's status bytes, by offset in them.
    Status { offset: u8, length: u8 },
}

/// What a chain is made of, but for its segments.
#[derive(Clone, Copy, Debug)]
struct Head {
    token: u32,
    queue: u16,
    request: u16,
    status_len: u8,
    writable: u32,
}

#[derive(Clone, Debug)]
enum Entry {
    Chain { head: Head, header: Range<u32>, segments: Range<u32> },
    Refused { token: u32, request: u16, status: Status },
}

/// A chain that was checked against every rule of the layout. Borrowed from a [`ChainBatch`] or a [`ChainBuf`]; cannot be made otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    head: &'a Head,
    header: &'a [u8],
    segments: &'a [Segment],
}

impl Chain<'_> {
    /// The request that it serves.
    #[must_use]
    pub fn token(&self) -> u32 {
        self.head.token
    }

    /// Position of that request in the list that was given to [`ChainBatch::parse`].
    #[must_use]
    pub fn request(&self) -> usize {
        usize::from(self.head.request)
    }

    /// The queue it goes on, one of the lane's.
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.head.queue
    }

    /// Segments, 1 to 130: the descriptors that a direct chain takes.
    #[must_use]
    pub fn segment_count(&self) -> u16 {
        self.segments.len() as u16
    }

    /// Bytes that the device may write: payload-in and status-in.
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        self.head.writable
    }

    /// Bytes of `status-in`, at most 64.
    #[must_use]
    pub fn status_bytes(&self) -> usize {
        usize::from(self.head.status_len)
    }

    /// The bytes of `header-out`, at most 64.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        self.header
    }

    /// A copy that owns itself, for a chain that has to wait for room. Allocates: not for the ordinary way.
    #[must_use]
    pub fn to_buf(&self) -> ChainBuf {
        ChainBuf { head: *self.head, header: self.header.into(), segments: self.segments.into() }
    }

    pub(crate) fn segments(&self) -> &[Segment] {
        self.segments
    }
}

/// A [`Chain`] that owns itself.
#[derive(Clone, Debug)]
pub struct ChainBuf {
    head: Head,
    header: Box<[u8]>,
    segments: Box<[Segment]>,
}

impl ChainBuf {
    /// The chain.
    #[must_use]
    pub fn chain(&self) -> Chain<'_> {
        Chain { head: &self.head, header: &self.header, segments: &self.segments }
    }
}

/// What a guest made of one request.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// Put this on its queue.
    Chain(Chain<'a>),
    /// Nothing is published; answer the request with `status`.
    Refused {
        /// The request's token.
        token: u32,
        /// Its position in the list given to [`ChainBatch::parse`].
        request: usize,
        /// Never [`Status::Ok`].
        status: Status,
    },
}

/// The checked output of one `submit` call. Keep one per lane: its memory is used again, so a call allocates nothing once it has grown.
#[derive(Debug, Default)]
pub struct ChainBatch {
    entries: Vec<Entry>,
    /// The header bytes of all chains, one after another.
    headers: Vec<u8>,
    /// The segments of all chains, one after another.
    segments: Vec<Segment>,
    scratch: Vec<(u32, u32)>,
}

impl ChainBatch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks `words`, the guest's answer to `requests` (at most 64, tokens not repeated), for a lane that serves `queues`.
    ///
    /// Afterwards the batch holds exactly one [`Outcome`] per request, in the guest's order. On error it is empty.
    ///
    /// # Errors
    /// [`ChainError`]; the guest is to blame, but for `TooManyRequests`.
    pub fn parse(&mut self, words: &[u32], requests: &[Expected], queues: &[u16]) -> Result<(), ChainError> {
        self.clear();
        let result = self.parse_entries(words, requests, queues);
        if result.is_err() {
            self.clear();
        }
        result
    }

    /// Forgets everything, keeping the memory.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.headers.clear();
        self.segments.clear();
    }

    /// Outcomes held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The outcome at `index`, in the guest's order.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Outcome<'_>> {
        self.entries.get(index).map(|entry| self.outcome(entry))
    }

    /// All outcomes, in the guest's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Outcome<'_>> {
        self.entries.iter().map(|entry| self.outcome(entry))
    }

    fn outcome<'a>(&'a self, entry: &'a Entry) -> Outcome<'a> {
        match entry {
            Entry::Chain { head, header, segments } => Outcome::Chain(Chain {
                head,
                header: &self.headers[header.start as usize..header.end as usize],
                segments: &self.segments[segments.start as usize..segments.end as usize],
            }),
            Entry::Refused { token, request, status } => {
                Outcome::Refused { token: *token, request: usize::from(*request), status: *status }
            }
        }
    }

    fn parse_entries(&mut self, words: &[u32], requests: &[Expected], queues: &[u16]) -> Result<(), ChainError> {
        if requests.len() > MAX_BATCH {
            return Err(ChainError::TooManyRequests(requests.len()));
        }
        let mut words = Words(words);
        let mut seen = Seen::default();
        while let Some(token) = words.next() {
            let blame = |rule| ChainError::Rule { token, rule };
            let request = seen.take(token, requests.len(), |index| requests[index].token).map_err(|unseen| {
                blame(match unseen {
                    Unseen::Unknown => ChainRule::UnknownToken,
                    Unseen::Duplicate => ChainRule::DuplicateToken,
                })
            })?;
            let entry = self.parse_entry(&mut words, &requests[request], request as u16, queues).map_err(blame)?;
            self.entries.push(entry);
        }
        match seen.first_missing(requests.len()) {
            None => Ok(()),
            Some(index) => Err(ChainError::Rule { token: requests[index].token, rule: ChainRule::MissingToken }),
        }
    }

    fn parse_entry(
        &mut self,
        words: &mut Words<'_>,
        expected: &Expected,
        request: u16,
        queues: &[u16],
    ) -> Result<Entry, ChainRule> {
        let token = expected.token;
        let word = words.next().ok_or(ChainRule::Truncated)?;
        let [low, high, count, top] = word.to_le_bytes();
        let queue = u16::from_le_bytes([low, high]);
        if queue == REFUSED {
            if count != 0 {
                return Err(ChainRule::RefusedWithSegments);
            }
            return match Status::from_word(u32::from(top)) {
                None | Some(Status::Ok) => Err(ChainRule::RefusedStatus(top)),
                Some(status) => Ok(Entry::Refused { token, request, status }),
            };
        }
        if !queues.contains(&queue) {
            return Err(ChainRule::Queue(queue));
        }
        if top != 0 {
            return Err(ChainRule::Reserved);
        }
        if count == 0 || usize::from(count) > MAX_SEGMENTS {
            return Err(ChainRule::SegmentCount(count));
        }
        let (header_start, start) = (self.headers.len(), self.segments.len());
        let mut checks = Checks::new(expected.payload);
        for _ in 0..count {
            let segment = checks.segment(words, &mut self.headers)?;
            self.segments.push(segment);
        }
        if !checks.ascending {
            self.check_overlap(start, expected.payload)?;
        }
        // Segments lie inside and do not overlap, so a sum that is short is a hole.
        if checks.covered < u64::from(expected.payload.map_or(0, |payload| payload.length)) {
            return Err(ChainRule::Uncovered);
        }
        let head = Head {
            token,
            queue,
            request,
            status_len: checks.status_len,
            writable: u32::try_from(checks.writable).map_err(|_| ChainRule::OutOfPayload)?,
        };
        // At most 64 chains of 64 bytes and 130 segments: 32 bits are enough.
        let header = header_start as u32..self.headers.len() as u32;
        Ok(Entry::Chain { head, header, segments: start as u32..self.segments.len() as u32 })
    }

    /// The long way, for payload segments that do not come in ascending order.
    fn check_overlap(&mut self, start: usize, payload: Option<Payload>) -> Result<(), ChainRule> {
        let base = payload.map_or(0, |payload| payload.iova);
        self.scratch.clear();
        self.scratch.extend(self.segments[start..].iter().filter_map(|segment| match *segment {
            // The difference is an offset into the payload, so it fits 32 bits.
            Segment::Payload { iova, length, .. } => Some(((iova - base) as u32, length)),
            Segment::Header { .. } | Segment::Status { .. } => None,
        }));
        self.scratch.sort_unstable();
        let overlaps =
            self.scratch.windows(2).any(|pair| u64::from(pair[0].0) + u64::from(pair[0].1) > u64::from(pair[1].0));
        if overlaps { Err(ChainRule::Overlap) } else { Ok(()) }
    }
}

/// A guest's list, read from the front.
struct Words<'a>(&'a [u32]);

impl Words<'_> {
    #[inline]
    fn next(&mut self) -> Option<u32> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    #[inline]
    fn take(&mut self, count: usize) -> Option<&[u32]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}

/// What has to be known of the segments before this one.
struct Checks {
    payload: Option<Payload>,
    header_len: u8,
    status_len: u8,
    /// At most the payload and 64 bytes, because overlap is refused; 130 segments of 2^28 bytes before that is known.
    writable: u64,
    /// End of the last payload segment, in bytes of the payload.
    end: u64,
    /// Sum of the payload segments' lengths.
    covered: u64,
    ascending: bool,
    writing: bool,
}

impl Checks {
    fn new(payload: Option<Payload>) -> Self {
        Self { payload, header_len: 0, status_len: 0, writable: 0, end: 0, covered: 0, ascending: true, writing: false }
    }

    #[inline]
    fn segment(&mut self, words: &mut Words<'_>, headers: &mut Vec<u8>) -> Result<Segment, ChainRule> {
        let word = words.next().ok_or(ChainRule::Truncated)?;
        let (kind, length) = ((word & 0xf) as u8, word >> 4);
        if kind > 3 {
            return Err(ChainRule::Kind(kind));
        }
        if length == 0 {
            return Err(ChainRule::EmptySegment);
        }
        let writes = kind >= 2;
        if self.writing && !writes {
            return Err(ChainRule::Order);
        }
        self.writing = writes;
        match kind {
            0 => self.header_out(length, words, headers),
            3 => self.status_in(length),
            _ => self.payload(if writes { Direction::In } else { Direction::Out }, length, words),
        }
    }

    fn header_out(&mut self, length: u32, words: &mut Words<'_>, headers: &mut Vec<u8>) -> Result<Segment, ChainRule> {
        let offset = self.header_len;
        if length > MAX_HEADER_BYTES as u32 - u32::from(offset) {
            return Err(ChainRule::HeaderBytes);
        }
        let given = words.take(length.div_ceil(4) as usize).ok_or(ChainRule::Truncated)?;
        let end = headers.len() + length as usize;
        headers.reserve(MAX_HEADER_BYTES);
        for word in given {
            headers.extend_from_slice(&word.to_le_bytes());
        }
        if headers[end..].iter().any(|&padding| padding != 0) {
            return Err(ChainRule::Padding);
        }
        headers.truncate(end);
        self.header_len += length as u8;
        Ok(Segment::Header { offset, length: length as u8 })
    }

    fn status_in(&mut self, length: u32) -> Result<Segment, ChainRule> {
        let offset = self.status_len;
        if length > MAX_STATUS_BYTES as u32 - u32::from(offset) {
            return Err(ChainRule::StatusBytes);
        }
        self.status_len += length as u8;
        self.writable += u64::from(length);
        Ok(Segment::Status { offset, length: length as u8 })
    }

    fn payload(&mut self, direction: Direction, length: u32, words: &mut Words<'_>) -> Result<Segment, ChainRule> {
        let offset = words.next().ok_or(ChainRule::Truncated)?;
        let payload = self.payload.ok_or(ChainRule::NoPayload)?;
        if payload.direction != direction {
            return Err(ChainRule::Direction);
        }
        let end = u64::from(offset) + u64::from(length);
        if end > u64::from(payload.length) {
            return Err(ChainRule::OutOfPayload);
        }
        self.ascending &= u64::from(offset) >= self.end;
        self.end = end;
        self.covered += u64::from(length);
        if direction == Direction::In {
            self.writable += u64::from(length);
        }
        Ok(Segment::Payload { iova: payload.iova + u64::from(offset), length, direction })
    }
}
