//! A split ring by hand: the floor. Set up by our own transport, so that the device is the same one; from there on nothing of ours is on the way.
//!
//! Each tag has a chain of its own, written once per job: a request writes its sector, its status byte and its place in the available ring. Headers and statuses are packed, a
//! cache line for several. A batch is published once. It believes the device: the used element's id is the tag's head, and nothing but the status is looked at.
//!
//! | mode | |
//! | --- | --- |
//! | poll | reads the used index until it moves; never asks for a call |
//! | event | asks for a call at the next answer and sleeps |
//! | adaptive | looks for `SPIN`, then asks for a call when half of what is in flight is answered, and sleeps |

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cofferdam_device::{DmaRegion, Doorbell, QueueAddresses, QueueSetup, Transport};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::cofferdam::connect;
use crate::backend::Backend;
use crate::engine::{Engine, Io, Job, Mode, PATIENCE};
use crate::memory::Memory;

/// Entries of every client's rings: the least power of two that holds three descriptors for each of 128 requests.
pub const RING_ENTRIES: u16 = 512;
/// Tags of one queue.
const TAGS: usize = 128;
/// How long the adaptive mode looks before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const NEXT: u64 = 1;
const WRITE: u64 = 2;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;

/// Places in a queue's part of the rings' region; everything that another side writes begins a pair of cache lines.
const AVAILABLE: usize = 16 * RING_ENTRIES as usize;
const USED: usize = AVAILABLE + 2048;
const HEADERS: usize = USED + 8192;
const STATUSES: usize = HEADERS + 16 * TAGS;
const QUEUE_BYTES: usize = (STATUSES + TAGS).next_multiple_of(4096);

const RINGS_IOVA: u64 = 0x1000_0000;
const BUFFERS_IOVA: u64 = 0x1_0000_0000;
const BUFFERS_BYTES: u64 = 64 << 20;

struct Queue {
    base: usize,
    doorbell: Box<dyn Doorbell>,
    call: OwnedFd,
    /// Next places in the available and in the used ring.
    available: u16,
    used: u16,
}

/// The client.
pub struct Bare {
    rings: Memory,
    queues: Vec<Queue>,
    buffers: Arc<DmaRegion>,
    mode: Mode,
    job: Job,
    capacity: u64,
    /// Last: it takes the device away.
    transport: Box<dyn Transport>,
}

impl Bare {
    /// Sets the rings up.
    ///
    /// # Errors
    /// What the transport says.
    pub fn connect(device: &Backend, mode: Mode, queues: u16) -> Result<Bare> {
        ensure!(mode == Mode::Poll || queues == 1, "several queues are measured polling only");
        let mut transport: Box<dyn Transport> = Box::new(connect(&device.socket())?);
        let ring_features = F_EVENT_IDX | F_VERSION_1;
        ensure!(transport.offered_features() & ring_features == ring_features, "no modern device with EVENT_IDX");
        transport.negotiate(ring_features)?;
        let mut sectors = [0; 8];
        transport.read_config(0, &mut sectors)?;
        let region = DmaRegion::new("bare-rings", (QUEUE_BYTES * usize::from(queues)) as u64, RINGS_IOVA)?;
        let region = Arc::new(region);
        let buffers = Arc::new(DmaRegion::new("bare-buffers", BUFFERS_BYTES, BUFFERS_IOVA)?);
        transport.map(Arc::clone(&region))?;
        transport.map(Arc::clone(&buffers))?;
        let rings = Memory::of_region(&region)?;
        let mut made = Vec::new();
        for index in 0..queues {
            let base = usize::from(index) * QUEUE_BYTES;
            let iova = RINGS_IOVA + base as u64;
            let addresses =
                QueueAddresses { descriptors: iova, available: iova + AVAILABLE as u64, used: iova + USED as u64 };
            let events = transport.setup_queue(QueueSetup { index, size: RING_ENTRIES, addresses })?;
            made.push(Queue { base, doorbell: events.doorbell, call: events.call, available: 0, used: 0 });
        }
        transport.start()?;
        let mut bare = Bare {
            rings,
            queues: made,
            buffers,
            mode,
            job: Job { op: crate::engine::Op::RandRead, depth: 0 },
            capacity: u64::from_le_bytes(sectors) * 512,
            transport,
        };
        bare.disarm();
        Ok(bare)
    }

    /// Behind the index, so that it is passed only after a whole turn.
    fn disarm(&mut self) {
        for at in 0..self.queues.len() {
            self.ask(at, self.queues[at].used.wrapping_sub(1));
        }
    }

    /// Writes `used_event`.
    fn ask(&self, at: usize, event: u16) {
        let place = self.queues[at].base + AVAILABLE + 4 + 2 * usize::from(RING_ENTRIES);
        self.rings.word16(place).store(event, Ordering::Relaxed);
    }

    /// Takes what was used.
    #[inline]
    fn look(&mut self, done: &mut Vec<u32>) -> Result<()> {
        let width = self.queues.len();
        for (at, queue) in self.queues.iter_mut().enumerate() {
            let index = self.rings.word16(queue.base + USED + 2).load(Ordering::Acquire);
            while queue.used != index {
                let slot = usize::from(queue.used % RING_ENTRIES);
                let id = self.rings.word32(queue.base + USED + 4 + 8 * slot).load(Ordering::Relaxed) as usize;
                let slot = id / 3;
                ensure!(slot < TAGS, "used id {id}");
                let status = self.rings.byte(queue.base + STATUSES + slot).load(Ordering::Relaxed);
                ensure!(status == 0, "status {status}");
                done.push((slot * width + at) as u32);
                queue.used = queue.used.wrapping_add(1);
            }
        }
        Ok(())
    }

    /// Sleeps until `count` more are answered, unless something is there.
    fn sleep(&mut self, count: u16, done: &mut Vec<u32>) -> Result<()> {
        let queue = &self.queues[0];
        self.ask(0, queue.used.wrapping_add(count - 1));
        // Pairs with the device's fence between its used index and its look at the event (virtio 1.2, section 2.7.7.1).
        fence(Ordering::SeqCst);
        if self.rings.word16(queue.base + USED + 2).load(Ordering::Acquire) == queue.used {
            let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
            let mut fds = [PollFd::from_borrowed_fd(queue.call.as_fd(), PollFlags::IN)];
            ensure!(poll(&mut fds, Some(&limit))? > 0, "no call");
            let _ = rustix::io::read(&queue.call, &mut [0; 8]);
        }
        self.look(done)
    }

    fn in_flight(&self) -> u16 {
        self.queues[0].available.wrapping_sub(self.queues[0].used)
    }
}

impl Engine for Bare {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn prepare(&mut self, job: Job) -> Result<()> {
        ensure!(job.depth as usize <= TAGS * self.queues.len(), "at most {TAGS} requests per queue");
        ensure!(u64::from(job.depth * job.op.bytes()) <= self.buffers.len(), "not enough buffers");
        self.job = job;
        let bytes = u64::from(job.op.bytes());
        self.buffers.fill(0, u64::from(job.depth) * bytes, 0x5a)?;
        let (payload, kind) = if job.op.reads() { (WRITE, TYPE_IN) } else { (0, TYPE_OUT) };
        for tag in 0..job.depth as usize {
            let (queue, slot) = (&self.queues[tag % self.queues.len()], tag / self.queues.len());
            let iova = RINGS_IOVA + queue.base as u64;
            let first = 3 * slot as u64;
            let chain = [
                (iova + (HEADERS + 16 * slot) as u64, 16, NEXT, first + 1),
                (BUFFERS_IOVA + tag as u64 * bytes, bytes, NEXT | payload, first + 2),
                (iova + (STATUSES + slot) as u64, 1, WRITE, 0),
            ];
            for (step, (address, length, flags, next)) in chain.into_iter().enumerate() {
                let place = queue.base + 16 * (3 * slot + step);
                self.rings.word64(place).store(address, Ordering::Relaxed);
                self.rings.word64(place + 8).store(length | flags << 32 | next << 48, Ordering::Relaxed);
            }
            self.rings.word64(queue.base + HEADERS + 16 * slot).store(u64::from(kind), Ordering::Relaxed);
        }
        Ok(())
    }

    #[inline]
    fn submit(&mut self, requests: &[Io]) -> Result<()> {
        let width = self.queues.len();
        let mut before = [0_u16; 2];
        for (queue, before) in self.queues.iter().zip(&mut before) {
            *before = queue.available;
        }
        for io in requests {
            let (at, slot) =
                if width == 1 { (0, io.tag as usize) } else { (io.tag as usize % width, io.tag as usize / width) };
            let queue = &mut self.queues[at];
            self.rings.word64(queue.base + HEADERS + 16 * slot + 8).store(io.offset / 512, Ordering::Relaxed);
            self.rings.byte(queue.base + STATUSES + slot).store(0xff, Ordering::Relaxed);
            let place = queue.base + AVAILABLE + 4 + 2 * usize::from(queue.available % RING_ENTRIES);
            self.rings.word16(place).store(3 * slot as u16, Ordering::Relaxed);
            queue.available = queue.available.wrapping_add(1);
        }
        for (queue, old) in self.queues.iter().zip(before) {
            let new = queue.available;
            if new == old {
                continue;
            }
            self.rings.word16(queue.base + AVAILABLE + 2).store(new, Ordering::Release);
            // Pairs with the device's fence between its event and its look at the index (section 2.7.10.1).
            fence(Ordering::SeqCst);
            let place = queue.base + USED + 4 + 8 * usize::from(RING_ENTRIES);
            let event = self.rings.word16(place).load(Ordering::Relaxed);
            if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
                queue.doorbell.ring();
            }
        }
        Ok(())
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<u32>) -> Result<()> {
        self.look(done)?;
        if !done.is_empty() || self.mode == Mode::Poll {
            return Ok(());
        }
        if self.mode == Mode::Event {
            return self.sleep(1, done);
        }
        let start = Instant::now();
        while start.elapsed() < SPIN {
            for _ in 0..64 {
                self.look(done)?;
                if !done.is_empty() {
                    return Ok(());
                }
            }
        }
        let count = (self.in_flight() / 2).max(1);
        self.sleep(count, done)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.transport.quiesce(0, Instant::now() + Duration::from_secs(1));
        self.transport.release();
    }
}

const _: () = assert!(AVAILABLE + 6 + 2 * RING_ENTRIES as usize <= USED);
const _: () = assert!(USED + 6 + 8 * RING_ENTRIES as usize <= HEADERS && 3 * TAGS <= RING_ENTRIES as usize);
