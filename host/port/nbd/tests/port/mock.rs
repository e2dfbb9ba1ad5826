//! A block service in memory: answers at once, late, with errors or never, and writes down what it was asked.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_device::{DmaArena, DmaRegion};
use cofferdam_port_nbd::service::{
    BlockGeometry, Buffer, Completion, HandleSpec, HandleState, IoError, IoOp, IoRequest, LeaseError, Notify,
    OpenError, Port, PortReport, SubmitError,
};
use cofferdam_port_nbd::{Disk, NbdAddress, NbdOptions, NbdPort, Service};
use rustix::event::{EventfdFlags, eventfd};

/// Longest wait for anything in these tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

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

/// What was asked of the device, in order of admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) op: IoOp,
    pub(crate) offset: u64,
    pub(crate) length: u32,
    pub(crate) may_unmap: bool,
}

pub(crate) struct State {
    pub(crate) medium: Mutex<Vec<u8>>,
    pub(crate) arena: DmaArena,
    geometry: BlockGeometry,
    lanes: Vec<Lane>,
    pub(crate) asked: Mutex<Vec<Asked>>,
    /// Answers for the next requests; after them, success.
    pub(crate) answers: Mutex<VecDeque<Result<(), IoError>>>,
    /// Admitted requests wait for [`Mock::release`].
    pub(crate) slow: AtomicBool,
    pub(crate) held: AtomicBool,
    pub(crate) revoked: AtomicBool,
    /// Requests admitted and unanswered at most.
    pub(crate) room: AtomicUsize,
    in_flight: AtomicUsize,
    pub(crate) handles: AtomicUsize,
    pub(crate) batches: AtomicU64,
    pub(crate) peers: Mutex<Vec<String>>,
    /// Handles in the order they were opened: whether each is revoked.
    rights: Mutex<Vec<Arc<AtomicBool>>>,
    /// Called inside each submission, on the thread that submits.
    pub(crate) hook: Mutex<Option<Hook>>,
    opened: Mutex<Vec<usize>>,
    notifies: Mutex<Vec<Arc<Notify>>>,
}

/// See [`State::hook`].
pub(crate) type Hook = Box<dyn FnMut() + Send>;

struct Lane {
    device: OwnedFd,
    late: Mutex<VecDeque<(Arc<Answers>, IoRequest)>>,
}

#[derive(Default)]
struct Answers {
    /// Of this handle alone.
    revoked: Arc<AtomicBool>,
    ready: Mutex<Vec<Completion>>,
}

#[derive(Clone)]
pub(crate) struct Mock(pub(crate) Arc<State>);

pub(crate) fn geometry(bytes: u64) -> BlockGeometry {
    BlockGeometry {
        capacity_bytes: bytes,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        max_transfer_bytes: 64 << 10,
        read_only: false,
        can_flush: true,
        can_discard: true,
        can_write_zeroes: true,
        max_discard_bytes: 64 << 10,
        discard_align_bytes: 4096,
        max_write_zeroes_bytes: 64 << 10,
        write_zeroes_may_unmap: true,
        has_id: false,
    }
}

impl Mock {
    pub(crate) fn new(geometry: BlockGeometry, lanes: usize, arena_bytes: u64) -> Mock {
        let region = DmaRegion::new("nbd-test", arena_bytes, 0).expect("a region");
        // A prime length, so that no two blocks near each other are the same.
        let pattern: Vec<u8> = (0..4099u32).map(|at| (at / 7 + at) as u8).collect();
        let mut medium = pattern.repeat(geometry.capacity_bytes as usize / pattern.len() + 1);
        medium.truncate(geometry.capacity_bytes as usize);
        Mock(Arc::new(State {
            medium: Mutex::new(medium),
            arena: DmaArena::new(Arc::new(region)).expect("an arena"),
            geometry,
            lanes: (0..lanes)
                .map(|_| Lane {
                    device: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"),
                    late: Mutex::default(),
                })
                .collect(),
            asked: Mutex::default(),
            answers: Mutex::default(),
            slow: AtomicBool::new(false),
            held: AtomicBool::new(false),
            revoked: AtomicBool::new(false),
            room: AtomicUsize::new(usize::MAX),
            in_flight: AtomicUsize::new(0),
            handles: AtomicUsize::new(0),
            batches: AtomicU64::new(0),
            peers: Mutex::default(),
            rights: Mutex::default(),
            hook: Mutex::default(),
            opened: Mutex::new(vec![0; lanes]),
            notifies: Mutex::default(),
        }))
    }

    /// 4 MiB of medium, one lane, 4 MiB of arena.
    pub(crate) fn ordinary() -> Mock {
        Mock::new(geometry(4 << 20), 1, 4 << 20)
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        lock(&self.0.asked).clone()
    }

    pub(crate) fn opened_per_lane(&self) -> Vec<usize> {
        lock(&self.0.opened).clone()
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.0.in_flight.load(Ordering::SeqCst)
    }

    pub(crate) fn set(&self, what: impl Fn(&State) -> &AtomicBool, value: bool) {
        what(&self.0).store(value, Ordering::SeqCst);
        self.signal();
    }

    pub(crate) fn fail_next(&self, answers: impl IntoIterator<Item = Result<(), IoError>>) {
        lock(&self.0.answers).extend(answers);
    }

    /// Answers up to `count` late requests, on all lanes.
    pub(crate) fn release(&self, count: usize) {
        for lane in &self.0.lanes {
            for _ in 0..count {
                let Some((answers, request)) = lock(&lane.late).pop_front() else { break };
                self.0.serve(&answers, request, None);
            }
            lane.ring();
        }
    }

    /// Revokes all handles, as the ladder does; late requests stay.
    pub(crate) fn revoke(&self) {
        self.set(|s| &s.revoked, true);
    }

    /// Revokes one handle, counted from 0 in the order they were opened; everything else serves on.
    pub(crate) fn revoke_handle(&self, which: usize) {
        lock(&self.0.rights)[which].store(true, Ordering::SeqCst);
        self.signal();
    }

    /// Has `hook` run inside each submission.
    pub(crate) fn in_submit(&self, hook: impl FnMut() + Send + 'static) {
        *lock(&self.0.hook) = Some(Box::new(hook));
    }

    /// Answers late requests of revoked handles with `Revoked`, the others stay.
    pub(crate) fn fail_revoked(&self) {
        for lane in &self.0.lanes {
            let mut late = lock(&lane.late);
            for _ in 0..late.len() {
                let Some((answers, request)) = late.pop_front() else { break };
                if answers.revoked.load(Ordering::SeqCst) {
                    self.0.serve(&answers, request, Some(IoError::Revoked));
                } else {
                    late.push_back((answers, request));
                }
            }
            lane.ring();
        }
    }

    /// Answers all late requests with `Revoked`.
    pub(crate) fn fail_late(&self) {
        for lane in &self.0.lanes {
            for (answers, request) in lock(&lane.late).drain(..) {
                self.0.serve(&answers, request, Some(IoError::Revoked));
            }
            lane.ring();
        }
    }

    fn signal(&self) {
        lock(&self.0.notifies).iter().for_each(|notify| notify.signal());
    }

    /// No lease and no handle is left.
    /// That `data` is what is on the medium at `offset`.
    #[track_caller]
    pub(crate) fn assert_medium(&self, offset: u64, data: &[u8]) {
        let at = offset as usize;
        assert!(lock(&self.0.medium)[at..at + data.len()] == *data, "other data than at {offset}");
    }

    pub(crate) fn assert_all_returned(&self) {
        eventually("all handles closed", || self.0.handles.load(Ordering::SeqCst) == 0);
        self.fail_late();
        eventually("all leases given back", || self.0.arena.leased_buffers() == 0);
    }
}

impl Lane {
    fn ring(&self) {
        rustix::io::write(&self.device, &1u64.to_ne_bytes()).expect("an eventfd takes a count");
    }
}

impl State {
    fn serve(&self, answers: &Answers, request: IoRequest, force: Option<IoError>) {
        let IoRequest { user, op, offset, length, buffer, .. } = request;
        let result = force.map_or_else(|| lock(&self.answers).pop_front().unwrap_or(Ok(())), Err);
        let mut medium = lock(&self.medium);
        let range = offset as usize..offset as usize + length as usize;
        match (op, &buffer) {
            _ if result.is_err() => {}
            (IoOp::Read, Some(buffer)) => buffer.write_at(0, &medium[range]).expect("the lease fits"),
            (IoOp::Write, Some(buffer)) => buffer.read_at(0, &mut medium[range]).expect("the lease fits"),
            (IoOp::WriteZeroes, None) => medium[range].fill(0),
            (IoOp::Discard, None) => medium[range].fill(0xdd),
            (IoOp::Flush, None) => assert_eq!((offset, length), (0, 0)),
            other => panic!("no such request: {other:?}"),
        }
        drop(medium);
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        lock(&answers.ready).push(Completion { user, result, bytes: 0, buffer });
    }

    fn check(&self, request: &IoRequest) {
        let longest = match request.op {
            IoOp::Read | IoOp::Write => self.geometry.max_transfer_bytes,
            IoOp::Discard => self.geometry.max_discard_bytes,
            IoOp::WriteZeroes => self.geometry.max_write_zeroes_bytes,
            _ => 0,
        };
        assert!(request.length <= longest, "{request:?}");
        assert!(request.offset + u64::from(request.length) <= self.geometry.capacity_bytes, "{request:?}");
        assert!(request.offset.is_multiple_of(512) && request.length.is_multiple_of(512), "{request:?}");
        assert!(request.buffer.as_ref().is_none_or(|buffer| buffer.len() >= request.length), "{request:?}");
    }
}

pub(crate) struct MockDisk {
    state: Arc<State>,
    lane: usize,
    answers: Arc<Answers>,
}

impl Service for Mock {
    type Disk = MockDisk;

    fn name(&self) -> &str {
        "disk"
    }

    fn description(&self) -> String {
        "memory".to_owned()
    }

    fn lanes(&self) -> usize {
        self.0.lanes.len()
    }

    fn geometry(&self) -> Option<BlockGeometry> {
        Some(self.0.geometry.clone())
    }

    fn open(&self, spec: HandleSpec) -> Result<MockDisk, OpenError> {
        if self.0.revoked.load(Ordering::SeqCst) {
            return Err(OpenError::Revoked);
        }
        self.0.handles.fetch_add(1, Ordering::SeqCst);
        lock(&self.0.notifies).extend(spec.notify);
        lock(&self.0.peers).push(spec.peer);
        lock(&self.0.opened)[spec.lane] += 1;
        let answers = Arc::new(Answers::default());
        lock(&self.0.rights).push(Arc::clone(&answers.revoked));
        Ok(MockDisk { state: Arc::clone(&self.0), lane: spec.lane, answers })
    }
}

impl Disk for MockDisk {
    fn geometry(&self) -> &BlockGeometry {
        &self.state.geometry
    }

    fn lease(&self, bytes: u32) -> Result<Buffer, LeaseError> {
        use cofferdam_device::ArenaError;
        if self.state() == HandleState::Revoked {
            return Err(LeaseError::Revoked);
        }
        self.state.arena.lease(bytes).map_err(|error| match error {
            ArenaError::Exhausted { .. } => LeaseError::Exhausted,
            ArenaError::Retired => LeaseError::Revoked,
            _ => LeaseError::TooLarge(bytes),
        })
    }

    fn submit(&self, requests: &mut Vec<IoRequest>) -> Result<(), SubmitError> {
        if let Some(hook) = &mut *lock(&self.state.hook) {
            hook();
        }
        match self.state() {
            HandleState::Revoked => return Err(SubmitError::Revoked),
            HandleState::Held => return Err(SubmitError::Held),
            HandleState::Open => {}
        }
        self.state.batches.fetch_add(1, Ordering::SeqCst);
        let room = self.state.room.load(Ordering::SeqCst).saturating_sub(self.state.in_flight.load(Ordering::SeqCst));
        let lane = &self.state.lanes[self.lane];
        let count = requests.len().min(room);
        for request in requests.drain(..count) {
            self.state.check(&request);
            // Whoever sees it in flight finds it decided and in its place: under the lock until it is there.
            let late = self.state.slow.load(Ordering::SeqCst).then(|| lock(&lane.late));
            self.state.in_flight.fetch_add(1, Ordering::SeqCst);
            let IoRequest { op, offset, length, flags, .. } = request;
            lock(&self.state.asked).push(Asked {
                op,
                offset,
                length,
                may_unmap: flags == cofferdam_manager::IoFlags::MAY_UNMAP,
            });
            match late {
                Some(mut late) => late.push_back((Arc::clone(&self.answers), request)),
                None => self.state.serve(&self.answers, request, None),
            }
        }
        lane.ring();
        if requests.is_empty() { Ok(()) } else { Err(SubmitError::Full) }
    }

    fn poll(&self, _arm: bool, out: &mut Vec<Completion>) -> usize {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.state.lanes[self.lane].device, &mut count);
        let mut ready = lock(&self.answers.ready);
        let found = ready.len();
        out.append(&mut ready);
        found
    }

    fn device_fd(&self) -> BorrowedFd<'_> {
        self.state.lanes[self.lane].device.as_fd()
    }

    fn state(&self) -> HandleState {
        if self.state.revoked.load(Ordering::SeqCst) || self.answers.revoked.load(Ordering::SeqCst) {
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
        self.state.handles.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A port on a Unix socket in a directory of its own.
pub(crate) struct Served {
    pub(crate) mock: Mock,
    pub(crate) path: std::path::PathBuf,
    port: Option<NbdPort<Mock>>,
    _directory: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new(mock: Mock, options: NbdOptions) -> Served {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("nbd.sock");
        let port = NbdPort::start(mock.clone(), &NbdAddress::Unix(path.clone()), options).expect("the port starts");
        Served { mock, path, port: Some(port), _directory: directory }
    }

    pub(crate) fn ordinary() -> Served {
        Served::new(Mock::ordinary(), NbdOptions::default())
    }

    /// Another port takes the place of this one under its clients, as in another process.
    pub(crate) fn exchange(&mut self) {
        let mut old = self.port.take().expect("a port");
        let exported = old.export(Instant::now() + PATIENCE).expect("it can be exported");
        let mut new = NbdPort::adopt(self.mock.clone(), exported, NbdOptions::default()).expect("it can be adopted");
        assert_eq!(new.connections(), old.connections());
        Box::new(old).forget();
        new.resume();
        self.port = Some(new);
    }

    /// The port, for a handover by hand.
    pub(crate) fn port(&mut self) -> &mut NbdPort<Mock> {
        self.port.as_mut().expect("a port")
    }

    pub(crate) fn connections(&self) -> usize {
        self.port.as_ref().map_or(0, NbdPort::connections)
    }

    /// The port itself, for whoever shuts it down.
    pub(crate) fn take_port(&mut self) -> NbdPort<Mock> {
        self.port.take().expect("still running")
    }

    pub(crate) fn shutdown(&mut self, grace: Duration) -> PortReport {
        Box::new(self.take_port()).shutdown(grace)
    }

    /// Ends the port and checks that it left nothing.
    pub(crate) fn finish(mut self) {
        self.shutdown(Duration::from_millis(100));
        assert!(!self.path.exists(), "the socket file is removed");
        self.mock.assert_all_returned();
    }
}
