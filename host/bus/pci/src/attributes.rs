//! What the kernel says of one function in its sysfs folder, as far as `uio` and `vfio` stand on it. The names are constants; what is read is parsed and bounded.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cap_std::fs::Dir;
use cofferdam_device::FunctionIds;
use rustix::fs::{Mode, OFlags};

use crate::{Address, PciError};

/// Longest attribute that is read, in bytes.
const MAX_BYTES: u64 = 4096;
/// `IORESOURCE_MEM` and `IORESOURCE_UNSET` (linux/ioport.h).
const MEMORY: u64 = 0x200;
const UNSET: u64 = 0x2000_0000;

/// A memory BAR, as the `resource` attribute has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// Physical address, for its place within a page.
    pub(crate) start: u64,
    /// Length in bytes: 0 for one that is not there, is I/O, or got no address.
    pub(crate) bytes: u64,
}

/// The text of an attribute, without the white space around it.
pub(crate) fn text(device: &Dir, name: impl AsRef<Path>) -> io::Result<String> {
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(device.open(name)?, MAX_BYTES), &mut text)?;
    Ok(text.trim().to_owned())
}

/// A number: decimal, or hexadecimal after `0x`.
pub(crate) fn number(device: &Dir, name: &str) -> io::Result<u64> {
    let text = text(device, name)?;
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{name} is no number")))
}

/// Vendor, device and so on.
pub(crate) fn ids(device: &Dir) -> io::Result<FunctionIds> {
    let id = |name| number(device, name).map(|value| value as u16);
    Ok(FunctionIds {
        vendor: id("vendor")?,
        device: id("device")?,
        subsystem_vendor: id("subsystem_vendor")?,
        subsystem: id("subsystem_device")?,
        class: number(device, "class")? as u32 & 0xff_ffff,
        revision: number(device, "revision")? as u8,
    })
}

/// The memory BARs.
pub(crate) fn places(device: &Dir) -> io::Result<[Place; 6]> {
    parse_places(&text(device, "resource")?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "resource is not what it was"))
}

fn parse_places(text: &str) -> Option<[Place; 6]> {
    let mut places = [Place::default(); 6];
    for (place, line) in places.iter_mut().zip(text.lines()) {
        let mut words = line.split(' ').map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
        let (start, last, flags) = (words.next()??, words.next()??, words.next()??);
        if flags & MEMORY != 0 && flags & UNSET == 0 && start != 0 && last > start {
            *place = Place { start, bytes: (last - start).checked_add(1)? };
        }
    }
    Some(places)
}

/// Opens the attribute `name` for reading and writing.
pub(crate) fn open(device: &Dir, name: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(device, name, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?)
}

/// The last part of where the link `name` leads.
pub(crate) fn link(device: &Dir, name: &str) -> io::Result<String> {
    let target = rustix::fs::readlinkat(device, name, Vec::new())?;
    let target = Path::new(std::ffi::OsStr::from_bytes(target.as_bytes())).file_name().and_then(|name| name.to_str());
    target.map(str::to_owned).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The only entry of the folder `folder` that is `prefix` and a number, as that number.
pub(crate) fn numbered(device: &Dir, folder: &str, prefix: &str) -> io::Result<u32> {
    let mut found = None;
    for entry in device.read_dir(folder)?.take(64) {
        let name = entry?.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix(prefix));
        let digits = digits.filter(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()));
        if let Some(number) = digits.and_then(|digits| digits.parse().ok())
            && found.replace(number).is_some()
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("more than one {prefix} in {folder}")));
        }
    }
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no {prefix} in {folder}")))
}

/// Opens the device node `path` for reading and writing, and checks that it is the character device that the attribute `dev` names (`major:minor`).
pub(crate) fn open_node(device: &Dir, dev: &str, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let node = rustix::fs::open(path, flags, Mode::empty())?;
    check_node(device, dev, path, &node)?;
    Ok(node)
}

/// Whether `node`, found as `path`, is the character device that the attribute `dev` names.
pub(crate) fn check_node(device: &Dir, dev: &str, path: &str, node: &OwnedFd) -> io::Result<()> {
    let wrong = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let named = text(device, dev)?;
    let parts = named.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor): (u32, u32) = parts.ok_or_else(|| wrong(format!("{dev} names no device")))?;
    let stat = rustix::fs::fstat(node)?;
    let is_character = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device();
    if !is_character || stat.st_rdev != rustix::fs::makedev(major, minor) {
        return Err(wrong(format!("{path} is not the device {named}")));
    }
    Ok(())
}

/// Whether two descriptors are of one file.
pub(crate) fn check_same(one: impl AsFd, other: impl AsFd) -> io::Result<()> {
    let (one, other) = (rustix::fs::fstat(one)?, rustix::fs::fstat(other)?);
    if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino) {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "it is another one by now"))
}

/// Makes a refusal of the system one that says what was being done with which function.
pub(crate) fn refused(address: Address, what: String) -> impl FnOnce(io::Error) -> PciError {
    move |source| match source.kind() {
        io::ErrorKind::PermissionDenied => PciError::Permission { address, what },
        _ => PciError::Io { what: format!("{address}: {what}"), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, Dir) {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let dir = Dir::open_ambient_dir(root.path(), cap_std::ambient_authority()).unwrap();
        (root, dir)
    }

    #[test]
    fn only_memory_with_an_address_counts_as_a_bar() {
        let text = "0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x00000000febd5000 0x00000000febd5fff 0x0000000000040200\n\
             0x000000000000c000 0x000000000000c07f 0x0000000000040101\n\
             0x0000000000000000 0x0000000000003fff 0x0000000020140204\n\
             0x00000000febd6840 0x00000000febd685f 0x0000000000040200\n";
        let places = parse_places(text).unwrap();
        assert_eq!(places.map(|place| place.bytes), [0, 0x1000, 0, 0, 0x20, 0]);
        assert_eq!(places[4].start, 0xfebd_6840);
        for broken in ["0x0 0x0", "0x0 0xz 0x200", "1 2 3", "0x1 0xffffffffffffffffff 0x200"] {
            assert_eq!(parse_places(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn ids_are_read_as_the_kernel_writes_them() {
        let (_root, dir) = folder(&[
            ("vendor", "0x1af4\n"),
            ("device", "0x1042\n"),
            ("subsystem_vendor", "0x1af4\n"),
            ("subsystem_device", "0x1100\n"),
            ("class", "0x010000\n"),
            ("revision", "0x01\n"),
        ]);
        let ids = ids(&dir).unwrap();
        assert_eq!(
            (ids.vendor, ids.device, ids.subsystem, ids.class, ids.revision),
            (0x1af4, 0x1042, 0x1100, 0x10000, 1)
        );
    }

    #[test]
    fn the_one_numbered_entry_is_found_and_two_are_none() {
        let (_root, dir) = folder(&[("uio/uio12/name", "x"), ("uio/uiox/name", "x"), ("uio/uio/name", "x")]);
        assert_eq!(numbered(&dir, "uio", "uio").unwrap(), 12);
        dir.create_dir("uio/uio3").unwrap();
        assert!(numbered(&dir, "uio", "uio").is_err());
        assert_eq!(numbered(&dir, "absent", "uio").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_node_that_is_another_device_is_not_taken() {
        let (root, dir) = folder(&[("null", "1:3\n"), ("zero", "1:5\n"), ("nonsense", "13\n")]);
        open_node(&dir, "null", "/dev/null").unwrap();
        assert!(open_node(&dir, "zero", "/dev/null").is_err());
        assert!(open_node(&dir, "nonsense", "/dev/null").is_err());
        let file = root.path().join("null");
        assert!(open_node(&dir, "null", file.to_str().unwrap()).is_err(), "a plain file");
    }

    #[test]
    fn links_are_read_and_not_followed() {
        let (root, dir) = folder(&[]);
        std::os::unix::fs::symlink("../../../kernel/iommu_groups/7", root.path().join("iommu_group")).unwrap();
        assert_eq!(link(&dir, "iommu_group").unwrap(), "7");
    }
}
