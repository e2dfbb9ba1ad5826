//! A function on uio in the hands of another process: see [`crate::adopt`].
//!
//! Interrupts that nobody takes meanwhile stay counted in the open file of `/dev/uioN`, which both processes have, with the line masked by the kernel.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cap_std::fs::Dir;
use cofferdam_device::{DmaRegion, NotExportable, RegionError};

use super::{UioFunction, node_of, number};
use crate::adopt::{Descriptors, FunctionState, Pages, Parcel, duplicate};
use crate::attributes::{self, refused};
use crate::claimed::{Exportable, Interrupts};
use crate::hugepages;
use crate::{Address, PciError};

fn because(why: &str) -> NotExportable {
    NotExportable::because(why)
}

impl UioFunction {
    /// The function that another process exported, at `address`, whose folder in sysfs is `folder` now. Dormant until [`Exportable::resume`].
    ///
    /// # Errors
    /// [`PciError::Io`] and [`PciError::Unusable`] when these are not the function's.
    pub(crate) fn adopt(address: Address, folder: &Dir, received: &mut Descriptors) -> Result<Self, PciError> {
        let io = |what: &str| refused(address, what.to_owned());
        let mut next = |what| received.next(what).map_err(|why| PciError::Unusable { address, why });
        let (node, device, config, lost) = (next("node")?, next("folder")?, next("config")?, next("event")?);
        // A function that was taken out and another one put in has a folder of its own.
        let own = attributes::open(folder, "config").map_err(io("open config"))?;
        attributes::check_same(&device, folder.as_fd())
            .and_then(|()| attributes::check_same(&config, &own))
            .map_err(io("look at the function that was handed over"))?;
        let device = Dir::from_std_file(File::from(device));
        let number = number(address, &device)?;
        let (dev, path) = node_of(number);
        attributes::check_node(&device, &dev, &path, &node).map_err(io("look at its node"))?;
        let mut new = Self::found(address, number, device, node, config, lost)?;
        new.dormant = true;
        Ok(new)
    }
}

impl Exportable for UioFunction {
    fn exportable(&self) -> Result<(), NotExportable> {
        match (&self.device, &self.watch) {
            _ if self.dormant => Err(because("another process has it")),
            _ if self.resets.is_busy() => Err(because("the kernel resets it")),
            (Some(_), Some(watch)) if !watch.is_lost() => Ok(()),
            _ => Err(because("the function is gone")),
        }
    }

    fn export(&mut self) -> Result<Parcel, NotExportable> {
        self.exportable()?;
        let (Some(device), Some(node), Some(watch), Some(config)) =
            (&self.device, &self.node, &self.watch, self.config.fd())
        else {
            return Err(because("the function is gone"));
        };
        if !watch.stop() {
            return Err(because("the kernel does not answer about it"));
        }
        let all = [(**node).as_fd(), device.as_fd(), config, watch.event()];
        let descriptors = all.into_iter().map(duplicate).collect::<Result<_, _>>()?;
        self.dormant = true;
        Ok(Parcel { state: FunctionState::Uio, descriptors })
    }

    fn resume(&mut self, line: Option<Interrupts>) {
        self.dormant = false;
        let Some(watch) = &self.watch else { return };
        let is_line = line.is_some();
        *watch.line() = line.and_then(Interrupts::into_line);
        if let Err(error) = self.watch() {
            tracing::error!(address = %self.address, %error, "nobody can watch the function");
            if let Some(watch) = &self.watch {
                watch.give_up();
            }
        }
        // Whoever had it may have taken an interrupt and not let the line go again. If its reason is still there, it comes once more.
        if is_line && let Err(error) = self.config.set_line(true) {
            tracing::warn!(address = %self.address, %error, "INTx was not let go");
        }
    }

    fn adopt_pages(&mut self, file: OwnedFd, pages: &Pages) -> Result<Arc<DmaRegion>, RegionError> {
        hugepages::adopt(&mut self.hugepages, self.address, file, pages)
    }

    fn adopt_memory(&mut self, region: Arc<DmaRegion>) {
        self.regions.push(region);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::claimed::Claimed;
    use crate::watch::event;

    const FILES: &[(&str, &str)] = &[
        ("vendor", "0x1af4"),
        ("device", "0x1042"),
        ("subsystem_vendor", "0x1af4"),
        ("subsystem_device", "0x1100"),
        ("class", "0x010000"),
        ("revision", "0x01"),
        ("irq", "0"),
        ("resource", "0x0 0x0 0x0"),
        ("uio/uio3/name", "uio_pci_generic"),
        ("uio/uio3/dev", "1:3"),
    ];

    /// The folder of a function whose node is `/dev/null`, and which masters the bus.
    fn folder(root: &Path) -> Dir {
        for (name, content) in FILES {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let mut config = [0; 256];
        config[4] = 0b110;
        std::fs::write(root.join("config"), config).unwrap();
        Dir::open_ambient_dir(root, cap_std::ambient_authority()).unwrap()
    }

    fn open(path: &Path) -> OwnedFd {
        std::fs::File::options().read(true).write(true).open(path).unwrap().into()
    }

    /// As another process has sent them.
    fn sent(root: &Path, folder: &Dir) -> Vec<OwnedFd> {
        let folder = folder.as_fd().try_clone_to_owned().unwrap();
        vec![open(Path::new("/dev/null")), folder, open(&root.join("config")), event().unwrap()]
    }

    fn adopt(folder: &Dir, sent: Vec<OwnedFd>) -> Result<UioFunction, PciError> {
        UioFunction::adopt("0000:00:04.0".parse().unwrap(), folder, &mut Descriptors::new(sent))
    }

    fn command(root: &Path) -> [u8; 2] {
        std::fs::read(root.join("config")).unwrap()[4..6].try_into().unwrap()
    }

    #[test]
    fn a_function_that_was_adopted_is_let_alone_until_it_is_resumed_and_then_made_quiet_at_its_end() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path());
        let untouched = [0b110, 0];
        drop(adopt(&folder, sent(root.path(), &folder)).unwrap());
        assert_eq!(command(root.path()), untouched, "one that came to nothing");

        let mut first = adopt(&folder, sent(root.path(), &folder)).unwrap();
        assert!(first.exportable().is_err(), "it is not this one's to give");
        first.resume(None);
        assert_eq!(command(root.path()), untouched, "one that goes on with it");
        let parcel = first.export().unwrap();
        let mut second = adopt(&folder, parcel.descriptors).unwrap();
        first.release();
        drop(first);
        assert_eq!(command(root.path()), untouched, "one that has given it away");
        second.resume(None);
        second.release();
        assert_eq!(command(root.path())[0] & 0b100, 0, "the one that has it");
    }

    #[test]
    fn one_that_gets_its_function_back_makes_it_quiet_at_its_end() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path());
        let mut function = adopt(&folder, sent(root.path(), &folder)).unwrap();
        function.resume(None);
        drop(function.export().unwrap());
        assert!(matches!(function.quiet(std::time::Instant::now()), cofferdam_device::Silence::Unconfirmed { .. }));
        function.resume(None);
        drop(function);
        assert_eq!(command(root.path())[0] & 0b100, 0);
    }

    #[test]
    fn what_is_not_the_functions_is_refused() {
        let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (folder, another) = (folder(root.path()), folder(other.path()));
        let refused = |at: usize, with: OwnedFd| {
            let mut all = sent(root.path(), &folder);
            all[at] = with;
            assert!(adopt(&folder, all).is_err(), "descriptor {at}");
        };
        refused(0, open(Path::new("/dev/zero")));
        refused(1, another.as_fd().try_clone_to_owned().unwrap());
        refused(2, open(&other.path().join("config")));
        let mut few = sent(root.path(), &folder);
        few.pop();
        assert!(adopt(&folder, few).is_err());
        assert!(adopt(&another, sent(root.path(), &folder)).is_err(), "another one is in its place");
        assert_eq!(command(root.path()), [0b110, 0]);
    }
}
