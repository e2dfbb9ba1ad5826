//! Reads: leases for a segment, and the segment's way into the reply stream.
//!
//! An ordinary read is one segment: all its leases are taken at once or none, the device fills them, and one head with
//! all pieces goes out (which is what
//! `NBD_CMD_FLAG_DF` wants). A read longer than the window, or one that the arena cannot hold at once, is served
//! *alone*, segment by segment, with at least one lease each: nothing else of the connection is under way, so it
//! depends on no other lease of its own. Structured, each segment is a chunk; simple, the head says success when the
//! first segment has come, and a later error severs the connection, as section "NBD_CMD_READ", "Simple replies"
//! demands.

use std::time::Instant;

use crate::proto::Errno;
use crate::reply::Head;
use crate::request::RawRequest;
use crate::service::{Buffer, Disk, IoOp, LeaseError};
use crate::session::{Kind, Session, Slot};

/// A reply to a read must not be refused for being unfragmented up to here ("NBD_CMD_READ").
const MUST_NOT_FRAGMENT_BYTES: u32 = 1 << 16;

/// What became of an attempt to start something that needs leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Under way, or answered.
    Done,
    /// Something of this connection has to end first.
    Later,
    /// The arena has to be given something back first.
    Starved,
}

impl<D: Disk> Session<D> {
    /// Leases one piece.
    ///
    /// # Errors
    /// [`Start::Starved`] in `Err(None)`; an error to answer with in `Err(Some)`.
    pub(crate) fn lease(&mut self, bytes: u32) -> Result<Buffer, Option<Errno>> {
        match self.disk.lease(bytes) {
            Ok(buffer) => {
                self.took(&buffer);
                Ok(buffer)
            }
            Err(LeaseError::Exhausted) => Err(None),
            Err(LeaseError::Revoked) => Err(Some(Errno::Shutdown)),
            Err(LeaseError::TooLarge(_)) => {
                // The arena is smaller than the geometry says: go on with smaller pieces while there are any.
                let block = self.rules.block_bytes;
                let half = self.piece_bytes / 2;
                self.piece_bytes = (half - half % block).max(block);
                if bytes > block { Err(None) } else { Err(Some(Errno::Io)) }
            }
        }
    }

    /// Starts a read that was judged, or says what it waits for.
    pub(crate) fn start_read(&mut self, now: Instant, raw: &RawRequest, df: bool, may_lease: bool) -> Start {
        let quiet = self.live == 0 && self.outbox.held_bytes() == 0;
        let fits = raw.length <= self.rules.window_bytes;
        if !fits && self.live > 0
            || fits && self.held_bytes > 0 && self.held_bytes + u64::from(raw.length) > self.limits.bytes
        {
            return Start::Later;
        }
        if !may_lease {
            return Start::Starved;
        }
        let mut slot = Slot::new(raw.cookie, Kind::Read, raw.offset, raw.length);
        let complete = match self.lease_segment(&mut slot) {
            Ok(complete) => complete,
            Err(error) => {
                self.answer(now, raw.cookie, Some(error), true);
                return Start::Done;
            }
        };
        let some = slot.first.is_some();
        if !complete && (fits && !quiet || df || !some) {
            self.return_segment(&mut slot);
            if df && quiet && raw.length > MUST_NOT_FRAGMENT_BYTES {
                self.answer(now, raw.cookie, Some(Errno::Overflow), true);
                return Start::Done;
            }
            return Start::Starved;
        }
        let alone = slot.next < slot.end;
        let index = self.insert(slot);
        if alone {
            self.alone = Some(index);
        }
        self.issue_segment(index);
        Start::Done
    }

    /// Goes on with the read that is served alone, if it wants leases.
    pub(crate) fn resume_alone(&mut self, now: Instant, may_lease: bool) -> Start {
        let (true, Some(index)) = (self.resume, self.alone) else { return Start::Done };
        if self.held_bytes >= self.limits.bytes {
            return Start::Later;
        }
        if !may_lease {
            return Start::Starved;
        }
        let Some(mut slot) = self.slot(index).map(|slot| std::mem::replace(slot, Slot::new(0, Kind::Read, 0, 0)))
        else {
            return Start::Done;
        };
        let leased = self.lease_segment(&mut slot);
        let some = slot.first.is_some();
        if let Err(error) = leased {
            slot.error = Some(error);
        }
        if let Some(place) = self.slot(index) {
            *place = slot;
        }
        if leased.is_err() {
            self.resume = false;
            self.settle(now, index);
            return Start::Done;
        }
        if !some {
            return Start::Starved;
        }
        self.resume = false;
        self.issue_segment(index);
        Start::Done
    }

    /// Leases for as much of `slot` as fits in the window. Whether that was all of it; on an error everything was given
    /// back.
    fn lease_segment(&mut self, slot: &mut Slot) -> Result<bool, Errno> {
        slot.piece_bytes = self.piece_bytes;
        let to = slot.end.min(slot.offset + u64::from(self.rules.window_bytes.max(self.piece_bytes)));
        while slot.next < to {
            let bytes = (to - slot.next).min(u64::from(slot.piece_bytes)) as u32;
            match self.lease(bytes) {
                Ok(buffer) => {
                    slot.next += u64::from(bytes);
                    if slot.first.is_none() {
                        slot.first = Some(buffer);
                    } else {
                        slot.others.push(Some(buffer));
                    }
                }
                Err(None) if self.piece_bytes < slot.piece_bytes && slot.first.is_none() => {
                    slot.piece_bytes = self.piece_bytes
                }
                Err(None) => break,
                Err(Some(error)) => {
                    self.return_segment(slot);
                    return Err(error);
                }
            }
        }
        Ok(slot.next == slot.end)
    }

    fn return_segment(&mut self, slot: &mut Slot) {
        for buffer in slot.first.take().into_iter().chain(slot.others.drain(..).flatten()) {
            self.give_back(buffer);
        }
        slot.next = slot.offset;
    }

    /// Issues the leased segment: the leases leave the slot and come back with the answers.
    fn issue_segment(&mut self, index: u32) {
        let Some(slot) = self.slot(index) else { return };
        let (offset, next, piece_bytes) = (slot.offset, slot.next, slot.piece_bytes);
        let mut buffer = slot.first.take();
        let mut piece = 0;
        while let Some(lease) = buffer {
            let from = offset + u64::from(piece) * u64::from(piece_bytes);
            let bytes = (next - from).min(u64::from(piece_bytes)) as u32;
            self.issue(index, piece, IoOp::Read, (from, bytes), Some(lease));
            buffer = self.slot(index).and_then(|slot| slot.others.get_mut(piece as usize).and_then(Option::take));
            piece += 1;
        }
    }

    /// Sends a segment that has come, or the error.
    pub(crate) fn settle_read(&mut self, now: Instant, index: u32) {
        let structured = self.structured;
        let refusing = self.refused_at.is_some();
        let Some(slot) = self.slot(index) else { return };
        if let Some(error) = slot.error {
            let Some(mut slot) = self.remove(index) else { return };
            self.return_segment(&mut slot);
            self.end_alone(index);
            if slot.headed && !structured {
                self.broken = Some("a read failed after its simple reply had begun");
            } else {
                self.answer(now, slot.cookie, Some(error), true);
            }
            return;
        }
        let done = slot.next == slot.end;
        let (offset, total) = (slot.offset, (slot.next - slot.offset) as u32);
        let mut head = match (structured, slot.headed) {
            (true, _) => Head::offset_data(slot.cookie, done, offset, total),
            (false, false) => Head::simple(slot.cookie, None),
            (false, true) => Head::EMPTY,
        };
        slot.headed = true;
        slot.offset = slot.next;
        let piece_bytes = slot.piece_bytes;
        let (first, others) = (slot.first.take(), std::mem::take(&mut slot.others));
        if first.is_none() || others.iter().any(Option::is_none) {
            // An answer without its buffer: nothing truthful can be sent.
            self.broken = Some("a read came back without its buffer");
            return;
        }
        let mut left = total;
        for buffer in first.into_iter().chain(others.into_iter().flatten()) {
            let bytes = left.min(piece_bytes);
            left -= bytes;
            self.outbox.push(now, head, Some((buffer, bytes)));
            head = Head::EMPTY;
        }
        if done {
            self.remove(index);
            self.end_alone(index);
        } else if refusing {
            if let Some(slot) = self.slot(index) {
                slot.error = Some(Errno::Shutdown);
            }
            self.settle_read(now, index);
        } else {
            self.resume = true;
        }
    }

    fn end_alone(&mut self, index: u32) {
        if self.alone == Some(index) {
            self.alone = None;
            self.resume = false;
        }
    }
}
