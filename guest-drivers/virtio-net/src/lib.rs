//! A driver for virtio network devices: virtio 1.2, section 5.1.
//!
//! | module | about |
//! | --- | --- |
//! | `config` | configuration space, from allegation to checked values (section 5.1.4) |
//! | `plan` | features, queues, and how many pairs are in use: the control lane (sections 5.1.2, 5.1.3, 5.1.5, 5.1.6.5.5) |
//! | `state` | what the control lane tells the data lanes |
//! | `lane` | a pair of queues: packets to chains (section 5.1.6.2) |
//! | `receive` | used buffers to packets (section 5.1.6.4) |
//!
//! The driver sees the device's headers and never a packet. Not served: UDP segmentation, ECN, receive-side scaling and hash reports, filters of addresses and VLANs,
//! announcements; their features are never accepted, so a device behaves as if it did not have them. Without CTRL_RX it hands over every packet that it is shown.

mod config;
mod lane;
mod plan;
mod receive;
mod state;

pub use lane::VirtioNetLane;
pub use plan::VirtioNet;

/// The virtio device id of a network device (section 5).
pub const DEVICE_TYPE: u32 = 1;
/// Bytes of `struct virtio_net_hdr` (section 5.1.6): always with `num_buffers`, because the host insists on VIRTIO_F_VERSION_1.
pub const HEADER_BYTES: u32 = 12;
/// Bytes of the link header of Ethernet.
pub const LINK_HEADER_BYTES: u32 = 14;
/// The MTU of a device that says none (section 5.1.4 leaves it open; it is Ethernet's).
pub const DEFAULT_MTU: u16 = 1500;
/// Least and largest MTU: what the specification asks for at least, and what `net.properties` can say at most.
pub const MTU_RANGE: core::ops::RangeInclusive<u16> = 68..=65_521;
/// Largest packet that is handed to a device for segmentation, with its link header, in bytes.
pub const MAX_SEGMENTED_BYTES: u32 = 65_550;
/// Largest packet that is taken from a device, in bytes: the longest of IP behind a link header with a VLAN's tag. A device that joins more lies.
pub const MAX_RECEIVED_BYTES: u32 = 65_535 + LINK_HEADER_BYTES + 4;
/// Most pairs of queues that are used.
pub const MAX_PAIRS: u16 = 8;

/// Feature bits (section 5.1.3) that this driver knows.
pub mod feature {
    /// Completes checksums of packets that are sent.
    pub const CSUM: u64 = 1;
    /// May hand over packets whose checksum is not complete.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `mtu` is there.
    pub const MTU: u64 = 1 << 3;
    /// `mac` is there.
    pub const MAC: u64 = 1 << 5;
    /// May hand over joined TCP segments over IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// May hand over joined TCP segments over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// Joined TCP segments may have ECN. Never accepted: the contract has no word for it.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// May hand over joined UDP fragments. Never accepted.
    pub const GUEST_UFO: u64 = 1 << 10;
    /// Segments TCP over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// Segments TCP over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// Segments TCP with ECN. Never accepted, as [`GUEST_ECN`].
    pub const HOST_ECN: u64 = 1 << 13;
    /// Fragments UDP. Never accepted.
    pub const HOST_UFO: u64 = 1 << 14;
    /// A packet may span several receive buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `status` is there.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// `max_virtqueue_pairs` is there.
    pub const MQ: u64 = 1 << 22;

    /// Both that join TCP segments.
    pub const GUEST_TSO: u64 = GUEST_TSO4 | GUEST_TSO6;
    /// Both that segment TCP.
    pub const HOST_TSO: u64 = HOST_TSO4 | HOST_TSO6;

    /// What this driver can make use of.
    pub const WANTED: u64 = CSUM | GUEST_CSUM | MTU | MAC | GUEST_TSO | HOST_TSO | MRG_RXBUF | STATUS | CTRL_VQ | MQ;
    /// Every device-type bit that a network device has ever had, legacy ones (6) and those of later specifications (50 to 57, 59 to 63) included. A device that offers
    /// another, 4 or 58, is hardly a network device.
    pub const OF_A_NET_DEVICE: u64 = 0x00ff_ffef | 0xfbfc_0000_0000_0000;
}

cofferdam_sdk::export_net_driver!(VirtioNet, devices: [cofferdam_sdk::DeviceId::virtio(DEVICE_TYPE)]);
