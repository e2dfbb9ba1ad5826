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
mod versions;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
use crate::ports::Within;
use restarts::Restarts;
pub use restarts::{MAX_RESTARTS, RestartPolicy};
use versions::Versions;
pub(crate) use versions::{Previous, Version};

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
    /// The last device with which something was found wrong while it was being brought back, by number.
    reported: Option<u64>,
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
    /// Something was found wrong with a device, while `now` is the one that there is. Whether that is news: not of one before it, which whoever looked at it may tell of late, and not while
    /// one is being brought back, where it is only noted.
    fn is_news(&mut self, device: u64, now: u64) -> bool {
        let is_away = self.down & bit(DEVICE) != 0;
        if is_away {
            self.reported = self.reported.max(Some(device));
        }
        !is_away && device == now
    }

    /// Has newcomers wait, for as long as the longest wait of the policy and what comes behind it, if they do not already.
    fn hold_clients(&mut self, gate: Gate, longest: Duration) {
        if self.hold.is_none() {
            self.hold = gate.hold_for(longest + HOLD, Overdue::Open).ok();
        }
    }

    /// The same from now on, also if they do already.
    fn hold_anew(&mut self, gate: Gate, longest: Duration) {
        self.hold = None;
        self.hold_clients(gate, longest);
    }
}

/// A binding's means to replace its driver.
pub(crate) struct Recovery {
    versions: Mutex<Versions>,
    /// Held by whoever puts another component in place.
    pub(crate) exchanging: Mutex<()>,
    restarts: Mutex<Restarts>,
    longest: Duration,
    /// Counts the devices that came back. Changes under the lock of the transport.
    device: AtomicU64,
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
            device: AtomicU64::new(0),
            turn: Mutex::new(Turn::default()),
        }
    }

    /// Its driver broke down so often in the process before this one.
    pub(crate) fn begin_at(&self, crashes: u64) {
        self.crashes.begin_at(crashes);
    }

    /// One more restart: how long to wait for it, or `None` if there were too many.
    pub(crate) fn next_restart(&self) -> Option<Duration> {
        self.restarts.lock().next(Instant::now())
    }

    /// The code goes, also what is dead already; whether all of it is gone by `until`.
    pub(crate) fn end(&self, until: Instant) -> bool {
        *self.versions.lock() = Versions::default();
        self.turn.lock().hold = None;
        self.crashes.close(until)
    }
}

/// The control lane, behind the 64 data lanes that there can be.
pub(crate) const CONTROL: u16 = 64;
/// The device itself, behind both: it can be away.
const DEVICE: u16 = 65;

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
        if turn.down & bit(DEVICE) != 0 && self.has_no_device() {
            // Another driver comes with the device.
            return Next::Wait;
        }
        if let Some((from, to)) = recovery.fall_back() {
            drop(turn);
            self.rolled_back(&from, &to, fault);
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

    /// A driver that was made for a device that came back broke down over it. How long to wait for the next attempt; `None`: that was once too often.
    pub(crate) fn broke_down_over_return(&self, lane: u16, fault: &GuestFault) -> Option<Duration> {
        let recovery = self.recovery.get()?;
        let views = self.views();
        let view = views.iter().rev().find(|(of, _)| *of == lane_id(lane)).map(|(_, view)| view);
        let number = recovery.crashes.note(&self.crash(lane, fault, view));
        self.bury_of(recovery, number, None);
        self.record(LaneFault::Guest(fault.clone()).to_event());
        tracing::warn!(binding = self.name(), lane, %fault, "driver broke down over a device that came back");
        if let Some((from, to)) = recovery.fall_back() {
            // The next attempt makes every driver anew.
            self.rolled_back(&from, &to, fault);
            return Some(Duration::ZERO);
        }
        recovery.next_restart()
    }

    /// A driver on probation broke down, and what is made from here on is made of the one before it.
    fn rolled_back(&self, from: &Arc<str>, to: &Arc<str>, fault: &GuestFault) {
        self.set_driver(to);
        let (from, to, reason) = (from.to_string(), to.to_string(), fault.to_string());
        tracing::warn!(binding = self.name(), from, to, reason, "rolled back");
        self.record(EventKind::RolledBack { from, to, reason });
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

    /// The instance that broke down last on a lane, of which somebody else has taken the place; or `None`, if it did not even come to be.
    pub(crate) fn bury(&self, lane: u16, driver: Option<Box<dyn LaneDriver>>) {
        self.bury_as(self.last_crash(lane), driver);
    }

    /// The instance of this crash.
    pub(crate) fn bury_as(&self, number: u64, driver: Option<Box<dyn LaneDriver>>) {
        if let Some(recovery) = self.recovery.get() {
            self.bury_of(recovery, number, driver);
        }
    }

    /// Number of the last crash of a lane since it worked; 0 if there was none.
    pub(crate) fn last_crash(&self, lane: u16) -> u64 {
        let turn = self.recovery.get().map(|recovery| recovery.turn.lock());
        let last = turn.as_ref().and_then(|turn| turn.crashes.get(&lane)?.last());
        last.map_or(0, |(number, _)| *number)
    }

    fn bury_of(&self, recovery: &Recovery, number: u64, driver: Option<Box<dyn LaneDriver>>) {
        recovery.crashes.bury(number, driver);
        if let Some(lane) = self.serving.get().and_then(|serving| serving.lanes.first()) {
            lane.wake_reaper();
        }
    }

    /// The reaping thread's: has drivers that broke down be put away; whether some are left alone yet.
    pub(crate) fn begin_burials(&self) -> bool {
        self.recovery.get().is_some_and(|recovery| recovery.crashes.begin())
    }

    /// Has its crashes so far be written down; whether that was done by `until`.
    pub(crate) fn write_crashes(&self, until: Instant) -> bool {
        self.recovery.get().is_none_or(|recovery| recovery.crashes.wait(until))
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
        self.up(recovery, &mut recovery.turn.lock(), lane);
    }

    fn up(&self, recovery: &Recovery, turn: &mut Turn, lane: u16) {
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

    /// Which device it has, whoever has the transport locked; another one that comes in its place has another number.
    pub(crate) fn device_number(&self) -> u64 {
        self.recovery.get().map_or(0, |recovery| recovery.device.load(Ordering::Acquire))
    }

    /// Another device is in the place of the one that was lost: what is reported of that one is nothing to this one. The transport is locked.
    pub(crate) fn next_device(&self) {
        if let Some(recovery) = self.recovery.get() {
            recovery.device.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The device of this number is away, and is to be brought back: by what `begin` starts, unless that was started before, or another one is there by now. Newcomers wait for as long as it
    /// may take. Whether it is so.
    pub(crate) fn enter_away(&self, event: Event, device: u64, wait: Duration, begin: impl FnOnce() -> bool) -> bool {
        let Some(recovery) = self.recovery.get() else { return false };
        let mut turn = recovery.turn.lock();
        if !turn.is_news(device, self.device_number()) {
            return true;
        }
        // Refused where a driver is being replaced: it is recovering already.
        let _ = self.step(event);
        if self.phase() != Phase::Recovering {
            return false;
        }
        if event == Event::Restarted {
            recovery.restarts.lock().forget();
        }
        turn.down |= bit(DEVICE);
        // One for a driver is too short.
        turn.hold_anew(*self.gate(), wait.max(recovery.longest));
        let begun = begin();
        if !begun {
            turn.down &= !bit(DEVICE);
        }
        begun
    }

    /// Newcomers wait at the gate for a device that is away, once nobody else holds it (an upgrade may have).
    pub(crate) fn keep_held(&self, wait: Duration) {
        let Some(recovery) = self.recovery.get() else { return };
        let mut turn = recovery.turn.lock();
        if turn.down & bit(DEVICE) != 0 {
            turn.hold_clients(*self.gate(), wait);
        }
    }

    /// It is away once more before it was back: newcomers wait as long again.
    pub(crate) fn hold_again(&self, wait: Duration) {
        let Some(recovery) = self.recovery.get() else { return };
        let mut turn = recovery.turn.lock();
        if turn.down & bit(DEVICE) != 0 {
            turn.hold_anew(*self.gate(), wait);
        }
    }

    /// The device is back, and every lane has it, if `is_here` still says so.
    pub(crate) fn device_returned(&self, is_here: impl FnOnce() -> bool) -> bool {
        let Some(recovery) = self.recovery.get() else { return true };
        // Whoever notices a loss from here on waits for this.
        let mut turn = recovery.turn.lock();
        let is_here = turn.reported != Some(self.device_number()) && is_here();
        if is_here {
            self.up(recovery, &mut turn, DEVICE);
        }
        is_here
    }

    /// The device is not waited for any more: everybody gets an error.
    pub(crate) fn device_gave_up(&self) {
        let (Some(recovery), Some(serving)) = (self.recovery.get(), self.serving.get()) else { return };
        serving.lanes.iter().for_each(|lane| lane.refuse_all());
        let mut turn = recovery.turn.lock();
        turn.down &= !bit(DEVICE);
        turn.at = None;
        // Refused if it leaves by now.
        let _ = self.step(Event::Exhausted);
        turn.hold = None;
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

    /// One more try for a binding that is `failed`, whatever its restarts have been. A device that did not come back is waited for once more, elsewhere.
    ///
    /// # Errors
    /// [`RestartError`].
    pub fn restart(self: &Arc<Self>) -> Result<(), RestartError> {
        let name = || self.name().to_owned();
        let (Some(recovery), Some(serving)) = (self.recovery.get(), self.serving.get()) else {
            return Err(RestartError::NotFailed(name()));
        };
        if self.wait_again() {
            return Ok(());
        }
        {
            let mut turn = recovery.turn.lock();
            self.step(Event::Restarted).map_err(|_| RestartError::NotFailed(name()))?;
            recovery.restarts.lock().forget();
            turn.hold_clients(*self.gate(), recovery.longest);
            turn.down = serving.lanes.iter().fold(bit(CONTROL), |down, lane| down | bit(lane.number()));
            turn.last = None;
        }
        // Of the control lane that is made anew: what the one before it knew may be what broke it down.
        self.control.forget_hint();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_late_of_a_lost_device_is_nothing_to_the_one_that_came_back() {
        let mut turn = Turn::default();
        assert!(turn.is_news(0, 0));
        turn.down |= bit(DEVICE);
        assert!(!turn.is_news(0, 0), "it is being brought back");
        // The next one is set up.
        assert!(!turn.is_news(0, 1));
        assert_ne!(turn.reported, Some(1), "it was the one before");
        assert!(!turn.is_news(1, 1));
        assert!(!turn.is_news(0, 1));
        assert_eq!(turn.reported, Some(1), "the new one was lost, too");
        // And the one after that serves.
        turn.down = 0;
        assert!(!turn.is_news(1, 2));
        assert!(turn.is_news(2, 2));
    }
}
