//! What it costs the clients of a block device that its driver breaks down now and then, or is exchanged for another one: `cargo xtask bench recovery`.
//!
//! ```text
//! plan     how often, how long
//! client   a closed loop over NBD that notes when nothing was answered
//! crashes  a driver that breaks down by itself, in every other second (tests/guests/faulty-blk)
//! upgrades one component for the other, ten times a second
//! noise    how late this machine lets a thread run that does nothing else
//! report   table, aims, JSON
//! ```
//!
//! A *pause* is what the client sees: the time between two answers in which a driver broke down or was exchanged. *Loss* is the sum of pauses over the time of the seconds with crashes. The
//! throughput of those seconds against the quiet ones between them is given beside it: it has everything in it, and the noise of the machine too.

pub mod client;
pub mod crashes;
pub mod noise;
pub mod plan;
pub mod report;
pub mod upgrades;
