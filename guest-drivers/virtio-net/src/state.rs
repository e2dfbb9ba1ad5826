//! What the control lane tells every data lane: a fixed record behind a version byte.

use cofferdam_sdk::DriverError;

use crate::MTU_RANGE;

/// First byte of the encoding.
const VERSION: u8 = 1;

/// What holds for the life of the attachment besides the features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LaneState {
    /// Largest packet without its link header, in bytes; in [`MTU_RANGE`].
    pub(crate) mtu: u16,
}

impl LaneState {
    pub(crate) fn encode(self) -> Vec<u8> {
        let [low, high] = self.mtu.to_le_bytes();
        vec![VERSION, low, high]
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DriverError> {
        match *bytes {
            [VERSION, low, high] if MTU_RANGE.contains(&u16::from_le_bytes([low, high])) => {
                Ok(Self { mtu: u16::from_le_bytes([low, high]) })
            }
            _ => Err(DriverError::Host(format!("{} bytes of lane state are not this driver's", bytes.len()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_survives_its_encoding_and_nothing_else_is_taken_for_it() {
        let state = LaneState { mtu: 9000 };
        assert_eq!(LaneState::decode(&state.encode()), Ok(state));
        for bad in [&[][..], &[VERSION, 40], &[VERSION + 1, 40, 35], &[VERSION, 67, 0], &[VERSION, 40, 35, 0]] {
            assert!(matches!(LaneState::decode(bad), Err(DriverError::Host(_))), "{bad:?}");
        }
    }
}
