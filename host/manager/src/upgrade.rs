//! Another component in the place of a driver that serves (DESIGN section 10).
//!
//! ```text
//! compile, check, instantiate      the old one serves
//! rehearse                         an instance that is thrown away does what comes below, without the hint
//! hold -> leases of every lane     nobody is in the driver; what is on the rings stays there
//! suspend -> resume, start, live   the new one plans what is set up, or refuses: then the old one goes on
//! open                             blackout over; the old component stays at hand
//! probation                        a fault or slow calls: a fresh instance of the old one adopts
//! ```
//!
//! A rollback by hand is the same exchange, with the component that was there before.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_gate::Overdue;
use cofferdam_lifecycle::Phase;
use cofferdam_runtime::{CallError, ExportedState, Instance, LaneId, Runtime};
use parking_lot::MutexGuard;
use serde::{Deserialize, Serialize};

use crate::binding::Binding;
use crate::control::Running;
use crate::device::ConfigCopy;
use crate::error::{LoadError, UpgradeError};
use crate::events::EventKind;
use crate::ladder::micros;
use crate::lane::{Lane, Timing};
use crate::maker::Maker;
use crate::ports::Within;
use crate::recovery::{Previous, Version};

/// How long a hold may outlive its deadline: what is under way then ends by the deadline of a guest call.
const LATE: Duration = Duration::from_secs(5);
/// How often a driver on probation is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Calls of a lane that have to be measured before anything is made of them.
const ENOUGH: u32 = 32;
/// How long calls of the old driver are waited for, so that there is something to compare with. An idle device has none.
const OBSERVE: Duration = Duration::from_millis(50);
/// The same of a device that is not idle: on a busy machine its clients may not run for a while.
const OBSERVE_BUSY: Duration = Duration::from_millis(500);
/// A median call may take so many times as long as before, and this much more.
const SLOWER: u32 = 4;
const SLOWER_BY: Duration = Duration::from_micros(2);

/// What takes a driver's place.
#[derive(Clone, Debug)]
pub struct UpgradeSpec {
    /// What `ls` calls it: its file name or a label.
    pub driver: String,
    /// The component's bytes.
    pub component: Vec<u8>,
    /// How long clients may be held: 1 ms to 5 s.
    pub deadline: Duration,
    /// How long the old component comes back by itself when the new one breaks down or its calls take longer than the old one's.
    pub probation: Duration,
}

/// An exchange that was made. Field by field what `cofferdam upgrade --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeReport {
    /// The binding.
    pub name: String,
    /// The driver before.
    pub from: String,
    /// The driver now.
    pub to: String,
    /// SHA-256 of the component now.
    pub digest: String,
    /// Which driver of the binding it is.
    pub generation: u64,
    /// How long it took to compile, check and instantiate it, in microseconds; the old one served.
    pub prepare_micros: u64,
    /// How long clients were held, in microseconds.
    pub blackout_micros: u64,
}

impl Binding {
    /// Puts another component in the place of the driver, under its clients: see the module.
    ///
    /// # Errors
    /// [`UpgradeError`]; the driver that was there serves on.
    pub(crate) fn upgrade(
        self: &Arc<Self>,
        runtime: &Runtime,
        spec: UpgradeSpec,
    ) -> Result<UpgradeReport, UpgradeError> {
        let begun = Instant::now();
        let recovery = self.recovery.get().ok_or_else(|| self.not_exchangeable())?;
        let _turn = self.exchange_turn()?;
        let current = recovery.version().ok_or_else(|| self.not_exchangeable())?;
        // Measured while the new one is compiled.
        self.time_calls(true);
        let prepared = (|| {
            let module = runtime.load(&spec.component).map_err(|error| UpgradeError::Refused(error.to_string()))?;
            let (old, new) = (current.maker.module().info(), module.info());
            if old.service != new.service {
                let (old, new) = (old.service, new.service);
                return Err(UpgradeError::Refused(format!("it gives the service {new:?}, clients have {old:?}")));
            }
            if let Some(missing) = old.devices.iter().find(|id| !new.devices.contains(id)) {
                return Err(UpgradeError::Refused(format!("its device table does not have {missing}")));
            }
            current.maker.of(&module).map_err(|error| UpgradeError::Refused(error.to_string()))
        })();
        let exchanged = prepared.and_then(|maker| {
            self.observe(begun);
            let digest = maker.module().info().digest.clone();
            let probation = Some((current.clone(), spec.probation));
            let done = self.exchange(maker, &spec.driver, spec.deadline, begun, probation)?;
            Ok((digest, done))
        });
        let (digest, done) = match exchanged {
            Ok(exchanged) => exchanged,
            Err(error) => {
                self.time_calls(false);
                return Err(error);
            }
        };
        let from = current.driver.to_string();
        self.watch_probation(done.median, spec.probation);
        let report = UpgradeReport {
            name: self.name().to_owned(),
            from,
            to: spec.driver,
            digest,
            generation: self.generation(),
            prepare_micros: micros(done.prepare),
            blackout_micros: micros(done.blackout),
        };
        self.record(EventKind::Upgraded {
            from: report.from.clone(),
            to: report.to.clone(),
            blackout_micros: report.blackout_micros,
        });
        tracing::info!(
            binding = self.name(),
            from = report.from,
            to = report.to,
            blackout_us = report.blackout_micros,
            "upgraded"
        );
        Ok(report)
    }

    /// The component that was there before the last upgrade, again.
    ///
    /// # Errors
    /// [`UpgradeError`]; the driver that is there serves on.
    pub fn roll_back(self: &Arc<Self>, deadline: Duration) -> Result<UpgradeReport, UpgradeError> {
        let _turn = self.exchange_turn()?;
        self.go_back(deadline, "asked for")
    }

    /// One exchange at a time, and none from inside a call of the driver, which it would wait for (G8).
    fn exchange_turn(&self) -> Result<MutexGuard<'_, ()>, UpgradeError> {
        let recovery = self.recovery.get().ok_or_else(|| self.not_exchangeable())?;
        let turn = if self.gate().in_crossing() { None } else { recovery.exchanging.try_lock() };
        turn.ok_or_else(|| UpgradeError::Busy(self.name().to_owned()))
    }

    /// Whoever calls this has `exchanging`.
    fn go_back(self: &Arc<Self>, deadline: Duration, reason: &str) -> Result<UpgradeReport, UpgradeError> {
        let begun = Instant::now();
        let recovery = self.recovery.get().ok_or_else(|| self.not_exchangeable())?;
        let current = recovery.version().ok_or_else(|| self.not_exchangeable())?;
        let nothing = || UpgradeError::NothingBefore(self.name().to_owned());
        let previous = recovery.previous().ok_or_else(nothing)?;
        let done = self.exchange(previous.maker.clone(), &previous.driver, deadline, begun, None)?;
        self.time_calls(false);
        let (from, to) = (current.driver.to_string(), previous.driver.to_string());
        self.record(EventKind::RolledBack { from: from.clone(), to: to.clone(), reason: reason.to_owned() });
        tracing::warn!(binding = self.name(), from, to, reason, "rolled back");
        Ok(UpgradeReport {
            name: self.name().to_owned(),
            from,
            to,
            digest: previous.maker.module().info().digest.clone(),
            generation: self.generation(),
            prepare_micros: micros(done.prepare),
            blackout_micros: micros(done.blackout),
        })
    }

    fn not_exchangeable(&self) -> UpgradeError {
        UpgradeError::NotServing(self.name().to_owned())
    }

    /// Puts instances of `maker` in the place of all that there are. On error those go on. Of `probation` the driver that is there comes back by itself.
    fn exchange(
        self: &Arc<Self>,
        maker: Maker,
        driver: &str,
        deadline: Duration,
        begun: Instant,
        probation: Option<(Version, Duration)>,
    ) -> Result<Exchanged, UpgradeError> {
        let (Some(recovery), Some(serving)) = (self.recovery.get(), self.serving.get()) else {
            return Err(self.not_exchangeable());
        };
        let refused = |error: &dyn std::fmt::Display| UpgradeError::Refused(error.to_string());
        if self.phase() != Phase::Serving {
            return Err(self.not_exchangeable());
        }
        let lanes = &serving.lanes;
        // A directory of the host's is not for throwing away what was done in it.
        let copy = match self.recipe.get() {
            Some(recipe) if recipe.grants_directory => None,
            _ => self.rehearse(&maker, lanes).map_err(|error| refused(&error))?,
        };
        // After that: the latest instance of a lane is the one whose calls a report tells.
        let mut control = maker.make(self, LaneId::Control).map_err(|error| refused(&error))?;
        let made: Result<Vec<Instance>, _> =
            lanes.iter().map(|lane| maker.make(self, LaneId::Data(lane.number()))).collect();
        let made = made.map_err(|error| refused(&error))?;
        let prepare = begun.elapsed();

        let late = || UpgradeError::Deadline { binding: self.name().to_owned(), deadline };
        let hold = self.gate().hold_for(deadline + LATE, Overdue::Open).map_err(|_| self.not_exchangeable())?;
        let held = hold.since();
        let until = held + deadline;
        let mut locked = self.control.lock_until(until).ok_or_else(late)?;
        let current = locked.as_mut().filter(|control| !control.is_down).ok_or_else(|| self.not_exchangeable())?;
        let mut leases = Vec::with_capacity(lanes.len());
        for lane in lanes {
            let lease = lane.vacant(until).ok_or_else(late)?;
            if !lease.works() {
                return Err(self.not_exchangeable());
            }
            leases.push(lease);
        }
        // Nobody is in the driver. A hint that cannot be had is none.
        let hint = current.instance.suspend().unwrap_or_default();
        let mut told = false;
        // What the device has announced since will be passed on to the new one.
        let copy = copy.filter(|copy| copy.changes == current.changes);
        let running = current.running().with(copy);
        let attempt = take_over(&running, &mut control, made, lanes, &hint).and_then(|(state, drivers)| {
            // The last step, because the device hears of it.
            told = true;
            Ok((current.live_with(&mut control)?, state, drivers))
        });
        let (offer, state, drivers) = match attempt {
            Ok(taken) => taken,
            Err(error) => {
                drop(leases);
                if let Some(fault) = current.instance.fault().cloned() {
                    // It was `suspend` that broke it down.
                    self.bring_control_up(current, Some(fault));
                } else if told && let Err(CallError::Fault(fault)) = current.live() {
                    // What the other one told the device is told again by this one.
                    self.bring_control_up(current, Some(fault));
                }
                return Err(refused(&error));
            }
        };
        // Before anybody can call it: it may break down at once.
        let previous =
            probation.map(|(version, probation)| Previous { version, until: Instant::now().checked_add(probation) });
        let (number, outdated) =
            recovery.adopt_version(Version { maker, driver: driver.into(), state, number: 0 }, previous);
        let median = leases.iter_mut().filter_map(|lease| lease.median()).max();
        let mut dead: Vec<_> = leases.iter_mut().zip(drivers).map(|(lease, new)| lease.exchange(new, number)).collect();
        dead.push(Some(Box::new(std::mem::replace(&mut current.instance, control))));
        current.made_of = number;
        self.next_generation();
        self.set_driver(driver);
        drop(leases);
        self.take_offer(offer);
        drop(locked);
        // Expired, or closed by the ladder: then the new one leaves like the old one would have.
        let _ = hold.open();
        let blackout = held.elapsed();
        // To take a store apart, or to unmap machine code, takes time that nobody waits for.
        drop((dead, outdated));
        Ok(Exchanged { prepare, blackout, median })
    }

    /// Has instances that are thrown away do what those that take over will be asked while clients are held, but for the hint. What refuses, traps or hangs does so here already; and machine code that all of
    /// them share is in memory afterwards. What they read of the device's configuration is kept for those that follow.
    fn rehearse(&self, maker: &Maker, lanes: &[Arc<Lane>]) -> Result<Option<Arc<ConfigCopy>>, RehearsalError> {
        let mut control = maker.make(self, LaneId::Control)?;
        let (running, copy) = {
            let locked = self.control.lock_until(Instant::now() + LATE);
            let Some(locked) = locked.as_ref().and_then(|locked| locked.as_ref()) else { return Ok(None) };
            let copy = Arc::new(ConfigCopy::new(locked.changes));
            (locked.running().with(Some(Arc::clone(&copy))), copy)
        };
        // Not under the lock: what hangs here holds up no call of the control lane that serves.
        let attachment = running.resume(&mut control, &ExportedState::default())?;
        if let Some(lane) = lanes.first() {
            maker.make(self, LaneId::Data(lane.number()))?.start(&lane.setup(&attachment.state))?;
        }
        Ok(Some(copy))
    }

    /// Lets the old driver be called often enough to be measured, if it is called at all. Nobody is held.
    fn observe(&self, begun: Instant) {
        let Some(serving) = self.serving.get() else { return };
        let are_timed = || serving.lanes.iter().any(|lane| lane.median().is_some());
        let are_called = || serving.lanes.iter().any(|lane| lane.is_called());
        while !are_timed() && begun.elapsed() < if are_called() { OBSERVE_BUSY } else { OBSERVE } {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether calls of the driver are measured from now on.
    fn time_calls(&self, on: bool) {
        if let Some(serving) = self.serving.get() {
            serving.lanes.iter().for_each(|lane| lane.time_calls(on));
        }
    }

    /// Looks at the new driver for as long as it is on probation.
    fn watch_probation(self: &Arc<Self>, before: Option<Duration>, probation: Duration) {
        let binding = Arc::clone(self);
        let end = Instant::now() + probation;
        let watch = move || {
            binding.probation(before, end);
        };
        if let Err(error) = Within::spawn("cofferdam-probe", watch) {
            tracing::error!(binding = self.name(), %error, "no thread to look after the new driver");
        }
    }

    fn probation(self: &Arc<Self>, before: Option<Duration>, end: Instant) {
        let (Some(recovery), Some(serving)) = (self.recovery.get(), self.serving.get()) else { return };
        let Some(number) = recovery.version().map(|version| version.number) else { return };
        loop {
            let left = end.saturating_duration_since(Instant::now());
            // Another exchange, a rollback or the binding's end.
            let is_current = recovery.version().is_some_and(|version| version.number == number);
            if left.is_zero() || !is_current || self.phase() == Phase::Detached {
                break;
            }
            std::thread::sleep(left.min(LOOK));
            let Some(before) = before else { continue };
            let bound = before * SLOWER + SLOWER_BY;
            let slow = serving.lanes.iter().filter_map(|lane| lane.median()).find(|median| *median > bound);
            let Some(now) = slow else { continue };
            let Some(_turn) = recovery.exchanging.try_lock() else { continue };
            let reason = format!("a call takes {now:?}, before it took {before:?}");
            match self.go_back(Duration::from_secs(1), &reason) {
                Ok(_) => break,
                Err(error) => tracing::error!(binding = self.name(), %error, reason, "not rolled back"),
            }
        }
        if recovery.end_probation(number) {
            self.time_calls(false);
        }
    }
}

/// Has the new instances take over, and says what the control lane's tells the data lanes'; nothing of the old ones is touched.
fn take_over(
    running: &Running,
    control: &mut Instance,
    made: Vec<Instance>,
    lanes: &[Arc<Lane>],
    hint: &ExportedState,
) -> Result<(Vec<u8>, Vec<Instance>), CallError> {
    let attachment = running.resume(control, hint)?;
    let mut drivers = Vec::with_capacity(made.len());
    for (mut driver, lane) in made.into_iter().zip(lanes) {
        driver.start(&lane.setup(&attachment.state))?;
        drivers.push(driver);
    }
    Ok((attachment.state, drivers))
}

/// How a rehearsal failed.
#[derive(Debug, thiserror::Error)]
enum RehearsalError {
    #[error(transparent)]
    Make(#[from] LoadError),
    #[error(transparent)]
    Call(#[from] CallError),
}

/// What an exchange took, and how long a median call of the driver before took, if it was seen.
struct Exchanged {
    prepare: Duration,
    blackout: Duration,
    median: Option<Duration>,
}

impl Timing {
    /// How long the median of the last calls took, once there were enough.
    pub(crate) fn median(&self) -> Option<Duration> {
        if self.count() < ENOUGH {
            return None;
        }
        let mut last = self.last().to_vec();
        let middle = last.len() / 2;
        Some(Duration::from_nanos(u64::from(*last.select_nth_unstable(middle).1)))
    }
}
