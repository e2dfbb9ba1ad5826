//! A pseudo terminal with a symbolic link to it.
//!
//! The terminal is raw until its user says otherwise. Whether a user has it open is known by the hang-up that its master shows while nobody has (pty(7)), and that somebody opens it by inotify(7):
//! a terminal that nobody uses costs nothing.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};

use crate::error::CharacterError;
use crate::ioctl;
use crate::place::{Found, Place};
use crate::stream::{Line, Taken};

/// Where terminals are.
const TERMINALS: &str = "/dev/pts/";

/// The master's side.
pub(crate) struct Pty {
    master: OwnedFd,
    opens: OwnedFd,
    slave: PathBuf,
}

impl Pty {
    /// Makes terminal and link. A link that a host left behind is taken over: it leads to a terminal that is no more.
    pub(crate) fn make(link: &Path) -> Result<(Pty, Place), CharacterError> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let master =
            rustix::fs::open("/dev/ptmx", flags, Mode::empty()).map_err(CharacterError::io("open of /dev/ptmx"))?;
        let number = ioctl::unlock(&master).map_err(CharacterError::io("unlocking the pseudo terminal"))?;
        let slave = PathBuf::from(format!("{TERMINALS}{number}"));
        // On Linux the master's attributes are the slave's.
        let mut attributes = tcgetattr(&master).map_err(CharacterError::io("tcgetattr"))?;
        attributes.make_raw();
        tcsetattr(&master, OptionalActions::Now, &attributes).map_err(CharacterError::io("tcsetattr"))?;
        let opens = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .map_err(CharacterError::io("inotify_init1"))?;
        // A terminal that nobody ever had open does not hang up yet. Whoever is here before is the one that would be told of: nobody knows the number.
        drop(
            rustix::fs::open(&slave, flags, Mode::empty())
                .map_err(CharacterError::io("open of the pseudo terminal's slave"))?,
        );
        inotify::add_watch(&opens, &slave, inotify::WatchFlags::OPEN)
            .map_err(CharacterError::io("inotify_add_watch"))?;
        let look = |stat: &rustix::fs::Stat| {
            let target = rustix::fs::readlink(link, Vec::new()).ok().and_then(|target| target.into_string().ok());
            let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
            match target.filter(|target| is_link && target.starts_with(TERMINALS)) {
                None => Found::Foreign,
                // This very number, given out again.
                Some(target) if Path::new(&target) == slave || !Path::new(&target).exists() => Found::Stale,
                Some(_) => Found::InUse,
            }
        };
        let place = Place::claim(link, "link to a pseudo terminal", look, || rustix::fs::symlink(&slave, link))?;
        Ok((Pty { master, opens, slave }, place))
    }

    /// The terminal that another process made, and its watch. Nothing of it changes, and nothing is read.
    pub(crate) fn adopt(master: OwnedFd, opens: OwnedFd, slave: PathBuf) -> Result<Pty, CharacterError> {
        let blocks = |fd: &OwnedFd| !rustix::fs::fcntl_getfl(fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        if ioctl::number(&master).is_err() || blocks(&master) || blocks(&opens) {
            return Err(CharacterError::wrong("what should be a terminal is none"));
        }
        Ok(Pty { master, opens, slave })
    }
}

impl Line for Pty {
    /// Master, watch, and the name of the slave.
    fn export(&self) -> Option<io::Result<(Vec<OwnedFd>, PathBuf)>> {
        let both = self.master.try_clone().and_then(|master| Ok(vec![master, self.opens.try_clone()?]));
        Some(both.map(|both| (both, self.slave.clone())))
    }

    fn peer(&self) -> String {
        self.slave.display().to_string()
    }

    fn input(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    fn output(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    fn take(&mut self, into: &mut [u8]) -> Taken {
        match rustix::io::read(&self.master, into) {
            Ok(0) | Err(Errno::AGAIN | Errno::INTR) => Taken::Later,
            Ok(bytes) => Taken::Bytes(bytes),
            // Everything that the last user wrote is read.
            Err(_) => Taken::Away,
        }
    }

    fn is_somebody_there(&mut self) -> bool {
        // Before the look: who opens it afterwards is told of again. Events are forgotten by the kernel beyond a bound.
        let mut buffer = [MaybeUninit::uninit(); 4096];
        while matches!(rustix::io::read(&self.opens, &mut buffer), Ok((events, _)) if !events.is_empty()) {}
        let mut fds = [PollFd::new(&self.master, PollFlags::empty())];
        let looked = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        looked.is_ok() && !fds[0].revents().contains(PollFlags::HUP)
    }

    fn comes(&self) -> Option<BorrowedFd<'_>> {
        Some(self.opens.as_fd())
    }

    fn resize(&mut self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // The foreground processes are told by SIGWINCH.
        if let Err(error) = tcsetwinsize(&self.master, size) {
            tracing::debug!(%error, "the terminal keeps its size");
        }
    }
}
