//! Names that one holder has, over the whole host: what a bus claims a device with.
//!
//! A held name is a bound socket in the abstract namespace (unix(7)): the kernel gives a name to one holder only, in this process or another, and takes it back when the
//! holder ends, however it ends. A lock file was rejected: it needs a directory that all users may write, and it stays behind.
//!
//! It keeps honest processes apart; it is no security boundary (any local user can bind an abstract name), and it does not reach over network namespaces.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// A child that this or another process is just starting holds a copy of every descriptor between its fork and its exec: a name that was given back may stay
/// taken for that moment.
const FORK_GRACE: Duration = Duration::from_millis(60);

/// A name that nobody else has. Dropping it gives the name back.
#[derive(Debug)]
pub struct HeldName {
    socket: UnixDatagram,
}

impl HeldName {
    /// Takes `name`, of at most 107 bytes; `None` when somebody has it and keeps it for more than 60 ms.
    ///
    /// # Errors
    /// What socket(2) and bind(2) answer, but for `EADDRINUSE`; a name that is too long.
    pub fn take(name: &str) -> io::Result<Option<HeldName>> {
        let address = SocketAddr::from_abstract_name(name)?;
        let deadline = Instant::now() + FORK_GRACE;
        loop {
            match UnixDatagram::bind_addr(&address) {
                Ok(socket) => return Ok(Some(HeldName { socket })),
                Err(taken) if taken.kind() == io::ErrorKind::AddrInUse => {
                    if Instant::now() >= deadline {
                        return Ok(None);
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// The name that `socket` holds, which another process took and handed over with it.
    #[must_use]
    pub fn adopt(socket: OwnedFd) -> HeldName {
        HeldName { socket: socket.into() }
    }

    /// Whether somebody has `name` at this moment. Does not take it, not even for a moment.
    ///
    /// # Errors
    /// What socket(2) and connect(2) answer, but for `ECONNREFUSED`; a name that is too long.
    pub fn is_held(name: &str) -> io::Result<bool> {
        let address = SocketAddr::from_abstract_name(name)?;
        match UnixDatagram::unbound()?.connect_addr(&address) {
            Ok(()) => Ok(true),
            Err(nobody) if nobody.kind() == io::ErrorKind::ConnectionRefused => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// The socket that holds the name.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_holder_and_is_free_when_that_one_is_gone() {
        let name = format!("cofferdam/test/{}", std::process::id());
        assert!(!HeldName::is_held(&name).unwrap());
        let held = HeldName::take(&name).unwrap().expect("nobody has it");
        assert!(HeldName::is_held(&name).unwrap());
        assert!(HeldName::take(&name).unwrap().is_none());
        drop(held);
        assert!(HeldName::take(&name).unwrap().is_some());
    }

    #[test]
    fn a_name_that_is_too_long_is_an_error() {
        assert!(HeldName::take(&"x".repeat(200)).is_err());
        assert!(HeldName::is_held(&"x".repeat(200)).is_err());
    }
}
