//! A driver for a device, as modprobe finds one: by the device tables of the components in a folder. Nothing is compiled or run here, and no device is claimed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use cofferdam_bus_pci::{Address, Sysfs};
use cofferdam_manager::{DeviceId, Wanted, device_table};

use crate::control::{ErrorBody, ErrorCode};
use crate::{devices, host};

/// Where drivers are, unless the command line or the environment says so.
const SYSTEM: &str = "/usr/lib/cofferdam/drivers";
/// Most entries of a folder that are looked at, and most components that are read: whoever writes there decides how long it takes.
const MAX_ENTRIES: usize = 4096;
const MAX_DRIVERS: usize = 256;

/// A component and where it was found.
pub(crate) struct Driver {
    pub(crate) path: PathBuf,
    pub(crate) component: Vec<u8>,
}

/// The folder to look in: `named`, or this process's `COFFERDAM_DRIVERS` (the daemon's, where a client names none), or the first that there is of `../lib/cofferdam/drivers` beside the folder of this program (an installation), `../drivers` beside it (the source
/// tree's `target/drivers`), and [`SYSTEM`].
pub(crate) fn folder(named: Option<&str>) -> Result<PathBuf, ErrorBody> {
    let set = || std::env::var_os("COFFERDAM_DRIVERS").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    match named.map(PathBuf::from).or_else(set) {
        Some(folder) => Ok(folder),
        None => existing(&places(std::env::current_exe().ok().as_deref())),
    }
}

fn places(program: Option<&Path>) -> Vec<PathBuf> {
    let prefix = program.and_then(Path::parent).and_then(Path::parent);
    let mut places: Vec<PathBuf> =
        prefix.iter().flat_map(|prefix| [prefix.join("lib/cofferdam/drivers"), prefix.join("drivers")]).collect();
    if !places.iter().any(|place| place == Path::new(SYSTEM)) {
        places.push(PathBuf::from(SYSTEM));
    }
    places
}

fn existing(places: &[PathBuf]) -> Result<PathBuf, ErrorBody> {
    places.iter().find(|place| place.is_dir()).cloned().ok_or_else(|| {
        let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        ErrorBody::no_such_thing(format!(
            "no driver was named, and there is no folder of drivers: not {} (say --drivers DIR, or COFFERDAM_DRIVERS)",
            places.join(", nor ")
        ))
    })
}

/// What the device at `address` is, without touching it. `folder` is for the advice alone.
pub(crate) fn identify(address: &str, folder: &Path) -> Result<Wanted, ErrorBody> {
    match address.split_once(':') {
        Some(("pci", _)) => {
            let info = address.parse().and_then(|place: Address| Sysfs::open()?.function(place));
            let info = info.map_err(devices::error)?;
            Ok(info.virtio_type().map_or(Wanted::Function(info.ids), Wanted::Virtio))
        }
        // To try them all would run drivers that nobody chose on a device that somebody uses.
        Some(("vhost-user", _)) => {
            let look = Look::at(folder)?;
            let mut message = format!("{address}: a vhost-user device does not say what it is; name its driver");
            look.tell(&mut message, folder);
            Err(ErrorBody::usage(message))
        }
        _ => Err(ErrorBody::usage(format!(
            "'{address}' is not a device address: vhost-user:/path.sock or pci:0000:00:04.0"
        ))),
    }
}

/// The one driver in `folder` whose table has the device.
pub(crate) fn find(folder: &Path, device: &str, wanted: &Wanted) -> Result<Driver, ErrorBody> {
    let look = Look::at(folder)?;
    let lists_it = |table: &[DeviceId]| table.iter().any(|id| id.fits(wanted));
    let fitting: Vec<&PathBuf> =
        look.drivers.iter().filter(|(_, table)| lists_it(table)).map(|(path, _)| path).collect();
    match &fitting[..] {
        [path] => {
            let component = host::read_component(path)?;
            // It is read a second time, for the others were not kept: it may be another file by now.
            if !device_table(&component).is_ok_and(|table| lists_it(&table)) {
                return Err(ErrorBody::failed(format!("{} was changed while it was looked at", path.display())));
            }
            Ok(Driver { path: PathBuf::from(path), component })
        }
        [] => {
            let mut message = format!("{device} is {wanted}, and no driver in {} lists that", folder.display());
            look.tell(&mut message, folder);
            Err(ErrorBody::no_such_thing(message))
        }
        several => {
            let names: Vec<String> = several.iter().map(|path| path.display().to_string()).collect();
            let message =
                format!("{device} is {wanted}, and several drivers list that; name one: {}", names.join(", "));
            Err(ErrorBody::usage(message))
        }
    }
}

/// What is in a folder.
struct Look {
    /// By name.
    drivers: Vec<(PathBuf, Vec<DeviceId>)>,
    /// Files that should be drivers and cannot be read as such, with the reason.
    unreadable: Vec<String>,
}

impl Look {
    fn at(folder: &Path) -> Result<Look, ErrorBody> {
        let failed = |error: std::io::Error| {
            let code =
                if error.kind() == std::io::ErrorKind::NotFound { ErrorCode::NoSuchThing } else { ErrorCode::Failed };
            ErrorBody::new(code, format!("the folder of drivers {}: {error}", folder.display()))
        };
        let too_many =
            |what| Err(ErrorBody::failed(format!("{}: more than {what}; name the driver", folder.display())));
        let mut paths = Vec::new();
        for (number, entry) in std::fs::read_dir(folder).map_err(failed)?.enumerate() {
            if number == MAX_ENTRIES {
                return too_many("4,096 entries");
            }
            let path = entry.map_err(failed)?.path();
            // Not a named pipe, which would not let go of whoever opens it. Links are followed.
            if path.extension().is_some_and(|extension| extension == "wasm") && path.is_file() {
                paths.push(path);
            }
        }
        if paths.len() > MAX_DRIVERS {
            return too_many("256 components");
        }
        paths.sort();
        let mut look = Look { drivers: Vec::new(), unreadable: Vec::new() };
        for path in paths {
            // One file that is none must not keep a device from the driver beside it.
            match host::read_component(&path) {
                Ok(component) => match device_table(&component) {
                    Ok(table) => look.drivers.push((path, table)),
                    Err(error) => look.unreadable.push(format!("{}: {error}", path.display())),
                },
                Err(error) => look.unreadable.push(error.message),
            }
        }
        Ok(look)
    }

    /// What there is besides, for an operator.
    fn tell(&self, message: &mut String, folder: &Path) {
        if !self.drivers.is_empty() {
            let _ = write!(message, "\n  in {}:", folder.display());
        }
        for (path, table) in &self.drivers {
            let ids: Vec<String> = table.iter().map(ToString::to_string).collect();
            let ids = if ids.is_empty() { "lists no devices".to_owned() } else { ids.join(", ") };
            let _ = write!(message, "\n    {} ({ids})", path.file_name().unwrap_or_default().display());
        }
        for why in &self.unreadable {
            let _ = write!(message, "\n  passed over: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A component of nothing but a table of virtio devices.
    fn put(folder: &Path, name: &str, ids: &[u8]) -> PathBuf {
        let table: Vec<u8> = ids.iter().flat_map(|&id| [&[1, 0, 0, 0, id], &[0; 15][..]].concat()).collect();
        let name_and_table = [&b"\x11cofferdam:devices"[..], &table].concat();
        let size = u8::try_from(name_and_table.len()).expect("short");
        assert!(size < 0x80);
        let path = folder.join(name);
        std::fs::write(&path, [&b"\0asm\x0d\0\x01\0\0"[..], &[size], &name_and_table].concat()).expect("a file");
        path
    }

    fn message(result: Result<Driver, ErrorBody>, code: ErrorCode) -> String {
        let Err(error) = result else { panic!("a driver was found") };
        assert_eq!(error.code, code, "{error}");
        error.message
    }

    #[test]
    fn exactly_one_driver_that_lists_the_device_is_found_whatever_lies_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let folder = folder.path();
        put(folder, "disk.wasm", &[2]);
        let rng = put(folder, "rng.wasm", &[4, 44]);
        put(folder, "rng.wasm.old", &[4]);
        std::fs::write(folder.join("garbage.wasm"), "#!/bin/sh\n").expect("a file");
        std::fs::create_dir(folder.join("folder.wasm")).expect("a folder");
        rustix::fs::mkfifoat(rustix::fs::CWD, folder.join("pipe.wasm"), rustix::fs::Mode::RWXU).expect("a pipe");
        let found = find(folder, "pci:x", &Wanted::Virtio(4)).expect("a driver");
        assert_eq!(found.path, rng);
        assert_eq!(found.component, std::fs::read(&rng).expect("the file"));
        assert_eq!(find(folder, "pci:x", &Wanted::Virtio(44)).expect("a driver").path, rng);

        let none = message(find(folder, "pci:x", &Wanted::Virtio(1)), ErrorCode::NoSuchThing);
        for words in [
            "pci:x is virtio:1",
            &folder.display().to_string(),
            "disk.wasm (virtio:2)",
            "garbage.wasm: not a WebAssembly",
        ] {
            assert!(none.contains(words), "{none}");
        }

        let other = put(folder, "other.wasm", &[4]);
        let several = message(find(folder, "pci:x", &Wanted::Virtio(4)), ErrorCode::Usage);
        assert!(several.contains(&format!("{}, {}", other.display(), rng.display())), "{several}");
        assert!(!several.contains("disk.wasm"), "{several}");
    }

    #[test]
    fn a_folder_that_is_missing_or_too_full_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let missing = message(find(&folder.path().join("none"), "pci:x", &Wanted::Virtio(4)), ErrorCode::NoSuchThing);
        assert!(missing.contains("/none"), "{missing}");
        for number in 0..=MAX_DRIVERS {
            put(folder.path(), &format!("{number}.wasm"), &[4]);
        }
        let full = message(find(folder.path(), "pci:x", &Wanted::Virtio(4)), ErrorCode::Failed);
        assert!(full.contains("256"), "{full}");
    }

    #[test]
    fn the_folder_is_that_of_the_installation_then_of_the_source_tree_then_of_the_system() {
        let prefix = tempfile::tempdir().expect("a folder");
        let prefix = prefix.path();
        let places = places(Some(&prefix.join("bin/cofferdam")));
        assert_eq!(places, [prefix.join("lib/cofferdam/drivers"), prefix.join("drivers"), SYSTEM.into()]);
        let error = existing(&places[..2]).expect_err("there is none");
        assert!(error.message.contains("lib/cofferdam/drivers, nor "), "{error}");
        for expected in places[..2].iter().rev() {
            std::fs::create_dir_all(expected).expect("a folder");
            assert_eq!(&existing(&places).expect("a folder"), expected);
        }
        assert_eq!(super::places(Some(Path::new("/usr/bin/cofferdam")))[0], Path::new(SYSTEM));
        assert_eq!(folder(Some("/named")).expect("a folder"), Path::new("/named"));
    }

    #[test]
    fn a_vhost_user_device_is_refused_and_the_drivers_are_listed() {
        let folder = tempfile::tempdir().expect("a folder");
        put(folder.path(), "rng.wasm", &[4]);
        let error = identify("vhost-user:/x.sock", folder.path()).expect_err("it cannot tell");
        assert_eq!(error.code, ErrorCode::Usage);
        assert!(error.message.contains("name its driver") && error.message.contains("rng.wasm (virtio:4)"), "{error}");
        for wrong in ["", "x", "usb:1-1", "pci:0000:00:04"] {
            assert_eq!(identify(wrong, folder.path()).expect_err("no address").code, ErrorCode::Usage, "{wrong}");
        }
    }
}
