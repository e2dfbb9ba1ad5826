//! What runs under a lane's lease.

mod enter;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cofferdam_device::queue::{Ordinary, Popped};
use cofferdam_device::words::{self, MAX_BATCH};
use cofferdam_device::{
    AddError, ChainBatch, ChainBuf, DeviceFault, Doorbell, Expected, IoOp, Outcome, SplitQueue, Status, Used,
};
use cofferdam_gate::Notify;
use cofferdam_runtime::{CallError, FaultKind, GuestFault, LaneDriver};

use crate::error::LaneFault;
use crate::handle::HandleShared;
use crate::lane::exchange::Timing;
use crate::lane::posted::Posted;
use crate::lane::replay::Journal;
use crate::lane::revive::{Aside, Health, POISON};
use crate::ledger::{Ledger, Stage, Taken};
use crate::offer::Offer;
use crate::request::{Completion, IoError};

/// The lane's driver, ring and ledger.
pub(super) struct Inside {
    pub(super) driver: Option<Box<dyn LaneDriver>>,
    pub(super) ring: Option<SplitQueue>,
    pub(super) doorbell: Option<Box<dyn Doorbell>>,
    /// The response that the driver declared to be an ordinary success, which needs no call.
    pub(super) ordinary: Option<Ordinary>,
    pub(super) index: u16,
    /// What requests are checked against; replaced when the device's configuration changes.
    pub(super) offer: Arc<Offer>,
    /// The lane's number, which is that of its set of queues.
    pub(super) set: u16,
    pub(super) posted: Option<Posted>,
    pub(super) ledger: Ledger,
    /// Responses that wait for a look that may call the driver, in order. Bounded by the ledger.
    pub(super) unjudged: VecDeque<Judged>,
    /// Checked chains that found no room on the ring, in order. Bounded by the ledger.
    pub(super) parked: VecDeque<ChainBuf>,
    pub(super) device_fault: Option<DeviceFault>,
    /// Another process may have the rings: nobody touches them, also not to look.
    pub(super) handed_over: bool,
    /// Whether the driver may be called.
    pub(super) health: Health,
    /// The number of what its driver is made of.
    pub(super) made_of: u64,
    /// How long calls take, while somebody wants to know.
    pub(super) timing: Option<Box<Timing>>,
    /// What a driver that broke down was given and had not taken to the device, in order: at most a batch. Or what a device that is away had and had not done: all of the ledger.
    pub(super) aside: VecDeque<Aside>,
    /// What is written down of each request, for a device that may be lost and come back.
    pub(super) journal: Option<Box<Journal>>,
    /// Notifies of pollers that armed the ring, found nothing, and have not polled since: they may be asleep. As many as there are clients at the most.
    sleepers: Vec<Arc<Notify>>,
    /// Crossings that ended by the kill switch.
    pub(super) interrupted: usize,
    /// Requests that were failed because the driver or the ring broke down before the device had them.
    pub(super) lost: Arc<AtomicU64>,
    /// The ladder has begun to silence the device: nothing more is published. Set without the lease, which a call that is stuck may hold.
    pub(super) withdrawn: Arc<AtomicBool>,
    pub(super) scratch: Scratch,
}

/// Memory that is used again for every batch, so that the ordinary way allocates nothing.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) requests: Vec<u64>,
    pub(super) expected: Vec<Expected>,
    chains: Vec<u32>,
    batch: ChainBatch,
    responses: Vec<u32>,
    judged: Vec<Judged>,
    tokens: Vec<u32>,
    answers: Vec<u32>,
    verdicts: Vec<(usize, Status)>,
    /// Places of operations of the polling client that ended in the ordinary way.
    mine: Vec<u16>,
    /// Handles that got an answer from somebody else's poll.
    to_wake: Vec<Arc<HandleShared>>,
}

/// A response that the driver has to judge.
#[derive(Clone, Debug)]
pub(super) struct Judged {
    used: Used,
    /// Drivers that it may have broken down.
    crashes: u8,
}

impl Judged {
    /// Its token, and the drivers that it may have broken down.
    pub(super) fn suspicion(&self) -> (u32, u8) {
        (self.used.token, self.crashes)
    }
}

/// What one look at the ring found.
pub(super) struct Reaped {
    /// There may be more.
    pub(super) more: bool,
    pub(super) fault: Option<LaneFault>,
}

/// Where answers go: straight to the polling client if they are its own.
pub(super) struct Sink<'a> {
    pub(super) me: Option<&'a Arc<HandleShared>>,
    pub(super) out: &'a mut Vec<Completion>,
}

impl Inside {
    pub(super) fn queue(
        ring: SplitQueue,
        doorbell: Box<dyn Doorbell>,
        ordinary: Option<Vec<u8>>,
    ) -> (SplitQueue, Box<dyn Doorbell>, Option<Ordinary>) {
        (ring, doorbell, ordinary.as_deref().and_then(Ordinary::new))
    }

    pub(super) fn new(
        driver: Box<dyn LaneDriver>,
        (ring, doorbell, ordinary): (SplitQueue, Box<dyn Doorbell>, Option<Ordinary>),
        requests: usize,
        offer: Arc<Offer>,
        set: u16,
        posted: Option<Posted>,
        journal: Option<Journal>,
    ) -> Inside {
        Inside {
            driver: Some(driver),
            index: ring.config().index,
            ring: Some(ring),
            doorbell: Some(doorbell),
            ordinary,
            offer,
            set,
            posted,
            ledger: Ledger::new(requests),
            unjudged: VecDeque::new(),
            parked: VecDeque::new(),
            device_fault: None,
            handed_over: false,
            health: Health::Works,
            made_of: 0,
            timing: None,
            aside: VecDeque::new(),
            journal: journal.map(Box::new),
            sleepers: Vec::new(),
            interrupted: 0,
            lost: Arc::new(AtomicU64::new(0)),
            withdrawn: Arc::new(AtomicBool::new(false)),
            scratch: Scratch::default(),
        }
    }

    /// One crossing for what [`Inside::enter`] took; checks every word of the answer and puts the chains on the ring.
    pub(super) fn cross_submit(&mut self) -> Option<LaneFault> {
        self.cross(0)
    }

    /// The same for requests that may have broken down `crashes` drivers.
    pub(super) fn cross(&mut self, crashes: u8) -> Option<LaneFault> {
        if self.scratch.expected.is_empty() {
            return None;
        }
        // What was invalid is answered: it does not stay counted for as long as the driver takes.
        self.ledger.settle();
        let begun = self.begun();
        let called = match self.driver.as_mut() {
            Some(driver) => driver.submit(&self.scratch.requests, &mut self.scratch.chains),
            None => return None,
        };
        self.ended(begun);
        let called = called.map_err(|error| guest_fault(error, "submit"));
        self.note_interruption(&called);
        let checked = called.and_then(|()| {
            let Scratch { batch, chains, expected, .. } = &mut self.scratch;
            batch.parse(chains, expected, &[self.index]).map_err(|error| layout_fault(&error))
        });
        let mut batch = std::mem::take(&mut self.scratch.batch);
        let fault = match checked {
            Ok(()) => self.place(&batch),
            Err(fault) => Some(LaneFault::Guest(fault)),
        };
        if fault.is_some() {
            // Of a batch that was placed in part, what comes behind the faulty chain.
            self.set_aside(crashes + 1);
        }
        batch.clear();
        self.scratch.batch = batch;
        fault
    }

    pub(super) fn note_interruption(&mut self, called: &Result<(), GuestFault>) {
        let killed = called.as_ref().is_err_and(|fault| fault.kind == FaultKind::Killed);
        self.interrupted += usize::from(killed);
    }

    /// Puts checked chains on the ring, in the driver's order and behind those that already wait for room.
    fn place(&mut self, batch: &ChainBatch) -> Option<LaneFault> {
        for outcome in batch.iter() {
            match outcome {
                Outcome::Refused { token, status, .. } => {
                    let mut nobody = Vec::new();
                    let result = IoError::from_status(status);
                    self.answer(token, result, &mut Sink { me: None, out: &mut nobody });
                }
                Outcome::Chain(chain) => {
                    let token = chain.token();
                    let added = match (&mut self.ring, self.parked.is_empty()) {
                        (Some(ring), true) => ring.add(&chain),
                        // It would wait for a room that there can never be.
                        (Some(ring), false) if chain.segment_count() > ring.config().size => {
                            Err(AddError::TooLong { segments: chain.segment_count(), size: ring.config().size })
                        }
                        _ => Err(AddError::NoRoom { needed: chain.segment_count(), free: 0 }),
                    };
                    let stage = match added {
                        Ok(()) => Stage::Published,
                        Err(AddError::NoRoom { .. }) => {
                            self.parked.push_back(chain.to_buf());
                            Stage::Parked
                        }
                        Err(AddError::Poisoned(fault)) => {
                            self.device_fault = Some(fault);
                            return Some(LaneFault::Device(fault));
                        }
                        // A chain that can never fit is the driver's mistake: it knows the ring's size from its plan.
                        Err(error @ (AddError::TooLong { .. } | AddError::WrongQueue { .. })) => {
                            return Some(LaneFault::Guest(GuestFault::layout(error.to_string())));
                        }
                    };
                    self.ledger.set_stage(token, stage);
                }
            }
        }
        None
    }

    /// Fails requests that the device was never given.
    pub(super) fn fail(&mut self, tokens: &[u32]) {
        let mut nobody = Vec::new();
        self.lost.fetch_add(tokens.len() as u64, Ordering::Relaxed);
        for token in tokens {
            self.answer(*token, Err(IoError::DeviceFault), &mut Sink { me: None, out: &mut nobody });
        }
    }

    /// Reaps up to 64 used elements and answers them. Without `cross` the driver is not called: what it would have to judge is put
    /// aside, for a later look that may.
    pub(super) fn reap_batch(&mut self, cross: bool, sink: &mut Sink<'_>) -> Reaped {
        self.scratch.responses.clear();
        self.scratch.tokens.clear();
        self.scratch.judged.clear();
        self.scratch.mine.clear();
        if self.device_fault.is_some() {
            return Reaped { more: false, fault: None };
        }
        let cross = cross && !self.is_waiting();
        // Looked up with the first answer: most looks of a poller find none.
        let mut mine = None;
        let mut count = 0;
        let mut fault = None;
        while cross && count < MAX_BATCH {
            let Some(judged) = self.unjudged.pop_front() else { break };
            let is_suspect = judged.crashes > 0;
            if is_suspect && count > 0 {
                self.unjudged.push_front(judged);
                break;
            }
            count += 1;
            self.ask(judged);
            if is_suspect {
                // By itself: it may have broken down a driver.
                return Reaped { more: true, fault: self.judge(sink) };
            }
        }
        while count < MAX_BATCH {
            let Some(ring) = &mut self.ring else { break };
            match ring.pop_but(self.ordinary.as_ref()) {
                Ok(Popped::Ordinary(token)) => {
                    count += 1;
                    let owner = mine.get_or_insert_with(|| sink.me.and_then(|me| self.ledger.owner_of(me)));
                    match owner.and_then(|owner| self.ledger.claim(token, owner)) {
                        Some(place) => {
                            self.note_claimed(token, place);
                            self.scratch.mine.push(place);
                        }
                        None => self.answer(token, Ok(()), sink),
                    }
                }
                Ok(Popped::Other(used)) => {
                    count += 1;
                    let judged = Judged { used, crashes: 0 };
                    if cross && self.unjudged.is_empty() {
                        self.ask(judged);
                    } else {
                        self.unjudged.push_back(judged);
                    }
                }
                Ok(Popped::Nothing) => break,
                Err(broken) => {
                    self.device_fault = Some(broken);
                    fault = Some(LaneFault::Device(broken));
                    break;
                }
            }
        }
        if let Some(Some(owner)) = mine {
            self.ledger.answer_all(owner, &self.scratch.mine, sink.out);
        }
        if let Some(guest) = self.judge(sink) {
            fault.get_or_insert(guest);
        }
        Reaped { more: count == MAX_BATCH || (cross && !self.unjudged.is_empty()), fault }
    }

    /// Puts a response on the list that the driver is asked about next.
    fn ask(&mut self, judged: Judged) {
        let used = &judged.used;
        words::push_response(&mut self.scratch.responses, used.token, used.written, used.status());
        self.scratch.tokens.push(used.token);
        self.scratch.judged.push(judged);
    }

    /// One crossing for the responses that were not ordinary.
    fn judge(&mut self, sink: &mut Sink<'_>) -> Option<LaneFault> {
        if self.scratch.tokens.is_empty() {
            return None;
        }
        // What is answered already does not stay counted for as long as the driver takes.
        self.ledger.settle();
        let begun = self.begun();
        let called = match (&mut self.driver, self.health) {
            (Some(driver), Health::Works) => driver
                .complete(&self.scratch.responses, &mut self.scratch.answers)
                .map_err(|e| guest_fault(e, "complete")),
            // L5: nobody is left who could judge; an extraordinary response is not a success.
            _ => {
                let tokens = std::mem::take(&mut self.scratch.tokens);
                for token in &tokens {
                    self.answer(*token, Err(IoError::Io), sink);
                }
                self.scratch.tokens = tokens;
                return None;
            }
        };
        self.ended(begun);
        self.note_interruption(&called);
        let checked = called.and_then(|()| {
            let Scratch { answers, tokens, verdicts, .. } = &mut self.scratch;
            words::parse_answers(answers, tokens, verdicts).map_err(|error| GuestFault::layout(error.to_string()))
        });
        match checked {
            Ok(()) => {
                let verdicts = std::mem::take(&mut self.scratch.verdicts);
                for (position, status) in &verdicts {
                    let Used { token, written, offered: writable, .. } = self.scratch.judged[*position].used;
                    // Bytes that the device did not write are somebody else's old data: no driver may call that a success.
                    let (short, bytes) = match self.ledger.op(token) {
                        Some(IoOp::Read | IoOp::GetId) => (written < writable, 0),
                        Some(IoOp::Fill) => (written == 0, written),
                        _ => (false, 0),
                    };
                    let result = if short && *status == Status::Ok {
                        Err(IoError::DeviceFault)
                    } else {
                        IoError::from_status(*status)
                    };
                    self.answer_with(token, result, bytes, sink);
                }
                self.scratch.verdicts = verdicts;
                None
            }
            Err(fault) => {
                // For the next driver, in order; what breaks that one too is no success.
                let mut judged = std::mem::take(&mut self.scratch.judged);
                for Judged { used, crashes } in judged.drain(..).rev() {
                    if crashes + 1 >= POISON {
                        self.answer(used.token, Err(IoError::Io), sink);
                    } else {
                        self.unjudged.push_front(Judged { used, crashes: crashes + 1 });
                    }
                }
                self.scratch.judged = judged;
                Some(LaneFault::Guest(fault))
            }
        }
    }

    /// The one place where an operation ends: the ledger forgets it, its client gets the answer, and [`Ledger::settle`] counts it out.
    pub(super) fn answer(&mut self, token: u32, result: Result<(), IoError>, sink: &mut Sink<'_>) {
        self.answer_with(token, result, 0, sink);
    }

    fn answer_with(&mut self, token: u32, result: Result<(), IoError>, bytes: u32, sink: &mut Sink<'_>) {
        self.note_answer(token, result);
        let Some(Taken { user, buffer, owner: holder }) = self.ledger.remove(token) else { return };
        let Some(owner) = self.ledger.handle(holder) else { return };
        match sink.me {
            Some(me) if Arc::ptr_eq(me, owner) => sink.out.push(Completion { user, result, bytes, buffer }),
            _ => {
                owner.deliver(Completion { user, result, bytes, buffer });
                note_owner(&mut self.scratch.to_wake, owner);
            }
        }
        self.ledger.over(holder);
    }

    /// Moves parked chains to the ring while there is room; how many.
    pub(super) fn unpark(&mut self) -> usize {
        let mut moved = 0;
        if self.keeps_off() || self.health == Health::Away {
            return moved;
        }
        while let (Some(parked), Some(ring)) = (self.parked.front(), &mut self.ring) {
            let chain = parked.chain();
            if ring.add(&chain).is_err() {
                break;
            }
            let token = chain.token();
            self.ledger.set_stage(token, Stage::Published);
            self.parked.pop_front();
            moved += 1;
        }
        moved
    }

    /// Answers everything that the device was never given as failed. Nothing is published from here on.
    pub(super) fn withdraw(&mut self) -> usize {
        self.parked.clear();
        // Answered below.
        self.aside.clear();
        if self.is_waiting() {
            self.health = Health::Gone;
        }
        let mut nobody = Vec::new();
        let mut withdrawn = 0;
        for token in self.ledger.tokens() {
            if self.ledger.stage(token).is_some_and(|stage| stage != Stage::Published) {
                self.answer(token, Err(IoError::Revoked), &mut Sink { me: None, out: &mut nobody });
                withdrawn += 1;
            }
        }
        withdrawn
    }

    /// Whether nothing may be given to the device: the ladder has begun to silence it, or another process may have it.
    pub(super) fn keeps_off(&self) -> bool {
        self.handed_over || self.withdrawn.load(Ordering::Acquire)
    }

    /// Makes what was added visible, and tells the device if it wants to be told.
    pub(super) fn ring_doorbell(&mut self) {
        let keeps_off = self.keeps_off();
        let (Some(ring), Some(doorbell), false) = (&mut self.ring, &self.doorbell, keeps_off) else { return };
        // Of one request at a time the device is always asked to notify, also where the client only looks. What sending the notification takes is time in which the next
        // request comes, and a device that looks once more before it sleeps (qemu-storage-daemon) finds it: without, each request waits for a kick and a wake-up. From
        // four in flight it costs a third (measured in docs/PERFORMANCE.md).
        if ring.in_flight() == 1 && ring.config().event_idx {
            ring.arm_next();
        }
        if ring.publish() {
            doorbell.ring();
        }
    }

    /// `notify`'s owner is here.
    pub(super) fn awake(&mut self, notify: &Arc<Notify>) {
        self.sleepers.retain(|sleeper| !Arc::ptr_eq(sleeper, notify));
    }

    /// `notify`'s owner is about to sleep on the call descriptor.
    pub(super) fn asleep(&mut self, notify: &Arc<Notify>) {
        // Of one that only the list still knows, the client is gone.
        self.sleepers.retain(|sleeper| Arc::strong_count(sleeper) > 1);
        self.sleepers.push(Arc::clone(notify));
    }

    pub(super) fn forget_sleepers(&mut self) {
        self.sleepers.clear();
    }

    pub(super) fn somebody_sleeps(&self) -> bool {
        !self.sleepers.is_empty()
    }

    pub(super) fn arm(&mut self) -> bool {
        self.device_fault.is_none() && self.ring.as_mut().is_some_and(SplitQueue::arm)
    }

    /// Signals the handles that got answers from `me`'s poll. Those that share its notify are counted instead: `me` polls them itself.
    pub(super) fn wake_others(&mut self, me: &Arc<HandleShared>) -> usize {
        self.ledger.settle();
        let mut shared = 0;
        for handle in self.scratch.to_wake.drain(..) {
            if Arc::ptr_eq(&handle.notify, &me.notify) {
                shared += 1;
            } else {
                handle.notify.signal();
            }
        }
        shared
    }

    pub(super) fn wake_all(&mut self) {
        self.ledger.settle();
        for handle in self.scratch.to_wake.drain(..) {
            handle.notify.signal();
        }
    }
}

fn note_owner(to_wake: &mut Vec<Arc<HandleShared>>, owner: &Arc<HandleShared>) {
    if !to_wake.iter().any(|noted| Arc::ptr_eq(noted, owner)) {
        to_wake.push(Arc::clone(owner));
    }
}

pub(super) fn guest_fault(error: CallError, export: &str) -> GuestFault {
    match error {
        CallError::Fault(fault) => fault,
        // `submit` and `complete` have no error in the contract, so a driver cannot answer one.
        CallError::Driver(error) => {
            GuestFault { kind: FaultKind::Layout, message: format!("{export}: {error}"), backtrace: Vec::new() }
        }
    }
}

fn layout_fault(error: &cofferdam_device::ChainError) -> GuestFault {
    GuestFault::layout(error.to_string())
}
