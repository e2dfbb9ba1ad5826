//! Configuration space (section 5.1.4): one read, then every field checked before anything believes it.

use cofferdam_sdk::{DriverError, VirtioDevice};

use crate::{DEFAULT_MTU, MTU_RANGE, feature};

/// The features that bring fields, and where each ends. Configuration space may be as short as its features allow.
const FIELD_ENDS: [(u64, u32); 4] = [(feature::MAC, 6), (feature::STATUS, 8), (feature::MQ, 10), (feature::MTU, 12)];

/// Bit of `status`: the link is up. The other, for announcements, means nothing without its feature.
const STATUS_LINK_UP: u16 = 1;
/// The group bit of a hardware address, in its first byte: such an address is nobody's own.
const MAC_GROUP: u8 = 1;
/// Most pairs that a device can say (section 5.1.4.1).
const MOST_PAIRS: u16 = 0x8000;

/// What configuration space says, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) link_up: bool,
    /// Pairs of queues that the device has, at least 1.
    pub(crate) pairs: u16,
    /// In [`MTU_RANGE`].
    pub(crate) mtu: u16,
}

impl Config {
    /// Reads and checks the configuration of a device that negotiated `features`.
    pub(crate) fn read(device: &mut dyn VirtioDevice, features: u64) -> Result<Self, DriverError> {
        let has = |(bit, end): (u64, u32)| (features & bit != 0).then_some(end);
        let Some(length) = FIELD_ENDS.into_iter().filter_map(has).max() else {
            return Ok(Self { mac: None, link_up: true, pairs: 1, mtu: DEFAULT_MTU });
        };
        let bytes = device.read_config(0, length)?;
        if bytes.len() != length as usize {
            return Err(DriverError::Host(format!("read-config gave {} of {length} bytes", bytes.len())));
        }
        Self::check(&Fields { bytes: &bytes, features })
    }

    fn check(fields: &Fields<'_>) -> Result<Self, DriverError> {
        let mac = fields.get::<6>(feature::MAC, 0);
        if let Some(mac) = mac
            && (mac[0] & MAC_GROUP != 0 || mac == [0; 6])
        {
            return Err(broken(format!("mac {mac:02x?} is no station's address")));
        }
        // Without the field the link is up (section 5.1.5).
        let link_up = fields.u16(feature::STATUS, 6).is_none_or(|status| status & STATUS_LINK_UP != 0);
        let pairs = fields.u16(feature::MQ, 8).unwrap_or(1);
        if !(1..=MOST_PAIRS).contains(&pairs) {
            return Err(broken(format!("max_virtqueue_pairs is {pairs}")));
        }
        let mtu = fields.u16(feature::MTU, 10).unwrap_or(DEFAULT_MTU);
        if mtu < *MTU_RANGE.start() {
            return Err(broken(format!("mtu {mtu} is less than {}", MTU_RANGE.start())));
        }
        if mtu > *MTU_RANGE.end() {
            return Err(DriverError::Unsupported(format!("an mtu of {mtu}; {} is the largest", MTU_RANGE.end())));
        }
        Ok(Self { mac, link_up, pairs, mtu })
    }
}

fn broken(what: String) -> DriverError {
    DriverError::Device(format!("{what} (virtio 1.2, section 5.1.4)"))
}

/// The bytes that were read, and which of their fields exist.
struct Fields<'a> {
    bytes: &'a [u8],
    features: u64,
}

impl Fields<'_> {
    /// The `N` bytes at `offset`, if `feature` brings them: then [`FIELD_ENDS`] has seen to it that they were read.
    fn get<const N: usize>(&self, feature: u64, offset: usize) -> Option<[u8; N]> {
        (self.features & feature != 0).then(|| {
            let mut array = [0; N];
            array.copy_from_slice(&self.bytes[offset..offset + N]);
            array
        })
    }

    fn u16(&self, feature: u64, offset: usize) -> Option<u16> {
        self.get(feature, offset).map(u16::from_le_bytes)
    }
}
