//! The threads of one port, and a bound on waiting for their end.
//!
//! A worker calls into what is served. There it may be kept (a driver in a loop until its deadline, a ladder that holds
//! the lane), and it may be what calls the shutdown (a callback of its own). A plain join would wait for the one too
//! long and for the other for ever.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// Numbers of the threads whose body has not ended. At most one for each lane and one more.
#[derive(Default)]
struct Running {
    numbers: Mutex<Vec<usize>>,
    one_ended: Condvar,
}

/// One thread's entry in [`Running`], dropped when its body has ended, also by a panic.
struct Entry {
    running: Arc<Running>,
    number: usize,
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
    handles: Vec<JoinHandle<()>>,
}

/// How the threads ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Threads that did not end in time, by name. They are on their own from here on.
    pub(crate) left_behind: Vec<String>,
    /// Threads that panicked.
    pub(crate) panicked: usize,
    /// The caller is one of them: it ends when it has returned to its own loop.
    pub(crate) is_caller: bool,
}

impl Threads {
    pub(crate) fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    /// Starts a thread.
    ///
    /// # Errors
    /// The system's, if there is no thread to be had.
    pub(crate) fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let number = self.handles.len();
        self.running.numbers.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        let entry = Entry { running: Arc::clone(&self.running), number };
        // Without a thread the body is dropped, and the entry with it.
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _entry = entry;
            body();
        })?;
        self.handles.push(thread);
        Ok(())
    }

    /// Waits until every thread but the calling one has ended, and no longer than `deadline`.
    pub(crate) fn end(&mut self, deadline: Instant) -> Ended {
        let myself = std::thread::current().id();
        let mut ended = Ended::default();
        for (number, thread) in self.handles.drain(..).enumerate() {
            if thread.thread().id() == myself {
                ended.is_caller = true;
            } else if self.running.wait(number, deadline) {
                // Only its last instructions are left.
                ended.panicked += usize::from(thread.join().is_err());
            } else {
                ended.left_behind.push(thread.thread().name().unwrap_or_default().to_owned());
            }
        }
        ended
    }
}

impl Running {
    /// Whether thread `number` ended before `deadline`.
    fn wait(&self, number: usize, deadline: Instant) -> bool {
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

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[test]
    fn threads_that_ended_are_joined_and_their_panics_counted() {
        let mut threads = Threads::default();
        threads.spawn("good".into(), || {}).unwrap();
        threads.spawn("bad".into(), || std::panic::resume_unwind(Box::new(()))).unwrap();
        let ended = threads.end(Instant::now() + Duration::from_secs(10));
        assert_eq!(ended, Ended { panicked: 1, ..Ended::default() });
        assert!(threads.is_empty());
    }

    #[test]
    fn one_that_does_not_end_is_left_behind_and_the_others_are_not() {
        let mut threads = Threads::default();
        let (go, gone) = channel::<()>();
        threads
            .spawn("stuck".into(), move || {
                let _ = gone.recv();
            })
            .unwrap();
        threads.spawn("good".into(), || {}).unwrap();
        assert!(threads.running.wait(1, Instant::now() + Duration::from_secs(10)));
        let ended = threads.end(soon());
        assert_eq!(ended, Ended { left_behind: vec!["stuck".into()], ..Ended::default() });
        drop(go);
    }

    #[test]
    fn a_thread_does_not_wait_for_itself() {
        let (answer, answered) = channel();
        let mut threads = Threads::default();
        let (hand, handed) = channel::<Threads>();
        threads
            .spawn("own".into(), move || {
                let mut threads = handed.recv().unwrap();
                answer.send(threads.end(Instant::now() + Duration::from_secs(60))).unwrap();
            })
            .unwrap();
        hand.send(threads).unwrap();
        let ended = answered.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(ended, Ended { is_caller: true, ..Ended::default() });
    }
}
