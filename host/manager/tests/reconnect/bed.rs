//! What the tests share: a binding whose device can be taken away and put back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Binding, Completion, Config, EventKind, Handle, HandleSpec, IoError, IoFlags, IoOp, IoRequest, LoadSpec, Manager,
    Outcome, Phase, Reconnect, RestartPolicy, SubmitError, Transport, UnloadOptions,
};
use cofferdam_sim::{Drive, Options, Profile, Sim, SimDevice, Storage};
use parking_lot::Mutex;

pub(crate) const BLOCK: u32 = 4096;
pub(crate) const MIB: u64 = 1 << 20;
/// Only a failing test waits so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A place where a device may be.
#[derive(Clone, Default)]
pub(crate) struct Slot(Arc<Mutex<Option<SimDevice>>>);

impl Slot {
    pub(crate) fn put(&self, device: &SimDevice) {
        *self.0.lock() = Some(device.clone());
    }

    pub(crate) fn empty(&self) {
        *self.0.lock() = None;
    }

    /// How a device here is waited for.
    pub(crate) fn reconnect(&self, wait: Duration) -> Reconnect {
        let slot = self.clone();
        let open = move || -> Result<Box<dyn Transport>, String> {
            let device = slot.0.lock().clone().ok_or("nobody is there")?;
            Ok(Box::new(device.transport(Drive::Threads).map_err(|error| error.to_string())?))
        };
        Reconnect { wait, open: Box::new(open) }
    }
}

pub(crate) fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

/// A load of the driver `name` that waits for a device in `slot`, where `device` is.
pub(crate) fn spec(name: &str, slot: &Slot, device: &SimDevice, wait: Duration) -> LoadSpec {
    slot.put(device);
    let path = format!("{}/../../target/drivers/{name}.wasm", env!("CARGO_MANIFEST_DIR"));
    let component = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build'"));
    let mut spec = LoadSpec::new(name, component, Box::new(device.transport(Drive::Threads).unwrap()));
    spec.queues = None;
    spec.reconnect = Some(slot.reconnect(wait));
    // More often than any test means to lose one.
    spec.restarts = Some(RestartPolicy { limit: 100, longest: Duration::from_millis(100), ..RestartPolicy::default() });
    spec
}

pub(crate) fn disk(change: impl FnOnce(&mut Options)) -> Sim {
    let mut options = Options { storage: Storage::Memory(16 << 20), ..Options::default() };
    change(&mut options);
    Sim::new(options).unwrap()
}

/// A disk and its binding.
pub(crate) struct Bed {
    pub(crate) manager: Manager,
    pub(crate) binding: Arc<Binding>,
    pub(crate) sim: Sim,
    pub(crate) slot: Slot,
}

impl Bed {
    pub(crate) fn new(lanes: u16, wait: Duration) -> Bed {
        let sim = disk(|options| options.profile = Profile { queues: lanes, ..Profile::default() });
        Bed::of(sim, wait)
    }

    pub(crate) fn of(sim: Sim, wait: Duration) -> Bed {
        Bed::with(sim, "virtio-blk", wait, |_| {})
    }

    pub(crate) fn with(sim: Sim, driver: &str, wait: Duration, change: impl FnOnce(&mut LoadSpec)) -> Bed {
        let (manager, slot) = (manager(), Slot::default());
        let mut spec = spec(driver, &slot, &sim, wait);
        change(&mut spec);
        let binding = manager.load(spec).unwrap();
        Bed { manager, binding, sim, slot }
    }

    pub(crate) fn open(&self, lane: usize) -> Handle {
        self.binding.open(HandleSpec { lane, ..HandleSpec::default() }).unwrap()
    }

    pub(crate) fn until(&self, phase: Phase) {
        until(phase.as_str(), || self.binding.phase() == phase);
    }

    /// The device is lost, and comes back at once.
    pub(crate) fn lose(&self) {
        let back = self.returns();
        self.sim.die();
        self.until_back(back + 1);
    }

    pub(crate) fn until_back(&self, returns: usize) {
        until("it is back", || self.returns() >= returns && self.binding.phase() == Phase::Serving);
    }

    /// Events of this kind.
    fn count(&self, is_it: impl Fn(&EventKind) -> bool) -> usize {
        let mut events = self.manager.events(None);
        std::iter::from_fn(|| events.next(Duration::ZERO)).filter(|event| is_it(&event.what)).count()
    }

    pub(crate) fn returns(&self) -> usize {
        self.count(|event| matches!(event, EventKind::DeviceBack { .. }))
    }

    /// Why the device was given up.
    pub(crate) fn given_up(&self) -> Vec<String> {
        let mut events = self.manager.events(None);
        let reason = |event| match event {
            EventKind::DeviceGivenUp { reason } => Some(reason),
            _ => None,
        };
        std::iter::from_fn(|| events.next(Duration::ZERO)).filter_map(|event| reason(event.what)).collect()
    }

    pub(crate) fn is_clean(&self) {
        let certificate = self.manager.unload_binding(&self.binding, &UnloadOptions::default()).unwrap();
        assert_eq!(certificate.outcome, Outcome::Unloaded, "{certificate:?}");
        assert!(certificate.residual.is_zero(), "{certificate:?}");
        assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
        assert_eq!(self.sim.violations(), []);
    }
}

pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A read, or a write of `fill`.
pub(crate) fn io(handle: &Handle, user: u64, op: IoOp, offset: u64, fill: u8) -> IoRequest {
    let buffer = handle.lease(BLOCK).unwrap();
    buffer.fill(0, BLOCK, fill).unwrap();
    IoRequest { user, op, offset, length: BLOCK, flags: IoFlags::default(), buffer: Some(buffer) }
}

/// What has no buffer.
pub(crate) fn bare(user: u64, op: IoOp, offset: u64, length: u32) -> IoRequest {
    IoRequest { user, op, offset, length, flags: IoFlags::default(), buffer: None }
}

/// `count` answers, each to another request, by its number.
pub(crate) fn collect(handle: &Handle, count: usize) -> Vec<Completion> {
    let mut out = Vec::new();
    until("the answers", || {
        handle.poll(false, &mut out);
        out.len() >= count
    });
    let users: HashSet<_> = out.iter().map(|completion| completion.user).collect();
    assert_eq!((users.len(), out.len()), (count, count), "each is answered once");
    out.sort_by_key(|completion| completion.user);
    out
}

/// Submits everything, waiting where it has to: a binding says that it serves a moment before its gate is open.
pub(crate) fn submit(handle: &Handle, mut requests: Vec<IoRequest>) {
    until("everything is admitted", || {
        match handle.submit(&mut requests) {
            Ok(()) | Err(SubmitError::Held | SubmitError::Full) => {}
            Err(error) => panic!("{error}"),
        }
        requests.is_empty()
    });
}

/// Submits everything and collects as many answers.
pub(crate) fn ask(handle: &Handle, requests: Vec<IoRequest>) -> Vec<Completion> {
    let wanted = requests.len();
    submit(handle, requests);
    collect(handle, wanted)
}

pub(crate) fn write(handle: &Handle, offset: u64, fill: u8) -> Result<(), IoError> {
    ask(handle, vec![io(handle, 1, IoOp::Write, offset, fill)]).remove(0).result
}

/// The byte that a block is filled with.
pub(crate) fn read(handle: &Handle, offset: u64) -> u8 {
    let answer = ask(handle, vec![io(handle, 1, IoOp::Read, offset, 0xee)]).remove(0);
    answer.result.unwrap();
    filled_with(&answer)
}

pub(crate) fn filled_with(answer: &Completion) -> u8 {
    let mut bytes = vec![0; BLOCK as usize];
    answer.buffer.as_ref().unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "torn");
    bytes[0]
}

pub(crate) fn flush(handle: &Handle) -> Result<(), IoError> {
    ask(handle, vec![bare(1, IoOp::Flush, 0, 0)]).remove(0).result
}
