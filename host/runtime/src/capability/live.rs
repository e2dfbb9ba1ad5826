//! `cofferdam:driver/virtio.live-device`: the device from DRIVER_OK on, for as long as one call of a control lane with queues of its own lasts.

use wasmtime::component::Resource;

use crate::activity::Import;
use crate::bindings::cofferdam::driver::virtio;
use crate::capability::device::{DeviceError, check_config_read, into_wit};
use crate::state::LaneState;

/// Longest request and longest response of a command in bytes (`wit/virtio.wit`).
const MAX_COMMAND_BYTES: usize = 64;

/// A running device as its control lane may use it; `wit/virtio.wit` says what each method promises. The manager implements this over a transport and the control lane's queue.
///
/// No method may block for longer than 2 s.
pub trait LiveCapability: Send {
    /// Reads `length` bytes (1 to 4,096, checked by the caller) of configuration space.
    ///
    /// # Errors
    /// [`DeviceError`], which the guest receives.
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, DeviceError>;
    /// Sends `request` (1 to 64 bytes) on the queue for commands and waits for a response of at most `response_bytes` (0 to 64).
    ///
    /// # Errors
    /// [`DeviceError`], which the guest receives.
    fn command(&mut self, request: &[u8], response_bytes: u32) -> Result<Vec<u8>, DeviceError>;
}

/// What `resource live-device` is in the host: a name for the one device in the lane's state.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it inside a private module")]
pub struct LiveHandle(());

/// The representation of the one device that a lane can hold.
pub(crate) fn the_live_device() -> Resource<LiveHandle> {
    Resource::new_own(0)
}

impl LaneState {
    fn with_live<R>(&mut self, import: Import, call: impl FnOnce(&mut dyn LiveCapability) -> R) -> wasmtime::Result<R> {
        let Some(device) = self.live.as_deref_mut() else {
            return Err(wasmtime::Error::msg("the live device is not in reach outside of calls that name it"));
        };
        Ok(self.watch.host_call(import, || call(device))?)
    }
}

impl virtio::HostLiveDevice for LaneState {
    fn read_config(
        &mut self,
        _: Resource<LiveHandle>,
        offset: u32,
        length: u32,
    ) -> wasmtime::Result<Result<Vec<u8>, virtio::VirtioError>> {
        if let Err(error) = check_config_read(offset, length) {
            return Ok(Err(error));
        }
        Ok(self.with_live(Import::ReadConfig, |device| device.read_config(offset, length))?.map_err(into_wit))
    }

    fn command(
        &mut self,
        _: Resource<LiveHandle>,
        request: Vec<u8>,
        response_bytes: u32,
    ) -> wasmtime::Result<Result<Vec<u8>, virtio::VirtioError>> {
        if request.is_empty() || request.len() > MAX_COMMAND_BYTES || response_bytes as usize > MAX_COMMAND_BYTES {
            let (sent, most) = (request.len(), MAX_COMMAND_BYTES);
            let message = format!("a command of {sent} bytes with {response_bytes} for the response; {most} at most");
            return Ok(Err(virtio::VirtioError::Invalid(message)));
        }
        Ok(self.with_live(Import::Command, |device| device.command(&request, response_bytes))?.map_err(into_wit))
    }

    fn drop(&mut self, _: Resource<LiveHandle>) -> wasmtime::Result<()> {
        // The guest only ever borrows: what it drops is its name for the device.
        Ok(())
    }
}
