//! A driver for any class: [`SplitQueue`] over any transport, one slot of memory per token of a queue.

use std::sync::Arc;
use std::time::Duration;

use cofferdam_device::chain::{ChainBatch, Direction, Expected, Outcome, Payload};
use cofferdam_device::words::{SegmentWords, push_chain};
use cofferdam_device::{DeviceFault, DmaRegion, QueueConfig, QueueEvents, QueueSetup, SplitQueue, Transport, Used};
use rustix::event::{PollFd, PollFlags, Timespec};

/// Long enough for a loaded machine; only a failing test waits so long.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);
pub(crate) const SLOT_BYTES: u32 = 4096;
/// Slots, and so most buffers in flight, of one queue.
pub(crate) const SLOTS: u32 = 64;
const IOVA: u64 = 0x1_0000_0000;
const SIZE: u16 = 64;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;

struct Line {
    queue: SplitQueue,
    events: QueueEvents,
    slots: u64,
}

pub(crate) struct Rig {
    pub(crate) transport: Box<dyn Transport>,
    region: Arc<DmaRegion>,
    lines: Vec<Line>,
    batch: ChainBatch,
}

impl Rig {
    /// Takes the offered features but those in `without`, and every queue.
    pub(crate) fn new(mut transport: impl Transport + 'static, without: u64) -> Self {
        // Bit 30 is vhost-user's own.
        let features = transport.offered_features() & !without & !(1 << 30);
        transport.negotiate(features).expect("negotiate");
        let (event_idx, indirect) = (features & EVENT_IDX != 0, features & INDIRECT != 0);
        let ring_bytes = SplitQueue::bytes(SIZE, indirect).next_multiple_of(4096);
        let stride = ring_bytes + u64::from(SLOTS * SLOT_BYTES);
        let queues = transport.max_queues();
        let region = Arc::new(DmaRegion::new("sim-classes", stride * u64::from(queues), IOVA).expect("a region"));
        transport.map(Arc::clone(&region)).expect("map");
        let lines = (0..queues)
            .map(|index| {
                let at = stride * u64::from(index);
                let config = QueueConfig { index, size: SIZE, event_idx, indirect };
                let queue = SplitQueue::new(config, Arc::clone(&region), at).expect("a queue");
                let setup = QueueSetup { index, size: SIZE, addresses: queue.addresses() };
                let events = transport.setup_queue(setup).expect("set a queue up");
                Line { queue, events, slots: at + ring_bytes }
            })
            .collect();
        transport.start().expect("start");
        Self { transport: Box::new(transport), region, lines, batch: ChainBatch::new() }
    }

    fn add(&mut self, queue: u16, token: u32, length: u32, direction: Direction, status: bool) {
        let mut segments = Vec::new();
        // In two pieces, so that chains have more than one segment; the cut is inside of every header.
        let cut = if length > 8 { 5 } else { length };
        for (offset, length) in [(0, cut), (cut, length - cut)] {
            match direction {
                _ if length == 0 => {}
                Direction::Out => segments.push(SegmentWords::PayloadOut { offset, length }),
                Direction::In => segments.push(SegmentWords::PayloadIn { offset, length }),
            }
        }
        if status {
            segments.push(SegmentWords::StatusIn(1));
        }
        let mut words = Vec::new();
        push_chain(&mut words, token, queue, &segments);
        let iova = IOVA + self.slot(queue, token);
        let payload = Some(Payload { iova, length, direction });
        self.batch.parse(&words, &[Expected { token, payload }], &[queue]).expect("a chain");
        let Some(Outcome::Chain(chain)) = self.batch.get(0) else { panic!("a refusal") };
        self.lines[usize::from(queue)].queue.add(&chain).expect("room");
    }

    fn slot(&self, queue: u16, token: u32) -> u64 {
        self.lines[usize::from(queue)].slots + u64::from(token % SLOTS) * u64::from(SLOT_BYTES)
    }

    pub(crate) fn publish(&mut self, queue: u16) {
        let line = &mut self.lines[usize::from(queue)];
        if line.queue.publish() {
            line.events.doorbell.ring();
        }
    }

    /// Posts a buffer of `length` bytes, all 0xee.
    pub(crate) fn post(&mut self, queue: u16, token: u32, length: u32) {
        self.region.fill(self.slot(queue, token), u64::from(SLOT_BYTES), 0xee).expect("in the region");
        self.add(queue, token, length, Direction::In, false);
        self.publish(queue);
    }

    /// Sends bytes.
    pub(crate) fn send(&mut self, queue: u16, token: u32, bytes: &[u8]) {
        self.region.write_at(self.slot(queue, token), bytes).expect("in the region");
        self.add(queue, token, bytes.len() as u32, Direction::Out, false);
        self.publish(queue);
    }

    /// Sends bytes with a status byte behind them.
    pub(crate) fn command(&mut self, queue: u16, token: u32, bytes: &[u8]) {
        self.region.write_at(self.slot(queue, token), bytes).expect("in the region");
        self.add(queue, token, bytes.len() as u32, Direction::Out, true);
        self.publish(queue);
    }

    pub(crate) fn pop(&mut self, queue: u16) -> Result<Option<Used>, DeviceFault> {
        self.lines[usize::from(queue)].queue.pop()
    }

    pub(crate) fn in_flight(&self, queue: u16) -> u16 {
        self.lines[usize::from(queue)].queue.in_flight()
    }

    /// The first `bytes` bytes of a slot.
    pub(crate) fn data(&self, queue: u16, token: u32, bytes: u32) -> Vec<u8> {
        let mut into = vec![0; bytes as usize];
        self.region.read_at(self.slot(queue, token), &mut into).expect("in the region");
        into
    }

    /// The next used element, in event mode.
    pub(crate) fn next(&mut self, queue: u16) -> Used {
        loop {
            if let Some(used) = self.pop(queue).expect("an honest device") {
                return used;
            }
            let line = &mut self.lines[usize::from(queue)];
            if !line.queue.arm() {
                let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
                let call = &line.events.call;
                let ready = rustix::event::poll(&mut [PollFd::new(call, PollFlags::IN)], Some(&limit)).expect("poll");
                assert!(ready > 0, "no answer and no notification on queue {queue}");
                let _ = rustix::io::read(call, &mut [0u8; 8]);
            }
        }
    }

    /// The bytes of the next used element, and its token.
    pub(crate) fn receive(&mut self, queue: u16) -> (u32, Vec<u8>) {
        let used = self.next(queue);
        (used.token, self.data(queue, used.token, used.written))
    }

    /// Whether the transport has something to say.
    pub(crate) fn is_told(&mut self) -> bool {
        let told = {
            let event = self.transport.event_fd().expect("an event descriptor");
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            rustix::event::poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&now)).expect("poll") > 0
        };
        assert!(!self.transport.is_lost());
        told
    }

    pub(crate) fn config(&mut self, bytes: usize) -> Vec<u8> {
        let mut into = vec![0; bytes];
        self.transport.read_config(0, &mut into).expect("configuration space");
        into
    }
}

/// What differs between tests.
pub(crate) fn behaviour(rules: &[&str]) -> cofferdam_sim::Behaviour {
    let rules = rules.iter().map(|rule| rule.parse().expect("a rule")).collect();
    cofferdam_sim::Behaviour { seed: 42, rules, ..Default::default() }
}
