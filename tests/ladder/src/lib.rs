//! Every entry to the ladder in every situation (DESIGN section 7). See the README of this directory.
//!
//! Everything here panics or fails with a message when it cannot do what it says: its only users are tests.

#![allow(clippy::missing_panics_doc, reason = "every function here is an assertion of a test")]
#![allow(clippy::missing_errors_doc, reason = "an error is the failure of a test, in a sentence")]

pub mod cell;
pub mod client;
pub mod growth;
pub mod loads;
pub mod neighbour;
pub mod plan;
pub mod scene;
pub mod shell;
pub mod sleeper;
pub mod stage;
pub mod table;
