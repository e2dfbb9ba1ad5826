//! Why a port did not start. All of it is the operator's to mend.

use std::io;
use std::path::PathBuf;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The address is not one that this port can listen on.
    #[error("'{address}' is not a data address: {why}")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Somebody listens there.
    #[error("'{0}' is in use: another process is listening on it")]
    InUse(String),
    /// There is a file, and it is not a socket; it is left alone.
    #[error("'{0}' exists and is not a socket")]
    NotASocket(PathBuf),
    /// The directory of the socket is missing.
    #[error("the directory '{0}' does not exist")]
    NoDirectory(PathBuf),
    /// The binding does not serve (any more).
    #[error("the binding is not serving")]
    NotServing,
    /// What another process exported makes no port.
    #[error("the port cannot be taken over: {0}")]
    NotTakenOver(String),
    /// The system refused something.
    #[error("data: {what} failed")]
    Io {
        /// Which call.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl DataError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> DataError {
        move |source| DataError::Io { what, source: source.into() }
    }
}
