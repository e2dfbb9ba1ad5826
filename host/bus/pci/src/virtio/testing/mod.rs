//! A virtio block device as a function: its configuration space, one BAR with its registers, and everything that it can do wrong.

mod claimed;
mod registers;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cofferdam_device::{DmaRegion, QueueAddresses, QueueSetup, Transport};

use super::VirtioPci;
use super::device::feature;
use crate::claimed::Interrupts;
use crate::error::PciError;
pub(super) use claimed::Sim;

/// Where the parts are, as in QEMU.
pub(super) const BAR: u8 = 4;
pub(super) const BAR_BYTES: u64 = 0x4000;
pub(super) const COMMON: u32 = 0;
pub(super) const ISR: u32 = 0x1000;
pub(super) const DEVICE: u32 = 0x2000;
pub(super) const NOTIFY: u32 = 0x3000;
pub(super) const NOTIFY_STEP: u32 = 4;

/// What it offers.
pub(super) const FEATURES: u64 = feature::VERSION_1 | 1 << 9 | 1 << 6;
pub(super) const QUEUES: u16 = 4;
pub(super) const ENTRIES: u16 = 256;
/// Capacity in sectors, at the beginning of its configuration.
pub(super) const CAPACITY: u64 = 0x1_2345_6789;

/// What a function that is gone reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gone {
    Ones,
    Zero,
}

/// Everything that can be wrong, all off by default.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// The status keeps its bits when it is reset.
    pub(super) never_resets: bool,
    /// So many looks at the status until it has reset.
    pub(super) slow_reset: usize,
    /// FEATURES_OK does not stay.
    pub(super) refuses_features: bool,
    /// queue_enable does not stay.
    pub(super) refuses_enable: bool,
    /// queue_size does not stay.
    pub(super) refuses_size: bool,
    /// Vectors from this one on read `NO_VECTOR`.
    pub(super) vectors_end: Option<u16>,
    /// The configuration changes whenever its generation is read.
    pub(super) restless: bool,
    /// It changes so many times while it is read, and then no more.
    pub(super) changes: usize,
    /// queue_notify_off of every queue.
    pub(super) notify_off: Option<u16>,
    /// From this register access on it is gone.
    pub(super) gone_at: Option<(usize, Gone)>,
    /// Of what is gone, only the registers tell.
    pub(super) gone_in_secret: bool,
    /// The function's own reset fails.
    pub(super) no_function_reset: bool,
    /// Bus mastering cannot be switched off.
    pub(super) never_quiet: bool,
    /// The function refuses `Interrupts::Vectors`.
    pub(super) refuses_vectors: bool,
    /// Status bits that it adds to what was set.
    pub(super) extra_status: u8,
}

/// What was done to it, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Did {
    Status(u8),
    Master(bool),
    Map(u64),
    Unmap(u64),
    Vectors(usize),
    Line(usize),
    ConfigVector(u16),
    QueueVector(u16, u16),
    Enable(u16),
    /// Offset in the notification area, value.
    Notify(u64, u64),
    FunctionReset,
    /// What an earlier host left is freed.
    TakeBack,
    Quiet,
    Release,
    /// To another process.
    Export,
    /// Whether with a line.
    Resume(bool),
    AdoptMemory(u64),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct QueueState {
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: u16,
    /// desc, driver, device, each as two words.
    pub(super) words: [u32; 6],
}

/// The device behind the registers.
pub(super) struct Model {
    pub(super) faults: Faults,
    pub(super) config_space: [u8; 256],
    pub(super) bar_bytes: [u64; 6],
    pub(super) ids: (u16, u16),
    pub(super) offered: u64,
    pub(super) num_queues: u16,
    pub(super) entries: u16,
    pub(super) msix: u16,
    pub(super) line: bool,
    pub(super) isolated: bool,
    pub(super) master: bool,
    pub(super) status: u8,
    pub(super) accepted: u64,
    pub(super) queues: Vec<QueueState>,
    pub(super) device_config: Vec<u8>,
    pub(super) isr: u8,
    pub(super) wired: Option<Interrupts>,
    pub(super) regions: Vec<Arc<DmaRegion>>,
    pub(super) did: Vec<Did>,
    /// Accesses outside of what was laid out, or of a width that is wrong for the field.
    pub(super) violations: Vec<String>,
    /// Register accesses so far.
    pub(super) accesses: usize,
    selects: [u32; 2],
    queue: u16,
    config_vector: u16,
    generation: u8,
    looks: usize,
}

impl Model {
    pub(super) fn new() -> Self {
        let mut device_config = vec![0; 60];
        device_config[..8].copy_from_slice(&CAPACITY.to_le_bytes());
        device_config[34..36].copy_from_slice(&QUEUES.to_le_bytes());
        let mut model = Model {
            faults: Faults::default(),
            config_space: config_space(),
            bar_bytes: [0, 0x1000, 0, 0, BAR_BYTES, 0],
            ids: (0x1af4, 0x1042),
            offered: FEATURES,
            num_queues: QUEUES,
            entries: ENTRIES,
            msix: QUEUES + 1,
            line: true,
            isolated: false,
            master: false,
            // As a host that was killed may have left it.
            status: 0x0f,
            accepted: 0,
            queues: Vec::new(),
            device_config,
            isr: 0,
            wired: None,
            regions: Vec::new(),
            did: Vec::new(),
            violations: Vec::new(),
            accesses: 0,
            selects: [0; 2],
            queue: 0,
            config_vector: 0,
            generation: 0,
            looks: 0,
        };
        model.reset();
        model.status = 0x0f;
        model
    }

    fn reset(&mut self) {
        self.status = 0;
        self.accepted = 0;
        self.config_vector = 0xffff;
        let (size, vector) = (self.entries, 0xffff);
        self.queues = vec![QueueState { size, vector, ..QueueState::default() }; usize::from(self.num_queues)];
    }

    pub(super) fn gone(&self) -> Option<Gone> {
        self.faults.gone_at.filter(|(at, _)| self.accesses >= *at).map(|(_, gone)| gone)
    }

    /// Raises vector `vector`, as the function's kernel side would.
    pub(super) fn interrupt(&self, vector: usize) {
        let Some(Interrupts::Vectors(events)) = &self.wired else { panic!("no vectors are wired") };
        ring(&events[vector]);
    }
}

pub(super) fn ring(event: &OwnedFd) {
    rustix::io::write(event, &1u64.to_ne_bytes()).unwrap();
}

/// A capability of virtio's (section 4.1.4).
pub(super) fn capability(next: u8, len: u8, kind: u8, bar: u8, offset: u32, length: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..5].copy_from_slice(&[0x09, next, len, kind, bar]);
    bytes[8..12].copy_from_slice(&offset.to_le_bytes());
    bytes[12..16].copy_from_slice(&length.to_le_bytes());
    bytes[16..20].copy_from_slice(&NOTIFY_STEP.to_le_bytes());
    bytes
}

/// Places of the capabilities in configuration space.
pub(super) const AT: [u8; 6] = [0x40, 0x54, 0x68, 0x7c, 0x90, 0xa4];

/// MSI-X, PCI configuration access, common, ISR, device, notifications.
pub(super) fn config_space() -> [u8; 256] {
    let mut config = [0; 256];
    config[..4].copy_from_slice(&[0xf4, 0x1a, 0x42, 0x10]);
    config[0x06] = 0x10;
    config[0x34] = AT[0];
    let mut msix = [0; 20];
    // Five entries: the field is one less.
    msix[..4].copy_from_slice(&[0x11, AT[1], 4, 0x80]);
    let all = [
        msix,
        capability(AT[2], 20, 5, 0, 0, 0),
        capability(AT[3], 16, 1, BAR, COMMON, 0x1000),
        capability(AT[4], 16, 3, BAR, ISR, 0x1000),
        capability(AT[5], 16, 4, BAR, DEVICE, 0x1000),
        capability(0, 20, 2, BAR, NOTIFY, 0x1000),
    ];
    for (at, bytes) in AT.iter().zip(all) {
        config[usize::from(*at)..][..20].copy_from_slice(&bytes);
    }
    config
}

/// A memfd in pages of 2 MiB, at physical addresses that are made up and do not follow each other.
pub(super) fn scattered(pages: &[u64]) -> Arc<DmaRegion> {
    const PAGE: u64 = 2 << 20;
    let bytes = pages.len() as u64 * PAGE;
    let file = rustix::fs::memfd_create("pages", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let folder = OwnedFd::from(std::fs::File::open(folder.path()).unwrap());
    let name = cofferdam_device::FileName { folder, name: c"pages".to_owned() };
    Arc::new(DmaRegion::in_pages(file, name, bytes, PAGE, |_| Ok(pages.to_vec())).unwrap())
}

/// Two pages that nobody else was given.
pub(super) fn next_scattered() -> Arc<DmaRegion> {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) as u64;
    scattered(&[number << 32 | 0x0020_0000, number << 32 | 0x0080_0000])
}

pub(super) fn open(sim: &Sim) -> Result<VirtioPci, PciError> {
    VirtioPci::open(sim.claim(), "pci:00:04.0".to_owned())
}

/// A device that is open and has its features and memory.
pub(super) fn prepared(sim: &Sim) -> (VirtioPci, Arc<DmaRegion>) {
    let mut device = open(sim).unwrap();
    device.negotiate(feature::VERSION_1).unwrap();
    let region = device.memory("rings", 4 << 20, 0x1000_0000).unwrap();
    device.map(Arc::clone(&region)).unwrap();
    (device, region)
}

/// Ring `index` of 16 entries, in a page of its own.
pub(super) fn setup(index: u16, region: &DmaRegion) -> QueueSetup {
    let at = region.address_of(u64::from(index) * 4096);
    let addresses = QueueAddresses { descriptors: at, available: at + 256, used: at + 512 };
    QueueSetup { index, size: 16, addresses }
}
