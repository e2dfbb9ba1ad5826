//! A virtio-blk device (virtio 1.2, section 5.2): a medium and its volatile cache behind the rings.

pub(crate) mod profile;
mod request;
pub mod store;

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use profile::Profile;
use request::{OK, Request, Target};
use store::{PowerCut, Storage, Store};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::device::{Behaviour, Quiescence, SimDevice, SimError};
use crate::kinds::Op;
use crate::memory::Memory;
use crate::model::{Accepted, Context, DeviceModel, Work};
use crate::ring::{Chain, Ring, Violation};
use crate::rng::Rng;
use crate::script::Rule;

/// What a sim is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it offers.
    pub profile: Profile,
    /// Its medium.
    pub storage: Storage,
    /// The seed of everything that is drawn. Print it when a test fails.
    pub seed: u64,
    /// Its faults.
    pub rules: Vec<Rule>,
    /// What quiesce can promise, in process.
    pub quiescence: Quiescence,
    /// How long a queue's thread looks for more before it arms notifications and sleeps. Zero: event mode.
    /// [`Duration::MAX`]: it polls for ever.
    pub spin: Duration,
    /// Keep a record of every request executed; see [`Sim::journal`].
    pub journal: bool,
}

impl Default for Options {
    /// 64 MiB in memory, no faults, event mode.
    fn default() -> Self {
        Self {
            profile: Profile::default(),
            storage: Storage::Memory(64 << 20),
            seed: 0,
            rules: Vec::new(),
            quiescence: Quiescence::default(),
            spin: Duration::ZERO,
            journal: false,
        }
    }
}

/// One request that was executed, in the order of execution over all queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    /// Which queue it came by.
    pub queue: u16,
    /// What it was.
    pub op: Op,
    /// From its header.
    pub sector: u64,
    /// Its payload.
    pub payload_bytes: u64,
    /// The status it was executed with.
    pub status: u8,
    /// Which driver, counted from 1, published it.
    pub session: u64,
}

/// A virtio-blk device. Clones are handles of the same one.
#[derive(Clone)]
pub struct Sim {
    device: SimDevice,
    model: Arc<Block>,
}

struct Block {
    profile: Profile,
    store: Store,
    /// `None`: no record is kept.
    journal: Option<Mutex<Vec<JournalEntry>>>,
}

impl Deref for Sim {
    type Target = SimDevice;
    fn deref(&self) -> &SimDevice {
        &self.device
    }
}

impl Sim {
    /// A device made of `options`, with no driver yet.
    pub fn new(options: Options) -> Result<Self, SimError> {
        let Options { profile, storage, seed, rules, quiescence, spin, journal } = options;
        if profile.block_bytes.is_some_and(|bytes| !bytes.is_power_of_two() || bytes < 512) {
            return Err(SimError::Profile("the block size is a power of two, at least 512"));
        }
        let store =
            Store::open(&storage, profile.read_only, profile.logical_block_bytes()).map_err(SimError::Storage)?;
        let model = Arc::new(Block { profile, store, journal: journal.then(Mutex::default) });
        let device = SimDevice::new(Arc::clone(&model) as _, &Behaviour { seed, rules, quiescence, spin })?;
        Ok(Self { device, model })
    }

    /// Changes the capacity and announces that to the driver in process.
    pub fn resize(&self, bytes: u64) -> std::io::Result<()> {
        self.model.store.resize(bytes)?;
        self.device.machine().config_changed();
        Ok(())
    }

    /// The medium as a read would find it now: `bytes` bytes from `offset` bytes.
    pub fn contents(&self, offset: u64, bytes: usize) -> std::io::Result<Vec<u8>> {
        self.model.store.contents(offset, bytes)
    }

    /// Size of the medium in bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.model.store.capacity_bytes()
    }

    /// Every request executed so far, if [`Options::journal`] is set.
    pub fn journal(&self) -> Vec<JournalEntry> {
        let journal = self.model.journal.as_ref();
        journal.map(|journal| journal.lock().unwrap_or_else(PoisonError::into_inner).clone()).unwrap_or_default()
    }
}

impl DeviceModel for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        self.profile.features()
    }

    fn config(&self) -> Vec<u8> {
        self.profile.config(self.store.capacity_bytes()).to_vec()
    }

    fn queues(&self) -> u16 {
        self.profile.queues
    }

    fn queue_size(&self) -> u16 {
        self.profile.queue_size
    }

    fn accept(&self, _queue: u16, memory: &Memory, chain: &Chain) -> Result<Accepted, Violation> {
        let request = Request::read(memory, chain)?;
        let remark = request.check_limits(&self.profile).err();
        Ok(Accepted { op: request.op, tag: request.sector, remark })
    }

    fn serve(&self, work: &Work, context: &mut Context<'_>) -> u64 {
        let request = Request { chain: &work.chain, op: work.op, sector: work.tag };
        let Context { memory, features, fate, session, .. } = *context;
        let target = Target { memory, store: &self.store, profile: &self.profile, features };
        let (status, payload) = request.execute(&target, fate);
        if let Some(journal) = &self.journal {
            journal.lock().unwrap_or_else(PoisonError::into_inner).push(JournalEntry {
                queue: work.queue,
                op: request.op,
                sector: request.sector,
                payload_bytes: request.payload_bytes(),
                status,
                session,
            });
        }
        work.write_status(context, status);
        // With the status at the end, all of it on success, and a failed request promises nothing about what comes before.
        if status == OK { payload + 1 } else { 1 }
    }

    /// There is no payload and nothing is recorded: requests may be answered unread.
    fn is_quick(&self, _queue: u16) -> bool {
        self.store.is_null() && self.journal.is_none()
    }

    fn answer_quick(&self, _queue: u16, ring: &mut Ring, limit: u16) -> Result<u16, Violation> {
        ring.answer_all(limit, &self.profile.id)
    }

    fn power_cut(&self, rng: &mut Rng) -> PowerCut {
        // The medium is a file of this host; if that fails there is no test left to save.
        self.store.power_cut(rng).unwrap_or_default()
    }
}
