//! Block requests over a transport, with the project's own virtqueue: enough to see data go both ways.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_device::words::{self, SegmentWords};
use cofferdam_device::{
    ChainBatch, Direction, DmaRegion, Expected, Outcome, Payload, QueueConfig, QueueEvents, QueueSetup, Silence,
    SplitQueue, Transport,
};

use super::readable;

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;
const RING: u16 = 64;
/// Where the device sees the memory: an address that is nobody's host address.
const IOVA: u64 = 0x4000_0000;
const DATA: u64 = 1 << 20;
const REGION: u64 = 2 << 20;

/// A started disk.
pub struct Disk {
    pub device: VhostUser,
    region: Arc<DmaRegion>,
    queues: Vec<(SplitQueue, QueueEvents)>,
}

impl Disk {
    pub fn start(mut device: VhostUser, queues: u16) -> Self {
        let offered = device.offered_features();
        let wanted = offered & (VERSION_1 | EVENT_IDX | INDIRECT);
        device.negotiate(wanted).unwrap();
        let region = Arc::new(DmaRegion::new("test", REGION, IOVA).unwrap());
        device.map(Arc::clone(&region)).unwrap();
        let mut at = 0;
        let queues = (0..queues)
            .map(|index| {
                let config = QueueConfig {
                    index,
                    size: RING,
                    event_idx: wanted & EVENT_IDX != 0,
                    indirect: wanted & INDIRECT != 0,
                };
                let queue = SplitQueue::new(config, Arc::clone(&region), at).unwrap();
                at += SplitQueue::bytes(RING, config.indirect);
                assert!(at <= DATA);
                let addresses = queue.addresses();
                let events = device.setup_queue(QueueSetup { index, size: RING, addresses }).unwrap();
                (queue, events)
            })
            .collect();
        device.start().unwrap();
        Disk { device, region, queues }
    }

    pub fn write(&mut self, queue: u16, sector: u64, data: &[u8]) {
        self.region.write_at(DATA, data).unwrap();
        self.request(queue, 1, sector, data.len(), Direction::Out);
    }

    pub fn read(&mut self, queue: u16, sector: u64, bytes: usize) -> Vec<u8> {
        self.region.fill(DATA, bytes as u64, 0xee).unwrap();
        self.request(queue, 0, sector, bytes, Direction::In);
        let mut data = vec![0; bytes];
        self.region.read_at(DATA, &mut data).unwrap();
        data
    }

    fn request(&mut self, queue: u16, kind: u32, sector: u64, bytes: usize, direction: Direction) {
        self.request_at(queue, kind, sector, IOVA + DATA, bytes, direction);
    }

    /// Puts one request (virtio 1.2, section 5.2.6) on the ring and waits for it on the call eventfd.
    pub fn request_at(&mut self, queue: u16, kind: u32, sector: u64, iova: u64, bytes: usize, direction: Direction) {
        let length = u32::try_from(bytes).unwrap();
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let payload = match direction {
            Direction::Out => SegmentWords::PayloadOut { offset: 0, length },
            Direction::In => SegmentWords::PayloadIn { offset: 0, length },
        };
        let mut words = Vec::new();
        let segments = [SegmentWords::HeaderOut(&header), payload, SegmentWords::StatusIn(1)];
        words::push_chain(&mut words, 7, queue, &segments);
        let payload = Some(Payload { iova, length, direction });
        let mut batch = ChainBatch::new();
        batch.parse(&words, &[Expected { token: 7, payload }], &[queue]).unwrap();
        let Some(Outcome::Chain(chain)) = batch.get(0) else { panic!("not a chain") };

        let (ring, events) = &mut self.queues[usize::from(queue)];
        ring.add(&chain).unwrap();
        if ring.publish() {
            events.doorbell.ring();
        }
        let used = loop {
            if let Some(used) = ring.pop().unwrap() {
                break used;
            }
            if !ring.arm() {
                assert!(readable(&events.call), "the device never answered");
                let _ = rustix::io::read(&events.call, &mut [0; 8]);
            }
        };
        assert_eq!(used.token, 7);
        assert_eq!(used.status(), [0], "VIRTIO_BLK_S_OK");
    }

    /// Rings a queue's doorbell with nothing on the ring.
    pub fn ring(&self, queue: u16) {
        self.queues[usize::from(queue)].1.doorbell.ring();
    }

    pub fn quiesce(&mut self, unanswered: usize, within: Duration) -> Silence {
        self.device.quiesce(unanswered, Instant::now() + within)
    }
}

/// The reason of an unconfirmed silence.
pub fn reason(silence: Silence) -> String {
    match silence {
        Silence::Unconfirmed { reason } => reason,
        Silence::Confirmed => panic!("confirmed"),
    }
}
