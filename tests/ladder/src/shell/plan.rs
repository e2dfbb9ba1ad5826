//! Entries from a shell, situations, and what each combination has to do.

use std::fmt;
use std::time::Duration;

/// What somebody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// `unload NAME`.
    Unload,
    /// `unload NAME --deadline 300ms`; where that is too short, `unload NAME --force` after it.
    Deadline,
    /// `unload NAME --force`.
    Force,
    /// SIGTERM to the daemon.
    Sigterm,
    /// Ctrl-C to `run`.
    CtrlC,
    /// Ctrl-C to `run`, and again.
    CtrlCTwice,
    /// The backend's process is killed.
    Killed,
    /// A guest that traps.
    Trap,
    /// A guest that overruns the deadline of a call.
    Overrun,
    /// A guest that allocates without end.
    Violation,
}

/// What it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// A client is connected and asks nothing.
    Idle,
    /// fio at depth 32, which checks what it reads.
    Fio,
    /// A client shares memory with the device and has requests in it.
    Mapped,
    /// The driver loops.
    Stuck,
    /// The driver sleeps in a host call.
    Asleep,
    /// The backend is stopped with requests on the ring.
    Hung,
    /// A client reads none of its answers.
    NeverReads,
    /// A client has sent half of a write.
    HalfWrite,
    /// The device has kept two requests to itself.
    Lying,
}

impl Entry {
    /// All, in the order of the table.
    pub const ALL: [Entry; 10] = [
        Entry::Unload,
        Entry::Deadline,
        Entry::Force,
        Entry::Sigterm,
        Entry::CtrlC,
        Entry::CtrlCTwice,
        Entry::Killed,
        Entry::Trap,
        Entry::Overrun,
        Entry::Violation,
    ];

    /// Whether it is about `run` and not about a daemon.
    #[must_use]
    pub fn is_foreground(self) -> bool {
        matches!(self, Entry::CtrlC | Entry::CtrlCTwice)
    }

    /// The command of the guest that brings it about.
    #[must_use]
    pub fn command(self) -> Option<&'static str> {
        match self {
            Entry::Trap => Some("trap"),
            Entry::Overrun => Some("loop"),
            Entry::Violation => Some("eat"),
            _ => None,
        }
    }
}

impl Situation {
    /// All, in the order of the table.
    pub const ALL: [Situation; 9] = [
        Situation::Idle,
        Situation::Fio,
        Situation::Mapped,
        Situation::Stuck,
        Situation::Asleep,
        Situation::Hung,
        Situation::NeverReads,
        Situation::HalfWrite,
        Situation::Lying,
    ];

    /// A drain cannot come to its end by itself.
    #[must_use]
    pub fn holds(self) -> bool {
        self.holds_the_guest() || matches!(self, Situation::Hung | Situation::Lying)
    }

    /// The guest is inside a call that lasts.
    #[must_use]
    pub fn holds_the_guest(self) -> bool {
        matches!(self, Situation::Stuck | Situation::Asleep)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Entry::Unload => "unload",
            Entry::Deadline => "unload --deadline 300ms",
            Entry::Force => "unload --force",
            Entry::Sigterm => "daemon SIGTERM",
            Entry::CtrlC => "run Ctrl-C",
            Entry::CtrlCTwice => "run Ctrl-C Ctrl-C",
            Entry::Killed => "backend killed",
            Entry::Trap => "trap",
            Entry::Overrun => "call deadline",
            Entry::Violation => "memory bound",
        })
    }
}

impl fmt::Display for Situation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Situation::Idle => "idle",
            Situation::Fio => "fio-depth-32",
            Situation::Mapped => "mapped-buffers",
            Situation::Stuck => "driver-loops",
            Situation::Asleep => "driver-sleeps",
            Situation::Hung => "backend-stopped",
            Situation::NeverReads => "nbd-never-reads",
            Situation::HalfWrite => "nbd-half-a-write",
            Situation::Lying => "device-lies",
        })
    }
}

/// What a cell has to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// The certificate's `outcome`.
    pub outcome: &'static str,
    /// `unload` ends with exit code 4 first.
    pub drains_first: bool,
    /// Memory is retired; it is known in every cell from a shell.
    pub retired: bool,
    /// From the entry to the certificate or the end of the process.
    pub bound: Duration,
}

/// A forced drain, an interruption, a quiesce, the ports; see `crate::plan`. Then the machine: two cores, and as many cells at once as `tests/shell.rs` says, each
/// with a daemon, a device or two and clients.
const REST: Duration = Duration::from_millis(100 + 500 + 1000 + 100 + 3000);
/// What a binding that leaves by itself, and `run`, give a drain.
const DRAIN: Duration = Duration::from_secs(5);
/// A daemon ends in this time, whatever its bindings do.
const DAEMON: Duration = Duration::from_secs(5);

/// What has to happen when `entry` meets `situation`, or why the two do not meet.
///
/// # Errors
/// The reason.
pub fn plan(entry: Entry, situation: Situation) -> Result<Plan, &'static str> {
    match (entry, situation) {
        (Entry::Unload, situation) if situation.holds() => {
            return Err("the same as with --deadline, which does not take the default's five seconds");
        }
        (Entry::CtrlCTwice, situation) if !situation.holds() => {
            return Err("it is over before there can be a second one");
        }
        (entry, Situation::Asleep) if entry.is_foreground() => {
            return Err("`run` has nobody to ask whether the guest sleeps; the daemon's cells show it");
        }
        (Entry::Overrun, situation) if situation.holds_the_guest() => {
            return Err("the call that holds the guest would be the overrun; the matrix in process shows it");
        }
        _ => {}
    }
    let outcome = match entry {
        Entry::Unload | Entry::Deadline | Entry::CtrlC if !situation.holds() => "unloaded",
        Entry::Unload | Entry::Deadline | Entry::CtrlC | Entry::CtrlCTwice | Entry::Force => "forced",
        Entry::Sigterm => "shutdown",
        Entry::Killed => "removed",
        Entry::Trap | Entry::Overrun | Entry::Violation => "failed",
    };
    let bound = match entry {
        Entry::Sigterm => DAEMON,
        Entry::CtrlC | Entry::Trap | Entry::Overrun | Entry::Violation if situation.holds() => DRAIN + REST,
        _ => REST,
    };
    let retired = entry != Entry::Killed && matches!(situation, Situation::Hung | Situation::Lying);
    Ok(Plan { outcome, drains_first: entry == Entry::Deadline && situation.holds(), retired, bound })
}
