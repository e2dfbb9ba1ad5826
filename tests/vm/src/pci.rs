//! The PCI functions of a machine, by the place where QEMU put them.
//!
//! Places on bus 0 are fixed by `addr=`. What sits behind a root port has the bus number that the port was given at boot, so it is found through the port.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::slot::Slot;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Where the command register is in configuration space, and its bus master bit.
const COMMAND: u64 = 0x04;
const MASTER: u16 = 1 << 2;

/// One function of a topology, under QEMU's id. The same table, from QEMU's side, is `xtask/src/vm/topology.rs`.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// QEMU's id, which for disks is the serial number as well.
    pub id: &'static str,
    at: At,
    /// The kernel driver that has it at boot.
    pub native: Option<&'static str>,
}

#[derive(Debug, Clone, Copy)]
enum At {
    /// A slot of bus 0.
    Slot(u8),
    /// Behind the root port in this slot of bus 0, which QEMU knows by this id.
    Port(u8, &'static str),
}

const VIRTIO: Option<&str> = Some("virtio-pci");

/// A modern virtio-blk disk of 64 MiB with two queues, on a port, so that it can be unplugged.
pub const DISK0: Place = Place { id: "disk0", at: At::Port(0x10, "port0"), native: VIRTIO };
/// Another one.
pub const DISK1: Place = Place { id: "disk1", at: At::Port(0x11, "port1"), native: VIRTIO };
/// A transitional virtio-blk disk on bus 0 (uio).
pub const LEGACY0: Place = Place { id: "legacy0", at: At::Slot(0x04), native: VIRTIO };
/// QEMU's device for teaching; no kernel driver takes it.
pub const EDU0: Place = Place { id: "edu0", at: At::Slot(0x05), native: None };
/// A source of randomness that stays with the kernel.
pub const RNG0: Place = Place { id: "rng0", at: At::Slot(0x06), native: VIRTIO };
/// A virtio-blk disk that goes round the IOMMU (vfio).
pub const BYPASS0: Place = Place { id: "bypass0", at: At::Slot(0x07), native: VIRTIO };
/// A virtio-blk disk with two queues on bus 0, where a reset takes less time than behind a root port.
pub const SUITE0: Place = Place { id: "suite0", at: At::Slot(0x0a), native: VIRTIO };
/// A virtio-blk disk without indirect descriptors and event indices.
pub const PLAIN0: Place = Place { id: "plain0", at: At::Slot(0x08), native: VIRTIO };
/// A virtio-blk disk that refuses writes and reads as zeroes.
pub const READONLY0: Place = Place { id: "readonly0", at: At::Slot(0x09), native: VIRTIO };
/// A modern virtio-net function with an MTU of 9000, at one end of a cable: `52:54:00:00:00:10`.
pub const NET0: Place = Place { id: "net0", at: At::Slot(0x0b), native: VIRTIO };
/// The other end, which stays with the kernel, and goes round an IOMMU: `52:54:00:00:00:11`.
pub const NET1: Place = Place { id: "net1", at: At::Slot(0x0c), native: VIRTIO };
/// A console whose other end is [`CONSOLE1`]: port 0 is a console, port 1 is not.
pub const CONSOLE0: Place = Place { id: "console0", at: At::Slot(0x0d), native: VIRTIO };
/// A source of randomness that may be taken.
pub const RNG1: Place = Place { id: "rng1", at: At::Slot(0x0e), native: VIRTIO };
/// The other end of [`CONSOLE0`], which stays with the kernel.
pub const CONSOLE1: Place = Place { id: "console1", at: At::Slot(0x0f), native: VIRTIO };
/// A virtio-net function that is plugged in by who wants it, on a port that is free otherwise: before QEMU's own network, where 10.0.2.2 answers pings.
pub const NET2: Place = Place { id: "net2", at: At::Port(0x12, "port2"), native: VIRTIO };

/// What is not there at boot.
pub const ON_DEMAND: &[Place] = &[NET2];

/// What a topology has, in the order above.
pub fn places(topology: &str) -> &'static [Place] {
    match topology {
        "uio" => &[DISK0, DISK1, LEGACY0, EDU0, RNG0, SUITE0, PLAIN0, READONLY0, NET0, NET1, CONSOLE0, RNG1, CONSOLE1],
        "vfio" => &[DISK0, DISK1, EDU0, RNG0, BYPASS0, SUITE0, PLAIN0, READONLY0, NET0, NET1, CONSOLE0, RNG1, CONSOLE1],
        _ => &[],
    }
}

impl Place {
    /// The function that is there now.
    ///
    /// # Errors
    /// If none is.
    pub fn function(&self) -> Result<Function> {
        self.find().with_context(|| format!("{} is not there", self.id))
    }

    /// Whether a function is there.
    pub fn is_present(&self) -> bool {
        self.find().is_some()
    }

    fn find(&self) -> Option<Function> {
        let folder = match self.at {
            At::Slot(slot) => Path::new(DEVICES).join(format!("0000:00:{slot:02x}.0")),
            At::Port(slot, _) => {
                let port = Path::new(DEVICES).join(format!("0000:00:{slot:02x}.0"));
                let mut inside = port.read_dir().ok()?.flatten().map(|entry| entry.path());
                inside.find(|path| path.join("vendor").is_file() && path.join("class").is_file())?
            }
        };
        folder.is_dir().then_some(Function { folder })
    }

    /// The slot that it is in.
    ///
    /// # Errors
    /// If it is not on a port, or the power of that one's slot cannot be switched.
    pub fn slot(&self) -> Result<Slot> {
        let At::Port(slot, _) = self.at else { bail!("{} is not on a port", self.id) };
        Slot::open(Path::new(DEVICES).join(format!("0000:00:{slot:02x}.0/config")))
    }

    /// What `device_add` needs to plug this in again.
    ///
    /// # Errors
    /// If it is not on a port.
    pub fn plug_arguments(&self, topology: &str) -> Result<Value> {
        let At::Port(_, port) = self.at else { bail!("{} is not on a port", self.id) };
        if self.id == NET2.id {
            return Ok(json!({
                "driver": "virtio-net-pci", "id": self.id, "bus": port, "netdev": "user0", "romfile": "",
                "disable-legacy": "on", "iommu_platform": topology == "vfio",
            }));
        }
        Ok(json!({
            "driver": "virtio-blk-pci", "id": self.id, "bus": port, "drive": self.id, "serial": self.id, "num-queues": 2,
            "disable-legacy": "on", "iommu_platform": topology == "vfio",
        }))
    }
}

/// A function in sysfs.
#[derive(Debug, Clone)]
pub struct Function {
    folder: PathBuf,
}

impl Function {
    /// `0000:01:00.0`.
    pub fn address(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Its folder in sysfs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What a file of sysfs holds, without the newline.
    pub fn attribute(&self, name: &str) -> Result<String> {
        let path = self.folder.join(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.trim_end().to_owned())
    }

    /// Vendor and device: `1af4:1042`.
    pub fn ids(&self) -> Result<String> {
        let (vendor, device) = (self.attribute("vendor")?, self.attribute("device")?);
        Ok(format!("{}:{}", vendor.trim_start_matches("0x"), device.trim_start_matches("0x")))
    }

    /// The kernel driver that has it.
    pub fn driver(&self) -> Option<String> {
        link_name(&self.folder.join("driver"))
    }

    /// The number of its IOMMU group.
    pub fn iommu_group(&self) -> Option<String> {
        link_name(&self.folder.join("iommu_group"))
    }

    /// The command register (PCI 3.0, section 6.2.2).
    pub fn command(&self) -> Result<u16> {
        let config = fs::File::open(self.folder.join("config"))?;
        let mut command = [0; 2];
        config.read_exact_at(&mut command, COMMAND)?;
        Ok(u16::from_le_bytes(command))
    }

    /// Whether it may master the bus: read and write memory by itself.
    pub fn is_master(&self) -> Result<bool> {
        Ok(self.command()? & MASTER != 0)
    }

    /// Lets it master the bus, as `setpci COMMAND=4:4` does.
    pub fn set_master(&self) -> Result<()> {
        let command = self.command()? | MASTER;
        let config = fs::OpenOptions::new().write(true).open(self.folder.join("config"))?;
        config.write_all_at(&command.to_le_bytes(), COMMAND)?;
        ensure!(self.is_master()?, "bus mastering does not go on");
        Ok(())
    }

    /// The block device (`vda`) that the kernel's driver serves from it.
    pub fn block_device(&self) -> Option<PathBuf> {
        let virtio = self.folder.read_dir().ok()?.flatten().map(|entry| entry.path());
        let blocks = virtio.filter_map(|path| path.join("block").read_dir().ok());
        let entry = blocks.flat_map(Iterator::flatten).next()?;
        Some(Path::new("/dev").join(entry.file_name()))
    }

    /// The network interface (`eth0`) that the kernel's driver serves from it in this network namespace.
    pub fn interface(&self) -> Option<String> {
        let virtio = self.folder.read_dir().ok()?.flatten().map(|entry| entry.path());
        let mut nets = virtio.filter_map(|path| path.join("net").read_dir().ok()).flatten().flatten();
        Some(nets.next()?.file_name().to_string_lossy().into_owned())
    }

    /// Takes it from the driver that has it and gives it to `driver`, or to whoever takes devices of its kind. As an operator does it by hand.
    pub fn give_to(&self, driver: Option<&str>) -> Result<()> {
        // A newline alone clears the override.
        self.write("driver_override", driver.unwrap_or("\n"))?;
        if self.driver().is_some() {
            self.write("driver/unbind", &self.address())?;
        }
        let probe = Path::new(DEVICES).with_file_name("drivers_probe");
        fs::write(&probe, self.address()).with_context(|| probe.display().to_string())?;
        if let Some(driver) = driver {
            let now = self.driver();
            ensure!(now.as_deref() == Some(driver), "{} has {now:?} and not {driver}", self.address());
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("{text:?} to {}", path.display()))
    }
}

/// Has the kernel look for functions that it does not know.
pub fn rescan() -> Result<()> {
    let path = Path::new(DEVICES).with_file_name("rescan");
    fs::write(&path, "1").with_context(|| path.display().to_string())
}

fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}
