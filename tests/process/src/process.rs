//! A process that a test started: its output, its signals, its end.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
pub use rustix::process::Signal;
use rustix::process::{Pid, PidfdFlags, kill_process, pidfd_open};

use crate::wait::{PATIENCE, left};

/// A running process. Killed when dropped; its output is shown if the test fails.
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    stdout: Capture,
    stderr: Capture,
    ended: Option<ExitStatus>,
    /// Kept open: some programs end when their standard input does.
    stdin: Option<ChildStdin>,
}

/// How a process ended and what it said.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Process {
    /// Starts `command` with captured output.
    #[track_caller]
    pub fn start(command: &mut Command) -> Process {
        let name = format!("{command:?}");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("a descriptor of the process");
        let stdout = Capture::of(child.stdout.take().expect("it was asked for"));
        let stderr = Capture::of(child.stderr.take().expect("it was asked for"));
        let stdin = child.stdin.take();
        Process { name, child, pidfd, stdout, stderr, ended: None, stdin }
    }

    /// Runs `command` to its end, for at most [`PATIENCE`].
    #[track_caller]
    pub fn run(command: &mut Command) -> Ended {
        Process::run_for(command, PATIENCE)
    }

    /// Runs `command` to its end, for at most `bound`.
    #[track_caller]
    pub fn run_for(command: &mut Command, bound: Duration) -> Ended {
        let begin = Instant::now();
        let mut process = Process::start(command);
        let ended = process.end(bound);
        Ended { took: begin.elapsed(), ..ended }
    }

    /// Its standard input, for a test that has something to say there; dropping it is its end.
    #[track_caller]
    pub fn stdin(&mut self) -> ChildStdin {
        self.stdin.take().expect("it is taken once")
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap_or_else(|error| panic!("{}: {error}", self.name));
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.ended.is_none() && self.child.try_wait().ok().flatten().is_none()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(&mut self, bound: Duration) -> Ended {
        self.end_within(bound).unwrap_or_else(|| panic!("{} still runs after {bound:?}", self.name))
    }

    /// Waits for its end; `None` if it does not come within `bound`.
    pub fn end_within(&mut self, bound: Duration) -> Option<Ended> {
        let begin = Instant::now();
        let deadline = begin + bound;
        while self.ended.is_none() {
            let mut wait = [PollFd::new(&self.pidfd, PollFlags::IN)];
            let ready = poll(&mut wait, Some(&left(deadline)));
            if matches!(ready, Ok(count) if count > 0) {
                self.ended = Some(self.child.wait().expect("its own child"));
            } else if Instant::now() >= deadline {
                return None;
            }
        }
        let status = self.ended.unwrap_or_default();
        self.stdout.wait_closed();
        self.stderr.wait_closed();
        Some(Ended {
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout(),
            stderr: self.stderr(),
            took: begin.elapsed(),
        })
    }

    /// Its standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text().clone()
    }

    /// Its standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text().clone()
    }

    /// Waits until its standard output contains `text`.
    #[track_caller]
    pub fn wait_stdout(&self, text: &str) {
        assert!(
            self.stdout.wait_for(text),
            "{}: no {text:?} on stdout, but: {}\n{}",
            self.name,
            self.stdout(),
            self.stderr()
        );
    }

    /// Waits until its standard error contains `text`.
    #[track_caller]
    pub fn wait_stderr(&self, text: &str) {
        assert!(self.stderr.wait_for(text), "{}: no {text:?} on stderr, but: {}", self.name, self.stderr());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- {}\n--- stdout\n{}--- stderr\n{}", self.name, self.stdout(), self.stderr());
        }
    }
}

impl Ended {
    /// The exit code must be `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Ended {
        assert_eq!(self.code, Some(code), "signal {:?}\nstdout: {}\nstderr: {}", self.signal, self.stdout, self.stderr);
        self
    }

    /// The exit code must be `code`, the error on stderr must contain each of `words`, and nothing may have panicked.
    #[track_caller]
    pub fn expect_error(self, code: i32, words: &[&str]) -> Ended {
        let ended = self.expect(code);
        for word in words {
            assert!(ended.stderr.contains(word), "no {word:?} in the error: {}", ended.stderr);
        }
        ended.assert_no_panic();
        ended
    }

    /// Nothing may have panicked. (What a guest said before it trapped is in the log too, and is no panic of the host.)
    #[track_caller]
    pub fn assert_no_panic(&self) {
        let panic = self.stderr.lines().find(|line| line.starts_with("thread '") && line.contains("panicked"));
        assert!(panic.is_none(), "{}", self.stderr);
    }

    /// Its standard output as one JSON document.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}\n{}", self.stdout, self.stderr))
    }
}

/// A process whose output goes where its command says, and is not collected: for tests of what it does when nobody reads. Killed when dropped.
pub struct Unread(Child);

impl Unread {
    /// Starts `command` as it is.
    #[track_caller]
    pub fn start(command: &mut Command) -> Unread {
        Unread(command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}")))
    }

    /// Its standard output, if the command asked for a pipe and nobody has taken it yet.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.0.stdout.take()
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Waits for its end; it must come within `bound`.
    #[track_caller]
    pub fn end(&mut self, bound: Duration) -> ExitStatus {
        let begin = Instant::now();
        let pidfd = pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty()).expect("a descriptor of the process");
        loop {
            if let Some(status) = self.0.try_wait().expect("its own child") {
                return status;
            }
            assert!(begin.elapsed() < bound, "it still runs after {bound:?}");
            let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left(begin + bound)));
        }
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A pipe that is full: whoever writes to it waits for its reader.
#[track_caller]
pub fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    let flags = rustix::fs::fcntl_getfl(&writer).expect("its flags");
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).expect("set");
    // Small pieces last, so that not even one byte has room.
    for piece in [4096, 1] {
        while writer.write(&vec![b'.'; piece]).is_ok() {}
    }
    rustix::fs::fcntl_setfl(&writer, flags).expect("set");
    (reader, writer)
}

/// What comes out of a pipe, collected by a thread of its own so that the process never blocks on it.
#[derive(Clone)]
struct Capture(Arc<(Mutex<Captured>, Condvar)>);

#[derive(Default)]
struct Captured {
    text: String,
    closed: bool,
}

impl Capture {
    fn of(mut pipe: impl Read + Send + 'static) -> Capture {
        let capture = Capture(Arc::default());
        let (writer, mut piece) = (capture.clone(), [0; 4096]);
        std::thread::spawn(move || {
            loop {
                let count = pipe.read(&mut piece).unwrap_or(0);
                let mut captured = writer.lock();
                captured.text.push_str(&String::from_utf8_lossy(&piece[..count]));
                captured.closed = count == 0;
                writer.0.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        capture
    }

    fn lock(&self) -> MutexGuard<'_, Captured> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn text(&self) -> impl std::ops::Deref<Target = String> + '_ {
        Text(self.lock())
    }

    /// Whether `text` comes, before the pipe's end and within [`PATIENCE`].
    fn wait_for(&self, text: &str) -> bool {
        let waiting = |captured: &mut Captured| !captured.closed && !captured.text.contains(text);
        let result = self.0.1.wait_timeout_while(self.lock(), PATIENCE, waiting);
        result.unwrap_or_else(PoisonError::into_inner).0.text.contains(text)
    }

    /// Waits until everything has been read. A grandchild may keep the pipe open: then what came by then has to do.
    fn wait_closed(&self) {
        let result = self.0.1.wait_timeout_while(self.lock(), Duration::from_secs(1), |captured| !captured.closed);
        drop(result);
    }
}

struct Text<'a>(MutexGuard<'a, Captured>);

impl std::ops::Deref for Text<'_> {
    type Target = String;

    fn deref(&self) -> &String {
        &self.0.text
    }
}
