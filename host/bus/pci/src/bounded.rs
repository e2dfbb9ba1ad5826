//! System calls that the kernel may sit in for a minute (a reset, the last close of a function that is gone), on threads that nobody has to wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// One such call at a time.
#[derive(Debug, Default)]
pub(crate) struct Bounded {
    busy: Arc<AtomicBool>,
}

/// It has not answered by the deadline. It goes on by itself, and what it was given goes when it ends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StillRunning;

/// Ends what `Bounded::busy` says, however the call ends.
struct Busy(Arc<AtomicBool>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Bounded {
    /// Whether one is running.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Runs `call` on a thread `name` and waits for its answer until `deadline`, or until 10 ms from now if that is later.
    ///
    /// # Errors
    /// [`StillRunning`] when it does not answer in time, when an earlier one has not answered yet (then this one is dropped unrun), and when there is no thread to be had.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        name: &str,
        deadline: Instant,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, StillRunning> {
        if self.busy.swap(true, Ordering::AcqRel) {
            return Err(StillRunning);
        }
        let busy = Busy(Arc::clone(&self.busy));
        let (answer, answers) = mpsc::sync_channel(1);
        let body = move || {
            let outcome = call();
            // Before the answer: whoever has it may ask for the next call at once.
            drop(busy);
            let _ = answer.send(outcome);
        };
        let thread = match std::thread::Builder::new().name(name.to_owned()).spawn(body) {
            Ok(thread) => thread,
            Err(error) => {
                tracing::error!(%error, name, "no thread for a call that may take long");
                return Err(StillRunning);
            }
        };
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(10));
        let outcome = answers.recv_timeout(left).map_err(|_| StillRunning)?;
        // It has nothing left to do, and is nobody's residue.
        let _ = thread.join();
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_does_not_end_is_left_behind_and_no_second_one_begins() {
        let bounded = Bounded::default();
        let soon = || Instant::now() + Duration::from_secs(20);
        assert_eq!(bounded.run("quick", soon(), || 7), Ok(7));
        let (end, ended) = mpsc::channel::<()>();
        let wait = move || ended.recv();
        assert!(bounded.run("slow", Instant::now(), wait).is_err());
        assert_eq!(bounded.run("second", soon(), || 8), Err(StillRunning));
        drop(end);
        let deadline = soon();
        while bounded.busy.load(Ordering::Acquire) {
            assert!(Instant::now() < deadline, "the slow call has ended");
            std::thread::yield_now();
        }
        assert_eq!(bounded.run("third", soon(), || 9), Ok(9));
    }
}
