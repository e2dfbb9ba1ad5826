//! The device side of a split virtqueue, written from the specification and from the shared memory alone, and what the tests need to drive a queue.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use cofferdam_device::words::{SegmentWords, push_chain};
use cofferdam_device::{
    ChainBatch, ChainBuf, Direction, DmaRegion, Expected, Outcome, Payload, QueueAddresses, QueueConfig, SplitQueue,
};

/// Where the tests' payload lies: no such memory exists, a ring only names it.
pub(crate) const PAYLOAD_IOVA: u64 = 0x7000_0000;

/// A descriptor as the device sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) iova: u64,
    pub(crate) length: u32,
    pub(crate) write: bool,
}

/// A chain as the device sees it.
#[derive(Clone, Debug)]
pub(crate) struct Taken {
    pub(crate) head: u16,
    /// Descriptors of the ring's own table that it takes.
    pub(crate) descriptors: Vec<u16>,
    pub(crate) pieces: Vec<Piece>,
}

pub(crate) struct Device {
    pub(crate) region: Arc<DmaRegion>,
    addresses: QueueAddresses,
    size: u16,
    pub(crate) available_next: u16,
    pub(crate) used: u16,
}

impl Device {
    pub(crate) fn new(region: Arc<DmaRegion>, queue: &SplitQueue) -> Self {
        Self { region, addresses: queue.addresses(), size: queue.config().size, available_next: 0, used: 0 }
    }

    fn offset(&self, iova: u64, bytes: u64) -> u64 {
        self.region.offset_of(iova, bytes).expect("an address outside the region")
    }

    pub(crate) fn read(&self, iova: u64, bytes: u32) -> Vec<u8> {
        let mut into = vec![0; bytes as usize];
        self.region.read_at(self.offset(iova, bytes.into()), &mut into).unwrap();
        into
    }

    pub(crate) fn write(&self, iova: u64, bytes: &[u8]) {
        self.region.write_at(self.offset(iova, bytes.len() as u64), bytes).unwrap();
    }

    fn descriptor(&self, table: u64, index: u16) -> (Piece, u16, u16) {
        let bytes = self.read(table + 16 * u64::from(index), 16);
        let iova = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let flags = u16::from_le_bytes(bytes[12..14].try_into().unwrap());
        let next = u16::from_le_bytes(bytes[14..].try_into().unwrap());
        (Piece { iova, length, write: flags & 2 != 0 }, flags, next)
    }

    /// Takes the next available chain, holding it against the rules of section 2.7.5.
    pub(crate) fn take(&mut self) -> Option<Taken> {
        let available = self.offset(self.addresses.available, 4);
        if self.region.load_u16(available + 2, Acquire).unwrap() == self.available_next {
            return None;
        }
        let slot = u64::from(self.available_next % self.size);
        let head = self.region.load_u16(available + 4 + 2 * slot, Relaxed).unwrap();
        self.available_next = self.available_next.wrapping_add(1);
        let mut taken = Taken { head, descriptors: vec![head], pieces: Vec::new() };
        let (first, flags, _) = self.descriptor(self.addresses.descriptors, head);
        if flags & 4 != 0 {
            assert_eq!(flags, 4, "an indirect descriptor with other flags");
            self.walk(first.iova, 0, first.length / 16, &mut taken, false);
        } else {
            self.walk(self.addresses.descriptors, head, self.size.into(), &mut taken, true);
        }
        let in_order = taken.pieces.windows(2).all(|pair| pair[0].write <= pair[1].write);
        assert!(in_order, "a readable descriptor after a writable one");
        Some(taken)
    }

    fn walk(&self, table: u64, start: u16, entries: u32, taken: &mut Taken, direct: bool) {
        let mut index = start;
        loop {
            assert!(u32::from(index) < entries, "a link out of the table");
            assert!(taken.pieces.len() < usize::from(self.size), "a chain longer than the ring");
            let (piece, flags, next) = self.descriptor(table, index);
            assert_eq!(flags & 4, 0, "an indirect descriptor inside a chain");
            if direct && index != start {
                taken.descriptors.push(index);
            }
            taken.pieces.push(piece);
            if flags & 1 == 0 {
                break;
            }
            index = next;
        }
    }

    /// Writes a used element and moves `used.idx` by one.
    pub(crate) fn complete(&mut self, id: u32, written: u32) {
        let used = self.offset(self.addresses.used, 4);
        let slot = u64::from(self.used % self.size);
        let mut element = id.to_le_bytes().to_vec();
        element.extend(written.to_le_bytes());
        self.region.write_at(used + 4 + 8 * slot, &element).unwrap();
        self.set_used(self.used.wrapping_add(1));
    }

    /// Writes `used.idx`, true or not.
    pub(crate) fn set_used(&mut self, index: u16) {
        self.used = index;
        self.region.store_u16(self.offset(self.addresses.used, 4) + 2, index, Release).unwrap();
    }

    pub(crate) fn set_used_flags(&self, flags: u16) {
        self.region.store_u16(self.offset(self.addresses.used, 4), flags, Relaxed).unwrap();
    }

    pub(crate) fn available_flags(&self) -> u16 {
        self.region.load_u16(self.offset(self.addresses.available, 4), Relaxed).unwrap()
    }

    pub(crate) fn used_event(&self) -> u16 {
        let place = self.addresses.available + 4 + 2 * u64::from(self.size);
        self.region.load_u16(self.offset(place, 2), Relaxed).unwrap()
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        let place = self.addresses.available + 4 + 2 * u64::from(self.size);
        self.region.store_u16(self.offset(place, 2), index, Relaxed).unwrap();
    }

    pub(crate) fn set_available_event(&self, index: u16) {
        let place = self.addresses.used + 4 + 8 * u64::from(self.size);
        self.region.store_u16(self.offset(place, 2), index, Relaxed).unwrap();
    }
}

/// A queue and its device, at a place in the region that is not its start.
pub(crate) fn pair(config: QueueConfig) -> (SplitQueue, Device) {
    let bytes = SplitQueue::bytes(config.size, config.indirect);
    let region = Arc::new(DmaRegion::new("test-ring", bytes + 8192, 0x10_0000).unwrap());
    let queue = SplitQueue::new(config, Arc::clone(&region), 4096).unwrap();
    let device = Device::new(region, &queue);
    (queue, device)
}

/// The shape of a chain in these tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) header: u8,
    pub(crate) payload_segments: u8,
    pub(crate) direction: Option<Direction>,
    pub(crate) status: u8,
}

pub(crate) const READ: Shape = Shape { header: 16, payload_segments: 1, direction: Some(Direction::In), status: 1 };
pub(crate) const SEGMENT_BYTES: u32 = 512;

impl Shape {
    pub(crate) fn segments(&self) -> u16 {
        let payload = if self.direction.is_some() { u16::from(self.payload_segments) } else { 0 };
        u16::from(self.header > 0) + payload + u16::from(self.status > 0)
    }

    pub(crate) fn writable(&self) -> u32 {
        let payload =
            if self.direction == Some(Direction::In) { u32::from(self.payload_segments) * SEGMENT_BYTES } else { 0 };
        payload + u32::from(self.status)
    }

    pub(crate) fn header_bytes(&self, token: u32) -> Vec<u8> {
        (0..self.header).map(|index| (token as u8).wrapping_mul(31).wrapping_add(index)).collect()
    }

    /// The checked chain, through the guest's words as in earnest.
    pub(crate) fn chain(&self, token: u32, queue: u16) -> ChainBuf {
        let header = self.header_bytes(token);
        let mut segments = Vec::new();
        if self.header > 0 {
            segments.push(SegmentWords::HeaderOut(&header));
        }
        let pieces = (0..u32::from(self.payload_segments)).map(|index| (index * SEGMENT_BYTES, SEGMENT_BYTES));
        match self.direction {
            Some(Direction::Out) => {
                segments.extend(pieces.map(|(offset, length)| SegmentWords::PayloadOut { offset, length }))
            }
            Some(Direction::In) => {
                segments.extend(pieces.map(|(offset, length)| SegmentWords::PayloadIn { offset, length }))
            }
            None => {}
        }
        if self.status > 0 {
            segments.push(SegmentWords::StatusIn(self.status.into()));
        }
        let payload = self.direction.map(|direction| Payload {
            iova: PAYLOAD_IOVA + u64::from(token) * 0x10_0000,
            length: u32::from(self.payload_segments) * SEGMENT_BYTES,
            direction,
        });
        let mut words = Vec::new();
        push_chain(&mut words, token, queue, &segments);
        let mut batch = ChainBatch::new();
        batch.parse(&words, &[Expected { token, payload }], &[queue]).unwrap();
        match batch.get(0) {
            Some(Outcome::Chain(chain)) => chain.to_buf(),
            other => panic!("not a chain: {other:?}"),
        }
    }
}
