//! Why a port did not start. All of it is the operator's to mend.

use std::io;
use std::path::PathBuf;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum CharacterError {
    /// The address is none of this crate's.
    #[error("'{address}' is not a port: {why}")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Something is at the path that this port did not make; it is left alone.
    #[error("'{path}' exists and is not a {what} that was left behind; it is left alone")]
    Foreign {
        /// The path.
        path: PathBuf,
        /// What would have been taken over.
        what: &'static str,
    },
    /// Another process has it.
    #[error("'{0}' is in use")]
    InUse(PathBuf),
    /// The directory of the path is missing.
    #[error("the directory '{0}' does not exist")]
    NoDirectory(PathBuf),
    /// The binding does not serve (any more).
    #[error("the binding is not serving")]
    NotServing,
    /// The binding gives another service.
    #[error("'{address}' needs a driver that gives {needed}; this one gives {given}")]
    Service {
        /// The port.
        address: String,
        /// What it needs.
        needed: &'static str,
        /// What there is.
        given: &'static str,
    },
    /// The device has no such port.
    #[error("the device has no port {port} with queues of its own: it has {there} (more than one needs --queues)")]
    NoSuchPort {
        /// The number that was asked for.
        port: u32,
        /// Those that there are, in words.
        there: String,
    },
    /// The binding opens no handle for it.
    #[error("the binding cannot serve this port: {0}")]
    Open(#[from] cofferdam_manager::OpenError),
    /// The binding has no memory for it.
    #[error("the binding cannot serve this port: {0}")]
    Lease(#[from] cofferdam_manager::LeaseError),
    /// What another process exported makes no port.
    #[error("the port cannot be taken over: {0}")]
    NotTakenOver(String),
    /// The process may not feed the kernel's pool.
    #[error("only root (CAP_SYS_ADMIN) may credit the kernel's entropy pool")]
    NotAllowed,
    /// The system refused something.
    #[error("{what} failed")]
    Io {
        /// Which call.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl CharacterError {
    pub(crate) fn wrong(why: impl std::fmt::Display) -> CharacterError {
        CharacterError::NotTakenOver(why.to_string())
    }

    pub(crate) fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> CharacterError {
        move |source| CharacterError::Io { what, source: source.into() }
    }
}
