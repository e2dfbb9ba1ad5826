//! Thousands of cycles of load, use and leave in one process that must hold as much at the end as it did at the beginning. See the README of this directory.
//!
//! Everything here fails with a sentence when it cannot do what it says: its only users are tests and a bench.

#![allow(clippy::missing_panics_doc, reason = "every function here is an assertion of a test")]
#![allow(clippy::missing_errors_doc, reason = "an error is the failure of a test, in a sentence")]

pub mod backend;
pub mod census;
pub mod chart;
pub mod client;
pub mod cycle;
pub mod judge;
pub mod plan;
pub mod run;
pub mod world;
