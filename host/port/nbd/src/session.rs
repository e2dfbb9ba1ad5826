//! One connection in the transmission phase: its requests, from the header to the answer.
//!
//! ```text
//!             judge            lease, issue           admitted           answered
//! header ----> Action ----> Slot + IoRequest* ----> device ----> settle ----> Outbox ----> client
//!        \-> error, or ESHUTDOWN when refusing                        |  FUA: one flush more, then settle again
//!                                                                     \  a long read: next segment
//! ```
//! Bounds, all per connection: slots ([`Limits::requests`]), leased bytes ([`Limits::bytes`]), replies
//! ([`Session::REPLIES_SPARE`] above the slots). What would pass one of them is not read from the socket.
//!
//! Leases and deadlock. A session waits for the arena with one of two things in hand: nothing (a read: all its leases
//! or none), or the pieces of a write that are with the device already, which come back without the client's help. A
//! half-received piece and an unsent reply do depend on the client; the worker severs a client that stalls with one of
//! those in hand while somebody starves ([`Session::stalled_since`]).

use std::time::Instant;

use crate::intake::Rx;
use crate::outbox::Outbox;
use crate::proto::Errno;
use crate::reply::Head;
use crate::request::Rules;
use crate::service::{Buffer, Completion, Disk, HandleState, IoError, IoFlags, IoOp, IoRequest, SubmitError};

/// Pieces of one trim or write-zeroes that are under way at a time.
const RANGE_PIECES: u32 = 4;
/// Requests that are handed over at once; one crossing carries as many (DESIGN section 5).
pub(crate) const BATCH_REQUESTS: usize = 64;

/// Bounds of one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Requests that are not answered.
    pub(crate) requests: usize,
    /// Leased memory.
    pub(crate) bytes: u64,
}

/// What a slot's request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Trim,
    WriteZeroes { may_unmap: bool },
}

/// One request of the client that is not answered. It is answered exactly once, by [`Session::settle`].
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) cookie: u64,
    pub(crate) kind: Kind,
    /// Read: where the present segment begins.
    pub(crate) offset: u64,
    /// Up to where operations were issued.
    pub(crate) next: u64,
    pub(crate) end: u64,
    /// Operations issued and not answered.
    pub(crate) outstanding: u32,
    /// The first error; nothing is issued after it.
    pub(crate) error: Option<Errno>,
    /// A flush has yet to follow.
    pub(crate) fua: bool,
    /// Write: payload is still to come from the client.
    pub(crate) receiving: bool,
    /// Read: the head of a simple reply is gone already.
    pub(crate) headed: bool,
    /// Read: piece length of the present segment.
    pub(crate) piece_bytes: u32,
    /// Read: the first piece that came back, and the others; apart, so that an ordinary read allocates nothing.
    pub(crate) first: Option<Buffer>,
    pub(crate) others: Vec<Option<Buffer>>,
}

impl Slot {
    pub(crate) fn new(cookie: u64, kind: Kind, offset: u64, length: u32) -> Slot {
        Slot {
            cookie,
            kind,
            offset,
            next: offset,
            end: offset + u64::from(length),
            outstanding: 0,
            error: None,
            fua: false,
            receiving: false,
            headed: false,
            piece_bytes: 0,
            first: None,
            others: Vec::new(),
        }
    }
}

/// Why admitted requests have to wait in [`Session::queue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stuck {
    No,
    /// The lane is full.
    Full,
    /// The binding is held.
    Held,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Session<D> {
    pub(crate) disk: D,
    pub(crate) rules: Rules,
    pub(crate) structured: bool,
    pub(crate) limits: Limits,
    pub(crate) piece_bytes: u32,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    pub(crate) live: usize,
    /// Issued, and not admitted yet.
    pub(crate) queue: Vec<IoRequest>,
    pub(crate) stuck: Stuck,
    /// Admitted, and not answered yet.
    pub(crate) in_flight: usize,
    /// Bytes leased for this connection, wherever they are now.
    pub(crate) held_bytes: u64,
    pub(crate) rx: Rx,
    /// The read that is served alone, in segments.
    pub(crate) alone: Option<u32>,
    /// That read wants leases for its next segment.
    pub(crate) resume: bool,
    /// Payload of the last request that was begun, 0 if it had none.
    pub(crate) last_write_bytes: u32,
    /// When the payload that is being received last made progress.
    pub(crate) payload_moved: Instant,
    /// Since when new requests get `NBD_ESHUTDOWN`.
    pub(crate) refused_at: Option<Instant>,
    /// When the device last had nothing more of this connection's.
    pub(crate) idle_at: Instant,
    /// The reply stream cannot be continued truthfully.
    pub(crate) broken: Option<&'static str>,
    /// A lease ended since the worker last looked.
    pub(crate) released: bool,
    pub(crate) outbox: Outbox,
}

impl<D: Disk> Session<D> {
    /// Replies without a slot (refusals) that may wait beside those of all slots.
    const REPLIES_SPARE: usize = 64;

    pub(crate) fn new(disk: D, structured: bool, limits: Limits, now: Instant) -> Session<D> {
        let geometry = disk.geometry();
        let block = geometry.logical_block_bytes.max(1);
        let window = u32::try_from(limits.bytes / 2).unwrap_or(u32::MAX).clamp(1 << 16, 1 << 22);
        let rules = Rules::new(geometry, structured, window);
        let piece_bytes = (geometry.max_transfer_bytes - geometry.max_transfer_bytes % block).max(block);
        Session {
            disk,
            rules,
            structured,
            limits,
            piece_bytes,
            slots: Vec::new(),
            free: Vec::new(),
            live: 0,
            queue: Vec::with_capacity(BATCH_REQUESTS),
            stuck: Stuck::No,
            in_flight: 0,
            held_bytes: 0,
            rx: Rx::Header,
            alone: None,
            resume: false,
            last_write_bytes: 0,
            payload_moved: now,
            refused_at: None,
            idle_at: now,
            broken: None,
            released: false,
            outbox: Outbox::new(now),
        }
    }

    /// Whether one more request may be read.
    pub(crate) fn has_room(&self) -> bool {
        self.live < self.limits.requests
            && self.alone.is_none()
            && self.stuck == Stuck::No
            && self.held_bytes < self.limits.bytes
            && self.outbox.len() < self.limits.requests + Self::REPLIES_SPARE
    }

    /// Since when the client has kept leases waiting: a payload half sent, or answers not read.
    pub(crate) fn stalled_since(&self) -> Option<Instant> {
        let payload = self.rx.holds_lease().then_some(self.payload_moved);
        let replies = (self.outbox.held_bytes() > 0).then_some(self.outbox.moved);
        match (payload, replies) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    pub(crate) fn insert(&mut self, slot: Slot) -> u32 {
        self.live += 1;
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = Some(slot);
            return index;
        }
        self.slots.push(Some(slot));
        self.slots.len() as u32 - 1
    }

    pub(crate) fn remove(&mut self, index: u32) -> Option<Slot> {
        let slot = self.slots.get_mut(index as usize)?.take()?;
        self.live -= 1;
        self.free.push(index);
        Some(slot)
    }

    pub(crate) fn peek(&self, index: u32) -> Option<&Slot> {
        self.slots.get(index as usize)?.as_ref()
    }

    pub(crate) fn slot(&mut self, index: u32) -> Option<&mut Slot> {
        self.slots.get_mut(index as usize)?.as_mut()
    }

    /// Counts a lease as taken.
    pub(crate) fn took(&mut self, buffer: &Buffer) {
        self.held_bytes += u64::from(buffer.len());
    }

    /// Ends a lease.
    pub(crate) fn give_back(&mut self, buffer: Buffer) {
        self.held_bytes -= u64::from(buffer.len());
        self.released = true;
        drop(buffer);
    }

    /// Counts leases that ended in the outbox.
    pub(crate) fn sent(&mut self, released_bytes: u64) {
        self.held_bytes -= released_bytes;
        self.released |= released_bytes > 0;
    }

    /// Queues one operation for slot `index`; `piece` tells the pieces of a read's segment apart.
    pub(crate) fn issue(&mut self, index: u32, piece: u32, op: IoOp, range: (u64, u32), buffer: Option<Buffer>) {
        let mut flags = IoFlags::default();
        if let Some(slot) = self.slot(index) {
            slot.outstanding += 1;
            if slot.kind == (Kind::WriteZeroes { may_unmap: true }) {
                flags = IoFlags::MAY_UNMAP;
            }
        }
        let user = u64::from(index) | u64::from(piece) << 32;
        self.queue.push(IoRequest { user, op, offset: range.0, length: range.1, flags, buffer });
    }

    /// Issues as much of a trim or write-zeroes as may be under way. Pieces end on the device's preferred alignment
    /// where they can.
    pub(crate) fn issue_range(&mut self, index: u32) {
        let geometry = self.disk.geometry();
        let block = u64::from(self.rules.block_bytes);
        let (longest, align) = match self.slots.get(index as usize) {
            Some(Some(Slot { kind: Kind::Trim, .. })) => {
                (geometry.max_discard_bytes, u64::from(geometry.discard_align_bytes))
            }
            _ => (geometry.max_write_zeroes_bytes, 0),
        };
        let longest = (u64::from(longest) - u64::from(longest) % block).max(block);
        loop {
            let Some(slot) = self.slot(index) else { return };
            if slot.next >= slot.end || slot.outstanding >= RANGE_PIECES || slot.error.is_some() {
                return;
            }
            let from = slot.next;
            let mut to = (from + longest).min(slot.end);
            if to < slot.end && align > block && align.is_multiple_of(block) && to - to % align > from {
                to -= to % align;
            }
            slot.next = to;
            let op = if slot.kind == Kind::Trim { IoOp::Discard } else { IoOp::WriteZeroes };
            self.issue(index, 0, op, (from, (to - from) as u32), None);
        }
    }

    /// Hands over what was issued. A revoked handle turns into refusal, here as at any other call.
    pub(crate) fn submit(&mut self, now: Instant) {
        if self.queue.is_empty() {
            self.stuck = Stuck::No;
            return;
        }
        let before = self.queue.len();
        let result = self.disk.submit(&mut self.queue);
        self.in_flight += before - self.queue.len();
        self.stuck = match result {
            Ok(()) if self.queue.is_empty() => Stuck::No,
            Ok(()) | Err(SubmitError::Full | SubmitError::Inside) => Stuck::Full,
            Err(SubmitError::Held) => Stuck::Held,
            Err(SubmitError::Revoked) => Stuck::No,
        };
        if result == Err(SubmitError::Revoked) {
            self.refuse(now);
            self.fail_queue(now);
        }
    }

    /// Answers what was issued and never admitted.
    fn fail_queue(&mut self, now: Instant) {
        self.stuck = Stuck::No;
        for request in std::mem::take(&mut self.queue) {
            self.in_flight += 1;
            self.complete(
                now,
                Completion { user: request.user, result: Err(IoError::Revoked), bytes: 0, buffer: request.buffer },
            );
        }
    }

    /// From now on every new request gets `NBD_ESHUTDOWN`; what was admitted is still answered. Idempotent.
    pub(crate) fn refuse(&mut self, now: Instant) {
        if self.refused_at.is_some() {
            return;
        }
        self.refused_at = Some(now);
        self.abandon_input(now);
        self.fail_queue(now);
        if self.resume
            && let Some(index) = self.alone
        {
            self.resume = false;
            if let Some(slot) = self.slot(index) {
                slot.error = Some(Errno::Shutdown);
            }
            self.settle(now, index);
        }
    }

    /// Looks whether the handle was revoked.
    pub(crate) fn notice_revocation(&mut self, now: Instant) {
        if self.disk.state() == HandleState::Revoked {
            self.refuse(now);
        }
    }

    /// Takes one answer of the device. Completions come from the manager, which answers each admitted request once; one
    /// that fits no slot is dropped.
    pub(crate) fn complete(&mut self, now: Instant, completion: Completion) {
        let Completion { user, result, buffer, .. } = completion;
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.in_flight == 0 {
            self.idle_at = now;
        }
        let (index, piece) = (user as u32, (user >> 32) as usize);
        let Some(slot) = self.slot(index) else {
            if let Some(buffer) = buffer {
                self.give_back(buffer);
            }
            return;
        };
        slot.outstanding = slot.outstanding.saturating_sub(1);
        let mut returned = buffer;
        match result {
            Err(error) => {
                slot.error.get_or_insert(errno(error));
            }
            Ok(()) if slot.kind == Kind::Read => {
                let place = if piece == 0 { Some(&mut slot.first) } else { slot.others.get_mut(piece - 1) };
                if let Some(place) = place {
                    returned = std::mem::replace(place, returned);
                }
            }
            Ok(()) => {}
        }
        let range = matches!(slot.kind, Kind::Trim | Kind::WriteZeroes { .. });
        if let Some(buffer) = returned {
            self.give_back(buffer);
        }
        if range {
            self.issue_range(index);
        }
        self.settle(now, index);
    }

    /// Answers slot `index` if nothing of it is under way any more.
    pub(crate) fn settle(&mut self, now: Instant, index: u32) {
        let Some(slot) = self.slot(index) else { return };
        if slot.outstanding > 0 || slot.receiving {
            return;
        }
        if slot.kind == Kind::Read {
            self.settle_read(now, index);
            return;
        }
        // "NBD_CMD_FLAG_FUA": no reply until what was written is durable. The flush goes out after the writes were
        // answered, so it covers them.
        if slot.fua && slot.error.is_none() {
            slot.fua = false;
            self.issue(index, 0, IoOp::Flush, (0, 0), None);
            return;
        }
        if let Some(slot) = self.remove(index) {
            self.answer(now, slot.cookie, slot.error, false);
        }
    }

    /// Sends the answer to a request that carries no data back.
    pub(crate) fn answer(&mut self, now: Instant, cookie: u64, error: Option<Errno>, read: bool) {
        self.outbox.push(now, Head::answer(cookie, error, self.structured, read), None);
    }
}

/// "Error values". What the protocol has no word for is an I/O error, except what the client could have known.
fn errno(error: IoError) -> Errno {
    match error {
        IoError::Io | IoError::DeviceFault => Errno::Io,
        IoError::Unsupported | IoError::Invalid => Errno::Inval,
        IoError::NoSpace => Errno::NoSpc,
        IoError::ReadOnly => Errno::Perm,
        IoError::Revoked => Errno::Shutdown,
    }
}
