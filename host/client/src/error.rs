//! What can go wrong for a client, and what it can do about it.

use std::io;
use std::path::PathBuf;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The binding was unloaded, the handle revoked, or the host is gone. For good: connect again.
    #[error("revoked: the disk was taken away")]
    Revoked,
    /// A limit of the port or the binding is reached; try again later.
    #[error("busy: {0}")]
    Busy(String),
    /// The device takes no memory of clients.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The host serves its own user and root.
    #[error("not allowed: {0}")]
    NotAllowed(String),
    /// The host speaks another version of the protocol.
    #[error("the host speaks another version: {0}")]
    Version(String),
    /// The options ask for what cannot be had.
    #[error("these options cannot be had: {0}")]
    Options(String),
    /// The host failed to provide something.
    #[error("the host failed: {0}")]
    Host(String),
    /// The other side does not keep to the protocol, or says that this side does not. For good.
    #[error("protocol: {0}")]
    Protocol(&'static str),
    /// As many requests are outstanding as the ring has entries; poll, then go on.
    #[error("the ring is full")]
    Full,
    /// No free range of the region is long enough.
    #[error("no {bytes} bytes of the region are free in one piece")]
    NoMemory {
        /// Bytes asked for.
        bytes: u32,
    },
    /// Outside the slot, or a request without the slot that it needs.
    #[error("out of range: {0}")]
    OutOfRange(&'static str),
    /// The host did not answer in time.
    #[error("the host did not answer in time")]
    TimedOut,
    /// Nobody listens there, or this user may not.
    #[error("cannot connect to '{path}'")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
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

impl Error {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        move |source| Error::Io { what, source: source.into() }
    }
}
