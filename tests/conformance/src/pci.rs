//! Virtio disks on the PCI bus.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_bus_pci::Via;
use cofferdam_conformance::{Bed, Device, Wish};
use rustix::fs::{FallocateFlags, fallocate, fsync};

/// How long the kernel may take until it serves a disk that it was given back.
const PATIENCE: Duration = Duration::from_secs(60);

/// The unit of sizes in sysfs, in bytes, whatever the disk's own blocks are.
const SECTOR_BYTES: u64 = 512;

/// Feature bits (virtio 1.2, sections 5.2.3 and 6).
const DISCARD: usize = 13;
const WRITE_ZEROES: usize = 14;
const INDIRECT_DESC: usize = 28;
const EVENT_IDX: usize = 29;

/// Functions that the cases share.
pub(crate) struct Functions {
    via: Via,
    driver: PathBuf,
    cache_dir: PathBuf,
    disks: Vec<Disk>,
}

/// One of them, as the kernel's driver has found it.
#[derive(Debug)]
struct Disk {
    /// `pci:0000:01:00.0`.
    address: String,
    capacity_bytes: u64,
    queues: usize,
    is_read_only: bool,
    has_ranges: bool,
    has_plain_ring: bool,
}

impl Functions {
    /// Looks at each.
    ///
    /// # Errors
    /// If the kernel does not serve one of them as a disk.
    pub(crate) fn find(
        via: Via,
        driver: PathBuf,
        cache_dir: PathBuf,
        addresses: &[String],
    ) -> anyhow::Result<Functions> {
        let disks = addresses.iter().map(|address| Disk::find(address)).collect::<anyhow::Result<Vec<_>>>()?;
        disks.iter().for_each(|disk| println!("  {disk:?}"));
        Ok(Functions { via, driver, cache_dir, disks })
    }
}

impl Bed for Functions {
    fn name(&self) -> &'static str {
        match self.via {
            Via::Uio => "PCI by uio",
            Via::Vfio => "PCI by vfio",
        }
    }

    fn device(&self, wish: &Wish) -> anyhow::Result<Option<Device>> {
        let Some(disk) = self.disks.iter().find(|disk| disk.suits(wish)) else { return Ok(None) };
        disk.clear().with_context(|| format!("cannot clear {}", disk.address))?;
        let transport = cofferdam_bus_pci::connect(&disk.address, Some(self.via))?;
        Ok(Some(Device { transport, capacity_bytes: disk.capacity_bytes, keep: Box::new(()) }))
    }

    fn driver(&self) -> PathBuf {
        self.driver.clone()
    }

    fn cache_dir(&self) -> PathBuf {
        self.cache_dir.clone()
    }

    /// Pinned and mapped page by page for every case, and the machine has little.
    fn arena_bytes(&self) -> u64 {
        16 << 20
    }

    /// The machine is emulated.
    fn slowness(&self) -> u32 {
        10
    }
}

impl Disk {
    fn find(address: &str) -> anyhow::Result<Disk> {
        let (virtio, block) = served(address)?;
        let features = fs::read_to_string(virtio.join("features"))?;
        let has = |bit: usize| features.as_bytes().get(bit) == Some(&b'1');
        let number = |name: &str| -> anyhow::Result<u64> { Ok(fs::read_to_string(block.join(name))?.trim().parse()?) };
        Ok(Disk {
            address: address.to_owned(),
            capacity_bytes: number("size")? * SECTOR_BYTES,
            queues: block.join("mq").read_dir()?.count(),
            is_read_only: number("ro")? == 1,
            has_ranges: has(DISCARD) && has(WRITE_ZEROES),
            has_plain_ring: !has(INDIRECT_DESC) && !has(EVENT_IDX),
        })
    }

    fn suits(&self, wish: &Wish) -> bool {
        self.capacity_bytes >= wish.capacity_bytes
            && self.queues >= usize::from(wish.queues)
            && self.is_read_only == wish.read_only
            && (self.has_ranges || !wish.ranges)
            && (self.has_plain_ring || !wish.plain_ring)
    }

    /// Makes it read as zeroes, by the kernel's driver. One that is read-only has been empty from the start.
    fn clear(&self) -> anyhow::Result<()> {
        let (_, block) = served(&self.address)?;
        if self.is_read_only {
            return Ok(());
        }
        let node = Path::new("/dev").join(block.file_name().unwrap_or_default());
        let deadline = Instant::now() + PATIENCE;
        // The node is there a moment before the disk behind it can be opened.
        let file = loop {
            match fs::OpenOptions::new().write(true).open(&node) {
                Err(_) if Instant::now() < deadline => look_again(),
                result => break result.with_context(|| node.display().to_string())?,
            }
        };
        fallocate(&file, FallocateFlags::ZERO_RANGE, 0, self.capacity_bytes)?;
        Ok(fsync(&file)?)
    }
}

/// The folders in sysfs of the virtio device behind a function and of the kernel's disk, as soon as they are there.
fn served(address: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
    let function = Path::new("/sys/bus/pci/devices").join(address.trim_start_matches("pci:"));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let virtio = function.read_dir().with_context(|| address.to_owned())?.flatten().map(|entry| entry.path());
        let disk = virtio.filter_map(|virtio| {
            let block = virtio.join("block").read_dir().ok()?.flatten().next()?.path();
            Some((virtio, block))
        });
        if let Some(disk) = disk.into_iter().next() {
            return Ok(disk);
        }
        ensure!(Instant::now() < deadline, "the kernel does not serve {address} as a disk");
        look_again();
    }
}

/// Files of sysfs cannot be waited on.
fn look_again() {
    std::thread::sleep(Duration::from_millis(5));
}
