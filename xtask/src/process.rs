//! Child processes that never outlive this one's interest in them.

use crate::interrupt;
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a process may take to end after SIGTERM before it is killed. The daemon promises 5 s.
const GRACE: Duration = Duration::from_secs(6);

/// How often a wait looks at the interrupt flag.
const LOOK: Duration = Duration::from_millis(100);

/// A running child. Dropped, it is asked to end, and killed if it does not.
pub(crate) struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    output: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` in a process group of its own, with standard output and standard error in files `NAME.out` and `NAME.err` of `folder`.
    pub(crate) fn start(name: &str, command: &mut Command, folder: &Path) -> Result<Process> {
        let output = folder.join(name);
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(output.with_extension("out"))?)
            .stderr(File::create(output.with_extension("err"))?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Process { name: name.to_owned(), child, pidfd, output, ended: None })
    }

    /// The process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard output so far.
    pub(crate) fn stdout(&self) -> String {
        read_lossy(&self.output.with_extension("out"))
    }

    /// What it has written to standard error so far.
    pub(crate) fn stderr(&self) -> String {
        read_lossy(&self.output.with_extension("err"))
    }

    /// Waits until `ready` holds; the process must not end before.
    pub(crate) fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut(&Process) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !ready(self) {
            // The condition is seen from outside, so it can only be looked at again; the end of the process cuts the wait short.
            if let Some(status) = self.wait_for_end(Duration::from_millis(10))? {
                bail!("{} ended ({status}) before {what}{}", self.name, self.last_words());
            }
            if Instant::now() > deadline {
                bail!("{}: {what} did not happen within {limit:?}{}", self.name, self.last_words());
            }
        }
        Ok(())
    }

    /// Waits for the end; an error after `limit` (the process is then killed by the destructor) or on Ctrl-C.
    pub(crate) fn finish(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.wait_for_end(LOOK)? {
                return Ok(status);
            }
            interrupt::check()?;
            if Instant::now() > deadline {
                bail!("{} is still running after {limit:?}{}", self.name, self.last_words());
            }
        }
    }

    /// Asks the process to end (SIGTERM), waits, and kills it if that does not help.
    pub(crate) fn stop(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.wait_for_end(Duration::ZERO)? {
            return Ok(status);
        }
        kill_process(Pid::from_child(&self.child), Signal::TERM)?;
        if let Some(status) = self.wait_for_end(GRACE)? {
            return Ok(status);
        }
        self.child.kill()?;
        self.ended = Some(self.child.wait()?);
        bail!("{} did not end within {GRACE:?} of SIGTERM and was killed{}", self.name, self.last_words());
    }

    /// The end of what it wrote to standard error, for an error message.
    pub(crate) fn last_words(&self) -> String {
        let text = self.stderr();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n    ");
        if tail.is_empty() { String::new() } else { format!("; it said:\n    {tail}") }
    }

    /// How it ended, if it did within `limit`.
    pub(crate) fn wait_for_end(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("    {error:#}");
        }
    }
}

fn read_lossy(path: &Path) -> String {
    std::fs::read(path).map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
}
