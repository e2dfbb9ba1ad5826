//! An independent writer of buffer words and reader of arrival words: it shares no code with [`crate::words`].

use crate::words::Piece;

/// One used buffer, as the host tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsedBuffer {
    /// Names it until the call ends.
    pub buffer: u16,
    /// Bytes that the device wrote.
    pub written: u32,
    /// Bytes at its head that cross by value, as many as were planned (`posting.head-bytes`).
    pub head: Vec<u8>,
}

/// An arrival that held against the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedArrival {
    /// Flags, by the service.
    pub flags: u8,
    /// Argument, by the service.
    pub argument: u64,
    /// The pieces of the next arrival belong to this one.
    pub goes_on: bool,
    /// Its pieces in order.
    pub pieces: Vec<Piece>,
}

/// The words of one `received`.
#[must_use]
pub fn buffer_words(used: &[UsedBuffer]) -> Vec<u32> {
    let one = |used: &UsedBuffer| [vec![u32::from(used.buffer), used.written], padded(&used.head)].concat();
    used.iter().flat_map(one).collect()
}

/// The words of one `control.events`: what the device wrote into each buffer.
#[must_use]
pub fn control_words(buffers: &[&[u8]]) -> Vec<u32> {
    buffers.iter().flat_map(|bytes| [vec![bytes.len() as u32], padded(bytes)].concat()).collect()
}

fn padded(bytes: &[u8]) -> Vec<u32> {
    let word = |piece: &[u8]| (0..).zip(piece).map(|(at, byte)| u32::from(*byte) << (8 * at)).sum();
    bytes.chunks(4).map(word).collect()
}

/// Reads `words` as the arrivals in the buffers `used`.
///
/// # Errors
/// The first breach of `wit/words.wit`, in a sentence.
pub fn check_arrivals(used: &[UsedBuffer], words: &[u32]) -> Result<Vec<CheckedArrival>, String> {
    let mut arrivals = Vec::new();
    let mut named: Vec<Piece> = Vec::new();
    let mut words = words.iter().copied();
    while let Some(head) = words.next() {
        let mut next = || words.next().ok_or("words end inside an arrival");
        let (count, goes_on, zero, flags) = (head & 0xffff, head >> 16 & 1 == 1, head >> 17 & 0x7f, head >> 24);
        if !(1..=64).contains(&count) || zero != 0 {
            return Err(format!("an arrival that begins with {head:#010x}"));
        }
        let argument = u64::from(next()?) | u64::from(next()?) << 32;
        let mut pieces = Vec::new();
        for _ in 0..count {
            let piece = Piece { buffer: next()?, offset: next()?, length: next()? };
            check_piece(used, &named, piece)?;
            named.push(piece);
            pieces.push(piece);
        }
        arrivals.push(CheckedArrival { flags: flags as u8, argument, goes_on, pieces });
    }
    Ok(arrivals)
}

fn check_piece(used: &[UsedBuffer], named: &[Piece], piece: Piece) -> Result<(), String> {
    let Some(buffer) = used.iter().find(|used| u32::from(used.buffer) == piece.buffer) else {
        return Err(format!("buffer {} was not given", piece.buffer));
    };
    let range = |piece: &Piece| (u64::from(piece.offset), u64::from(piece.offset) + u64::from(piece.length));
    let (start, end) = range(&piece);
    if piece.length == 0 || end > u64::from(buffer.written) {
        return Err(format!("{start}..{end} of buffer {}, where {} were written", piece.buffer, buffer.written));
    }
    let overlaps = |other: &&Piece| other.buffer == piece.buffer && start < range(other).1 && range(other).0 < end;
    match named.iter().find(overlaps) {
        Some(other) => Err(format!("{piece:?} overlaps {other:?}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::words::{Arrivals, ControlBuffers, Received};

    fn used(buffer: u16, written: u32) -> UsedBuffer {
        UsedBuffer { buffer, written, head: Vec::new() }
    }

    #[test]
    fn what_the_sdk_writes_is_read_and_what_the_mock_writes_is_read_by_the_sdk() {
        let piece = Piece { buffer: 7, offset: 12, length: 88 };
        let mut words = Vec::new();
        assert!(Arrivals::new(&mut words).arrival(3, 1 << 40 | 5, true, &[piece]));
        let arrival = CheckedArrival { flags: 3, argument: 1 << 40 | 5, goes_on: true, pieces: vec![piece] };
        assert_eq!(check_arrivals(&[used(7, 100)], &words), Ok(vec![arrival]));

        let words = buffer_words(&[UsedBuffer { head: vec![1, 2, 3, 4, 5], ..used(9, 60) }, used(1, 0)][..1]);
        let seen = Received::new(&words, 5).next().unwrap();
        assert_eq!((seen.buffer, seen.written, seen.byte(4)), (9, 60, Some(5)));
        let words = control_words(&[&[1, 2, 3, 4, 5], &[], &[6]]);
        assert_eq!(ControlBuffers::new(&words).collect::<Vec<_>>(), [vec![1, 2, 3, 4, 5], vec![], vec![6]]);
    }

    #[test]
    fn every_breach_of_the_layout_is_seen() {
        let used = [used(1, 10), used(2, 0)];
        assert!(check_arrivals(&used, &[1, 0, 0, 1, 0, 10]).is_ok());
        for breach in [
            &[0, 0, 0][..],
            &[65, 0, 0],
            &[1 | 1 << 17, 0, 0, 1, 0, 10],
            &[1, 0],
            &[1, 0, 0, 1, 0],
            &[1, 0, 0, 3, 0, 1],
            &[1, 0, 0, 1, 0, 0],
            &[1, 0, 0, 1, 5, 6],
            &[1, 0, 0, 1, u32::MAX, u32::MAX],
            &[1, 0, 0, 2, 0, 1],
            &[2, 0, 0, 1, 0, 5, 1, 4, 2],
            &[1, 0, 0, 1, 0, 5, 1, 0, 0, 1, 4, 2],
        ] {
            assert!(check_arrivals(&used, breach).is_err(), "{breach:?}");
        }
    }
}
