//! Either calls change bindings, or all of them are on their way to another daemon.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::control::ErrorBody;

/// See the module.
#[derive(Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    calls: usize,
    giving: bool,
    /// What is on its way may be the other daemon's already.
    committing: bool,
    /// The daemon has been told to stop: nothing is begun any more.
    stopping: bool,
}

/// A call's turn.
pub(crate) struct Call<'a>(&'a Turns);

/// The turn of a handover.
pub(crate) struct Giving<'a>(&'a Turns);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.lock().calls -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Giving<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        (state.giving, state.committing) = (false, false);
        drop(state);
        self.0.changed.notify_all();
    }
}

impl Giving<'_> {
    /// The one message is about to be sent: from here on whoever stops waits until it is known what came of it, and does nothing to what may be another daemon's by then. `false` if the
    /// daemon stops already.
    pub(crate) fn commit(&self) -> bool {
        let mut state = self.0.lock();
        state.committing = !state.stopping;
        state.committing
    }
}

impl Turns {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call that may change a binding begins.
    ///
    /// # Errors
    /// Another daemon is taking over: it is the one to be asked.
    pub(crate) fn call(&self) -> Result<Call<'_>, ErrorBody> {
        let mut state = self.lock();
        if state.giving {
            return Err(ErrorBody::failed("another daemon is taking over; try again in a moment"));
        }
        state.calls += 1;
        Ok(Call(self))
    }

    /// Waits until no call is under way; `None` if that was not by `until`, or the daemon stops.
    pub(crate) fn give(&self, until: Instant) -> Option<Giving<'_>> {
        let mut state = self.lock();
        while state.calls > 0 && !state.stopping {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.stopping {
            return None;
        }
        state.giving = true;
        Some(Giving(self))
    }

    /// The daemon stops: waits until nothing is on its way to another one, which ends soon. No longer than `until`, but for the one message that commits, whose sender has a bound of his own.
    pub(crate) fn stop(&self, until: Instant) {
        let mut state = self.lock();
        state.stopping = true;
        while state.giving {
            if state.committing {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.lock().stopping
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn soon() -> Instant {
        Instant::now() + PATIENCE
    }

    #[test]
    fn a_stop_does_not_wait_for_a_handover_longer_than_it_may_and_then_nothing_is_committed() {
        let turns = Turns::default();
        let giving = turns.give(soon()).unwrap();
        turns.stop(Instant::now());
        assert!(!giving.commit(), "whoever stops takes everything down by now");
        drop(giving);
        assert!(turns.give(soon()).is_none());
    }

    #[test]
    fn a_stop_waits_for_what_comes_of_a_commit() {
        let turns = Turns::default();
        let giving = turns.give(soon()).unwrap();
        assert!(giving.commit());
        let (over, is_over) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                turns.stop(Instant::now());
                over.send(()).unwrap();
            });
            while !turns.is_stopping() {
                std::thread::yield_now();
            }
            // Its own bound has passed.
            assert_eq!(is_over.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
            drop(giving);
            is_over.recv_timeout(PATIENCE).unwrap();
        });
    }
}
