//! The listening socket: made with care, removed with care.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, getsockname, sockopt};

use crate::address::DataAddress;
use crate::error::DataError;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 32;

/// A listening socket. Dropping it closes it and removes its file, if that is still the one it made.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the socket file.
    file: (u64, u64),
    /// Another process has the socket, too, and may be the one that goes on with it.
    dormant: AtomicBool,
}

/// A client that has connected.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) socket: OwnedFd,
    /// Who it is, in words for `handles`.
    pub(crate) peer: String,
    /// Of the host's own user, or root.
    pub(crate) may_speak: bool,
}

impl Listener {
    /// A socket file whose owner is gone is taken over, under a lock of its directory, so that two starters do not remove each other's. The mode is
    /// set between bind and listen, when nobody can connect yet.
    pub(crate) fn bind(address: &DataAddress) -> Result<Listener, DataError> {
        let path = address.path();
        let in_use = || DataError::InUse(address.to_string());
        let parent = path.parent().unwrap_or(Path::new("/"));
        let directory =
            match rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
                Err(Errno::NOENT | Errno::NOTDIR) => return Err(DataError::NoDirectory(parent.to_owned())),
                result => result.map_err(DataError::io("open of the socket's directory"))?,
            };
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(in_use()),
            result => result.map_err(DataError::io("flock of the socket's directory"))?,
        }
        let name = SocketAddrUnix::new(path).map_err(DataError::io("socket address"))?;
        match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(DataError::io("stat of the socket")(error)),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
                return Err(DataError::NotASocket(path.to_owned()));
            }
            Ok(_) => {
                // Refused means that nobody listens; anything else (another type, a full backlog, no permission) that somebody does.
                match rustix::net::connect(&make_socket()?, &name) {
                    Err(Errno::CONNREFUSED | Errno::NOENT) => {}
                    _ => return Err(in_use()),
                }
                match rustix::fs::unlink(path) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(DataError::io("unlink of the stale socket")(error)),
                }
            }
        }
        let socket = make_socket()?;
        match rustix::net::bind(&socket, &name) {
            Err(Errno::ADDRINUSE) => return Err(in_use()),
            result => result.map_err(DataError::io("bind"))?,
        }
        let stat =
            rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map_err(DataError::io("stat of the socket"))?;
        let listener = Listener {
            socket,
            path: path.to_owned(),
            file: (stat.st_dev, stat.st_ino),
            dormant: AtomicBool::new(false),
        };
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(DataError::io("chmod of the socket"))?;
        rustix::net::listen(&listener.socket, BACKLOG).map_err(DataError::io("listen"))?;
        Ok(listener)
    }

    /// A socket that another process listens on, at `address`, with the file that is its. Dormant: dropping it removes nothing.
    ///
    /// # Errors
    /// It is another socket.
    pub(crate) fn adopt(socket: OwnedFd, address: &DataAddress, file: (u64, u64)) -> Result<Listener, DataError> {
        let failed = DataError::io("taking a listening socket over");
        let looked = sockopt::socket_acceptconn(&socket).and_then(|listens| Ok((listens, getsockname(&socket)?)));
        let (listens, bound) = looked.map_err(failed)?;
        let path = address.path();
        let bound = SocketAddrUnix::try_from(bound).ok();
        let is_there = |bound: &SocketAddrUnix| {
            bound.path().is_some_and(|at| at.to_bytes() == path.as_os_str().as_encoded_bytes())
        };
        if !listens || !bound.as_ref().is_some_and(is_there) {
            return Err(DataError::NotTakenOver(format!("a socket does not listen at {address}")));
        }
        Ok(Listener { socket, path: path.to_owned(), file, dormant: AtomicBool::new(true) })
    }

    /// Another descriptor for it, and device and inode of its file.
    pub(crate) fn export(&self) -> io::Result<(OwnedFd, (u64, u64))> {
        Ok((self.socket.try_clone()?, self.file))
    }

    /// Whether the file is another process's to remove.
    pub(crate) fn set_dormant(&self, dormant: bool) {
        self.dormant.store(dormant, Ordering::Release);
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Takes one client that waits, if any.
    pub(crate) fn accept(&self) -> Result<Option<Arrival>, io::Error> {
        let socket = match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::WOULDBLOCK | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let (peer, may_speak) = match sockopt::socket_peercred(&socket) {
            Ok(c) => (
                format!("uid={} pid={}", c.uid.as_raw(), c.pid.as_raw_nonzero()),
                c.uid.is_root() || c.uid == rustix::process::geteuid(),
            ),
            Err(_) => ("unknown".to_owned(), false),
        };
        Ok(Some(Arrival { socket, peer, may_speak }))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.dormant.load(Ordering::Acquire) {
            return;
        }
        // Somebody else's socket may stand there by now: leave it.
        if let Ok(stat) = rustix::fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)
            && (stat.st_dev, stat.st_ino) == self.file
        {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

fn make_socket() -> Result<OwnedFd, DataError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(DataError::io("socket"))
}
