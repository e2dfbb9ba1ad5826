//! A block service in memory: answers at once, late or never, and writes down what it was asked.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use cofferdam_client::{Client, Completion as Answer, Error, Op, Options, Request, Slot};
use cofferdam_device::{DmaRegion, WindowedRegion};
use cofferdam_port_data::service::{
    BlockGeometry, Buffer, Completion, HandleSpec, HandleState, IoError, IoOp, IoRequest, MapError, Notify, OpenError,
    Port, PortReport, RegionError, SubmitError,
};
use cofferdam_port_data::{DataAddress, DataOptions, DataPort, Disk, Region, Service};
use rustix::event::{EventfdFlags, eventfd};

/// Longest wait for anything in these tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
pub(crate) const GRACE: Duration = Duration::from_millis(100);

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for: {what}");
        std::thread::yield_now();
    }
}

/// Tries until one time that `attempt` gives is below `limit`. A busy machine delays one attempt or another; what takes too long by itself delays all of them.
pub(crate) fn once_within(limit: Duration, mut attempt: impl FnMut() -> Duration) {
    let start = Instant::now();
    let mut least = attempt();
    while least >= limit {
        assert!(start.elapsed() < PATIENCE, "it never took less than {least:?}, {limit:?} are allowed");
        least = least.min(attempt());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Answers = Arc<Mutex<Vec<Completion>>>;

pub(crate) struct State {
    pub(crate) medium: Mutex<Vec<u8>>,
    geometry: BlockGeometry,
    device: OwnedFd,
    late: Mutex<VecDeque<(Answers, IoRequest)>>,
    /// Requests admitted so far.
    pub(crate) asked: AtomicU64,
    /// Admitted requests wait for [`Mock::release`].
    pub(crate) slow: AtomicBool,
    pub(crate) held: AtomicBool,
    pub(crate) revoked: AtomicBool,
    /// Requests admitted and unanswered at most.
    pub(crate) room: AtomicUsize,
    pub(crate) in_flight: AtomicUsize,
    pub(crate) handles: AtomicUsize,
    /// The next answer to `open` or `map`.
    pub(crate) open_error: Mutex<Option<OpenError>>,
    pub(crate) map_error: Mutex<Option<MapError>>,
    regions: Mutex<Vec<Arc<DmaRegion>>>,
    notifies: Mutex<Vec<Weak<Notify>>>,
    ids: AtomicU64,
}

#[derive(Clone)]
pub(crate) struct Mock(pub(crate) Arc<State>);

pub(crate) const MEDIUM_BYTES: u64 = 4 << 20;

impl Mock {
    pub(crate) fn new() -> Mock {
        let geometry = BlockGeometry {
            capacity_bytes: MEDIUM_BYTES,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            max_transfer_bytes: 64 << 10,
            read_only: false,
            can_flush: true,
            can_discard: false,
            can_write_zeroes: true,
            max_discard_bytes: 4096,
            discard_align_bytes: 4096,
            max_write_zeroes_bytes: 64 << 10,
            write_zeroes_may_unmap: true,
            has_id: true,
        };
        Mock(Arc::new(State {
            medium: Mutex::new(vec![0; MEDIUM_BYTES as usize]),
            geometry,
            device: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"),
            late: Mutex::default(),
            asked: AtomicU64::new(0),
            slow: AtomicBool::new(false),
            held: AtomicBool::new(false),
            revoked: AtomicBool::new(false),
            room: AtomicUsize::new(usize::MAX),
            in_flight: AtomicUsize::new(0),
            handles: AtomicUsize::new(0),
            open_error: Mutex::default(),
            map_error: Mutex::default(),
            regions: Mutex::default(),
            notifies: Mutex::default(),
            ids: AtomicU64::new(1),
        }))
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.0.in_flight.load(Ordering::SeqCst)
    }

    pub(crate) fn asked(&self) -> u64 {
        self.0.asked.load(Ordering::SeqCst)
    }

    pub(crate) fn set(&self, what: impl Fn(&State) -> &AtomicBool, value: bool) {
        what(&self.0).store(value, Ordering::SeqCst);
        self.0.notify();
    }

    /// Answers all late requests, as the device does or with `error`.
    pub(crate) fn release(&self, error: Option<IoError>) {
        loop {
            let Some((answers, request)) = lock(&self.0.late).pop_front() else { break };
            self.0.serve(&answers, request, error);
        }
        self.0.ring();
    }

    /// Forgets regions that nobody else holds.
    pub(crate) fn prune(&self) {
        lock(&self.0.regions).retain(|region| Arc::strong_count(region) > 1);
    }

    pub(crate) fn assert_all_returned(&self) {
        eventually("all handles closed", || self.0.handles.load(Ordering::SeqCst) == 0);
        self.release(Some(IoError::Revoked));
        assert_eq!(self.in_flight(), 0);
        self.prune();
        assert!(lock(&self.0.regions).is_empty(), "somebody holds a region");
    }
}

impl State {
    fn notify(&self) {
        lock(&self.notifies).iter().filter_map(Weak::upgrade).for_each(|notify| notify.signal());
    }

    fn ring(&self) {
        rustix::io::write(&self.device, &1u64.to_ne_bytes()).expect("an eventfd takes a count");
    }

    /// The lane's check, as the manager does it.
    fn check(&self, request: &IoRequest) -> Result<(), IoError> {
        let IoRequest { op, offset, length, .. } = request;
        let g = &self.geometry;
        let longest = match op {
            IoOp::Read | IoOp::Write => g.max_transfer_bytes,
            IoOp::WriteZeroes => g.max_write_zeroes_bytes,
            IoOp::Discard | IoOp::Fill | IoOp::Send | IoOp::Transmit => return Err(IoError::Unsupported),
            IoOp::Flush => return if (*offset, *length) == (0, 0) { Ok(()) } else { Err(IoError::Invalid) },
            IoOp::GetId => return if (*offset, *length) == (0, 20) { Ok(()) } else { Err(IoError::Invalid) },
        };
        let inside = offset.checked_add(u64::from(*length)).is_some_and(|end| end <= g.capacity_bytes);
        let aligned = offset.is_multiple_of(512) && length.is_multiple_of(512);
        if *length == 0 || *length > longest || !inside || !aligned { Err(IoError::Invalid) } else { Ok(()) }
    }

    fn serve(&self, answers: &Answers, request: IoRequest, error: Option<IoError>) {
        let result = error.map_or_else(|| self.check(&request), Err);
        let IoRequest { user, op, offset, length, buffer, .. } = request;
        if result.is_ok() {
            let mut medium = lock(&self.medium);
            let range = offset as usize..offset as usize + length as usize;
            // A region may be gone by now; then there is nothing to move.
            match (op, &buffer) {
                (IoOp::Read, Some(buffer)) => drop(buffer.write_at(0, &medium[range])),
                (IoOp::Write, Some(buffer)) => drop(buffer.read_at(0, &mut medium[range])),
                (IoOp::GetId, Some(buffer)) => drop(buffer.write_at(0, b"twenty bytes of name")),
                (IoOp::WriteZeroes, None) => medium[range].fill(0),
                (IoOp::Flush, None) => {}
                other => panic!("no such request: {other:?}"),
            }
        }
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        lock(answers).push(Completion { user, result, bytes: 0, buffer });
    }
}

pub(crate) struct MockDisk {
    state: Arc<State>,
    id: u64,
    answers: Answers,
    region: Mutex<Option<Arc<DmaRegion>>>,
}

pub(crate) struct MockRegion(WindowedRegion);

impl Region for MockRegion {
    fn descriptor(&self) -> Result<OwnedFd, MapError> {
        self.0.region().duplicate().map_err(|_| MapError::Revoked)
    }

    fn window(&self, offset: u64, bytes: u32) -> Result<Buffer, RegionError> {
        self.0.window(offset, bytes)
    }
}

impl Service for Mock {
    type Disk = MockDisk;

    fn name(&self) -> &str {
        "disk"
    }

    fn lanes(&self) -> usize {
        2
    }

    fn open(&self, spec: HandleSpec) -> Result<MockDisk, OpenError> {
        assert!(spec.lane < 2 && spec.label.starts_with("data:/") && spec.peer.contains("uid="), "{spec:?}");
        if let Some(error) = lock(&self.0.open_error).take() {
            return Err(error);
        }
        if self.0.revoked.load(Ordering::SeqCst) {
            return Err(OpenError::Revoked);
        }
        self.0.handles.fetch_add(1, Ordering::SeqCst);
        lock(&self.0.notifies).extend(spec.notify.as_ref().map(Arc::downgrade));
        let id = self.0.ids.fetch_add(1, Ordering::SeqCst);
        Ok(MockDisk { state: Arc::clone(&self.0), id, answers: Answers::default(), region: Mutex::default() })
    }
}

impl Disk for MockDisk {
    type Region = MockRegion;

    fn id(&self) -> u64 {
        self.id
    }

    fn geometry(&self) -> &BlockGeometry {
        &self.state.geometry
    }

    fn map(&self, bytes: u64) -> Result<MockRegion, MapError> {
        if let Some(error) = lock(&self.state.map_error).take() {
            return Err(error);
        }
        if bytes > 16 << 20 {
            return Err(MapError::Size { bytes, max_bytes: 16 << 20 });
        }
        let region = Arc::new(DmaRegion::new("data-test", bytes, 0x10_0000).expect("a region"));
        *lock(&self.region) = Some(Arc::clone(&region));
        lock(&self.state.regions).push(Arc::clone(&region));
        Ok(MockRegion(WindowedRegion::new(region)))
    }

    fn submit(&self, requests: &mut Vec<IoRequest>) -> Result<(), SubmitError> {
        match self.state() {
            HandleState::Revoked => return Err(SubmitError::Revoked),
            HandleState::Held => return Err(SubmitError::Held),
            HandleState::Open => {}
        }
        let room = self.state.room.load(Ordering::SeqCst).saturating_sub(self.state.in_flight.load(Ordering::SeqCst));
        let count = requests.len().min(room);
        for request in requests.drain(..count) {
            self.state.in_flight.fetch_add(1, Ordering::SeqCst);
            self.state.asked.fetch_add(1, Ordering::SeqCst);
            if self.state.slow.load(Ordering::SeqCst) {
                lock(&self.state.late).push_back((Arc::clone(&self.answers), request));
            } else {
                self.state.serve(&self.answers, request, None);
            }
        }
        if requests.is_empty() { Ok(()) } else { Err(SubmitError::Full) }
    }

    fn poll(&self, _arm: bool, out: &mut Vec<Completion>) -> usize {
        let mut count = [0; 8];
        if rustix::io::read(&self.state.device, &mut count).is_ok() {
            // The event may be another handle's: pass it on, as a lane does.
            self.state.notify();
        }
        let mut ready = lock(&self.answers);
        let found = ready.len();
        out.append(&mut ready);
        found
    }

    fn device_fd(&self) -> BorrowedFd<'_> {
        self.state.device.as_fd()
    }

    fn state(&self) -> HandleState {
        if self.state.revoked.load(Ordering::SeqCst) {
            HandleState::Revoked
        } else if self.state.held.load(Ordering::SeqCst) {
            HandleState::Held
        } else {
            HandleState::Open
        }
    }
}

impl Drop for MockDisk {
    fn drop(&mut self) {
        if let Some(region) = lock(&self.region).take() {
            assert!(region.revoke());
        }
        self.state.handles.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A port in a directory of its own.
pub(crate) struct Served {
    pub(crate) mock: Mock,
    pub(crate) path: PathBuf,
    port: Option<DataPort<Mock>>,
    _directory: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new(options: DataOptions) -> Served {
        let mock = Mock::new();
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.data");
        let address: DataAddress = format!("data:{}", path.display()).parse().expect("an address");
        let port = DataPort::start(mock.clone(), &address, options).expect("the port starts");
        Served { mock, path, port: Some(port), _directory: directory }
    }

    pub(crate) fn ordinary() -> Served {
        Served::new(DataOptions::default())
    }

    pub(crate) fn connect(&self) -> Client {
        self.try_connect(Options::default()).expect("a client")
    }

    pub(crate) fn try_connect(&self, options: Options) -> Result<Client, Error> {
        Client::connect(&self.path, options)
    }

    pub(crate) fn clients(&self) -> usize {
        self.port.as_ref().map_or(0, DataPort::clients)
    }

    pub(crate) fn shutdown(&mut self, grace: Duration) -> PortReport {
        Box::new(self.port.take().expect("still running")).shutdown(grace)
    }

    /// An honest client is served: whatever others did.
    pub(crate) fn assert_serves(&self) {
        let mut client = self.connect();
        round_trip(&mut client, 8192, 0x77);
    }

    /// Ends the port and checks that it left nothing.
    pub(crate) fn finish(mut self) {
        self.shutdown(GRACE);
        assert!(!self.path.exists(), "the socket file is removed");
        self.mock.assert_all_returned();
    }
}

pub(crate) fn request(user: u64, op: Op, offset: u64, length: u32, slot: Option<Slot>) -> Request {
    Request { user, op, offset, length, may_unmap: false, slot }
}

/// Submits one request and waits for its answer.
pub(crate) fn call(client: &mut Client, request: Request) -> Answer {
    client.submit(&mut vec![request]).expect("taken");
    next(client)
}

/// Waits for one answer.
pub(crate) fn next(client: &mut Client) -> Answer {
    let mut done = Vec::new();
    assert_eq!(client.wait(PATIENCE, &mut done).expect("an answer"), 1, "answers: {done:?}");
    done.remove(0)
}

/// Writes a block of `value` at `offset` and reads it back into other memory.
pub(crate) fn round_trip(client: &mut Client, offset: u64, value: u8) {
    let slot = client.slot(4096).expect("memory");
    slot.write_at(0, &[value; 4096]).expect("inside");
    call(client, request(1, Op::Write, offset, 4096, Some(slot))).result.expect("written");
    let slot = client.slot(4096).expect("memory");
    slot.write_at(0, &[!value; 4096]).expect("inside");
    let answer = call(client, request(2, Op::Read, offset, 4096, Some(slot)));
    answer.result.expect("read");
    let mut seen = [0; 4096];
    answer.slot.expect("the slot comes back").read_at(0, &mut seen).expect("inside");
    assert_eq!(seen, [value; 4096]);
}
