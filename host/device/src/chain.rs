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

mod checks;

use checks::{Checks, Common, Words};

use crate::error::{ChainError, ChainRule};
pub(crate) use checks::{PACKET_HEADER_BYTES, WHOLE_HEADER_BYTES};

use crate::words::{MAX_BATCH, MAX_HEADER_BYTES, MAX_SEGMENTS, REFUSED, Seen, Status, Unseen};

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

/// What a segment of a checked chain is, in the numbers of the layout: the device writes the two last ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Part of the chain's header bytes.
    Header = 0,
    /// Part of the payload, read by the device.
    PayloadOut = 1,
    /// Part of the payload, written by the device.
    PayloadIn = 2,
    /// Part of the chain's status bytes.
    Status = 3,
}

/// One piece of a checked chain: 16 bytes, which are made and used in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Of a payload its I/O address; else the offset in the header or the status bytes.
    pub(crate) place: u64,
    /// Bytes.
    pub(crate) length: u32,
    pub(crate) kind: Kind,
}

/// What a guest made of one request, in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    /// The commonest chain ([`Whole`]): what is particular to it is in the head.
    Whole,
    /// The next commonest, without a status: header and payload of a packet. What is particular to it is in the head.
    Packet,
    /// Any other chain: header bytes and segments are apart.
    Pieces,
    /// None; the rest of the head is 0.
    Refused(Status),
}

/// What the guest made of one request, but for the segments and header bytes of a chain that is made of pieces.
#[derive(Clone, Copy, Debug)]
struct Head {
    token: u32,
    writable: u32,
    /// Of a whole chain and of a packet's, where zeroes follow.
    header: [u8; WHOLE_HEADER_BYTES],
    /// Of a whole chain and of a packet's.
    payload: Segment,
    /// Index of the first segment in `ChainBatch::segments`.
    first: u32,
    queue: u16,
    request: u16,
    segments: u8,
    header_len: u8,
    status_len: u8,
    made: Made,
}

const NO_SEGMENT: Segment = Segment { place: 0, length: 0, kind: Kind::Header };

/// The header bytes of one chain.
type Header = [u8; MAX_HEADER_BYTES];

/// A chain that was checked against every rule of the layout. Borrowed from a [`ChainBatch`] or a [`ChainBuf`]; cannot be made otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    head: &'a Head,
    header: &'a [u8],
    segments: &'a [Segment],
}

impl Chain<'_> {
    /// The request that it serves.
    #[inline]
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
    #[inline]
    #[must_use]
    pub fn queue(&self) -> u16 {
        self.head.queue
    }

    /// Segments, 1 to 130: the descriptors that a direct chain takes.
    #[inline]
    #[must_use]
    pub fn segment_count(&self) -> u16 {
        u16::from(self.head.segments)
    }

    /// Bytes that the device may write: payload-in and status-in.
    #[inline]
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        self.head.writable
    }

    /// Bytes of `status-in`, at most 64.
    #[inline]
    #[must_use]
    pub fn status_bytes(&self) -> usize {
        usize::from(self.head.status_len)
    }

    /// The bytes of `header-out`, at most 64.
    #[inline]
    #[must_use]
    pub fn header(&self) -> &[u8] {
        self.header
    }

    /// The header bytes and the payload of a chain of three segments: so many header bytes, the whole payload, a status.
    #[inline(always)]
    pub(crate) fn whole(&self) -> Option<(&[u8; WHOLE_HEADER_BYTES], &Segment)> {
        (self.head.made == Made::Whole).then_some((&self.head.header, &self.head.payload))
    }

    /// The header bytes, with zeroes behind them, and the payload of a chain of two segments: so many header bytes ([`PACKET_HEADER_BYTES`]), the whole payload.
    #[inline(always)]
    pub(crate) fn packet(&self) -> Option<(&[u8; WHOLE_HEADER_BYTES], &Segment)> {
        (self.head.made == Made::Packet).then_some((&self.head.header, &self.head.payload))
    }

    /// A copy that owns itself, for a chain that has to wait for room. Allocates: not for the ordinary way.
    #[must_use]
    pub fn to_buf(&self) -> ChainBuf {
        ChainBuf { head: *self.head, header: self.header.into(), segments: self.segments.into() }
    }

    /// Calls `each` with every segment, and whether it is the last.
    #[inline]
    pub(crate) fn each_segment(&self, mut each: impl FnMut(&Segment, bool)) {
        if let Some((_, payload)) = self.whole() {
            each(&Segment { place: 0, length: WHOLE_HEADER_BYTES as u32, kind: Kind::Header }, false);
            each(payload, false);
            each(&Segment { place: 0, length: u32::from(self.head.status_len), kind: Kind::Status }, true);
        } else if let Some((_, payload)) = self.packet() {
            each(&Segment { place: 0, length: PACKET_HEADER_BYTES as u32, kind: Kind::Header }, false);
            each(payload, true);
        } else if let Some((last, others)) = self.segments.split_last() {
            others.iter().for_each(|segment| each(segment, false));
            each(last, true);
        }
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
    entries: Vec<Head>,
    /// The header bytes of each entry that is made of pieces, in places of one size: a chain's are written once, without looking for room. Not shorter than `entries`.
    headers: Vec<Header>,
    /// The segments of all chains that are made of pieces, one after another.
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
        Some(self.outcome(index, self.entries.get(index)?))
    }

    /// All outcomes, in the guest's order.
    #[inline]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Outcome<'_>> {
        self.entries.iter().enumerate().map(|(index, head)| self.outcome(index, head))
    }

    #[inline]
    fn outcome<'a>(&'a self, index: usize, head: &'a Head) -> Outcome<'a> {
        match head.made {
            Made::Whole => Outcome::Chain(Chain { head, header: &head.header, segments: &[] }),
            Made::Packet => Outcome::Chain(Chain { head, header: &head.header[..PACKET_HEADER_BYTES], segments: &[] }),
            Made::Pieces => {
                let (first, header) = (head.first as usize, &self.headers[index]);
                Outcome::Chain(Chain {
                    head,
                    header: &header[..usize::from(head.header_len)],
                    segments: &self.segments[first..first + usize::from(head.segments)],
                })
            }
            Made::Refused(status) => Outcome::Refused { token: head.token, request: usize::from(head.request), status },
        }
    }

    fn parse_entries(&mut self, words: &[u32], requests: &[Expected], queues: &[u16]) -> Result<(), ChainError> {
        if requests.len() > MAX_BATCH {
            return Err(ChainError::TooManyRequests(requests.len()));
        }
        let mut words = Words(words);
        let mut seen = Seen::default();
        if self.headers.len() < requests.len() {
            self.headers.resize(requests.len(), [0; MAX_HEADER_BYTES]);
        }
        self.entries.reserve(requests.len());
        let common = Common::new(queues);
        loop {
            // A driver that keeps the order and makes nothing but whole chains, or nothing but packets, never gets beyond these before the end.
            self.parse_alike(&mut words, requests, &mut seen, |words, expected, at| common.whole(words, expected, at));
            self.parse_alike(&mut words, requests, &mut seen, |words, expected, at| common.packet(words, expected, at));
            let Some(token) = words.next() else { break };
            let blame = |rule| ChainError::Rule { token, rule };
            let request = seen.take(token, requests.len(), |index| requests[index].token).map_err(|unseen| {
                blame(match unseen {
                    Unseen::Unknown => ChainRule::UnknownToken,
                    Unseen::Duplicate => ChainRule::DuplicateToken,
                })
            })?;
            self.parse_entry(&mut words, &requests[request], request as u16, queues).map_err(blame)?;
        }
        match seen.first_missing(requests.len()) {
            None => Ok(()),
            Some(index) => Err(ChainError::Rule { token: requests[index].token, rule: ChainRule::MissingToken }),
        }
    }

    /// Chains of a kind that is known in one step (`look`), in the order of the requests, as long as there is one.
    #[inline(always)]
    fn parse_alike<'a>(
        &mut self,
        words: &mut Words<'a>,
        requests: &[Expected],
        seen: &mut Seen,
        look: impl Fn(&'a [u32], &Expected, u16) -> Option<(&'a [u32], Head)>,
    ) {
        while let Some((next, expected)) = seen.next_of(requests)
            && let Some((rest, head)) = look(words.0, expected, next as u16)
        {
            words.0 = rest;
            self.entries.push(head);
            seen.take_next();
        }
    }

    #[inline]
    fn parse_entry(
        &mut self,
        words: &mut Words<'_>,
        expected: &Expected,
        request: u16,
        queues: &[u16],
    ) -> Result<(), ChainRule> {
        let token = expected.token;
        let word = words.next().ok_or(ChainRule::Truncated)?;
        let [low, high, count, top] = word.to_le_bytes();
        let queue = u16::from_le_bytes([low, high]);
        let first = self.segments.len();
        let mut head = Head {
            token,
            writable: 0,
            // At most 64 chains of 130 segments: 32 bits are enough.
            first: first as u32,
            header: [0; WHOLE_HEADER_BYTES],
            payload: NO_SEGMENT,
            queue,
            request,
            segments: count,
            header_len: 0,
            status_len: 0,
            made: Made::Pieces,
        };
        if queue == REFUSED {
            if count != 0 {
                return Err(ChainRule::RefusedWithSegments);
            }
            match Status::from_word(u32::from(top)) {
                None | Some(Status::Ok) => return Err(ChainRule::RefusedStatus(top)),
                Some(status) => head.made = Made::Refused(status),
            }
            self.entries.push(head);
            return Ok(());
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
        let mut checks = Checks::new(expected.payload);
        // Each request is met once, so there is a place for the header of each entry.
        let header = &mut self.headers[self.entries.len()];
        self.segments.reserve(usize::from(count));
        for _ in 0..count {
            let segment = checks.segment(words, header)?;
            self.segments.push(segment);
        }
        if !checks.ascending {
            self.check_overlap(first, expected.payload)?;
        }
        // Segments lie inside and do not overlap, so a sum that is short is a hole.
        if checks.covered < u64::from(expected.payload.map_or(0, |payload| payload.length)) {
            return Err(ChainRule::Uncovered);
        }
        head.header_len = checks.header_len;
        head.status_len = checks.status_len;
        head.writable = u32::try_from(checks.writable).map_err(|_| ChainRule::OutOfPayload)?;
        self.entries.push(head);
        Ok(())
    }

    /// The long way, for payload segments that do not come in ascending order.
    #[cold]
    fn check_overlap(&mut self, start: usize, payload: Option<Payload>) -> Result<(), ChainRule> {
        let base = payload.map_or(0, |payload| payload.iova);
        self.scratch.clear();
        self.scratch.extend(self.segments[start..].iter().filter_map(|segment| match segment.kind {
            // The difference is an offset into the payload, so it fits 32 bits.
            Kind::PayloadOut | Kind::PayloadIn => Some(((segment.place - base) as u32, segment.length)),
            Kind::Header | Kind::Status => None,
        }));
        self.scratch.sort_unstable();
        let overlaps =
            self.scratch.windows(2).any(|pair| u64::from(pair[0].0) + u64::from(pair[0].1) > u64::from(pair[1].0));
        if overlaps { Err(ChainRule::Overlap) } else { Ok(()) }
    }
}
