//! A named pipe that random bytes are read from.
//!
//! It is open for reading and writing here as long as the port lives: who opens it does not wait, a reader that goes is not missed, and a full pipe is what holds the device back. A reader that
//! is blocked when the port goes finds the end of the file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use cofferdam_manager::Buffer;
use cofferdam_manager::transfer::{self, Piece};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::entropy::{Demand, Sink};
use crate::error::CharacterError;
use crate::place::{Found, Place};

/// Asked for at once.
const CHUNK_BYTES: u32 = 16 * 1024;

/// The pipe's end.
pub(crate) struct Fifo(OwnedFd);

impl Fifo {
    /// Makes the pipe. One that a host of the same user left behind is taken over: nobody has it open.
    pub(crate) fn make(path: &Path) -> Result<(Fifo, Place), CharacterError> {
        let look = |stat: &rustix::fs::Stat| {
            let is_fifo = FileType::from_raw_mode(stat.st_mode) == FileType::Fifo;
            if !is_fifo || stat.st_uid != rustix::process::geteuid().as_raw() {
                return Found::Foreign;
            }
            // A host that lives reads it too (fifo(7)).
            match rustix::fs::open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
                Err(Errno::NXIO) => Found::Stale,
                _ => Found::InUse,
            }
        };
        let make = || rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0);
        let place = Place::claim(path, "named pipe", look, make)?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let pipe = rustix::fs::open(path, flags, Mode::empty()).map_err(CharacterError::io("open of the pipe"))?;
        let stat = rustix::fs::fstat(&pipe).map_err(CharacterError::io("stat of the pipe"))?;
        if !place.is(&stat) {
            return Err(CharacterError::InUse(path.to_owned()));
        }
        // Whatever the umask left of it.
        rustix::fs::fchmod(&pipe, Mode::RUSR | Mode::WUSR).map_err(CharacterError::io("chmod of the pipe"))?;
        Ok((Fifo(pipe), place))
    }

    /// The pipe that another process made, which has it open.
    pub(crate) fn adopt(path: &Path, pipe: OwnedFd) -> Result<(Fifo, Place), CharacterError> {
        let stat = rustix::fs::fstat(&pipe).map_err(CharacterError::wrong)?;
        let blocks = !rustix::fs::fcntl_getfl(&pipe).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo || blocks {
            return Err(CharacterError::wrong("what should be a pipe is none"));
        }
        Ok((Fifo(pipe), Place::adopt(path, (stat.st_dev, stat.st_ino))))
    }
}

impl Sink for Fifo {
    /// The pipe. What nobody has read of it stays in it.
    fn export(&self) -> io::Result<Vec<OwnedFd>> {
        Ok(vec![self.0.try_clone()?])
    }

    fn demand(&mut self, _now: Instant) -> Demand {
        let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
        let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        if fds[0].revents().contains(PollFlags::OUT) { Demand::Bytes(CHUNK_BYTES) } else { Demand::Room }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn give(&mut self, buffer: &Buffer, range: std::ops::Range<u32>) -> io::Result<usize> {
        transfer::write(self.0.as_fd(), &[Piece::Shared(buffer, range)], 0)
    }
}
