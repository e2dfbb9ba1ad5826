//! The service `net`: packets.

/// Work that a device does on packets, or that a packet may leave to its receiver: `net.offloads` of the WIT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Completes checksums of packets that are sent.
    pub transmit_checksum: bool,
    /// May hand over packets whose checksum is not complete.
    pub receive_checksum: bool,
    /// Segments TCP over IPv4.
    pub transmit_tcp4: bool,
    /// Segments TCP over IPv6.
    pub transmit_tcp6: bool,
    /// May hand over joined TCP segments over IPv4.
    pub receive_tcp4: bool,
    /// May hand over joined TCP segments over IPv6.
    pub receive_tcp6: bool,
}

/// What a network device can do and how it is: `net.properties` of the WIT, where each field's bounds are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetProperties {
    /// The hardware address.
    pub mac: Option<[u8; 6]>,
    /// Largest packet without its link header, 68 to 65,521 bytes.
    pub mtu: u16,
    /// Whether there is a carrier.
    pub link_up: bool,
    /// Pairs of queues in use: lanes.
    pub pairs: u16,
    /// Largest packet that `submit` takes, with its link header, in bytes.
    pub max_packet_bytes: u32,
    /// What was negotiated.
    pub offloads: Offloads,
}

/// Flag of a packet either way: its checksum is to be completed.
pub const FLAG_NEEDS_CHECKSUM: u8 = 1;
/// Flag of a packet that came: its checksum was found valid.
pub const FLAG_VALID_CHECKSUM: u8 = 2;
/// Where segmentation is in the flags.
pub const SEGMENTATION_SHIFT: u32 = 4;
/// Segmentation: TCP over IPv4.
pub const SEGMENT_TCP4: u8 = 1;
/// Segmentation: TCP over IPv6.
pub const SEGMENT_TCP6: u8 = 2;
