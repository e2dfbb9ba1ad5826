//! Why a function could not be found, handed over or claimed. After that, errors are [`cofferdam_device::TransportError`].

use std::io;

use thiserror::Error;

use crate::Address;

/// Each text says what an operator can do about it.
#[derive(Debug, Error)]
pub enum PciError {
    /// Not an address. The operator is to blame.
    #[error("{address:?} is not the address of a PCI function (pci:0000:00:04.0)")]
    Address {
        /// As it was given, the first 64 characters.
        address: String,
    },
    /// There is no such function.
    #[error("{0}: no such PCI function (see 'cofferdam devices')")]
    NotFound(Address),
    /// A binding of this or another process has it.
    #[error("{0}: already claimed by another binding on this host; unload that one first")]
    AlreadyClaimed(Address),
    /// The same, and the holder has said who it is.
    #[error("{address}: already claimed by process {pid} ({purpose}); let that one give it back first")]
    ClaimedBy {
        /// The function.
        address: Address,
        /// The process.
        pid: u32,
        /// What it claimed it for.
        purpose: String,
    },
    /// The kernel has not answered in time and is still busy with it: a driver that does not let go while somebody has the device open, a probe that hangs.
    #[error(
        "{address}: {what}: the kernel has not answered for 10 s and goes on; the same command later continues from there"
    )]
    Stuck {
        /// The function.
        address: Address,
        /// What was being done.
        what: String,
    },
    /// The kernel uses it: a mounted file system, the default route.
    #[error("{address}: in use: {why}; 'cofferdam bind pci:{address} --force' takes it away all the same")]
    InUse {
        /// The function.
        address: Address,
        /// By what.
        why: String,
    },
    /// It cannot be driven from here as things are; the text says why and, where there is one, the command that mends it.
    #[error("{address}: {why}")]
    Unusable {
        /// The function.
        address: Address,
        /// What it lacks.
        why: String,
    },
    /// The process may not.
    #[error("{address}: {what}: permission denied; run as root")]
    Permission {
        /// The function.
        address: Address,
        /// What was being done.
        what: String,
    },
    /// The host's own system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, as in "write 0000:00:04.0/driver_override".
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl PciError {
    /// What a write to sysfs ended with.
    pub(crate) fn of_write(address: Address, what: String, source: io::Error) -> PciError {
        match source.kind() {
            io::ErrorKind::PermissionDenied => PciError::Permission { address, what },
            io::ErrorKind::TimedOut => PciError::Stuck { address, what },
            _ => PciError::Io { what, source },
        }
    }
}
