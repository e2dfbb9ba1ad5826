//! Errors of this crate, by who is to blame.
//!
//! | type | to blame |
//! | --- | --- |
//! | [`TransportError`] | the device or the bus behind it, but for `Invalid` (the caller) and `Io` (the host system) |
//! | [`DeviceFault`] | the device: it broke the virtio specification |
//! | [`ChainError`], [`AnswerError`] | the guest: its words break the layout of `wit/block.wit` |
//! | [`AddError`] | see each variant |
//! | [`ArenaError`], [`RegionError`], [`QueueError`] | the caller, or the host system is short of memory |

use std::io;

use thiserror::Error;

/// Why a transport could not do what it was asked.
#[derive(Debug, Error)]
pub enum TransportError {
    /// The device is gone: its backend died or its function was removed. Nothing but a reconnect helps.
    #[error("the device is gone")]
    Lost,
    /// The device did not answer in the transport's own time limit.
    #[error("the device did not answer in time")]
    Timeout,
    /// The device broke the protocol of its bus; the text says how.
    #[error("the device broke its protocol: {0}")]
    Protocol(String),
    /// The device understood and refused, or cannot do what is needed.
    #[error("the device refused: {0}")]
    Refused(String),
    /// The device's bus has no way to do this; the text says what it lacks. Asking again does not help.
    #[error("the device cannot do this: {0}")]
    Unsupported(String),
    /// The device has been given all that it takes; something must be taken away first.
    #[error("the device takes no more: {0}")]
    Exhausted(String),
    /// The caller asked for something that is not legal now or not in bounds.
    #[error("invalid use of the transport: {0}")]
    Invalid(String),
    /// The host's own system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, as in "connect /run/blk.sock".
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How a device broke the split virtqueue's rules (virtio 1.2, section 2.7.8). The queue that saw it is poisoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DeviceFault {
    /// `used.idx` moved by more than what is in flight, or backwards.
    #[error("queue {queue}: the device moved used.idx by {advanced} with {in_flight} chains in flight")]
    UsedIndex {
        /// Queue index.
        queue: u16,
        /// How far it moved, modulo 2^16.
        advanced: u16,
        /// Chains that were published and not used.
        in_flight: u16,
    },
    /// A used element names a descriptor outside the table.
    #[error("queue {queue}: the device used id {id}, the ring has {size} entries")]
    UnknownId {
        /// Queue index.
        queue: u16,
        /// The id as the device wrote it.
        id: u32,
        /// Ring size in entries.
        size: u16,
    },
    /// A used element names a descriptor that is not the head of a published chain: never published, or used twice.
    #[error("queue {queue}: the device used id {id}, which is not in flight")]
    NotInFlight {
        /// Queue index.
        queue: u16,
        /// The id as the device wrote it.
        id: u32,
    },
    /// A used element claims more bytes than the chain lets the device write.
    #[error("queue {queue}: the device says it wrote {written} bytes for token {token}, it was offered {offered}")]
    Overrun {
        /// Queue index.
        queue: u16,
        /// Token of the chain.
        token: u32,
        /// Bytes claimed.
        written: u32,
        /// Device-writable bytes of the chain.
        offered: u32,
    },
}

/// Why a chain was not added to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AddError {
    /// Too few free descriptors now: keep the chain ([`crate::Chain::to_buf`]) and try again after a `pop`. Nobody is to blame.
    #[error("no room: the chain needs {needed} descriptors, {free} are free")]
    NoRoom {
        /// Descriptors needed.
        needed: u16,
        /// Descriptors free.
        free: u16,
    },
    /// The chain is longer than the ring and can never be added (virtio 1.2, section 2.7.5.3.1). The guest is to blame: it knows the ring size.
    #[error("a chain of {segments} segments can never fit a ring of {size}")]
    TooLong {
        /// Segments of the chain.
        segments: u16,
        /// Ring size in entries.
        size: u16,
    },
    /// The chain names another queue. The caller is to blame.
    #[error("the chain is for queue {chain}, this is queue {queue}")]
    WrongQueue {
        /// Queue of the chain.
        chain: u16,
        /// This queue.
        queue: u16,
    },
    /// The queue is poisoned by an earlier fault of the device.
    #[error("the queue is poisoned: {0}")]
    Poisoned(#[from] DeviceFault),
}

/// Why a queue cannot be laid out. The caller is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum QueueError {
    /// Not a power of two from 1 to 32,768 (virtio 1.2, section 2.7).
    #[error("a ring of {0} entries: not a power of two from 1 to 32768")]
    Size(u16),
    /// The place is not aligned to [`crate::queue::QUEUE_ALIGN_BYTES`].
    #[error("the ring's offset {0} is not aligned")]
    Alignment(u64),
    /// The place crosses the end of a page of a region that is scattered ([`crate::DmaRegion::page_bytes`]).
    #[error("a ring of {bytes} bytes at {offset} is not in one run")]
    Scattered {
        /// Offset of the ring in bytes.
        offset: u64,
        /// Length of the ring in bytes.
        bytes: u64,
    },
    /// The place does not fit the region.
    #[error("a ring of {bytes} bytes at {offset} does not fit a region of {region_bytes}")]
    OutOfRegion {
        /// Offset of the ring in bytes.
        offset: u64,
        /// Bytes of the ring.
        bytes: u64,
        /// Bytes of the region.
        region_bytes: u64,
    },
    /// What is said of posted buffers that are to be gone on with cannot be. Whoever said so is to blame.
    #[error("the posted buffers cannot be as they are said to be: {0}")]
    Standing(&'static str),
    /// A ring that was to be gone on with is not where it was said to be. Whoever said so is to blame, or the device.
    #[error("the ring stands at {available} available and {used} used, not at {expected}: something is on it")]
    Moved {
        /// `avail.idx` in memory.
        available: u16,
        /// `used.idx` in memory.
        used: u16,
        /// What both were said to be.
        expected: u16,
    },
}

/// Why a DMA region cannot be made or reached.
#[derive(Debug, Error)]
pub enum RegionError {
    /// The memory was taken away; it reaches nothing any more.
    #[error("the memory was revoked")]
    Revoked,
    /// Length or I/O address is zero-sized, not a multiple of the page size, or runs over 2^64. The caller is to blame.
    #[error(
        "a region of {bytes} bytes at {iova:#x}: both must be multiples of 4096, the length not 0, the end below 2^64"
    )]
    Shape {
        /// Bytes asked for.
        bytes: u64,
        /// I/O address asked for.
        iova: u64,
    },
    /// A file that was handed over to be a region, and that its holders could resize. Whoever sent it is to blame.
    #[error("not memory that was made for a device: it is not sealed")]
    Unsealed,
    /// An access outside the region, or an atomic one that is not aligned. The caller is to blame.
    #[error("{bytes} bytes at {offset} are outside the region of {region_bytes} bytes or not aligned")]
    OutOfRange {
        /// Offset of the access.
        offset: u64,
        /// Its length in bytes.
        bytes: u64,
        /// Length of what was accessed.
        region_bytes: u64,
    },
    /// The host's own system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Why an arena gave no lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ArenaError {
    /// Nothing of that size is free now; something will be when a lease ends. Nobody is to blame.
    #[error("no {bytes} bytes are free in the arena now")]
    Exhausted {
        /// Bytes asked for.
        bytes: u32,
    },
    /// The arena can never give this much, or nothing at all was asked for. The caller is to blame.
    #[error("a lease of {bytes} bytes is not possible: from 1 to {max_bytes}")]
    Size {
        /// Bytes asked for.
        bytes: u32,
        /// Largest possible lease in bytes.
        max_bytes: u32,
    },
    /// The arena was retired: a device may still write to it (DESIGN L1).
    #[error("the arena was retired")]
    Retired,
}

/// Which rule of the chain words (`wit/block.wit`) was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChainRule {
    /// The list ends inside an entry.
    #[error("the list ends inside an entry")]
    Truncated,
    /// The token was not given in this call.
    #[error("the token was not given in this call")]
    UnknownToken,
    /// The token has a chain or refusal already.
    #[error("the token was answered twice")]
    DuplicateToken,
    /// A token that was given has neither chain nor refusal.
    #[error("the token was given and not answered")]
    MissingToken,
    /// The queue is not one of the lane's.
    #[error("queue {0} is not one of the lane's")]
    Queue(u16),
    /// A refusal whose segment count is not 0.
    #[error("a refusal with segments")]
    RefusedWithSegments,
    /// A refusal whose status is `ok` or no status at all.
    #[error("a refusal with status {0}")]
    RefusedStatus(u8),
    /// Bits 24 to 31 of a chain's word 1 are not zero.
    #[error("reserved bits are set")]
    Reserved,
    /// The segment count is not 1 to 130.
    #[error("{0} segments, 1 to 130 are allowed")]
    SegmentCount(u8),
    /// The segment's kind is not 0 to 3.
    #[error("segment kind {0}")]
    Kind(u8),
    /// A segment of no bytes.
    #[error("a segment of length 0")]
    EmptySegment,
    /// A segment that the device reads after one that it writes (virtio 1.2, section 2.7.4.2).
    #[error("an out segment after an in segment")]
    Order,
    /// More than 64 bytes of header-out.
    #[error("more than 64 header bytes")]
    HeaderBytes,
    /// More than 64 bytes of status-in.
    #[error("more than 64 status bytes")]
    StatusBytes,
    /// Header bytes after the stated length are not zero.
    #[error("header padding is not zero")]
    Padding,
    /// A payload segment for a request that has no payload.
    #[error("the request has no payload")]
    NoPayload,
    /// A payload segment against the direction of the request.
    #[error("a payload segment in the wrong direction")]
    Direction,
    /// A payload segment outside the payload.
    #[error("a payload segment outside the payload")]
    OutOfPayload,
    /// Two payload segments overlap.
    #[error("payload segments overlap")]
    Overlap,
    /// The payload segments leave a hole: on a read, a client would be shown what nobody wrote.
    #[error("the payload is not covered by segments")]
    Uncovered,
}

/// A batch of chain words that breaks the layout: the guest is to blame, and nothing of the batch is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChainError {
    /// The words of one token break a rule.
    #[error("chain of token {token}: {rule}")]
    Rule {
        /// The token as the guest wrote it, or that is missing.
        token: u32,
        /// What is broken.
        rule: ChainRule,
    },
    /// The list ends before a token.
    #[error("the chain words end inside the first word of an entry")]
    Empty,
    /// More requests than one call may carry. The caller is to blame.
    #[error("{0} requests in one call, at most 64 are allowed")]
    TooManyRequests(usize),
}

/// A batch of answer words that breaks the layout: the guest is to blame, and nothing of the batch is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum AnswerError {
    /// Not exactly one pair per response.
    #[error("{words} words for {responses} responses")]
    Count {
        /// Words that came.
        words: usize,
        /// Responses that were given.
        responses: usize,
    },
    /// The token was not given in this call.
    #[error("token {0} was not given in this call")]
    UnknownToken(u32),
    /// The token was answered already.
    #[error("token {0} was answered twice")]
    DuplicateToken(u32),
    /// Not a status.
    #[error("token {token}: {status} is not a status")]
    Status {
        /// The token.
        token: u32,
        /// What stands for the status.
        status: u32,
    },
    /// More responses than one call may carry. The caller is to blame.
    #[error("{0} responses in one call, at most 64 are allowed")]
    TooManyResponses(usize),
}
