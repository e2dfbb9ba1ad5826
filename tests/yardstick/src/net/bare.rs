//! Split rings by hand: the floor. Set up by our own transport, so that the device is the same one; from there on nothing of ours is on the way.
//!
//! A ring has as many entries as frames may be with the device, each one descriptor with header and frame, written once. What the device is done with is given to it again as it is;
//! a look publishes once. It believes the device but for the used element's id.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cofferdam_device::{DmaRegion, Doorbell, QueueAddresses, QueueSetup, Transport};

use super::job::{Direction, Job, Station, within_patience};
use crate::clients::cofferdam::connect;
use crate::memory::Memory;

const F_MRG_RXBUF: u64 = 1 << 15;
const F_VERSION_1: u64 = 1 << 32;
/// The device writes (virtio 1.2, section 2.7.5).
const WRITE: u64 = 2;
/// Whoever reads these flags need not tell of what it does (sections 2.7.6 and 2.7.8).
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// Of `struct virtio_net_hdr` (section 5.1.6).
const HEADER_BYTES: u32 = 12;
/// Of a buffer: header and frame.
const BUFFER_BYTES: u64 = 2048;

/// Most entries of a ring.
const MAX_ENTRIES: usize = 256;
/// Places in a queue's part of the rings' region.
const AVAILABLE: usize = 16 * MAX_ENTRIES;
const USED: usize = AVAILABLE + 1024;
const QUEUE_BYTES: usize = 8192;

const RINGS_IOVA: u64 = 0x1000_0000;
const BUFFERS_IOVA: u64 = 0x1_0000_0000;

/// A frame of so many bytes, to everybody, of a type for local experiments (IEEE 802, section 9.2.4).
#[must_use]
pub fn frame(bytes: u32) -> Vec<u8> {
    let mut frame = vec![0x5a; bytes as usize];
    let header = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];
    frame[..header.len()].copy_from_slice(&header);
    frame
}

/// The client.
pub struct Bare {
    rings: Memory,
    /// Of the queue that is used, in the region.
    base: usize,
    doorbell: Box<dyn Doorbell>,
    job: Job,
    /// Next places in the available and in the used ring.
    available: u16,
    used: u16,
    /// Last: it takes the device away.
    transport: Box<dyn Transport>,
}

impl Bare {
    /// Sets the rings up and gives the device everything.
    ///
    /// # Errors
    /// What the transport says.
    pub fn connect(socket: &Path, job: Job) -> Result<Bare> {
        let (entries, bytes) = (usize::from(job.depth), HEADER_BYTES + job.bytes);
        ensure!(entries <= MAX_ENTRIES && entries.is_power_of_two(), "a ring of {entries}");
        ensure!(u64::from(bytes) <= BUFFER_BYTES, "frames of {} bytes", job.bytes);
        let mut transport: Box<dyn Transport> = Box::new(connect(socket)?);
        let features = F_VERSION_1 | F_MRG_RXBUF;
        ensure!(transport.offered_features() & features == features, "no modern network device");
        transport.negotiate(features)?;
        let region = Arc::new(DmaRegion::new("bare-rings", 2 * QUEUE_BYTES as u64, RINGS_IOVA)?);
        let buffers = Arc::new(DmaRegion::new("bare-buffers", MAX_ENTRIES as u64 * BUFFER_BYTES, BUFFERS_IOVA)?);
        transport.map(Arc::clone(&region))?;
        transport.map(Arc::clone(&buffers))?;
        let rings = Memory::of_region(&region)?;
        // Queue 0 receives, queue 1 transmits (section 5.1.2); a device wants both.
        let wanted = usize::from(job.direction == Direction::Send);
        let mut doorbells = Vec::new();
        for queue in 0..2 {
            let iova = RINGS_IOVA + (queue * QUEUE_BYTES) as u64;
            let addresses =
                QueueAddresses { descriptors: iova, available: iova + AVAILABLE as u64, used: iova + USED as u64 };
            rings.word16(queue * QUEUE_BYTES + AVAILABLE).store(NO_INTERRUPT, Ordering::Relaxed);
            let events = transport.setup_queue(QueueSetup { index: queue as u16, size: job.depth, addresses })?;
            doorbells.push(events.doorbell);
        }
        let base = wanted * QUEUE_BYTES;
        let flags = if job.direction == Direction::Send { 0 } else { WRITE };
        let length = if job.direction == Direction::Send { u64::from(bytes) } else { BUFFER_BYTES };
        for entry in 0..entries {
            let at = entry as u64 * BUFFER_BYTES;
            buffers.write_at(at + u64::from(HEADER_BYTES), &frame(job.bytes))?;
            rings.word64(base + 16 * entry).store(BUFFERS_IOVA + at, Ordering::Relaxed);
            rings.word64(base + 16 * entry + 8).store(length | flags << 32, Ordering::Relaxed);
            rings.word16(base + AVAILABLE + 4 + 2 * entry).store(entry as u16, Ordering::Relaxed);
        }
        transport.start()?;
        let mut bare =
            Bare { rings, base, doorbell: doorbells.swap_remove(wanted), job, available: 0, used: 0, transport };
        bare.publish(job.depth);
        Ok(bare)
    }

    fn publish(&mut self, count: u16) {
        self.available = self.available.wrapping_add(count);
        self.rings.word16(self.base + AVAILABLE + 2).store(self.available, Ordering::Release);
        // Pairs with the device's fence between its flags and its look at the index (section 2.7.10).
        fence(Ordering::SeqCst);
        if self.rings.word16(self.base + USED).load(Ordering::Relaxed) & NO_NOTIFY == 0 {
            self.doorbell.ring();
        }
    }

    /// Takes what is used; gives it to the device again if `again`.
    #[inline]
    fn look(&mut self, again: bool) -> Result<u64> {
        let index = self.rings.word16(self.base + USED + 2).load(Ordering::Acquire);
        let mask = self.job.depth - 1;
        let mut given = self.available;
        let count = index.wrapping_sub(self.used);
        for turn in 0..count {
            let place = self.base + USED + 4 + 8 * usize::from(self.used.wrapping_add(turn) & mask);
            let id = self.rings.word32(place).load(Ordering::Relaxed);
            ensure!(id <= u32::from(mask), "used id {id}");
            if again {
                let place = self.base + AVAILABLE + 4 + 2 * usize::from(given & mask);
                self.rings.word16(place).store(id as u16, Ordering::Relaxed);
                given = given.wrapping_add(1);
            }
        }
        self.used = index;
        if count > 0 && again {
            self.publish(count);
        }
        Ok(u64::from(count))
    }
}

impl Station for Bare {
    #[inline]
    fn turn(&mut self) -> Result<u64> {
        self.look(true)
    }

    fn finish(&mut self) -> Result<u64> {
        let mut count = 0;
        if self.job.direction == Direction::Send {
            within_patience("the device keeps frames", || {
                count += self.look(false)?;
                Ok(self.used == self.available)
            })?;
        }
        Ok(count)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.transport.quiesce(0, Instant::now() + Duration::from_secs(1));
        self.transport.release();
    }
}

const _: () = assert!(AVAILABLE + 6 + 2 * MAX_ENTRIES <= USED && USED + 6 + 8 * MAX_ENTRIES <= QUEUE_BYTES);
