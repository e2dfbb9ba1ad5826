//! What a network device can do.

use super::breach;
use crate::bindings::net::exports::cofferdam::driver::net as wit;
use crate::fault::GuestFault;

/// Bytes of a link header (IEEE 802.3).
const LINK_BYTES: u32 = 14;

/// Work that a device does on packets, or that a packet may leave to its receiver (`wit/net.wit`).
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

/// What a network device can do and how it is, checked against the bounds in `wit/net.wit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetProperties {
    /// The hardware address, of one station.
    pub mac: Option<[u8; 6]>,
    /// Largest packet without its link header, 68 to 65,521 bytes.
    pub mtu: u16,
    /// Whether there is a carrier.
    pub link_up: bool,
    /// Pairs of queues in use, at least 1.
    pub pairs: u16,
    /// Largest packet that is sent, with its link header, in bytes.
    pub max_packet_bytes: u32,
    /// What was negotiated.
    pub offloads: Offloads,
}

impl NetProperties {
    pub(crate) fn check(words: &wit::Properties) -> Result<NetProperties, GuestFault> {
        let mac = match &words.mac {
            None => None,
            Some(bytes) => match <[u8; 6]>::try_from(bytes.as_slice()) {
                // The lowest bit of the first byte is that of a group (IEEE 802.3, section 3.2.3).
                Ok(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Some(mac),
                _ => return breach("mac", format!("{bytes:02x?}")),
            },
        };
        if !(68..=65_521).contains(&words.mtu) {
            return breach("mtu", words.mtu);
        }
        if words.max_packet_bytes < u32::from(words.mtu) + LINK_BYTES || words.max_packet_bytes > 65_550 {
            return breach("max-packet-bytes", words.max_packet_bytes);
        }
        if words.pairs == 0 {
            return breach("pairs", 0);
        }
        let has = |offload| words.offloads.contains(offload);
        Ok(NetProperties {
            mac,
            mtu: words.mtu,
            link_up: words.link_up,
            pairs: words.pairs,
            max_packet_bytes: words.max_packet_bytes,
            offloads: Offloads {
                transmit_checksum: has(wit::Offloads::TRANSMIT_CHECKSUM),
                receive_checksum: has(wit::Offloads::RECEIVE_CHECKSUM),
                transmit_tcp4: has(wit::Offloads::TRANSMIT_TCP4),
                transmit_tcp6: has(wit::Offloads::TRANSMIT_TCP6),
                receive_tcp4: has(wit::Offloads::RECEIVE_TCP4),
                receive_tcp6: has(wit::Offloads::RECEIVE_TCP6),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_property_out_of_its_bounds_is_a_layout_fault() {
        let good = || wit::Properties {
            mac: Some(vec![2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            link_up: true,
            pairs: 1,
            max_packet_bytes: 1514,
            offloads: wit::Offloads::TRANSMIT_TCP4,
        };
        let properties = NetProperties::check(&good()).unwrap();
        assert!(properties.offloads.transmit_tcp4 && !properties.offloads.transmit_tcp6);
        type Spoil = fn(&mut wit::Properties);
        let spoils: [Spoil; 8] = [
            |p| p.mac = Some(vec![2, 0, 0]),
            |p| p.mac = Some(vec![1, 0, 0, 0, 0, 1]),
            |p| p.mac = Some(vec![0; 6]),
            |p| p.mtu = 67,
            |p| p.mtu = 65_522,
            |p| p.max_packet_bytes = 1513,
            |p| p.max_packet_bytes = 65_551,
            |p| p.pairs = 0,
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let mut words = good();
            spoil(&mut words);
            let fault = NetProperties::check(&words).expect_err(&format!("case {number}"));
            assert_eq!(fault.kind, crate::FaultKind::Layout, "case {number}");
        }
    }
}
