//! Configuration space (section 5.2.4): one read, then every field checked before anything believes it.

use cofferdam_sdk::{DriverError, VirtioDevice, log};

use crate::{MAX_PAYLOAD_SEGMENTS, MAX_TRANSFER_BYTES, SECTOR_BYTES, feature};

/// Bytes of configuration space up to and including the capacity, which every device has.
const CAPACITY_END: u32 = 8;

/// The features that bring fields, and where their last field ends. Configuration space may be as short as its features allow.
const FIELD_ENDS: [(u64, u32); 8] = [
    (feature::SIZE_MAX, 12),
    (feature::SEG_MAX, 16),
    (feature::BLK_SIZE, 24),
    (feature::TOPOLOGY, 32),
    (feature::CONFIG_WCE, 33),
    (feature::MQ, 36),
    (feature::DISCARD, 48),
    (feature::WRITE_ZEROES, 57),
];

/// Geometry and limits of a device, checked. All lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) capacity_bytes: u64,
    pub(crate) logical_block_bytes: u32,
    pub(crate) physical_block_bytes: u32,
    /// Longest payload segment.
    pub(crate) max_segment_bytes: u32,
    /// Most payload segments, 1 to [`MAX_PAYLOAD_SEGMENTS`].
    pub(crate) max_segments: u32,
    /// Queues the device has, at least 1.
    pub(crate) queues: u16,
    /// 0 when discard is not served.
    pub(crate) max_discard_bytes: u32,
    pub(crate) discard_align_bytes: u32,
    /// 0 when write-zeroes is not served.
    pub(crate) max_write_zeroes_bytes: u32,
    pub(crate) write_zeroes_may_unmap: bool,
}

impl Geometry {
    /// Reads and checks the configuration of a device that negotiated `features`.
    pub(crate) fn read(device: &mut dyn VirtioDevice, features: u64) -> Result<Self, DriverError> {
        let has = |(bit, end): (u64, u32)| (features & bit != 0).then_some(end);
        let length = FIELD_ENDS.into_iter().filter_map(has).max().unwrap_or(CAPACITY_END);
        let bytes = device.read_config(0, length)?;
        if bytes.len() != length as usize {
            return Err(DriverError::Host(format!("read-config gave {} of {length} bytes", bytes.len())));
        }
        Self::check(&Fields { bytes: &bytes, features })
    }

    fn check(fields: &Fields<'_>) -> Result<Self, DriverError> {
        let logical = fields.u32(feature::BLK_SIZE, 20).unwrap_or(SECTOR_BYTES);
        if !logical.is_power_of_two() || !(SECTOR_BYTES..=65_536).contains(&logical) {
            return Err(broken(format!("blk_size {logical} is no power of two from 512 to 65,536")));
        }
        let sectors = fields.capacity();
        let capacity = sectors
            .checked_mul(u64::from(SECTOR_BYTES))
            .ok_or_else(|| broken(format!("capacity of {sectors} sectors is more than 2^64 bytes")))?;
        let queues = fields.u16(feature::MQ, 34).unwrap_or(1);
        if queues == 0 {
            return Err(broken("num_queues is 0".into()));
        }

        // qemu-storage-daemon offers SIZE_MAX and writes 0, and Linux takes a seg_max of 0 for 1: both are what the device means.
        let size_max = fields.u32(feature::SIZE_MAX, 8).filter(|&bytes| bytes != 0).unwrap_or(u32::MAX);
        let seg_max = fields.u32(feature::SEG_MAX, 12).unwrap_or(MAX_PAYLOAD_SEGMENTS).clamp(1, MAX_PAYLOAD_SEGMENTS);
        if u64::from(size_max) * u64::from(seg_max) < u64::from(logical) {
            return Err(broken(format!("{seg_max} segments of {size_max} bytes hold no block of {logical}")));
        }

        let align = fields.u32(feature::DISCARD, 44).unwrap_or(0).checked_mul(SECTOR_BYTES).unwrap_or(0);
        Ok(Self {
            capacity_bytes: capacity - capacity % u64::from(logical),
            logical_block_bytes: logical,
            physical_block_bytes: physical_block_bytes(fields, logical),
            max_segment_bytes: size_max.min(MAX_TRANSFER_BYTES),
            max_segments: seg_max,
            queues,
            max_discard_bytes: range_bytes(fields.u32(feature::DISCARD, 36), logical, "max_discard_sectors"),
            discard_align_bytes: align.max(logical),
            max_write_zeroes_bytes: range_bytes(
                fields.u32(feature::WRITE_ZEROES, 48),
                logical,
                "max_write_zeroes_sectors",
            ),
            write_zeroes_may_unmap: fields.u8(feature::WRITE_ZEROES, 56).is_some_and(|value| value != 0),
        })
    }

    /// Largest payload of one request over at most `segments` segments: a multiple of the logical block, or none when not one block fits.
    pub(crate) fn max_transfer_bytes(&self, segments: u32) -> Option<u32> {
        let segments = segments.min(self.max_segments);
        let bytes = self.max_segment_bytes.saturating_mul(segments).min(MAX_TRANSFER_BYTES);
        let bytes = bytes - bytes % self.logical_block_bytes;
        (bytes > 0).then_some(bytes)
    }
}

/// `topology.physical_block_exp`; a hint, so nonsense is ignored rather than refused.
fn physical_block_bytes(fields: &Fields<'_>, logical: u32) -> u32 {
    let exponent = u32::from(fields.u8(feature::TOPOLOGY, 24).unwrap_or(0));
    match logical.checked_shl(exponent).filter(|bytes| exponent <= 16 && *bytes >= logical) {
        Some(bytes) => bytes,
        None => {
            log::warn(&format!("physical_block_exp {exponent} is out of reason and ignored (5.2.4)"));
            logical
        }
    }
}

/// Largest range of a discard or write-zeroes in whole blocks, from the device's limit in sectors.
fn range_bytes(sectors: Option<u32>, logical: u32, field: &str) -> u32 {
    let Some(sectors) = sectors else { return 0 };
    let bytes = sectors.saturating_mul(SECTOR_BYTES);
    let bytes = bytes - bytes % logical;
    if bytes == 0 {
        log::warn(&format!("{field} is {sectors}: not one block; the command is not used (5.2.4)"));
    }
    bytes
}

fn broken(what: String) -> DriverError {
    DriverError::Device(format!("{what} (virtio 1.2, section 5.2.4)"))
}

/// The bytes that were read, and which of their fields exist.
struct Fields<'a> {
    bytes: &'a [u8],
    features: u64,
}

impl Fields<'_> {
    fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.array(0))
    }

    fn u8(&self, feature: u64, offset: usize) -> Option<u8> {
        self.has(feature).then(|| self.array::<1>(offset)[0])
    }

    fn u16(&self, feature: u64, offset: usize) -> Option<u16> {
        self.has(feature).then(|| u16::from_le_bytes(self.array(offset)))
    }

    fn u32(&self, feature: u64, offset: usize) -> Option<u32> {
        self.has(feature).then(|| u32::from_le_bytes(self.array(offset)))
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// A field whose feature was negotiated lies inside what was read: [`FIELD_ENDS`] sees to it.
    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut array = [0; N];
        array.copy_from_slice(&self.bytes[offset..offset + N]);
        array
    }
}
