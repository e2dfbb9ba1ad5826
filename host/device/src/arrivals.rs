//! The check of a guest's arrival words ("Arrival words" of `wit/words.wit`): what used buffers of a posted queue mean to clients.
//!
//! As with chains, a call is believed whole or not at all, and nothing of it before every word was checked.
//!
//! ```
//! use cofferdam_device::arrivals::{Arrivals, Given};
//!
//! let given = [Given { buffer: 3, written: 72 }, Given { buffer: 9, written: 60 }];
//! let mut arrivals = Arrivals::default();
//! // One packet, behind a header of 12 bytes; the second buffer is dropped.
//! arrivals.parse(&[1, 0, 0, 3, 12, 60], &given)?;
//! let (head, pieces) = arrivals.iter().next().unwrap();
//! assert_eq!((head.goes_on, pieces[0].buffer, pieces[0].offset, pieces[0].length), (false, 3, 12, 60));
//!
//! // One byte more than the device wrote, and nothing is believed.
//! assert!(arrivals.parse(&[1, 0, 0, 3, 12, 61], &given).is_err());
//! assert_eq!(arrivals.iter().count(), 0);
//! # Ok::<(), cofferdam_device::arrivals::ArrivalError>(())
//! ```

use crate::words::MAX_BATCH;

/// Most pieces of one arrival, also of one that goes on over several.
pub const MAX_PIECES: usize = 64;
/// The arrival goes on with the next one.
const GOES_ON: u32 = 1 << 16;
/// Bits of the first word that mean nothing.
const RESERVED: u32 = 0x00fe_0000;
/// Words of an arrival before its pieces.
const HEAD_WORDS: usize = 3;

/// A buffer that a guest was told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// Names it.
    pub buffer: u16,
    /// Bytes that the device wrote.
    pub written: u32,
}

/// A part of a used buffer, inside what the device wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The buffer.
    pub buffer: u16,
    /// First byte.
    pub offset: u32,
    /// Bytes, at least 1.
    pub length: u32,
}

/// What a guest says of one arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// By the service.
    pub flags: u8,
    /// By the service.
    pub argument: u64,
    /// The next one continues it.
    pub goes_on: bool,
}

/// How a guest broke the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArrivalError {
    /// More buffers than a call may have; the host is to blame.
    #[error("{0} buffers in one call")]
    TooManyBuffers(usize),
    /// The words end inside an arrival.
    #[error("the words end inside an arrival")]
    Truncated,
    /// Bits that mean nothing are set.
    #[error("reserved bits are set in {0:#010x}")]
    Reserved(u32),
    /// No piece, or more than [`MAX_PIECES`].
    #[error("an arrival of {0} pieces")]
    Pieces(u32),
    /// A buffer that was not given in this call.
    #[error("buffer {0} was not given")]
    UnknownBuffer(u32),
    /// Empty, beyond what was written, or not behind the piece that was named before.
    #[error("{length} bytes at {offset} of buffer {buffer}, which has {written} and is named up to {named}")]
    Range {
        /// The buffer.
        buffer: u32,
        /// First byte.
        offset: u32,
        /// Bytes.
        length: u32,
        /// What the device wrote.
        written: u32,
        /// Where the last piece of this buffer ended.
        named: u32,
    },
}

/// The checked output of one `received` call. Keep one per lane: its memory is used again.
#[derive(Debug, Default)]
pub struct Arrivals {
    /// With the index behind its last piece.
    heads: Vec<(Head, usize)>,
    pieces: Vec<Piece>,
    /// Where the last piece of each given buffer ended.
    named: Vec<u32>,
    /// One of them goes on, or has several pieces.
    odd: bool,
}

impl Arrivals {
    /// Checks `words`, the guest's answer to `given` (at most 64 buffers, none twice). On error nothing is held.
    ///
    /// # Errors
    /// [`ArrivalError`]; the guest is to blame, but for `TooManyBuffers`.
    pub fn parse(&mut self, words: &[u32], given: &[Given]) -> Result<(), ArrivalError> {
        self.clear();
        let result = self.arrivals(words, given);
        if result.is_err() {
            self.clear();
        }
        result
    }

    /// Whether an arrival names the buffer at `index` of what was given.
    #[must_use]
    pub fn is_named(&self, index: usize) -> bool {
        // A piece has a byte at least, so it ends behind 0.
        self.named.get(index).is_some_and(|end| *end > 0)
    }

    /// Forgets everything, keeping the memory.
    pub fn clear(&mut self) {
        self.heads.clear();
        self.pieces.clear();
        self.named.clear();
        self.odd = false;
    }

    /// Every arrival with its pieces, in the guest's order.
    pub fn iter(&self) -> impl Iterator<Item = (Head, &[Piece])> {
        let mut first = 0;
        self.heads.iter().map(move |(head, end)| (*head, &self.pieces[std::mem::replace(&mut first, *end)..*end]))
    }

    /// The same where each has one piece and none goes on, which is nearly always so.
    #[inline]
    pub fn plain(&self) -> Option<impl ExactSizeIterator<Item = (Head, &Piece)>> {
        (!self.odd).then(|| self.heads.iter().zip(&self.pieces).map(|((head, _), piece)| (*head, piece)))
    }

    fn arrivals(&mut self, mut words: &[u32], given: &[Given]) -> Result<(), ArrivalError> {
        if given.len() > MAX_BATCH {
            return Err(ArrivalError::TooManyBuffers(given.len()));
        }
        self.named.resize(given.len(), 0);
        // A guest that keeps the order finds each buffer at the first look.
        let mut next = 0;
        while !words.is_empty() {
            let Some((&[word, low, high], rest)) = words.split_first_chunk::<HEAD_WORDS>() else {
                return Err(ArrivalError::Truncated);
            };
            if word & RESERVED != 0 {
                return Err(ArrivalError::Reserved(word));
            }
            let count = word & 0xffff;
            if count == 0 || count as usize > MAX_PIECES {
                return Err(ArrivalError::Pieces(count));
            }
            let (pieces, rest) = rest.split_at_checked(3 * count as usize).ok_or(ArrivalError::Truncated)?;
            words = rest;
            for piece in pieces.as_chunks::<3>().0 {
                let [buffer, offset, length] = *piece;
                let is_it = |given: &Given| u32::from(given.buffer) == buffer;
                let at = match given.get(next).filter(|given| is_it(given)) {
                    Some(_) => next,
                    None => given.iter().position(is_it).ok_or(ArrivalError::UnknownBuffer(buffer))?,
                };
                let (Given { buffer: name, written }, named) = (given[at], self.named[at]);
                let end = offset.checked_add(length).filter(|end| *end <= written && length > 0 && offset >= named);
                let Some(end) = end else {
                    return Err(ArrivalError::Range { buffer, offset, length, written, named });
                };
                self.named[at] = end;
                next = at + 1;
                self.pieces.push(Piece { buffer: name, offset, length });
            }
            let argument = u64::from(low) | u64::from(high) << 32;
            let head = Head { flags: (word >> 24) as u8, argument, goes_on: word & GOES_ON != 0 };
            self.odd |= count != 1 || head.goes_on;
            self.heads.push((head, self.pieces.len()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIVEN: [Given; 3] =
        [Given { buffer: 1, written: 100 }, Given { buffer: 7, written: 0 }, Given { buffer: 4, written: 4096 }];

    #[test]
    fn what_keeps_to_the_layout_is_taken_word_for_word() {
        let mut arrivals = Arrivals::default();
        let words = [2 | 1 << 16 | 0x21 << 24, 5, 6, 1, 12, 8, 4, 0, 4096, 1, 0, 0, 1, 20, 80];
        arrivals.parse(&words, &GIVEN).unwrap();
        assert!(arrivals.plain().is_none(), "the first goes on");
        let all: Vec<_> = arrivals.iter().collect();
        let (head, pieces) = all[0];
        assert_eq!((head.flags, head.argument, head.goes_on), (0x21, 6 << 32 | 5, true));
        assert_eq!(pieces, [Piece { buffer: 1, offset: 12, length: 8 }, Piece { buffer: 4, offset: 0, length: 4096 }]);
        assert_eq!(all[1].1, [Piece { buffer: 1, offset: 20, length: 80 }]);
        assert_eq!([0, 1, 2, 3].map(|index| arrivals.is_named(index)), [true, false, true, false]);
        assert!(arrivals.parse(&[], &GIVEN).is_ok() && arrivals.iter().count() == 0);
    }

    #[test]
    fn every_breach_is_told_and_nothing_is_believed() {
        let good = [1, 0, 0, 4, 0, 10];
        let breaches: [(&[u32], ArrivalError); 9] = [
            (&[1, 0], ArrivalError::Truncated),
            (&[1, 0, 0, 1, 0], ArrivalError::Truncated),
            (&[0, 0, 0], ArrivalError::Pieces(0)),
            (&[65, 0, 0], ArrivalError::Pieces(65)),
            (&[1 | 1 << 17, 0, 0, 1, 0, 1], ArrivalError::Reserved(1 | 1 << 17)),
            (&[1, 0, 0, 2, 0, 1], ArrivalError::UnknownBuffer(2)),
            (&[1, 0, 0, 0x1_0001, 0, 1], ArrivalError::UnknownBuffer(0x1_0001)),
            (&[1, 0, 0, 1, 100, 1], ArrivalError::Range { buffer: 1, offset: 100, length: 1, written: 100, named: 0 }),
            (
                &[1, 0, 0, 1, u32::MAX, 2],
                ArrivalError::Range { buffer: 1, offset: u32::MAX, length: 2, written: 100, named: 0 },
            ),
        ];
        let mut arrivals = Arrivals::default();
        for (words, error) in breaches {
            assert_eq!(arrivals.parse(&[&good, words].concat(), &GIVEN), Err(error));
            assert_eq!(arrivals.iter().count(), 0);
        }
        let twice = [1, 0, 0, 4, 0, 10, 1, 0, 0, 4, 9, 10];
        assert!(matches!(arrivals.parse(&twice, &GIVEN), Err(ArrivalError::Range { named: 10, .. })), "overlap");
        assert!(arrivals.parse(&[1, 0, 0, 1, 0, 0], &GIVEN).is_err(), "an empty piece");
        let many = vec![Given { buffer: 0, written: 0 }; 65];
        assert_eq!(arrivals.parse(&[], &many), Err(ArrivalError::TooManyBuffers(65)));
    }

    proptest! {
        #[test]
        fn whatever_is_taken_lies_in_what_was_given_and_nothing_overlaps(words in proptest::collection::vec(prop_oneof![0_u32..5, Just(7), 0_u32..5000, any::<u32>()], 0..60)) {
            let mut arrivals = Arrivals::default();
            if arrivals.parse(&words, &GIVEN).is_ok() {
                let mut taken = std::collections::BTreeSet::new();
                for (_, pieces) in arrivals.iter() {
                    prop_assert!((1..=MAX_PIECES).contains(&pieces.len()));
                    for piece in pieces {
                        let given = GIVEN.iter().find(|given| given.buffer == piece.buffer).unwrap();
                        prop_assert!(piece.length > 0 && piece.offset + piece.length <= given.written);
                        for byte in piece.offset..piece.offset + piece.length {
                            prop_assert!(taken.insert((piece.buffer, byte)));
                        }
                    }
                }
            }
        }
    }
}
