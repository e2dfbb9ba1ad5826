//! eventfd(2), without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

#[derive(Debug)]
pub(crate) struct Eventfd {
    fd: OwnedFd,
}

impl Eventfd {
    pub(crate) fn new() -> io::Result<Eventfd> {
        Ok(Eventfd { fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    pub(crate) fn borrow(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Makes it readable.
    pub(crate) fn raise(&self) {
        // The only error is "full", and a full eventfd is readable.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    /// Makes it unreadable.
    pub(crate) fn empty(&self) {
        // The only error is "empty".
        let _ = rustix::io::read(&self.fd, &mut [0; 8]);
    }

    /// Waits until it is readable; false when the time is up.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], left.as_ref()) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                // Out of kernel memory: the caller looks at its condition and comes back.
                Err(_) => return false,
            }
        }
    }
}
