//! What becomes of a binding whose driver breaks down (DESIGN section 10): another instance takes its place, adopts rings and requests, and clients see a pause.
//!
//! ```text
//! fault -> broke_down -> at once:      by the thread that found it, under the lane's lease
//!                     -> after a wait: the gate is held, and a thread of its own does it
//!                     -> too often:    failed; clients get errors until an operator restarts it
//! ```
//!
//! The device is not touched: what is on a ring stays there and is answered as the device uses it. What the driver was given and the device was not is given to the new
//! one, one at a time; what breaks two drivers in a row is answered as failed, and the next is tried.

mod restarts;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_gate::{Gate, Hold, Overdue};
use cofferdam_lifecycle::{Event, Phase};
use cofferdam_runtime::{CallError, CallView, GuestFault, Instance, LaneDriver, LaneId};
use parking_lot::Mutex;

use crate::binding::Binding;
use crate::crash::{Crash, CrashReport, Crashes, Spool};
use crate::error::{LaneFault, RestartError};
use crate::events::EventKind;
use crate::lane::Lane;
use crate::maker::Maker;
use crate::ports::Within;
use restarts::Restarts;
pub use restarts::{MAX_RESTARTS, RestartPolicy};

/// How long clients are held beyond the longest wait of the policy: making an instance for each lane, each within a call's deadline.
const HOLD: Duration = Duration::from_secs(30);
/// Longest sleep between two looks whether the binding leaves.
const SLICE: Duration = Duration::from_millis(20);

/// What a lane does whose driver broke down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It makes another one.
    Revive,
    /// It waits for another one.
    Wait,
    /// It answers everybody with errors.
    Refuse,
    /// The binding leaves.
    Leave,
}

#[derive(Default)]
struct Turn {
    /// Lanes without a driver, by number; [`CONTROL`] among them.
    down: u128,
    /// Newcomers wait.
    hold: Option<Hold>,
    /// When the thread makes the next attempt.
    at: Option<Instant>,
    /// There is a thread.
    thread: bool,
    /// What broke the driver last, for whoever asks for another try.
    last: Option<GuestFault>,
    /// Each lane's crashes since it last worked, by number, and when they were.
    crashes: BTreeMap<u16, Vec<(u64, Instant)>>,
}

impl Turn {
    /// Has newcomers wait, for as long as the longest wait of the policy and what comes behind it, if they do not already.
    fn hold_clients(&mut self, gate: Gate, longest: Duration) {
        if self.hold.is_none() {
            self.hold = gate.hold_for(longest + HOLD, Overdue::Open).ok();
        }
    }
}

/// One of a binding's drivers: its code, and what its control lane tells its data lanes.
#[derive(Clone)]
pub(crate) struct Version {
    pub(crate) maker: Maker,
    pub(crate) driver: Arc<str>,
    pub(crate) state: Vec<u8>,
    /// Counts them.
    pub(crate) number: u64,
}

/// The driver before an upgrade.
#[derive(Clone)]
pub(crate) struct Previous {
    pub(crate) version: Version,
    /// Until then it comes back by itself.
    pub(crate) until: Option<Instant>,
}

/// What there is to make drivers of.
#[derive(Default)]
struct Versions {
    /// `None` once the code is dropped.
    current: Option<Version>,
    previous: Option<Previous>,
    count: u64,
}

/// A binding's means to replace its driver.
pub(crate) struct Recovery {
    versions: Mutex<Versions>,
    /// Held by whoever puts another component in place.
    pub(crate) exchanging: Mutex<()>,
    restarts: Mutex<Restarts>,
    longest: Duration,
    turn: Mutex<Turn>,
    crashes: Arc<Crashes>,
}

impl Recovery {
    /// `spool`: where crashes are written down.
    pub(crate) fn new(version: Version, policy: RestartPolicy, spool: Option<PathBuf>) -> Recovery {
        Recovery {
            crashes: Crashes::new(spool.map(Spool::new)),
            versions: Mutex::new(Versions { current: Some(version), previous: None, count: 0 }),
            exchanging: Mutex::new(()),
            restarts: Mutex::new(Restarts::new(policy)),
            longest: policy.longest,
            turn: Mutex::new(Turn::default()),
        }
    }

    /// What instances are made of now.
    pub(crate) fn version(&self) -> Option<Version> {
        self.versions.lock().current.clone()
    }

    /// From now on they are made of this, and `previous` is what was before; its number.
    pub(crate) fn adopt_version(&self, version: Version, previous: Option<Previous>) -> u64 {
        let mut versions = self.versions.lock();
        versions.count += 1;
        versions.current = Some(Version { number: versions.count, ..version });
        versions.previous = previous;
        versions.count
    }

    /// What they were made of before.
    pub(crate) fn previous(&self) -> Option<Version> {
        self.versions.lock().previous.as_ref().map(|previous| previous.version.clone())
    }

    /// The driver of this number has stood its probation, if it is the one that is there; whether it is.
    pub(crate) fn end_probation(&self, number: u64) -> bool {
        let mut versions = self.versions.lock();
        let is_current = versions.current.as_ref().is_some_and(|version| version.number == number);
        if let Some(previous) = versions.previous.as_mut().filter(|_| is_current) {
            previous.until = None;
        }
        is_current
    }

    /// A driver on probation has broken down: instances are made of the one before it again. Names of both, if that is so.
    fn fall_back(&self) -> Option<(Arc<str>, Arc<str>)> {
        let mut versions = self.versions.lock();
        let until = versions.previous.as_ref()?.until?;
        let from = Arc::clone(&versions.current.as_ref()?.driver);
        if Instant::now() >= until {
            return None;
        }
        let version = versions.previous.take()?.version;
        let to = Arc::clone(&version.driver);
        versions.count += 1;
        versions.current = Some(Version { number: versions.count, ..version });
        Some((from, to))
    }

    /// The code goes, also what is dead already; whether all of it is gone by `until`.
    pub(crate) fn end(&self, until: Instant) -> bool {
        *self.versions.lock() = Versions::default();
        self.turn.lock().hold = None;
        self.crashes.wait(until)
    }
}

/// The control lane, behind the 64 data lanes that there can be.
pub(crate) const CONTROL: u16 = 64;

fn lane_id(lane: u16) -> LaneId {
    if lane == CONTROL { LaneId::Control } else { LaneId::Data(lane) }
}

fn bit(lane: u16) -> u128 {
    1_u128.checked_shl(u32::from(lane)).unwrap_or(0)
}

/// The fault of an instance that could not be made in another one's place.
pub(crate) fn cannot_replace(error: &dyn std::fmt::Display) -> GuestFault {
    GuestFault::layout(format!("in place of a driver that broke down: {error}"))
}

impl Binding {
    /// The driver of a lane broke down. The lane's lease, or the control lane, is held.
    pub(crate) fn broke_down(self: &Arc<Self>, lane: u16, fault: &GuestFault) -> Next {
        let leave = || {
            self.set_fault(LaneFault::Guest(fault.clone()));
            Next::Leave
        };
        let Some(recovery) = self.recovery.get() else { return leave() };
        let mut turn = recovery.turn.lock();
        // A lane that is tried again is down already, and so may others be.
        let _ = self.step(Event::Faulted);
        match self.phase() {
            Phase::Recovering => {}
            // Given up already, by another lane.
            Phase::Failed => return Next::Refuse,
            // On its way out, where the host itself ends drivers.
            _ => {
                drop(turn);
                return leave();
            }
        }
        turn.down |= bit(lane);
        turn.last = Some(fault.clone());
        let views = self.views();
        // The latest one of the lane is that of the instance that broke down, or of one that did not come to be.
        let view = views.iter().rev().find(|(of, _)| *of == lane_id(lane)).map(|(_, view)| view);
        let number = recovery.crashes.note(&self.crash(lane, fault, view));
        turn.crashes.entry(lane).or_default().push((number, Instant::now()));
        self.record(LaneFault::Guest(fault.clone()).to_event());
        if let Some((from, to)) = recovery.fall_back() {
            drop(turn);
            self.set_driver(&to);
            let (from, to, reason) = (from.to_string(), to.to_string(), fault.to_string());
            tracing::warn!(binding = self.name(), from, to, reason, "rolled back");
            self.record(EventKind::RolledBack { from, to, reason });
            self.fall_back_elsewhere();
            return Next::Revive;
        }
        let next = recovery.restarts.lock().next(Instant::now());
        match next {
            Some(wait) if wait.is_zero() => Next::Revive,
            Some(wait) => {
                turn.hold_clients(*self.gate(), recovery.longest);
                turn.at = Some(Instant::now() + wait);
                tracing::warn!(binding = self.name(), lane, %fault, wait_ms = wait.as_millis(), "driver broke down");
                if self.revive_elsewhere(&mut turn) { Next::Wait } else { self.give_up(&mut turn) }
            }
            None => self.give_up(&mut turn),
        }
    }

    fn crash<'a>(&'a self, lane: u16, fault: &'a GuestFault, view: Option<&'a CallView>) -> Crash<'a> {
        Crash {
            binding: self.name(),
            driver: self.driver(),
            device: self.device(),
            digest: self
                .recovery
                .get()
                .and_then(Recovery::version)
                .map(|version| version.maker.module().info().digest.clone()),
            generation: self.generation(),
            lane: lane_id(lane).to_string(),
            fault,
            view,
        }
    }

    /// The instance that broke down on a lane, of which somebody else has taken the place.
    pub(crate) fn bury(&self, lane: u16, driver: Box<dyn LaneDriver>) {
        let Some(recovery) = self.recovery.get() else { return };
        let last = recovery.turn.lock().crashes.get(&lane).and_then(|crashes| crashes.last().copied());
        let number = last.map_or(0, |(number, _)| number);
        recovery.crashes.bury(number, driver);
    }

    /// How its driver broke down, the last 16 times, the oldest first.
    pub fn crashes(&self) -> Vec<CrashReport> {
        self.recovery.get().map(|recovery| recovery.crashes.reports()).unwrap_or_default()
    }

    /// How often its driver broke down.
    pub fn crash_count(&self) -> u64 {
        self.recovery.get().map_or(0, |recovery| recovery.crashes.count())
    }

    /// The lane cannot even be given another driver.
    pub(crate) fn cannot_revive(self: &Arc<Self>) -> Next {
        match self.recovery.get() {
            Some(recovery) => self.give_up(&mut recovery.turn.lock()),
            None => Next::Leave,
        }
    }

    /// Too often. The other lanes refuse too, once their leases can be had.
    fn give_up(self: &Arc<Self>, turn: &mut Turn) -> Next {
        turn.at = None;
        if self.step(Event::Exhausted).is_err() {
            return if self.phase() == Phase::Failed { Next::Refuse } else { Next::Leave };
        }
        tracing::error!(binding = self.name(), "the driver broke down too often; 'restart' tries again");
        let binding = Arc::clone(self);
        let refuse = move || {
            if let Some(serving) = binding.serving.get() {
                serving.lanes.iter().for_each(|lane| lane.refuse(&binding));
            }
            if let Some(recovery) = binding.recovery.get() {
                let mut turn = recovery.turn.lock();
                if binding.phase() == Phase::Failed {
                    // Whoever was held gets an error now.
                    turn.hold = None;
                }
            }
        };
        if let Err(error) = Within::spawn("cofferdam-refuse", refuse) {
            tracing::error!(binding = self.name(), %error, "no thread to tell the other lanes");
        }
        Next::Refuse
    }

    /// One more instance, in the place of one that broke down.
    pub(crate) fn remake(&self, lane: LaneId) -> Result<(Instance, Version), GuestFault> {
        let recovery = self.recovery.get().ok_or_else(|| cannot_replace(&"its binding has no means to"))?;
        let version = recovery.version().ok_or_else(|| cannot_replace(&"its code is gone"))?;
        self.next_generation();
        let made = version.maker.make(self, lane).map_err(|error| cannot_replace(&error))?;
        Ok((made, version))
    }

    /// Another driver for a data lane, and the number of what it is made of.
    pub(crate) fn remake_lane(&self, lane: &Lane) -> Result<(Box<dyn LaneDriver>, u64), GuestFault> {
        let (mut driver, version) = self.remake(LaneId::Data(lane.number()))?;
        match driver.start(&lane.setup(&version.state)) {
            Ok(()) => Ok((Box::new(driver), version.number)),
            Err(CallError::Fault(fault)) => Err(fault),
            Err(CallError::Driver(error)) => Err(cannot_replace(&error)),
        }
    }

    /// A lane has a driver again. The lane's lease is held.
    pub(crate) fn revived(&self, lane: u16) {
        let Some(recovery) = self.recovery.get() else { return };
        let mut turn = recovery.turn.lock();
        turn.down &= !bit(lane);
        for (number, since) in turn.crashes.remove(&lane).unwrap_or_default() {
            recovery.crashes.note_pause(number, since.elapsed());
        }
        if turn.down != 0 {
            return;
        }
        // Refused if it leaves by now: the ladder does not mind a driver that works.
        let _ = self.step(Event::Recovered);
        turn.at = None;
        if let Some(hold) = turn.hold.take() {
            // Expired, or closed by the ladder.
            let _ = hold.open();
        }
    }

    /// Has a thread make what is missing, at the time that is set. Whether there is one.
    fn revive_elsewhere(self: &Arc<Self>, turn: &mut Turn) -> bool {
        if turn.thread {
            return true;
        }
        let binding = Arc::clone(self);
        let revive = move || {
            binding.revive_all();
        };
        match Within::spawn("cofferdam-revive", revive) {
            Ok(()) => turn.thread = true,
            Err(error) => tracing::error!(binding = self.name(), %error, "no thread to replace the driver on"),
        }
        turn.thread
    }

    /// The lanes that did not break down get the driver before, too.
    fn fall_back_elsewhere(self: &Arc<Self>) {
        let binding = Arc::clone(self);
        let fall_back = move || {
            if let Some(serving) = binding.serving.get() {
                serving.lanes.iter().for_each(|lane| lane.catch_up(&binding));
            }
            binding.catch_up_control();
        };
        if let Err(error) = Within::spawn("cofferdam-revert", fall_back) {
            tracing::error!(binding = self.name(), %error, "no thread to take the new driver out of the other lanes");
        }
    }

    fn revive_all(self: &Arc<Self>) {
        let (Some(recovery), Some(serving)) = (self.recovery.get(), self.serving.get()) else { return };
        loop {
            let down = {
                let mut turn = recovery.turn.lock();
                let leaves = self.phase() != Phase::Recovering;
                let Some(at) = turn.at.filter(|_| !leaves) else {
                    turn.thread = false;
                    return;
                };
                let left = at.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    turn.at = None;
                    turn.down
                } else {
                    drop(turn);
                    std::thread::sleep(left.min(SLICE));
                    continue;
                }
            };
            for lane in serving.lanes.iter().filter(|lane| down & bit(lane.number()) != 0) {
                lane.revive(self);
            }
            if down & bit(CONTROL) != 0 {
                self.revive_control();
            }
        }
    }

    /// One more try for a binding that is `failed`, whatever its restarts have been.
    ///
    /// # Errors
    /// [`RestartError`].
    pub fn restart(self: &Arc<Self>) -> Result<(), RestartError> {
        let name = || self.name().to_owned();
        let (Some(recovery), Some(serving)) = (self.recovery.get(), self.serving.get()) else {
            return Err(RestartError::NotFailed(name()));
        };
        {
            let mut turn = recovery.turn.lock();
            self.step(Event::Restarted).map_err(|_| RestartError::NotFailed(name()))?;
            recovery.restarts.lock().forget();
            turn.hold_clients(*self.gate(), recovery.longest);
            turn.down = serving.lanes.iter().fold(bit(CONTROL), |down, lane| down | bit(lane.number()));
            turn.last = None;
        }
        self.revive_control();
        for lane in &serving.lanes {
            lane.revive(self);
        }
        match self.phase() {
            Phase::Failed => {
                let last = recovery.turn.lock().last.as_ref().map_or_else(String::new, ToString::to_string);
                Err(RestartError::FailedAgain { binding: name(), fault: last })
            }
            Phase::Serving | Phase::Recovering => Ok(()),
            _ => Err(RestartError::NotFailed(name())),
        }
    }
}
