//! Holds with a bound (G6): a gate is never left held because somebody died or forgot.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
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
    since: Instant,
}

impl Hold {
    /// When it was about to begin: nobody was held before.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since
    }

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
        let end = Instant::now().checked_add(bound);
        // Before anybody is held: to start a thread takes longer than many a hold.
        let seat = end.map(|_| Seat::take()).transpose().map_err(|_| HoldError::NoTimer)?;
        let since = Instant::now();
        let number = self.begin_hold()?;
        if let Some((at, seat)) = end.zip(seat) {
            seat.watch(Pending { at, gate: *self, number, overdue });
        }
        Ok(Hold { gate: *self, number, overdue, since })
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
static PENDING: Mutex<Watch> = Mutex::new(Watch { holds: Vec::new(), seats: 0, running: false });
static CHANGED: Condvar = Condvar::new();

struct Watch {
    holds: Vec<Pending>,
    /// Holds that are about to be begun: the thread waits for them.
    seats: usize,
    /// Whether the thread is there and will look at `holds` again.
    running: bool,
}

fn pending() -> MutexGuard<'static, Watch> {
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The thread is there, and stays for a hold that is about to be begun.
struct Seat;

impl Seat {
    fn take() -> std::io::Result<Seat> {
        let mut watch = pending();
        if !watch.running {
            std::thread::Builder::new().name("gate-holds".to_owned()).spawn(end_overdue_holds)?;
            watch.running = true;
        }
        watch.seats += 1;
        Ok(Seat)
    }

    /// The hold has begun.
    fn watch(self, hold: Pending) {
        let mut watch = pending();
        watch.holds.retain(|other| other.gate.is_hold(other.number));
        watch.holds.push(hold);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        pending().seats -= 1;
        CHANGED.notify_one();
    }
}

/// Ends holds in time; returns when there are none left.
fn end_overdue_holds() {
    let mut watch = pending();
    loop {
        let now = Instant::now();
        watch.holds.retain(|hold| {
            if hold.at <= now {
                let _ = hold.gate.end_hold(hold.number, hold.overdue);
            }
            hold.at > now && hold.gate.is_hold(hold.number)
        });
        let next = watch.holds.iter().map(|hold| hold.at).min();
        watch = match next {
            Some(next) => {
                let left = next.saturating_duration_since(now);
                CHANGED.wait_timeout(watch, left).unwrap_or_else(PoisonError::into_inner).0
            }
            None if watch.seats > 0 => CHANGED.wait(watch).unwrap_or_else(PoisonError::into_inner),
            None => {
                watch.running = false;
                return;
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_that_is_refused_keeps_no_thread() {
        let gate = Gate::new();
        gate.close();
        assert_eq!(gate.hold_for(Duration::from_secs(3600), Overdue::Open).err(), Some(HoldError::Closed));
        let until = Instant::now() + Duration::from_secs(60);
        while pending().running {
            assert!(Instant::now() < until, "the thread waits for a hold that was refused");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
