//! A client in this process that keeps account of every request: each admitted one has to be answered exactly once.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use cofferdam_manager::{
    Binding, Buffer, Completion, Handle, HandleSpec, HandleState, IoOp, IoRequest, LeaseError, Mapped,
};

/// Requests in flight of [`Client::traffic`].
pub const DEPTH: usize = 32;

/// Bytes of the disk that belong to one of [`Client::traffic`]'s slots.
const SLOT_BYTES: u64 = 64 << 10;

/// How far [`Client::traffic`] is, for other threads.
#[derive(Debug, Default)]
pub struct Progress {
    /// Requests that were answered.
    pub answered: AtomicU64,
    /// Of those, with an error.
    pub failed: AtomicU64,
}

/// What became of a client's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Taken by the binding.
    pub admitted: u64,
    /// Answered, well or not.
    pub answered: u64,
    /// Of those, with an error.
    pub failed: u64,
    /// Answers to nothing, or the second one to something.
    pub strange: u64,
    /// Reads that were answered well with other data than was written.
    pub wrong: u64,
}

impl Tally {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Tally) -> Tally {
        Tally {
            admitted: self.admitted + other.admitted,
            answered: self.answered + other.answered,
            failed: self.failed + other.failed,
            strange: self.strange + other.strange,
            wrong: self.wrong + other.wrong,
        }
    }

    /// Admitted and not answered.
    #[must_use]
    pub fn unanswered(&self) -> u64 {
        self.admitted - self.answered
    }
}

/// What the answer to a request has to be if it is a good one.
#[derive(Clone, Copy)]
struct Expected {
    slot: usize,
    /// Of a read: what every byte is.
    fill: Option<u8>,
    length: u32,
}

/// One handle.
pub struct Client {
    handle: Handle,
    next: u64,
    waiting: HashMap<u64, Expected>,
    tally: Tally,
    /// Where its buffers are, if not in the binding's arena.
    mapped: Option<Mapped>,
    /// Answers fetched and not looked at; kept for its memory.
    done: Vec<Completion>,
    /// Slots whose request was answered since [`Client::traffic`] looked last, and whether well.
    free: Vec<(usize, bool)>,
}

impl Client {
    /// Opens a handle on `lane` that `handles` shows as `peer`.
    pub fn open(binding: &Arc<Binding>, lane: usize, peer: &str) -> anyhow::Result<Client> {
        let spec = HandleSpec { label: "in-process".into(), peer: peer.into(), lane, ..HandleSpec::default() };
        let handle = binding.open(spec).with_context(|| format!("a handle for {peer}"))?;
        Ok(Client {
            handle,
            next: 1,
            waiting: HashMap::new(),
            tally: Tally::default(),
            mapped: None,
            done: Vec::new(),
            free: Vec::new(),
        })
    }

    /// The handle.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Maps memory of its own, for what [`Client::traffic`] reads and writes from now on.
    pub fn map(&mut self) -> anyhow::Result<()> {
        let mapped = self.handle.map(DEPTH as u64 * SLOT_BYTES)?;
        self.mapped = Some(mapped);
        Ok(())
    }

    /// The memory that it mapped.
    #[must_use]
    pub fn mapped(&self) -> Option<&Mapped> {
        self.mapped.as_ref()
    }

    /// What became of its requests so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Hands one request in, a write or read of `length` bytes that are all `fill`, or a flush. Whether it was admitted; revocation is the only reason why not.
    pub fn start(&mut self, op: IoOp, offset: u64, length: u32, fill: u8) -> anyhow::Result<bool> {
        self.start_in(0, op, offset, length, fill)
    }

    fn start_in(&mut self, slot: usize, op: IoOp, offset: u64, length: u32, fill: u8) -> anyhow::Result<bool> {
        let buffer = match op {
            IoOp::Flush => None,
            _ => match self.buffer(slot, length)? {
                Some(buffer) => Some(buffer),
                None => return Ok(false),
            },
        };
        if let Some(buffer) = &buffer {
            // A read's buffer holds something else than what it has to bring. Revoked meanwhile: then the request is refused.
            let _ = buffer.fill(0, length, if op == IoOp::Write { fill } else { !fill });
        }
        let user = self.next;
        self.next += 1;
        let fill = (op == IoOp::Read).then_some(fill);
        self.waiting.insert(user, Expected { slot, fill, length });
        let mut one = vec![IoRequest { user, op, offset, length, flags: Default::default(), buffer }];
        let refused = self.handle.submit(&mut one).err();
        if one.is_empty() {
            self.tally.admitted += 1;
            return Ok(true);
        }
        self.waiting.remove(&user);
        match refused {
            Some(cofferdam_manager::SubmitError::Revoked) => Ok(false),
            other => anyhow::bail!("refused: {other:?}"),
        }
    }

    /// Memory for one request of `slot`; `None` if the handle is revoked.
    fn buffer(&self, slot: usize, length: u32) -> anyhow::Result<Option<Buffer>> {
        let Some(mapped) = &self.mapped else {
            return match self.handle.lease(length) {
                Ok(buffer) => Ok(Some(buffer)),
                Err(LeaseError::Revoked) => Ok(None),
                Err(error) => Err(error.into()),
            };
        };
        match mapped.window(slot as u64 * SLOT_BYTES, length) {
            Ok(window) => Ok(Some(window)),
            Err(_) if self.handle.state() == HandleState::Revoked => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Fetches answers, sleeping for at most `wait` if there is none.
    pub fn collect(&mut self, wait: Duration) {
        let mut done = std::mem::take(&mut self.done);
        if wait.is_zero() {
            self.handle.poll(true, &mut done);
        } else {
            self.handle.wait(wait, &mut done);
        }
        for completion in done.drain(..) {
            let Some(expected) = self.waiting.remove(&completion.user) else {
                self.tally.strange += 1;
                continue;
            };
            self.tally.answered += 1;
            self.free.push((expected.slot, completion.result.is_ok()));
            if completion.result.is_err() {
                self.tally.failed += 1;
            } else if let (Some(fill), Some(buffer)) = (expected.fill, &completion.buffer) {
                let mut bytes = vec![!fill; expected.length as usize];
                // A buffer that was taken back before it was looked at shows no data, which is no wrong data.
                let shown = buffer.read_at(0, &mut bytes).is_ok();
                self.tally.wrong += u64::from(shown && bytes.iter().any(|byte| *byte != fill));
            }
        }
        self.done = done;
    }

    /// One request from beginning to end, within `bound`.
    pub fn one(&mut self, op: IoOp, offset: u64, length: u32, fill: u8, bound: Duration) -> anyhow::Result<()> {
        let before = self.tally;
        anyhow::ensure!(self.start(op, offset, length, fill)?, "{op:?}: the handle is revoked");
        let deadline = std::time::Instant::now() + bound;
        while self.tally.answered == before.answered {
            anyhow::ensure!(std::time::Instant::now() < deadline, "{op:?}: not answered within {bound:?}");
            self.collect(Duration::from_millis(20));
        }
        anyhow::ensure!(
            self.tally == Tally { admitted: before.admitted + 1, answered: before.answered + 1, ..before },
            "{op:?}: {:?} after {before:?}",
            self.tally
        );
        Ok(())
    }

    /// Keeps [`DEPTH`] requests in flight, writes and then reads of each of as many slots of the disk, until told to stop or revoked.
    pub fn traffic(&mut self, stop: &AtomicBool, progress: &Progress) -> anyhow::Result<()> {
        /// By slot: the byte it was filled with when that is known, and what its requests began with.
        #[derive(Clone, Copy, Default)]
        struct Slot {
            fill: Option<u8>,
            round: u8,
        }
        let mut slots = [Slot::default(); DEPTH];
        let mut idle: Vec<usize> = (0..DEPTH).collect();
        // What is in flight, by slot: whether it is a write, of which byte.
        let mut writing = [None; DEPTH];
        while !stop.load(Ordering::Acquire) {
            while let Some(slot) = idle.pop() {
                let state = &mut slots[slot];
                let length = 4096 << (slot % 4);
                let (op, fill) = match state.fill {
                    Some(fill) if state.round % 2 == 1 => (IoOp::Read, fill),
                    _ => (IoOp::Write, state.round.wrapping_mul(7).wrapping_add(slot as u8)),
                };
                state.round = state.round.wrapping_add(1);
                writing[slot] = (op == IoOp::Write).then_some(fill);
                if op == IoOp::Write {
                    state.fill = None;
                }
                if !self.start_in(slot, op, slot as u64 * SLOT_BYTES, length, fill)? {
                    self.collect(Duration::from_millis(5));
                    idle.clear();
                    break;
                }
            }
            self.collect(Duration::from_millis(20));
            for (slot, good) in std::mem::take(&mut self.free) {
                match writing[slot] {
                    Some(fill) => slots[slot].fill = good.then_some(fill),
                    None if !good => slots[slot].fill = None,
                    None => {}
                }
                idle.push(slot);
            }
            progress.failed.store(self.tally.failed, Ordering::Release);
            progress.answered.store(self.tally.answered, Ordering::Release);
            if self.handle.state() == HandleState::Revoked && self.waiting.is_empty() {
                break;
            }
        }
        Ok(())
    }
}
