//! Socket I/O straight from and to leases.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use cofferdam_device::transfer::{MAX_PIECES, Piece, Space, receive, send};
use cofferdam_device::{Buffer, DmaArena, DmaRegion};
use proptest::prelude::*;

fn leases() -> [Buffer; 2] {
    let arena = DmaArena::new(Arc::new(DmaRegion::new("test-transfer", 16 * 4096, 0).unwrap())).unwrap();
    [arena.lease(5000).unwrap(), arena.lease(100).unwrap()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_sent_in_parts_arrives_in_order_and_whole(
        header in proptest::collection::vec(any::<u8>(), 0..40), a in 0..5000u32, b in 0..5000u32, tail in 0..100u32, stop in 1..3000usize
    ) {
        let [first, second] = leases();
        let pattern: Vec<u8> = (0..5000u32).map(|index| (index % 251) as u8).collect();
        first.write_at(0, &pattern).unwrap();
        second.write_at(0, &pattern[..100]).unwrap();
        let range = a.min(b)..a.max(b);
        let mut expected = header.clone();
        expected.extend(&pattern[range.start as usize..range.end as usize]);
        expected.extend(&pattern[..tail as usize]);
        let pieces = [Piece::Bytes(&header), Piece::Shared(&first, range), Piece::Shared(&second, 0..tail)];

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut skip = 0;
        while skip < expected.len() {
            let sent = send(ours.as_fd(), &pieces, skip).unwrap();
            prop_assert!(sent > 0);
            skip += sent;
        }
        prop_assert_eq!(send(ours.as_fd(), &pieces, skip).unwrap(), 0, "nothing is left");
        drop(ours);
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        prop_assert_eq!(&got, &expected);

        // Back again, into other leases, in two parts.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let [third, fourth] = leases();
        let mut front = vec![0; header.len()];
        let stop = stop.min(expected.len());
        let mut filled = 0;
        for part in [&expected[..stop], &expected[stop..]] {
            theirs.write_all(part).unwrap();
            let until = filled + part.len();
            while filled < until {
                let len = expected.len() - header.len();
                let cut = len.min(4000) as u32;
                let mut spaces = [Space::Bytes(&mut front), Space::Shared(&third, 0..cut), Space::Shared(&fourth, 0..100)];
                let got = receive(ours.as_fd(), &mut spaces, filled).unwrap();
                if got == 0 { break; }
                filled += got;
            }
        }
        let mut back = front;
        let body = filled - header.len().min(filled);
        let cut = (expected.len() - header.len()).min(4000);
        let mut first_part = vec![0; body.min(cut)];
        third.read_at(0, &mut first_part).unwrap();
        back.extend(&first_part);
        let mut second_part = vec![0; body - first_part.len()];
        fourth.read_at(0, &mut second_part).unwrap();
        back.extend(&second_part);
        prop_assert_eq!(&back[..], &expected[..filled]);
        prop_assert_eq!(filled, expected.len().min(header.len() + cut + 100));
    }
}

#[test]
fn a_peer_that_is_gone_is_an_error_and_no_signal() {
    let [buffer, _] = leases();
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert_eq!(buffer.send_to(ours.as_fd(), 0..100).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(buffer.receive_from(ours.as_fd(), 0..100).unwrap(), 0);
}

#[test]
fn a_socket_that_does_not_block_says_so() {
    let [buffer, _] = leases();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    assert_eq!(buffer.receive_from(ours.as_fd(), 0..100).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "a range that runs backwards is one of those to refuse")]
fn a_range_outside_the_lease_is_refused_and_nothing_is_sent() {
    let [buffer, _] = leases();
    let (ours, theirs) = UnixStream::pair().unwrap();
    for range in [0..5001, 5001..5001, u32::MAX..u32::MAX, 2..1] {
        let pieces = [Piece::Bytes(b"header"), Piece::Shared(&buffer, range.clone())];
        assert_eq!(send(ours.as_fd(), &pieces, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(buffer.receive_from(ours.as_fd(), range).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    theirs.set_nonblocking(true).unwrap();
    assert_eq!((&theirs).read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[test]
fn more_pieces_than_one_call_carries_go_in_the_next() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let bytes: Vec<u8> = (0..100).collect();
    let pieces: Vec<Piece<'_>> = bytes.chunks(1).map(Piece::Bytes).collect();
    let sent = send(ours.as_fd(), &pieces, 0).unwrap();
    assert_eq!(sent, MAX_PIECES);
    assert_eq!(send(ours.as_fd(), &pieces, sent).unwrap(), 100 - MAX_PIECES);
    drop(ours);
    let mut got = Vec::new();
    theirs.read_to_end(&mut got).unwrap();
    assert_eq!(got, bytes);
}
