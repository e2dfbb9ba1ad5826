//! Memory for a function that is told physical addresses: named files in hugetlbfs, whose pages stay where they are and outlive the process.
//!
//! ```text
//! <mount>/cofferdam/0000:00:04.0/queues.4711.0      folders 0700, files 0600, made with O_EXCL and without following links
//! ```
//!
//! A process that is killed leaves its files, so that the kernel gives none of their pages to somebody else while the function may still write to them (DESIGN section 8).
//! [`Hugepages::take_back`] removes them: after a confirmed reset, and not before. A file that somebody still has is locked, so that it is told from those.
//!
//! Pages are reserved and allocated with fallocate before anything touches them: mmap alone would end in SIGBUS where another process was quicker.
//!
//! What this rests on: the kernel moves a huge page only when memory is taken offline, when a contiguous area is being freed, or when an administrator migrates the process;
//! physical addresses are told to nobody but the function.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cofferdam_device::{DmaRegion, FileName, RegionError};
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::Address;
use crate::adopt::Pages;

/// Size that is looked for first: small enough that little is wasted, and every x86-64 and most arm64 machines have it.
const PREFERRED_BYTES: u64 = 2 << 20;
/// `HUGETLBFS_MAGIC` (linux/magic.h).
const MAGIC: i64 = 0x9584_58f6;
/// Mounts that are looked at.
const MAX_MOUNTS: usize = 16;
/// Files of one function: more than its binding could make.
const MAX_FILES: usize = 4096;
/// What /proc/PID/pagemap counts in, in bytes: the smallest page of this machine is asked for where it is used.
const ENTRY_BYTES: u64 = 8;
/// Bit 63: present; bits 0 to 54: page frame number (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// A hugetlbfs that memory can be made in.
#[derive(Debug)]
pub(crate) struct Hugepages {
    mount: OwnedFd,
    page_bytes: u64,
    /// Where `proc` and `sys` are: `/`, or a test's.
    root: PathBuf,
    /// Files that were made through here, for their names.
    made: AtomicU32,
}

/// A file that an earlier process left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leftover {
    /// Its name.
    pub(crate) name: OsString,
    /// Its length in bytes.
    pub(crate) bytes: u64,
}

fn other(text: impl Into<String>) -> io::Error {
    io::Error::other(text.into())
}

/// What is in `slot`, looked for when it is first needed.
///
/// # Errors
/// As [`Hugepages::find`].
pub(crate) fn found(slot: &mut Option<Hugepages>) -> io::Result<&Hugepages> {
    Ok(match slot {
        Some(pages) => pages,
        None => slot.insert(Hugepages::find()?),
    })
}

/// [`Hugepages::adopt`] with what is in `slot`.
///
/// # Errors
/// As [`found`] and [`Hugepages::adopt`].
pub(crate) fn adopt(
    slot: &mut Option<Hugepages>,
    address: Address,
    file: OwnedFd,
    pages: &Pages,
) -> Result<Arc<DmaRegion>, RegionError> {
    let io = |source| RegionError::Io { what: "finding memory in hugetlbfs that a function reaches", source };
    found(slot).map_err(io)?.adopt(address, file, pages).map(Arc::new)
}

impl Hugepages {
    /// The hugetlbfs of this machine with pages of 2 MiB, or else of whatever size there is.
    ///
    /// # Errors
    /// When none is mounted; the text has the command.
    pub(crate) fn find() -> io::Result<Self> {
        Self::find_under(Path::new("/"))
    }

    fn find_under(root: &Path) -> io::Result<Self> {
        let mounts = std::fs::read(root.join("proc/mounts"))?;
        let mut found: Vec<(OwnedFd, u64)> = Vec::new();
        for mount in hugetlbfs_mounts(&mounts) {
            let Ok(folder) = rustix::fs::open(&mount, FOLDER, Mode::empty()) else { continue };
            match rustix::fs::fstatfs(&folder) {
                #[allow(clippy::unnecessary_cast)] // the types differ between machines
                Ok(stat) if stat.f_type as i64 == MAGIC => found.push((folder, stat.f_bsize as u64)),
                _ => {}
            }
        }
        // Stable: the first mount of several of one size.
        found.sort_by_key(|(_, bytes)| (*bytes != PREFERRED_BYTES, *bytes));
        let (mount, page_bytes) = found.into_iter().next().ok_or_else(|| {
            other("no hugetlbfs is mounted; mkdir -p /dev/hugepages && mount -t hugetlbfs hugetlbfs /dev/hugepages")
        })?;
        Ok(Self { mount, page_bytes, root: root.to_owned(), made: AtomicU32::new(0) })
    }

    /// A region of at least `bytes` bytes in whole pages, zeroed, for the function at `address`.
    ///
    /// # Errors
    /// [`RegionError::Io`] without enough pages (how many are needed, how many are free, the command), without the right to know physical addresses, and when somebody else
    /// has put something in the way; [`RegionError::Shape`].
    pub(crate) fn memory(&self, address: Address, name: &str, bytes: u64) -> Result<DmaRegion, RegionError> {
        let shape = RegionError::Shape { bytes, iova: 0 };
        let whole = bytes.checked_next_multiple_of(self.page_bytes).filter(|whole| *whole > 0);
        let Some(whole) = whole.filter(|whole| i64::try_from(*whole).is_ok()) else { return Err(shape) };
        let io = |what| move |source: io::Error| RegionError::Io { what, source };
        let folder = self.folder(address, true).map_err(io("making a folder for memory in hugetlbfs"))?;
        let name = self.name(name);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| io("making a file in hugetlbfs")(errno.into()))?;
        // From here on a failure takes the file away again: no function has been told of it.
        let fill = || -> io::Result<OwnedFd> {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)?;
            rustix::fs::ftruncate(&file, whole)?;
            let reserved = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, whole);
            match reserved {
                Ok(()) => Ok(rustix::io::fcntl_dupfd_cloexec(&folder, 0)?),
                Err(Errno::NOSPC | Errno::NOMEM) => {
                    // What it did get is free again before it is said what is.
                    rustix::fs::ftruncate(&file, 0)?;
                    Err(other(self.shortage(address, whole / self.page_bytes)))
                }
                Err(errno) => Err(errno.into()),
            }
        };
        let unmade = |error: RegionError| {
            let _ = rustix::fs::unlinkat(&folder, &name, AtFlags::empty());
            error
        };
        let held = fill().map_err(io("taking hugepages")).map_err(unmade)?;
        let at = FileName { folder: held, name: name.clone() };
        let translate = |base: *const u8| self.translate(base, whole / self.page_bytes);
        DmaRegion::in_pages(file, at, whole, self.page_bytes, translate).map_err(unmade)
    }

    /// The region behind `file`, which another process made with [`Hugepages::memory`] for the function at `address` and handed over.
    ///
    /// # Errors
    /// [`RegionError`]: also when it is not the file of that name here, or its pages are not where the function was told that they are.
    pub(crate) fn adopt(&self, address: Address, file: OwnedFd, pages: &Pages) -> Result<DmaRegion, RegionError> {
        let io = |what| move |source: io::Error| RegionError::Io { what, source };
        let name = CString::new(pages.name.as_str()).map_err(|error| io("a name in hugetlbfs")(error.into()))?;
        if pages.name.contains('/') || pages.page_bytes != self.page_bytes {
            let why = format!("{:?} in pages of {} bytes", pages.name, pages.page_bytes);
            return Err(io("looking for a file in hugetlbfs")(other(why)));
        }
        let folder = self.folder(address, false).map_err(io("looking for the folder in hugetlbfs"))?;
        // From here on there is memory of this process that nobody may take back.
        self.made.fetch_add(1, Ordering::Relaxed);
        let translate = |base: *const u8| self.translate(base, pages.addresses.len() as u64);
        DmaRegion::adopt_pages(file, FileName { folder, name }, self.page_bytes, &pages.addresses, translate)
    }

    /// The physical addresses of `count` pages from `base` on.
    fn translate(&self, base: *const u8, count: u64) -> io::Result<Vec<u64>> {
        let pagemap = File::open(self.root.join("proc/self/pagemap"))?;
        frames(&pagemap, base as u64, count, self.page_bytes, crate::mmio::page_bytes())
    }

    /// What earlier processes left for the function at `address`. Files that this process has in use are among them.
    ///
    /// # Errors
    /// When the folder is not as this program makes it, or holds more files than any binding makes.
    pub(crate) fn leftovers(&self, address: Address) -> io::Result<Vec<Leftover>> {
        let folder = match self.folder(address, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            folder => folder?,
        };
        let mut left = Vec::new();
        for entry in rustix::fs::Dir::read_from(&folder)? {
            let entry = entry?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            if left.len() == MAX_FILES {
                return Err(other(format!("more than {MAX_FILES} files of {address} in hugetlbfs")));
            }
            let stat = rustix::fs::statat(&folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
            let name = OsString::from_vec(entry.file_name().to_bytes().to_vec());
            left.push(Leftover { name, bytes: u64::try_from(stat.st_size).unwrap_or(0) });
        }
        Ok(left)
    }

    /// Removes what earlier processes left for the function at `address`, and the folder; how many bytes that were. What a binding still has is locked and stays: its device may be
    /// another one by now, or on its way back.
    ///
    /// The caller has confirmed that the function was reset and masters no bus: before that its queues may still be where the files are, and their pages would become
    /// somebody else's under a device that writes. Not after the first [`Hugepages::memory`], whose file it would take too.
    ///
    /// # Errors
    /// As [`Hugepages::leftovers`]; what could be removed is.
    pub(crate) fn take_back(&self, address: Address) -> io::Result<u64> {
        if self.made.load(Ordering::Relaxed) != 0 {
            return Err(other("memory of this very process is in use"));
        }
        let left = self.leftovers(address)?;
        let mut bytes = 0;
        if !left.is_empty() {
            let folder = self.folder(address, false)?;
            for file in left {
                if is_in_use(&folder, &file.name)? {
                    continue;
                }
                rustix::fs::unlinkat(&folder, &file.name, AtFlags::empty())?;
                bytes += file.bytes;
            }
        }
        self.remove_folder(address);
        Ok(bytes)
    }

    /// Removes the folder of the function if nothing is left in it.
    pub(crate) fn remove_folder(&self, address: Address) {
        if let Ok(ours) = open_own(&self.mount, "cofferdam") {
            // Not empty, or not there: both are as they should be.
            let _ = rustix::fs::unlinkat(&ours, address.to_string(), AtFlags::REMOVEDIR);
        }
    }

    /// The folder of the function, checked to be this user's alone.
    fn folder(&self, address: Address, make: bool) -> io::Result<OwnedFd> {
        let own = |folder: &OwnedFd, name: &str| {
            if make {
                match rustix::fs::mkdirat(folder, name, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            open_own(folder, name)
        };
        own(&own(&self.mount, "cofferdam")?, &address.to_string())
    }

    /// A name that is a file's, and no other process's.
    fn name(&self, name: &str) -> CString {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '_' };
        let name: String = name.chars().take(64).map(plain).collect();
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        CString::new(format!("{name}.{}.{number}", std::process::id())).unwrap_or_default()
    }

    /// What is missing, and the command.
    fn shortage(&self, address: Address, needed: u64) -> String {
        let kib = self.page_bytes >> 10;
        let pool = format!("sys/kernel/mm/hugepages/hugepages-{kib}kB");
        let count = |name: &str| -> Option<u64> {
            std::fs::read_to_string(self.root.join(&pool).join(name)).ok()?.trim().parse().ok()
        };
        let meminfo = std::fs::read_to_string(self.root.join("proc/meminfo")).unwrap_or_default();
        let default = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"));
        let is_default = default.and_then(|size| size.trim().strip_suffix(" kB")) == Some(&kib.to_string());
        let file = if is_default { "/proc/sys/vm/nr_hugepages".to_owned() } else { format!("/{pool}/nr_hugepages") };
        let (free, all) = (count("free_hugepages").unwrap_or(0), count("nr_hugepages").unwrap_or(0));
        let enough = all + needed.saturating_sub(free).max(1);
        let mut text =
            format!("{needed} hugepages of {kib} KiB are needed and {free} are free; echo {enough} > {file}");
        let left: u64 = self.leftovers(address).map_or(0, |left| left.iter().map(|file| file.bytes).sum());
        if left > 0 {
            text.push_str(&format!(" ({left} bytes are in files of {address} already)"));
        }
        text
    }
}

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens a folder that this user alone can enter: whoever else could write there could shrink a file under its mapping.
fn open_own(folder: &OwnedFd, name: &str) -> io::Result<OwnedFd> {
    let own = rustix::fs::openat(folder, name, FOLDER, Mode::empty())?;
    let stat = rustix::fs::fstat(&own)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o077 != 0 {
        return Err(other(format!("{name} in hugetlbfs is not this user's alone; remove it or chmod 0700 it")));
    }
    Ok(own)
}

/// Whether some region is of this file: its lock belongs to the open file, which may have been handed to another process, and ends with the last who has it open.
fn is_in_use(folder: &OwnedFd, name: &OsString) -> io::Result<bool> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// The places of the hugetlbfs mounts in the text of /proc/mounts.
fn hugetlbfs_mounts(text: &[u8]) -> Vec<OsString> {
    let mut mounts = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        let mut words = line.split(|byte| *byte == b' ').skip(1);
        if let (Some(place), Some(b"hugetlbfs")) = (words.next(), words.next()) {
            mounts.push(OsString::from_vec(unescape(place)));
        }
    }
    mounts.truncate(MAX_MOUNTS);
    mounts
}

/// Space, tab, newline and backslash are written `\ooo` there.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    while let Some((first, rest)) = text.split_first() {
        let octal = rest.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(octal.unwrap_or(*first));
        text = if octal.is_some() { &rest[3..] } else { rest };
    }
    plain
}

/// The physical addresses of `count` pages of `page_bytes` from `base` on, where the machine's smallest page has `small_bytes`.
fn frames(pagemap: &File, base: u64, count: u64, page_bytes: u64, small_bytes: u64) -> io::Result<Vec<u64>> {
    let entry = |address: u64| {
        let mut entry = [0; 8];
        let place = (address / small_bytes).checked_mul(ENTRY_BYTES).ok_or_else(|| other("no such page"))?;
        pagemap.read_exact_at(&mut entry, place)?;
        let entry = u64::from_ne_bytes(entry);
        match entry & FRAME {
            _ if entry & PRESENT == 0 => Err(other("a page of hugetlbfs is not in memory")),
            0 => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "physical addresses are hidden from this process; run as root (CAP_SYS_ADMIN)",
            )),
            frame => frame.checked_mul(small_bytes).ok_or_else(|| other("a frame number that cannot be")),
        }
    };
    let mut frames = Vec::new();
    for page in 0..count {
        let at = base + page * page_bytes;
        let first = entry(at)?;
        if entry(at + page_bytes - small_bytes)?.checked_sub(first) != Some(page_bytes - small_bytes) {
            return Err(other("a huge page that is not in one run"));
        }
        frames.push(first);
    }
    Ok(frames)
}

#[cfg(test)]
mod tests;
