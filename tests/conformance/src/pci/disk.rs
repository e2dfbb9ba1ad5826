//! Virtio disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};
use cofferdam_conformance::Wish;
use rustix::fs::{FallocateFlags, fallocate, fsync};

use super::function::{EVENT_IDX, Features, INDIRECT_DESC, PATIENCE, look_again, virtio};

/// The unit of sizes in sysfs, in bytes, whatever the disk's own blocks are.
const SECTOR_BYTES: u64 = 512;

/// Feature bits (virtio 1.2, section 5.2.3).
const DISCARD: usize = 13;
const WRITE_ZEROES: usize = 14;

/// A disk, as the kernel's driver has found it.
#[derive(Debug)]
pub(super) struct Disk {
    /// `pci:0000:01:00.0`.
    pub(super) address: String,
    pub(super) capacity_bytes: u64,
    queues: usize,
    is_read_only: bool,
    has_ranges: bool,
    has_plain_ring: bool,
}

impl Disk {
    pub(super) fn find(address: &str) -> anyhow::Result<Disk> {
        let (virtio, block) = served(address)?;
        let features = Features::read(&virtio)?;
        let number = |name: &str| -> anyhow::Result<u64> { Ok(fs::read_to_string(block.join(name))?.trim().parse()?) };
        Ok(Disk {
            address: address.to_owned(),
            capacity_bytes: number("size")? * SECTOR_BYTES,
            queues: block.join("mq").read_dir()?.count(),
            is_read_only: number("ro")? == 1,
            has_ranges: features.has(DISCARD) && features.has(WRITE_ZEROES),
            has_plain_ring: !features.has(INDIRECT_DESC) && !features.has(EVENT_IDX),
        })
    }

    pub(super) fn suits(&self, wish: &Wish) -> bool {
        self.capacity_bytes >= wish.capacity_bytes
            && self.queues >= usize::from(wish.queues)
            && self.is_read_only == wish.read_only
            && (self.has_ranges || !wish.ranges)
            && (self.has_plain_ring || !wish.plain_ring)
    }

    /// Makes it read as zeroes, by the kernel's driver. One that is read-only has been empty from the start.
    pub(super) fn clear(&self) -> anyhow::Result<()> {
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
    let deadline = Instant::now() + PATIENCE;
    loop {
        let virtio = virtio(address)?;
        if let Some(block) = virtio.join("block").read_dir().ok().and_then(|mut blocks| blocks.next()) {
            return Ok((virtio, block?.path()));
        }
        ensure!(Instant::now() < deadline, "the kernel does not serve {address} as a disk");
        look_again();
    }
}
