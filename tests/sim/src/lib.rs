//! A seeded virtio-blk device for tests, demonstrations and benches: virtio 1.2, section 5.2, from the device's side.
//!
//! It is one engine with two ways in: [`SimTransport`] puts it into the same process behind
//! [`cofferdam_device::transport::Transport`], and [`Server`] (also the binary `cofferdam-sim-blk`) puts it behind a
//! vhost-user socket. Through either, it can be slow, reorder, fail, hang, lie, die and lose power, each on command and
//! each from one 64-bit seed, so that a failure is replayed with the seed it printed.
//!
//! ```text
//! Sim ── profile   what the device offers: features, configuration space, limits
//!  │  ├─ store     the medium, its volatile write cache, power cuts
//!  │  └─ script    faults as data: which request meets which effect
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
//! The device has no clock of its own. A *tick* is one call of [`Sim::step`], or about a millisecond of a queue's thread.
//!
//! # Determinism
//! Stepped by hand, or with one queue and requests published in the same batches, a seed and a list of faults give the
//! same run. With several queues each has its own generator for the order of its answers, but the faults' counters are
//! shared, so which thread meets the n-th request depends on the scheduler.

pub mod memory;
pub mod profile;
pub mod ring;
pub mod rng;
pub mod script;
pub mod store;

mod edu;
mod request;
mod server;
mod session;
mod sim;
mod transport;

pub use edu::SimEdu;
pub use profile::{ConfigLie, Profile, RangeLimits};
pub use request::Op;
pub use script::{Effect, Lie, Rule, RuleError, When};
pub use server::{OnDeath, ServeError, Server, Stopper};
pub use sim::{JournalEntry, Options, Quiescence, Sim, SimError, Stats};
pub use store::{PowerCut, Storage};
pub use transport::{Drive, SimTransport};
