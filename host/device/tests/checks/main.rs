//! Property tests of everything in this crate that meets a hostile side. Each holds the code against an oracle that is written another way.

mod arena;
mod chain;
mod device;
mod event_index;
mod lies;
mod queue;
mod region;
mod scattered;
mod standing;
mod transfer;
