//! Errors of this crate. Each says who is to blame and what can be done.

use std::time::Duration;

use cofferdam_device::error::{ArenaError, DeviceFault, TransportError};
use cofferdam_runtime::{CallError, FaultKind, GuestFault, InstantiateError, RuntimeError};

use crate::certificate::Certificate;
use crate::events::EventKind;

/// The manager itself could not be made or asked.
#[derive(Debug, thiserror::Error)]
pub enum ManagerError {
    /// The sandbox could not be set up.
    #[error("cannot set up the sandbox: {0}")]
    Runtime(#[from] RuntimeError),
    /// A thread or descriptor of the manager's own could not be made.
    #[error("cannot start the manager: {0}")]
    Io(#[from] std::io::Error),
    /// No binding has this name.
    #[error("no binding is called '{0}' (see 'cofferdam ls')")]
    NoSuchBinding(String),
}

/// A load that did not end in a serving binding. Everything it had taken was given back by the ladder.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The name is in use.
    #[error("a binding called '{0}' exists already; choose another --name or unload it first")]
    NameTaken(String),
    /// The name cannot be used.
    #[error("'{0}' is not a usable name: 1 to 64 letters, digits, '.', '_' or '-', not starting with '-' or '.'")]
    BadName(String),
    /// The component is not a driver, or asks for more than it was granted.
    #[error(transparent)]
    Module(#[from] cofferdam_runtime::LoadError),
    /// The component could not be started.
    #[error("cannot start the driver: {0}")]
    Instantiate(#[from] InstantiateError),
    /// The driver refused the device, or failed while looking at it.
    #[error("the driver could not attach to {device}: {source}")]
    Attach {
        /// The device's address.
        device: String,
        /// What the driver or its sandbox said.
        #[source]
        source: CallError,
    },
    /// Driver and device are not of one kind.
    #[error("{device}: {driver} needs {needs}")]
    Kind {
        /// The device's address.
        device: String,
        /// What the driver is.
        driver: &'static str,
        /// What it drives.
        needs: &'static str,
    },
    /// The driver hands addresses to a device that nothing keeps from other memory.
    #[error(
        "the driver gives {device} addresses (it imports cofferdam:driver/dma), and no IOMMU keeps that device to this binding's memory; use vfio where there is an IOMMU, or \
         let the driver reach all of this machine's memory with --trust-dma"
    )]
    NeedsTrust {
        /// The device's address.
        device: String,
    },
    /// The driver's plan or properties do not fit the device or the contract.
    #[error("the driver's plan for {device} cannot be carried out: {reason}")]
    Plan {
        /// The device's address.
        device: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The device failed while it was set up.
    #[error("{device}: {source}")]
    Device {
        /// The device's address.
        device: String,
        /// What the transport said.
        #[source]
        source: TransportError,
    },
    /// Its driver would not be replaced, and a device that comes back needs another instance.
    #[error(
        "a device is brought back (--reconnect) where its driver is replaced: not with --restarts never, nor for a driver that programs its device itself"
    )]
    CannotReconnect,
    /// A limit or a time of it is more than there can be.
    #[error("what the binding is to have is out of bounds: {0}")]
    Bounds(String),
    /// The host has no memory or descriptors for it.
    #[error("the host cannot provide what the binding needs: {0}")]
    Host(String),
    /// Somebody unloaded it before it had been loaded.
    #[error("the binding was unloaded while it was loading")]
    CalledOff,
    /// The manager is shutting down.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

/// A handle was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The binding is going or gone.
    #[error("the binding is closed")]
    Revoked,
    /// The binding has as many handles as it may have.
    #[error("the binding has its limit of {0} handles open")]
    TooMany(usize),
    /// The host has no descriptor for it.
    #[error("the host cannot provide what the handle needs: {0}")]
    Host(String),
    /// Nothing arrives on this lane, or another client takes it.
    #[error("nothing arrives on lane {0}, or another client takes it")]
    Taken(usize),
    /// There is no such lane.
    #[error("the binding has {lanes} lanes, there is no lane {asked}")]
    NoSuchLane {
        /// The lane that was asked for.
        asked: usize,
        /// How many there are.
        lanes: usize,
    },
}

/// The device was not told something by its control lane.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The binding is going or gone, or its driver failed.
    #[error("the binding is closed")]
    Revoked,
    /// The device is none of streams.
    #[error("the device has no ports that are opened or closed")]
    NoStreams,
    /// The device has no queue for it.
    #[error("the device takes no commands")]
    NoQueues,
    /// The driver does not do it.
    #[error("the driver refused: {0}")]
    Refused(String),
}

/// A buffer was not lent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// All of the arena is lent; try again when something was answered.
    #[error("all of the binding's buffer memory is in use")]
    Exhausted,
    /// The handle is revoked.
    #[error("the handle is revoked")]
    Revoked,
    /// Longer than the arena could ever lend.
    #[error("a buffer of {0} bytes is more than the binding can ever lend")]
    TooLarge(u32),
}

impl LeaseError {
    pub(crate) fn from_arena(error: &ArenaError, bytes: u32) -> LeaseError {
        match error {
            ArenaError::Exhausted { .. } => LeaseError::Exhausted,
            ArenaError::Retired => LeaseError::Revoked,
            _ => LeaseError::TooLarge(bytes),
        }
    }
}

/// Requests were left in the vector: those that are gone from it were admitted and will be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The binding is held for a moment; the handle's notify is signalled when it opens or closes.
    #[error("the binding is held")]
    Held,
    /// The lane has its limit of requests in flight; try again when something was answered.
    #[error("the lane is full")]
    Full,
    /// The handle is revoked, for good.
    #[error("the handle is revoked")]
    Revoked,
    /// Called from inside a call into this very driver, whose lane is taken by that call: a mistake of the caller's.
    #[error("called from inside a call into the driver")]
    Inside,
}

/// An unload that is not over.
#[derive(Debug, thiserror::Error)]
pub enum UnloadError {
    /// No binding has this name.
    #[error("no binding is called '{0}' (see 'cofferdam ls')")]
    NoSuchBinding(String),
    /// The deadline passed, or the wait was cancelled; the binding stays `draining` and a second unload goes on from here.
    #[error("still draining after {} ms: {waiting_for}", waited.as_millis())]
    StillDraining {
        /// How long this call waited.
        waited: Duration,
        /// Who holds it up, in a sentence.
        waiting_for: String,
        /// What is known so far.
        so_far: Box<Certificate>,
    },
    /// The module was loaded `--pinned`.
    #[error("'{0}' was loaded --pinned: it leaves only when the daemon stops")]
    Pinned(String),
    /// Called from inside a call into this very driver, and the host has no thread to go on with. Nothing was done.
    #[error("unload was asked for from inside a call into the driver, and no thread can be had for it: {0}")]
    NoThread(String),
    /// Called from inside a call into this very driver: the teardown goes on in a thread of its own (G8).
    #[error("unload was asked for from inside a call into the driver; it goes on in the background")]
    Deferred,
}

/// A driver that had broken down was not replaced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestartError {
    /// No binding has this name.
    #[error("no binding is called '{0}' (see 'cofferdam ls')")]
    NoSuchBinding(String),
    /// There is nothing to restart: only a binding that is `failed` can be.
    #[error("'{0}' has not failed (see 'cofferdam ls')")]
    NotFailed(String),
    /// The new instance broke down as well.
    #[error("'{binding}' failed again: {fault}")]
    FailedAgain {
        /// The binding.
        binding: String,
        /// What broke it.
        fault: String,
    },
}

/// A driver was not exchanged; the one that was there serves on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeError {
    /// No binding has this name.
    #[error("no binding is called '{0}' (see 'cofferdam ls')")]
    NoSuchBinding(String),
    /// It does not serve, or was loaded so that its driver is not replaced.
    #[error(
        "'{0}' does not serve, or its driver is not to be replaced (--restarts never, or one that programs its device itself)"
    )]
    NotServing(String),
    /// Another exchange is under way.
    #[error("another upgrade or rollback of '{0}' is under way")]
    Busy(String),
    /// The component cannot take the driver's place, or did not want to.
    #[error("the new driver cannot take over: {0}")]
    Refused(String),
    /// A call of the driver did not end in the time given.
    #[error("'{binding}' was not vacant within {deadline:?}: a call of its driver is running")]
    Deadline {
        /// The binding.
        binding: String,
        /// The time.
        deadline: Duration,
    },
    /// There is no component to go back to.
    #[error("'{0}' has had no other driver")]
    NothingBefore(String),
}

/// Why a binding leaves by itself.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum LaneFault {
    /// The driver trapped, overran or broke the layout of its words.
    #[error("driver fault: {0}")]
    Guest(GuestFault),
    /// The device broke the virtqueue's rules.
    #[error("device fault: {0}")]
    Device(DeviceFault),
}

impl LaneFault {
    /// Whether the host ended the driver, by its kill switch.
    pub(crate) fn is_interruption(&self) -> bool {
        matches!(self, LaneFault::Guest(fault) if fault.kind == FaultKind::Killed)
    }

    /// What the log of events says of it.
    pub(crate) fn to_event(&self) -> EventKind {
        let (kind, message, backtrace) = match self {
            LaneFault::Guest(fault) => (fault.kind.as_str(), fault.message.clone(), fault.backtrace.clone()),
            LaneFault::Device(fault) => ("device", fault.to_string(), Vec::new()),
        };
        EventKind::Fault { kind: kind.to_owned(), message, backtrace }
    }
}

/// A port was not detached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// No attached port has this address.
    #[error("no port '{0}' is attached (see 'cofferdam inspect NAME')")]
    NoSuchPort(String),
    /// The binding is leaving, and its ports with it.
    #[error("the binding is leaving and takes its ports down itself")]
    Leaving,
    /// The port's threads did not end within about a second. It serves nobody any more.
    #[error("the port '{0}' did not end in time and was left behind")]
    LeftBehind(String),
}

/// A handle was not revoked, or not everything of it is answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevokeError {
    /// No binding has this name.
    #[error("no binding is called '{0}' (see 'cofferdam ls')")]
    NoSuchBinding(String),
    /// The binding has no such handle, or not any more.
    #[error("'{binding}' has no handle {handle} (see 'cofferdam handles {binding}')")]
    NoSuchHandle {
        /// The binding.
        binding: String,
        /// The number.
        handle: u64,
    },
    /// The handle is revoked, but the device has not answered all of its requests in the time given.
    #[error("the handle is revoked; {} of its requests are still with the device", .0.requests_left)]
    StillDraining(crate::binding::RevokeReport),
}
