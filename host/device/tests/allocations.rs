//! The request path allocates nothing once its buffers have grown: an allocator that counts watches one whole turn.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use cofferdam_device::words::{self, SegmentWords, parse_answers};
use cofferdam_device::{
    Buffer, ChainBatch, Direction, DmaArena, DmaRegion, Expected, Outcome, Payload, QueueConfig, SplitQueue,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands everything to the system's allocator unchanged; counting touches a constant-initialised thread local without a destructor, which does
// not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: `memory` came from `alloc` above, which is the system's.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const BATCH: u32 = 16;

struct Lane {
    arena: DmaArena,
    queue: SplitQueue,
    ring: Arc<DmaRegion>,
    batch: ChainBatch,
    buffers: Vec<Buffer>,
    requests: Vec<Expected>,
    words: Vec<u32>,
    answers: Vec<(usize, words::Status)>,
    used: u16,
}

impl Lane {
    /// Lease, check, add, publish, device, pop, answer, give back: one batch. Payload segments run backwards, which is the long way.
    fn turn(&mut self) {
        self.words.clear();
        self.requests.clear();
        for token in 0..BATCH {
            let buffer = self.arena.lease(4096).unwrap();
            let payload = Payload { iova: buffer.iova(), length: buffer.len(), direction: Direction::In };
            self.requests.push(Expected { token, payload: Some(payload) });
            self.buffers.push(buffer);
            let segments = [
                SegmentWords::HeaderOut(&[0; 16]),
                SegmentWords::PayloadIn { offset: 2048, length: 2048 },
                SegmentWords::PayloadIn { offset: 0, length: 2048 },
                SegmentWords::StatusIn(1),
            ];
            words::push_chain(&mut self.words, token, 0, &segments);
        }
        self.batch.parse(&self.words, &self.requests, &[0]).unwrap();
        for outcome in self.batch.iter() {
            let Outcome::Chain(chain) = outcome else { panic!("refused") };
            self.queue.add(&chain).unwrap();
        }
        self.queue.publish();
        self.serve();
        self.words.clear();
        let mut tokens = [0; BATCH as usize];
        for token in &mut tokens {
            let used = self.queue.pop().unwrap().unwrap();
            *token = used.token;
            self.words.extend([used.token, 0]);
        }
        parse_answers(&self.words, &tokens, &mut self.answers).unwrap();
        assert!(!self.queue.arm());
        self.queue.disarm();
        self.buffers.clear();
    }

    /// A device that uses everything at once.
    fn serve(&mut self) {
        let (available, used) = (self.queue.addresses().available, self.queue.addresses().used);
        let size = self.queue.config().size;
        for _ in 0..BATCH {
            let slot = u64::from(self.used % size);
            let order = std::sync::atomic::Ordering::Relaxed;
            let head = self.ring.load_u16(available + 4 + 2 * slot, order).unwrap();
            let element = (u64::from(head) | 1 << 32).to_le_bytes();
            self.ring.write_at(used + 4 + 8 * slot, &element).unwrap();
            self.used = self.used.wrapping_add(1);
        }
        self.ring.store_u16(used + 2, self.used, std::sync::atomic::Ordering::Release).unwrap();
    }
}

#[test]
fn a_turn_of_a_lane_that_has_warmed_up_allocates_nothing() {
    let config = QueueConfig { index: 0, size: 64, event_idx: true, indirect: true };
    let bytes = SplitQueue::bytes(config.size, config.indirect);
    let ring = Arc::new(DmaRegion::new("test-ring", bytes, 0).unwrap());
    let payload = Arc::new(DmaRegion::new("test-arena", 64 * 4096, 1 << 30).unwrap());
    let mut lane = Lane {
        arena: DmaArena::new(payload).unwrap(),
        queue: SplitQueue::new(config, Arc::clone(&ring), 0).unwrap(),
        ring,
        batch: ChainBatch::new(),
        buffers: Vec::new(),
        requests: Vec::new(),
        words: Vec::new(),
        answers: Vec::new(),
        used: 0,
    };
    let before = ALLOCATIONS.get();
    lane.turn();
    assert!(ALLOCATIONS.get() > before, "the first turn grows the buffers, or nothing is counted");
    let before = ALLOCATIONS.get();
    for _ in 0..100 {
        lane.turn();
    }
    assert_eq!(ALLOCATIONS.get(), before);
}
