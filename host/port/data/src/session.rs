//! The rings' host side, without any socket: takes entries, judges them, submits them, answers them.
//!
//! ```text
//! ring entry --take--> queue --submit--> in flight --poll--> complete ring --(client)--> room again
//!        \-- not a request: answered at once --------------^
//! ```
//! Invariant: `queue.len() + in_flight + (complete_tail - complete_head)` is at most the ring's size. An entry is taken only if its answer has a place, so
//! an answer never waits and never has to be kept.

use cofferdam_client::ring::{LIVE, REVOKED, Rings, WAKE_ON_ROOM, WAKE_ON_SUBMIT, Word};
use cofferdam_client::wire::{Complete, FLAG_MAY_UNMAP, Op, Status, Submit};

use crate::service::{Completion, Disk, HandleState, IoError, IoFlags, IoOp, IoRequest, Region, SubmitError};

/// Entries taken in one turn; one crossing carries as many (DESIGN section 5).
const BATCH: u32 = 64;

/// The client wrote what no honest client can write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Violation(pub(crate) &'static str);

/// What one turn did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Something moved: another turn is worth while.
    pub(crate) moved: bool,
    /// The client sleeps and has to be sent a wake.
    pub(crate) wake: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Session<D: Disk> {
    pub(crate) disk: D,
    region: D::Region,
    rings: Rings,
    submit_head: u32,
    complete_tail: u32,
    /// What the client had taken when it was last looked at and found possible.
    complete_head: u32,
    /// Taken, and not admitted yet.
    queue: Vec<IoRequest>,
    /// The lane is full: `queue` is to be tried again soon.
    pub(crate) full: bool,
    in_flight: u32,
    completions: Vec<Completion>,
    refused: bool,
}

impl<D: Disk> Session<D> {
    pub(crate) fn new(disk: D, region: D::Region, rings: Rings) -> Session<D> {
        let entries = rings.entries() as usize;
        Session {
            disk,
            region,
            rings,
            submit_head: 0,
            complete_tail: 0,
            complete_head: 0,
            queue: Vec::with_capacity(entries.min(BATCH as usize)),
            full: false,
            in_flight: 0,
            completions: Vec::with_capacity(entries),
            refused: false,
        }
    }

    /// Whether something waits for the device.
    pub(crate) fn waits_for_device(&self) -> bool {
        self.in_flight > 0
    }

    /// Nothing was taken that is not answered.
    pub(crate) fn is_quiet(&self) -> bool {
        self.in_flight == 0 && self.queue.is_empty()
    }

    pub(crate) fn is_refused(&self) -> bool {
        self.refused
    }

    /// Whether the client has taken every answer.
    pub(crate) fn is_drained(&self) -> bool {
        self.rings.load(Word::CompleteHead) == self.complete_tail
    }

    /// From now on every entry is answered with `Shutdown`; what was admitted is still answered as the device says. Idempotent.
    pub(crate) fn refuse(&mut self) {
        if !std::mem::replace(&mut self.refused, true) {
            // Before anything else: the memory goes when nothing is in flight any more, and a client that copies from it looks here behind its copy.
            self.rings.store(Word::State, REVOKED);
            self.full = false;
            for request in std::mem::take(&mut self.queue) {
                self.answer(request.user, Status::Shutdown);
            }
        }
    }

    /// One round: bounded by [`BATCH`] entries and the answers that are there. With `arm` the device is asked to notify.
    pub(crate) fn turn(&mut self, arm: bool) -> Result<Turn, Violation> {
        let before = self.complete_tail;
        if !self.refused && self.disk.state() == HandleState::Revoked {
            self.refuse();
        }
        let mut moved = self.take()? > 0;
        moved |= self.submit();
        moved |= self.reap(arm);
        moved |= self.complete_tail != before;
        if self.complete_tail == before {
            return Ok(Turn { moved, wake: false });
        }
        self.rings.store(Word::CompleteTail, self.complete_tail);
        Ok(Turn { moved, wake: self.rings.must_wake(Word::ClientSleeps, u32::MAX) })
    }

    /// What the client has to wake this side for, as things are: nothing while only the device can bring anything.
    pub(crate) fn sleeps_for(&self) -> u32 {
        let unread = self.complete_tail.wrapping_sub(self.complete_head);
        match (self.queue.is_empty(), self.room()) {
            (false, _) => 0,
            (true, 0) if unread > 0 => WAKE_ON_ROOM,
            (true, 0) => 0,
            (true, _) => WAKE_ON_SUBMIT,
        }
    }

    /// Tells the client what wakes this side. Another turn has to follow before sleep.
    pub(crate) fn arm(&self, what: u32) {
        self.rings.arm(Word::HostSleeps, what);
    }

    /// Undoes [`Session::arm`].
    pub(crate) fn disarm(&self) {
        self.rings.store(Word::HostSleeps, 0);
    }

    /// The state is the host's word; a client that overwrites it fools only itself, and not for long.
    pub(crate) fn restate(&self) {
        self.rings.store(Word::State, if self.refused { REVOKED } else { LIVE });
    }

    fn room(&self) -> u32 {
        let unread = self.complete_tail.wrapping_sub(self.complete_head);
        self.rings.entries().saturating_sub(unread + self.in_flight + self.queue.len() as u32)
    }

    /// Takes entries for whose answers there is room; how many.
    fn take(&mut self) -> Result<u32, Violation> {
        let head = self.rings.load(Word::CompleteHead);
        let unread = self.complete_tail.wrapping_sub(self.complete_head);
        if head.wrapping_sub(self.complete_head) > unread {
            return Err(Violation("the complete ring's head is impossible"));
        }
        self.complete_head = head;
        let ready = self.rings.load(Word::SubmitTail).wrapping_sub(self.submit_head);
        if ready > self.rings.entries() {
            return Err(Violation("the submit ring's tail is impossible"));
        }
        if !self.queue.is_empty() {
            return Ok(0);
        }
        let count = ready.min(self.room()).min(BATCH);
        for _ in 0..count {
            let entry = self.rings.submit_at(self.submit_head);
            self.submit_head = self.submit_head.wrapping_add(1);
            match self.judge(&entry) {
                Ok(request) => self.queue.push(request),
                Err(status) => self.answer(entry.user, status),
            }
        }
        if count > 0 {
            self.rings.store(Word::SubmitHead, self.submit_head);
        }
        Ok(count)
    }

    /// From an entry, which is a copy, to a request: memory, operation and flags are checked here, the range on the medium by the lane.
    fn judge(&self, entry: &Submit) -> Result<IoRequest, Status> {
        if self.refused {
            return Err(Status::Shutdown);
        }
        let op = Op::from_wire(entry.op).ok_or(Status::Unsupported)?;
        let (op, flags_allowed) = match op {
            Op::Read => (IoOp::Read, 0),
            Op::Write => (IoOp::Write, 0),
            Op::Flush => (IoOp::Flush, 0),
            Op::Discard => (IoOp::Discard, 0),
            Op::WriteZeroes => (IoOp::WriteZeroes, FLAG_MAY_UNMAP),
            Op::GetId => (IoOp::GetId, 0),
        };
        if entry.flags & !flags_allowed != 0 {
            return Err(Status::Invalid);
        }
        let buffer = if matches!(op, IoOp::Read | IoOp::Write | IoOp::GetId) {
            let window = self.region.window(entry.memory_offset, entry.length);
            Some(window.map_err(|error| match error {
                crate::service::RegionError::Revoked => Status::Shutdown,
                _ => Status::Invalid,
            })?)
        } else {
            None
        };
        Ok(IoRequest {
            user: entry.user,
            op,
            offset: entry.offset,
            length: entry.length,
            flags: if entry.flags & FLAG_MAY_UNMAP != 0 { IoFlags::MAY_UNMAP } else { IoFlags::default() },
            buffer,
        })
    }

    /// Hands the queue over as far as it is admitted. Whether anything was.
    fn submit(&mut self) -> bool {
        let before = self.queue.len();
        if before == 0 {
            return false;
        }
        let result = self.disk.submit(&mut self.queue);
        self.in_flight += (before - self.queue.len()) as u32;
        self.full = !self.queue.is_empty() && !matches!(result, Err(SubmitError::Held | SubmitError::Revoked));
        if result == Err(SubmitError::Revoked) {
            self.refuse();
        }
        self.queue.len() < before
    }

    /// Fetches what the device answered. Whether anything was found.
    fn reap(&mut self, arm: bool) -> bool {
        if self.in_flight == 0 {
            return false;
        }
        let mut completions = std::mem::take(&mut self.completions);
        let found = self.disk.poll(arm, &mut completions);
        for completion in completions.drain(..) {
            // The manager answers each admitted request once; one too many would have no place.
            if let Some(less) = self.in_flight.checked_sub(1) {
                self.in_flight = less;
                self.answer(completion.user, status(completion.result));
            }
        }
        self.completions = completions;
        found > 0
    }

    fn answer(&mut self, user: u64, status: Status) {
        self.rings.put_complete(self.complete_tail, &Complete { user, status: status as i32 });
        self.complete_tail = self.complete_tail.wrapping_add(1);
    }
}

fn status(result: Result<(), IoError>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(IoError::Io) => Status::Io,
        Err(IoError::Unsupported) => Status::Unsupported,
        Err(IoError::Invalid) => Status::Invalid,
        Err(IoError::NoSpace) => Status::NoSpace,
        Err(IoError::ReadOnly) => Status::ReadOnly,
        Err(IoError::DeviceFault) => Status::DeviceFault,
        Err(IoError::Revoked) => Status::Shutdown,
    }
}
