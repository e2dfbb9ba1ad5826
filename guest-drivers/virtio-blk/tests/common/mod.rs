//! Mock block devices.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use cofferdam_sdk::mock::MockDevice;
use cofferdam_virtio_blk::{DEVICE_TYPE, feature};

/// A disk of 1 MiB with `features` and a configuration space of zeroes behind the capacity.
pub fn device(features: u64) -> MockDevice {
    let mut device = MockDevice { offered: features, ..MockDevice::new(DEVICE_TYPE) };
    device.set_config(0, &2048_u64.to_le_bytes());
    device.set_config(59, &[0]);
    device
}

/// A disk of 1 MiB with every feature but read-only: blocks of 4 KiB, 4 segments of 64 KiB, 4 queues.
pub fn everything() -> MockDevice {
    let mut device = device(feature::WANTED & !feature::RO);
    device.max_queues = 4;
    device.set_config(8, &65_536_u32.to_le_bytes());
    device.set_config(12, &4_u32.to_le_bytes());
    device.set_config(20, &4096_u32.to_le_bytes());
    device.set_config(24, &[2]);
    device.set_config(32, &[1]);
    device.set_config(34, &4_u16.to_le_bytes());
    device.set_config(36, &1024_u32.to_le_bytes());
    device.set_config(44, &8_u32.to_le_bytes());
    device.set_config(48, &512_u32.to_le_bytes());
    device.set_config(56, &[1]);
    device
}
