//! The transport against a simulated function.

mod adopt;
mod layout;
mod life;
mod removal;
mod silence;
mod vectors;
