//! Frames and the header in front of each (`struct virtio_net_hdr`, virtio 1.2, section 5.1.6), and completing on a frame
//! what its receiver did not offer to complete.

/// Bytes of the header with VIRTIO_F_VERSION_1.
pub const HEADER_BYTES: usize = 12;

/// Header flag: the checksum is yet to be completed.
pub const NEEDS_CHECKSUM: u8 = 1;
/// Header flag: the checksum was looked at and is right.
pub const CHECKSUM_VALID: u8 = 2;

/// The fields of the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// [`NEEDS_CHECKSUM`], [`CHECKSUM_VALID`].
    pub flags: u8,
    /// 0: none, 1: TCP over IPv4, 4: TCP over IPv6.
    pub gso_type: u8,
    /// Bytes of the headers of a frame to be segmented.
    pub hdr_len: u16,
    /// Bytes of payload of each segment.
    pub gso_size: u16,
    /// Where the checksummed part begins.
    pub csum_start: u16,
    /// Where, from there, the checksum is.
    pub csum_offset: u16,
    /// Buffers that the frame lies over; only on receive, and filled in by the device.
    pub num_buffers: u16,
}

impl NetHeader {
    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..2].copy_from_slice(&[self.flags, self.gso_type]);
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (at, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From memory.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }
}

/// One frame, from its destination address on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// Which pair of queues it came by or goes to.
    pub pair: u16,
    /// What the other side said about it.
    pub header: NetHeader,
    /// The frame.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// A frame with nothing to complete, for the first pair.
    pub fn plain(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec(), ..Self::default() }
    }

    /// Completes the checksum in the frame; false when it lies beyond it.
    pub(crate) fn complete_checksum(&mut self) -> bool {
        let start = usize::from(self.header.csum_start);
        let place = start + usize::from(self.header.csum_offset);
        if place + 2 > self.bytes.len() {
            return false;
        }
        // The field holds the sum of the pseudo header (section 5.1.6.2), so the sum runs over it.
        let pair = |pair: &[u8]| u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
        let mut sum: u64 = self.bytes[start..].chunks(2).map(pair).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // 0 means "no checksum" to UDP, and the other zero is as good to TCP.
        let sum = match !(sum as u16) {
            0 => 0xffff,
            sum => sum,
        };
        self.bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        self.header.flags &= !NEEDS_CHECKSUM;
        (self.header.csum_start, self.header.csum_offset) = (0, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_the_specification_says() {
        let header = NetHeader {
            flags: 1,
            gso_type: 4,
            hdr_len: 0x0203,
            gso_size: 0x0405,
            csum_start: 0x0607,
            csum_offset: 0x0809,
            num_buffers: 0x0a0b,
        };
        assert_eq!(header.to_bytes(), [1, 4, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10]);
        assert_eq!(NetHeader::from_bytes(&header.to_bytes()), header);
    }

    #[test]
    fn a_completed_checksum_makes_the_sum_all_ones() {
        let header = NetHeader { flags: NEEDS_CHECKSUM, csum_start: 3, csum_offset: 4, ..NetHeader::default() };
        let mut frame = Frame { pair: 0, header, bytes: vec![9, 9, 9, 0x12, 0x34, 0xab, 0xcd, 0, 7, 0xff] };
        assert!(frame.complete_checksum());
        let sum: u32 = frame.bytes[3..]
            .chunks(2)
            .map(|two| u32::from(two[0]) << 8 | two.get(1).map_or(0, |b| u32::from(*b)))
            .sum();
        // The pseudo header's sum is what the field held; it is part of what a receiver adds.
        assert_eq!(((sum + 7) & 0xffff) + ((sum + 7) >> 16), 0xffff);
        assert_eq!(frame.header, NetHeader::default());
        frame.header.csum_start = 9;
        assert!(!frame.complete_checksum());
    }
}
