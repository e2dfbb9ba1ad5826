//! Configuration space (section 5.3.4): one read, then every field checked before anything believes it.

use cofferdam_sdk::{DriverError, VirtioDevice};

use crate::feature;

/// Most ports that can have queues: the transmit queue of the last one is 2n + 3, and a queue index has 16 bits.
const MAX_NUMBERED_PORTS: u32 = (0xffff - 3) / 2 + 1;

/// What the fields say, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// Columns and rows of port 0. None where the device has no such fields, or where either is 0, which is what QEMU writes for "not known".
    pub(crate) size: Option<(u16, u16)>,
    /// `max_nr_ports`, 1 to [`MAX_NUMBERED_PORTS`]; 1 without MULTIPORT.
    pub(crate) max_ports: u32,
}

impl Config {
    /// Reads and checks the configuration of a device that negotiated `features`. Reads nothing where no feature brings a field.
    pub(crate) fn read(device: &mut dyn VirtioDevice, features: u64) -> Result<Self, DriverError> {
        let has = |feature: u64| features & feature != 0;
        let length = match () {
            () if has(feature::MULTIPORT) => 8,
            () if has(feature::SIZE) => 4,
            () => return Ok(Self { size: None, max_ports: 1 }),
        };
        let bytes = device.read_config(0, length)?;
        if bytes.len() != length as usize {
            return Err(DriverError::Host(format!("read-config gave {} of {length} bytes", bytes.len())));
        }
        let (cols, rows) = (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[2], bytes[3]]));
        let size = (has(feature::SIZE) && cols != 0 && rows != 0).then_some((cols, rows));
        let max_ports = match bytes[4..] {
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => 1,
        };
        if !(1..=MAX_NUMBERED_PORTS).contains(&max_ports) {
            return Err(DriverError::Device(format!(
                "max_nr_ports is {max_ports}; there are queues for 1 to {MAX_NUMBERED_PORTS} (virtio 1.2, section 5.3.4)"
            )));
        }
        Ok(Self { size, max_ports })
    }
}
