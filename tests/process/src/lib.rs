//! What tests of whole processes need: the programs under test, guards for the processes they start, a daemon with its commands, devices
//! real and fake, and a small NBD client. See the README of this directory.
//!
//! Everything here panics with a message when it cannot do what it says: its only users are tests.

#![allow(clippy::missing_panics_doc, reason = "every function here is an assertion of a test")]

pub mod backend;
pub mod census;
pub mod certificate;
pub mod challenger;
pub mod fake;
pub mod faulty;
pub mod host;
pub mod nbd;
pub mod process;
pub mod programs;
pub mod wait;
