//! One binding per device, over the whole host.
//!
//! A vhost-user backend accepts a second client and then never answers it, so a second binding would only see a time-out. The claim
//! refuses it at once and says why.
//!
//! A claim holds a name ([`HeldName`]) that is the identity of the backend's socket file: one holder only, in this process or another, whatever path or symbolic link led
//! there. It keeps honest processes apart and is no security boundary.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use cofferdam_device::HeldName;
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use crate::error::ConnectError;

/// Which socket a path led to. An inode number alone is used again as soon as its file is deleted, and a backend that restarts or ends
/// deletes its socket while a binding still has it: the time of birth tells the two apart (0 where the file system keeps none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SocketId {
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
}

impl SocketId {
    /// Looks at `path`, following symbolic links.
    pub(crate) fn of(path: &Path) -> Result<Self, ConnectError> {
        let wanted = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::BTIME;
        let found = statx(CWD, path, AtFlags::empty(), wanted)
            .map_err(|errno| ConnectError::from_errno(path, "statx", errno))?;
        if FileType::from_raw_mode(found.stx_mode.into()) != FileType::Socket {
            return Err(ConnectError::NotASocket(path.to_owned()));
        }
        let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0;
        Ok(SocketId {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            born: if has_birth { (found.stx_btime.tv_sec, found.stx_btime.tv_nsec) } else { (0, 0) },
        })
    }

    /// The name under which it is claimed.
    fn name(&self) -> String {
        let ((major, minor), (seconds, nanos)) = (self.device, self.born);
        format!("cofferdam/vhost-user/{major:x}:{minor:x}-{:x}-{seconds:x}.{nanos:x}", self.inode)
    }
}

/// The right to drive one device. Dropping it gives the right back.
#[derive(Debug)]
pub(crate) struct Claim {
    name: HeldName,
}

impl Claim {
    /// Claims the socket `id` that `path` led to, or says that somebody has it.
    pub(crate) fn take(path: &Path, id: SocketId) -> Result<Self, ConnectError> {
        let held = HeldName::take(&id.name());
        let held = held.map_err(|source| ConnectError::Io { path: path.to_owned(), what: "claim", source })?;
        held.map(|name| Claim { name }).ok_or_else(|| ConnectError::AlreadyClaimed(path.to_owned()))
    }

    /// The claim that another process took and handed over with the socket that holds it.
    pub(crate) fn adopt(socket: OwnedFd) -> Self {
        Claim { name: HeldName::adopt(socket) }
    }

    /// The socket that holds the name.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.name.descriptor()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_new_socket_at_an_old_path_is_another_device() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.sock");
        let bind = || {
            let listener = UnixListener::bind(&path).unwrap();
            (listener, SocketId::of(&path).unwrap())
        };
        let (_old, old_id) = bind();
        let _held = Claim::take(&path, old_id).unwrap();
        assert!(matches!(Claim::take(&path, old_id), Err(ConnectError::AlreadyClaimed(_))));
        // The clock of birth times is coarse: until it has moved, the file system may give the same identity twice.
        let new_id = loop {
            std::fs::remove_file(&path).unwrap();
            let (_new, new_id) = bind();
            if new_id != old_id {
                break new_id;
            }
        };
        Claim::take(&path, new_id).unwrap();
    }
}
