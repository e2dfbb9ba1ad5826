//! One driver instance and the queue it serves.
//!
//! ```text
//! submit: admit -> ledger -> [crossing: driver.submit] -> check -> ring -> doorbell
//! poll:   ring -> check -> (ordinary? answer : [crossing: driver.complete] -> answer) -> parked chains -> ring
//! ```
//!
//! The *lease* of a lane is the lock on its inside: whoever holds it runs the lane, on its own thread, to completion. A client's thread holds it for one batch; the
//! ladder takes it when it is free. It is held across a crossing, so a wait for it is bounded by the deadline of a guest call.
//!
//! After a fault of the driver nothing crosses any more (L5), but the ring is the host's: what is on it is still reaped, and its ordinary answers are answered.
//! After a fault of the device the ring is not believed any more, and what is on it waits for the ladder to silence the device (L1).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cofferdam_device::words::{self, MAX_BATCH};
use cofferdam_device::{
    AddError, BlockOp, ChainBatch, ChainBuf, DeviceFault, Direction, DmaArena, Expected, Outcome, Payload, QueueEvents, SplitQueue, Status, Used,
};
use cofferdam_gate::{Gate, Notify, Refused};
use cofferdam_runtime::{BlockDriver, CallError, FaultKind, GuestFault};
use parking_lot::Mutex;

use crate::binding::Binding;
use crate::block::{BlockError, BlockGeometry, BlockRequest, Completion, has_payload};
use crate::error::LaneFault;
use crate::handle::HandleShared;
use crate::ledger::{Entry, Ledger, Stage};

/// Why a submission stopped before its end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stop {
    /// The gate said no.
    Refused(Refused),
    /// The ledger is full.
    Full,
    /// Driver or device is at fault; the binding is about to leave.
    Gone,
}

/// What the end of a lane made of its operations.
pub(crate) struct LaneEnd {
    pub(crate) failed: usize,
    pub(crate) abandoned: usize,
}

/// A queue with its two notification channels.
pub(crate) struct LaneQueue {
    ring: SplitQueue,
    events: QueueEvents,
    /// The `status-in` bytes of a success (`queue-plan.ordinary-response`).
    ordinary: Option<Vec<u8>>,
}

impl LaneQueue {
    pub(crate) fn new(ring: SplitQueue, events: QueueEvents, ordinary: Option<Vec<u8>>) -> LaneQueue {
        LaneQueue { ring, events, ordinary }
    }
}

/// What a lane is made of.
pub(crate) struct LaneParts {
    pub(crate) gate: Gate,
    pub(crate) driver: Box<dyn BlockDriver>,
    pub(crate) queue: LaneQueue,
    pub(crate) arena: DmaArena,
    pub(crate) geometry: BlockGeometry,
    pub(crate) requests: usize,
    pub(crate) binding: Weak<Binding>,
    pub(crate) wake: Arc<Notify>,
}

/// See the module.
pub(crate) struct Lane {
    gate: Gate,
    geometry: BlockGeometry,
    arena: DmaArena,
    /// The queue's call descriptor, kept apart so that a sleeper needs no lease.
    call: OwnedFd,
    binding: Weak<Binding>,
    wake: Arc<Notify>,
    inside: Mutex<Inside>,
}

struct Inside {
    driver: Option<Box<dyn BlockDriver>>,
    ring: Option<SplitQueue>,
    doorbell: Option<Box<dyn cofferdam_device::Doorbell>>,
    ordinary: Option<Vec<u8>>,
    index: u16,
    ledger: Ledger,
    /// Checked chains that found no room on the ring, in order. Bounded by the ledger.
    parked: VecDeque<ChainBuf>,
    device_fault: Option<DeviceFault>,
    driver_fault: bool,
    scratch: Scratch,
}

/// Memory that is used again for every batch, so that the ordinary way allocates nothing.
#[derive(Default)]
struct Scratch {
    requests: Vec<u64>,
    expected: Vec<Expected>,
    chains: Vec<u32>,
    batch: ChainBatch,
    responses: Vec<u32>,
    judged: Vec<(u32, u32, u32)>,
    tokens: Vec<u32>,
    answers: Vec<u32>,
    verdicts: Vec<(usize, Status)>,
    /// Handles that got an answer from somebody else's poll.
    to_wake: Vec<Arc<HandleShared>>,
}

/// Where answers go: straight to the polling client if they are its own.
struct Sink<'a> {
    me: Option<&'a Arc<HandleShared>>,
    out: &'a mut Vec<Completion>,
}

impl Lane {
    pub(crate) fn new(parts: LaneParts) -> Lane {
        let LaneParts { gate, driver, queue, arena, geometry, requests, binding, wake } = parts;
        let call = queue.events.call;
        let inside = Inside {
            driver: Some(driver),
            index: queue.ring.config().index,
            ring: Some(queue.ring),
            doorbell: Some(queue.events.doorbell),
            ordinary: queue.ordinary,
            ledger: Ledger::new(requests),
            parked: VecDeque::new(),
            device_fault: None,
            driver_fault: false,
            scratch: Scratch::default(),
        };
        Lane { gate, geometry, arena, call, binding, wake, inside: Mutex::new(inside) }
    }

    pub(crate) fn geometry(&self) -> &BlockGeometry {
        &self.geometry
    }

    pub(crate) fn arena(&self) -> &DmaArena {
        &self.arena
    }

    pub(crate) fn device_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// See [`crate::Handle::submit`].
    pub(crate) fn submit(&self, owner: &Arc<HandleShared>, requests: &mut Vec<BlockRequest>) -> Result<(), Stop> {
        let mut lease = self.inside.lock();
        let inside = &mut *lease;
        let mut taken = 0;
        let mut result = Ok(());
        while taken < requests.len() && result.is_ok() {
            let batch = requests[taken..].iter_mut().take(MAX_BATCH);
            let (count, stop) = inside.enter(&self.gate, &self.geometry, owner, batch);
            taken += count;
            if let Some(stop) = stop {
                result = Err(stop);
            }
            let fault = inside.cross_submit(owner);
            if let Some(fault) = fault {
                self.report(fault);
                result = Err(Stop::Gone);
            }
        }
        inside.ring_doorbell();
        inside.wake_others(owner);
        requests.drain(..taken);
        result
    }

    /// See [`crate::Handle::poll`]: how many answers were found, whoever they are for.
    pub(crate) fn poll(&self, me: &Arc<HandleShared>, arm: bool, out: &mut Vec<Completion>) -> usize {
        // Whoever has the lease is reaping or about to: its answers reach `me` through its notify. Only a poller that is about to sleep has to
        // make sure that the device will wake somebody.
        let lease = if arm { Some(self.inside.lock()) } else { self.inside.try_lock() };
        let Some(mut lease) = lease else { return 0 };
        let before = out.len();
        let found = self.reap(&mut lease, arm, &mut Sink { me: Some(me), out });
        let mine = out.len() - before;
        let others = lease.wake_others(me);
        debug_assert!(found >= mine);
        // Answers of handles with a notify of their own are not this poller's business.
        mine + others
    }

    /// The ladder's poll: `None` while somebody else has the lease.
    pub(crate) fn try_reap(&self) -> Option<usize> {
        let mut lease = self.inside.try_lock()?;
        let found = self.reap(&mut lease, true, &mut Sink { me: None, out: &mut Vec::new() });
        lease.wake_all();
        Some(found)
    }

    fn reap(&self, inside: &mut Inside, arm: bool, sink: &mut Sink<'_>) -> usize {
        if arm {
            self.clear_call();
        }
        let mut found = 0;
        loop {
            let (count, fault) = inside.reap_batch(sink);
            found += count;
            if let Some(fault) = fault {
                self.report(fault);
            }
            if count == MAX_BATCH {
                continue;
            }
            if inside.unpark() > 0 {
                inside.ring_doorbell();
            }
            // Arming and looking again is one step (virtio 1.2, section 2.7.10): what came in between is reaped now, not slept on.
            if !(arm && inside.arm()) {
                return found;
            }
        }
    }

    /// Empties the call descriptor. Done before the ring is looked at, so a notification that comes later wakes again.
    fn clear_call(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.call, &mut count);
    }

    fn report(&self, fault: LaneFault) {
        if let Some(binding) = self.binding.upgrade() {
            let _ = binding.fault.set(fault);
            self.wake.signal();
        }
    }

    /// Requests that the device has been given and has not used.
    pub(crate) fn published(&self) -> usize {
        self.inside.lock().ring.as_ref().map_or(0, |ring| usize::from(ring.in_flight()))
    }

    /// Whether the device broke the ring's rules, so that waiting for it is pointless.
    pub(crate) fn device_is_broken(&self) -> bool {
        self.inside.try_lock().is_some_and(|inside| inside.device_fault.is_some())
    }

    pub(crate) fn in_ledger(&self) -> usize {
        self.inside.lock().ledger.len()
    }

    /// The request that has waited longest: its token, its age, how far it has come.
    pub(crate) fn oldest(&self) -> Option<(u32, Duration, &'static str)> {
        let (token, since, stage) = self.inside.try_lock()?.ledger.oldest()?;
        let stage = match stage {
            Stage::Given => "given to the driver",
            Stage::Parked => "waiting for room on the ring",
            Stage::Published => "on the ring",
        };
        Some((token, since.elapsed(), stage))
    }

    /// Last look at the ring after the device was silenced; then everything that is left is failed, or abandoned if it was not (L1).
    pub(crate) fn finish(&self, silent: bool) -> LaneEnd {
        let mut lease = self.inside.lock();
        let inside = &mut *lease;
        let mut nobody = Vec::new();
        let mut sink = Sink { me: None, out: &mut nobody };
        self.reap(inside, false, &mut sink);
        inside.parked.clear();
        let (mut failed, mut abandoned) = (0, 0);
        for token in inside.ledger.tokens() {
            let published = inside.ledger.get_mut(token).is_some_and(|entry| entry.stage == Stage::Published);
            if silent || !published {
                inside.answer(token, Err(BlockError::Revoked), &mut sink);
                failed += 1;
            } else if let Some(entry) = inside.ledger.remove(token) {
                // The device may still write there: the buffer is never given back.
                if let Some(buffer) = entry.buffer {
                    buffer.retire();
                }
                abandoned += 1;
            }
        }
        lease.wake_all();
        LaneEnd { failed, abandoned }
    }

    /// Lets go of the ring's memory and the doorbell.
    pub(crate) fn drop_rings(&self) {
        let mut inside = self.inside.lock();
        inside.ring = None;
        inside.doorbell = None;
    }

    /// Drops the store. The lane is vacant: this takes its lease.
    pub(crate) fn drop_driver(&self) {
        let driver = self.inside.lock().driver.take();
        drop(driver);
    }
}

impl Inside {
    /// Admits up to 64 requests and enters them in the ledger; what is invalid is answered at once. Returns how many were taken, and why no more.
    fn enter<'a>(
        &mut self,
        gate: &Gate,
        geometry: &BlockGeometry,
        owner: &Arc<HandleShared>,
        requests: impl Iterator<Item = &'a mut BlockRequest>,
    ) -> (usize, Option<Stop>) {
        self.scratch.requests.clear();
        self.scratch.expected.clear();
        let since = Instant::now();
        let mut taken = 0;
        for request in requests {
            if self.driver_fault || self.device_fault.is_some() || self.driver.is_none() {
                return (taken, Some(Stop::Gone));
            }
            if self.ledger.is_full() {
                return (taken, Some(Stop::Full));
            }
            let guard = match gate.admit() {
                Ok(guard) => guard,
                Err(refused) => return (taken, Some(Stop::Refused(refused))),
            };
            taken += 1;
            owner.requests.fetch_add(1, Ordering::Relaxed);
            let buffer = request.buffer.take();
            if let Err(error) = geometry.check(request.op, request.offset, request.length, buffer.as_ref()) {
                owner.deliver(Completion { user: request.user, result: Err(error), buffer });
                note_owner(&mut self.scratch.to_wake, owner);
                continue;
            }
            let payload = match (&buffer, request.op) {
                (Some(buffer), BlockOp::Write) => Some(Payload { iova: buffer.iova(), length: request.length, direction: Direction::Out }),
                (Some(buffer), op) if has_payload(op) => Some(Payload { iova: buffer.iova(), length: request.length, direction: Direction::In }),
                _ => None,
            };
            owner.in_flight.fetch_add(1, Ordering::Relaxed);
            let entry =
                Entry { owner: Arc::clone(owner), user: request.user, op: request.op, buffer, guard, stage: Stage::Given, since };
            let token = self.ledger.insert(entry);
            let flags = if request.flags.may_unmap { words::FLAG_UNMAP } else { 0 };
            words::push_request(&mut self.scratch.requests, token, request.op, flags, request.offset, u64::from(request.length));
            self.scratch.expected.push(Expected { token, payload });
        }
        (taken, None)
    }

    /// One crossing for what [`Inside::enter`] took; checks every word of the answer and puts the chains on the ring.
    fn cross_submit(&mut self, owner: &Arc<HandleShared>) -> Option<LaneFault> {
        if self.scratch.expected.is_empty() {
            return None;
        }
        let called = match self.driver.as_mut() {
            Some(driver) => driver.submit(&self.scratch.requests, &mut self.scratch.chains),
            None => return None,
        };
        let checked = called.map_err(|error| guest_fault(error, "submit")).and_then(|()| {
            let Scratch { batch, chains, expected, .. } = &mut self.scratch;
            batch.parse(chains, expected, &[self.index]).map_err(|error| layout_fault(&error))
        });
        let mut batch = std::mem::take(&mut self.scratch.batch);
        let fault = match checked {
            Ok(()) => self.place(&batch, owner),
            Err(fault) => {
                self.driver_fault = true;
                let given: Vec<u32> = self.scratch.expected.iter().map(|expected| expected.token).collect();
                self.fail(&given, owner);
                Some(LaneFault::Guest(fault))
            }
        };
        batch.clear();
        self.scratch.batch = batch;
        fault
    }

    /// Puts checked chains on the ring, in the driver's order and behind those that already wait for room.
    fn place(&mut self, batch: &ChainBatch, owner: &Arc<HandleShared>) -> Option<LaneFault> {
        for outcome in batch.iter() {
            match outcome {
                Outcome::Refused { token, status, .. } => {
                    let mut nobody = Vec::new();
                    let result = BlockError::from_status(status);
                    self.answer(token, result, &mut Sink { me: None, out: &mut nobody });
                }
                Outcome::Chain(chain) => {
                    let token = chain.token();
                    let added = match (&mut self.ring, self.parked.is_empty()) {
                        (Some(ring), true) => ring.add(&chain),
                        _ => Err(AddError::NoRoom { needed: chain.segment_count(), free: 0 }),
                    };
                    let stage = match added {
                        Ok(()) => Stage::Published,
                        Err(AddError::NoRoom { .. }) => {
                            self.parked.push_back(chain.to_buf());
                            Stage::Parked
                        }
                        Err(AddError::Poisoned(fault)) => {
                            self.device_fault = Some(fault.clone());
                            self.fail(&[token], owner);
                            return Some(LaneFault::Device(fault));
                        }
                        // A chain that can never fit is the driver's mistake: it knows the ring's size from its plan.
                        Err(error @ (AddError::TooLong { .. } | AddError::WrongQueue { .. })) => {
                            self.driver_fault = true;
                            self.fail(&[token], owner);
                            return Some(LaneFault::Guest(GuestFault::layout(error.to_string())));
                        }
                    };
                    if let Some(entry) = self.ledger.get_mut(token) {
                        entry.stage = stage;
                    }
                }
            }
        }
        None
    }

    /// Fails requests that the device was never given.
    fn fail(&mut self, tokens: &[u32], owner: &Arc<HandleShared>) {
        let mut nobody = Vec::new();
        for token in tokens {
            self.answer(*token, Err(BlockError::DeviceFault), &mut Sink { me: None, out: &mut nobody });
        }
        note_owner(&mut self.scratch.to_wake, owner);
    }

    /// Reaps up to 64 used elements and answers them. Returns how many were answered.
    fn reap_batch(&mut self, sink: &mut Sink<'_>) -> (usize, Option<LaneFault>) {
        self.scratch.responses.clear();
        self.scratch.tokens.clear();
        self.scratch.judged.clear();
        if self.device_fault.is_some() {
            return (0, None);
        }
        let mut count = 0;
        let mut fault = None;
        while count < MAX_BATCH {
            let Some(ring) = &mut self.ring else { break };
            match ring.pop() {
                Ok(Some(used)) => {
                    count += 1;
                    self.sort(&used, sink);
                }
                Ok(None) => break,
                Err(broken) => {
                    self.device_fault = Some(broken.clone());
                    fault = Some(LaneFault::Device(broken));
                    break;
                }
            }
        }
        if let Some(guest) = self.judge(sink) {
            fault.get_or_insert(guest);
        }
        (count, fault)
    }

    /// Answers what is the declared ordinary response, and keeps the rest for the driver.
    fn sort(&mut self, used: &Used, sink: &mut Sink<'_>) {
        let status = used.status();
        let complete = used.written == used.offered;
        if complete && self.ordinary.as_deref() == Some(status) {
            self.answer(used.token, Ok(()), sink);
        } else {
            words::push_response(&mut self.scratch.responses, used.token, used.written, status);
            self.scratch.tokens.push(used.token);
            self.scratch.judged.push((used.token, used.written, used.offered));
        }
    }

    /// One crossing for the responses that were not ordinary.
    fn judge(&mut self, sink: &mut Sink<'_>) -> Option<LaneFault> {
        if self.scratch.tokens.is_empty() {
            return None;
        }
        let called = match (&mut self.driver, self.driver_fault) {
            (Some(driver), false) => driver.complete(&self.scratch.responses, &mut self.scratch.answers).map_err(|e| guest_fault(e, "complete")),
            // L5: nobody is left who could judge; an extraordinary response is not a success.
            _ => {
                let tokens = std::mem::take(&mut self.scratch.tokens);
                for token in &tokens {
                    self.answer(*token, Err(BlockError::Io), sink);
                }
                self.scratch.tokens = tokens;
                return None;
            }
        };
        let checked = called.and_then(|()| {
            let Scratch { answers, tokens, verdicts, .. } = &mut self.scratch;
            words::parse_answers(answers, tokens, verdicts).map_err(|error| GuestFault::layout(error.to_string()))
        });
        match checked {
            Ok(()) => {
                let verdicts = std::mem::take(&mut self.scratch.verdicts);
                for (position, status) in &verdicts {
                    let (token, written, writable) = self.scratch.judged[*position];
                    let reads = self.ledger.get_mut(token).is_some_and(|entry| matches!(entry.op, BlockOp::Read | BlockOp::GetId));
                    // Bytes that the device did not write are somebody else's old data: no driver may call that a success.
                    let short = reads && written < writable;
                    let result = if short && *status == Status::Ok { Err(BlockError::DeviceFault) } else { BlockError::from_status(*status) };
                    self.answer(token, result, sink);
                }
                self.scratch.verdicts = verdicts;
                None
            }
            Err(fault) => {
                self.driver_fault = true;
                let tokens = std::mem::take(&mut self.scratch.tokens);
                for token in &tokens {
                    self.answer(*token, Err(BlockError::Io), sink);
                }
                self.scratch.tokens = tokens;
                Some(LaneFault::Guest(fault))
            }
        }
    }

    /// The one place where an operation ends: the ledger forgets it, its client gets the answer, the gate counts it out.
    fn answer(&mut self, token: u32, result: Result<(), BlockError>, sink: &mut Sink<'_>) {
        let Some(Entry { owner, user, buffer, guard, .. }) = self.ledger.remove(token) else { return };
        let completion = Completion { user, result, buffer };
        owner.in_flight.fetch_sub(1, Ordering::Release);
        match sink.me {
            Some(me) if Arc::ptr_eq(me, &owner) => sink.out.push(completion),
            _ => {
                owner.deliver(completion);
                note_owner(&mut self.scratch.to_wake, &owner);
            }
        }
        drop(guard);
    }

    /// Moves parked chains to the ring while there is room; how many.
    fn unpark(&mut self) -> usize {
        let mut moved = 0;
        while let (Some(parked), Some(ring)) = (self.parked.front(), &mut self.ring) {
            let chain = parked.chain();
            if ring.add(&chain).is_err() {
                break;
            }
            let token = chain.token();
            if let Some(entry) = self.ledger.get_mut(token) {
                entry.stage = Stage::Published;
            }
            self.parked.pop_front();
            moved += 1;
        }
        moved
    }

    /// Makes what was added visible, and tells the device if it wants to be told.
    fn ring_doorbell(&mut self) {
        if let (Some(ring), Some(doorbell)) = (&mut self.ring, &self.doorbell)
            && ring.publish()
        {
            doorbell.ring();
        }
    }

    fn arm(&mut self) -> bool {
        self.device_fault.is_none() && self.ring.as_mut().is_some_and(SplitQueue::arm)
    }

    /// Signals the handles that got answers from `me`'s poll. Those that share its notify are counted instead: `me` polls them itself.
    fn wake_others(&mut self, me: &Arc<HandleShared>) -> usize {
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

    fn wake_all(&mut self) {
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

fn guest_fault(error: CallError, export: &str) -> GuestFault {
    match error {
        CallError::Fault(fault) => fault,
        // `submit` and `complete` have no error in the contract, so a driver cannot answer one.
        CallError::Driver(error) => GuestFault { kind: FaultKind::Layout, message: format!("{export}: {error}"), backtrace: Vec::new() },
    }
}

fn layout_fault(error: &cofferdam_device::ChainError) -> GuestFault {
    GuestFault::layout(error.to_string())
}
