//! The control lane: whose device it is, what is negotiated, which queues are set up, and what the device can do.

use cofferdam_sdk::device::MAX_PLANNED_QUEUES;
use cofferdam_sdk::{Attachment, BlockProperties, DriverError, LaneSetup, QueuePlan, VirtioDevice, VirtioDriver, log};

use crate::config::Geometry;
use crate::lane::VirtioBlkLane;
use crate::state::LaneState;
use crate::{DEVICE_TYPE, feature};

/// Descriptors of a request besides its payload: header and status.
const DESCRIPTORS_BESIDES_PAYLOAD: u16 = 2;
/// Descriptors of the longest request without payload: header, range and status of a discard.
const MIN_QUEUE_SIZE: u16 = 4;
/// The status byte of a request that succeeded (section 5.2.6).
pub(crate) const STATUS_OK: u8 = 0;

/// The control lane of the driver.
#[derive(Debug)]
pub struct VirtioBlk {
    features: u64,
    geometry: Geometry,
    /// What the lanes were told; properties never promise more, whatever configuration space says later.
    limits: LaneState,
}

impl VirtioDriver for VirtioBlk {
    type Lane = VirtioBlkLane;
    type Properties = BlockProperties;

    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        match device.device_type() {
            Some(DEVICE_TYPE) => Self::claim(device),
            Some(other) => Err(DriverError::NotMine(format!("device id {other}; virtio-blk is {DEVICE_TYPE}"))),
            None => {
                // The transport cannot tell, so whatever does not fit means that the device is of another kind.
                let strange = device.offered_features() & !feature::OF_A_BLOCK_DEVICE;
                if strange != 0 {
                    return Err(not_mine(&format!("it offers features {strange:#x}")));
                }
                Self::claim(device).map_err(|error| match error {
                    DriverError::Device(text) => not_mine(&text),
                    other => other,
                })
            }
        }
    }

    fn properties(&self) -> BlockProperties {
        let read_only = self.features & feature::RO != 0;
        let served = |bytes: u32| if read_only { 0 } else { bytes };
        BlockProperties {
            capacity_bytes: self.geometry.capacity_bytes,
            logical_block_bytes: self.geometry.logical_block_bytes,
            physical_block_bytes: self.geometry.physical_block_bytes,
            max_transfer_bytes: self.limits.max_transfer_bytes,
            read_only,
            can_flush: self.features & feature::FLUSH != 0,
            max_discard_bytes: served(self.limits.max_discard_bytes),
            discard_align_bytes: self.geometry.discard_align_bytes,
            max_write_zeroes_bytes: served(self.limits.max_write_zeroes_bytes),
            write_zeroes_may_unmap: self.limits.write_zeroes_may_unmap,
            has_id: true,
        }
    }

    fn config_changed(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DriverError> {
        let now = Geometry::read(device, self.features)?;
        if now.logical_block_bytes != self.geometry.logical_block_bytes {
            return Err(DriverError::Device("the block size changed under a running driver (section 5.2.5)".into()));
        }
        // Only the capacity may change while the device runs (section 5.2.6); limits were fixed when the lanes started.
        if now.capacity_bytes != self.geometry.capacity_bytes {
            log::info(&format!("capacity was {} bytes and is {}", self.geometry.capacity_bytes, now.capacity_bytes));
        }
        self.geometry.capacity_bytes = now.capacity_bytes;
        Ok(())
    }

    fn start(setup: &LaneSetup) -> Result<VirtioBlkLane, DriverError> {
        VirtioBlkLane::new(setup)
    }
}

impl VirtioBlk {
    fn claim(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        let features = choose_features(device.offered_features());
        device.negotiate(features)?;
        let geometry = Geometry::read(device, features)?;
        let queues = plan_queues(device, geometry.queues)?;
        // A chain is never longer than its queue, indirect or not (section 2.7.5.3.1).
        let smallest = queues.iter().map(|queue| queue.size).min().unwrap_or(MIN_QUEUE_SIZE);
        let segments = u32::from(smallest - DESCRIPTORS_BESIDES_PAYLOAD);
        let max_transfer_bytes = geometry.max_transfer_bytes(segments).ok_or_else(|| {
            DriverError::Device(format!("{segments} segments of {} bytes hold no block", geometry.max_segment_bytes))
        })?;
        let limits = LaneState {
            max_transfer_bytes,
            max_segment_bytes: geometry.max_segment_bytes,
            max_discard_bytes: geometry.max_discard_bytes,
            max_write_zeroes_bytes: geometry.max_write_zeroes_bytes,
            write_zeroes_may_unmap: geometry.write_zeroes_may_unmap,
        };
        let attachment = Attachment { features, queues, state: limits.encode() };
        Ok((Self { features, geometry, limits }, attachment))
    }
}

/// What to accept of what is on offer.
fn choose_features(offered: u64) -> u64 {
    let mut features = offered & feature::WANTED;
    if features & feature::FLUSH == 0 {
        // With the mode of the cache but no way to flush it, the device might keep a cache that nobody can write back. Without either it
        // must write through (section 5.2.6.2).
        features &= !feature::CONFIG_WCE;
    }
    features
}

/// As many queues as device and operator allow, each as large as it can be.
fn plan_queues(device: &dyn VirtioDevice, of_the_device: u16) -> Result<Vec<QueuePlan>, DriverError> {
    let count = of_the_device.min(device.max_queues()).min(device.max_lanes()).min(MAX_PLANNED_QUEUES);
    let mut queues = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let size = match device.max_queue_size(index) {
            0 => 0,
            max => 1 << max.ilog2(),
        };
        if size >= MIN_QUEUE_SIZE {
            queues.push(QueuePlan::requests(index, size, Some(vec![STATUS_OK]), index));
        } else if index == 0 {
            return Err(DriverError::Device(format!(
                "queue 0 has {size} entries; a request takes {MIN_QUEUE_SIZE} (section 5.2.2)"
            )));
        } else {
            // The device has fewer queues than it says: use those that exist.
            log::warn(&format!("queue {index} of {count} does not exist or is too small"));
            break;
        }
    }
    if queues.is_empty() {
        return Err(DriverError::Host("no queue was allowed".into()));
    }
    Ok(queues)
}

fn not_mine(why: &str) -> DriverError {
    DriverError::NotMine(format!("this does not look like virtio-blk: {why}"))
}
