//! `cofferdam:driver/virtio`: the device, for as long as one call of the control lane lasts.

use wasmtime::component::{HasSelf, Linker, Resource};

use crate::activity::Import;
use crate::bindings::cofferdam::driver::virtio;
use crate::state::LaneState;
use crate::text::{MAX_MESSAGE_BYTES, clean};

/// Largest read of configuration space in bytes (`wit/virtio.wit`).
const MAX_CONFIG_BYTES: u32 = 4096;

/// Why the host or the device refused a call on the device. An answer to the guest, never a trap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The call is not legal now.
    #[error("out of order: {0}")]
    OutOfOrder(String),
    /// An argument is out of its bound.
    #[error("invalid: {0}")]
    Invalid(String),
    /// The device refused, timed out or is gone.
    #[error("device: {0}")]
    Device(String),
}

/// A virtio device as its driver may see it; `wit/virtio.wit` says what each method promises. The manager implements this over a transport.
///
/// No method may block for longer than 2 s.
pub trait DeviceCapability: Send {
    /// The virtio device id, or `None` where the transport cannot tell.
    fn device_type(&mut self) -> Option<u32>;
    /// Device-type feature bits on offer; the host's own bits read as 0.
    fn offered_features(&mut self) -> u64;
    /// Accepts a subset of the offered bits. Once.
    ///
    /// # Errors
    /// [`DeviceError`], which the guest receives.
    fn negotiate(&mut self, features: u64) -> Result<(), DeviceError>;
    /// Reads `length` bytes (1 to 4,096, checked by the caller) of configuration space.
    ///
    /// # Errors
    /// [`DeviceError`], which the guest receives.
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, DeviceError>;
    /// How many queues the device has, at least 1.
    fn max_queues(&mut self) -> u16;
    /// How many data lanes may be planned, at least 1.
    fn max_lanes(&mut self) -> u16;
    /// Largest ring of a queue in entries; 0 for a queue that does not exist.
    fn max_queue_size(&mut self, queue: u16) -> u16;
}

/// What `resource device` is in the host: nothing but a name for the one device in the lane's state.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it inside a private module")]
pub struct DeviceHandle(());

/// The representation of the one device that a lane can hold.
pub(crate) fn the_device() -> Resource<DeviceHandle> {
    Resource::new_own(0)
}

pub(crate) fn link(linker: &mut Linker<LaneState>) -> wasmtime::Result<()> {
    virtio::add_to_linker::<_, HasSelf<LaneState>>(linker, |state| state)
}

impl LaneState {
    /// Runs one host call on the device. A guest can hold the handle only while the device is there; that it is not is told as a trap all the same.
    fn with_device<R>(
        &mut self,
        import: Import,
        call: impl FnOnce(&mut dyn DeviceCapability) -> R,
    ) -> wasmtime::Result<R> {
        let Some(device) = self.device.as_deref_mut() else {
            return Err(wasmtime::Error::msg("the device is not in reach outside of attach and config-changed"));
        };
        Ok(self.watch.host_call(import, || call(device))?)
    }
}

impl virtio::Host for LaneState {}

impl virtio::HostDevice for LaneState {
    fn device_type(&mut self, _: Resource<DeviceHandle>) -> wasmtime::Result<Option<u32>> {
        self.with_device(Import::DeviceType, |device| device.device_type())
    }

    fn offered_features(&mut self, _: Resource<DeviceHandle>) -> wasmtime::Result<u64> {
        self.with_device(Import::OfferedFeatures, |device| device.offered_features())
    }

    fn negotiate(
        &mut self,
        _: Resource<DeviceHandle>,
        features: u64,
    ) -> wasmtime::Result<Result<(), virtio::VirtioError>> {
        Ok(self.with_device(Import::Negotiate, |device| device.negotiate(features))?.map_err(into_wit))
    }

    fn read_config(
        &mut self,
        _: Resource<DeviceHandle>,
        offset: u32,
        length: u32,
    ) -> wasmtime::Result<Result<Vec<u8>, virtio::VirtioError>> {
        if let Err(error) = check_config_read(offset, length) {
            return Ok(Err(error));
        }
        Ok(self.with_device(Import::ReadConfig, |device| device.read_config(offset, length))?.map_err(into_wit))
    }

    fn max_queues(&mut self, _: Resource<DeviceHandle>) -> wasmtime::Result<u16> {
        self.with_device(Import::MaxQueues, |device| device.max_queues())
    }

    fn max_lanes(&mut self, _: Resource<DeviceHandle>) -> wasmtime::Result<u16> {
        self.with_device(Import::MaxLanes, |device| device.max_lanes())
    }

    fn max_queue_size(&mut self, _: Resource<DeviceHandle>, queue: u16) -> wasmtime::Result<u16> {
        self.with_device(Import::MaxQueueSize, |device| device.max_queue_size(queue))
    }

    fn drop(&mut self, _: Resource<DeviceHandle>) -> wasmtime::Result<()> {
        // The guest only ever borrows: what it drops is its name for the device.
        Ok(())
    }
}

/// Whether so much of configuration space can be read at once.
pub(crate) fn check_config_read(offset: u32, length: u32) -> Result<(), virtio::VirtioError> {
    if length == 0 || length > MAX_CONFIG_BYTES || offset.checked_add(length).is_none() {
        let message = format!("{length} bytes at offset {offset}; 1 to {MAX_CONFIG_BYTES} can be read at once");
        return Err(virtio::VirtioError::Invalid(message));
    }
    Ok(())
}

pub(crate) fn into_wit(error: DeviceError) -> virtio::VirtioError {
    let clean = |text: String| clean(&text, MAX_MESSAGE_BYTES);
    match error {
        DeviceError::OutOfOrder(text) => virtio::VirtioError::OutOfOrder(clean(text)),
        DeviceError::Invalid(text) => virtio::VirtioError::Invalid(clean(text)),
        DeviceError::Device(text) => virtio::VirtioError::Device(clean(text)),
    }
}
