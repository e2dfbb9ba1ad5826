//! Bindings of drivers and devices, and every sequence that changes one.
//!
//! ```text
//! registry   names -> bindings, read without a lock (arc-swap snapshots)
//! binding    one driver joined to one device: gate, lanes, arena, ports
//! load       claim, negotiate, start; a failure half-way leaves by the ladder
//! ladder     the one way out: carries out what `cofferdam-lifecycle` says comes next (DESIGN section 7)
//! lane       one driver instance and its queues: submit, reap (DESIGN section 5)
//! ledger     what was admitted and is not answered yet
//! board      the ledger's essentials, readable while a driver is stuck
//! explain    who holds what: the answer of `why`
//! handle     a client's revocable right to operate
//! maker      makes instances of a driver
//! recovery   what becomes of a binding whose driver breaks down
//! reconnect  a device that is lost and comes back
//! upgrade    another component in the place of a driver that serves
//! handover   bindings in the hands of another process
//! crash      what is kept of a driver that broke down
//! offer      what a binding gives: its service, and what the device can do of it now
//! request    what a client asks, and what it is answered
//! arrival    what came by itself: packets, bytes of a stream
//! control    the control lane while the device runs: configuration changes and queues of its own
//! queues     from a driver's plan to rings
//! mapped     memory that a client maps for itself, and how it is taken away again
//! departed   how bindings that are gone have ended
//! device     the capability a driver sees during attach, over a bus's transport
//! ports      what makes the service reachable, attached and detached on their own
//! threads    the threads of a port, waited for with a bound
//! events     what happened, in order
//! residue    looks up what a binding left behind, for the certificate
//! watch      the thread that notices lost devices and faulty drivers
//! ```
//!
//! This crate may import `cofferdam-runtime`, `cofferdam-lifecycle`, `cofferdam-gate` and `cofferdam-device`, and nothing else of the project: it knows no bus and no port.
//! A port is given a [`Binding`] and implements [`Port`]; a bus gives a [`Transport`].

mod arrival;
mod binding;
mod block;
mod board;
mod certificate;
mod control;
mod crash;
mod departed;
mod device;
mod error;
mod events;
mod explain;
mod function;
mod handle;
mod handover;
mod ladder;
mod lane;
mod ledger;
mod load;
mod maker;
mod manager;
mod mapped;
mod offer;
mod parking;
mod ports;
mod queues;
mod reconnect;
mod recovery;
mod registry;
mod request;
mod residue;
mod status;
mod threads;
mod upgrade;
mod watch;

pub use arrival::{Arrival, Arrivals};
pub use binding::{Binding, RevokeReport};
pub use block::BlockGeometry;
pub use certificate::{Certificate, Leaked, Outcome, Residual, Stage, StageTime};
pub use crash::{CrashCall, CrashReport};
pub use error::{
    ControlError, LeaseError, LoadError, ManagerError, OpenError, PortError, RestartError, RevokeError, SubmitError,
    UnloadError, UpgradeError,
};
pub use events::{EventKind, EventReader, EventRecord};
pub use explain::{CallStatus, Explanation, FaultStatus, RequestStatus};
pub use handle::{Handle, HandleSpec, HandleState, Patience};
pub use handover::{Adopted, BindingManifest, ExportedBinding, HandOver, HandOverError, Manifests, Prepared};
pub use ladder::{Cause, UnloadOptions};
pub use load::LoadSpec;
pub use manager::{Config, Manager};
pub use mapped::{MapError, Mapped, MappedUse};
pub use offer::Offer;
pub use parking::Parking;
pub use ports::{Port, PortReport};
pub use reconnect::{Open, Reconnect};
pub use recovery::{MAX_RESTARTS, RestartPolicy};
pub use request::{Completion, IoError, IoFlags, IoOp, IoRequest};
pub use status::{BindingStatus, CoreCalls, HandleStatus};
pub use threads::{PortThreads, ThreadsEnded};
pub use upgrade::{UpgradeReport, UpgradeSpec};

pub use cofferdam_device::transfer;
pub use cofferdam_device::transport::Transport;
pub use cofferdam_device::{Buffer, Exported, NotExportable, RegionError};
pub use cofferdam_gate::{Cancel, MECHANISM_VARIABLE, Mechanism, Notify, mechanism, mechanism_reason};
pub use cofferdam_lifecycle::Phase;
pub use cofferdam_runtime::{
    DeviceId, EntropyProperties, Grants, GuestLimits, ImportInfo, ImportKind, ModuleInfo, NetProperties, Offloads,
    StreamPort, StreamProperties, Wanted, device_table,
};

/// What a driver that is part of the program is written against: for the yardstick alone.
#[doc(hidden)]
pub mod native {
    pub use crate::load::NativeDriver;
    pub use cofferdam_runtime::{
        Attachment, BlockProperties, CallError, DeviceCapability, DeviceError, DriverError, LaneDriver, LaneSetup,
        QueueOwner, QueuePlan,
    };
}
