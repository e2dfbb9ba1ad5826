//! The rules of one chain's segments, checked one after another as they come.

use super::{Direction, Header, Kind, Payload, Segment};
use crate::error::ChainRule;
use crate::words::{MAX_HEADER_BYTES, MAX_STATUS_BYTES};

/// Header bytes of the chain that [`whole`] knows: those of virtio-blk (section 5.2.6).
pub(super) const WHOLE_HEADER_BYTES: usize = 16;

/// A chain of three segments, checked by [`whole`].
pub(super) struct Whole {
    pub(super) header: [u8; WHOLE_HEADER_BYTES],
    pub(super) segments: [Segment; 3],
    pub(super) status_len: u8,
    pub(super) writable: u32,
}

/// The check of the commonest chain in one step, and what comes after it in `words`: 16 header bytes, the whole payload in one segment, a status. `None` says nothing about
/// the words but that they have to be looked at one by one, by [`Checks`]; what is answered here is what would be answered there (a test compares them).
#[inline(always)]
pub(super) fn whole(words: &[u32], payload: Payload) -> Option<(&[u32], Whole)> {
    let (&[header, a, b, c, d, data, offset, status], rest) = words.split_first_chunk()?;
    let (kind, to_device) = match payload.direction {
        Direction::In => (Kind::PayloadIn, 0),
        Direction::Out => (Kind::PayloadOut, payload.length),
    };
    let status_len = status >> 4;
    let fits = header == (WHOLE_HEADER_BYTES as u32) << 4 | Kind::Header as u32
        // A length that does not fit its 28 bits fails here, because something of it is lost.
        && data >> 4 == payload.length
        && data & 0xf == kind as u32
        && offset == 0
        && payload.length != 0
        && status & 0xf == Kind::Status as u32
        && (1..=MAX_STATUS_BYTES as u32).contains(&status_len);
    if !fits {
        return None;
    }
    let low = u128::from(a) | u128::from(b) << 32;
    let segments = [
        Segment { place: 0, length: WHOLE_HEADER_BYTES as u32, kind: Kind::Header },
        Segment { place: payload.iova, length: payload.length, kind },
        Segment { place: 0, length: status_len, kind: Kind::Status },
    ];
    let header = (low | u128::from(c) << 64 | u128::from(d) << 96).to_le_bytes();
    // 28 bits and 7.
    let writable = payload.length - to_device + status_len;
    Some((rest, Whole { header, segments, status_len: status_len as u8, writable }))
}

/// A guest's list, read from the front.
pub(super) struct Words<'a>(pub(super) &'a [u32]);

impl Words<'_> {
    #[inline]
    pub(super) fn next(&mut self) -> Option<u32> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    #[inline]
    fn take(&mut self, count: usize) -> Option<&[u32]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}

/// What has to be known of the segments before this one.
pub(super) struct Checks {
    payload: Option<Payload>,
    pub(super) header_len: u8,
    pub(super) status_len: u8,
    /// At most the payload and 64 bytes, because overlap is refused; 130 segments of 2^28 bytes before that is known.
    pub(super) writable: u64,
    /// End of the last payload segment, in bytes of the payload.
    end: u64,
    /// Sum of the payload segments' lengths.
    pub(super) covered: u64,
    pub(super) ascending: bool,
    writing: bool,
}

impl Checks {
    pub(super) fn new(payload: Option<Payload>) -> Self {
        Self { payload, header_len: 0, status_len: 0, writable: 0, end: 0, covered: 0, ascending: true, writing: false }
    }

    // Always inlined, with what it calls: else the segment and all that is known so far go through memory, which was half of the cost.
    #[inline(always)]
    pub(super) fn segment(&mut self, words: &mut Words<'_>, header: &mut Header) -> Result<Segment, ChainRule> {
        let word = words.next().ok_or(ChainRule::Truncated)?;
        let (kind, length) = ((word & 0xf) as u8, word >> 4);
        if kind > 3 {
            return Err(ChainRule::Kind(kind));
        }
        if length == 0 {
            return Err(ChainRule::EmptySegment);
        }
        let writes = kind >= 2;
        if self.writing && !writes {
            return Err(ChainRule::Order);
        }
        self.writing = writes;
        match kind {
            0 => self.header_out(length, words, header),
            3 => self.status_in(length),
            _ => self.payload(if writes { Direction::In } else { Direction::Out }, length, words),
        }
    }

    #[inline(always)]
    fn header_out(&mut self, length: u32, words: &mut Words<'_>, header: &mut Header) -> Result<Segment, ChainRule> {
        let offset = self.header_len;
        if length > MAX_HEADER_BYTES as u32 - u32::from(offset) {
            return Err(ChainRule::HeaderBytes);
        }
        let given = words.take(length.div_ceil(4) as usize).ok_or(ChainRule::Truncated)?;
        let into = &mut header[usize::from(offset)..usize::from(offset) + length as usize];
        header_words(into, given)?;
        self.header_len += length as u8;
        Ok(Segment { place: u64::from(offset), length, kind: Kind::Header })
    }

    #[inline(always)]
    fn status_in(&mut self, length: u32) -> Result<Segment, ChainRule> {
        let offset = self.status_len;
        if length > MAX_STATUS_BYTES as u32 - u32::from(offset) {
            return Err(ChainRule::StatusBytes);
        }
        self.status_len += length as u8;
        self.writable += u64::from(length);
        Ok(Segment { place: u64::from(offset), length, kind: Kind::Status })
    }

    #[inline(always)]
    fn payload(&mut self, direction: Direction, length: u32, words: &mut Words<'_>) -> Result<Segment, ChainRule> {
        let offset = words.next().ok_or(ChainRule::Truncated)?;
        let payload = self.payload.ok_or(ChainRule::NoPayload)?;
        if payload.direction != direction {
            return Err(ChainRule::Direction);
        }
        let end = u64::from(offset) + u64::from(length);
        if end > u64::from(payload.length) {
            return Err(ChainRule::OutOfPayload);
        }
        self.ascending &= u64::from(offset) >= self.end;
        self.end = end;
        self.covered += u64::from(length);
        let kind = match direction {
            Direction::In => {
                self.writable += u64::from(length);
                Kind::PayloadIn
            }
            Direction::Out => Kind::PayloadOut,
        };
        Ok(Segment { place: payload.iova + u64::from(offset), length, kind })
    }
}

/// Copies header bytes of any number out of their words; what the last word has too many is 0.
fn header_words(into: &mut [u8], words: &[u32]) -> Result<(), ChainRule> {
    for (place, word) in into.chunks_mut(4).zip(words) {
        let bytes = word.to_le_bytes();
        let (used, padding) = bytes.split_at(place.len());
        if padding.iter().any(|&byte| byte != 0) {
            return Err(ChainRule::Padding);
        }
        place.copy_from_slice(used);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::words::{SegmentWords, push_chain};

    /// The words of a chain that `whole` takes, but for its token and its queue.
    fn good(payload: Payload, header: &[u8; 16], status: u32) -> Vec<u32> {
        let (offset, length) = (0, payload.length);
        let data = match payload.direction {
            Direction::In => SegmentWords::PayloadIn { offset, length },
            Direction::Out => SegmentWords::PayloadOut { offset, length },
        };
        let mut words = Vec::new();
        push_chain(&mut words, 1, 0, &[SegmentWords::HeaderOut(header), data, SegmentWords::StatusIn(status)]);
        words.split_off(2)
    }

    /// What looking at them one by one makes of the words.
    fn one_by_one(words: &[u32], payload: Payload) -> Option<(usize, Header, Vec<Segment>, u8, u64)> {
        let (mut words, mut checks, mut header) = (Words(words), Checks::new(Some(payload)), [0; MAX_HEADER_BYTES]);
        let segments = (0..3).map(|_| checks.segment(&mut words, &mut header)).collect::<Result<Vec<_>, _>>().ok()?;
        let is_whole = checks.ascending && checks.covered == u64::from(payload.length);
        is_whole.then_some((words.0.len(), header, segments, checks.status_len, checks.writable))
    }

    proptest! {
        #[test]
        fn the_one_step_check_answers_what_the_long_one_answers(
            length in prop_oneof![Just(0), 1_u32..9000, Just((1 << 28) - 1), Just(1 << 28), any::<u32>()],
            writes in any::<bool>(),
            header in any::<[u8; 16]>(),
            status in prop_oneof![Just(1), 0_u32..70],
            more in 0_usize..3,
            damage in proptest::option::of((0_usize..8, prop_oneof![(0_u32..32).prop_map(|bit| 1 << bit), any::<u32>()])),
        ) {
            let direction = if writes { Direction::Out } else { Direction::In };
            let payload = Payload { iova: 0x10_0000, length, direction };
            let mut words = good(payload, &header, status);
            words.resize(words.len() + more, 7);
            if let Some((place, bits)) = damage {
                words[place] ^= bits;
            }
            let long = one_by_one(&words, payload);
            if let Some((rest, whole)) = whole(&words, payload) {
                let mut header = [0; MAX_HEADER_BYTES];
                header[..WHOLE_HEADER_BYTES].copy_from_slice(&whole.header);
                let short = (rest.len(), header, whole.segments.to_vec(), whole.status_len, u64::from(whole.writable));
                prop_assert_eq!(Some(short), long);
            } else if damage.is_none() && (1..1 << 28).contains(&length) && (1..=64).contains(&status) {
                prop_assert!(false, "the commonest chain is looked at the long way");
            }
        }
    }
}
