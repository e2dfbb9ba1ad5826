//! Letting go of what a descriptor refers to, while somebody else may still hold its number.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{Mode, OFlags};

/// Makes `fd`'s number refer to `/dev/null`, in one step; what it referred to loses one reference. Whoever owns the number still owns an open
/// descriptor, so nothing that polls, reads or closes it by mistake meets somebody else's.
///
/// # Errors
/// When `/dev/null` cannot be opened or the process may have no more descriptors; then nothing has changed.
pub fn hollow_out(fd: BorrowedFd<'_>) -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // SAFETY: both numbers are open descriptors of this process, borrowed for the call. `dup3` closes nothing but the reference that `fd`'s number held, and
    // puts another open file in its place atomically: the owner of the number keeps owning an open descriptor.
    if unsafe { libc::dup3(null.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
