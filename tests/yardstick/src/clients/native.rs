//! The same driver without the sandbox, under the same host code: what it costs less than `cofferdam` is what the sandbox costs.

use std::cell::RefCell;
use std::sync::Arc;

use anyhow::Result;
use cofferdam_manager::native::{
    Attachment, BlockProperties, CallError, DeviceCapability, DeviceError, DriverError, LaneDriver, LaneSetup,
    NativeDriver, QueueOwner, QueuePlan,
};
use cofferdam_manager::{Binding, LoadSpec, Transport};
use cofferdam_sdk::native::NativeLane;
use cofferdam_sdk::{QueueOwner as TheirOwner, VirtioDevice, VirtioDriver as _, VirtioError};
use cofferdam_virtio_blk::VirtioBlk;

use super::cofferdam::{Host, InProcess, connect as reach};
use crate::backend::Backend;
use crate::engine::{Engine, Mode};

/// Connects.
///
/// # Errors
/// When the load fails.
pub fn connect(host: &Host, device: &Backend, mode: Mode, queues: u16) -> Result<Option<Box<dyn Engine>>> {
    let binding = load(host, Box::new(reach(&device.socket())?), queues)?;
    Ok(Some(Box::new(InProcess::of(host, binding, mode)?)))
}

/// Joins the native driver and a device.
///
/// # Errors
/// When the load fails.
pub fn load(host: &Host, transport: Box<dyn Transport>, queues: u16) -> Result<Arc<Binding>> {
    let mut spec = LoadSpec::new("native", Vec::new(), transport);
    spec.native = Some(Box::new(Native));
    spec.queues = Some(queues);
    spec.ring_entries = super::bare::RING_ENTRIES;
    Ok(host.manager.load(spec)?)
}

struct Native;

/// The device, as the driver's own kit sees it.
struct Window<'a>(RefCell<&'a mut dyn DeviceCapability>);

fn refusal(error: DeviceError) -> VirtioError {
    match error {
        DeviceError::OutOfOrder(text) => VirtioError::OutOfOrder(text),
        DeviceError::Invalid(text) => VirtioError::Invalid(text),
        DeviceError::Device(text) => VirtioError::Device(text),
    }
}

fn complaint(error: cofferdam_sdk::DriverError) -> CallError {
    use cofferdam_sdk::DriverError as Theirs;
    CallError::Driver(match error {
        Theirs::NotMine(text) => DriverError::NotMine(text),
        Theirs::Device(text) => DriverError::Device(text),
        Theirs::Unsupported(text) => DriverError::Unsupported(text),
        Theirs::Host(text) => DriverError::Host(text),
    })
}

impl VirtioDevice for Window<'_> {
    fn device_type(&self) -> Option<u32> {
        self.0.borrow_mut().device_type()
    }

    fn offered_features(&self) -> u64 {
        self.0.borrow_mut().offered_features()
    }

    fn negotiate(&mut self, features: u64) -> Result<(), VirtioError> {
        self.0.get_mut().negotiate(features).map_err(refusal)
    }

    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, VirtioError> {
        self.0.get_mut().read_config(offset, length).map_err(refusal)
    }

    fn max_queues(&self) -> u16 {
        self.0.borrow_mut().max_queues()
    }

    fn max_lanes(&self) -> u16 {
        self.0.borrow_mut().max_lanes()
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.0.borrow_mut().max_queue_size(queue)
    }
}

impl NativeDriver for Native {
    fn attach(&mut self, device: &mut dyn DeviceCapability) -> Result<(Attachment, BlockProperties), CallError> {
        let (driver, made) = VirtioBlk::attach(&mut Window(RefCell::new(device))).map_err(complaint)?;
        let p = driver.properties();
        let queues = made.queues.into_iter().map(|plan| QueuePlan {
            index: plan.index,
            size: plan.size,
            ordinary_response: plan.ordinary_response,
            owner: match plan.owner {
                TheirOwner::Set(set) => QueueOwner::Set(set),
                TheirOwner::Control => QueueOwner::Control,
            },
            // A disk has none that is posted.
            posting: None,
        });
        let attachment = Attachment { features: made.features, queues: queues.collect(), state: made.state };
        let properties = BlockProperties {
            capacity_bytes: p.capacity_bytes,
            logical_block_bytes: p.logical_block_bytes,
            physical_block_bytes: p.physical_block_bytes,
            max_transfer_bytes: p.max_transfer_bytes,
            read_only: p.read_only,
            can_flush: p.can_flush,
            max_discard_bytes: p.max_discard_bytes,
            discard_align_bytes: p.discard_align_bytes,
            max_write_zeroes_bytes: p.max_write_zeroes_bytes,
            write_zeroes_may_unmap: p.write_zeroes_may_unmap,
            has_id: p.has_id,
        };
        Ok((attachment, properties))
    }

    fn start(&mut self, setup: &LaneSetup) -> Result<Box<dyn LaneDriver>, CallError> {
        let setup = cofferdam_sdk::LaneSetup {
            features: setup.features,
            state: setup.state.clone(),
            queues: setup.queues.clone(),
        };
        Ok(Box::new(Lane(NativeLane::start(&setup).map_err(complaint)?)))
    }
}

struct Lane(NativeLane<VirtioBlk>);

impl LaneDriver for Lane {
    fn submit(&mut self, requests: &[u64], out: &mut Vec<u32>) -> Result<(), CallError> {
        self.0.submit(requests, out);
        Ok(())
    }

    fn complete(&mut self, responses: &[u32], out: &mut Vec<u32>) -> Result<(), CallError> {
        self.0.complete(responses, out);
        Ok(())
    }
}
