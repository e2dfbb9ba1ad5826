//! Entries, situations, and what each combination has to do: how it ends, what may be retired, and within which time.

use std::fmt;
use std::time::Duration;

use cofferdam_manager::Outcome;

/// How a binding comes to the ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// `unload` with a deadline of [`POLITE`]; where that is too short, a forced one after it (L2).
    Unload,
    /// `unload --force`.
    Force,
    /// `revoke` of the client's handle; the binding stays.
    Revoke,
    /// The backend's process is killed: surprise removal.
    Killed,
    /// The backend's socket hangs up while its process lives.
    Disconnects,
    /// The guest traps in `submit`.
    Trap,
    /// The guest traps in `complete`, with requests on the ring.
    TrapInComplete,
    /// The guest overruns the deadline of a call.
    Overrun,
    /// The guest allocates without end.
    Violation,
    /// The guest's words break the layout.
    Layout,
    /// The device breaks the rules of the ring.
    DeviceLies,
    /// The manager shuts down.
    Shutdown,
}

/// What the entry meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Situation {
    /// A handle is open and nothing is in flight.
    Idle,
    /// A client keeps 32 requests in flight and checks what it reads.
    Depth32,
    /// The driver is in an endless loop, with a call deadline of a minute.
    Stuck,
    /// The driver sleeps in a host call for an hour, with a call deadline of a minute.
    Asleep,
    /// The backend is stopped with requests on the ring.
    Hung,
    /// A client in this process has stopped polling with answers pending.
    Unpolled,
    /// An NBD client has asked for more than its socket holds and reads nothing.
    NeverReads,
    /// An NBD client has sent half of a write.
    HalfWrite,
    /// A client uses buffers that it has mapped.
    Mapped,
    /// The device lies: it has kept two requests to itself, makes status bytes up, and notifies for nothing.
    Lying,
}

impl Entry {
    /// All, in the order of the table.
    pub const ALL: [Entry; 12] = [
        Entry::Unload,
        Entry::Force,
        Entry::Revoke,
        Entry::Killed,
        Entry::Disconnects,
        Entry::Trap,
        Entry::TrapInComplete,
        Entry::Overrun,
        Entry::Violation,
        Entry::Layout,
        Entry::DeviceLies,
        Entry::Shutdown,
    ];

    /// For the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Entry::Unload => "unload",
            Entry::Force => "unload-force",
            Entry::Revoke => "revoke",
            Entry::Killed => "backend-killed",
            Entry::Disconnects => "backend-disconnects",
            Entry::Trap => "trap",
            Entry::TrapInComplete => "trap-in-complete",
            Entry::Overrun => "call-deadline",
            Entry::Violation => "memory-bound",
            Entry::Layout => "driver-breaks-layout",
            Entry::DeviceLies => "device-breaks-ring",
            Entry::Shutdown => "shutdown",
        }
    }
}

impl Situation {
    /// All, in the order of the table.
    pub const ALL: [Situation; 10] = [
        Situation::Idle,
        Situation::Depth32,
        Situation::Stuck,
        Situation::Asleep,
        Situation::Hung,
        Situation::Unpolled,
        Situation::NeverReads,
        Situation::HalfWrite,
        Situation::Mapped,
        Situation::Lying,
    ];

    /// For the table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Situation::Idle => "idle",
            Situation::Depth32 => "depth-32",
            Situation::Stuck => "driver-loops",
            Situation::Asleep => "driver-sleeps",
            Situation::Hung => "backend-hangs",
            Situation::Unpolled => "client-stopped-polling",
            Situation::NeverReads => "nbd-never-reads",
            Situation::HalfWrite => "nbd-half-a-write",
            Situation::Mapped => "mapped-buffers",
            Situation::Lying => "device-lies",
        }
    }

    /// The guest is inside a call that ends by no deadline of this test.
    #[must_use]
    pub fn holds_the_guest(self) -> bool {
        matches!(self, Situation::Stuck | Situation::Asleep)
    }

    /// Something is on the ring that the device will not answer.
    #[must_use]
    pub fn holds_requests(self) -> bool {
        matches!(self, Situation::Hung | Situation::Lying)
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Situation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether memory is retired (L1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retired {
    /// The device is silent: nothing is.
    Nothing,
    /// It may still act: all that it can reach is.
    Memory,
    /// It depends on what the device had answered at that moment.
    Either,
}

/// What a cell has to do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What the certificate says.
    pub outcome: Outcome,
    /// The polite unload, or the revocation, is answered "still draining" first.
    pub drains_first: bool,
    /// What is retired.
    pub retired: Retired,
    /// From the entry to the certificate (of `revoke`: to its report).
    pub bound: Duration,
}

/// The deadline of a polite unload and of a revocation.
pub const POLITE: Duration = Duration::from_millis(400);
/// The bound given to a shutdown.
pub const SHUTDOWN: Duration = Duration::from_secs(3);
/// The deadline of a guest call where a guest is not to be held inside for long.
pub const CALL: Duration = Duration::from_millis(100);

/// The bounds of the ladder's own steps: a forced drain, an interruption, a quiesce, the ports.
const FORCED_DRAIN: Duration = Duration::from_millis(100);
const INTERRUPT: Duration = Duration::from_millis(500);
const QUIESCE: Duration = Duration::from_millis(1000);
const PORTS: Duration = Duration::from_millis(100);
/// How long a binding that leaves by itself waits for a device and for calls that may still end well.
const SELF_DRAIN: Duration = Duration::from_secs(5);
/// What the machine may add: two cores, with four cells at a time and guests that loop on purpose.
const MACHINE: Duration = Duration::from_millis(1500);

/// What has to happen when `entry` meets `situation`, or why the two do not meet.
///
/// # Errors
/// The reason.
pub fn plan(entry: Entry, situation: Situation) -> Result<Plan, &'static str> {
    match (entry, situation) {
        (Entry::DeviceLies, Situation::Hung) => return Err("a device that is stopped says nothing"),
        (Entry::TrapInComplete, Situation::Hung) => {
            return Err("nothing is completed, so nothing is called; 'trap' is the same from there on");
        }
        (Entry::TrapInComplete, Situation::Asleep) => {
            return Err("the sleeping guest has no such command; 'driver-loops' shows the same");
        }
        _ => {}
    }
    let stuck = situation.holds_the_guest();
    let held = situation.holds_requests();
    let by_itself = !matches!(entry, Entry::Unload | Entry::Force | Entry::Revoke | Entry::Shutdown);
    // A guest that overruns its deadline in the situation is the entry itself: it lets go.
    let stuck = stuck && entry != Entry::Overrun;

    let outcome = match entry {
        Entry::Unload if stuck || held => Outcome::Forced,
        Entry::Unload => Outcome::Unloaded,
        // A revocation is not an end: the binding is taken down by force after it.
        Entry::Force | Entry::Revoke => Outcome::Forced,
        Entry::Killed | Entry::Disconnects => Outcome::Removed,
        Entry::Shutdown => Outcome::Shutdown,
        _ => Outcome::Failed,
    };
    let retired = match (entry, situation) {
        // A process that is gone is silent.
        (Entry::Killed, _) => Retired::Nothing,
        (_, Situation::Hung | Situation::Lying) => Retired::Memory,
        // The request that the lie was told about is never answered, and the process lives.
        (Entry::DeviceLies, _) => Retired::Memory,
        // Idle, or half a write: nothing is on the ring. Of a client's requests the device may have answered all.
        (Entry::Disconnects, Situation::Depth32 | Situation::Unpolled | Situation::NeverReads | Situation::Mapped) => {
            Retired::Either
        }
        _ => Retired::Nothing,
    };
    let interrupt = if stuck { INTERRUPT } else { Duration::ZERO };
    let quiesce = if retired == Retired::Nothing { Duration::ZERO } else { QUIESCE };
    let end = interrupt + quiesce + PORTS + MACHINE;
    let drain = match entry {
        Entry::Unload if stuck || held => POLITE + FORCED_DRAIN,
        Entry::Unload => POLITE,
        Entry::Force => FORCED_DRAIN,
        Entry::Revoke => return Ok(Plan { outcome, drains_first: stuck || held, retired, bound: POLITE + MACHINE }),
        Entry::Shutdown => return Ok(Plan { outcome, drains_first: false, retired, bound: SHUTDOWN + MACHINE }),
        // Nothing more can come of a device that is gone or that broke its ring.
        Entry::Killed | Entry::Disconnects | Entry::DeviceLies => Duration::ZERO,
        _ if by_itself && (stuck || held) => SELF_DRAIN,
        _ => Duration::ZERO,
    };
    let call = if entry == Entry::Overrun { CALL } else { Duration::ZERO };
    let drains_first = entry == Entry::Unload && (stuck || held);
    Ok(Plan { outcome, drains_first, retired, bound: call + drain + end })
}
