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
        self.0.lock().giving = false;
        self.0.changed.notify_all();
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

    /// The daemon stops: waits until nothing is on its way to another one, which ends soon.
    pub(crate) fn stop(&self, until: Instant) {
        let mut state = self.lock();
        state.stopping = true;
        while state.giving {
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
