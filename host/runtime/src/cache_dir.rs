//! A directory that only this user can write, and files in it: owner and mode are checked on open descriptors.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

/// Largest entry that is read, in bytes: machine code is a few times as large as the component.
const MAX_ENTRY_BYTES: u64 = 1 << 30;

/// Ends every entry's name.
const SUFFIX: &str = ".cwasm";

/// Why a directory or file is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Distrust {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it belongs to user {owner}, not to user {user}")]
    Owner { owner: u32, user: u32 },
    #[error("its mode is {mode:04o}; others must have no access ({wanted:04o})")]
    Mode { mode: u32, wanted: u32 },
    #[error("it is not a {0}")]
    Kind(&'static str),
    #[error("it has {0} bytes")]
    Size(u64),
}

impl From<rustix::io::Errno> for Distrust {
    fn from(errno: rustix::io::Errno) -> Distrust {
        Distrust::Io(errno.into())
    }
}

/// An open directory that belongs to this user and that others cannot enter.
#[derive(Debug)]
pub(crate) struct CacheDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl CacheDir {
    pub(crate) fn open(path: &Path) -> Result<CacheDir, Distrust> {
        if !path.is_dir() {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            match DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        check(&rustix::fs::fstat(&fd)?, FileType::Directory)?;
        Ok(CacheDir { fd, path: path.to_owned() })
    }

    /// The bytes of an entry; `None` if there is none.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Distrust> {
        // NONBLOCK: something that is not a file must not hold us up before it was looked at.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let stat = rustix::fs::fstat(&fd)?;
        check(&stat, FileType::RegularFile)?;
        let bytes = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        if bytes > MAX_ENTRY_BYTES {
            return Err(Distrust::Size(bytes));
        }
        let mut entry = Vec::new();
        // One byte more than was seen: a file that grows meanwhile is damaged, not read without end.
        File::from(fd).take(bytes + 1).read_to_end(&mut entry)?;
        Ok(Some(entry))
    }

    /// Writes an entry whole or not at all: a temporary file of mode 0600, then a rename.
    pub(crate) fn write(&self, name: &str, parts: &[&[u8]]) -> Result<(), Distrust> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let temporary = format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
        let written = (|| -> Result<(), Distrust> {
            let mut file = File::from(fd);
            for part in parts {
                file.write_all(part)?;
            }
            file.flush()?;
            Ok(rustix::fs::renameat(&self.fd, &temporary, &self.fd, name)?)
        })();
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&self.fd, &temporary, AtFlags::empty());
        }
        written
    }

    /// Removes the oldest entries until `entries` are left, and temporary files that a dead process left behind over an hour ago.
    pub(crate) fn prune(&self, entries: usize) {
        if let Err(error) = self.try_prune(entries) {
            tracing::warn!(dir = %self.path.display(), %error, "compiled-code cache not pruned");
        }
    }

    fn try_prune(&self, entries: usize) -> io::Result<()> {
        let mut found: Vec<(i64, OsString)> = Vec::new();
        for entry in fs::read_dir(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.fd)))? {
            let entry = entry?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            let is_stale = || entry.metadata().is_ok_and(|m| age_seconds(&m) > 3_600);
            if text.ends_with(SUFFIX) {
                found.push((entry.metadata()?.mtime(), name));
            } else if text.ends_with(".tmp") && is_stale() {
                rustix::fs::unlinkat(&self.fd, &name, AtFlags::empty())?;
            }
        }
        found.sort();
        for (_, name) in found.iter().take(found.len().saturating_sub(entries)) {
            rustix::fs::unlinkat(&self.fd, name, AtFlags::empty())?;
        }
        Ok(())
    }
}

fn age_seconds(metadata: &fs::Metadata) -> u64 {
    metadata.modified().ok().and_then(|time| time.elapsed().ok()).map_or(0, |age| age.as_secs())
}

/// Belongs to us, is of the kind it should be, and gives nobody else anything.
fn check(stat: &Stat, kind: FileType) -> Result<(), Distrust> {
    let is_dir = kind == FileType::Directory;
    if FileType::from_raw_mode(stat.st_mode) != kind {
        return Err(Distrust::Kind(if is_dir { "directory" } else { "regular file" }));
    }
    let user = rustix::process::geteuid().as_raw();
    if stat.st_uid != user {
        return Err(Distrust::Owner { owner: stat.st_uid, user });
    }
    let mode = stat.st_mode & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Distrust::Mode { mode, wanted: if is_dir { 0o700 } else { 0o600 } });
    }
    Ok(())
}
