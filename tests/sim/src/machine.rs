//! What all drivers' uses of one device share: its class, its faults, its counts and its records.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use crate::device::{Behaviour, Quiescence, SimError, Stats};
use crate::model::DeviceModel;
use crate::ring::Violation;
use crate::rng::Rng;
use crate::script::{Rule, Script};
use crate::session::Session;
use crate::store::PowerCut;

/// Configuration space reads as zeroes beyond its fields, up to here.
const CONFIG_READABLE_BYTES: usize = 256;

/// Most breaches of the specification that are kept; one queue can make one, then it stops.
const MAX_VIOLATIONS: usize = 1024;

#[derive(Default)]
struct Board {
    violations: Vec<Violation>,
    power_cuts: Vec<PowerCut>,
    sessions: Vec<Weak<Session>>,
    current: Weak<Session>,
    /// Counts announcements: a watcher that saw the same count before and after its question may sleep.
    announced: u64,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) taken: AtomicU64,
    pub(crate) answered: AtomicU64,
    pub(crate) waiting: AtomicU64,
    pub(crate) gated: AtomicU64,
    pub(crate) notifications: AtomicU64,
    pub(crate) doorbells: AtomicU64,
    config_reads: AtomicU64,
    sessions: AtomicU64,
    deaths: AtomicU64,
}

/// What all sessions of one device share.
pub(crate) struct Machine {
    pub(crate) model: Arc<dyn DeviceModel>,
    /// Number of queues.
    pub(crate) queues: u16,
    pub(crate) seed: u64,
    pub(crate) spin: Duration,
    pub(crate) quiescence: Quiescence,
    pub(crate) script: Mutex<Script>,
    /// No rule can touch a request.
    quick: AtomicBool,
    hung: AtomicBool,
    frozen: AtomicBool,
    /// How many more requests the gate lets through; `u64::MAX` is open.
    gate: AtomicU64,
    /// Held for reading over everything that has an effect on the medium or the driver's memory; whoever stops the device
    /// takes it for writing, and so knows that the last effect is over.
    pub(crate) power: RwLock<()>,
    pub(crate) counters: Counters,
    board: Mutex<Board>,
    changed: Condvar,
    /// Threads in `wait_until`: nobody is woken, and no lock taken, when there is none.
    watchers: AtomicU64,
}

impl Machine {
    pub(crate) fn new(model: Arc<dyn DeviceModel>, behaviour: &Behaviour) -> Result<Self, SimError> {
        let Behaviour { seed, rules, quiescence, spin } = behaviour;
        let (queues, size) = (model.queues(), model.queue_size());
        if queues == 0 || queues > 64 {
            return Err(SimError::Profile("1 to 64 queues"));
        }
        if !size.is_power_of_two() || size > crate::ring::MAX_QUEUE_SIZE {
            return Err(SimError::Profile("the queue size is a power of two, at most 32768"));
        }
        let machine = Self {
            model,
            queues,
            seed: *seed,
            spin: *spin,
            quiescence: *quiescence,
            script: Mutex::new(Script::new(rules, *seed)),
            quick: AtomicBool::new(false),
            hung: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            gate: AtomicU64::new(0),
            power: RwLock::new(()),
            counters: Counters::default(),
            board: Mutex::default(),
            changed: Condvar::new(),
            watchers: AtomicU64::new(0),
        };
        machine.script_changed();
        Ok(machine)
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn script_changed(&self) {
        let quick = self.script().is_idle();
        self.quick.store(quick, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn is_quick(&self) -> bool {
        self.quick.load(Ordering::Relaxed)
    }

    pub(crate) fn is_hung(&self) -> bool {
        self.hung.load(Ordering::SeqCst)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::SeqCst)
    }

    pub(crate) fn hang(&self, freeze: bool) {
        self.frozen.fetch_or(freeze, Ordering::SeqCst);
        self.hung.store(true, Ordering::SeqCst);
    }

    /// Lets one request through the gate, if it is open.
    pub(crate) fn pass_gate(&self) -> bool {
        let take = |tickets| if tickets == u64::MAX { Some(tickets) } else { u64::checked_sub(tickets, 1) };
        self.gate.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok()
    }

    pub(crate) fn violation(&self, violation: Violation) {
        let mut board = self.board();
        if board.violations.len() < MAX_VIOLATIONS {
            board.violations.push(violation);
        }
    }

    /// Something changed that [`crate::SimDevice::wait_until`] may be waiting for.
    pub(crate) fn announce(&self) {
        if self.watchers.load(Ordering::SeqCst) > 0 {
            self.board().announced += 1;
            self.changed.notify_all();
        }
    }

    pub(crate) fn wake(&self) {
        let sessions: Vec<_> = self.board().sessions.iter().filter_map(Weak::upgrade).collect();
        sessions.iter().for_each(|session| session.wake());
        self.announce();
    }

    pub(crate) fn end_sessions(&self) {
        let sessions: Vec<_> = self.board().sessions.iter().filter_map(Weak::upgrade).collect();
        sessions.iter().for_each(|session| session.end());
    }

    pub(crate) fn offered_features(&self) -> u64 {
        let class = self.model.device_type();
        self.script().config_lies().iter().fold(self.model.features(), |bits, lie| bits | lie.feature(class))
    }

    /// Reads configuration space, lies included. `None`: not that far.
    pub(crate) fn read_config(&self, offset: u32, into: &mut [u8]) -> Option<()> {
        self.counters.config_reads.fetch_add(1, Ordering::SeqCst);
        let mut fields = self.model.config();
        let mut script = self.script();
        let mut readable = CONFIG_READABLE_BYTES;
        for lie in script.config_lies() {
            readable = lie.tell(self.model.device_type(), &mut fields, script.rng()).unwrap_or(readable);
        }
        fields.resize(CONFIG_READABLE_BYTES, 0);
        let from = offset as usize;
        into.copy_from_slice(fields[..readable].get(from..from.checked_add(into.len())?)?);
        Some(())
    }

    /// The current driver loses the device. With `power_cut`, so does the medium lose what was not flushed.
    pub(crate) fn die(&self, power_cut: bool) -> PowerCut {
        let current = self.board().current.upgrade();
        let mut outcome = PowerCut::default();
        // For writing: the last effect of every queue is over, and the next one sees that the session is lost.
        {
            let _power = self.power.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(session) = &current {
                session.lose();
            }
            if power_cut {
                let mut rng = Rng::part(self.seed, 1000 + self.board().power_cuts.len() as u64);
                outcome = self.model.power_cut(&mut rng);
                self.board().power_cuts.push(outcome);
            }
        }
        self.counters.deaths.fetch_add(1, Ordering::SeqCst);
        self.wake();
        outcome
    }

    /// Waits until `done`, which is asked whenever something changed, or until `deadline`.
    pub(crate) fn wait_for(&self, deadline: Instant, mut done: impl FnMut() -> bool) -> bool {
        self.watchers.fetch_add(1, Ordering::SeqCst);
        let outcome = loop {
            let announced = self.board().announced;
            // Asked without the board's lock: it may take a queue's, whose holder may be waiting for the board.
            if done() {
                break true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                break false;
            };
            // The bound is for what nobody announces, such as a doorbell or a chain that was only just made available.
            let left = left.min(Duration::from_millis(50));
            let same = |board: &mut Board| board.announced == announced;
            drop(self.changed.wait_timeout_while(self.board(), left, same).unwrap_or_else(PoisonError::into_inner));
        };
        self.watchers.fetch_sub(1, Ordering::SeqCst);
        outcome
    }

    pub(crate) fn stats(&self) -> Stats {
        // For writing: a batch counts what it did before it lets go, so whoever saw an answer sees it counted, and the other
        // way round.
        let _power = self.power.write().unwrap_or_else(PoisonError::into_inner);
        let read = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
        let Counters { taken, answered, waiting, gated, notifications, doorbells, config_reads, sessions, deaths } =
            &self.counters;
        Stats {
            taken: read(taken),
            answered: read(answered),
            waiting: read(waiting),
            gated: read(gated),
            notifications: read(notifications),
            doorbells: read(doorbells),
            config_reads: read(config_reads),
            hung: self.is_hung(),
            sessions: read(sessions),
            deaths: read(deaths),
        }
    }

    /// A new driver.
    pub(crate) fn claim(self: &Arc<Self>, stepped: bool) -> Result<Arc<Session>, SimError> {
        let mut board = self.board();
        if board.current.upgrade().is_some_and(|session| !session.is_over()) {
            return Err(SimError::Claimed);
        }
        let number = self.counters.sessions.fetch_add(1, Ordering::SeqCst) + 1;
        self.model.claimed();
        let session = Arc::new(Session::new(Arc::clone(self), number, stepped)?);
        board.current = Arc::downgrade(&session);
        board.sessions.retain(|session| session.strong_count() > 0);
        board.sessions.push(Arc::downgrade(&session));
        Ok(session)
    }

    pub(crate) fn current(&self) -> Option<Arc<Session>> {
        self.board().current.upgrade()
    }

    /// Queues of the current driver, a bit each, have something to do.
    pub(crate) fn wake_queues(&self, queues: u64) {
        if let Some(session) = self.current() {
            session.wake_queues(queues);
        }
    }

    /// Configuration space changed: the driver in process is told.
    pub(crate) fn config_changed(&self) {
        if let Some(session) = self.current() {
            session.announce_config();
        }
    }

    /// Lets this many more requests through the gate.
    pub(crate) fn open_gate(&self, requests: u64) {
        let add = |tickets: u64| Some(tickets.saturating_add(requests));
        let _ = self.gate.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add);
        self.wake();
    }

    /// Ends a hang.
    pub(crate) fn release(&self) {
        self.frozen.store(false, Ordering::SeqCst);
        self.hung.store(false, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn violations(&self) -> Vec<Violation> {
        self.board().violations.clone()
    }

    pub(crate) fn power_cuts(&self) -> Vec<PowerCut> {
        self.board().power_cuts.clone()
    }

    pub(crate) fn add_rule(&self, rule: Rule) {
        self.script().add(rule);
        self.script_changed();
    }

    pub(crate) fn clear_rules(&self) {
        self.script().clear();
        self.script_changed();
    }
}
