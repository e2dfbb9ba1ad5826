//! A device to test drivers against, natively, and a checker of what they write.
//!
//! [`MockDevice`] plays `virtio.device` and [`MockLive`] `virtio.live-device`; [`check_chains`] and [`check_arrivals`] are independent readers of what a lane writes and
//! hold it against `wit/words.wit`.

mod arrivals;
mod chains;
mod device;
mod live;

pub use arrivals::{CheckedArrival, UsedBuffer, buffer_words, check_arrivals, control_words};
pub use chains::{CheckedChain, Outcome, Segment, check_answers, check_chains, response_words};
pub use device::MockDevice;
pub use live::MockLive;
