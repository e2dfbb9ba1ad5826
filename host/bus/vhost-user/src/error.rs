//! Why a device could not be had. After a connect, errors are [`TransportError`].

use std::io;
use std::path::{Path, PathBuf};

use cofferdam_device::TransportError;
use rustix::io::Errno;
use thiserror::Error;

use crate::wire::ANSWER_LIMIT;

/// Why [`crate::VhostUser::connect`] failed. Each text says what an operator can do about it.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The address has the wrong form. The operator is to blame.
    #[error("{address:?} is not an address of a vhost-user device (vhost-user:/path.sock): {why}")]
    Address {
        /// As it was given.
        address: String,
        /// What is wrong with it.
        why: String,
    },
    /// Nothing is at the path.
    #[error("{}: no such socket; start the backend first, or check the path", .0.display())]
    NotFound(PathBuf),
    /// Something else than a socket is at the path.
    #[error("{}: not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The path may not be reached or the socket not be written to.
    #[error("{}: permission denied; connecting needs write permission on the socket and search permission on its directories", .0.display())]
    Permission(PathBuf),
    /// The socket's file is left over from a process that has ended, or its process does not listen.
    #[error("{}: nobody listens there; the backend has ended and left its socket behind, start it again", .0.display())]
    NobodyListens(PathBuf),
    /// A binding of this or another process has the device.
    #[error("{}: already claimed by another binding on this host; unload that one first", .0.display())]
    AlreadyClaimed(PathBuf),
    /// Another socket was put in place of the one that was claimed while connecting.
    #[error("{}: the socket was replaced while connecting; try again", .0.display())]
    Replaced(PathBuf),
    /// The peer did not answer in [`ANSWER_LIMIT`]. A backend that serves another client is silent just so.
    #[error(
        "{}: no answer within {} ms; it serves another client already, hangs, or is not a vhost-user device",
        .0.display(), ANSWER_LIMIT.as_millis()
    )]
    Silent(PathBuf),
    /// The peer closed the connection during the handshake.
    #[error("{}: the peer closed the connection during the handshake; it died, or it is not a vhost-user device", .0.display())]
    Closed(PathBuf),
    /// The peer answered with something that is not vhost-user.
    #[error("{}: not a vhost-user device: {why}", .path.display())]
    NotVhostUser {
        /// The socket.
        path: PathBuf,
        /// What it did.
        why: String,
    },
    /// A vhost-user device that cannot be driven from here.
    #[error("{}: {why}", .path.display())]
    Unusable {
        /// The socket.
        path: PathBuf,
        /// What it lacks.
        why: String,
    },
    /// The host's own system call failed.
    #[error("{}: {what}: {source}", .path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl ConnectError {
    /// What a failed `stat` or `connect` on `path` means to an operator.
    pub(crate) fn from_errno(path: &Path, what: &'static str, errno: Errno) -> Self {
        let path = path.to_owned();
        match errno {
            Errno::NOENT | Errno::NOTDIR => Self::NotFound(path),
            Errno::ACCESS | Errno::PERM => Self::Permission(path),
            Errno::CONNREFUSED => Self::NobodyListens(path),
            // The listener's queue stayed full until the send time-out of the connecting socket.
            Errno::AGAIN => Self::Silent(path),
            Errno::PROTOTYPE => Self::NotVhostUser { path, why: "it is not a stream socket".to_owned() },
            _ => Self::Io { path, what, source: errno.into() },
        }
    }

    /// What a failed message means while the peer has yet to show that it is a vhost-user device.
    pub(crate) fn in_handshake(path: &Path, error: TransportError) -> Self {
        let path = path.to_owned();
        match error {
            TransportError::Lost => Self::Closed(path),
            TransportError::Timeout => Self::Silent(path),
            TransportError::Protocol(why) => Self::NotVhostUser { path, why },
            TransportError::Refused(why)
            | TransportError::Invalid(why)
            | TransportError::Unsupported(why)
            | TransportError::Exhausted(why) => Self::Unusable { path, why },
            TransportError::Io { source, .. } => Self::Io { path, what: "handshake", source },
        }
    }
}

impl From<ConnectError> for TransportError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Silent(_) => Self::Timeout,
            ConnectError::Closed(_) => Self::Lost,
            ConnectError::NotVhostUser { .. } => Self::Protocol(error.to_string()),
            ConnectError::Address { .. } => Self::Invalid(error.to_string()),
            ConnectError::Io { path, what, source } => Self::Io { what: format!("{}: {what}", path.display()), source },
            _ => Self::Refused(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says_becomes_what_the_operator_can_do() {
        let text = |errno| ConnectError::from_errno(Path::new("/run/x.sock"), "connect", errno).to_string();
        assert!(text(Errno::NOENT).contains("start the backend first"));
        assert!(text(Errno::ACCESS).contains("write permission on the socket"));
        assert!(text(Errno::CONNREFUSED).contains("nobody listens"));
        assert!(text(Errno::PROTOTYPE).contains("not a stream socket"));
        assert!(text(Errno::AGAIN).contains("no answer within 2000 ms"));
        assert!(text(Errno::MFILE).contains("connect: Too many open files"));
    }
}
