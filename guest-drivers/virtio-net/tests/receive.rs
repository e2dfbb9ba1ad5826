//! What comes: arrivals word for word, packets that span buffers and calls, and devices that lie.

mod common;

use cofferdam_sdk::mock::{CheckedArrival, UsedBuffer, buffer_words, check_arrivals};
use cofferdam_sdk::native::NativeLane;
use cofferdam_virtio_net::{HEADER_BYTES, MAX_RECEIVED_BYTES, VirtioNet, feature};
use common::lane;
use proptest::prelude::*;

const ALL: u64 = feature::OF_A_NET_DEVICE;
/// Bytes of each buffer in these tests.
const BUFFER_BYTES: u32 = 4096;

/// `struct virtio_net_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
    num_buffers: u16,
}

impl Header {
    fn of(num_buffers: u16) -> Self {
        Self { num_buffers, ..Self::default() }
    }

    fn bytes(self) -> Vec<u8> {
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        [self.flags, self.gso_type].into_iter().chain(words.into_iter().flat_map(u16::to_le_bytes)).collect()
    }
}

/// A buffer that begins with `header`.
fn first(buffer: u16, written: u32, header: Header) -> UsedBuffer {
    UsedBuffer { buffer, written, head: header.bytes() }
}

/// A later buffer of a packet: its head is whatever the packet has there.
fn next(buffer: u16, written: u32) -> UsedBuffer {
    UsedBuffer { buffer, written, head: vec![0xa5; HEADER_BYTES as usize] }
}

/// A packet of one call: flags, argument, and buffer, offset and length of each piece.
type Only = (u8, u64, Vec<(u32, u32, u32)>);

/// What clients see: whole packets, over any number of calls.
struct Client {
    lane: NativeLane<VirtioNet>,
    /// The arrival that goes on.
    open: Option<Packet>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    flags: u8,
    argument: u64,
    /// Call, buffer, offset, length.
    pieces: Vec<(usize, u32, u32, u32)>,
}

impl Packet {
    fn bytes(&self) -> u32 {
        self.pieces.iter().map(|piece| piece.3).sum()
    }
}

impl Client {
    fn of(offered: u64) -> Self {
        Self { lane: lane(offered), open: None }
    }

    fn arrivals(&mut self, used: &[UsedBuffer]) -> Vec<CheckedArrival> {
        let mut words = Vec::new();
        self.lane.received(&buffer_words(used), &mut words);
        check_arrivals(used, &words).unwrap()
    }

    /// The packets that end in this call, the `call`th. Everything that the host would hold against the driver is a panic.
    fn packets(&mut self, call: usize, used: &[UsedBuffer]) -> Vec<Packet> {
        let mut whole = Vec::new();
        for arrival in self.arrivals(used) {
            let mut packet = self.open.take().unwrap_or_else(|| Packet {
                flags: arrival.flags,
                argument: arrival.argument,
                pieces: Vec::new(),
            });
            let pieces = arrival.pieces.iter().map(|piece| (call, piece.buffer, piece.offset, piece.length));
            packet.pieces.extend(pieces);
            assert!(packet.pieces.len() <= 64, "the host keeps 64 pieces");
            if arrival.goes_on {
                self.open = Some(packet);
            } else {
                whole.push(packet);
            }
        }
        whole
    }

    /// The one packet of one call.
    fn only(&mut self, used: &[UsedBuffer]) -> Option<Only> {
        let mut packets = self.packets(0, used);
        assert!(packets.len() <= 1 && self.open.is_none());
        let packet = packets.pop()?;
        Some((packet.flags, packet.argument, packet.pieces.iter().map(|&(_, b, o, l)| (b, o, l)).collect()))
    }
}

#[test]
fn a_packet_is_what_follows_the_header() {
    let mut client = Client::of(ALL);
    assert_eq!(client.only(&[first(7, 72, Header::of(1))]), Some((0, 0, vec![(7, 12, 60)])));
    // In two buffers, and in three calls' worth of one.
    let spanning = [first(9, 4096, Header::of(3)), next(2, 4096), next(5, 10)];
    assert_eq!(client.only(&spanning), Some((0, 0, vec![(9, 12, 4084), (2, 0, 4096), (5, 0, 10)])));
}

#[test]
fn a_packet_that_spans_calls_goes_on_and_ends_with_its_last_buffer() {
    let mut client = Client::of(ALL);
    let joined = Header { gso_type: 1, gso_size: 1448, hdr_len: 54, ..Header::of(4) };
    let argument = 54 << 48 | 1448 << 32;
    // A whole packet stands before it.
    let arrivals = client.arrivals(&[first(1, 72, Header::of(1)), first(2, 4096, joined), next(3, 4096)]);
    assert_eq!((arrivals.len(), arrivals[0].goes_on), (2, false));
    assert_eq!((arrivals[1].goes_on, arrivals[1].flags, arrivals[1].argument), (true, 0x10, argument));
    assert_eq!(arrivals[1].pieces.len(), 2);
    let arrivals = client.arrivals(&[next(1, 4096)]);
    assert_eq!((arrivals.len(), arrivals[0].goes_on), (1, true));
    // Its end, and a packet that begins right behind it.
    let arrivals = client.arrivals(&[next(9, 5), first(4, 72, Header::of(1))]);
    assert_eq!((arrivals.len(), arrivals[0].goes_on, arrivals[1].goes_on), (2, false, false));
    assert_eq!((arrivals[0].pieces[0].offset, arrivals[0].pieces[0].length), (0, 5));
    assert_eq!(arrivals[1].pieces[0].offset, 12);
}

#[test]
fn what_the_header_says_is_told_in_the_words_of_the_service() {
    let sum = Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::of(1) };
    let sum_words = 34 | 16 << 16;
    let tcp = Header { gso_type: 1, gso_size: 1448, hdr_len: 66, ..sum };
    let cases = [
        (sum, 1, sum_words),
        (Header { flags: 2, csum_start: 9, csum_offset: 9, gso_size: 9, hdr_len: 9, ..sum }, 2, 0),
        (Header { flags: 3, ..sum }, 3, sum_words),
        (tcp, 0x11, sum_words | 1448 << 32 | 66 << 48),
        (Header { gso_type: 4, flags: 2, ..tcp }, 0x22, 1448 << 32 | 66 << 48),
        // A hint outside of the buffer, and flags that nobody knows.
        (Header { hdr_len: 0xffff, ..tcp }, 0x11, sum_words | 1448 << 32 | 500 << 48),
        (Header { flags: 0xfc, ..sum }, 0, 0),
        // The checksum's last bytes are the packet's last.
        (Header { csum_start: 482, ..sum }, 1, 482 | 16 << 16),
    ];
    for (header, flags, argument) in cases {
        let expected = Some((flags, argument, vec![(3, 12, 500)]));
        assert_eq!(Client::of(ALL).only(&[first(3, 512, header)]), expected, "{header:?}");
    }
}

#[test]
fn a_packet_that_is_not_lawful_is_dropped_with_all_its_buffers_and_the_next_one_comes() {
    let sum = Header { flags: 1, csum_start: 34, csum_offset: 16, ..Header::of(2) };
    let tcp = Header { gso_type: 1, gso_size: 1448, ..Header::of(2) };
    let checksums = feature::GUEST_CSUM | feature::MRG_RXBUF;
    let cases = [
        (feature::MRG_RXBUF, sum),
        (checksums, tcp),
        (checksums | feature::GUEST_TSO6, tcp),
        (checksums | feature::GUEST_TSO4, Header { gso_type: 4, ..tcp }),
        // With ECN, without a size; UDP, and kinds that nobody knows.
        (ALL, Header { gso_type: 0x81, ..tcp }),
        (ALL, Header { gso_type: 0x80, ..tcp }),
        (ALL, Header { gso_size: 0, ..tcp }),
        (ALL, Header { gso_type: 3, ..tcp }),
        (ALL, Header { gso_type: 5, ..tcp }),
        (ALL, Header { gso_type: 2, ..tcp }),
        // A checksum behind the first buffer, or behind everything.
        (ALL, Header { csum_start: 483, ..sum }),
        (ALL, Header { csum_start: 0xffff, csum_offset: 0xffff, ..sum }),
    ];
    for (offered, header) in cases {
        // The later buffer of the dropped packet looks like a good packet of its own, and is none.
        let inner = UsedBuffer { head: Header::of(1).bytes(), ..next(2, 100) };
        let used = [first(1, 512, header), inner, first(3, 72, Header::of(1))];
        assert_eq!(Client::of(offered).only(&used), Some((0, 0, vec![(3, 12, 60)])), "{header:?}");
        let good = Header { flags: 0, gso_type: 0, ..header };
        assert!(Client::of(offered).only(&[first(1, 512, good), next(2, 100)]).is_some(), "{header:?}");
    }
}

#[test]
fn a_valid_checksum_that_was_not_negotiated_is_not_believed_and_the_packet_comes() {
    let header = Header { flags: 2, ..Header::of(1) };
    assert_eq!(Client::of(feature::MRG_RXBUF).only(&[first(1, 72, header)]), Some((0, 0, vec![(1, 12, 60)])));
}

#[test]
fn a_buffer_that_is_too_short_or_lies_about_its_number_is_dropped_alone() {
    for (written, num_buffers) in [(0, 1), (1, 1), (11, 1), (12, 1), (25, 1), (72, 0), (72, 65), (4096, 0xffff)] {
        let used = [first(1, written, Header::of(num_buffers)), first(2, 26, Header::of(1))];
        assert_eq!(Client::of(ALL).only(&used), Some((0, 0, vec![(2, 12, 14)])), "{written} {num_buffers}");
    }
    // 64 are lawful.
    let used: Vec<_> = [first(0, 1000, Header::of(64))].into_iter().chain((1..64).map(|at| next(at, 1000))).collect();
    assert_eq!(Client::of(ALL).only(&used).unwrap().2.len(), 64);
}

#[test]
fn without_buffers_that_are_joined_every_packet_is_one_and_the_number_means_nothing() {
    for num_buffers in [0, 1, 2, 0xffff] {
        let mut client = Client::of(feature::GUEST_CSUM);
        for buffer in [4, 5] {
            let packet = client.only(&[first(buffer, 72, Header::of(num_buffers))]);
            assert_eq!(packet, Some((0, 0, vec![(buffer.into(), 12, 60)])));
        }
    }
}

#[test]
fn an_empty_buffer_later_in_a_packet_adds_nothing() {
    let mut client = Client::of(ALL);
    let used = [first(1, 4096, Header::of(3)), next(2, 0), next(3, 9)];
    assert_eq!(client.only(&used), Some((0, 0, vec![(1, 12, 4084), (3, 0, 9)])));
    let used = [first(1, 4096, Header::of(3)), next(2, 0), next(3, 0)];
    assert_eq!(client.only(&used), Some((0, 0, vec![(1, 12, 4084)])));
}

#[test]
fn an_arrival_of_which_nothing_is_left_ends_with_one_byte_and_the_next_packet_is_whole() {
    let mut client = Client::of(ALL);
    assert_eq!(client.packets(0, &[first(1, 4096, Header::of(2))]), []);
    // The end is empty, and so is the buffer after it: still nothing to name.
    assert_eq!(client.packets(1, &[next(2, 0), first(3, 0, Header::of(1))]), []);
    let packets = client.packets(2, &[first(4, 72, Header::of(1))]);
    assert_eq!(packets[0].pieces, [(0, 1, 12, 4084), (2, 4, 0, 1)]);
    assert_eq!(packets[1].pieces, [(2, 4, 12, 60)]);
    assert_eq!((packets.len(), client.open), (2, None));
}

#[test]
fn a_packet_longer_than_any_is_dropped_or_cut_where_parts_of_it_were_handed_over() {
    let long =
        |buffers: u16| [first(0, 4096, Header::of(buffers))].into_iter().chain((1..buffers).map(|at| next(at, 4096)));
    // The last that fits: 17 buffers, with what one buffer of them is short of.
    let rest = MAX_RECEIVED_BYTES - 4084 - 15 * 4096;
    let fits: Vec<_> = long(17).take(16).chain([next(16, rest)]).collect();
    assert_eq!(Client::of(ALL).only(&fits).unwrap().2.len(), 17);
    let over: Vec<_> = long(17).take(16).chain([next(16, rest + 1), first(17, 72, Header::of(1))]).collect();
    assert_eq!(Client::of(ALL).only(&over), Some((0, 0, vec![(17, 12, 60)])));

    let mut client = Client::of(ALL);
    let used: Vec<_> = long(40).collect();
    let mut packets = Vec::new();
    for (call, used) in used.chunks(4).chain([&[first(50, 72, Header::of(1))][..]]).enumerate() {
        packets.extend(client.packets(call, used));
    }
    assert_eq!(packets.len(), 2);
    assert!(packets[0].bytes() <= MAX_RECEIVED_BYTES + 1 && packets[0].bytes() > 60_000, "{}", packets[0].bytes());
    assert_eq!(packets[1].pieces, [(10, 50, 12, 60)]);
}

/// Any header, lawful or not, more often nearly so.
fn header() -> impl Strategy<Value = Header> {
    let buffers = prop_oneof![4 => Just(1_u16), 4 => 0_u16..6, 1 => 0_u16..70, 1 => any::<u16>()];
    let kind = prop_oneof![3 => Just(0_u8), 1 => 0_u8..6, 1 => any::<u8>()];
    let flags = prop_oneof![3 => 0_u8..4, 1 => any::<u8>()];
    (flags, kind, any::<[u16; 4]>(), any::<bool>(), buffers).prop_map(
        |(flags, gso_type, fields, small, num_buffers)| {
            let [hdr_len, gso_size, csum_start, csum_offset] =
                fields.map(|field| if small { field % 600 } else { field });
            Header { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers }
        },
    )
}

fn garbage() -> impl Strategy<Value = UsedBuffer> {
    let written = prop_oneof![Just(0), 0_u32..40, Just(BUFFER_BYTES), 0..=BUFFER_BYTES];
    (written, header()).prop_map(|(written, header)| first(0, written, header))
}

/// Names the buffers of a call differently, and not by their places.
fn named(used: &[UsedBuffer]) -> Vec<UsedBuffer> {
    (0..).zip(used).map(|(at, used)| UsedBuffer { buffer: 300 - 3 * at, ..used.clone() }).collect()
}

proptest! {
    /// A device that lies in every way: the arrivals keep the contract, over calls, too; and 64 good packets later everything is as if nothing had been.
    #[test]
    fn any_device_gives_lawful_arrivals_and_is_in_step_again_after_64_packets(
        offered in prop_oneof![Just(ALL), any::<u64>()],
        calls in prop::collection::vec(prop::collection::vec(garbage(), 1..=64), 1..8),
    ) {
        let mut client = Client::of(offered & ALL);
        for (call, used) in calls.iter().enumerate() {
            for packet in client.packets(call, &named(used)) {
                prop_assert!((14..=MAX_RECEIVED_BYTES + 1).contains(&packet.bytes()));
            }
        }
        let good = vec![first(0, 72, Header::of(1)); 64];
        client.packets(100, &named(&good));
        let packets = client.packets(101, &named(&good));
        prop_assert_eq!(packets.len(), 64);
        prop_assert!(packets.iter().all(|packet| matches!(packet.pieces[..], [(101, _, 12, 60)])));
        prop_assert!(client.open.is_none());
    }

    /// A device that keeps to the specification: what was sent comes, wherever the calls end.
    #[test]
    fn every_lawful_packet_comes_whole_and_in_order_wherever_the_calls_end(
        sent in prop::collection::vec((14_u32..=MAX_RECEIVED_BYTES, 0_u8..3), 1..20),
        calls in prop::collection::vec(1_usize..=64, 400),
    ) {
        let mut buffers = Vec::new();
        for &(length, kind) in &sent {
            let total = length + HEADER_BYTES;
            let count = total.div_ceil(BUFFER_BYTES);
            let (gso_type, gso_size) = [(0, 0), (1, 1448), (4, 1428)][usize::from(kind)];
            let header = Header { gso_type, gso_size, ..Header::of(count as u16) };
            buffers.push(first(0, total.min(BUFFER_BYTES), header));
            buffers.extend((1..count).map(|at| next(0, (total - at * BUFFER_BYTES).min(BUFFER_BYTES))));
        }
        let (mut client, mut rest, mut seen) = (Client::of(ALL), &buffers[..], Vec::new());
        for (call, size) in calls.into_iter().enumerate() {
            if rest.is_empty() {
                break;
            }
            let (used, later) = rest.split_at(size.min(rest.len()));
            seen.extend(client.packets(call, &named(used)).iter().map(|packet| (packet.bytes(), packet.flags >> 4)));
            rest = later;
        }
        prop_assert_eq!(seen, sent);
    }

    /// Words that are no buffers at all.
    #[test]
    fn any_words_are_taken_without_a_panic(words in prop::collection::vec(any::<u32>(), 0..1216)) {
        let mut lane = lane(ALL);
        lane.received(&words, &mut Vec::new());
        lane.received(&words, &mut Vec::new());
    }
}
