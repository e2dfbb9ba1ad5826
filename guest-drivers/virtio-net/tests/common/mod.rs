//! Devices to attach to, and a lane of one.

use cofferdam_sdk::mock::MockDevice;
use cofferdam_sdk::native::NativeLane;
use cofferdam_sdk::{LaneSetup, VirtioDriver};
use cofferdam_virtio_net::{DEVICE_TYPE, VirtioNet, feature};

pub(crate) const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// A device that offers `offered`, with a configuration space that has every field: four pairs, an MTU of 9,000 and a link that is up.
pub(crate) fn device(offered: u64) -> MockDevice {
    let mut device = MockDevice { offered, max_queues: 9, ..MockDevice::new(DEVICE_TYPE) };
    device.set_config(0, &MAC);
    device.set_config(6, &1_u16.to_le_bytes());
    device.set_config(8, &4_u16.to_le_bytes());
    device.set_config(10, &9000_u16.to_le_bytes());
    device
}

/// A device that offers all that the driver knows, and what it does not accept.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) fn everything() -> MockDevice {
    device(feature::OF_A_NET_DEVICE)
}

/// Queues of the lane below: not those of the first pair.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) const QUEUES: [u16; 2] = [4, 5];

/// A lane of a device that offers `offered`.
#[allow(dead_code, reason = "not every test needs it")]
pub(crate) fn lane(offered: u64) -> NativeLane<VirtioNet> {
    let (_, attachment) = VirtioNet::attach(&mut device(offered)).unwrap();
    let setup = LaneSetup { features: attachment.features, state: attachment.state, queues: QUEUES.to_vec() };
    NativeLane::start(&setup).unwrap()
}
