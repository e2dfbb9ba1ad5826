//! What a binding gives its clients: a service, with what the device can do of it now.

use std::fmt::Debug;

use cofferdam_device::Buffer;
use cofferdam_runtime::{EntropyProperties, NetProperties, Properties, StreamProperties};

use crate::block::BlockGeometry;
use crate::request::{IoError, IoFlags, IoOp};

/// Bytes of a link header (IEEE 802.3).
const LINK_BYTES: u32 = 14;
/// Flags of a packet (`wit/net.wit`).
const NEEDS_CHECKSUM: u8 = 1;
const SEGMENTATION: u8 = 0xf0;

/// A service, and what the device can do of it, as its driver described it and the host checked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offer {
    /// A disk.
    Block(BlockGeometry),
    /// A source of entropy.
    Entropy(EntropyProperties),
    /// Byte streams.
    Stream(StreamProperties),
    /// A network.
    Net(NetProperties),
}

impl Offer {
    pub(crate) fn from_properties(properties: Properties, arena_bytes: u64, max_lease: u32) -> Offer {
        match properties {
            Properties::Block(block) => Offer::Block(BlockGeometry::from_properties(&block, arena_bytes, max_lease)),
            Properties::Entropy(entropy) => Offer::Entropy(entropy),
            Properties::Stream(stream) => Offer::Stream(stream),
            Properties::Net(net) => Offer::Net(net),
        }
    }

    /// The service's name: `block`, `entropy`, `stream` or `net`.
    #[must_use]
    pub fn service(&self) -> &'static str {
        match self {
            Offer::Block(_) => "block",
            Offer::Entropy(_) => "entropy",
            Offer::Stream(_) => "stream",
            Offer::Net(_) => "net",
        }
    }

    /// What a disk can do.
    #[must_use]
    pub fn block(&self) -> Option<&BlockGeometry> {
        match self {
            Offer::Block(geometry) => Some(geometry),
            _ => None,
        }
    }

    /// What is another than in `now`, each in words: `capacity-bytes 1024 -> 2048`.
    pub(crate) fn changes(&self, now: &Offer) -> Vec<String> {
        fn is<T: PartialEq + Debug>(name: &str, before: &T, now: &T) -> Option<String> {
            (before != now).then(|| format!("{name} {before:?} -> {now:?}"))
        }
        match (self, now) {
            (Offer::Block(before), Offer::Block(now)) => before.changes(now),
            (Offer::Entropy(before), Offer::Entropy(now)) => {
                is("max-request-bytes", &before.max_request_bytes, &now.max_request_bytes).into_iter().collect()
            }
            (Offer::Stream(before), Offer::Stream(now)) => {
                let mut changes: Vec<String> =
                    is("max-write-bytes", &before.max_write_bytes, &now.max_write_bytes).into_iter().collect();
                for port in &now.ports {
                    match before.ports.iter().find(|old| old.index == port.index) {
                        None => changes.push(format!("port {} added", port.index)),
                        Some(old) if old != port => changes.push(format!("port {} {old:?} -> {port:?}", port.index)),
                        Some(_) => {}
                    }
                }
                let gone = before.ports.iter().filter(|old| now.ports.iter().all(|port| port.index != old.index));
                changes.extend(gone.map(|port| format!("port {} removed", port.index)));
                changes
            }
            (Offer::Net(before), Offer::Net(now)) => [
                is("mac", &before.mac, &now.mac),
                is("mtu", &before.mtu, &now.mtu),
                is("link-up", &before.link_up, &now.link_up),
                is("pairs", &before.pairs, &now.pairs),
                is("max-packet-bytes", &before.max_packet_bytes, &now.max_packet_bytes),
                is("offloads", &before.offloads, &now.offloads),
            ]
            .into_iter()
            .flatten()
            .collect(),
            (before, now) => is("service", &before.service(), &now.service()).into_iter().collect(),
        }
    }

    /// Checks a client's request to lane `lane` once, so that nothing behind it has to (who can forge this: any client).
    #[inline]
    pub(crate) fn check(
        &self,
        lane: u16,
        op: IoOp,
        flags: IoFlags,
        offset: u64,
        length: u32,
        buffer: Option<&Buffer>,
    ) -> Result<(), IoError> {
        if let Offer::Block(geometry) = self {
            return geometry.check(op, offset, length, buffer);
        }
        let (wanted, most) = match self {
            Offer::Block(_) => return Err(IoError::Unsupported),
            Offer::Entropy(entropy) => (IoOp::Fill, entropy.max_request_bytes),
            Offer::Stream(stream) => (IoOp::Send, stream.max_write_bytes),
            Offer::Net(net) => (IoOp::Transmit, net.max_packet_bytes),
        };
        if op != wanted {
            return Err(IoError::Unsupported);
        }
        if length == 0 || length > most || buffer.is_none_or(|buffer| length > buffer.len()) {
            return Err(IoError::Invalid);
        }
        let is_valid = match self {
            Offer::Stream(stream) => {
                flags == IoFlags::default()
                    && stream.ports.iter().any(|port| u64::from(port.index) == offset && port.set == lane)
            }
            Offer::Net(net) => is_packet(net, flags, offset, length),
            Offer::Block(_) | Offer::Entropy(_) => flags == IoFlags::default() && offset == 0,
        };
        if is_valid { Ok(()) } else { Err(IoError::Invalid) }
    }
}

/// Whether what a packet leaves to the device is something that was negotiated, and lies inside it.
fn is_packet(net: &NetProperties, IoFlags(flags): IoFlags, argument: u64, length: u32) -> bool {
    let is_whole = length <= u32::from(net.mtu) + LINK_BYTES + 4;
    if flags == 0 && argument == 0 {
        // The commonest packet leaves nothing to the device.
        return length >= LINK_BYTES && is_whole;
    }
    let [start, goes, size, headers] = [0, 16, 32, 48].map(|shift| u32::from((argument >> shift) as u16));
    if length < LINK_BYTES {
        return false;
    }
    let checksum = match flags & NEEDS_CHECKSUM {
        0 => start == 0 && goes == 0,
        // The checksum itself is two bytes.
        _ => net.offloads.transmit_checksum && start + goes + 2 <= length,
    };
    let segments = match flags & SEGMENTATION {
        0 => size == 0 && headers == 0 && is_whole,
        0x10 => net.offloads.transmit_tcp4 && flags & NEEDS_CHECKSUM != 0 && size > 0 && headers <= length,
        0x20 => net.offloads.transmit_tcp6 && flags & NEEDS_CHECKSUM != 0 && size > 0 && headers <= length,
        _ => false,
    };
    flags & !(NEEDS_CHECKSUM | SEGMENTATION) == 0 && checksum && segments
}

#[cfg(test)]
mod tests {
    use super::*;
    use cofferdam_runtime::Offloads;

    #[test]
    fn a_packet_leaves_to_the_device_what_was_negotiated_and_nothing_else() {
        let offloads = Offloads { transmit_checksum: true, transmit_tcp4: true, ..Offloads::default() };
        let net = NetProperties { mac: None, mtu: 1500, link_up: true, pairs: 1, max_packet_bytes: 65_550, offloads };
        let argument = |start: u64, goes: u64, size: u64, headers: u64| start | goes << 16 | size << 32 | headers << 48;
        let is = |flags, argument, length| is_packet(&net, IoFlags(flags), argument, length);
        assert!(is(0, 0, 60) && is(0, 0, 1518));
        assert!(!is(0, 0, 13) && !is(0, 0, 1519), "too short, too long for the wire");
        assert!(is(1, argument(34, 16, 0, 0), 60));
        assert!(!is(1, argument(34, 25, 0, 0), 60), "the checksum is behind the packet");
        assert!(is(0x11, argument(34, 16, 1448, 66), 60_000));
        assert!(!is(0x11, argument(34, 16, 0, 66), 60_000), "segments of nothing");
        assert!(!is(0x10, argument(0, 0, 1448, 66), 60_000), "segments without a checksum");
        assert!(!is(0x21, argument(34, 16, 1448, 66), 60_000), "not negotiated");
        assert!(!is(0x31, argument(34, 16, 1448, 66), 60_000) && !is(2, 0, 60), "no such flag");
        let plain = NetProperties { offloads: Offloads::default(), ..net.clone() };
        assert!(!is_packet(&plain, IoFlags(1), argument(34, 16, 0, 0), 60));
    }
}
