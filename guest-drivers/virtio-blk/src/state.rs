//! What the control lane tells every data lane: a fixed record behind a version byte.

use cofferdam_sdk::DriverError;

/// First byte of the encoding.
const VERSION: u8 = 1;
const LENGTH: usize = 2 + 4 * 4;

/// Limits that hold for the life of the attachment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LaneState {
    pub(crate) max_transfer_bytes: u32,
    pub(crate) max_segment_bytes: u32,
    /// 0 when discard is not served.
    pub(crate) max_discard_bytes: u32,
    /// 0 when write-zeroes is not served.
    pub(crate) max_write_zeroes_bytes: u32,
    pub(crate) write_zeroes_may_unmap: bool,
}

impl LaneState {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION, u8::from(self.write_zeroes_may_unmap)];
        for field in
            [self.max_transfer_bytes, self.max_segment_bytes, self.max_discard_bytes, self.max_write_zeroes_bytes]
        {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DriverError> {
        let bad = || DriverError::Host(format!("{} bytes of lane state are not this driver's", bytes.len()));
        let bytes: &[u8; LENGTH] = bytes.try_into().map_err(|_| bad())?;
        let field = |index: usize| {
            let at = 2 + 4 * index;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let state = Self {
            max_transfer_bytes: field(0),
            max_segment_bytes: field(1),
            max_discard_bytes: field(2),
            max_write_zeroes_bytes: field(3),
            write_zeroes_may_unmap: bytes[1] == 1,
        };
        if bytes[0] != VERSION || bytes[1] > 1 || state.max_segment_bytes == 0 || state.max_transfer_bytes == 0 {
            return Err(bad());
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_its_encoding_and_nothing_else_is_taken_for_it() {
        let state = LaneState {
            max_transfer_bytes: 1 << 20,
            max_segment_bytes: 4096,
            max_discard_bytes: 0,
            max_write_zeroes_bytes: u32::MAX - 511,
            write_zeroes_may_unmap: true,
        };
        let bytes = state.encode();
        assert_eq!(LaneState::decode(&bytes), Ok(state));
        let other_version = [&[VERSION + 1], &bytes[1..]].concat();
        for bad in [&bytes[1..], &[][..], &other_version, &[0; LENGTH]] {
            assert!(matches!(LaneState::decode(bad), Err(DriverError::Host(_))));
        }
    }
}
