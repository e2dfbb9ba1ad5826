//! The classes beside block, each through both ways in.

mod console;
mod entropy;
mod net;
mod rig;
mod socket;
mod speed;
