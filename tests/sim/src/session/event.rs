//! Event descriptors, and sleeping on them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// A non-blocking eventfd.
pub(crate) struct Event(OwnedFd);

impl Event {
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// One that somebody else made.
    pub(crate) fn of(event: OwnedFd) -> Self {
        Self(event)
    }

    /// Adds one. A full counter is as readable as one that took it, so an error means nothing.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Sleeps until one of `events` is signalled (and clears them all), or until `limit` is over.
pub(crate) fn sleep(events: &[&Event], limit: Option<Duration>) {
    let mut fds: Vec<_> = events.iter().map(|event| PollFd::new(*event, PollFlags::IN)).collect();
    let limit =
        limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) });
    // An interrupted or failed poll only means one more look at the queue.
    let _ = rustix::event::poll(&mut fds, limit.as_ref());
    events.iter().for_each(|event| event.clear());
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const TICK: Duration = Duration::from_millis(1);

    #[test]
    fn an_event_wakes_a_sleeper_and_is_cleared() -> std::io::Result<()> {
        let event = Event::new()?;
        event.signal();
        sleep(&[&event], None);
        let begun = Instant::now();
        sleep(&[&event], Some(TICK));
        assert!(begun.elapsed() >= TICK, "the event was not cleared");
        Ok(())
    }
}
