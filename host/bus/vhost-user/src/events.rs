//! The descriptors that are waited on or rung.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cofferdam_device::{Doorbell, TransportError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll, eventfd, poll};

use crate::backend_channel::BackendChannel;
use crate::wire::Wire;

/// One descriptor for everything that can tell of the backend's end, and for what it says unasked.
pub(crate) fn watch(wire: &Wire, channel: Option<&BackendChannel>) -> rustix::io::Result<OwnedFd> {
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
    epoll::add(&set, wire.socket(), epoll::EventData::new_u64(0), flags)?;
    if let Some(pidfd) = wire.peer().pidfd() {
        epoll::add(&set, pidfd, epoll::EventData::new_u64(1), epoll::EventFlags::IN)?;
    }
    // Closed descriptors leave the set by themselves.
    for (number, fd) in channel.into_iter().flat_map(BackendChannel::descriptors).enumerate() {
        epoll::add(&set, fd, epoll::EventData::new_u64(2 + number as u64), epoll::EventFlags::IN)?;
    }
    Ok(set)
}

/// A non-blocking eventfd.
pub(crate) fn event(what: &str) -> Result<OwnedFd, TransportError> {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
        .map_err(|errno| TransportError::Io { what: what.to_owned(), source: errno.into() })
}

/// The kick eventfd of one queue.
pub(crate) struct Kick(pub(crate) OwnedFd);

impl Doorbell for Kick {
    fn ring(&self) {
        // The open file is shared with the backend, which may make it a blocking one and fill its counter: a write would then sleep. A counter that is not full takes one more
        // without sleeping, and one that is full wakes the backend anyway.
        let mut room = [PollFd::new(&self.0, PollFlags::OUT)];
        if poll(&mut room, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0) {
            let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}
