//! The sandbox: drivers as WebAssembly components, one instance per lane.
//!
//! The only crate that imports wasmtime. Its dependency law: it may import `cofferdam-gate` and `cofferdam-device`; only `cofferdam-manager`
//! imports it. Nothing of wasmtime shows in its public items, so that the engine can be exchanged behind it.
//!
//! ```text
//! Runtime ── load(bytes) ──> Module ── instantiate(spec) ──> Instance ── attach, start, submit, complete ──> guest
//!    │ engine, ticker thread,    │ checked world, digest,        │ one store: limits, deadline, kill switch,
//!    │ compiled-code cache       │ what it imports               │ capabilities; dead after its first fault
//! ```
//!
//! What holds here, and where:
//!
//! | claim | file |
//! | --- | --- |
//! | A component that is not a driver of this version, or asks for what it was not granted, is never instantiated. | `world`, `grants` |
//! | Every guest call is a crossing of the binding's gate (G9 is the caller's: it never calls a lane it killed). | `instance` |
//! | Every guest call ends: at its deadline, at its kill switch, or by itself. | `watch`, `pulse` |
//! | A guest's memory, tables and instances are bounded; going over is the guest's fault, not the host's. | `limits` |
//! | What a guest returns is bounded before the host allocates for it, and checked before it leaves the crate. | `instance`, `service` |
//! | An instance that faulted is never entered again (L5). | `instance` |
//! | What an instance is doing can be read at any time, without waiting for it, and never as a mixture of two calls. | `activity`, `view` |
//! | A device table is bounded and checked; it decides which driver is tried, and nothing else. | `devices` |
//! | Machine code is read back only from files that this user alone could have written. | `cache`, `cache_dir` |

mod activity;
mod bindings;
mod cache;
mod cache_dir;
mod capability;
mod devices;
mod error;
mod fault;
mod grants;
mod guest;
mod instance;
mod kill;
mod lifted;
mod limits;
mod module;
mod pulse;
mod runtime;
mod service;
mod state;
mod text;
mod view;
mod watch;
mod world;

pub use capability::device::{DeviceCapability, DeviceError};
pub use capability::live::LiveCapability;
pub use devices::{DeviceId, Wanted, device_table};
pub use error::{InstantiateError, LoadError, RuntimeError};
pub use fault::{CallError, DriverError, FaultKind, GuestFault};
pub use grants::{DirGrant, GrantError, Grants};
pub use instance::{Instance, InstanceSpec, LaneId};
pub use kill::KillSwitch;
pub use limits::GuestLimits;
pub use module::{Linked, Module, ModuleInfo};
pub use runtime::{Runtime, RuntimeConfig};
pub use service::{
    Attachment, BlockProperties, EntropyProperties, ExportedState, LaneDriver, LaneSetup, MAX_ANSWER_WORDS,
    MAX_BATCH_REQUESTS, MAX_CHAIN_WORDS, MAX_STATE_BYTES, NetProperties, Offloads, Posting, Properties, QueueOwner,
    QueuePlan, StreamPort, StreamProperties,
};
pub use text::clean;
pub use view::{CallView, RunningCall, Whereabouts};
pub use world::{ImportInfo, ImportKind, Service};
