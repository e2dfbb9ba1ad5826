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
pub mod solo;
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

/// Virtio block features (virtio 1.2, section 5.2.3).
const SEG_MAX: u64 = 1 << 2;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;
/// Ring and transport features (section 6).
const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Segments of one request that the device takes.
const SEGMENTS: u32 = 126;

impl NullDisk {
    /// What it offers.
    pub const FEATURES: u64 = SEG_MAX | BLK_SIZE | FLUSH | MQ | INDIRECT_DESC | EVENT_IDX | VERSION_1;

    /// `struct virtio_blk_config` (section 5.2.4).
    #[must_use]
    pub fn config(&self) -> [u8; 64] {
        let mut config = [0; 64];
        config[..8].copy_from_slice(&(self.capacity_bytes / 512).to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        config[20..24].copy_from_slice(&512u32.to_le_bytes());
        config[34..36].copy_from_slice(&self.queues.to_le_bytes());
        config
    }
}
