//! What is told of a chain that the device has used.

use super::MAX_STATUS_BYTES;
use crate::ring::SHORT_STATUS_BYTES;

/// A used element that was checked, with the status bytes of its chain. Whether the device spoke the truth in bounds is for the driver to judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Token of the chain.
    pub token: u32,
    /// Bytes that the device says it wrote, at most `offered`.
    pub written: u32,
    /// Device-writable bytes that the chain had.
    pub offered: u32,
    pub(super) status: [u8; MAX_STATUS_BYTES],
    pub(super) status_len: u8,
}

impl Used {
    /// The chain's `status-in` bytes, read once; 0xff where the device wrote nothing.
    #[must_use]
    pub fn status(&self) -> &[u8] {
        &self.status[..usize::from(self.status_len)]
    }
}

/// The `status-in` bytes that a driver declared to be those of a success, made ready to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ordinary {
    status: [u8; MAX_STATUS_BYTES],
    pub(super) length: u8,
    /// The bits of the first eight bytes that belong to it, as they lie in memory.
    pub(super) mask: u64,
}

impl Ordinary {
    /// Of these bytes; `None` if they are more than [`MAX_STATUS_BYTES`], which no chain has.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut status = [0; MAX_STATUS_BYTES];
        status.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let mut mask = [0; SHORT_STATUS_BYTES];
        mask[..bytes.len().min(SHORT_STATUS_BYTES)].fill(0xff);
        Some(Self { status, length: bytes.len() as u8, mask: u64::from_ne_bytes(mask) })
    }

    pub(super) fn status(&self) -> &[u8] {
        &self.status[..usize::from(self.length)]
    }

    #[inline]
    pub(super) fn short(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.status;
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    }
}

/// What [`super::SplitQueue::pop_but`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Popped {
    /// Nothing is there now.
    Nothing,
    /// The chain with this token was used in the ordinary way.
    Ordinary(u32),
    /// A chain was used in another way.
    Other(Used),
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::words::{self, SegmentWords};
    use crate::{ChainBatch, Direction, DmaRegion, Expected, Outcome, Payload, QueueConfig, SplitQueue};

    const IOVA: u64 = 0x10_0000;
    const PAYLOAD_BYTES: u32 = 512;

    /// What is found of a chain whose status bytes the device made `status`, and which it says it wrote `missing` bytes too few of. With a
    /// header it is a whole chain.
    fn found(header: bool, status: &[u8], missing: u32, ordinary: Option<&Ordinary>) -> Popped {
        let config = QueueConfig { index: 0, size: 8, event_idx: false, indirect: false };
        let region = Arc::new(DmaRegion::new("used", SplitQueue::bytes(8, false), IOVA).unwrap());
        let mut queue = SplitQueue::new(config, Arc::clone(&region), 0).unwrap();
        let payload = Some(Payload { iova: 0x900_0000, length: PAYLOAD_BYTES, direction: Direction::In });
        let mut segments = Vec::new();
        if header {
            segments.push(SegmentWords::HeaderOut(&[7; 16]));
        }
        segments.push(SegmentWords::PayloadIn { offset: 0, length: PAYLOAD_BYTES });
        if !status.is_empty() {
            segments.push(SegmentWords::StatusIn(status.len() as u32));
        }
        let mut words = Vec::new();
        words::push_chain(&mut words, 7, 0, &segments);
        let mut batch = ChainBatch::new();
        batch.parse(&words, &[Expected { token: 7, payload }], &[0]).unwrap();
        let Some(Outcome::Chain(chain)) = batch.get(0) else { panic!("not a chain") };
        let offered = chain.writable_bytes();
        queue.add(&chain).unwrap();
        queue.publish();
        // The device: it finds the status area in the last descriptor, if there is one.
        let mut place = [0; 8];
        region.read_at(16 * (segments.len() as u64 - 1), &mut place).unwrap();
        let place = u64::from_le_bytes(place).checked_sub(IOVA);
        if let (Some(place), false) = (place, status.is_empty()) {
            region.write_at(place, status).unwrap();
        }
        let used = queue.addresses().used - IOVA;
        region.write_at(used + 8, &(offered - missing).to_le_bytes()).unwrap();
        region.write_at(used + 2, &1_u16.to_le_bytes()).unwrap();
        let popped = queue.pop_but(ordinary).unwrap();
        assert_eq!((queue.in_flight(), queue.free(), queue.pop_but(ordinary)), (0, 8, Ok(Popped::Nothing)));
        popped
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![Just(0_usize), Just(1), 0_usize..10, 0_usize..=MAX_STATUS_BYTES]
            .prop_flat_map(|length| prop::collection::vec(prop_oneof![Just(0_u8), any::<u8>()], length))
    }

    proptest! {
        #[test]
        fn ordinary_is_what_was_written_in_full_with_the_declared_status(
            header in any::<bool>(),
            declared in bytes(),
            other in proptest::option::of(bytes()),
            flip in proptest::option::of((0..MAX_STATUS_BYTES, 0_u32..8)),
            missing in prop_oneof![Just(0_u32), 0..PAYLOAD_BYTES],
        ) {
            let mut status = other.unwrap_or_else(|| declared.clone());
            if let Some((place, bit)) = flip && let Some(byte) = status.get_mut(place) {
                *byte ^= 1 << bit;
            }
            let ordinary = Ordinary::new(&declared).unwrap();
            match found(header, &status, missing, Some(&ordinary)) {
                Popped::Ordinary(token) => prop_assert_eq!((token, missing, &status), (7, 0, &declared)),
                Popped::Other(used) => {
                    prop_assert!(missing > 0 || status != declared);
                    prop_assert_eq!((used.token, used.offered - used.written, used.status()), (7, missing, &status[..]));
                    prop_assert_eq!(found(header, &status, missing, None), Popped::Other(used));
                }
                Popped::Nothing => prop_assert!(false, "it was used"),
            }
        }
    }

    #[test]
    fn a_long_status_is_not_taken_for_what_lies_in_the_area_of_short_ones() {
        let declared = [0; SHORT_STATUS_BYTES + 1];
        for header in [false, true] {
            let popped = found(header, &[1; SHORT_STATUS_BYTES + 1], 0, Ordinary::new(&declared).as_ref());
            assert!(matches!(popped, Popped::Other(used) if used.status() == [1; SHORT_STATUS_BYTES + 1]));
        }
    }

    #[test]
    fn an_ordinary_status_is_no_longer_than_a_status_may_be() {
        assert!(Ordinary::new(&[0; MAX_STATUS_BYTES]).is_some());
        assert!(Ordinary::new(&[0; MAX_STATUS_BYTES + 1]).is_none());
    }
}
