//! The device itself: plain data that a test sets up and looks at afterwards.

use crate::device::{MAX_CONFIG_READ_BYTES, VirtioDevice};
use crate::error::VirtioError;

/// A virtio device that says what the test put into it and keeps the order of calls of the WIT.
///
/// ```
/// use cofferdam_sdk::{VirtioDevice, mock::MockDevice};
///
/// let mut device = MockDevice { offered: 1 << 9, config: vec![7; 8], ..MockDevice::new(2) };
/// assert!(device.read_config(0, 8).is_err()); // before negotiate
/// device.negotiate(1 << 9).unwrap();
/// assert_eq!(device.read_config(0, 8).unwrap(), [7; 8]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MockDevice {
    /// The virtio device id, or `None` as a vhost-user transport says.
    pub device_type: Option<u32>,
    /// Device-type feature bits on offer.
    pub offered: u64,
    /// Configuration space; a read beyond it is refused by the device.
    pub config: Vec<u8>,
    /// Queues of the device.
    pub max_queues: u16,
    /// Data lanes that the operator allows.
    pub max_lanes: u16,
    /// Largest size of each queue.
    pub max_queue_size: u16,
    /// What was negotiated; `None` before.
    pub negotiated: Option<u64>,
    /// The device is gone: everything that asks it fails.
    pub lost: bool,
}

impl MockDevice {
    /// A device of `device_type` with no features, no configuration space and one queue of 256 entries.
    #[must_use]
    pub fn new(device_type: u32) -> Self {
        Self {
            device_type: Some(device_type),
            offered: 0,
            config: Vec::new(),
            max_queues: 1,
            max_lanes: 64,
            max_queue_size: 256,
            negotiated: None,
            lost: false,
        }
    }

    /// Writes `bytes` into configuration space at `offset` bytes, growing it with zeroes.
    pub fn set_config(&mut self, offset: usize, bytes: &[u8]) {
        let end = offset + bytes.len();
        if self.config.len() < end {
            self.config.resize(end, 0);
        }
        self.config[offset..end].copy_from_slice(bytes);
    }
}

impl VirtioDevice for MockDevice {
    fn device_type(&self) -> Option<u32> {
        self.device_type
    }

    fn offered_features(&self) -> u64 {
        self.offered
    }

    fn negotiate(&mut self, features: u64) -> Result<(), VirtioError> {
        if self.negotiated.is_some() {
            return Err(VirtioError::OutOfOrder("negotiate was called before".into()));
        }
        if features & !self.offered != 0 {
            return Err(VirtioError::Invalid(format!("features {features:#x} are not all on offer")));
        }
        if self.lost {
            return Err(VirtioError::Device("gone".into()));
        }
        self.negotiated = Some(features);
        Ok(())
    }

    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, VirtioError> {
        if self.negotiated.is_none() {
            return Err(VirtioError::OutOfOrder("read-config before negotiate".into()));
        }
        if length == 0 || length > MAX_CONFIG_READ_BYTES {
            return Err(VirtioError::Invalid(format!("length {length}")));
        }
        if self.lost {
            return Err(VirtioError::Device("gone".into()));
        }
        let start = offset as usize;
        self.config
            .get(start..start.saturating_add(length as usize))
            .map(<[u8]>::to_vec)
            .ok_or_else(|| VirtioError::Device(format!("configuration space has {} bytes", self.config.len())))
    }

    fn max_queues(&self) -> u16 {
        self.max_queues
    }

    fn max_lanes(&self) -> u16 {
        self.max_lanes
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        if queue < self.max_queues { self.max_queue_size } else { 0 }
    }
}
