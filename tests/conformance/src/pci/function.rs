//! A virtio function that the kernel serves, as sysfs shows it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_conformance::{Class, Wish};

/// How long the kernel may take until it serves a function that it was given back.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// Feature bits (virtio 1.2, section 6).
pub(super) const INDIRECT_DESC: usize = 28;
pub(super) const EVENT_IDX: usize = 29;

/// Feature bits of a network device (section 5.1.3).
const CSUM: usize = 0;
const GUEST_CSUM: usize = 1;
const GUEST_TSO4: usize = 7;
const HOST_TSO4: usize = 11;
const MRG_RXBUF: usize = 15;

/// What the kernel's driver has accepted, which is all that it knows of.
pub(super) struct Features(String);

impl Features {
    /// Of a virtio device in sysfs.
    pub(super) fn read(virtio: &Path) -> anyhow::Result<Features> {
        Ok(Features(fs::read_to_string(virtio.join("features"))?))
    }

    /// Whether the bit of this number is set.
    pub(super) fn has(&self, bit: usize) -> bool {
        self.0.as_bytes().get(bit) == Some(&b'1')
    }
}

/// A function that is no disk.
#[derive(Debug)]
pub(super) struct Function {
    /// `pci:0000:01:00.0`.
    pub(super) address: String,
    /// Of a network device; else 0.
    pub(super) mtu: u16,
    has_plain_ring: bool,
    /// Checksums and segments of TCP may be left to somebody else, both ways. `None`: some of it.
    offloads: Option<bool>,
    has_single_buffers: bool,
}

impl Function {
    /// Looks at it.
    ///
    /// # Errors
    /// If the kernel does not serve it.
    pub(super) fn find(class: Class, address: &str) -> anyhow::Result<Function> {
        let virtio = virtio(address)?;
        let features = Features::read(&virtio)?;
        let mtu = if class == Class::Net { mtu(&virtio, address)? } else { 0 };
        let offloads = [CSUM, GUEST_CSUM, HOST_TSO4, GUEST_TSO4].map(|bit| features.has(bit));
        Ok(Function {
            address: address.to_owned(),
            mtu,
            has_plain_ring: !features.has(INDIRECT_DESC) && !features.has(EVENT_IDX),
            offloads: offloads[1..].iter().all(|has| *has == offloads[0]).then_some(offloads[0]),
            has_single_buffers: !features.has(MRG_RXBUF),
        })
    }

    /// Whether it is as wished for. What its other side is, is the same for all; it takes no orders.
    pub(super) fn suits(&self, wish: &Wish) -> bool {
        !wish.levers
            && wish.queues == 1
            && (self.has_plain_ring || !wish.plain_ring)
            && (self.mtu >= wish.mtu || wish.class != Class::Net)
            && (wish.offloads.is_none() || wish.offloads == self.offloads)
            && (self.has_single_buffers || !wish.single_buffers)
            // A console port of QEMU's drops what its other side has no room for; one that is none is left.
            && wish.ports == 1
    }
}

/// The folder in sysfs of the virtio device behind a function, as soon as the kernel's driver has it.
pub(super) fn virtio(address: &str) -> anyhow::Result<PathBuf> {
    let function = Path::new("/sys/bus/pci/devices").join(address.trim_start_matches("pci:"));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut entries = function.read_dir().with_context(|| address.to_owned())?.flatten().map(|entry| entry.path());
        if let Some(virtio) = entries.find(|path| path.join("features").exists() && path.join("driver").exists()) {
            return Ok(virtio);
        }
        ensure!(Instant::now() < deadline, "the kernel does not serve {address}");
        look_again();
    }
}

fn mtu(virtio: &Path, address: &str) -> anyhow::Result<u16> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(interface) = virtio.join("net").read_dir().ok().and_then(|mut names| names.next()) {
            return Ok(fs::read_to_string(interface?.path().join("mtu"))?.trim().parse()?);
        }
        ensure!(Instant::now() < deadline, "the kernel has no interface on {address}");
        look_again();
    }
}

/// Files of sysfs cannot be waited on.
pub(super) fn look_again() {
    std::thread::sleep(Duration::from_millis(5));
}
