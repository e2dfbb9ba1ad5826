//! What the kernel says of PCI functions.
//!
//! /sys, /proc, /dev and /run are opened once, as capabilities; everything is reached from there. The only words from outside that become part of a path are an [`Address`],
//! which was parsed, and names that the kernel lists (checked by `is_name`). A symbolic link that leads out of its tree is an error, an attribute that does not end is one
//! too, and whatever is no number is taken for "not there".
//!
//! ```text
//! function   one function: ids, driver, IOMMU group, BARs
//! usable     whether uio or vfio can have it, and the command that mends it
//! uses       what the kernel does with it now
//! class      class codes in words
//! ```

mod class;
mod function;
mod usable;
mod uses;

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::ambient_authority;
use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use rustix::fs::OFlags;

use crate::error::PciError;
use crate::handover::{Effects, Kernel};
use crate::{Address, Via};

pub use function::{Bar, FunctionInfo, Group, Member};
pub use usable::{Readiness, Usability};
pub use uses::Use;

/// Longest attribute of sysfs: a page (the kernel's own bound), and one byte to notice that there is more.
const ATTRIBUTE_BYTES: u64 = 4096;
/// Longest table of /proc that is read. A mount takes about 100 bytes, a route 128.
const TABLE_BYTES: u64 = 8 << 20;
/// Most functions that are listed. Large machines with SR-IOV have a few thousand.
const MAX_FUNCTIONS: usize = 16_384;

/// Where the trees are. Tests put others in their place.
#[derive(Clone, Debug)]
pub struct Roots {
    /// /sys
    pub sys: PathBuf,
    /// /proc
    pub proc: PathBuf,
    /// /dev
    pub dev: PathBuf,
    /// /run, where records of what was handed over are kept (in cofferdam/pci).
    pub run: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Roots { sys: "/sys".into(), proc: "/proc".into(), dev: "/dev".into(), run: "/run".into() }
    }
}

/// The kernel's view of PCI. Cheap to keep, safe to share.
pub struct Sysfs {
    pub(crate) sys: Dir,
    pub(crate) proc: Dir,
    pub(crate) dev: Dir,
    pub(crate) run: Dir,
    /// What changes the machine. Tests play the kernel here.
    pub(crate) effects: Arc<dyn Effects>,
    /// Keeps claims under other roots apart from those of the host; empty for the host itself.
    pub(crate) scope: String,
    roots: Roots,
}

impl fmt::Debug for Sysfs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sysfs").field("roots", &self.roots).finish_non_exhaustive()
    }
}

impl Sysfs {
    /// Opens the host's own.
    ///
    /// # Errors
    /// `Io` where one of them is not there (a container without /sys).
    pub fn open() -> Result<Sysfs, PciError> {
        Sysfs::with(Roots::default(), Arc::new(Kernel), String::new())
    }

    /// Opens others in their place. Writes go there too: under a directory that is not sysfs they change files and nothing else.
    ///
    /// # Errors
    /// As `open`.
    pub fn with_roots(roots: Roots) -> Result<Sysfs, PciError> {
        let scope = roots.run.display().to_string();
        Sysfs::with(roots, Arc::new(Kernel), scope)
    }

    pub(crate) fn with(roots: Roots, effects: Arc<dyn Effects>, scope: String) -> Result<Sysfs, PciError> {
        let open = |path: &Path| {
            let failed = |source| PciError::Io { what: format!("open {}", path.display()), source };
            Dir::open_ambient_dir(path, ambient_authority()).map_err(failed)
        };
        Ok(Sysfs {
            sys: open(&roots.sys)?,
            proc: open(&roots.proc)?,
            dev: open(&roots.dev)?,
            run: open(&roots.run)?,
            effects,
            scope,
            roots,
        })
    }

    /// A path below /sys as an operator would type it.
    pub(crate) fn told(&self, below: &str) -> String {
        format!("{}/{below}", self.roots.sys.display())
    }

    /// Where the record of a function is, as an operator would type it.
    pub(crate) fn told_run(&self, below: &str) -> String {
        format!("{}/{below}", self.roots.run.display())
    }

    /// Every function, in the order of addresses; at most 16,384. One that goes away meanwhile is left out.
    ///
    /// # Errors
    /// `Io` where the kernel has no PCI.
    pub fn functions(&self) -> Result<Vec<FunctionInfo>, PciError> {
        let failed = |source| PciError::Io { what: format!("list {}", self.told("bus/pci/devices")), source };
        let (names, is_whole) = list(&self.sys, "bus/pci/devices", MAX_FUNCTIONS).map_err(failed)?;
        if !is_whole {
            tracing::warn!(limit = MAX_FUNCTIONS, "more PCI functions than are listed");
        }
        let mut addresses: Vec<Address> = names.iter().filter_map(|name| sysfs_address(name)).collect();
        addresses.sort_unstable();
        Ok(addresses.into_iter().filter_map(|address| self.function(address).ok()).collect())
    }

    /// One function. What it says of itself is not believed further than its types reach; what is no number counts as not there.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn function(&self, address: Address) -> Result<FunctionInfo, PciError> {
        function::read(self, address)
    }

    /// What the kernel does with the function now; with `thoroughly` also by asking for its block devices exclusively, for a moment, which finds holders that no table of
    /// this process's namespaces shows.
    pub(crate) fn uses(&self, address: Address, thoroughly: bool) -> Vec<Use> {
        uses::of(self, address, thoroughly)
    }

    /// The function's directory.
    pub(crate) fn function_dir(&self, address: Address) -> Result<Dir, PciError> {
        let below = format!("bus/pci/devices/{address}");
        self.sys.open_dir(&below).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => PciError::NotFound(address),
            _ => PciError::Io { what: format!("open {}", self.told(&below)), source },
        })
    }

    /// The driver that has the function, `None` for none; `?` where its name cannot be a driver's.
    pub(crate) fn driver(&self, address: Address) -> Result<Option<String>, PciError> {
        Ok(link_name(&self.function_dir(address)?, "driver"))
    }

    /// Whether a PCI driver of this name is there (its module is loaded or built in).
    pub(crate) fn has_driver(&self, name: &str) -> bool {
        is_name(name) && self.sys.is_dir(format!("bus/pci/drivers/{name}"))
    }

    /// Whether the driver that `via` needs is there.
    #[must_use]
    pub fn is_loaded(&self, via: Via) -> bool {
        self.has_driver(via.driver())
    }

    /// A table of /proc, whole; empty where it is not there.
    pub(crate) fn table(&self, path: &str) -> String {
        read(&self.proc, path, TABLE_BYTES).unwrap_or_default()
    }
}

/// A name in sysfs that is an address as the kernel writes it, and no other way.
fn sysfs_address(name: &str) -> Option<Address> {
    name.parse::<Address>().ok().filter(|address| address.to_string() == name)
}

/// Whether a name that the kernel or a record gives may be one component of a path.
pub(crate) fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && name != "."
        && name != ".."
        && !name.contains('/')
        && !name.contains(char::is_control)
}

/// Reads a file of at most `limit` bytes. A longer one is an error; bytes that are no UTF-8 are replaced.
pub(crate) fn read(dir: &Dir, path: impl AsRef<Path>, limit: u64) -> io::Result<String> {
    // NONBLOCK: sysfs has no fifos, a tree that is not sysfs may have one.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
    let mut bytes = Vec::new();
    dir.open_with(path, &options)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("over {limit} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// An attribute, without white space around it; `None` where it cannot be read.
pub(crate) fn attribute(dir: &Dir, path: impl AsRef<Path>) -> Option<String> {
    Some(read(dir, path, ATTRIBUTE_BYTES).ok()?.trim().to_owned())
}

/// The last component of where a link leads, which is not followed; `?` when that is no name.
pub(crate) fn link_name(dir: &Dir, path: impl AsRef<Path>) -> Option<String> {
    let target = dir.read_link_contents(path).ok()?;
    let name = target.file_name().and_then(|name| name.to_str()).filter(|name| is_name(name));
    Some(name.unwrap_or("?").to_owned())
}

/// Names in a directory, sorted, at most `limit`, and whether these are all. Names that are no UTF-8 are left out and counted as missing.
pub(crate) fn list(dir: &Dir, path: impl AsRef<Path>, limit: usize) -> io::Result<(Vec<String>, bool)> {
    let (mut names, mut is_whole) = (Vec::new(), true);
    for entry in dir.read_dir(path)? {
        if names.len() == limit {
            is_whole = false;
            break;
        }
        match entry?.file_name().into_string() {
            Ok(name) if is_name(&name) => names.push(name),
            _ => is_whole = false,
        }
    }
    names.sort_unstable();
    Ok((names, is_whole))
}

#[cfg(test)]
mod tests;
