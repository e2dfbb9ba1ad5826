//! The lies that a device can tell in its configuration space (virtio 1.2, sections 5.1.4, 5.2.4 and 5.3.4).

use std::str::FromStr;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET};

use crate::console::{F_MULTIPORT, F_SIZE};
use crate::net::{F_MQ, F_MTU};
use crate::rng::Rng;
use crate::script::{RuleError, by_name};

/// A lie in configuration space, told at every read while it is scripted. What belongs to another class is not told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigLie {
    /// A medium of no sectors.
    CapacityZero,
    /// A capacity of 2^64 - 1 sectors, which is over 2^64 in bytes.
    CapacityHuge,
    /// Another capacity at each read.
    CapacityChanging,
    /// `blk_size` 0.
    BlockSizeZero,
    /// `blk_size` 1000.
    BlockSizeOdd,
    /// `blk_size` 2^31.
    BlockSizeHuge,
    /// `seg_max` 0.
    SegMaxZero,
    /// `seg_max` 2^32 - 1.
    SegMaxHuge,
    /// `size_max` 0, as qemu-storage-daemon offers it.
    SizeMaxZero,
    /// `size_max` 1.
    SizeMaxTiny,
    /// `num_queues` 0.
    QueuesZero,
    /// `num_queues` 65535.
    QueuesHuge,
    /// Limits of discard and write-zeroes all 0.
    RangesZero,
    /// Physical block of 2^255 logical ones.
    TopologyHuge,
    /// Net: `mtu` 0.
    MtuZero,
    /// Net: `mtu` 67, one less than IPv4 can do with.
    MtuTiny,
    /// Net: `mtu` 65535.
    MtuHuge,
    /// Net: a multicast address.
    MacMulticast,
    /// Net: `max_virtqueue_pairs` 0.
    PairsZero,
    /// Net: `max_virtqueue_pairs` 65535.
    PairsHuge,
    /// Console: `max_nr_ports` 0.
    PortsZero,
    /// Console: `max_nr_ports` 2^32 - 1.
    PortsHuge,
    /// Console: `cols` and `rows` 0.
    ConsoleSizeZero,
    /// Only the first 8 bytes can be read; every read beyond fails.
    Short,
    /// Random bytes, other ones at each read.
    Garbage,
}

impl ConfigLie {
    /// Every lie and its name in a fault specification.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("capacity-zero", Self::CapacityZero),
        ("capacity-huge", Self::CapacityHuge),
        ("capacity-changing", Self::CapacityChanging),
        ("block-size-zero", Self::BlockSizeZero),
        ("block-size-odd", Self::BlockSizeOdd),
        ("block-size-huge", Self::BlockSizeHuge),
        ("seg-max-zero", Self::SegMaxZero),
        ("seg-max-huge", Self::SegMaxHuge),
        ("size-max-zero", Self::SizeMaxZero),
        ("size-max-tiny", Self::SizeMaxTiny),
        ("queues-zero", Self::QueuesZero),
        ("queues-huge", Self::QueuesHuge),
        ("ranges-zero", Self::RangesZero),
        ("topology-huge", Self::TopologyHuge),
        ("mtu-zero", Self::MtuZero),
        ("mtu-tiny", Self::MtuTiny),
        ("mtu-huge", Self::MtuHuge),
        ("mac-multicast", Self::MacMulticast),
        ("pairs-zero", Self::PairsZero),
        ("pairs-huge", Self::PairsHuge),
        ("ports-zero", Self::PortsZero),
        ("ports-huge", Self::PortsHuge),
        ("console-size-zero", Self::ConsoleSizeZero),
        ("short", Self::Short),
        ("garbage", Self::Garbage),
    ];

    /// The virtio device id of the class that can tell it; `None`: each.
    pub fn class(self) -> Option<u32> {
        match self {
            Self::Short | Self::Garbage => None,
            Self::MtuZero | Self::MtuTiny | Self::MtuHuge | Self::MacMulticast | Self::PairsZero | Self::PairsHuge => {
                Some(VIRTIO_ID_NET)
            }
            Self::PortsZero | Self::PortsHuge | Self::ConsoleSizeZero => Some(VIRTIO_ID_CONSOLE),
            _ => Some(VIRTIO_ID_BLOCK),
        }
    }

    /// Puts the lie into the configuration space of a device of class `class`; the answer is how many bytes can be read, if
    /// it is about that.
    pub(crate) fn tell(self, class: u32, config: &mut [u8], rng: &mut Rng) -> Option<usize> {
        if self.class().is_some_and(|own| own != class) {
            return None;
        }
        let mut put = |at: usize, field: &[u8]| config[at..at + field.len()].copy_from_slice(field);
        match self {
            Self::CapacityZero => put(0, &0u64.to_le_bytes()),
            Self::CapacityHuge => put(0, &u64::MAX.to_le_bytes()),
            Self::CapacityChanging => put(0, &(1 + rng.below(1 << 32)).to_le_bytes()),
            Self::BlockSizeZero => put(20, &0u32.to_le_bytes()),
            Self::BlockSizeOdd => put(20, &1000u32.to_le_bytes()),
            Self::BlockSizeHuge => put(20, &(1u32 << 31).to_le_bytes()),
            Self::SegMaxZero => put(12, &0u32.to_le_bytes()),
            Self::SegMaxHuge => put(12, &u32::MAX.to_le_bytes()),
            Self::SizeMaxZero => put(8, &0u32.to_le_bytes()),
            Self::SizeMaxTiny => put(8, &1u32.to_le_bytes()),
            Self::QueuesZero => put(34, &0u16.to_le_bytes()),
            Self::QueuesHuge => put(34, &u16::MAX.to_le_bytes()),
            Self::RangesZero => put(36, &[0; 20]),
            Self::TopologyHuge => put(24, &[255]),
            Self::MtuZero => put(10, &0u16.to_le_bytes()),
            Self::MtuTiny => put(10, &67u16.to_le_bytes()),
            Self::MtuHuge => put(10, &u16::MAX.to_le_bytes()),
            Self::MacMulticast => put(0, &[1]),
            Self::PairsZero => put(8, &0u16.to_le_bytes()),
            Self::PairsHuge => put(8, &u16::MAX.to_le_bytes()),
            Self::PortsZero => put(4, &0u32.to_le_bytes()),
            Self::PortsHuge => put(4, &u32::MAX.to_le_bytes()),
            Self::ConsoleSizeZero => put(0, &[0; 4]),
            Self::Short => return Some(8),
            Self::Garbage => config.iter_mut().for_each(|byte| *byte = rng.next_u64() as u8),
        }
        None
    }

    /// The feature bit without which a driver must not look at the field that lies; offered as long as the lie is told.
    pub(crate) fn feature(self, class: u32) -> u64 {
        if self.class().is_some_and(|own| own != class) {
            return 0;
        }
        let bit = match self {
            Self::BlockSizeZero | Self::BlockSizeOdd | Self::BlockSizeHuge => VIRTIO_BLK_F_BLK_SIZE,
            Self::SegMaxZero | Self::SegMaxHuge => VIRTIO_BLK_F_SEG_MAX,
            Self::SizeMaxZero | Self::SizeMaxTiny => VIRTIO_BLK_F_SIZE_MAX,
            Self::QueuesZero | Self::QueuesHuge => VIRTIO_BLK_F_MQ,
            Self::TopologyHuge => VIRTIO_BLK_F_TOPOLOGY,
            Self::MtuZero | Self::MtuTiny | Self::MtuHuge => F_MTU,
            Self::PairsZero | Self::PairsHuge => F_MQ,
            Self::PortsZero | Self::PortsHuge => F_MULTIPORT,
            Self::ConsoleSizeZero => F_SIZE,
            _ => return 0,
        };
        1 << bit
    }
}

impl FromStr for ConfigLie {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        by_name("configuration lie", text, Self::NAMES)
    }
}
