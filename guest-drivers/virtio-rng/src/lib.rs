//! A driver for virtio entropy devices: virtio 1.2, section 5.4.
//!
//! The smallest driver there is, and the example of `docs/WRITING-A-DRIVER.md`: one queue, no configuration space, no feature bits. A request is a buffer that the device fills, wholly or
//! in part.

use cofferdam_sdk::{
    Answers, Attachment, ChainWriter, DeviceId, DriverError, EntropyProperties, Lane, LaneSetup, Operation, QueuePlan,
    Requests, Responses, Status, VirtioDevice, VirtioDriver,
};

/// The virtio device id of an entropy device (section 5).
pub const DEVICE_TYPE: u32 = 4;
/// The one queue, `requestq` (section 5.4.2).
const REQUEST_QUEUE: u16 = 0;
/// Entries of it that are asked for: few, because a source of entropy is slow and not to be drained.
const QUEUE_SIZE: u16 = 64;
/// Largest request in bytes.
const MAX_REQUEST_BYTES: u32 = 65_536;

/// The control lane: there is nothing to remember.
#[derive(Debug)]
pub struct VirtioRng;

impl VirtioDriver for VirtioRng {
    type Lane = VirtioRngLane;
    type Properties = EntropyProperties;

    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        match device.device_type() {
            Some(DEVICE_TYPE) => {}
            Some(other) => {
                return Err(DriverError::NotMine(format!("device id {other}; virtio-rng is {DEVICE_TYPE}")));
            }
            // The transport cannot tell. An entropy device has no feature bits of its own (section 5.4.3).
            None if device.offered_features() != 0 => {
                let features = device.offered_features();
                return Err(DriverError::NotMine(format!("it offers features {features:#x}, and virtio-rng has none")));
            }
            None => {}
        }
        device.negotiate(0)?;
        let size = match device.max_queue_size(REQUEST_QUEUE) {
            0 => return Err(DriverError::Device("it has no requestq (section 5.4.2)".into())),
            max => 1 << max.min(QUEUE_SIZE).ilog2(),
        };
        // A buffer that was filled to its end is a success that needs no look.
        let queues = vec![QueuePlan::requests(REQUEST_QUEUE, size, Some(Vec::new()), 0)];
        Ok((Self, Attachment { features: 0, queues, state: Vec::new() }))
    }

    fn properties(&self) -> EntropyProperties {
        EntropyProperties { max_request_bytes: MAX_REQUEST_BYTES }
    }

    /// There is no configuration space (section 5.4.4).
    fn config_changed(&mut self, _: &mut dyn VirtioDevice) -> Result<(), DriverError> {
        Ok(())
    }

    fn start(setup: &LaneSetup) -> Result<VirtioRngLane, DriverError> {
        let [queue] = setup.queues[..] else {
            return Err(DriverError::Host(format!("{} queues for a lane of one", setup.queues.len())));
        };
        Ok(VirtioRngLane { queue })
    }
}

/// The data lane.
#[derive(Debug)]
pub struct VirtioRngLane {
    queue: u16,
}

impl Lane for VirtioRngLane {
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
        for request in requests {
            let length = u32::try_from(request.length).unwrap_or(0);
            let fill = request.operation == Operation::Fill && (1..=MAX_REQUEST_BYTES).contains(&length);
            // One device-writable buffer (section 5.4.6).
            if !fill || chains.chain(request.token, self.queue, |chain| chain.payload_in(0, length)).is_err() {
                chains.refuse(request.token, Status::Unsupported);
            }
        }
    }

    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>) {
        for response in responses {
            // The device places one or more bytes (section 5.4.6.1); fewer than there is room for is a success.
            let status = if response.written > 0 { Status::Ok } else { Status::DeviceFault };
            answers.answer(response.token, status);
        }
    }
}

cofferdam_sdk::export_entropy_driver!(VirtioRng, devices: [DeviceId::virtio(DEVICE_TYPE)]);
