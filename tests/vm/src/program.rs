//! Programs that a scenario runs: with a limit, with their output, and never longer than the scenario.

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, kill_process_group, pidfd_open};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How much of an output is kept for a look, in bytes.
const MAX_OUTPUT_BYTES: u64 = 4 << 20;

/// Where outputs are written, in memory like everything here.
const FOLDER: &str = "/tmp/programs";

/// A program that runs. Dropped, it is killed with every process that it has started in its group.
#[derive(Debug)]
pub struct Running {
    shown: String,
    child: Child,
    pidfd: OwnedFd,
    begin: Instant,
    output: PathBuf,
    ended: Option<ExitStatus>,
}

impl Running {
    /// Starts `line[0]` with the rest as arguments, found on the path.
    pub fn start<S: AsRef<OsStr>>(name: &str, line: &[S]) -> Result<Running> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (program, arguments) = line.split_first().context("no program is named")?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        std::fs::create_dir_all(FOLDER)?;
        let output = Path::new(FOLDER).join(format!("{number}-{name}"));
        let words: Vec<_> = line.iter().map(|word| word.as_ref().to_string_lossy()).collect();
        let shown = words.join(" ");
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(File::create(output.with_extension("out"))?)
            .stderr(File::create(output.with_extension("err"))?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {shown}"))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        Ok(Running { shown, child, pidfd, begin: Instant::now(), output, ended: None })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.wait(Duration::ZERO)?.is_none())
    }

    /// Standard output so far.
    pub fn stdout(&self) -> String {
        contents(&self.output.with_extension("out"))
    }

    /// Standard error so far.
    pub fn stderr(&self) -> String {
        contents(&self.output.with_extension("err"))
    }

    /// Waits for the end, and kills it at the limit.
    pub fn finish(mut self, limit: Duration) -> Result<Output> {
        match self.wait(limit)? {
            Some(status) => Ok(Output {
                shown: self.shown.clone(),
                status,
                stdout: self.stdout(),
                stderr: self.stderr(),
                took: self.begin.elapsed(),
            }),
            None => bail!("{} still runs after {limit:?}{}", self.shown, said(&self.stdout(), &self.stderr())),
        }
    }

    /// SIGTERM, and the end within `limit`.
    pub fn terminate(self, limit: Duration) -> Result<Output> {
        self.end_by(Signal::TERM, limit)
    }

    /// SIGINT, as Ctrl-C sends it, and the end within `limit`.
    pub fn interrupt(self, limit: Duration) -> Result<Output> {
        self.end_by(Signal::INT, limit)
    }

    /// SIGKILL to the process alone, and its end. What the kernel cannot end within `limit` (a process that waits for a device) is an error.
    pub fn kill(self, limit: Duration) -> Result<Output> {
        self.end_by(Signal::KILL, limit)
    }

    fn end_by(self, signal: Signal, limit: Duration) -> Result<Output> {
        kill_process(Pid::from_child(&self.child), signal).with_context(|| self.shown.clone())?;
        self.finish(limit)
    }

    /// What it has said, and where in the kernel each of its threads is: for one that does not do what it should.
    pub fn where_it_is(&self) -> String {
        let mut text = said(&self.stdout(), &self.stderr());
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.id()));
        for task in tasks.into_iter().flatten().flatten().map(|task| task.path()) {
            let read = |name| std::fs::read_to_string(task.join(name)).unwrap_or_default();
            let state = read("stat").split(' ').take(3).collect::<Vec<_>>().join(" ");
            text += &format!("\n    thread {state}: {}", read("stack").trim().replace('\n', " < "));
        }
        text
    }

    fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            let timeout = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
            poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout))?;
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Also when the child has ended: others of its group may be left. If none is, nobody else has the number yet: the kernel goes through all 32768 first.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        // Not for ever: a process in the kernel's hands ends when the kernel lets go of it.
        let _ = self.wait(Duration::from_secs(20));
    }
}

/// What a program that has ended left.
#[derive(Debug)]
pub struct Output {
    shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Output {
    /// An error unless it ended with 0.
    pub fn success(self) -> Result<Output> {
        ensure!(self.status.success(), "{}: {}{}", self.shown, self.status, said(&self.stdout, &self.stderr));
        Ok(self)
    }

    /// An error unless it ended with another status than 0, of its own accord.
    pub fn refusal(self) -> Result<Output> {
        let refused = self.status.code().is_some_and(|code| code != 0);
        ensure!(refused, "{}: {}{}", self.shown, self.status, said(&self.stdout, &self.stderr));
        Ok(self)
    }

    /// An error unless standard output or standard error holds `part`.
    pub fn saying(self, part: &str) -> Result<Output> {
        let says = self.stdout.contains(part) || self.stderr.contains(part);
        ensure!(says, "{} does not say {part:?}{}", self.shown, said(&self.stdout, &self.stderr));
        Ok(self)
    }

    /// Standard output as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("{}: no JSON{}", self.shown, said(&self.stdout, &self.stderr)))
    }
}

fn said(stdout: &str, stderr: &str) -> String {
    let mut text = String::new();
    for (name, output) in [("stdout", stdout), ("stderr", stderr)] {
        let lines: Vec<_> = output.lines().collect();
        for line in &lines[lines.len().saturating_sub(20)..] {
            text += &format!("\n    {name}: {line}");
        }
    }
    text
}

/// The beginning of a file, whatever bytes it holds; nothing if it cannot be read.
fn contents(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        // What was read before an error is still good for a message.
        let _ = file.take(MAX_OUTPUT_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
