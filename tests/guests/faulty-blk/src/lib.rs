//! The virtio block driver, breaking down now and then: at random points of its work and at random times, as its orders say.
//!
//! | module | about |
//! | --- | --- |
//! | `orders` | how often, where and how it breaks down; written into a component before it is loaded |
//! | `faults` | when it is time |
//! | `driver` | the driver around `cofferdam-virtio-blk` with a hook at every point |
//! | `clock` | the time, of `wasi:clocks`: a load needs `--allow wasi:clocks` |
//!
//! Its faults are of the moment and not of a request: every instance works for a while before its first, so that no request meets two in a row (what breaks down two drivers
//! in a row is failed, and `guest-hostile` is there to show that).

#[cfg(target_family = "wasm")]
mod clock;
mod driver;
mod faults;
mod orders;

pub use driver::{Faulty, FaultyLane};
pub use orders::{Kind, Orders, Point};

#[cfg(not(target_family = "wasm"))]
mod clock {
    /// Natively it is never run; the time is that of the tests.
    pub(crate) fn unix_ns() -> u64 {
        0
    }
}

cofferdam_sdk::export_block_driver!(Faulty, devices: [cofferdam_sdk::DeviceId::virtio(2)]);
