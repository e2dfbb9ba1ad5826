//! Listening sockets: made with care, removed with care.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, getsockname, sockopt};

use crate::address::NbdAddress;
use crate::error::NbdError;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// A listening socket. Dropping it closes it and removes its file, if that is still the one it made.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    /// With the real port, where port 0 was asked for.
    pub(crate) address: NbdAddress,
    /// Device and inode of the socket file.
    file: Option<(PathBuf, u64, u64)>,
    /// Another process has the socket, too, and may be the one that goes on with it.
    dormant: AtomicBool,
}

impl Listener {
    pub(crate) fn bind(address: &NbdAddress) -> Result<Listener, NbdError> {
        match address {
            NbdAddress::Unix(path) => Listener::unix(path),
            NbdAddress::Tcp(socket) => Listener::tcp(*socket),
        }
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// A socket that another process listens on, at `address`, with the file that is its. Dormant: dropping it removes nothing.
    ///
    /// # Errors
    /// It is another socket.
    pub(crate) fn adopt(
        socket: OwnedFd,
        address: NbdAddress,
        file: Option<(PathBuf, u64, u64)>,
    ) -> Result<Listener, NbdError> {
        let failed = NbdError::io("taking a listening socket over");
        let looked = sockopt::socket_acceptconn(&socket).and_then(|listens| Ok((listens, getsockname(&socket)?)));
        let (listens, bound) = looked.map_err(failed)?;
        let fits = match &address {
            NbdAddress::Tcp(there) => std::net::SocketAddr::try_from(bound).is_ok_and(|bound| bound == *there),
            NbdAddress::Unix(path) => {
                let bound = SocketAddrUnix::try_from(bound).ok();
                let is_there = |bound: &SocketAddrUnix| {
                    bound.path().is_some_and(|at| at.to_bytes() == path.as_os_str().as_encoded_bytes())
                };
                bound.as_ref().is_some_and(is_there)
            }
        };
        if !listens || !fits {
            return Err(NbdError::NotTakenOver(format!("a socket does not listen at {address}")));
        }
        Ok(Listener { socket, address, file, dormant: AtomicBool::new(true) })
    }

    /// Device and inode of its file, if it has one.
    pub(crate) fn file(&self) -> Option<(u64, u64)> {
        self.file.as_ref().map(|(_, device, inode)| (*device, *inode))
    }

    /// Whether the file is another process's to remove.
    pub(crate) fn set_dormant(&self, dormant: bool) {
        self.dormant.store(dormant, Ordering::Release);
    }

    fn tcp(address: std::net::SocketAddr) -> Result<Listener, NbdError> {
        let socket = make_socket(if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 })?;
        // Connections of a server that was just stopped linger in TIME_WAIT; a live listener is still refused.
        sockopt::set_socket_reuseaddr(&socket, true).map_err(NbdError::io("setsockopt(SO_REUSEADDR)"))?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) => return Err(NbdError::InUse(format!("nbd:{address}"))),
            result => result.map_err(NbdError::io("bind"))?,
        }
        match rustix::net::listen(&socket, BACKLOG) {
            Err(Errno::ADDRINUSE) => return Err(NbdError::InUse(format!("nbd:{address}"))),
            result => result.map_err(NbdError::io("listen"))?,
        }
        let bound = rustix::net::getsockname(&socket).map_err(NbdError::io("getsockname"))?;
        let bound = std::net::SocketAddr::try_from(bound).map_err(NbdError::io("getsockname"))?;
        Ok(Listener { socket, address: NbdAddress::Tcp(bound), file: None, dormant: AtomicBool::new(false) })
    }

    /// A socket file whose owner is gone is taken over, under a lock of its directory, so that two starters do not
    /// remove each other's. The mode is set between bind and listen, when nobody can connect yet.
    fn unix(path: &Path) -> Result<Listener, NbdError> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        let directory =
            match rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
                Err(Errno::NOENT | Errno::NOTDIR) => return Err(NbdError::NoDirectory(parent.to_owned())),
                result => result.map_err(NbdError::io("open of the socket's directory"))?,
            };
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(NbdError::InUse(format!("nbd:{}", path.display()))),
            result => result.map_err(NbdError::io("flock of the socket's directory"))?,
        }
        let name = SocketAddrUnix::new(path).map_err(NbdError::io("socket address"))?;
        match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(NbdError::io("stat of the socket")(error)),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
                return Err(NbdError::NotASocket(path.to_owned()));
            }
            Ok(_) => {
                let probe = make_socket(AddressFamily::UNIX)?;
                // Anything but "refused" (a full backlog, no permission) means that somebody is there.
                match rustix::net::connect(&probe, &name) {
                    Err(Errno::CONNREFUSED | Errno::NOENT) => {}
                    _ => return Err(NbdError::InUse(format!("nbd:{}", path.display()))),
                }
                rustix::fs::unlink(path).or_else(ignore_missing).map_err(NbdError::io("unlink of the stale socket"))?;
            }
        }
        let socket = make_socket(AddressFamily::UNIX)?;
        match rustix::net::bind(&socket, &name) {
            Err(Errno::ADDRINUSE) => return Err(NbdError::InUse(format!("nbd:{}", path.display()))),
            result => result.map_err(NbdError::io("bind"))?,
        }
        let stat =
            rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map_err(NbdError::io("stat of the socket"))?;
        let listener = Listener {
            socket,
            address: NbdAddress::Unix(path.to_owned()),
            file: Some((path.to_owned(), stat.st_dev, stat.st_ino)),
            dormant: AtomicBool::new(false),
        };
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(NbdError::io("chmod of the socket"))?;
        rustix::net::listen(&listener.socket, BACKLOG).map_err(NbdError::io("listen"))?;
        Ok(listener)
    }

    /// Takes one client that waits, if any: its socket, and who it is in words for `handles`.
    pub(crate) fn accept(&self) -> Result<Option<(OwnedFd, String)>, io::Error> {
        let socket = match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::WOULDBLOCK | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let peer = match &self.address {
            NbdAddress::Unix(_) => sockopt::socket_peercred(&socket).map_or_else(
                |_| "unknown".to_owned(),
                |c| format!("uid={} pid={}", c.uid.as_raw(), c.pid.as_raw_nonzero()),
            ),
            NbdAddress::Tcp(_) => {
                // "Transmission phase": Nagle's algorithm is to be off. A socket that refuses is only slower.
                let _ = sockopt::set_tcp_nodelay(&socket, true);
                rustix::net::getpeername(&socket)
                    .ok()
                    .flatten()
                    .map_or_else(|| "unknown".to_owned(), |peer| describe(&peer))
            }
        };
        Ok(Some((socket, peer)))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.dormant.load(Ordering::Acquire) {
            return;
        }
        let Some((path, device, inode)) = &self.file else { return };
        // Somebody else's socket may stand there by now: leave it.
        if let Ok(stat) = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)
            && (stat.st_dev, stat.st_ino) == (*device, *inode)
        {
            let _ = rustix::fs::unlink(path);
        }
    }
}

fn make_socket(family: AddressFamily) -> Result<OwnedFd, NbdError> {
    rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
        .map_err(NbdError::io("socket"))
}

fn ignore_missing(error: Errno) -> Result<(), Errno> {
    if error == Errno::NOENT { Ok(()) } else { Err(error) }
}

fn describe(peer: &SocketAddrAny) -> String {
    std::net::SocketAddr::try_from(peer.clone()).map_or_else(|_| "unknown".to_owned(), |peer| peer.to_string())
}
