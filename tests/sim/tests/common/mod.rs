//! A small driver for the tests: [`SplitQueue`] over any transport, one buffer per token, no sleeps but on descriptors.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part of it")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_device::chain::{ChainBatch, Direction, Expected, Outcome, Payload};
use cofferdam_device::words::{SegmentWords, push_chain};
use cofferdam_device::{DeviceFault, DmaRegion, QueueConfig, QueueEvents, QueueSetup, SplitQueue, Transport, Used};
use cofferdam_sim::{Options, Rule, Sim, Storage};
use rustix::event::{PollFd, PollFlags, Timespec};

/// Long enough for a loaded machine; only a failing test waits so long.
pub const LIMIT: Duration = Duration::from_secs(10);
pub const SLOT_BYTES: u32 = 64 << 10;
pub const SLOTS: u32 = 64;
pub const IOVA: u64 = 0x1_0000_0000;
const SIZE: u16 = 64;

pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT: u64 = 1 << 28;
pub const FLUSH: u64 = 1 << 9;

#[derive(Clone, Debug)]
pub enum Do {
    Read { sector: u64, sectors: u32 },
    Write { sector: u64, data: Vec<u8> },
    Flush,
    GetId,
    Discard { sector: u64, sectors: u32 },
    WriteZeroes { sector: u64, sectors: u32 },
    Raw { kind: u32 },
}

pub struct Line {
    pub queue: SplitQueue,
    pub events: QueueEvents,
}

pub struct Rig {
    pub transport: Box<dyn Transport>,
    pub region: Arc<DmaRegion>,
    pub lines: Vec<Line>,
    payload: u64,
    batch: ChainBatch,
}

pub fn sim(rules: &[&str]) -> Sim {
    sim_with(rules, |_| {})
}

pub fn sim_with(rules: &[&str], change: impl FnOnce(&mut Options)) -> Sim {
    let rules = rules.iter().map(|rule| rule.parse::<Rule>().expect("a rule that can be read")).collect();
    let mut options = Options { storage: Storage::Memory(1 << 20), rules, seed: 42, ..Options::default() };
    change(&mut options);
    Sim::new(options).expect("a sim")
}

impl Rig {
    pub fn new(transport: impl Transport + 'static) -> Self {
        Self::with_features(transport, u64::MAX)
    }

    /// Takes every offered feature that is in `mask`, and every queue.
    pub fn with_features(mut transport: impl Transport + 'static, mask: u64) -> Self {
        // Of the offered bits those that virtio-blk and the ring define; VERSION_1 always.
        let known = 0x1_3000_7666;
        let features = transport.offered_features() & known & mask | 1 << 32;
        transport.negotiate(features).expect("negotiate");
        let has = |bit: u64| features & bit != 0;
        let ring_bytes = SplitQueue::bytes(SIZE, has(INDIRECT)).next_multiple_of(4096);
        let queues = if features & 1 << 12 == 0 { 1 } else { transport.max_queues() };
        let payload = ring_bytes * u64::from(queues);
        let bytes = payload + u64::from(SLOTS * SLOT_BYTES);
        let region = Arc::new(DmaRegion::new("sim-test", bytes, IOVA).expect("a region"));
        transport.map(Arc::clone(&region)).expect("map");
        let lines = (0..queues)
            .map(|index| {
                let config = QueueConfig { index, size: SIZE, event_idx: has(EVENT_IDX), indirect: has(INDIRECT) };
                let queue =
                    SplitQueue::new(config, Arc::clone(&region), ring_bytes * u64::from(index)).expect("a queue");
                let setup = QueueSetup { index, size: SIZE, addresses: queue.addresses() };
                let events = transport.setup_queue(setup).expect("set a queue up");
                Line { queue, events }
            })
            .collect();
        transport.start().expect("start");
        Self { transport: Box::new(transport), region, lines, payload, batch: ChainBatch::new() }
    }

    fn slot(&self, token: u32) -> u64 {
        self.payload + u64::from(token % SLOTS) * u64::from(SLOT_BYTES)
    }

    pub fn fill(&self, token: u32, value: u8) {
        self.region.fill(self.slot(token), u64::from(SLOT_BYTES), value).expect("in the region");
    }

    pub fn data(&self, token: u32, bytes: usize) -> Vec<u8> {
        let mut into = vec![0; bytes];
        self.region.read_at(self.slot(token), &mut into).expect("in the region");
        into
    }

    /// Adds a request to queue `queue`, not visible before [`Rig::publish`].
    pub fn add(&mut self, queue: u16, token: u32, what: &Do) {
        let mut header = Vec::new();
        let mut head = |kind: u32, sector: u64| {
            header.extend_from_slice(&kind.to_le_bytes());
            header.extend_from_slice(&[0; 4]);
            header.extend_from_slice(&sector.to_le_bytes());
        };
        let mut range = None;
        let (length, direction) = match what {
            Do::Read { sector, sectors } => {
                head(0, *sector);
                (sectors * 512, Direction::In)
            }
            Do::Write { sector, data } => {
                head(1, *sector);
                self.region.write_at(self.slot(token), data).expect("in the region");
                (data.len() as u32, Direction::Out)
            }
            Do::Flush => {
                head(4, 0);
                (0, Direction::In)
            }
            Do::GetId => {
                head(8, 0);
                (20, Direction::In)
            }
            Do::Discard { sector, sectors } | Do::WriteZeroes { sector, sectors } => {
                head(if matches!(what, Do::Discard { .. }) { 11 } else { 13 }, 0);
                let mut bytes = sector.to_le_bytes().to_vec();
                bytes.extend_from_slice(&sectors.to_le_bytes());
                bytes.extend_from_slice(&[0; 4]);
                range = Some(bytes);
                (0, Direction::In)
            }
            Do::Raw { kind } => {
                head(*kind, 0);
                (0, Direction::In)
            }
        };
        header.extend(range.unwrap_or_default());
        let mut segments = vec![SegmentWords::HeaderOut(&header)];
        // In two pieces, so that chains have more than one data segment.
        let cut = if length >= 1024 { length / 2 } else { length };
        for (offset, length) in [(0, cut), (cut, length - cut)] {
            match direction {
                _ if length == 0 => {}
                Direction::Out => segments.push(SegmentWords::PayloadOut { offset, length }),
                Direction::In => segments.push(SegmentWords::PayloadIn { offset, length }),
            }
        }
        segments.push(SegmentWords::StatusIn(1));
        let mut words = Vec::new();
        push_chain(&mut words, token, queue, &segments);
        let payload = (length > 0).then(|| Payload { iova: IOVA + self.slot(token), length, direction });
        self.batch.parse(&words, &[Expected { token, payload }], &[queue]).expect("a chain");
        let Some(Outcome::Chain(chain)) = self.batch.get(0) else { panic!("a refusal") };
        self.lines[usize::from(queue)].queue.add(&chain).expect("room");
    }

    /// Adds a read (`In`) or write (`Out`) of `bytes` bytes at I/O address `iova`, wherever that is.
    pub fn add_at(&mut self, queue: u16, token: u32, sector: u64, iova: u64, bytes: u32, direction: Direction) {
        let kind = u32::from(direction == Direction::Out);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(&sector.to_le_bytes());
        let data = match direction {
            Direction::Out => SegmentWords::PayloadOut { offset: 0, length: bytes },
            Direction::In => SegmentWords::PayloadIn { offset: 0, length: bytes },
        };
        let mut words = Vec::new();
        push_chain(&mut words, token, queue, &[SegmentWords::HeaderOut(&header), data, SegmentWords::StatusIn(1)]);
        let payload = Some(Payload { iova, length: bytes, direction });
        self.batch.parse(&words, &[Expected { token, payload }], &[queue]).expect("a chain");
        let Some(Outcome::Chain(chain)) = self.batch.get(0) else { panic!("a refusal") };
        self.lines[usize::from(queue)].queue.add(&chain).expect("room");
    }

    /// As [`Rig::status`], for what [`Rig::add_at`] adds.
    pub fn status_at(&mut self, token: u32, sector: u64, iova: u64, bytes: u32, direction: Direction) -> u8 {
        self.add_at(0, token, sector, iova, bytes, direction);
        self.publish(0);
        let used = self.next(0).expect("an honest device");
        assert_eq!(used.token, token);
        used.status()[0]
    }

    pub fn publish(&mut self, queue: u16) {
        let line = &mut self.lines[usize::from(queue)];
        if line.queue.publish() {
            line.events.doorbell.ring();
        }
    }

    pub fn submit(&mut self, token: u32, what: &Do) {
        self.add(0, token, what);
        self.publish(0);
    }

    pub fn pop(&mut self) -> Result<Option<Used>, DeviceFault> {
        self.lines[0].queue.pop()
    }

    /// Waits on the queue's call descriptor. False: `limit` is over.
    pub fn wait_call(&self, queue: u16, limit: Duration) -> bool {
        let call = &self.lines[usize::from(queue)].events.call;
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
        let mut fds = [PollFd::new(call, PollFlags::IN)];
        let ready = rustix::event::poll(&mut fds, Some(&limit)).expect("poll") > 0;
        if ready {
            let _ = rustix::io::read(call, &mut [0u8; 8]);
        }
        ready
    }

    /// The next used element, in event mode.
    pub fn next(&mut self, queue: u16) -> Result<Used, DeviceFault> {
        loop {
            if let Some(used) = self.lines[usize::from(queue)].queue.pop()? {
                return Ok(used);
            }
            if !self.lines[usize::from(queue)].queue.arm() && !self.wait_call(queue, LIMIT) {
                panic!("no answer and no notification");
            }
        }
    }

    /// One request from start to end; the answer is its status byte.
    pub fn status(&mut self, token: u32, what: &Do) -> u8 {
        self.submit(token, what);
        let used = self.next(0).expect("an honest device");
        assert_eq!(used.token, token);
        used.status()[0]
    }
}

pub fn connect(path: &Path) -> VhostUser {
    VhostUser::connect(&format!("vhost-user:{}", path.display())).expect("connect")
}

/// Waits for the transport's event, then asks.
pub fn wait_lost(rig: &mut Rig) -> bool {
    let limit = Instant::now() + LIMIT;
    while Instant::now() < limit {
        if rig.transport.is_lost() {
            return true;
        }
        let event = rig.transport.event_fd().expect("an event descriptor");
        let mut fds = [rustix::event::PollFd::new(&event, rustix::event::PollFlags::IN)];
        let _ = rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 }));
    }
    false
}
