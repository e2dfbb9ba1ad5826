//! The device as a driver's control lane sees it, over whatever transport a bus made.

use std::sync::Arc;

use cofferdam_device::error::TransportError;
use cofferdam_device::transport::Transport;
use cofferdam_runtime::{DeviceCapability, DeviceError};
use parking_lot::Mutex;

/// VIRTIO_F_INDIRECT_DESC (virtio 1.2, section 6).
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX (virtio 1.2, section 6).
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1 (virtio 1.2, section 6).
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// Bits 0 to 23 and 50 to 63 are the device type's, the rest belongs to ring and transport (virtio 1.2, section 2.2).
const DEVICE_TYPE_BITS: u64 = 0x00ff_ffff | !((1 << 50) - 1);

/// The transport, shared between the binding's control path and the capability a guest holds during `attach`.
pub(crate) type SharedTransport = Arc<Mutex<Box<dyn Transport>>>;

/// The ring features that the host takes whenever they are offered.
pub(crate) fn host_features(offered: u64) -> u64 {
    offered & (F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC)
}

/// Reads that a [`ConfigCopy`] keeps.
const COPIED_READS: usize = 16;

/// What one instance read of the configuration of a device that runs, for another that reads the same: a backend is a process, and may take as long to answer as it has to wait for a core.
#[derive(Default)]
pub(crate) struct ConfigCopy {
    /// How often the device had changed its configuration before.
    pub(crate) changes: u64,
    /// Offset and bytes.
    reads: Mutex<Vec<(u32, Vec<u8>)>>,
}

impl ConfigCopy {
    pub(crate) fn new(changes: u64) -> ConfigCopy {
        ConfigCopy { changes, reads: Mutex::default() }
    }

    fn find(&self, offset: u32, length: u32) -> Option<Vec<u8>> {
        let reads = self.reads.lock();
        let same = reads.iter().find(|(start, bytes)| *start == offset && bytes.len() == length as usize);
        same.map(|(_, bytes)| bytes.clone())
    }

    fn keep(&self, offset: u32, bytes: &[u8]) {
        let mut reads = self.reads.lock();
        if reads.len() < COPIED_READS {
            reads.push((offset, bytes.to_vec()));
        }
    }
}

/// What `virtio.device` is behind the border.
pub(crate) struct DeviceWindow {
    transport: SharedTransport,
    /// Data lanes that the operator allows, at least 1.
    lane_limit: u16,
    /// Largest ring the host is willing to keep, in entries.
    ring_limit: u16,
    negotiated: Arc<Mutex<Option<u64>>>,
    /// What an earlier driver negotiated of a device that runs: all that is on offer, and to be taken whole.
    adopted: Option<u64>,
    /// What is known of its configuration already, and kept of what is read.
    copy: Option<Arc<ConfigCopy>>,
}

impl DeviceWindow {
    pub(crate) fn new(
        transport: SharedTransport,
        lane_limit: u16,
        ring_limit: u16,
        negotiated: Arc<Mutex<Option<u64>>>,
    ) -> DeviceWindow {
        DeviceWindow { transport, lane_limit, ring_limit, negotiated, adopted: None, copy: None }
    }

    /// A device that runs with `features`, as a driver sees it that takes another one's place: it attaches as to any device, and nothing of that reaches the device but
    /// reads of its configuration.
    pub(crate) fn adopting(
        transport: SharedTransport,
        lane_limit: u16,
        ring_limit: u16,
        features: u64,
    ) -> DeviceWindow {
        let negotiated = Arc::new(Mutex::new(None));
        DeviceWindow { transport, lane_limit, ring_limit, negotiated, adopted: Some(features), copy: None }
    }

    /// The same, with what is read of its configuration kept in `copy`, and taken from it if it is there.
    pub(crate) fn with(self, copy: Option<Arc<ConfigCopy>>) -> DeviceWindow {
        DeviceWindow { copy, ..self }
    }
}

fn device_error(error: &TransportError) -> DeviceError {
    DeviceError::Device(error.to_string())
}

impl DeviceCapability for DeviceWindow {
    fn device_type(&mut self) -> Option<u32> {
        self.transport.lock().device_type()
    }

    fn offered_features(&mut self) -> u64 {
        if let Some(features) = self.adopted {
            return features;
        }
        self.transport.lock().offered_features() & DEVICE_TYPE_BITS
    }

    fn negotiate(&mut self, features: u64) -> Result<(), DeviceError> {
        let mut negotiated = self.negotiated.lock();
        if negotiated.is_some() {
            return Err(DeviceError::OutOfOrder("features were negotiated already".into()));
        }
        if let Some(adopted) = self.adopted {
            if features != adopted {
                let differ = features ^ adopted;
                return Err(DeviceError::Invalid(format!(
                    "the device runs with features {adopted:#x}, which cannot be changed now: {differ:#x} differ"
                )));
            }
            *negotiated = Some(features);
            return Ok(());
        }
        let mut transport = self.transport.lock();
        let offered = transport.offered_features();
        if offered & F_VERSION_1 == 0 {
            return Err(DeviceError::Device(
                "the device does not offer VIRTIO_F_VERSION_1: legacy devices are not supported (virtio 1.2, section 6.1)".into(),
            ));
        }
        let extra = features & !(offered & DEVICE_TYPE_BITS);
        if extra != 0 {
            return Err(DeviceError::Invalid(format!("feature bits {extra:#x} are not on offer")));
        }
        transport.negotiate(features | host_features(offered)).map_err(|e| device_error(&e))?;
        *negotiated = Some(features);
        Ok(())
    }

    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, DeviceError> {
        if length == 0 || length > 4096 || offset.checked_add(length).is_none() {
            return Err(DeviceError::Invalid(format!("{length} bytes at {offset}: 1 to 4,096 can be read")));
        }
        if self.negotiated.lock().is_none() {
            return Err(DeviceError::OutOfOrder("negotiate comes before read-config".into()));
        }
        if let Some(bytes) = self.copy.as_ref().and_then(|copy| copy.find(offset, length)) {
            return Ok(bytes);
        }
        let mut bytes = vec![0; length as usize];
        self.transport.lock().read_config(offset, &mut bytes).map_err(|e| device_error(&e))?;
        if let Some(copy) = &self.copy {
            copy.keep(offset, &bytes);
        }
        Ok(bytes)
    }

    fn max_queues(&mut self) -> u16 {
        self.transport.lock().max_queues()
    }

    fn max_lanes(&mut self) -> u16 {
        self.lane_limit
    }

    fn max_queue_size(&mut self, queue: u16) -> u16 {
        if queue >= self.max_queues() {
            return 0;
        }
        self.transport.lock().max_queue_size(queue).min(self.ring_limit)
    }
}
