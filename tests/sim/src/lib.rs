//! Seeded virtio devices for tests, demonstrations and benches, from the device's side: block, net, console and entropy
//! (virtio 1.2, sections 5.1 to 5.4).
//!
//! They are one engine with two ways in: [`SimTransport`] puts a device into the same process behind
//! [`cofferdam_device::transport::Transport`], and [`Server`] (also the binaries `cofferdam-sim-blk` and `cofferdam-sim`) puts
//! it behind a vhost-user socket. Through either, it can be slow, reorder, fail, hang, lie, die and lose power, each on
//! command and each from one 64-bit seed, so that a failure is replayed with the seed it printed.
//!
//! ```text
//! SimDevice ── Machine     what all drivers' uses of one device share: faults (script), counts, records
//!  │            └─ DeviceModel   the class: what is on offer, what a chain asks for, what is done with it
//!  │                 ├─ Sim          block: medium, volatile write cache, power cuts
//!  │                 ├─ SimNet       net: a peer that injects, echoes, swallows or floods
//!  │                 ├─ SimConsole   console: ports, and what is on their other side
//!  │                 └─ SimRng       entropy
//!  └─ Session      one driver's use of the device: memory, queues, requests taken and not yet answered
//!       ├─ SimTransport   in process: a thread per queue, or stepped by hand
//!       └─ Server         behind a vhost-user socket: a worker per queue
//! ```
//!
//! Dependency law: of our own crates it knows `cofferdam-device` alone, and of that the transport and the DMA region. The
//! device-side ring in [`ring`] is written on its own, not shared with the driver-side one, because it has to be able to
//! break every rule that the other one checks.
//!
//! # Time
//! The device has no clock of its own. A *tick* is one call of [`SimDevice::step`], or about a millisecond of a queue's thread.
//!
//! # Determinism
//! Stepped by hand, or with one queue and requests published in the same batches, a seed and a list of faults give the
//! same run. With several queues each has its own generator for the order of its answers, but the faults' counters are
//! shared, so which thread meets the n-th request depends on the scheduler.

pub mod memory;
pub mod ring;
pub mod rng;
pub mod script;

mod block;
mod config;
pub mod console;
mod device;
mod edu;
mod entropy;
mod hooked;
mod kinds;
mod machine;
mod model;
pub mod net;
mod program;
mod server;
mod session;
mod signals;
mod transport;

pub use block::profile::{Profile, RangeLimits};
pub use block::store::{self, PowerCut, Storage};
pub use block::{JournalEntry, Options, Sim};
pub use config::ConfigLie;
pub use console::{ConsoleProfile, PortProfile, SimConsole};
pub use device::{Behaviour, Quiescence, SimDevice, SimError, Stats};
pub use edu::SimEdu;
pub use entropy::{EntropyProfile, SimRng};
pub use hooked::{Hooked, Hooks};
pub use kinds::{Lie, Op};
pub use model::Rings;
pub use net::{Frame, NetHeader, NetProfile, SimNet, Transmit};
pub use program::Program;
pub use script::{Effect, Rule, RuleError, When};
pub use server::{OnDeath, ServeError, Server, Stopper};
pub use transport::{Drive, SimTransport};
