//! The terminal, or the pipes, of this process.
//!
//! A terminal is made raw, but for what makes lines of the log whole, and gets its attributes back when the port goes, however it goes short of SIGKILL. Ctrl-] ends the session, and is the one
//! byte that cannot be typed. Of pipes every byte is passed on; the end of the input ends the session when the device has said nothing for half a second.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, OutputModes, Termios, isatty, tcgetattr, tcsetattr};

use crate::error::CharacterError;
use crate::stream::{Line, Taken};

/// Ctrl-], as of `telnet`, `virsh console` and others.
const ESCAPE: u8 = 0x1d;

/// Standard input and output.
pub(crate) struct Stdio {
    input: OwnedFd,
    output: OwnedFd,
    is_terminal: bool,
    over: Option<Box<dyn FnOnce() + Send>>,
}

/// A raw terminal. Dropping it makes it what it was.
pub(crate) struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Stdio {
    /// `over` is called once, when the session has ended.
    pub(crate) fn open(over: Box<dyn FnOnce() + Send>) -> Result<(Stdio, Option<Raw>), CharacterError> {
        let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
        let input = own(stdin.as_fd(), OFlags::RDONLY)?;
        let output = own(stdout.as_fd(), OFlags::WRONLY)?;
        let is_terminal = isatty(&input);
        let raw = if is_terminal { Some(Raw::make(&input)?) } else { None };
        Ok((Stdio { input, output, is_terminal, over: Some(over) }, raw))
    }
}

/// A descriptor of our own that does not block. To set that on what we were given would set it for everybody who shares it, the shell to begin with.
fn own(fd: BorrowedFd<'_>, access: OFlags) -> Result<OwnedFd, CharacterError> {
    use std::os::fd::AsRawFd;
    let stat = rustix::fs::fstat(fd).map_err(CharacterError::io("stat of standard input or output"))?;
    if matches!(FileType::from_raw_mode(stat.st_mode), FileType::Fifo | FileType::CharacterDevice) {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        if let Ok(own) = rustix::fs::open(path, flags, Mode::empty()) {
            return Ok(own);
        }
    }
    // A file never blocks. Another user's terminal and a socket may, if somebody else reads or fills them at the same moment.
    rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(CharacterError::io("dup of standard input or output"))
}

impl Raw {
    fn make(terminal: &OwnedFd) -> Result<Raw, CharacterError> {
        let before = tcgetattr(terminal).map_err(CharacterError::io("tcgetattr"))?;
        let terminal = rustix::io::fcntl_dupfd_cloexec(terminal, 3).map_err(CharacterError::io("dup"))?;
        let mut raw = before.clone();
        raw.make_raw();
        // The log goes to the same screen.
        raw.output_modes |= before.output_modes & OutputModes::OPOST;
        tcsetattr(&terminal, OptionalActions::Now, &raw).map_err(CharacterError::io("tcsetattr"))?;
        Ok(Raw { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

impl Line for Stdio {
    /// They are this process's.
    fn export(&self) -> Option<std::io::Result<(Vec<OwnedFd>, std::path::PathBuf)>> {
        None
    }

    fn peer(&self) -> String {
        if self.is_terminal { "the terminal".to_owned() } else { "standard input and output".to_owned() }
    }

    fn input(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }

    fn output(&self) -> BorrowedFd<'_> {
        self.output.as_fd()
    }

    fn take(&mut self, into: &mut [u8]) -> Taken {
        match rustix::io::read(&self.input, &mut *into) {
            Err(Errno::AGAIN | Errno::INTR) => Taken::Later,
            Ok(0) | Err(_) => Taken::Ended(0, false),
            Ok(bytes) => match into[..bytes].iter().position(|byte| self.is_terminal && *byte == ESCAPE) {
                Some(before) => Taken::Ended(before, true),
                None => Taken::Bytes(bytes),
            },
        }
    }

    fn is_somebody_there(&mut self) -> bool {
        true
    }

    fn comes(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn resize(&mut self, _columns: u16, _rows: u16) {
        // The screen is as large as it is.
    }
}

/// However the thread that serves it has ended: nobody would be left to read Ctrl-] from a raw terminal.
impl Drop for Stdio {
    fn drop(&mut self) {
        if let Some(over) = self.over.take() {
            over();
        }
    }
}
