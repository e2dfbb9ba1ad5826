//! What one process gives another, for it to go on with a device or a port.
//!
//! ```text
//! export -> (the other process adopts, and touches nothing) -> committed: the other resumes, this one is forgotten
//!                                                          \-> given up:  this one resumes
//! ```
//!
//! From `export` to `resume` neither side speaks to the device or to a client: whatever the two have open together (sockets, events, memory) stays as it is, so that either
//! of them can go on with it. Descriptors are duplicates; the open files behind them are shared.

use std::os::fd::OwnedFd;

use thiserror::Error;

/// A device or a port on its way to another process.
#[derive(Debug)]
pub struct Exported {
    /// What it is, for whoever has to find the code that adopts it: `vhost-user`, `nbd`.
    pub kind: String,
    /// Its state, in the words of that code.
    pub state: String,
    /// What is open, in the order that the state counts on.
    pub descriptors: Vec<OwnedFd>,
}

/// Why something cannot be handed to another process now, in a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct NotExportable(pub String);

impl NotExportable {
    /// For this reason.
    pub fn because(why: impl Into<String>) -> NotExportable {
        NotExportable(why.into())
    }
}
