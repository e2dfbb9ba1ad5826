//! Holds with a bound (G6): a gate is never left held because somebody died or forgot.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::HoldError;
use crate::gate::Gate;

/// What becomes of the gate when a hold outlives its bound or is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overdue {
    /// Newcomers are let in again.
    Open,
    /// The gate is closed for good.
    Close,
}

/// A hold with a bound, from [`Gate::hold_for`]. Dropping it without [`open`](Hold::open) is the
/// same as outliving the bound, at once.
#[derive(Debug)]
#[must_use = "dropping the hold ends it"]
pub struct Hold {
    gate: Gate,
    /// Which of the gate's holds this is.
    number: u64,
    overdue: Overdue,
}

impl Hold {
    /// Opens the gate again.
    ///
    /// # Errors
    /// [`HoldError::Expired`] when the bound passed first, and [`HoldError::Closed`] when the
    /// gate was closed meanwhile.
    pub fn open(self) -> Result<(), HoldError> {
        let ended = self.gate.end_hold(self.number, Overdue::Open);
        std::mem::forget(self);
        ended
    }

    /// Whether the gate is still held by this: its bound has not passed, and the gate was not closed.
    #[must_use]
    pub fn stands(&self) -> bool {
        self.gate.is_hold(self.number)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let _ = self.gate.end_hold(self.number, self.overdue);
    }
}

impl Gate {
    /// Like [`hold`](Gate::hold), for no longer than `bound`: then the gate is opened or closed,
    /// as `overdue` says, by a thread that exists while any bounded hold does.
    ///
    /// # Errors
    /// See [`HoldError`]; the gate is as before.
    pub fn hold_for(&self, bound: Duration, overdue: Overdue) -> Result<Hold, HoldError> {
        let number = self.begin_hold()?;
        let hold = Hold { gate: *self, number, overdue };
        if let Some(at) = Instant::now().checked_add(bound) {
            watch(Pending { at, gate: *self, number, overdue }).map_err(|_| {
                // Nobody would end it in time: as if it had not been.
                let _ = self.end_hold(number, Overdue::Open);
                HoldError::NoTimer
            })?;
        }
        Ok(hold)
    }
}

/// A hold that must end at `at`.
#[derive(Debug)]
struct Pending {
    at: Instant,
    gate: Gate,
    number: u64,
    overdue: Overdue,
}

/// Every bounded hold that was not seen to end. Those that ended early stay until their time,
/// and then end nothing: the number is another.
static PENDING: Mutex<Watch> = Mutex::new(Watch { holds: Vec::new(), running: false });
static CHANGED: Condvar = Condvar::new();

struct Watch {
    holds: Vec<Pending>,
    /// Whether the thread is there and will look at `holds` again.
    running: bool,
}

fn watch(pending: Pending) -> std::io::Result<()> {
    let mut watch = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
    if !watch.running {
        std::thread::Builder::new().name("gate-holds".to_owned()).spawn(end_overdue_holds)?;
        watch.running = true;
    }
    watch.holds.retain(|other| other.gate.is_hold(other.number));
    watch.holds.push(pending);
    CHANGED.notify_one();
    Ok(())
}

/// Ends holds in time; returns when there are none left.
fn end_overdue_holds() {
    let mut watch = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let now = Instant::now();
        watch.holds.retain(|hold| {
            if hold.at <= now {
                let _ = hold.gate.end_hold(hold.number, hold.overdue);
            }
            hold.at > now && hold.gate.is_hold(hold.number)
        });
        let Some(next) = watch.holds.iter().map(|hold| hold.at).min() else {
            watch.running = false;
            return;
        };
        let left = next.saturating_duration_since(now);
        watch = CHANGED.wait_timeout(watch, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}
