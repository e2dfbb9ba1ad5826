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
//! After a fault of the driver another instance takes its place (`revive`). Where none does nothing crosses any more (L5), but the ring is the host's: what is on it is still reaped, and its ordinary answers are answered.
//! After a fault of the device the ring is not believed any more, and what is on it waits for the device to be silenced (L1): by the ladder, or before it is brought back (`replay`).

mod exchange;
mod handover;
mod identity;
mod inside;
pub(crate) mod posted;
mod replay;
mod revive;

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cofferdam_device::{DmaArena, QueueEvents, SplitQueue};
use cofferdam_gate::{HandleRefused, Notify};
use cofferdam_lifecycle::Phase;
use cofferdam_runtime::{LaneDriver, LaneSetup};
use parking_lot::{Mutex, MutexGuard};
use rustix::io::ReadWriteFlags;

use crate::arrival::Arrivals;
use crate::binding::Binding;
use crate::board::{Board, Picture};
use crate::handle::HandleShared;
pub(crate) use crate::lane::exchange::Timing;
pub(crate) use crate::lane::handover::{EmptyState, LaneState, PostedState, RingState, channels};
pub(crate) use crate::lane::identity::{DiskId, NotTold, Place, ask as ask_id, shown as shown_id};
use crate::lane::inside::{Inside, Reaped, Sink};
use crate::lane::posted::{Pool, Posted};
pub(crate) use crate::lane::replay::{Fresh, Journal, Promise};
use crate::ledger::Stage;
use crate::offer::Offer;
use crate::request::{Completion, IoError, IoRequest};

/// How long a client that polls without a pause can keep the lease from somebody who waits for it: twenty times what the lock lets it.
const FAIR_TURN: Duration = Duration::from_millis(10);

/// Why a submission stopped before its end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stop {
    /// The gate said no.
    Refused(HandleRefused),
    /// The ledger is full.
    Full,
    /// Driver or device is at fault; the binding is about to leave.
    Gone,
}

/// What the end of a lane made of its operations.
pub(crate) struct LaneEnd {
    pub(crate) failed: usize,
    pub(crate) abandoned: usize,
    /// Crossings that ended because the ladder interrupted them.
    pub(crate) interrupted: usize,
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
    pub(crate) driver: Box<dyn LaneDriver>,
    pub(crate) queue: LaneQueue,
    pub(crate) arena: DmaArena,
    pub(crate) offer: Arc<Offer>,
    /// Its number.
    pub(crate) set: u16,
    /// What its driver was started with, and any that takes its place.
    pub(crate) setup: LaneSetup,
    /// The queue that it keeps filled, if its set has one.
    pub(crate) posted: Option<(Posted, OwnedFd)>,
    pub(crate) requests: usize,
    /// For a device that is to be brought back.
    pub(crate) journal: Option<Journal>,
    /// Its rings are another process's until [`Lane::keep`].
    pub(crate) is_adopted: bool,
    pub(crate) binding: Weak<Binding>,
    /// Wakes who looks for faults.
    pub(crate) wake: Arc<Notify>,
    /// Wakes who reaps for closed handles.
    pub(crate) reaper: Arc<Notify>,
}

/// See the module.
pub(crate) struct Lane {
    arena: DmaArena,
    /// The queue's call descriptor, kept apart so that a sleeper needs no lease.
    call: OwnedFd,
    /// That of the posted queue.
    posted_call: Option<OwnedFd>,
    /// The buffers of the posted queue.
    pool: Option<Arc<Pool>>,
    /// The handle that takes what arrives, counted from 1; 0: nobody does.
    receiver: AtomicU64,
    arrived: AtomicU64,
    dropped: AtomicU64,
    binding: Weak<Binding>,
    number: u16,
    setup: LaneSetup,
    wake: Arc<Notify>,
    reaper: Arc<Notify>,
    board: Arc<Board>,
    lost: Arc<AtomicU64>,
    withdrawn: Arc<AtomicBool>,
    /// The ladder has just waited for the lease in vain: until it gets it, it waits for no longer than [`FAIR_TURN`].
    stuck: AtomicBool,
    inside: Mutex<Inside>,
}

/// The lease. What was answered under it is counted out before it is given back.
struct Lease<'a>(MutexGuard<'a, Inside>);

impl Deref for Lease<'_> {
    type Target = Inside;

    fn deref(&self) -> &Inside {
        &self.0
    }
}

impl DerefMut for Lease<'_> {
    fn deref_mut(&mut self) -> &mut Inside {
        &mut self.0
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.0.ledger.settle();
    }
}

impl Lane {
    pub(crate) fn new(parts: LaneParts) -> Lane {
        let LaneParts {
            driver,
            queue,
            arena,
            offer,
            set,
            setup,
            posted,
            requests,
            journal,
            is_adopted,
            binding,
            wake,
            reaper,
        } = parts;
        let call = queue.events.call;
        let (posted, posted_call) = posted.unzip();
        let pool = posted.as_ref().map(|posted| Arc::clone(posted.pool()));
        // Of what is filled the client is told how much, which only the response says.
        let ordinary = queue.ordinary.filter(|_| !matches!(*offer, Offer::Entropy(_)));
        let queue = Inside::queue(queue.ring, queue.events.doorbell, ordinary);
        let mut inside = Inside::new(driver, queue, requests, offer, set, posted, journal);
        inside.handed_over = is_adopted;
        Lane {
            arena,
            call,
            posted_call,
            pool,
            receiver: AtomicU64::new(0),
            arrived: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            binding,
            number: set,
            setup,
            wake,
            reaper,
            board: Arc::clone(inside.ledger.board()),
            lost: Arc::clone(&inside.lost),
            withdrawn: Arc::clone(&inside.withdrawn),
            stuck: AtomicBool::new(false),
            inside: Mutex::new(inside),
        }
    }

    fn lease(&self) -> Lease<'_> {
        Lease(self.inside.lock())
    }

    fn try_lease(&self) -> Option<Lease<'_>> {
        self.inside.try_lock().map(Lease)
    }

    /// What requests are checked against from now on, whoever they are from. Waits for the lease, as long as a guest call may take.
    pub(crate) fn set_offer(&self, offer: &Arc<Offer>) {
        self.lease().offer = Arc::clone(offer);
    }

    pub(crate) fn arena(&self) -> &DmaArena {
        &self.arena
    }

    pub(crate) fn device_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// See [`crate::Handle::submit`].
    pub(crate) fn submit(&self, owner: &Arc<HandleShared>, requests: &mut Vec<IoRequest>) -> Result<(), Stop> {
        let mut lease = self.lease();
        let inside = &mut *lease;
        let mut taken = 0;
        let mut result = Ok(());
        while taken < requests.len() && result.is_ok() {
            let (count, stop) = inside.enter(&self.arena, owner, &mut requests[taken..]);
            taken += count;
            if let Some(stop) = stop {
                result = Err(stop);
            }
            if let Some(fault) = inside.cross_submit()
                && !self.report(inside, fault)
                && taken < requests.len()
            {
                result = inside.why_not().map_or(Ok(()), Err);
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
        let lease = if arm { Some(self.lease()) } else { self.try_lease() };
        let Some(mut lease) = lease else { return 0 };
        let before = out.len();
        lease.awake(&me.notify);
        self.reap(&mut lease, arm, true, &mut Sink { me: Some(me), out });
        // Answers of handles with a notify of their own are not this poller's business.
        let found = out.len() - before + lease.wake_others(me);
        if arm && found == 0 {
            lease.asleep(&me.notify);
        }
        found
    }

    /// The host's own poll: what is still unanswered afterwards, or `None` while somebody else has the lease. It never calls the driver; where the driver has to be
    /// asked, a thread of its own does that.
    pub(crate) fn try_reap(&self) -> Option<usize> {
        let mut lease = self.try_lease()?;
        self.reap(&mut lease, true, false, &mut Sink { me: None, out: &mut Vec::new() });
        let is_to_come = |binding: Arc<Binding>| matches!(binding.phase(), Phase::Recovering | Phase::Failed);
        if lease.is_waiting() && !self.binding.upgrade().is_some_and(is_to_come) {
            // It leaves, and nobody will come.
            lease.give_up();
        }
        lease.wake_all();
        let (left, unjudged) = (lease.ledger.len(), lease.unjudged.len());
        drop(lease);
        if unjudged > 0
            && let Some(binding) = self.binding.upgrade()
        {
            binding.judge_elsewhere();
        }
        Some(left)
    }

    /// Asks the driver about what [`Lane::try_reap`] put aside. Takes as long as a guest call may.
    pub(crate) fn judge(&self) {
        let mut lease = self.lease();
        self.reap(&mut lease, true, true, &mut Sink { me: None, out: &mut Vec::new() });
        lease.wake_all();
    }

    fn reap(&self, inside: &mut Inside, arm: bool, cross: bool, sink: &mut Sink<'_>) {
        if inside.handed_over {
            return;
        }
        if arm {
            self.clear_call();
        }
        // Whoever sleeps on the call descriptor was promised a notification: a poller that takes the answer it was set for has to set it again.
        let arm = arm || inside.somebody_sleeps();
        loop {
            let Reaped { more, fault } = inside.reap_batch(cross, sink);
            let revived = fault.is_some_and(|fault| self.report(inside, fault));
            if revived || more {
                continue;
            }
            if inside.unpark() > 0 {
                inside.ring_doorbell();
            }
            // Arming and looking again is one step (virtio 1.2, section 2.7.10): what came in between is reaped now, not slept on.
            if !(arm && inside.arm()) {
                return;
            }
        }
    }

    /// Empties the call descriptor. Done before the ring is looked at, so a notification that comes later wakes again.
    fn clear_call(&self) {
        clear(self.call.as_fd());
    }

    /// Becomes the one that takes what arrives; false where somebody else is, or nothing does.
    pub(crate) fn claim_receiver(&self, handle: u64) -> bool {
        let take = || self.receiver.compare_exchange(0, handle + 1, Ordering::AcqRel, Ordering::Acquire);
        self.posted_call.is_some() && take().is_ok()
    }

    /// Stops taking it.
    pub(crate) fn release_receiver(&self, handle: u64) {
        let _ = self.receiver.compare_exchange(handle + 1, 0, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Readable when the device used posted buffers.
    pub(crate) fn posted_fd(&self) -> Option<BorrowedFd<'_>> {
        self.posted_call.as_ref().map(AsFd::as_fd)
    }

    /// Arrivals that were taken, and buffers that the driver made nothing of.
    pub(crate) fn arrivals(&self) -> (u64, u64) {
        (self.arrived.load(Ordering::Relaxed), self.dropped.load(Ordering::Relaxed))
    }

    /// See [`crate::Handle::receive`]: up to 64 buffers' worth.
    pub(crate) fn receive(&self, arm: bool, out: &mut Arrivals) -> usize {
        let before = out.len();
        let mut lease = self.lease();
        if lease.handed_over {
            return 0;
        }
        if let Some(call) = self.posted_fd().filter(|_| arm) {
            clear(call);
        }
        loop {
            let (found, fault) = lease.receive(out);
            if found.dropped > 0 {
                self.dropped.fetch_add(found.dropped, Ordering::Relaxed);
            }
            if fault.is_some_and(|fault| self.report(&mut lease, fault)) {
                continue;
            }
            if found.more {
                // The caller comes again, also if nothing came of this look.
                if arm && out.len() == before {
                    self.wake_receiver();
                }
                break;
            }
            // Arming and looking again is one step, as in `reap`.
            if !(arm && lease.arm_posted()) {
                break;
            }
        }
        let found = out.len() - before;
        self.arrived.fetch_add(found as u64, Ordering::Relaxed);
        found
    }

    /// Has whoever takes what arrives look again.
    fn wake_receiver(&self) {
        if let Some(call) = self.posted_fd() {
            signal(call);
        }
    }

    /// The device runs: it is told of the buffers that are posted.
    pub(crate) fn kick_posted(&self) {
        let lease = self.lease();
        if let Some(posted) = lease.posted.as_ref().filter(|_| !lease.keeps_off()) {
            posted.kick();
        }
    }

    /// Gives the device back what clients have let go of.
    pub(crate) fn repost(&self) {
        if let Some(mut lease) = self.try_lease() {
            lease.repost();
        }
    }

    /// Has the reaping thread look at what closed handles left in flight.
    pub(crate) fn wake_reaper(&self) {
        self.reaper.signal();
    }

    /// Has the watching thread look for faults.
    pub(crate) fn wake_watch(&self) {
        self.wake.signal();
    }

    /// Another descriptor for one of its call descriptors.
    pub(crate) fn duplicate_call(&self, is_posted: bool) -> Option<OwnedFd> {
        let call = if is_posted { self.posted_fd() } else { Some(self.device_fd()) };
        call.and_then(|call| call.try_clone_to_owned().ok())
    }

    /// Its number, which is that of its set of queues.
    pub(crate) fn number(&self) -> u16 {
        self.number
    }

    /// The lease for the ladder, which waits until `until`, and once that was in vain no longer than it takes to get past a client that only polls.
    fn lease_for_ladder(&self, until: Instant) -> Option<Lease<'_>> {
        // The lock is fair to whoever waits for it, if it waits at all.
        let fair = Instant::now() + FAIR_TURN;
        let until = if self.stuck.load(Ordering::Relaxed) { fair } else { until.max(fair) };
        let lease = self.inside.try_lock_until(until).map(Lease);
        self.stuck.store(lease.is_none(), Ordering::Relaxed);
        lease
    }

    /// Takes back what the device was never given, and answers it as failed; how many that was. Nothing is published afterwards, also if there is no lease (`None`).
    pub(crate) fn withdraw(&self, until: Instant) -> Option<usize> {
        self.withdrawn.store(true, Ordering::Release);
        let mut lease = self.lease_for_ladder(until)?;
        let withdrawn = lease.withdraw();
        lease.wake_all();
        Some(withdrawn)
    }

    /// Requests that the device has been given and has not used, after one more look at the ring; `None` without the lease.
    pub(crate) fn still_published(&self, until: Instant) -> Option<usize> {
        let mut lease = self.lease_for_ladder(until)?;
        self.reap(&mut lease, true, false, &mut Sink { me: None, out: &mut Vec::new() });
        lease.wake_all();
        Some(lease.ring.as_ref().map_or(0, |ring| usize::from(ring.in_flight())))
    }

    /// Whether the device broke the ring's rules, so that waiting for it is pointless.
    pub(crate) fn device_is_broken(&self) -> bool {
        self.try_lease().is_some_and(|inside| inside.device_fault.is_some())
    }

    /// Requests so far that were failed before the device had them.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Requests that are not answered, as the board has them: needs no lease.
    pub(crate) fn unanswered(&self) -> u64 {
        self.board.read(0).stages.iter().sum()
    }

    /// Requests that are not answered; `None` without the lease.
    pub(crate) fn in_ledger(&self, until: Instant) -> Option<usize> {
        self.lease_for_ladder(until).map(|inside| inside.ledger.len())
    }

    /// What waits on this lane, with the `most` oldest requests. Needs no lease: whoever has it may be stuck in the driver.
    pub(crate) fn waiting(&self, most: usize) -> Picture {
        self.board.read(most)
    }

    /// Last look at the ring after the device was silenced; then everything that is left is failed, or abandoned if it was not (L1).
    /// `None` without the lease: then the lane's memory has to be retired as it is.
    ///
    /// The driver may be asked once more: it was killed if it could be stuck, and then answers at once.
    pub(crate) fn finish(&self, silent: bool, until: Instant) -> Option<LaneEnd> {
        let mut lease = self.lease_for_ladder(until)?;
        let inside = &mut *lease;
        let mut nobody = Vec::new();
        let mut sink = Sink { me: None, out: &mut nobody };
        self.reap(inside, false, true, &mut sink);
        let (mut failed, mut abandoned) = (0, 0);
        for token in inside.ledger.tokens() {
            let published = inside.ledger.stage(token) == Some(Stage::Published);
            if silent || !published {
                inside.answer(token, Err(IoError::Revoked), &mut sink);
                failed += 1;
            } else if let Some(taken) = inside.ledger.remove(token) {
                // The device may still write there: the buffer is never given back.
                if let Some(buffer) = taken.buffer {
                    buffer.retire();
                }
                inside.ledger.over(taken.owner);
                abandoned += 1;
            }
        }
        if let Some(pool) = &self.pool {
            // Posted buffers are nobody's requests: they are taken back, or kept for a device that may still write there.
            pool.end(silent);
        }
        let interrupted = std::mem::take(&mut lease.interrupted);
        lease.wake_all();
        Some(LaneEnd { failed, abandoned, interrupted })
    }

    /// Lets go of the ring's memory and of both notification channels. A client that still sleeps on the call descriptor's number is woken by its notify.
    pub(crate) fn drop_rings(&self, until: Instant) {
        if let Some(mut inside) = self.lease_for_ladder(until) {
            inside.ring = None;
            inside.doorbell = None;
            inside.posted = None;
            inside.forget_sleepers();
        }
        for call in [Some(self.call.as_fd()), self.posted_fd()].into_iter().flatten() {
            if let Err(error) = cofferdam_device::hollow_out(call) {
                tracing::error!(%error, "the call descriptor stays open");
            }
        }
    }

    /// Drops the store; whether that could be done. The lane is vacant: this takes its lease.
    pub(crate) fn drop_driver(&self, until: Instant) -> bool {
        // G9: a store whose lane is not vacant stays.
        let Some(driver) = self.lease_for_ladder(until).map(|mut inside| inside.driver.take()) else { return false };
        drop(driver);
        true
    }

    /// Keeps the store until the process ends, and nobody enters it any more; the bytes that it has.
    pub(crate) fn keep_driver(&self, until: Instant) -> u64 {
        let Some(driver) = self.lease_for_ladder(until).and_then(|mut inside| inside.driver.take()) else { return 0 };
        let bytes = driver.memory_bytes();
        std::mem::forget(driver);
        bytes
    }
}

/// Wakes whoever sleeps on a call descriptor, in the device's stead.
pub(crate) fn signal(call: BorrowedFd<'_>) {
    // A count that is full wakes just as well.
    let _ = rustix::io::write(call, &1_u64.to_ne_bytes());
}

/// Empties a call descriptor; whether there was something in it.
pub(crate) fn clear(call: BorrowedFd<'_>) -> bool {
    // The open file is shared with the backend, which may make it a blocking one: only a read that says so itself is sure not to block.
    let mut count = [0; 8];
    let into = &mut [std::io::IoSliceMut::new(&mut count)];
    rustix::io::preadv2(call, into, u64::MAX, ReadWriteFlags::NOWAIT).is_ok()
}
