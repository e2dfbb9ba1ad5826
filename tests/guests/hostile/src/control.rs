//! What goes wrong on the control lane.

use cofferdam_sdk::{
    Attachment, BlockProperties, DriverError, ExportedState, LaneSetup, QueuePlan, VirtioDevice, VirtioDriver, log,
};
use cofferdam_virtio_blk::VirtioBlk;

use crate::lane::HostileLane;
use crate::{behaviour, eat, recurse, spin};

/// The control lane of every driver of this crate.
#[derive(Debug)]
pub struct Hostile {
    inner: VirtioBlk,
}

impl VirtioDriver for Hostile {
    type Lane = HostileLane;
    type Properties = BlockProperties;

    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        match behaviour() {
            "trap-attach" => panic!("this driver panics in attach"),
            "loop-attach" => spin(),
            "eat-attach" => eat(),
            "recurse-attach" => {
                recurse(0);
            }
            "flood-log" => (0..100_000).for_each(|line| log::warn(&format!("flood line {line}"))),
            "long-log-line" => log::warn(&"long ".repeat((1 << 20) / 5)),
            "rude-log-line" => log::warn("rude \x1b[31m\x1b]0;title\x07 \r\n\0 line\u{202e}"),
            "not-mine" => return Err(DriverError::NotMine("no device is".into())),
            "unoffered-features" => device.negotiate(1 << 23 | device.offered_features())?,
            "read-config-huge" => {
                device.negotiate(0)?;
                device.read_config(0, 1 << 30)?;
            }
            "never-negotiates" => {
                let queues = vec![plan(0, device.max_queue_size(0))];
                let inner = VirtioBlk::attach(&mut Pretend(device))?.0;
                return Ok((
                    Self { inner },
                    Attachment { features: device.offered_features(), queues, state: Vec::new() },
                ));
            }
            _ => {}
        }
        let (inner, mut attachment) = VirtioBlk::attach(device)?;
        if behaviour() == "trap-attach-24m" && inner.properties().capacity_bytes == 24 << 20 {
            panic!("this driver panics in attach to a disk of 24 MiB");
        }
        let max_size = device.max_queue_size(0);
        let queues = &mut attachment.queues;
        match behaviour() {
            "negotiate-twice" => device.negotiate(attachment.features)?,
            "no-queues" => queues.clear(),
            "too-many-queues" => *queues = (0..1000).map(|index| plan(index, max_size)).collect(),
            "repeated-queue" => *queues = vec![plan(0, max_size), plan(0, max_size)],
            "queue-out-of-range" => queues[0].index = 60_000,
            "queue-size-odd" => queues[0].size = 100,
            "queue-size-huge" => queues[0].size = 32_768,
            "huge-state" => attachment.state.resize(1 << 20, 0),
            "huge-ordinary-response" => queues[0].ordinary_response = Some(vec![0; 4096]),
            name if name.ends_with("-complete") || name.ends_with("-answer") || COMPLETE_TOO.contains(&name) => {
                // Without an ordinary response every answer is the driver's.
                queues.iter_mut().for_each(|queue| queue.ordinary_response = None);
            }
            _ => {}
        }
        Ok((Self { inner }, attachment))
    }

    fn properties(&self) -> BlockProperties {
        let mut properties = self.inner.properties();
        match behaviour() {
            "trap-properties" => panic!("this driver panics in get-properties"),
            "bad-block-size" => properties.logical_block_bytes = 1000,
            "zero-transfer" => properties.max_transfer_bytes = 0,
            "odd-capacity" => properties.capacity_bytes += 1,
            _ => {}
        }
        properties
    }

    fn config_changed(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DriverError> {
        if behaviour() == "trap-config-changed" {
            panic!("this driver panics in config-changed");
        }
        self.inner.config_changed(device)?;
        if behaviour() == "trap-attach-24m" && self.inner.properties().capacity_bytes == 24 << 20 {
            panic!("this driver panics when its disk has 24 MiB");
        }
        Ok(())
    }

    fn suspend(&self) -> ExportedState {
        match behaviour() {
            "trap-suspend" => panic!("this driver panics in suspend"),
            "huge-suspend" => ExportedState { version: 1, bytes: vec![0; 1 << 20] },
            _ => ExportedState { version: 1, bytes: b"what it knew".to_vec() },
        }
    }

    fn resume(device: &mut dyn VirtioDevice, state: &ExportedState) -> Result<(Self, Attachment), DriverError> {
        match behaviour() {
            "trap-resume" => panic!("this driver panics in resume"),
            "loop-resume" => spin(),
            "refuse-resume" => return Err(DriverError::Unsupported("this driver takes over from nobody".into())),
            _ => {}
        }
        log::info(&format!("resumed with {} bytes of version {}", state.bytes.len(), state.version));
        Self::attach(device)
    }

    fn start(setup: &LaneSetup) -> Result<HostileLane, DriverError> {
        match behaviour() {
            "trap-start" => panic!("this driver panics in start"),
            "refuse-start" => Err(DriverError::Unsupported("this driver never starts".into())),
            _ => HostileLane::new(setup),
        }
    }
}

/// Behaviours of `complete` whose names do not say so.
const COMPLETE_TOO: [&str; 2] = ["wrong-answer-token", "unknown-status"];

fn plan(index: u16, size: u16) -> QueuePlan {
    QueuePlan::requests(index, size, None, index)
}

/// A device that was never asked to negotiate, and a plausible configuration space.
struct Pretend<'a>(&'a mut dyn VirtioDevice);

impl VirtioDevice for Pretend<'_> {
    fn device_type(&self) -> Option<u32> {
        self.0.device_type()
    }

    fn offered_features(&self) -> u64 {
        0
    }

    fn negotiate(&mut self, _features: u64) -> Result<(), cofferdam_sdk::VirtioError> {
        Ok(())
    }

    fn read_config(&mut self, _offset: u32, length: u32) -> Result<Vec<u8>, cofferdam_sdk::VirtioError> {
        Ok((0..length).map(|at| u8::from(at == 1)).collect())
    }

    fn max_queues(&self) -> u16 {
        self.0.max_queues()
    }

    fn max_lanes(&self) -> u16 {
        self.0.max_lanes()
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.0.max_queue_size(queue)
    }
}
