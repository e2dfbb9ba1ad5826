//! What a request costs in this crate: checking the guest's words, putting the chain on the ring, publishing, and taking it from there when it was used.
//! `cargo bench --workspace --bench ring`. One thread; the device is a loop that uses what it finds, and is not measured.
//!
//! The commonest request: 16 header bytes, 4 KiB of payload in one segment, one status byte. Nanoseconds per request: the median over the batches, and the least, which is what
//! there is to see on a busy machine.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

use cofferdam_device::queue::{Ordinary, Popped};
use cofferdam_device::words::{self, SegmentWords};
use cofferdam_device::{ChainBatch, Direction, DmaRegion, Expected, Outcome, Payload, QueueConfig, SplitQueue};

const SIZE: u16 = 512;
const IOVA: u64 = 0x1000_0000;
const BYTES: u32 = 4096;
const LENGTH: Duration = Duration::from_millis(400);
const PARTS: [&str; 4] = ["parse", "add", "publish", "pop"];

/// The device: it takes the heads from the available ring and uses them in order, with status 0.
struct Device {
    region: Arc<DmaRegion>,
    available: u64,
    used: u64,
    at: u16,
}

impl Device {
    fn word(&self, place: u64) -> u64 {
        let mut bytes = [0; 8];
        self.region.read_at(place, &mut bytes).expect("inside");
        u64::from_le_bytes(bytes)
    }

    fn serve(&mut self) {
        let until = self.region.load_u16(self.available + 2, Acquire).expect("inside");
        while self.at != until {
            let slot = u64::from(self.at % SIZE);
            let head = self.region.load_u16(self.available + 4 + 2 * slot, Relaxed).expect("inside");
            let (mut index, mut written) = (u64::from(head), 0);
            if self.word(16 * index + 8) >> 32 & 4 != 0 {
                // A table of three: the status is its last.
                let table = self.word(16 * index) - IOVA;
                written = self.word(table + 24) as u32 * u32::from(self.word(table + 24) >> 32 & 2 != 0) + 1;
                self.status(self.word(table + 32));
            } else {
                loop {
                    let rest = self.word(16 * index + 8);
                    if rest >> 32 & 2 != 0 {
                        written += rest as u32;
                    }
                    if rest >> 32 & 1 == 0 {
                        break;
                    }
                    index = rest >> 48;
                }
                self.status(self.word(16 * index));
            }
            let element = u64::from(head) | u64::from(written) << 32;
            self.region.write_at(self.used + 4 + 8 * slot, &element.to_le_bytes()).expect("inside");
            self.at = self.at.wrapping_add(1);
        }
        self.region.store_u16(self.used + 2, self.at, Release).expect("inside");
    }

    fn status(&self, iova: u64) {
        self.region.write_at(iova - IOVA, &[0]).expect("inside");
    }
}

fn measure(direction: Direction, batch: u32) -> [(f64, f64); 4] {
    let config = QueueConfig { index: 0, size: SIZE, event_idx: true, indirect: true };
    let region = Arc::new(DmaRegion::new("bench", SplitQueue::bytes(SIZE, true), IOVA).expect("memory"));
    let mut queue = SplitQueue::new(config, Arc::clone(&region), 0).expect("a queue");
    let addresses = queue.addresses();
    let mut device = Device { region, available: addresses.available - IOVA, used: addresses.used - IOVA, at: 0 };
    let ordinary = Ordinary::new(&[0]).expect("short");
    let mut requests = Vec::new();
    let mut words = Vec::new();
    for token in 0..batch {
        let iova = 0x1_0000_0000 + u64::from(token * BYTES);
        requests.push(Expected { token, payload: Some(Payload { iova, length: BYTES, direction }) });
        let data = match direction {
            Direction::In => SegmentWords::PayloadIn { offset: 0, length: BYTES },
            Direction::Out => SegmentWords::PayloadOut { offset: 0, length: BYTES },
        };
        let header = [token as u8; 16];
        words::push_chain(&mut words, token, 0, &[SegmentWords::HeaderOut(&header), data, SegmentWords::StatusIn(1)]);
    }
    let mut chains = ChainBatch::new();
    let mut parts: [Vec<f64>; 4] = Default::default();
    let start = Instant::now();
    queue.disarm();
    while start.elapsed() < LENGTH {
        let begun = Instant::now();
        chains.parse(black_box(&words), black_box(&requests), &[0]).expect("good words");
        let parsed = Instant::now();
        for outcome in chains.iter() {
            let Outcome::Chain(chain) = outcome else { panic!("refused") };
            queue.add(&chain).expect("room");
        }
        let added = Instant::now();
        black_box(queue.publish());
        let published = Instant::now();
        device.serve();
        let served = Instant::now();
        let mut sum = 0_u32;
        for _ in 0..batch {
            match queue.pop_but(Some(&ordinary)) {
                Ok(Popped::Ordinary(token)) => sum += token,
                other => panic!("{other:?}"),
            }
        }
        let popped = Instant::now();
        assert_eq!(sum, batch * (batch - 1) / 2);
        let spans = [parsed - begun, added - parsed, published - added, popped - served];
        for (part, span) in parts.iter_mut().zip(spans) {
            part.push(span.as_secs_f64() * 1e9 / f64::from(batch));
        }
    }
    parts.map(|mut part| {
        part.sort_by(f64::total_cmp);
        (part[part.len() / 2], part[part.len() / 20])
    })
}

fn main() {
    println!("ns per request: median (5 %)");
    print!("{:>9} {:>5}", "", "batch");
    let _ = PARTS.map(|part| print!(" {part:>16}"));
    println!();
    for direction in [Direction::In, Direction::Out] {
        for batch in [1, 16, 32, 64] {
            print!("{:>9} {batch:>5}", if direction == Direction::In { "read" } else { "write" });
            let _ = measure(direction, batch).map(|(middle, least)| print!(" {middle:>8.2} ({least:>5.2})"));
            println!();
        }
    }
}
