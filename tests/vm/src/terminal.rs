//! The user of a terminal, and of other character devices: types, and waits for what is to be read.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

/// Most of what is read in vain before it is given up, in bytes.
const MAX_BYTES: usize = 8 << 20;

/// An open character device.
#[derive(Debug)]
pub struct Terminal {
    file: File,
    /// Read and not yet waited for.
    heard: Vec<u8>,
}

impl Terminal {
    /// Opens it, and makes it nobody's controlling terminal.
    ///
    /// # Errors
    /// When that is refused.
    pub fn open(path: impl AsRef<Path>) -> Result<Terminal> {
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
        let path = path.as_ref();
        let file = File::options().read(true).write(true).custom_flags(flags).open(path);
        Ok(Terminal { file: file.with_context(|| path.display().to_string())?, heard: Vec::new() })
    }

    /// A second hand on the same opening.
    ///
    /// # Errors
    /// When there are too many descriptors.
    pub fn again(&self) -> Result<Terminal> {
        Ok(Terminal { file: self.file.try_clone()?, heard: Vec::new() })
    }

    /// Writes all of it.
    ///
    /// # Errors
    /// When it is not taken within `limit`.
    pub fn say(&mut self, mut bytes: &[u8], limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, deadline).with_context(|| format!("{} bytes are left", bytes.len()))?;
                }
                Err(error) => return Err(error).context("writing to a terminal"),
            }
        }
        Ok(())
    }

    /// Waits for `text` and gives what came before it; what comes after is for the next call.
    ///
    /// # Errors
    /// What came instead.
    pub fn hears(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        // Up to here it has been looked for.
        let mut looked = 0_usize;
        loop {
            let from = looked.saturating_sub(text.len());
            looked = self.heard.len();
            let found = self.heard[from..].windows(text.len()).position(|window| window == text.as_bytes());
            if let Some(at) = found.map(|at| from + at) {
                let mut before: Vec<u8> = self.heard.drain(..at + text.len()).collect();
                before.truncate(at);
                return Ok(String::from_utf8_lossy(&before).into_owned());
            }
            let mut buffer = [0; 16 * 1024];
            let said = match self.read(&mut buffer, deadline) {
                Ok(count) if count > 0 && self.heard.len() < MAX_BYTES => count,
                Ok(0) => bail!("the end in place of {text:?}; before it {}", shown(&self.heard)),
                Ok(_) => bail!("{} bytes without {text:?}", self.heard.len()),
                Err(error) => bail!("{error:#} in place of {text:?}; before it {}", shown(&self.heard)),
            };
            self.heard.extend_from_slice(&buffer[..said]);
        }
    }

    /// Reads so many bytes.
    ///
    /// # Errors
    /// When they do not come within `limit`.
    pub fn takes(&mut self, bytes: usize, limit: Duration) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut all = std::mem::take(&mut self.heard);
        let mut buffer = vec![0; 64 * 1024];
        while all.len() < bytes {
            let count = self.read(&mut buffer, deadline).with_context(|| format!("{} of {bytes} bytes", all.len()))?;
            if count == 0 {
                bail!("the end after {} of {bytes} bytes", all.len());
            }
            all.extend_from_slice(&buffer[..count]);
        }
        self.heard = all.split_off(bytes);
        Ok(all)
    }

    /// Waits for the hang-up: the end, or EIO.
    ///
    /// # Errors
    /// When it does not come within `limit`.
    pub fn hangs_up(mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::IN, deadline)?,
                Err(error) => return Err(error).context("reading a terminal"),
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8], deadline: Instant) -> Result<usize> {
        loop {
            match self.file.read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::IN, deadline)?,
                result => return result.context("reading a terminal"),
            }
        }
    }

    fn wait(&self, what: PollFlags, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        if left.is_zero() || poll(&mut [PollFd::new(&self.file, what)], Some(&timeout))? == 0 {
            bail!("nothing moves on a terminal any more");
        }
        Ok(())
    }
}

fn shown(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(400)..]))
}
