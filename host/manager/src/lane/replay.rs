//! What a lane knows of its requests for the day on which its device is lost and comes back (`reconnect`).
//!
//! Only the lanes of a binding that was loaded to be reconnected have a [`Journal`]; the others pay a look at a `None`.
//!
//! **Replay.** Each request is written down as its driver was given it, with its place in the order of admission. What the device had and has not done is given to the driver
//! again, in that order. Two kinds are not: a packet and a write to a stream that the device had may be out already. They are answered as failed, whatever became of them.
//!
//! **The promise of a flush** covers every write that was acknowledged before it was received, on whichever lane. A device that is lost may take acknowledged writes with it; so where there
//! are any that no flush has covered, the next flush of every handle fails. Counted are writes acknowledged, a number for each lane: a flush notes all of them as it comes in, and
//! as it succeeds they are covered.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cofferdam_device::words::REQUEST_WORDS;
use cofferdam_device::{Expected, IoOp, Payload, QueueEvents, SplitQueue};
use cofferdam_runtime::LaneDriver;
use parking_lot::Mutex;

use super::inside::{Inside, Judged, Sink};
use super::revive::{Aside, Health};
use super::{Lane, signal};
use crate::binding::Binding;
use crate::ledger::Stage;
use crate::offer::Offer;
use crate::request::IoError;

/// What of a binding's writes is covered by a flush. Shared by its lanes.
pub(crate) struct Promise {
    /// Writes that were acknowledged, by lane; each written under that lane's lease.
    acknowledged: Box<[AtomicU64]>,
    /// Of these, how many a flush that succeeded has covered, or every client was told not to count on.
    covered: Mutex<Box<[u64]>>,
    /// Some may be lost, and no client has heard of it yet.
    untold: AtomicBool,
}

impl Promise {
    /// With `unflushed`, there are such writes from before, which somebody else has counted.
    pub(crate) fn new(lanes: usize, unflushed: bool) -> Promise {
        // They are lane 0's first, that no flush has covered.
        let acknowledged = (0..lanes).map(|lane| AtomicU64::new(u64::from(unflushed && lane == 0))).collect();
        Promise { acknowledged, covered: Mutex::new(vec![0; lanes].into()), untold: AtomicBool::new(false) }
    }

    /// What a flush covers that comes in now. Acquire: whoever asks for it has seen the answers.
    fn now(&self) -> Box<[u64]> {
        self.acknowledged.iter().map(|count| count.load(Ordering::Acquire)).collect()
    }

    fn cover(&self, counts: &[u64]) {
        self.covered.lock().iter_mut().zip(counts).for_each(|(covered, count)| *covered = (*covered).max(*count));
    }

    /// Whether there are acknowledged writes that no flush has covered. If so they are off the count: the caller tells every client.
    pub(crate) fn take_broken(&self) -> bool {
        let is_broken = self.is_broken();
        self.cover(&self.now());
        self.untold.fetch_or(is_broken, Ordering::AcqRel);
        is_broken
    }

    /// Whether no client has heard yet of writes that may be lost: then whoever comes now has to.
    pub(crate) fn is_untold(&self) -> bool {
        self.untold.load(Ordering::Acquire)
    }

    /// Another process has told nobody.
    pub(crate) fn tell_newcomers(&self) {
        self.untold.store(true, Ordering::Release);
    }

    fn told(&self) {
        self.untold.store(false, Ordering::Release);
    }

    /// Whether there are.
    pub(crate) fn is_broken(&self) -> bool {
        let now = self.now();
        self.covered.lock().iter().zip(&now).any(|(covered, count)| covered < count)
    }
}

/// A request as its driver was given it.
#[derive(Clone, Copy, Default)]
struct Noted {
    /// Its place in the order of admission, within its lane.
    place: u64,
    words: [u64; REQUEST_WORDS],
}

/// What a lane writes down. Under its lease.
pub(crate) struct Journal {
    lane: usize,
    /// By the place of the request in the ledger.
    noted: Vec<Noted>,
    next: u64,
    promise: Arc<Promise>,
    writes: u64,
    /// What each flush in flight covers.
    flushes: HashMap<u32, Box<[u64]>>,
}

impl Journal {
    pub(crate) fn new(lane: u16, promise: &Arc<Promise>) -> Journal {
        Journal {
            lane: usize::from(lane),
            noted: Vec::new(),
            next: 0,
            writes: promise.acknowledged.get(usize::from(lane)).map_or(0, |count| count.load(Ordering::Relaxed)),
            promise: Arc::clone(promise),
            flushes: HashMap::new(),
        }
    }

    /// A request that was entered in the ledger, and the words that the driver is given.
    pub(super) fn note(&mut self, token: u32, op: IoOp, words: &[u64]) {
        let slot = usize::from(token as u16);
        if slot >= self.noted.len() {
            self.noted.resize(slot + 1, Noted::default());
        }
        let Some(words) = words.last_chunk().copied() else { return };
        self.noted[slot] = Noted { place: self.next, words };
        self.next += 1;
        if op == IoOp::Flush {
            self.flushes.insert(token, self.promise.now());
        }
    }

    /// A request that is about to be answered with success.
    #[inline]
    pub(super) fn succeeded(&mut self, token: u32, op: IoOp) {
        match op {
            IoOp::Write | IoOp::Discard | IoOp::WriteZeroes => {
                self.writes += 1;
                // Release, and before the answer: a client that has it finds its write counted, on whatever lane it flushes.
                self.promise.acknowledged[self.lane].store(self.writes, Ordering::Release);
            }
            IoOp::Flush => self.flushed(token),
            _ => {}
        }
    }

    #[cold]
    fn flushed(&mut self, token: u32) {
        if let Some(counts) = self.flushes.remove(&token) {
            self.promise.cover(&counts);
        }
    }

    /// A client has heard that writes may be lost.
    #[cold]
    pub(super) fn told(&self) {
        self.promise.told();
    }

    fn of(&self, token: u32) -> Noted {
        self.noted.get(usize::from(token as u16)).copied().unwrap_or_default()
    }
}

/// What became of the requests that a lost device had.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TakenBack {
    /// Given to the driver again once the device is back.
    pub(crate) again: usize,
    /// Packets and writes to streams, which may be out and are not sent twice: answered as failed.
    pub(crate) failed: usize,
}

/// A queue of a device that came back: its ring is empty, and its call descriptor the one that it had.
pub(crate) type Fresh = (SplitQueue, QueueEvents);

impl Inside {
    /// A request was answered with success in the short way.
    #[inline]
    pub(super) fn note_claimed(&mut self, token: u32, place: u16) {
        if let Some(journal) = &mut self.journal {
            journal.succeeded(token, self.ledger.op_at(place));
        }
    }

    /// The same, in the long way, before the ledger forgets it.
    #[inline]
    pub(super) fn note_answer(&mut self, token: u32, result: Result<(), IoError>) {
        if let Some(journal) = &mut self.journal
            && let Some(op) = self.ledger.op(token)
        {
            if result.is_ok() {
                journal.succeeded(token, op);
            }
            if op == IoOp::Flush {
                journal.flushes.remove(&token);
            }
        }
    }

    /// Sets aside everything that is not answered, in the order of its admission. Also what the device has done and nobody has judged: answered later, a write would be acknowledged that no client
    /// was told may be lost.
    /// Not set aside are packets and writes to streams that the device had: those come back, to be answered as failed.
    fn set_all_aside(&mut self) -> Vec<u32> {
        let Some(journal) = &self.journal else { return Vec::new() };
        let suspects = self.aside.iter().map(Aside::suspicion).chain(self.unjudged.iter().map(Judged::suspicion));
        let suspects: HashMap<u32, u8> = suspects.collect();
        let mut tokens = self.ledger.tokens();
        tokens.sort_unstable_by_key(|token| journal.of(*token).place);
        self.aside.clear();
        self.unjudged.clear();
        self.parked.clear();
        let mut out = Vec::new();
        for token in tokens {
            let Some(op) = self.ledger.op(token) else { continue };
            if self.ledger.stage(token) == Some(Stage::Published) && matches!(op, IoOp::Send | IoOp::Transmit) {
                out.push(token);
                continue;
            }
            let words = self.journal.as_ref().map_or([0; REQUEST_WORDS], |journal| journal.of(token).words);
            let payload = self.ledger.iova(token).zip(op.payload());
            let payload = payload.map(|(iova, direction)| Payload { iova, length: words[2] as u32, direction });
            self.ledger.set_stage(token, Stage::Given);
            let crashes = suspects.get(&token).copied().unwrap_or(0);
            self.aside.push_back(Aside::new(words, Expected { token, payload }, crashes));
        }
        out
    }

    /// Answers the flushes that were set aside as failed; each is the one that its handle was owed.
    fn fail_flushes(&mut self) {
        let is_flush = |inside: &Inside, aside: &Aside| inside.ledger.op(aside.token()) == Some(IoOp::Flush);
        let aside = std::mem::take(&mut self.aside);
        let (flushes, rest): (VecDeque<_>, VecDeque<_>) = aside.into_iter().partition(|aside| is_flush(self, aside));
        self.aside = rest;
        let mut nobody = Vec::new();
        for flush in flushes {
            if let Some(holder) = self.ledger.handle_of(flush.token()) {
                holder.take_flush_error();
            }
            if let Some(journal) = &self.journal {
                journal.told();
            }
            self.answer(flush.token(), Err(IoError::Io), &mut Sink { me: None, out: &mut nobody });
        }
    }
}

impl Lane {
    /// The device is away: nothing is given to it or to the driver until it is back. Waits for a call that is under way.
    pub(crate) fn hold_off(&self) {
        let mut lease = self.lease();
        if lease.health != Health::Gone {
            lease.health = Health::Away;
        }
    }

    /// The device is silent. Its ring is looked at a last time, if it is believed; what it has not done is set aside. May be called again.
    pub(crate) fn take_back(&self) -> TakenBack {
        let mut lease = self.lease();
        let inside = &mut *lease;
        if inside.health != Health::Away {
            // The ladder has it.
            return TakenBack::default();
        }
        self.reap(inside, false, false, &mut Sink { me: None, out: &mut Vec::new() });
        let sent = inside.set_all_aside();
        let taken = TakenBack { again: inside.aside.len(), failed: sent.len() };
        // Before it is answered: a client that has the answer finds its packet counted.
        if matches!(*inside.offer, Offer::Net(_)) {
            self.dropped.fetch_add(taken.failed as u64, Ordering::Relaxed);
        }
        for token in sent {
            inside.answer(token, Err(IoError::Io), &mut Sink { me: None, out: &mut Vec::new() });
        }
        (inside.ring, inside.doorbell) = (None, None);
        let keep = matches!(*inside.offer, Offer::Stream(_));
        if let Some(posted) = &mut inside.posted {
            let lost = posted.take_back(keep);
            self.dropped.fetch_add(lost, Ordering::Relaxed);
        }
        inside.device_fault = None;
        lease.wake_all();
        taken
    }

    /// See [`Promise`]: acknowledged writes may be lost, and flushes are in flight.
    pub(crate) fn fail_flushes(&self) {
        let mut lease = self.lease();
        lease.fail_flushes();
        lease.wake_all();
    }

    /// The device is back: with another driver, that is given what was set aside before anything else.
    pub(crate) fn give_back(
        &self,
        binding: &Binding,
        (driver, made_of): (Box<dyn LaneDriver>, u64),
        (ring, events): Fresh,
        posted: Option<Fresh>,
    ) {
        let mut lease = self.lease();
        let inside = &mut *lease;
        if inside.health == Health::Gone {
            // Dropped by the ladder with the lane: the device is silenced before.
            return;
        }
        inside.ring = Some(ring);
        inside.doorbell = Some(events.doorbell);
        inside.device_fault = None;
        inside.driver = Some(driver);
        inside.made_of = made_of;
        // Another lane's driver may have broken down too often meanwhile: then this one refuses until somebody restarts it, on this device.
        let works = inside.health == Health::Away;
        if works {
            inside.health = Health::Works;
        }
        if let (Some(old), Some((ring, events))) = (&mut inside.posted, posted) {
            old.give_back(ring, events.doorbell);
            old.kick();
        }
        let fault = if works { inside.replay() } else { None };
        let works = fault.map_or(works, |fault| self.report(inside, fault));
        inside.ring_doorbell();
        self.wake_receiver();
        self.reap(inside, true, true, &mut Sink { me: None, out: &mut Vec::new() });
        if works {
            binding.revived(self.number);
        }
        lease.wake_all();
        drop(lease);
        // Who sleeps on the descriptor armed a ring that is gone.
        signal(self.device_fd());
    }

    /// Whether it waits for the device.
    pub(crate) fn is_held_off(&self) -> bool {
        // Whoever has the lease reports what it finds.
        self.try_lease().is_some_and(|lease| lease.health == Health::Away)
    }

    /// The device did not come back: everything is answered with errors, what was set aside and what comes.
    pub(crate) fn refuse_all(&self) {
        let mut lease = self.lease();
        if lease.health != Health::Gone {
            lease.refuse();
            self.reap(&mut lease, false, true, &mut Sink { me: None, out: &mut Vec::new() });
        }
        lease.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_acknowledged_before_it_came_in_on_any_lane() {
        let promise = Arc::new(Promise::new(2, false));
        let (mut one, mut two) = (Journal::new(0, &promise), Journal::new(1, &promise));
        assert!(!promise.take_broken(), "nothing was written");
        one.succeeded(1, IoOp::Write);
        two.note(2, IoOp::Flush, &[0; REQUEST_WORDS]);
        two.succeeded(3, IoOp::Discard);
        two.succeeded(2, IoOp::Flush);
        assert!(promise.take_broken(), "the discard was acknowledged behind the flush");
        assert!(!promise.take_broken(), "that was told");
        one.succeeded(4, IoOp::WriteZeroes);
        two.note(5, IoOp::Flush, &[0; REQUEST_WORDS]);
        two.succeeded(5, IoOp::Flush);
        one.succeeded(6, IoOp::Read);
        assert!(!promise.take_broken());
        one.succeeded(7, IoOp::Write);
        assert!(promise.take_broken(), "no flush came");
    }

    #[test]
    fn writes_that_another_process_acknowledged_are_covered_by_a_flush_of_this_one() {
        let promise = Arc::new(Promise::new(2, true));
        let (mut one, mut two) = (Journal::new(0, &promise), Journal::new(1, &promise));
        assert!(promise.is_broken());
        two.note(2, IoOp::Flush, &[0; REQUEST_WORDS]);
        two.succeeded(2, IoOp::Flush);
        assert!(!promise.is_broken());
        one.succeeded(3, IoOp::Write);
        assert!(promise.take_broken() && !promise.is_broken());
    }
}
