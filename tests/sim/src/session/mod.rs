//! One driver's use of the device: its memory, its queues, and the requests that were taken and not yet answered.
//!
//! ```text
//! take ──> judge ──> pending ──(its ticks are over, the gate let it through, nothing hangs)──> execute ──> answer
//! ```
//!
//! A request has its effect on the medium and on the driver's memory when it is executed, never before: a driver that gives
//! up on a slow request and reuses its buffer will see the buffer written.
//!
//! Locks, in the order in which they are taken: a queue, the machine's `power`, the script, the store's cache or the board.

mod event;
mod look;

pub(crate) use event::{Event, sleep};

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::machine::Machine;
use crate::memory::Memory;
use crate::model::{Role, Work};
use crate::ring::{Ring, RingSetup, Violation};
use crate::rng::Rng;
use crate::script::Fate;

/// How long a queue's thread sleeps for one tick.
const TICK: Duration = Duration::from_millis(1);

/// Idle looks at a polled queue, some 50 ns each, before its thread offers the core to others.
const LOOKS_PER_YIELD: u32 = 256;

struct Pending {
    work: Work,
    fate: Fate,
    /// The tick from which it may be executed.
    due: u64,
}

/// One virtqueue of a session.
pub(crate) struct Queue {
    index: u16,
    role: Role,
    ring: Option<Ring>,
    /// The driver stopped the ring: nothing new is taken, what was taken is still executed and answered.
    stopped: bool,
    /// The driver broke the specification: neither.
    broken: bool,
    pending: Vec<Pending>,
    /// By head.
    in_flight: Vec<bool>,
    rng: Rng,
}

/// What one look at a queue did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    /// Requests taken or answered.
    pub(crate) done: u64,
    pub(crate) answered: u64,
    /// The driver is to be notified this many times.
    pub(crate) signals: u32,
    /// Something waits for a later tick.
    ticking: bool,
    /// What is available is left there until the class has use for it: no doorbell is needed before its wake.
    idle: bool,
}

/// See the module.
pub(crate) struct Session {
    machine: Arc<Machine>,
    number: u64,
    features: AtomicU64,
    queues: Vec<Mutex<Queue>>,
    /// Signalled when a queue's thread has to look again although no doorbell rang.
    wakes: Vec<Event>,
    /// How a stepped session notifies the driver, by queue.
    calls: Vec<Mutex<Option<Arc<Event>>>>,
    /// Signalled when the device is lost or has something to say.
    event: Event,
    lost: AtomicBool,
    /// The configuration was announced to have changed.
    config_changed: AtomicBool,
    ended: AtomicBool,
    /// Given up by its driver while it hung: it ends by itself when it has done what it had taken.
    abandoned: AtomicBool,
    /// Stepped: the tick. Otherwise unused.
    steps: AtomicU64,
    /// `None`: stepped by hand.
    started: Option<Instant>,
    /// Requests that the driver will never get an answer to.
    forgotten: AtomicU64,
}

impl Session {
    pub(crate) fn new(machine: Arc<Machine>, number: u64, stepped: bool) -> std::io::Result<Self> {
        let queue = |index| {
            let rng = Rng::part(machine.seed, 2 + u64::from(index) + 100_000 * number);
            Mutex::new(Queue {
                index,
                role: Role::Serves,
                ring: None,
                stopped: false,
                broken: false,
                pending: Vec::new(),
                in_flight: Vec::new(),
                rng,
            })
        };
        Ok(Self {
            queues: (0..machine.queues).map(queue).collect(),
            wakes: (0..machine.queues).map(|_| Event::new()).collect::<Result<_, _>>()?,
            calls: (0..machine.queues).map(|_| Mutex::default()).collect(),
            number,
            features: AtomicU64::new(0),
            event: Event::new()?,
            lost: AtomicBool::new(false),
            config_changed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            steps: AtomicU64::new(0),
            started: (!stepped).then(Instant::now),
            forgotten: AtomicU64::new(0),
            machine,
        })
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    pub(crate) fn is_stepped(&self) -> bool {
        self.started.is_none()
    }

    pub(crate) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::SeqCst);
        self.machine.model.negotiated(features);
    }

    pub(crate) fn features(&self) -> u64 {
        self.features.load(Ordering::SeqCst)
    }

    pub(crate) fn event(&self) -> &Event {
        &self.event
    }

    pub(crate) fn wake_event(&self, index: u16) -> &Event {
        &self.wakes[usize::from(index)]
    }

    pub(crate) fn raise_event(&self) {
        self.event.signal();
    }

    /// Tells the driver in process that its configuration changed.
    pub(crate) fn announce_config(&self) {
        self.config_changed.store(true, Ordering::SeqCst);
        self.event.signal();
    }

    /// Whether that was announced since this was last asked.
    pub(crate) fn take_config_change(&self) -> bool {
        self.config_changed.swap(false, Ordering::SeqCst)
    }

    /// The device was lost. Only under the machine's `power`, for writing.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        self.event.signal();
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::SeqCst)
    }

    /// Lost or given up: nothing has an effect any more.
    pub(crate) fn is_over(&self) -> bool {
        self.is_lost() || self.ended.load(Ordering::SeqCst)
    }

    /// Requests that were taken and will never be answered.
    pub(crate) fn forgotten(&self) -> u64 {
        self.forgotten.load(Ordering::SeqCst)
    }

    /// Ends it; when this returns, nothing has an effect any more.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        // For writing: waits for the effects that began before.
        drop(self.machine.power.write().unwrap_or_else(PoisonError::into_inner));
        self.wake();
        self.drop_pending();
    }

    pub(crate) fn wake(&self) {
        self.wakes.iter().for_each(Event::signal);
    }

    /// The same for some queues, a bit each.
    pub(crate) fn wake_queues(&self, queues: u64) {
        for (index, wake) in self.wakes.iter().enumerate() {
            if queues & 1 << index != 0 {
                wake.signal();
            }
        }
    }

    fn queue(&self, index: u16) -> MutexGuard<'_, Queue> {
        self.queues[usize::from(index)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_pending(&self) {
        for index in 0..self.machine.queues {
            // A queue that is being looked at drops its own, see `look`.
            if let Ok(mut queue) = self.queues[usize::from(index)].try_lock() {
                self.forget(&mut queue);
            }
        }
    }

    fn forget(&self, queue: &mut Queue) {
        let counters = &self.machine.counters;
        counters.waiting.fetch_sub(queue.pending.len() as u64, Ordering::SeqCst);
        let gated = queue.pending.iter().filter(|pending| pending.fate.gated).count();
        counters.gated.fetch_sub(gated as u64, Ordering::SeqCst);
        queue.pending.clear();
    }

    /// Starts queue `index` on a ring, or starts it again. What was taken from an earlier ring and not answered is dropped.
    pub(crate) fn start(&self, index: u16, memory: &Arc<Memory>, setup: RingSetup) -> Result<(), Violation> {
        let mut queue = self.queue(index);
        self.forget(&mut queue);
        queue.ring = None;
        queue.broken = false;
        queue.role = self.machine.model.role(index);
        match Ring::new(Arc::clone(memory), setup) {
            Ok(ring) => {
                queue.in_flight = vec![false; usize::from(setup.size)];
                queue.ring = Some(ring);
                queue.stopped = false;
                Ok(())
            }
            Err(violation) => {
                self.machine.violation(violation.clone());
                Err(violation)
            }
        }
    }

    /// The driver has added or removed memory. When this returns, no queue reaches what was removed; a request that was taken and
    /// names it fails.
    pub(crate) fn set_memory(&self, memory: &Arc<Memory>) {
        for index in 0..self.machine.queues {
            if let Some(ring) = &mut self.queue(index).ring {
                ring.set_memory(Arc::clone(memory));
            }
        }
    }

    /// Whether queue `index` takes requests.
    pub(crate) fn is_started(&self, index: u16) -> bool {
        let queue = self.queue(index);
        queue.ring.is_some() && !queue.stopped
    }

    /// Stops taking from queue `index` and says up to which available index it took. As with a real vhost-user device, what
    /// was taken is not waited for, and may still have its effect.
    pub(crate) fn stop(&self, index: u16) -> Option<u16> {
        let mut queue = self.queue(index);
        queue.stopped = true;
        queue.ring.as_ref().map(Ring::next_available)
    }

    fn now(&self) -> u64 {
        match self.started {
            Some(started) => started.elapsed().as_millis() as u64,
            None => self.steps.load(Ordering::SeqCst),
        }
    }

    /// One tick of a stepped session.
    pub(crate) fn step(&self) -> u64 {
        if !self.is_stepped() {
            return 0;
        }
        self.steps.fetch_add(1, Ordering::SeqCst);
        let mut answered = 0;
        for index in 0..self.machine.queues {
            let progress = self.look(index);
            answered += progress.answered;
            if let Some(call) = &*self.call(index) {
                (0..progress.signals).for_each(|_| call.signal());
            }
        }
        self.end_if_abandoned();
        if self.is_over() {
            self.drop_pending();
        }
        answered
    }

    fn call(&self, index: u16) -> MutexGuard<'_, Option<Arc<Event>>> {
        self.calls[usize::from(index)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How [`Session::step`] notifies the driver of queue `index`.
    pub(crate) fn set_call(&self, index: u16, call: Arc<Event>) {
        *self.call(index) = Some(call);
    }

    /// The driver has gone: its descriptors are closed, whoever else still knows the session.
    pub(crate) fn forget_calls(&self) {
        for index in 0..self.machine.queues {
            *self.call(index) = None;
        }
    }

    /// The driver gives a hanging device up.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn end_if_abandoned(&self) {
        if self.abandoned.load(Ordering::SeqCst) && !self.machine.is_hung() && self.is_drained() {
            self.ended.store(true, Ordering::SeqCst);
            self.wake();
        }
    }

    /// Whether no request is available and nothing in flight. Posted buffers that nothing is put into are not requests.
    pub(crate) fn is_drained(&self) -> bool {
        (0..self.machine.queues).all(|index| {
            let queue = self.queue(index);
            let settled = queue.stopped || queue.role == Role::Delivers;
            queue.pending.is_empty() && (settled || queue.ring.as_ref().is_none_or(|ring| !ring.has_available()))
        })
    }

    /// Serves queue `index` until there is nothing to do before the next doorbell, wake or end, and leaves the driver's
    /// doorbell armed. `signal` notifies the driver.
    pub(crate) fn run(&self, index: u16, signal: impl Fn()) {
        let mut idle_since: Option<Instant> = None;
        let mut idle_looks = 0u32;
        loop {
            if self.is_over() {
                let mut queue = self.queue(index);
                self.forget(&mut queue);
                // Unmaps the driver's memory, unless another queue is still at it.
                queue.ring = None;
                return;
            }
            let progress = self.look(index);
            (0..progress.signals).for_each(|_| signal());
            if progress.done > 0 {
                idle_since = None;
                idle_looks = 0;
                continue;
            }
            let spin = self.machine.spin;
            let spins = !spin.is_zero() && !progress.ticking && self.may_spin(index);
            if spins && (spin == Duration::MAX || idle_since.get_or_insert_with(Instant::now).elapsed() < spin) {
                idle_looks = idle_looks.wrapping_add(1);
                // On a loaded machine the driver may be waiting for this very core, and would wait for a whole time slice.
                if idle_looks.is_multiple_of(LOOKS_PER_YIELD) {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
                continue;
            }
            if self.arm(index, progress.idle) {
                continue;
            }
            if !progress.ticking {
                self.end_if_abandoned();
                if self.is_over() {
                    continue;
                }
                return;
            }
            sleep(&[self.wake_event(index)], Some(TICK));
        }
    }

    fn may_spin(&self, index: u16) -> bool {
        let queue = self.queue(index);
        queue.ring.is_some() && !queue.stopped && !queue.broken && !self.machine.is_hung()
    }

    /// Asks for a doorbell, or, if `idle`, for none. True: something came meanwhile.
    fn arm(&self, index: u16, idle: bool) -> bool {
        let mut queue = self.queue(index);
        let standing = queue.stopped || queue.broken || self.machine.is_hung();
        let _power = self.machine.power.read().unwrap_or_else(PoisonError::into_inner);
        match &mut queue.ring {
            Some(ring) if !standing && !self.is_over() => {
                if idle {
                    ring.disarm();
                    return false;
                }
                let more = ring.arm();
                if more {
                    ring.disarm();
                }
                more
            }
            _ => false,
        }
    }
}
