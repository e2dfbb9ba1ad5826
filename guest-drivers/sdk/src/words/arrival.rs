//! Buffer words (host to driver) and arrival words (driver to host): what came on posted queues.

/// Most pieces of one arrival.
const MAX_PIECES: usize = 64;
/// The arrival goes on with the next one.
const GOES_ON: u32 = 1 << 16;

/// The used buffers of one `received`, in the order in which the device used them.
#[derive(Clone, Debug)]
pub struct Received<'a> {
    words: &'a [u32],
    head_words: usize,
}

/// One used buffer.
#[derive(Clone, Copy, Debug)]
pub struct ReceivedBuffer<'a> {
    /// Names it until the call ends.
    pub buffer: u32,
    /// Bytes that the device wrote, at most the buffer's.
    pub written: u32,
    head: &'a [u32],
}

impl ReceivedBuffer<'_> {
    /// The byte at `index` of the head; `None` behind it or behind what was written.
    #[must_use]
    pub fn byte(&self, index: usize) -> Option<u8> {
        if index as u64 >= u64::from(self.written) {
            return None;
        }
        self.head.get(index / 4).map(|word| word.to_le_bytes()[index % 4])
    }

    /// The little-endian 16 bits at `index` of the head.
    #[must_use]
    pub fn u16(&self, index: usize) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte(index)?, self.byte(index + 1)?]))
    }
}

impl<'a> Received<'a> {
    /// Views `words`; `head_bytes` is what was planned (`posting.head-bytes`). A part that is no whole buffer ends the iteration (the host writes none).
    #[must_use]
    pub fn new(words: &'a [u32], head_bytes: u8) -> Self {
        Self { words, head_words: usize::from(head_bytes).div_ceil(4) }
    }
}

impl<'a> Iterator for Received<'a> {
    type Item = ReceivedBuffer<'a>;

    fn next(&mut self) -> Option<ReceivedBuffer<'a>> {
        let (&[buffer, written], rest) = self.words.split_first_chunk()?;
        let (head, rest) = rest.split_at_checked(self.head_words)?;
        self.words = rest;
        Some(ReceivedBuffer { buffer, written, head })
    }
}

/// A part of a used buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The buffer.
    pub buffer: u32,
    /// First byte.
    pub offset: u32,
    /// Bytes, at least 1.
    pub length: u32,
}

/// Takes down what came.
#[derive(Debug)]
pub struct Arrivals<'a> {
    words: &'a mut Vec<u32>,
}

impl<'a> Arrivals<'a> {
    /// Writes behind what is already in `words`.
    #[must_use]
    pub fn new(words: &'a mut Vec<u32>) -> Self {
        Self { words }
    }

    /// One arrival of 1 to 64 pieces, with what the service says of it; `goes_on` if the next one continues it. Nothing is written, and false answered, for another number of pieces.
    pub fn arrival(&mut self, flags: u8, argument: u64, goes_on: bool, pieces: &[Piece]) -> bool {
        if pieces.is_empty() || pieces.len() > MAX_PIECES {
            return false;
        }
        let on = if goes_on { GOES_ON } else { 0 };
        let head = pieces.len() as u32 | on | u32::from(flags) << 24;
        self.words.extend_from_slice(&[head, argument as u32, (argument >> 32) as u32]);
        self.words.extend(pieces.iter().flat_map(|piece| [piece.buffer, piece.offset, piece.length]));
        true
    }

    /// The words themselves, for test drivers that break the layout on purpose.
    #[doc(hidden)]
    pub fn words_mut(&mut self) -> &mut Vec<u32> {
        self.words
    }
}

/// The used buffers of one `control.events`: the bytes that the device wrote into each.
#[derive(Clone, Debug)]
pub struct ControlBuffers<'a> {
    words: &'a [u32],
}

impl<'a> ControlBuffers<'a> {
    /// Views `words`.
    #[must_use]
    pub fn new(words: &'a [u32]) -> Self {
        Self { words }
    }
}

impl Iterator for ControlBuffers<'_> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let (&length, rest) = self.words.split_first()?;
        let length = length as usize;
        let (words, rest) = rest.split_at_checked(length.div_ceil(4))?;
        self.words = rest;
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.truncate(length);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_and_their_heads_are_told_apart_and_a_short_head_ends_where_it_was_written() {
        let words = [7, 100, 0x0403_0201, 0x0807_0605, 0x0c0b_0a09, 9, 2, 0xffff_0201, 0, 0];
        let seen: Vec<_> = Received::new(&words, 12).collect();
        assert_eq!((seen[0].buffer, seen[0].written, seen[0].byte(11), seen[0].byte(12)), (7, 100, Some(12), None));
        assert_eq!(seen[0].u16(10), Some(0x0c0b));
        assert_eq!((seen[1].u16(0), seen[1].byte(2), seen[1].u16(1)), (Some(0x0201), None, None));
        assert_eq!(Received::new(&[1, 2, 3], 12).count(), 0);
    }

    #[test]
    fn an_arrival_is_written_as_the_contract_says() {
        let mut words = Vec::new();
        let mut arrivals = Arrivals::new(&mut words);
        let piece = Piece { buffer: 3, offset: 12, length: 60 };
        assert!(arrivals.arrival(0x11, 0x2_0000_0001, true, &[piece]));
        assert!(!arrivals.arrival(0, 0, false, &[]));
        assert!(!arrivals.arrival(0, 0, false, &[piece; 65]));
        assert_eq!(words, [1 | 1 << 16 | 0x11 << 24, 1, 2, 3, 12, 60]);
    }

    #[test]
    fn control_buffers_are_whole_bytes() {
        let words = [3, 0xff03_0201, 0, 4, 0x0807_0605, 9, 1];
        assert_eq!(ControlBuffers::new(&words).collect::<Vec<_>>(), [vec![1, 2, 3], vec![], vec![5, 6, 7, 8]]);
    }
}
