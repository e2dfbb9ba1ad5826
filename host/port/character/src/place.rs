//! A file that a port makes at a path of the operator's, and removes if it is still the one it made.

use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::CharacterError;

/// What is at a path before the port comes.
pub(crate) enum Found {
    /// Left by a host that is gone.
    Stale,
    /// Somebody uses it.
    InUse,
    /// None of ours.
    Foreign,
}

/// The file. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
    /// Another process has it.
    forgotten: bool,
}

impl Place {
    /// Makes it with `make`. What is there already is shown to `look`, and removed if it is stale: under a lock of the directory, so that two starters do not remove each other's.
    pub(crate) fn claim(
        path: &Path,
        what: &'static str,
        look: impl FnOnce(&Stat) -> Found,
        make: impl FnOnce() -> Result<(), Errno>,
    ) -> Result<Place, CharacterError> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        let directory =
            match rustix::fs::open(parent, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
                Err(Errno::NOENT | Errno::NOTDIR) => return Err(CharacterError::NoDirectory(parent.to_owned())),
                result => result.map_err(CharacterError::io("open of the path's directory"))?,
            };
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(CharacterError::InUse(path.to_owned())),
            result => result.map_err(CharacterError::io("flock of the path's directory"))?,
        }
        match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(error) => return Err(CharacterError::io("stat of the path")(error)),
            Ok(stat) => match look(&stat) {
                Found::Foreign => return Err(CharacterError::Foreign { path: path.to_owned(), what }),
                Found::InUse => return Err(CharacterError::InUse(path.to_owned())),
                Found::Stale => match rustix::fs::unlink(path) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(CharacterError::io("unlink of what was left behind")(error)),
                },
            },
        }
        match make() {
            Err(Errno::EXIST) => return Err(CharacterError::InUse(path.to_owned())),
            result => result.map_err(CharacterError::io("making the file"))?,
        }
        let stat =
            rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).map_err(CharacterError::io("stat of the file"))?;
        Ok(Place { path: path.to_owned(), file: (stat.st_dev, stat.st_ino), forgotten: false })
    }

    /// The file that another process made, which has it until [`Place::set_forgotten`] says otherwise.
    pub(crate) fn adopt(path: &Path, file: (u64, u64)) -> Place {
        Place { path: path.to_owned(), file, forgotten: true }
    }

    /// Whether another process has it: then dropping this leaves it there.
    pub(crate) fn set_forgotten(&mut self, forgotten: bool) {
        self.forgotten = forgotten;
    }

    /// Device and inode.
    pub(crate) fn file(&self) -> (u64, u64) {
        self.file
    }

    /// Whether a descriptor is of this file.
    pub(crate) fn is(&self, stat: &Stat) -> bool {
        (stat.st_dev, stat.st_ino) == self.file
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Somebody else's file may stand there by now: leave it.
        if !self.forgotten
            && let Ok(stat) = rustix::fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)
            && self.is(&stat)
        {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}
