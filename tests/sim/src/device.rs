//! A device as a test holds it, whatever its class: the levers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::machine::Machine;
use crate::model::DeviceModel;
use crate::ring::Violation;
use crate::script::Rule;
use crate::session::Session;
use crate::store::PowerCut;
use crate::transport::{Drive, SimTransport};

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

/// How a device behaves, whatever its class.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    /// The seed of everything that is drawn. Print it when a test fails.
    pub seed: u64,
    /// Its faults.
    pub rules: Vec<Rule>,
    /// What quiesce can promise, in process.
    pub quiescence: Quiescence,
    /// How long a queue's thread looks for more before it arms notifications and sleeps. Zero: event mode.
    /// [`Duration::MAX`]: it polls for ever.
    pub spin: Duration,
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
    /// Devices lost so far (`die`, `power-cut`, [`SimDevice::die`], [`SimDevice::power_cut`]).
    pub deaths: u64,
}

/// A device of any class. Clones are handles of the same one; when the last handle, transport and server is gone, its threads
/// end. [`crate::Sim`], [`crate::SimNet`], [`crate::SimConsole`] and [`crate::SimRng`] are this and their class's own levers.
#[derive(Clone)]
pub struct SimDevice(Arc<Owner>);

struct Owner(Arc<Machine>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.end_sessions();
    }
}

impl SimDevice {
    pub(crate) fn new(model: Arc<dyn DeviceModel>, behaviour: &Behaviour) -> Result<Self, SimError> {
        Ok(Self(Arc::new(Owner(Arc::new(Machine::new(model, behaviour)?)))))
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.0.0
    }

    /// Claims the device. The claim ends with the session's last user, or when the device is lost or given up.
    pub(crate) fn claim(&self, stepped: bool) -> Result<Arc<Session>, SimError> {
        self.machine().claim(stepped)
    }

    /// The device as a transport in this process. One driver at a time; a new one may come when the old one has lost or
    /// released the device, and finds the same medium.
    pub fn transport(&self, drive: Drive) -> Result<SimTransport, SimError> {
        Ok(SimTransport::new(self.clone(), self.claim(drive == Drive::Stepped)?))
    }

    /// One tick by hand: takes what is available on every queue of the current driver, then executes and answers what is
    /// due, in queue order. Only with [`Drive::Stepped`]. Returns the number of requests answered.
    pub fn step(&self) -> u64 {
        let current = self.machine().current();
        current.map_or(0, |session| session.step())
    }

    /// Tells the driver in process that the configuration changed, whether it did or not. The library behind a socket has no such message.
    pub fn announce_config(&self) {
        self.machine().config_changed();
    }

    /// The seed that the sim was made with.
    pub fn seed(&self) -> u64 {
        self.machine().seed
    }

    /// Adds a fault; it counts requests from now on.
    pub fn add_rule(&self, rule: Rule) {
        self.machine().add_rule(rule);
    }

    /// Removes every fault. What a request met already stays with it, and a device that hangs goes on hanging.
    pub fn clear_rules(&self) {
        self.machine().clear_rules();
    }

    /// Lets `requests` more requests through the gate; [`u64::MAX`] opens it for good.
    pub fn open_gate(&self, requests: u64) {
        self.machine().open_gate(requests);
    }

    /// Makes the queues stand still from now on; with `freeze`, configuration and control messages too.
    pub fn hang(&self, freeze: bool) {
        self.machine().hang(freeze);
        self.machine().wake();
    }

    /// Ends a hang. What was taken before it is executed and answered now, even when its driver has given up on it: that is
    /// the danger that silence is about (DESIGN L1).
    pub fn release(&self) {
        self.machine().release();
    }

    /// The current driver loses the device at once. When this returns, the device has no more effect. The medium stays, the
    /// volatile cache too, and the next driver finds both.
    pub fn die(&self) {
        self.machine().die(false);
    }

    /// The current driver loses the device, and of what a disk has not flushed a part is lost, drawn from the seed. What
    /// was flushed stays.
    pub fn power_cut(&self) -> PowerCut {
        self.machine().die(true)
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
        self.machine().violations()
    }

    /// What each power cut did, oldest first.
    pub fn power_cuts(&self) -> Vec<PowerCut> {
        self.machine().power_cuts()
    }
}
