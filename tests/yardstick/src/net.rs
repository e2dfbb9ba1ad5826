//! The net data path beside DPDK's, on the same device, in the same run: `cargo xtask bench net`.
//!
//! ```text
//! testpmd  DPDK's own program, as the device (net_vhost) and as a client (net_virtio_user), and its counters
//! job      what is moved, and the loop that moves it
//! clients  ours in process, a bare ring, DPDK's
//! plan     which jobs; run: rounds, as of the block bench
//! report   table, aims, JSON
//! solo     the host's path by itself, on one thread
//! ```

pub mod bare;
pub mod clients;
pub mod cofferdam;
pub mod job;
pub mod plan;
pub mod report;
pub mod run;
pub mod solo;
pub mod testpmd;
