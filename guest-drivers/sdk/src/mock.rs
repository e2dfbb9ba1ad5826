//! A device to test drivers against, natively, and a checker of what they write.
//!
//! [`MockDevice`] plays `virtio.device`; [`check_chains`] is an independent reader of chain words that holds them against `wit/block.wit`.

mod chains;
mod device;

pub use chains::{CheckedChain, Outcome, Segment, check_answers, check_chains, response_words};
pub use device::MockDevice;
