//! The threads of one port, and a bound on waiting for their end.
//!
//! A port's thread calls into what is served. There it may be kept (a driver in a loop until its deadline, a ladder that holds the lane, a device that does not
//! answer), and it may be what calls the shutdown (a callback of its own). A plain join would wait for the one too long and for the other for ever.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

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

/// The threads of one port: started here, and waited for with a bound.
#[derive(Default)]
pub struct PortThreads {
    running: Arc<Running>,
    handles: Vec<(u64, JoinHandle<()>)>,
    next: u64,
    /// Of those that were forgotten since they had ended.
    panicked: usize,
}

impl std::fmt::Debug for PortThreads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PortThreads").field("threads", &self.handles.len()).finish_non_exhaustive()
    }
}

/// How the threads of a port ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ThreadsEnded {
    /// Threads that did not end in time, by name. They are on their own from here on.
    pub left_behind: Vec<String>,
    /// Threads that panicked.
    pub panicked: usize,
    /// The caller is one of them: it ends when it has returned to its own loop.
    pub is_caller: bool,
}

impl PortThreads {
    /// Whether none is left to wait for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    /// Starts a thread as `builder` says, and forgets those that have ended.
    ///
    /// # Errors
    /// The system's, if there is no thread to be had; then `body` was dropped.
    pub fn spawn(&mut self, builder: Builder, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let (over, still): (Vec<_>, Vec<_>) = self.handles.drain(..).partition(|(_, thread)| thread.is_finished());
        self.handles = still;
        self.panicked += over.into_iter().filter_map(|(_, thread)| thread.join().err()).count();
        let number = self.next;
        self.next += 1;
        self.running.numbers.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        let entry = Entry { running: Arc::clone(&self.running), number };
        // Without a thread the body is dropped, and the entry with it.
        let thread = builder.spawn(move || {
            let _entry = entry;
            body();
        })?;
        self.handles.push((number, thread));
        Ok(())
    }

    /// Waits until every thread but the calling one has ended, and no longer than `deadline`.
    pub fn end(&mut self, deadline: Instant) -> ThreadsEnded {
        let myself = std::thread::current().id();
        let mut ended = ThreadsEnded { panicked: std::mem::take(&mut self.panicked), ..ThreadsEnded::default() };
        for (number, thread) in self.handles.drain(..) {
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

    fn named(name: &str) -> Builder {
        Builder::new().name(name.to_owned())
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    #[test]
    fn threads_that_ended_are_joined_and_their_panics_counted() {
        let mut threads = PortThreads::default();
        threads.spawn(named("good"), || {}).unwrap();
        threads.spawn(named("bad"), || std::panic::resume_unwind(Box::new(()))).unwrap();
        let ended = threads.end(Instant::now() + Duration::from_secs(10));
        assert_eq!(ended, ThreadsEnded { panicked: 1, ..ThreadsEnded::default() });
        assert!(threads.is_empty());
    }

    #[test]
    fn one_that_does_not_end_is_left_behind_and_the_others_are_not() {
        let mut threads = PortThreads::default();
        let (go, gone) = channel::<()>();
        threads
            .spawn(named("stuck"), move || {
                let _ = gone.recv();
            })
            .unwrap();
        threads.spawn(named("good"), || {}).unwrap();
        assert!(threads.running.wait(1, Instant::now() + Duration::from_secs(10)));
        let ended = threads.end(soon());
        assert_eq!(ended, ThreadsEnded { left_behind: vec!["stuck".into()], ..ThreadsEnded::default() });
        drop(go);
    }

    #[test]
    fn a_thread_does_not_wait_for_itself() {
        let (answer, answered) = channel();
        let mut threads = PortThreads::default();
        let (hand, handed) = channel::<PortThreads>();
        threads
            .spawn(named("own"), move || {
                let mut threads = handed.recv().unwrap();
                answer.send(threads.end(Instant::now() + Duration::from_secs(60))).unwrap();
            })
            .unwrap();
        hand.send(threads).unwrap();
        let ended = answered.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(ended, ThreadsEnded { is_caller: true, ..ThreadsEnded::default() });
    }

    #[test]
    fn a_thread_that_was_forgotten_had_its_panic_counted() {
        let mut threads = PortThreads::default();
        let (go, gone) = channel::<()>();
        threads.spawn(named("bad"), || std::panic::resume_unwind(Box::new(()))).unwrap();
        assert!(threads.running.wait(0, Instant::now() + Duration::from_secs(10)));
        threads
            .spawn(named("stuck"), move || {
                let _ = gone.recv();
            })
            .unwrap();
        let ended = threads.end(soon());
        assert_eq!(ended, ThreadsEnded { left_behind: vec!["stuck".into()], panicked: 1, ..ThreadsEnded::default() });
        drop(go);
    }
}
