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

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_gate::{Hold, Overdue};
use cofferdam_lifecycle::{Event, Phase};
use cofferdam_runtime::{CallError, GuestFault, LaneDriver, LaneId, LaneSetup};
use parking_lot::Mutex;

use crate::binding::Binding;
use crate::error::{LaneFault, RestartError};
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
    /// Lanes without a driver, by number.
    down: u64,
    /// Newcomers wait.
    hold: Option<Hold>,
    /// When the thread makes the next attempt.
    at: Option<Instant>,
    /// There is a thread.
    thread: bool,
    /// What broke the driver last, for whoever asks for another try.
    last: Option<GuestFault>,
}

/// A binding's means to replace its driver.
pub(crate) struct Recovery {
    /// `None` once the code is dropped.
    maker: Mutex<Option<Maker>>,
    restarts: Mutex<Restarts>,
    longest: Duration,
    turn: Mutex<Turn>,
}

impl Recovery {
    pub(crate) fn new(maker: Maker, policy: RestartPolicy) -> Recovery {
        Recovery {
            maker: Mutex::new(Some(maker)),
            restarts: Mutex::new(Restarts::new(policy)),
            longest: policy.longest,
            turn: Mutex::new(Turn::default()),
        }
    }

    /// The code goes.
    pub(crate) fn end(&self) {
        *self.maker.lock() = None;
        self.turn.lock().hold = None;
    }
}

fn bit(lane: u16) -> u64 {
    1_u64.checked_shl(u32::from(lane)).unwrap_or(0)
}

impl Binding {
    /// The driver of a data lane broke down. The lane's lease is held.
    pub(crate) fn broke_down(self: &Arc<Self>, lane: u16, fault: &GuestFault) -> Next {
        let leave = || {
            self.set_fault(LaneFault::Guest(fault.clone()));
            Next::Leave
        };
        let Some(recovery) = self.recovery.get() else { return leave() };
        let mut turn = recovery.turn.lock();
        // A lane that is tried again is down already.
        if turn.down == 0 && self.step(Event::Faulted).is_err() {
            drop(turn);
            // Given up already, by another lane; or on its way out, where the host itself ends drivers.
            return if self.phase() == Phase::Failed { Next::Refuse } else { leave() };
        }
        turn.down |= bit(lane);
        turn.last = Some(fault.clone());
        self.record(LaneFault::Guest(fault.clone()).to_event());
        let next = recovery.restarts.lock().next(Instant::now());
        match next {
            Some(wait) if wait.is_zero() => Next::Revive,
            Some(wait) => {
                if turn.hold.is_none() {
                    turn.hold = self.gate().hold_for(recovery.longest + HOLD, Overdue::Open).ok();
                }
                turn.at = Some(Instant::now() + wait);
                tracing::warn!(binding = self.name(), lane, %fault, wait_ms = wait.as_millis(), "driver broke down");
                if self.revive_elsewhere(&mut turn) { Next::Wait } else { self.give_up(&mut turn) }
            }
            None => self.give_up(&mut turn),
        }
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
            let _within = Within::enter();
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
        if let Err(error) = std::thread::Builder::new().name("cofferdam-refuse".into()).spawn(refuse) {
            tracing::error!(binding = self.name(), %error, "no thread to tell the other lanes");
        }
        Next::Refuse
    }

    /// Another instance for a lane.
    pub(crate) fn remake(&self, lane: u16, setup: &LaneSetup) -> Result<Box<dyn LaneDriver>, GuestFault> {
        let refused = |error: &dyn std::fmt::Display| GuestFault::layout(format!("in place of a driver: {error}"));
        let recovery = self.recovery.get().ok_or_else(|| refused(&"it cannot be replaced"))?;
        // Not held while the guest starts.
        let maker = recovery.maker.lock().clone().ok_or_else(|| refused(&"its code is gone"))?;
        self.next_generation();
        let mut driver = maker.make(self, LaneId::Data(lane)).map_err(|error| refused(&error))?;
        match driver.start(setup) {
            Ok(()) => Ok(Box::new(driver)),
            Err(CallError::Fault(fault)) => Err(fault),
            Err(CallError::Driver(error)) => Err(refused(&error)),
        }
    }

    /// A lane has a driver again. The lane's lease is held.
    pub(crate) fn revived(&self, lane: u16) {
        let Some(recovery) = self.recovery.get() else { return };
        let mut turn = recovery.turn.lock();
        turn.down &= !bit(lane);
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
            let _within = Within::enter();
            binding.revive_all();
        };
        match std::thread::Builder::new().name("cofferdam-revive".into()).spawn(revive) {
            Ok(_) => turn.thread = true,
            Err(error) => tracing::error!(binding = self.name(), %error, "no thread to replace the driver on"),
        }
        turn.thread
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
            if turn.hold.is_none() {
                turn.hold = self.gate().hold_for(recovery.longest + HOLD, Overdue::Open).ok();
            }
            turn.down = serving.lanes.iter().fold(0, |down, lane| down | bit(lane.number()));
            turn.last = None;
        }
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
