//! A vhost-user-blk device that answers at once and touches no payload, so that a bench sees the front end and nothing else.
//!
//! ```text
//! socket -> protocol: memory, rings, events -> worker (one thread for all rings) -> ring: descriptors in, status and used element out
//! ```
//!
//! One front end after another. The worker either polls and never asks to be kicked ([`Pace::Poll`]), or sleeps as soon as its rings are empty and is kicked only then
//! ([`Pace::Event`]); it calls exactly when the driver asked for it (virtio 1.2, section 2.7.7.1). Whatever changes a ring or the memory ends the worker first and
//! starts it again afterwards, so the worker owns what it works with.

mod protocol;
mod regions;
mod ring;
mod worker;

pub use protocol::serve;
pub use worker::Pace;

/// What the device claims to be.
#[derive(Clone, Copy, Debug)]
pub struct NullDisk {
    /// Size of the medium.
    pub capacity_bytes: u64,
    /// Queues, 1 to 64.
    pub queues: u16,
    /// How it waits.
    pub pace: Pace,
}
