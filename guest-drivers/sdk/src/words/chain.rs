//! Chain words: driver to host. Writing them through [`ChainWriter`] keeps every bound of the layout that does not depend on the request.

use super::Status;

/// Most segments in one chain.
pub const MAX_SEGMENTS: u32 = 130;
/// Most `header-out` bytes over a whole chain.
pub const MAX_HEADER_BYTES: usize = 64;
/// Most `status-in` bytes over a whole chain.
pub const MAX_STATUS_BYTES: u32 = 64;
/// Longest segment in bytes.
pub const MAX_SEGMENT_BYTES: u32 = (1 << 28) - 1;

/// Segment kinds, as in `wit/words.wit`.
pub const KIND_HEADER_OUT: u32 = 0;
/// See [`KIND_HEADER_OUT`].
pub const KIND_PAYLOAD_OUT: u32 = 1;
/// See [`KIND_HEADER_OUT`].
pub const KIND_PAYLOAD_IN: u32 = 2;
/// See [`KIND_HEADER_OUT`].
pub const KIND_STATUS_IN: u32 = 3;
/// The queue index that means "refused".
pub const QUEUE_REFUSED: u32 = 0xffff;

/// A chain would have broken the layout; nothing was written for its token, which is still to be refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// No segment, or more than [`MAX_SEGMENTS`].
    #[error("a chain has 1 to {MAX_SEGMENTS} segments")]
    Segments,
    /// A segment is empty or longer than [`MAX_SEGMENT_BYTES`].
    #[error("a segment has 1 to {MAX_SEGMENT_BYTES} bytes")]
    SegmentLength,
    /// More than [`MAX_HEADER_BYTES`] of header or [`MAX_STATUS_BYTES`] of status.
    #[error("header or status bytes over their bound")]
    InlineBytes,
    /// A device-readable segment after a device-writable one (virtio 1.2, section 2.7.4.2).
    #[error("device-readable after device-writable")]
    Order,
    /// Queue 0xffff is no queue.
    #[error("not a queue index")]
    Queue,
}

/// Takes down what a driver wants published.
#[derive(Debug)]
pub struct ChainWriter<'a> {
    words: &'a mut Vec<u32>,
}

impl<'a> ChainWriter<'a> {
    /// Writes behind what is already in `words`.
    #[must_use]
    pub fn new(words: &'a mut Vec<u32>) -> Self {
        Self { words }
    }

    /// Answers `token` at once with `status`, which is not [`Status::Ok`]; nothing is published.
    pub fn refuse(&mut self, token: u32, status: Status) {
        debug_assert_ne!(status, Status::Ok, "a refusal has a reason");
        self.words.extend([token, QUEUE_REFUSED | status.code() << 24]);
    }

    /// Publishes one chain for `token` on `queue`; `build` adds its segments in order.
    ///
    /// # Errors
    /// [`ChainError`] when the segments break the layout: nothing is written then, and the caller refuses the token.
    #[inline]
    pub fn chain(&mut self, token: u32, queue: u16, build: impl FnOnce(&mut Chain<'_>)) -> Result<(), ChainError> {
        let start = self.words.len();
        self.words.extend_from_slice(&[token, 0]);
        let mut chain =
            Chain { words: self.words, segments: 0, header_bytes: 0, status_bytes: 0, writable: false, error: None };
        build(&mut chain);
        let (segments, mut error) = (chain.segments, chain.error);
        if segments == 0 || segments > MAX_SEGMENTS {
            error = error.or(Some(ChainError::Segments));
        }
        if u32::from(queue) == QUEUE_REFUSED {
            error = error.or(Some(ChainError::Queue));
        }
        if let Some(error) = error {
            self.words.truncate(start);
            return Err(error);
        }
        self.words[start + 1] = u32::from(queue) | segments << 16;
        Ok(())
    }

    /// The words themselves, for test drivers that break the layout on purpose.
    #[doc(hidden)]
    pub fn words_mut(&mut self) -> &mut Vec<u32> {
        self.words
    }
}

/// The segments of one chain, in the order in which the device sees them.
#[derive(Debug)]
pub struct Chain<'a> {
    words: &'a mut Vec<u32>,
    segments: u32,
    header_bytes: usize,
    status_bytes: u32,
    /// A device-writable segment was added.
    writable: bool,
    /// The first breach; later segments are not written.
    error: Option<ChainError>,
}

impl Chain<'_> {
    /// Bytes that the device reads, by value.
    #[inline]
    pub fn header_out(&mut self, bytes: &[u8]) {
        self.header_bytes += bytes.len();
        if self.header_bytes > MAX_HEADER_BYTES {
            self.breach(ChainError::InlineBytes);
        }
        let Some(head) = self.segment(KIND_HEADER_OUT, bytes.len() as u32) else { return };
        match bytes.as_chunks().0 {
            // The commonest lengths, virtio-blk's and virtio-net's, written at once.
            [a, b, c, d] if bytes.len() == 16 => {
                let [a, b, c, d] = [a, b, c, d].map(|word| u32::from_le_bytes(*word));
                self.words.extend_from_slice(&[head, a, b, c, d]);
            }
            [a, b, c] if bytes.len() == 12 => {
                let [a, b, c] = [a, b, c].map(|word| u32::from_le_bytes(*word));
                self.words.extend_from_slice(&[head, a, b, c]);
            }
            _ => {
                self.words.push(head);
                self.words.extend(bytes.chunks(4).map(|piece| {
                    let mut word = [0; 4];
                    word[..piece.len()].copy_from_slice(piece);
                    u32::from_le_bytes(word)
                }));
            }
        }
    }

    /// Payload that the device reads: `length` bytes at `offset` into the request's payload.
    #[inline]
    pub fn payload_out(&mut self, offset: u32, length: u32) {
        if let Some(head) = self.segment(KIND_PAYLOAD_OUT, length) {
            self.words.extend_from_slice(&[head, offset]);
        }
    }

    /// Payload that the device writes: `length` bytes at `offset` into the request's payload.
    #[inline]
    pub fn payload_in(&mut self, offset: u32, length: u32) {
        if let Some(head) = self.segment(KIND_PAYLOAD_IN, length) {
            self.words.extend_from_slice(&[head, offset]);
        }
    }

    /// Bytes that the device writes and `complete` gets by value.
    #[inline]
    pub fn status_in(&mut self, length: u32) {
        self.status_bytes = self.status_bytes.saturating_add(length);
        if self.status_bytes > MAX_STATUS_BYTES {
            self.breach(ChainError::InlineBytes);
        }
        if let Some(head) = self.segment(KIND_STATUS_IN, length) {
            self.words.push(head);
        }
    }

    /// Counts one segment; its first word, if it is to be written.
    #[inline]
    fn segment(&mut self, kind: u32, length: u32) -> Option<u32> {
        let writable = kind >= KIND_PAYLOAD_IN;
        self.segments += 1;
        if length == 0 || length > MAX_SEGMENT_BYTES {
            self.breach(ChainError::SegmentLength);
        } else if self.segments > MAX_SEGMENTS {
            self.breach(ChainError::Segments);
        } else if self.writable && !writable {
            self.breach(ChainError::Order);
        }
        self.writable |= writable;
        self.error.is_none().then_some(kind | length << 4)
    }

    /// The first one counts.
    #[cold]
    fn breach(&mut self, error: ChainError) {
        self.error.get_or_insert(error);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_written_word_for_word_as_the_contract_says() {
        let mut words = Vec::new();
        let mut writer = ChainWriter::new(&mut words);
        writer
            .chain(9, 2, |chain| {
                chain.header_out(&[1, 2, 3, 4, 5]);
                chain.payload_in(512, 1024);
                chain.status_in(1);
            })
            .unwrap();
        writer.refuse(10, Status::ReadOnly);
        let header = [KIND_HEADER_OUT | 5 << 4, 0x0403_0201, 5];
        let tail = [KIND_PAYLOAD_IN | 1024 << 4, 512, KIND_STATUS_IN | 1 << 4];
        assert_eq!(words, [&[9, 2 | 3 << 16][..], &header, &tail, &[10, 0xffff | 5 << 24]].concat());
    }

    #[test]
    fn a_chain_that_breaks_the_layout_leaves_no_words() {
        type Build = fn(&mut Chain<'_>);
        let breaches: [(ChainError, Build); 6] = [
            (ChainError::Segments, |_| {}),
            (ChainError::Segments, |chain| (0..131).for_each(|at| chain.payload_out(at, 1))),
            (ChainError::SegmentLength, |chain| chain.payload_out(0, 1 << 28)),
            (ChainError::SegmentLength, |chain| chain.status_in(0)),
            (ChainError::InlineBytes, |chain| chain.header_out(&[0; 65])),
            (ChainError::Order, |chain| {
                chain.status_in(1);
                chain.header_out(&[0]);
            }),
        ];
        for (expected, build) in breaches {
            let mut words = vec![77];
            assert_eq!(ChainWriter::new(&mut words).chain(1, 0, build), Err(expected));
            assert_eq!(words, [77]);
        }
        assert_eq!(ChainWriter::new(&mut Vec::new()).chain(1, 0xffff, |c| c.status_in(1)), Err(ChainError::Queue));
    }
}
