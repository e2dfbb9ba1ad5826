//! `cofferdam` and its commands.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::census::Census;
use crate::certificate::Certificate;
use crate::process::{Ended, Process, Signal};
use crate::programs;
use crate::wait::{PATIENCE, until, until_true};

/// `cofferdam` with these arguments, in an environment that no other configuration reaches.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(programs::cofferdam());
    command.args(arguments).env("XDG_CACHE_HOME", programs::cache());
    command.env_remove("COFFERDAM_SOCKET").env_remove("COFFERDAM_LOG").env_remove("XDG_RUNTIME_DIR");
    command.env_remove("COFFERDAM_DRIVERS");
    command
}

/// Where a daemon on `socket` writes crashes down: beside it, so that it goes when the test does.
fn state_of(socket: &Path) -> PathBuf {
    socket.with_file_name("state")
}

/// A path as an argument.
#[track_caller]
pub fn text(path: &Path) -> String {
    path.to_str().unwrap_or_else(|| panic!("{} is not UTF-8", path.display())).to_owned()
}

/// A daemon with a directory of its own. Killed when dropped.
pub struct Daemon {
    /// The daemon's process.
    pub process: Process,
    folder: TempDir,
}

impl Daemon {
    /// Starts one and waits until it serves.
    #[track_caller]
    pub fn start() -> Daemon {
        Daemon::start_at(tempfile::tempdir().expect("a directory"))
    }

    /// Starts one whose directory this is and waits until it serves.
    #[track_caller]
    pub fn start_at(folder: TempDir) -> Daemon {
        Daemon { process: Daemon::start_on(&folder.path().join("control.sock")), folder }
    }

    /// Starts one with these variables in its environment and waits until it serves.
    #[track_caller]
    pub fn start_in(environment: &[(&str, &str)]) -> Daemon {
        let folder = tempfile::tempdir().expect("a directory");
        Daemon { process: Daemon::start_with(&folder.path().join("control.sock"), environment), folder }
    }

    /// Starts one on `socket` and waits until it serves.
    #[track_caller]
    pub fn start_on(socket: &Path) -> Process {
        Daemon::start_with(socket, &[])
    }

    /// The same with these variables in its environment.
    #[track_caller]
    pub fn start_with(socket: &Path, environment: &[(&str, &str)]) -> Process {
        let mut command = command(&["daemon", "--socket", &text(socket)]);
        command.env("XDG_STATE_HOME", state_of(socket));
        let process = Process::start(command.envs(environment.iter().copied()));
        process.wait_stdout("cofferdam daemon on");
        process
    }

    /// Kills the daemon as a crash would, and starts another in its place.
    #[track_caller]
    pub fn crash_and_restart(&mut self) {
        self.process.signal(Signal::KILL);
        assert_eq!(self.process.end(PATIENCE).signal, Some(Signal::KILL.as_raw()));
        self.process = Daemon::start_on(&self.socket());
    }

    /// Starts another daemon that is to take over from this one.
    #[track_caller]
    pub fn challenge(&self, more: &[&str]) -> Process {
        let socket = text(&self.socket());
        let mut command = command(&[&["daemon", "--takeover", "--socket", &socket], more].concat());
        Process::start(command.env("XDG_STATE_HOME", state_of(&self.socket())))
    }

    /// Has another daemon take over from this one, which then ends; what that one said of it.
    #[track_caller]
    pub fn take_over(&mut self) -> String {
        // Longer than a busy disk takes for a flush.
        self.followed_by(self.challenge(&["--deadline", "10s"]))
    }

    /// The same, of one that was started for it.
    #[track_caller]
    pub fn followed_by(&mut self, next: Process) -> String {
        next.wait_stdout("cofferdam daemon on");
        let mut old = std::mem::replace(&mut self.process, next);
        let ended = old.end(PATIENCE).expect(0);
        ended.assert_no_panic();
        assert!(ended.stderr.contains("a new daemon has taken over; this one ends"), "{}", ended.stderr);
        let said = self.process.stdout();
        let line = said.lines().find(|line| line.starts_with("took over"));
        line.unwrap_or_else(|| panic!("{said}")).to_owned()
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("control.sock")
    }

    /// A path in the daemon's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = command(arguments);
        command.env("COFFERDAM_SOCKET", self.socket());
        command
    }

    /// Runs one command to its end.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ended {
        Process::run(&mut self.command(arguments))
    }

    /// Loads a driver on a device as binding `name`.
    #[track_caller]
    pub fn load(&self, driver: &Path, device: &str, name: &str, more: &[&str]) -> Ended {
        let driver = text(driver);
        self.run(&[&["load", &driver, "--device", device, "--name", name], more].concat())
    }

    /// Loads the good driver, with a port in the daemon's directory whose path is the answer.
    #[track_caller]
    pub fn serve(&self, device: &str, name: &str, more: &[&str]) -> PathBuf {
        let socket = self.path(&format!("{name}.nbd"));
        let port = format!("nbd:{}", socket.display());
        self.load(&programs::driver(), device, name, &[&["--port", &port], more].concat()).expect(0);
        socket
    }

    /// `unload NAME --json` that must succeed.
    #[track_caller]
    pub fn unload(&self, name: &str, more: &[&str]) -> Certificate {
        Certificate::parse(self.run(&[&["unload", name, "--json"], more].concat()).expect(0).json())
    }

    /// `ls --json`, also of bindings that have left retired memory behind.
    #[track_caller]
    pub fn listed(&self) -> Vec<Value> {
        let document = self.run(&["ls", "--json"]).expect(0).json();
        document.as_array().unwrap_or_else(|| panic!("{document}")).clone()
    }

    /// The bindings that have not left.
    #[track_caller]
    pub fn bindings(&self) -> Vec<Value> {
        self.listed().into_iter().filter(|binding| binding["state"] != "detached").collect()
    }

    /// What `ls` says of one binding.
    #[track_caller]
    pub fn binding(&self, name: &str) -> Option<Value> {
        self.bindings().into_iter().find(|binding| binding["name"] == name)
    }

    /// Waits until `ls` lists no binding called `name`.
    #[track_caller]
    pub fn wait_gone(&self, name: &str) {
        until_true(&format!("'{name}' is gone"), || self.binding(name).is_none());
    }

    /// Waits until the binding has this many requests in flight.
    #[track_caller]
    pub fn wait_in_flight(&self, name: &str, requests: u64) {
        until_true(&format!("{requests} requests of '{name}' are in flight"), || {
            self.binding(name).is_some_and(|binding| binding["requests_in_flight"] == requests)
        });
    }

    /// Waits until a binding that serves has no client, nothing in flight and nothing lent.
    #[track_caller]
    pub fn wait_idle(&self, name: &str) {
        until_true(&format!("'{name}' is idle"), || {
            self.binding(name).is_some_and(|binding| {
                let idle = binding["handles"].as_array().is_some_and(Vec::is_empty);
                idle && binding["leased_bytes"] == 0 && binding["requests_in_flight"] == 0
            })
        });
    }

    /// Waits for a line of the daemon's log that contains all of `words`. The log is written by a thread of its own: it may be a moment behind what has happened.
    #[track_caller]
    pub fn logged(&self, words: &[&str]) -> String {
        until(&format!("a line of the log with {words:?}"), || {
            let log = self.process.stderr();
            let whole = log.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            let mut fitting = whole.filter(|line| words.iter().all(|word| line.contains(word)));
            fitting.next().map(str::to_owned)
        })
    }

    /// What the daemon holds. Threads that it has just started may not have their names yet: let them do something first.
    pub fn census(&self) -> Census {
        Census::of(self.process.pid())
    }

    /// Waits until the daemon holds no more than `before`: clients that have just gone and idle helper threads may take a moment.
    #[track_caller]
    pub fn wait_census(&self, before: &Census) {
        let mut last = before.clone();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until_true("the daemon holds what it held before", || {
                last = self.census();
                last.fits_in(before)
            });
        }));
        assert!(result.is_ok(), "the daemon holds more than before\nbefore: {before}\n   now: {last}");
    }

    /// Ends the daemon with SIGTERM; it must end well within `bound` and never have panicked.
    #[track_caller]
    pub fn stop(mut self, bound: Duration) -> Ended {
        self.process.signal(Signal::TERM);
        let ended = self.process.end(bound).expect(0);
        ended.assert_no_panic();
        ended
    }
}
