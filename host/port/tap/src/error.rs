//! Why a port did not start. All of it is the operator's to mend.

use std::io;

use cofferdam_manager::OpenError;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// This cannot be the name of an interface.
    #[error("'{address}' is not the address of a TAP interface: {why}")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong.
        why: &'static str,
    },
    /// The binding serves something else.
    #[error("a TAP interface is for network devices, and this binding's service is {0}")]
    NotNet(&'static str),
    /// The binding does not serve (any more).
    #[error("the binding is not serving")]
    NotServing,
    /// Somebody takes what arrives already, or there are too many handles.
    #[error("the binding gives no handle: {0}")]
    Open(#[from] OpenError),
    /// There is such an interface.
    #[error("an interface called '{0}' exists already; choose another name or delete it")]
    InUse(String),
    /// CAP_NET_ADMIN is missing.
    #[error("no permission to make interfaces: run this as root or with CAP_NET_ADMIN")]
    NoPermission,
    /// There is no /dev/net/tun.
    #[error("this machine has no /dev/net/tun: load the module 'tun'")]
    NoTun,
    /// The device's MTU or hardware address is not one that the kernel gives an interface.
    #[error("the kernel does not take {what} of the device for an interface")]
    Refused {
        /// Which.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// What another process exported makes no interface.
    #[error("the interface cannot be taken over: {0}")]
    NotTakenOver(String),
    /// The system refused something.
    #[error("tap: {what} failed")]
    Io {
        /// Which call.
        what: &'static str,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl TapError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> TapError {
        move |source| TapError::Io { what, source: source.into() }
    }

    pub(crate) fn refused(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> TapError {
        move |source| TapError::Refused { what, source: source.into() }
    }
}
