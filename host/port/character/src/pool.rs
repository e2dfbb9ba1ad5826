//! The kernel's entropy pool, credited with what a device gives: only because an operator asked for it, and only so many bytes a second.
//!
//! It is credited with eight bits for each byte: who names this port trusts the device as a source.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use cofferdam_manager::Buffer;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::entropy::{Demand, Sink};
use crate::error::CharacterError;
use crate::ioctl;

/// Between two portions.
const TURN: Duration = Duration::from_secs(1);

/// The kernel's pool.
pub(crate) struct Pool {
    random: OwnedFd,
    rate: u32,
    next: Instant,
}

impl Pool {
    pub(crate) fn open(rate: u32) -> Result<Pool, CharacterError> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let random = rustix::fs::open("/dev/random", flags, Mode::empty());
        let random = random.map_err(CharacterError::io("open of /dev/random"))?;
        match ioctl::credit(&random, &[]) {
            Err(Errno::PERM) => return Err(CharacterError::NotAllowed),
            result => result.map_err(CharacterError::io("RNDADDENTROPY"))?,
        };
        Ok(Pool { random, rate, next: Instant::now() })
    }
}

impl Pool {
    /// The same in another process. Of the second that has begun the one before it may have credited a portion.
    pub(crate) fn adopt(rate: u32) -> Result<Pool, CharacterError> {
        let pool = Pool::open(rate)?;
        Ok(Pool { next: pool.next + TURN, ..pool })
    }
}

impl Sink for Pool {
    /// Whoever takes over opens it.
    fn export(&self) -> io::Result<Vec<OwnedFd>> {
        Ok(Vec::new())
    }

    fn demand(&mut self, now: Instant) -> Demand {
        if now < self.next {
            return Demand::At(self.next);
        }
        // Time that was slept through is not made up for.
        self.next = now + TURN;
        Demand::Bytes(self.rate)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.random.as_fd()
    }

    fn give(&mut self, buffer: &Buffer, range: Range<u32>) -> io::Result<usize> {
        let mut bytes = vec![0; range.len().min(ioctl::CREDIT_BYTES)];
        buffer.read_at(range.start, &mut bytes).map_err(|_| io::Error::from(io::ErrorKind::NotConnected))?;
        Ok(ioctl::credit(&self.random, &bytes)?)
    }
}
