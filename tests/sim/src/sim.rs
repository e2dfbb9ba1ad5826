//! The device as a test holds it: what it is made of, and the levers.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use crate::profile::{CONFIG_BYTES, Profile};
use crate::request::{Op, Request};
use crate::ring::Violation;
use crate::rng::Rng;
use crate::script::{Rule, Script};
use crate::session::Session;
use crate::store::{PowerCut, Storage, Store};
use crate::transport::{Drive, SimTransport};

/// Configuration space reads as zeroes beyond its fields, up to here.
const CONFIG_READABLE_BYTES: usize = 256;

/// Most breaches of the specification that are kept; one queue can make one, then it stops.
const MAX_VIOLATIONS: usize = 1024;

/// Why a sim cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The medium cannot be opened.
    #[error("cannot open the medium: {0}")]
    Storage(#[source] std::io::Error),
    /// The profile contradicts itself or the specification. To have a device lie about it, script a configuration lie.
    #[error("bad profile: {0}")]
    Profile(&'static str),
    /// The device has a driver already.
    #[error("the device is claimed")]
    Claimed,
    /// The host's own system call failed.
    #[error("cannot make an event descriptor: {0}")]
    Io(#[from] std::io::Error),
}

/// What [`cofferdam_device::transport::Transport::quiesce`] can promise, in process. A device that hangs promises nothing in
/// either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quiescence {
    /// As a PCI function that is reset: what was taken and not executed is dropped, silence is confirmed at once.
    #[default]
    Resets,
    /// As a vhost-user device: silent when every request was answered, and not before.
    Drains,
}

/// What a sim is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it offers.
    pub profile: Profile,
    /// Its medium.
    pub storage: Storage,
    /// The seed of everything that is drawn. Print it when a test fails.
    pub seed: u64,
    /// Its faults.
    pub rules: Vec<Rule>,
    /// What quiesce can promise, in process.
    pub quiescence: Quiescence,
    /// How long a queue's thread looks for more before it arms notifications and sleeps. Zero: event mode.
    /// [`Duration::MAX`]: it polls for ever.
    pub spin: Duration,
    /// Keep a record of every request executed; see [`Sim::journal`].
    pub journal: bool,
}

impl Default for Options {
    /// 64 MiB in memory, no faults, event mode.
    fn default() -> Self {
        Self {
            profile: Profile::default(),
            storage: Storage::Memory(64 << 20),
            seed: 0,
            rules: Vec::new(),
            quiescence: Quiescence::default(),
            spin: Duration::ZERO,
            journal: false,
        }
    }
}

/// Counts since the sim was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests taken from the rings.
    pub taken: u64,
    /// Requests answered (used elements shown), truthfully or not.
    pub answered: u64,
    /// Requests taken, neither answered nor forgotten nor dropped: in flight in the device now.
    pub waiting: u64,
    /// Of those, the ones at the gate.
    pub gated: u64,
    /// Used buffer notifications sent.
    pub notifications: u64,
    /// Doorbells heard; in process only.
    pub doorbells: u64,
    /// Reads of the configuration space.
    pub config_reads: u64,
    /// Whether the queues stand still (`hang` or `freeze`).
    pub hung: bool,
    /// Drivers that have claimed the device so far.
    pub sessions: u64,
    /// Devices lost so far (`die`, `power-cut`, [`Sim::die`], [`Sim::power_cut`]).
    pub deaths: u64,
}

/// One request that was executed, in the order of execution over all queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    /// Which queue it came by.
    pub queue: u16,
    /// What it was.
    pub op: Op,
    /// From its header.
    pub sector: u64,
    /// Its payload.
    pub payload_bytes: u64,
    /// The status it was executed with.
    pub status: u8,
    /// Which driver, counted from 1, published it.
    pub session: u64,
}

/// A virtio-blk device. Clones are handles of the same one; when the last handle, transport and server is gone, its threads
/// end.
#[derive(Clone)]
pub struct Sim(Arc<Owner>);

struct Owner(Arc<Machine>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.end_sessions();
    }
}

#[derive(Default)]
struct Board {
    violations: Vec<Violation>,
    journal: Vec<JournalEntry>,
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
    pub(crate) profile: Profile,
    pub(crate) store: Store,
    pub(crate) seed: u64,
    pub(crate) spin: Duration,
    pub(crate) quiescence: Quiescence,
    pub(crate) script: Mutex<Script>,
    /// No rule can touch a request, nothing is recorded and there is no payload: requests may be answered unread.
    quick: AtomicBool,
    journal: bool,
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
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn script_changed(&self) {
        let quick = self.store.is_null() && !self.journal && self.script().is_idle();
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

    pub(crate) fn record(&self, session: u64, queue: u16, request: &Request, status: u8) {
        if self.journal {
            let payload_bytes = request.payload_bytes();
            self.board().journal.push(JournalEntry {
                queue,
                op: request.op,
                sector: request.sector,
                payload_bytes,
                status,
                session,
            });
        }
    }

    /// Something changed that [`Sim::wait_until`] may be waiting for.
    pub(crate) fn announce(&self) {
        if self.watchers.load(Ordering::SeqCst) > 0 {
            self.board().announced += 1;
            self.changed.notify_all();
        }
    }

    fn wake(&self) {
        let sessions: Vec<_> = self.board().sessions.iter().filter_map(Weak::upgrade).collect();
        sessions.iter().for_each(|session| session.wake());
        self.announce();
    }

    fn end_sessions(&self) {
        let sessions: Vec<_> = self.board().sessions.iter().filter_map(Weak::upgrade).collect();
        sessions.iter().for_each(|session| session.end());
    }

    pub(crate) fn offered_features(&self) -> u64 {
        self.script().config_lies().iter().fold(self.profile.features(), |bits, lie| bits | lie.feature())
    }

    /// Reads configuration space, lies included. `None`: not that far.
    pub(crate) fn read_config(&self, offset: u32, into: &mut [u8]) -> Option<()> {
        self.counters.config_reads.fetch_add(1, Ordering::SeqCst);
        let mut fields = self.profile.config(self.store.capacity_bytes());
        let mut script = self.script();
        let mut readable = CONFIG_READABLE_BYTES;
        for lie in script.config_lies() {
            let told = lie.tell(&mut fields, script.rng());
            if told < CONFIG_BYTES {
                readable = told;
            }
        }
        let mut all = [0; CONFIG_READABLE_BYTES];
        all[..CONFIG_BYTES].copy_from_slice(&fields);
        let from = offset as usize;
        into.copy_from_slice(all[..readable].get(from..from.checked_add(into.len())?)?);
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
                // The medium is a file of this host; if that fails there is no test left to save.
                outcome = self.store.power_cut(&mut rng).unwrap_or_default();
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

    fn stats(&self) -> Stats {
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
}

impl Sim {
    /// A device made of `options`, with no driver yet.
    pub fn new(options: Options) -> Result<Self, SimError> {
        let Options { profile, storage, seed, rules, quiescence, spin, journal } = options;
        if profile.queues == 0 || profile.queues > 64 {
            return Err(SimError::Profile("1 to 64 queues"));
        }
        if !profile.queue_size.is_power_of_two() || profile.queue_size > crate::ring::MAX_QUEUE_SIZE {
            return Err(SimError::Profile("the queue size is a power of two, at most 32768"));
        }
        if profile.block_bytes.is_some_and(|bytes| !bytes.is_power_of_two() || bytes < 512) {
            return Err(SimError::Profile("the block size is a power of two, at least 512"));
        }
        let store =
            Store::open(&storage, profile.read_only, profile.logical_block_bytes()).map_err(SimError::Storage)?;
        let machine = Machine {
            store,
            seed,
            spin,
            quiescence,
            script: Mutex::new(Script::new(&rules, seed)),
            quick: AtomicBool::new(false),
            journal,
            hung: AtomicBool::new(false),
            frozen: AtomicBool::new(false),
            gate: AtomicU64::new(0),
            power: RwLock::new(()),
            counters: Counters::default(),
            board: Mutex::default(),
            changed: Condvar::new(),
            watchers: AtomicU64::new(0),
            profile,
        };
        machine.script_changed();
        Ok(Self(Arc::new(Owner(Arc::new(machine)))))
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.0.0
    }

    /// Claims the device. The claim ends with the session's last user, or when the device is lost or given up.
    pub(crate) fn claim(&self, stepped: bool) -> Result<Arc<Session>, SimError> {
        let machine = self.machine();
        let mut board = machine.board();
        if board.current.upgrade().is_some_and(|session| !session.is_over()) {
            return Err(SimError::Claimed);
        }
        let number = machine.counters.sessions.fetch_add(1, Ordering::SeqCst) + 1;
        let session = Arc::new(Session::new(Arc::clone(machine), number, stepped)?);
        board.current = Arc::downgrade(&session);
        board.sessions.retain(|session| session.strong_count() > 0);
        board.sessions.push(Arc::downgrade(&session));
        Ok(session)
    }

    /// The device as a transport in this process. One driver at a time; a new one may come when the old one has lost or
    /// released the device, and finds the same medium.
    pub fn transport(&self, drive: Drive) -> Result<SimTransport, SimError> {
        Ok(SimTransport::new(self.clone(), self.claim(drive == Drive::Stepped)?))
    }

    /// One tick by hand: takes what is available on every queue of the current driver, then executes and answers what is
    /// due, in queue order. Only with [`Drive::Stepped`]. Returns the number of requests answered.
    pub fn step(&self) -> u64 {
        let current = self.machine().board().current.upgrade();
        current.map_or(0, |session| session.step())
    }

    /// The seed that the sim was made with.
    pub fn seed(&self) -> u64 {
        self.machine().seed
    }

    /// Adds a fault; it counts requests from now on.
    pub fn add_rule(&self, rule: Rule) {
        self.machine().script().add(rule);
        self.machine().script_changed();
    }

    /// Removes every fault. What a request met already stays with it, and a device that hangs goes on hanging.
    pub fn clear_rules(&self) {
        self.machine().script().clear();
        self.machine().script_changed();
    }

    /// Lets `requests` more requests through the gate; [`u64::MAX`] opens it for good.
    pub fn open_gate(&self, requests: u64) {
        let add = |tickets: u64| Some(tickets.saturating_add(requests));
        let _ = self.machine().gate.fetch_update(Ordering::SeqCst, Ordering::SeqCst, add);
        self.machine().wake();
    }

    /// Makes the queues stand still from now on; with `freeze`, configuration and control messages too.
    pub fn hang(&self, freeze: bool) {
        self.machine().hang(freeze);
        self.machine().wake();
    }

    /// Ends a hang. What was taken before it is executed and answered now, even when its driver has given up on it: that is
    /// the danger that silence is about (DESIGN L1).
    pub fn release(&self) {
        self.machine().frozen.store(false, Ordering::SeqCst);
        self.machine().hung.store(false, Ordering::SeqCst);
        self.machine().wake();
    }

    /// The current driver loses the device at once. When this returns, the device has no more effect. The medium stays, the
    /// volatile cache too, and the next driver finds both.
    pub fn die(&self) {
        self.machine().die(false);
    }

    /// The current driver loses the device, and of what was not flushed a part is lost, drawn from the seed. What was
    /// flushed stays.
    pub fn power_cut(&self) -> PowerCut {
        self.machine().die(true)
    }

    /// Changes the capacity and announces that to the driver in process.
    pub fn resize(&self, bytes: u64) -> std::io::Result<()> {
        self.machine().store.resize(bytes)?;
        self.announce_config();
        Ok(())
    }

    /// Tells the driver in process that the configuration changed, whether it did or not. The library behind a socket has no such message.
    pub fn announce_config(&self) {
        let current = self.machine().board().current.upgrade();
        if let Some(session) = current {
            session.announce_config();
        }
    }

    /// The medium as a read would find it now: `bytes` bytes from `offset` bytes.
    pub fn contents(&self, offset: u64, bytes: usize) -> std::io::Result<Vec<u8>> {
        self.machine().store.contents(offset, bytes)
    }

    /// Size of the medium in bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.machine().store.capacity_bytes()
    }

    /// Counts since the sim was made.
    pub fn stats(&self) -> Stats {
        self.machine().stats()
    }

    /// Waits until `done` says so of the counts, for `limit` at most. False: it never did.
    pub fn wait_until(&self, limit: Duration, done: impl Fn(&Stats) -> bool) -> bool {
        self.machine().wait_for(Instant::now() + limit, || done(&self.machine().stats()))
    }

    /// What drivers did so far that the specification does not allow. A correct driver leaves it empty.
    pub fn violations(&self) -> Vec<Violation> {
        self.machine().board().violations.clone()
    }

    /// Every request executed so far, if [`Options::journal`] is set.
    pub fn journal(&self) -> Vec<JournalEntry> {
        self.machine().board().journal.clone()
    }

    /// What each power cut did, oldest first.
    pub fn power_cuts(&self) -> Vec<PowerCut> {
        self.machine().board().power_cuts.clone()
    }
}
