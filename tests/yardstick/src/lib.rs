//! The yardstick of the data paths: Cofferdam beside what people would use instead, on the same device, in the same run.
//!
//! `cargo xtask bench block`, `net` and `recovery` run it; `docs/PERFORMANCE.md` says what came of it. For block devices:
//!
//! ```text
//! backend  devices as processes: qemu-storage-daemon, and null, which answers at once
//! clients  ours in process, ours over NBD, libblkio, a bare ring, the same driver natively
//! engine   one closed loop for all of them
//! run      rounds A B C A B C on one device; stats: medians, and intervals of ratios of the same round
//! solo     the host's path by itself, on one thread
//! budget   what is not a rate: memory, loads, allocations, system calls
//! report   table, aims, JSON; plot: SVG
//! ```
//!
//! For network devices the same in `net`; what crashes and upgrades of a driver cost its clients in `recovery`.

pub mod aims;
pub mod backend;
pub mod budget;
pub mod clients;
pub mod counting;
pub mod engine;
pub mod machine;
pub mod memory;
pub mod net;
pub mod null;
pub mod plan;
pub mod plot;
pub mod recovery;
pub mod report;
pub mod run;
pub mod solo;
pub mod stats;
