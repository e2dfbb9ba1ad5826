//! The threads of one port, and a bound on waiting for their end.
//!
//! A client's thread calls into what is served. There it may be kept (a driver in a loop until its deadline, a device that does not answer a new region), and closing
//! what a client sent may take time. A plain join would wait for all of that.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// A client's thread needs little: no recursion, no buffers of its own.
const STACK_BYTES: usize = 256 * 1024;

/// Numbers of the threads whose body has not ended.
#[derive(Default)]
struct Running {
    numbers: Mutex<Vec<u64>>,
    one_ended: Condvar,
}

/// One thread's entry in [`Running`], dropped when its body has ended, also by a panic.
struct Entry {
    running: Arc<Running>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut numbers = self.running.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.retain(|&other| other != self.number);
        self.running.one_ended.notify_all();
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Threads {
    running: Arc<Running>,
    handles: Vec<(u64, JoinHandle<()>)>,
    next: u64,
    panicked: usize,
}

/// How the threads ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Threads that did not end in time. They are on their own from here on.
    pub(crate) left_behind: usize,
    /// Threads that panicked.
    pub(crate) panicked: usize,
}

impl Threads {
    /// Starts a thread, and forgets those that have ended.
    ///
    /// # Errors
    /// The system's, if there is no thread to be had; then `body` was dropped.
    pub(crate) fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let (over, still): (Vec<_>, Vec<_>) = self.handles.drain(..).partition(|(_, thread)| thread.is_finished());
        self.handles = still;
        self.panicked += over.into_iter().filter_map(|(_, thread)| thread.join().err()).count();
        let number = self.next;
        self.next += 1;
        self.running.numbers.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        let entry = Entry { running: Arc::clone(&self.running), number };
        let thread = std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            let _entry = entry;
            body();
        })?;
        self.handles.push((number, thread));
        Ok(())
    }

    /// Waits until every thread but the calling one has ended, and no longer than `deadline`.
    pub(crate) fn end(&mut self, deadline: Instant) -> Ended {
        let myself = std::thread::current().id();
        let mut ended = Ended { left_behind: 0, panicked: self.panicked };
        for (number, thread) in self.handles.drain(..) {
            if thread.thread().id() == myself {
                continue;
            }
            if self.running.wait(number, deadline) {
                // Only its last instructions are left.
                ended.panicked += usize::from(thread.join().is_err());
            } else {
                ended.left_behind += 1;
            }
        }
        ended
    }
}

impl Running {
    /// Whether thread `number` ended before `deadline`.
    fn wait(&self, number: u64, deadline: Instant) -> bool {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        while numbers.contains(&number) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            numbers = self.one_ended.wait_timeout(numbers, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn threads_that_ended_are_joined_and_one_that_does_not_is_left_behind() {
        let mut threads = Threads::default();
        let (go, gone) = channel::<()>();
        threads.spawn("bad".into(), || std::panic::resume_unwind(Box::new(()))).unwrap();
        assert!(threads.running.wait(0, Instant::now() + Duration::from_secs(10)));
        threads
            .spawn("stuck".into(), move || {
                let _ = gone.recv();
            })
            .unwrap();
        let ended = threads.end(Instant::now() + Duration::from_millis(50));
        assert_eq!(ended, Ended { left_behind: 1, panicked: 1 });
        drop(go);
    }
}
