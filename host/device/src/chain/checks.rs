//! The rules of one chain's segments, checked one after another as they come.

use super::{Direction, Expected, Head, Header, Kind, Made, Payload, Segment};
use crate::error::ChainRule;
use crate::words::{MAX_HEADER_BYTES, MAX_STATUS_BYTES, REFUSED};

/// Header bytes of the chain that [`Common::whole`] knows: those of virtio-blk (section 5.2.6).
pub(crate) const WHOLE_HEADER_BYTES: usize = 16;
/// Header bytes of the chain that [`Common::packet`] knows: those of virtio-net (section 5.1.6).
pub(crate) const PACKET_HEADER_BYTES: usize = 12;

/// The check of the two commonest chains in one step: 16 header bytes, the whole payload in one segment, a status; and 12 header bytes and the whole payload in one segment.
pub(super) struct Common {
    /// Second word of a chain of no segments on the lane's first queue.
    word: u32,
    /// Whether it has one: else no chain is known.
    has_queue: bool,
    queue: u16,
}

/// Segments of a whole chain and of a packet's, where the second word has them.
const WHOLE_SEGMENTS: u32 = 3 << 16;
const PACKET_SEGMENTS: u32 = 2 << 16;

/// The kind of a payload in this direction, and how much of it the device may write.
#[inline(always)]
fn kind_of(payload: &Payload) -> (Kind, u32) {
    match payload.direction {
        Direction::In => (Kind::PayloadIn, payload.length),
        Direction::Out => (Kind::PayloadOut, 0),
    }
}

/// Whether a length fits the 28 bits of its word and is none of nothing.
#[inline(always)]
fn is_length(length: u32) -> bool {
    length.wrapping_sub(1) < (1 << 28) - 1
}

impl Common {
    /// For a lane that serves `queues`. Chains on others than the first are looked at the long way.
    pub(super) fn new(queues: &[u16]) -> Self {
        match queues.first() {
            Some(&queue) if queue != REFUSED => Self { word: u32::from(queue), has_queue: true, queue },
            _ => Self { word: 0, has_queue: false, queue: 0 },
        }
    }

    /// What comes after the chain that `words` begin with, and its head, if it is such a chain for `expected`, the request at position `request`. `None` says nothing about the
    /// words but that they have to be looked at one by one, by [`Checks`]; what is answered here is what would be answered there (a test compares them).
    #[inline(always)]
    pub(super) fn whole<'a>(&self, words: &'a [u32], expected: &Expected, request: u16) -> Option<(&'a [u32], Head)> {
        let (&[token, second, header, a, b, c, d, data, offset, status], rest) = words.split_first_chunk()?;
        let payload = expected.payload?;
        let (kind, writable) = kind_of(&payload);
        // A status of 1 to 64 bytes. Of another kind of segment, something is left in the lowest bits.
        let status_len = (status ^ Kind::Status as u32).rotate_right(4);
        // One look at all of them, not a branch for each: what differs leaves a bit.
        let differs = (token ^ expected.token)
            | (second ^ (self.word | WHOLE_SEGMENTS))
            | (header ^ ((WHOLE_HEADER_BYTES as u32) << 4 | Kind::Header as u32))
            // A length that does not fit its 28 bits fails here, because something of it is lost.
            | (data.rotate_right(4) ^ payload.length ^ (kind as u32) << 28)
            | offset;
        let fits = differs == 0
            && is_length(payload.length)
            && status_len.wrapping_sub(1) < MAX_STATUS_BYTES as u32
            && self.has_queue;
        if !fits {
            return None;
        }
        let low = u64::from(a) | u64::from(b) << 32;
        let high = u64::from(c) | u64::from(d) << 32;
        let head = Head {
            token,
            // 28 bits and 7.
            writable: writable + status_len,
            header: (u128::from(low) | u128::from(high) << 64).to_le_bytes(),
            payload: Segment { place: payload.iova, length: payload.length, kind },
            first: 0,
            queue: self.queue,
            request,
            segments: 3,
            header_len: WHOLE_HEADER_BYTES as u8,
            status_len: status_len as u8,
            made: Made::Whole,
        };
        Some((rest, head))
    }

    /// The same of a chain of 12 header bytes and the whole payload in one segment, and nothing behind it.
    #[inline(always)]
    pub(super) fn packet<'a>(&self, words: &'a [u32], expected: &Expected, request: u16) -> Option<(&'a [u32], Head)> {
        let (&[token, second, header, a, b, c, data, offset], rest) = words.split_first_chunk()?;
        let payload = expected.payload?;
        let (kind, writable) = kind_of(&payload);
        let differs = (token ^ expected.token)
            | (second ^ (self.word | PACKET_SEGMENTS))
            | (header ^ ((PACKET_HEADER_BYTES as u32) << 4 | Kind::Header as u32))
            | (data.rotate_right(4) ^ payload.length ^ (kind as u32) << 28)
            | offset;
        if differs != 0 || !is_length(payload.length) || !self.has_queue {
            return None;
        }
        let low = u64::from(a) | u64::from(b) << 32;
        let head = Head {
            token,
            writable,
            header: (u128::from(low) | u128::from(c) << 64).to_le_bytes(),
            payload: Segment { place: payload.iova, length: payload.length, kind },
            first: 0,
            queue: self.queue,
            request,
            segments: 2,
            header_len: PACKET_HEADER_BYTES as u8,
            status_len: 0,
            made: Made::Packet,
        };
        Some((rest, head))
    }
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

    use super::super::Chain;
    use super::*;
    use crate::words::{SegmentWords, push_chain};

    const TOKEN: u32 = 0x8000_0001;
    const QUEUE: u16 = 5;

    /// The words of a chain that `whole` takes.
    fn good(payload: Payload, header: &[u8; 16], status: u32) -> Vec<u32> {
        let (offset, length) = (0, payload.length);
        let data = match payload.direction {
            Direction::In => SegmentWords::PayloadIn { offset, length },
            Direction::Out => SegmentWords::PayloadOut { offset, length },
        };
        let mut words = Vec::new();
        push_chain(&mut words, TOKEN, QUEUE, &[SegmentWords::HeaderOut(header), data, SegmentWords::StatusIn(status)]);
        words
    }

    /// The words of a chain that `packet` takes.
    fn good_packet(payload: Payload, header: &[u8; 12]) -> Vec<u32> {
        let (offset, length) = (0, payload.length);
        let data = match payload.direction {
            Direction::In => SegmentWords::PayloadIn { offset, length },
            Direction::Out => SegmentWords::PayloadOut { offset, length },
        };
        let mut words = Vec::new();
        push_chain(&mut words, TOKEN, QUEUE, &[SegmentWords::HeaderOut(header), data]);
        words
    }

    type Found = (usize, Vec<u8>, Vec<Segment>, u8, u64);

    /// What looking at them one by one makes of the words.
    fn one_by_one(words: &[u32], payload: Payload, count: u32) -> Option<Found> {
        if words.get(..2)? != [TOKEN, u32::from(QUEUE) | count << 16] {
            return None;
        }
        let (mut words, mut checks, mut header) =
            (Words(&words[2..]), Checks::new(Some(payload)), [0; MAX_HEADER_BYTES]);
        let segments =
            (0..count).map(|_| checks.segment(&mut words, &mut header)).collect::<Result<Vec<_>, _>>().ok()?;
        let is_whole = checks.ascending && checks.covered == u64::from(payload.length);
        let header = header[..usize::from(checks.header_len)].to_vec();
        is_whole.then_some((words.0.len(), header, segments, checks.status_len, checks.writable))
    }

    fn in_one_step(words: &[u32], payload: Payload, queues: &[u16]) -> Option<Found> {
        let expected = Expected { token: TOKEN, payload: Some(payload) };
        let common = Common::new(queues);
        let whole = common.whole(words, &expected, 9);
        let packet = common.packet(words, &expected, 9);
        assert!(whole.is_none() || packet.is_none(), "no chain is both");
        let (made, length) =
            if whole.is_some() { (Made::Whole, WHOLE_HEADER_BYTES) } else { (Made::Packet, PACKET_HEADER_BYTES) };
        let (rest, head) = whole.or(packet)?;
        let chain = Chain { head: &head, header: &head.header[..length], segments: &[] };
        let count = if made == Made::Whole { 3 } else { 2 };
        assert_eq!((chain.token(), chain.queue(), chain.request(), chain.segment_count()), (TOKEN, QUEUE, 9, count));
        assert_eq!((head.made, usize::from(head.header_len)), (made, length));
        let (mut segments, mut lasts) = (Vec::new(), Vec::new());
        chain.each_segment(|segment, is_last| {
            segments.push(*segment);
            lasts.push(is_last);
        });
        assert_eq!(lasts, [&[false, false, true][..], &[false, true]][usize::from(made == Made::Packet)]);
        Some((rest.len(), chain.header().to_vec(), segments, head.status_len, u64::from(chain.writable_bytes())))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_one_step_check_answers_what_the_long_one_answers(
            length in prop_oneof![Just(0), 1_u32..9000, Just((1 << 28) - 1), Just(1 << 28), any::<u32>()],
            writes in any::<bool>(),
            header in any::<[u8; 16]>(),
            status in prop_oneof![Just(1), 0_u32..70],
            more in 0_usize..3,
            cut in proptest::option::of(0_usize..10),
            damage in proptest::option::of((0_usize..10, prop_oneof![(0_u32..32).prop_map(|bit| 1 << bit), any::<u32>()])),
        ) {
            let direction = if writes { Direction::Out } else { Direction::In };
            let payload = Payload { iova: 0x10_0000, length, direction };
            let mut words = good(payload, &header, status);
            words.resize(words.len() + more, 7);
            if let Some(length) = cut {
                words.truncate(length);
            }
            if let Some((place, bits)) = damage && let Some(word) = words.get_mut(place) {
                *word ^= bits;
            }
            let long = one_by_one(&words, payload, 3);
            if let Some(short) = in_one_step(&words, payload, &[QUEUE, 6]) {
                prop_assert_eq!(Some(short), long);
            } else if damage.is_none() && cut.is_none() && (1..1 << 28).contains(&length) && (1..=64).contains(&status) {
                prop_assert!(false, "the commonest chain is looked at the long way");
            }
            for queues in [&[][..], &[6, QUEUE], &[REFUSED]] {
                prop_assert_eq!(in_one_step(&words, payload, queues), None, "only the first queue is known");
            }
        }

        #[test]
        fn the_one_step_check_of_a_packet_answers_what_the_long_one_answers(
            length in prop_oneof![Just(0), 1_u32..9000, Just((1 << 28) - 1), Just(1 << 28), any::<u32>()],
            writes in any::<bool>(),
            header in any::<[u8; 12]>(),
            more in 0_usize..3,
            cut in proptest::option::of(0_usize..8),
            damage in proptest::option::of((0_usize..8, prop_oneof![(0_u32..32).prop_map(|bit| 1 << bit), any::<u32>()])),
        ) {
            let direction = if writes { Direction::Out } else { Direction::In };
            let payload = Payload { iova: 0x10_0000, length, direction };
            let mut words = good_packet(payload, &header);
            words.resize(words.len() + more, 7);
            if let Some(length) = cut {
                words.truncate(length);
            }
            if let Some((place, bits)) = damage && let Some(word) = words.get_mut(place) {
                *word ^= bits;
            }
            let long = one_by_one(&words, payload, 2);
            if let Some(short) = in_one_step(&words, payload, &[QUEUE, 6]) {
                prop_assert_eq!(Some(short), long);
            } else if damage.is_none() && cut.is_none() && (1..1 << 28).contains(&length) {
                prop_assert!(false, "a packet is looked at the long way");
            }
            for queues in [&[][..], &[6, QUEUE], &[REFUSED]] {
                prop_assert_eq!(in_one_step(&words, payload, queues), None, "only the first queue is known");
            }
        }
    }

    #[test]
    fn a_refusal_with_three_segments_is_no_chain_of_a_queue_with_that_number() {
        let payload = Payload { iova: 0, length: 512, direction: Direction::In };
        for second in [u32::from(REFUSED) | 3 << 16, 0] {
            let mut words = good(payload, &[0; 16], 1);
            words[1] = second;
            assert_eq!(in_one_step(&words, payload, &[REFUSED]), None);
            assert_eq!(in_one_step(&words, payload, &[]), None);
        }
    }
}
