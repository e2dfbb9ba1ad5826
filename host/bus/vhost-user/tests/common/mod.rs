//! What the tests of this crate share: real and false backends, and a wait with a bound.

#![allow(dead_code, unreachable_pub)]

pub mod disk;
pub mod fake;
pub mod qemu;

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a test waits for what must come. Only a failing test waits that long.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `fd` is readable or hangs up; false after [`PATIENCE`].
pub fn readable(fd: impl AsFd) -> bool {
    let limit = Timespec::try_from(PATIENCE).unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

/// Whether `fd` is readable now.
pub fn readable_now(fd: impl AsFd) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
}
