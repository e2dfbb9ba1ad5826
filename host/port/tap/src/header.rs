//! The header that the kernel has in front of each packet (`struct virtio_net_hdr_mrg_rxbuf`, little-endian), to and from the service's words (`wit/net.wit`).
//!
//! The service's words from the device were checked by its driver and by the host; the kernel judges the header again and refuses what cannot be.

/// Bytes of the header.
pub(crate) const HEADER_BYTES: usize = 12;

/// Header flags.
const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
/// Kinds of segmentation in the header.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;

/// Flags of the service: the same two, and segmentation from bit 4.
const TCP4: u8 = 1 << 4;
const TCP6: u8 = 2 << 4;
const SEGMENTATION: u8 = 0xf << 4;

/// Least bytes of a link header, and of one of TCP.
const LINK_BYTES: u16 = 14;
const TCP_BYTES: u16 = 20;

/// Flags and argument of a packet of `length` bytes that the kernel hands over. `None` for what was never asked for.
pub(crate) fn from_kernel(header: &[u8; HEADER_BYTES], length: u32) -> Option<(u8, u64)> {
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (headers, size, start, offset) = (word(2), word(4), word(6), word(8));
    let (mut flags, mut argument) = (0, 0);
    if header[0] & NEEDS_CHECKSUM != 0 {
        flags |= NEEDS_CHECKSUM;
        argument |= u64::from(start) | u64::from(offset) << 16;
    }
    flags |= match header[1] {
        GSO_NONE => return Some((flags, argument)),
        GSO_TCPV4 => TCP4,
        GSO_TCPV6 => TCP6,
        _ => return None,
    };
    // What the kernel says here is how much of the packet lies together, which may be less than its headers or all of it. The device wants the headers (virtio 1.2, section 5.1.6.2.1).
    let least = u32::from(start.saturating_add(TCP_BYTES));
    let headers = u32::from(headers).max(least).min(length).min(u32::from(u16::MAX));
    argument |= u64::from(size) << 32 | u64::from(headers) << 48;
    Some((flags, argument))
}

/// The header of a packet that the device delivered.
pub(crate) fn to_kernel(flags: u8, argument: u64) -> [u8; HEADER_BYTES] {
    let word = |at: u32| ((argument >> at) as u16).to_le_bytes();
    let mut header = [0; HEADER_BYTES];
    header[0] = flags & (NEEDS_CHECKSUM | DATA_VALID);
    if flags & NEEDS_CHECKSUM != 0 {
        // One excludes the other, and what is open is not valid yet.
        header[0] = NEEDS_CHECKSUM;
        header[6..8].copy_from_slice(&word(0));
        header[8..10].copy_from_slice(&word(16));
    }
    header[1] = match flags & SEGMENTATION {
        TCP4 => GSO_TCPV4,
        TCP6 => GSO_TCPV6,
        _ => return header,
    };
    header[4..6].copy_from_slice(&word(32));
    // A hint; one that is shorter than a link header makes the kernel refuse the packet (tun_get_user).
    if (argument >> 48) as u16 >= LINK_BYTES {
        header[2..4].copy_from_slice(&word(48));
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argument(start: u64, offset: u64, size: u64, headers: u64) -> u64 {
        start | offset << 16 | size << 32 | headers << 48
    }

    #[test]
    fn what_the_kernel_leaves_open_is_left_to_the_device_and_back() {
        let plain = [0; HEADER_BYTES];
        assert_eq!((from_kernel(&plain, 60), to_kernel(0, 0)), (Some((0, 0)), plain));
        let checksum = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        assert_eq!(from_kernel(&checksum, 60), Some((1, argument(34, 16, 0, 0))));
        assert_eq!(to_kernel(1, argument(34, 16, 0, 0)), checksum);
        for (kind, flags) in [(1, 0x11), (4, 0x21)] {
            let segments = [1, kind, 66, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
            assert_eq!(from_kernel(&segments, 60_000), Some((flags, argument(34, 16, 1448, 66))));
            assert_eq!(to_kernel(flags, argument(34, 16, 1448, 66)), segments);
        }
        assert_eq!(to_kernel(2, 0)[0], 2);
        assert_eq!(from_kernel(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 60), None, "UDP was never asked for");
    }

    #[test]
    fn the_length_of_headers_is_made_one_that_can_be() {
        let headers = |says: [u8; 2], length| {
            let header = [1, 1, says[0], says[1], 0xa8, 5, 34, 0, 16, 0, 0, 0];
            from_kernel(&header, length).unwrap().1 >> 48
        };
        assert_eq!(headers([14, 0], 60_000), 54, "no less than where TCP's own end");
        assert_eq!(headers([0xff, 0xff], 60_000), 60_000, "no more than there is");
        assert_eq!(to_kernel(0x11, argument(34, 16, 1448, 13))[2..4], [0, 0]);
    }
}
