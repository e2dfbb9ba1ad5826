//! Clients that mean harm. An honest one is served beside each.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_client::ring::Word;
use cofferdam_client::wire::{
    Hello, MAGIC, Op, PACKET_MAX_BYTES, Refusal, Refused, Submit, TAG_HELLO, TAG_VIOLATION, TAG_WAKE,
};
use cofferdam_port_data::DataOptions;
use proptest::prelude::*;

use crate::mock::*;
use crate::raw::{Guest, Raw, hello};

const WORDS: [Word; 7] = [
    Word::State,
    Word::SubmitTail,
    Word::SubmitHead,
    Word::CompleteTail,
    Word::CompleteHead,
    Word::HostSleeps,
    Word::ClientSleeps,
];

#[test]
fn what_is_no_hello_is_told_so_and_hung_up_on() {
    let served = Served::ordinary();
    let good = hello(8).encode();
    let mut magic = good;
    magic[4] ^= 1;
    let mut reserved = good;
    reserved[23] = 1;
    for packet in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[TAG_WAKE],
        &[TAG_HELLO],
        &good[..23],
        &[&good[..], &[0]].concat(),
        &magic,
        &reserved,
        &[0xff; PACKET_MAX_BYTES],
        &[0; PACKET_MAX_BYTES + 1],
        &[TAG_HELLO; 65536],
    ] {
        let raw = Raw::new(&served);
        assert!(raw.send(packet, &[]));
        let refused = Refused::decode(&raw.receive().0).expect("a refusal");
        assert_eq!(refused.reason, Refusal::Malformed, "{packet:?}");
        assert!(raw.receive().0.is_empty());
    }
    for (hello, reason) in [
        (Hello { version: 2, ..hello(8) }, Refusal::Version),
        (hello(3), Refusal::Size),
        (hello(0), Refusal::Size),
        (hello(u32::MAX), Refusal::Size),
        (hello(1 << 31), Refusal::Size),
        (Hello { region_bytes: 0, ..hello(8) }, Refusal::Size),
        (Hello { region_bytes: 4095, ..hello(8) }, Refusal::Size),
        (Hello { region_bytes: u64::MAX - 4095, ..hello(8) }, Refusal::Size),
    ] {
        let raw = Raw::new(&served);
        assert!(raw.send(&hello.encode(), &[]));
        assert_eq!(Refused::decode(&raw.receive().0).expect("a refusal").reason, reason, "{hello:?}");
    }
    // Another version may have a hello of another length.
    let mut longer = [TAG_HELLO, 0, 9, 0].to_vec();
    longer.extend(MAGIC.to_le_bytes());
    longer.resize(100, 7);
    let raw = Raw::new(&served);
    assert!(raw.send(&longer, &[]));
    assert_eq!(Refused::decode(&raw.receive().0).expect("a refusal").reason, Refusal::Version);
    served.assert_serves();
    served.finish();
}

#[test]
fn who_connects_and_says_nothing_is_hung_up_on() {
    let timeout = Duration::from_millis(60);
    let served = Served::new(DataOptions { hello_timeout: timeout, max_clients: 4, ..DataOptions::default() });
    let start = Instant::now();
    let silent: Vec<_> = (0..4).map(|_| Raw::new(&served)).collect();
    eventually("all have a place", || served.clients() == 4);
    let late = Raw::new(&served);
    assert_eq!(Refused::decode(&late.receive().0).expect("a refusal").reason, Refusal::Busy);
    for raw in silent {
        assert_eq!(Refused::decode(&raw.receive().0).expect("a refusal").reason, Refusal::Malformed);
        assert!(raw.receive().0.is_empty());
    }
    assert!(start.elapsed() >= timeout);
    eventually("their places are free", || served.clients() == 0);
    served.assert_serves();
    served.finish();
}

#[test]
fn a_packet_that_is_no_wake_ends_its_client_alone() {
    let served = Served::ordinary();
    for packet in [&[0][..], &[2], &[TAG_WAKE, TAG_WAKE], &hello(8).encode(), &[1; 300]] {
        let guest = Guest::new(&served, 8);
        assert!(guest.raw.send(packet, &[]));
        assert_eq!(guest.raw.receive_news(), [TAG_VIOLATION], "{packet:?}");
        assert!(guest.raw.receive_news().is_empty());
    }
    served.assert_serves();
    served.finish();
}

#[test]
fn an_index_that_cannot_be_ends_its_client_alone() {
    let served = Served::ordinary();
    for (word, value) in [
        (Word::SubmitTail, 9),
        (Word::SubmitTail, u32::MAX),
        (Word::SubmitTail, 1 << 31),
        (Word::CompleteHead, 1),
        (Word::CompleteHead, u32::MAX),
    ] {
        let guest = Guest::new(&served, 8);
        guest.rings.store(word, value);
        guest.wake();
        assert_eq!(guest.raw.receive_news(), [TAG_VIOLATION], "{word:?} = {value}");
        assert_eq!(served.mock.in_flight(), 0);
    }
    // Back and forth: what was taken cannot be put in again.
    let guest = Guest::new(&served, 8);
    guest.put(&[entry(1), entry(2)]);
    guest.take();
    guest.take();
    guest.rings.store(Word::SubmitTail, 1);
    guest.wake();
    assert_eq!(guest.raw.receive_news(), [TAG_VIOLATION]);
    served.assert_serves();
    served.finish();
}

fn entry(user: u64) -> Submit {
    Submit { user, offset: 0, memory_offset: 0, length: 512, op: Op::Write as u16, flags: 0 }
}

#[test]
fn who_does_not_take_answers_is_not_read_any_further() {
    let served = Served::ordinary();
    let guest = Guest::new(&served, 8);
    guest.put(&(0..8).map(entry).collect::<Vec<_>>());
    eventually("the complete ring is full", || guest.rings.load(Word::CompleteTail) == 8);
    guest.put(&(8..16).map(entry).collect::<Vec<_>>());
    served.assert_serves();
    let asked = served.mock.asked();
    for _ in 0..100 {
        guest.wake();
    }
    served.assert_serves();
    assert_eq!(served.mock.asked(), asked + 2, "only the honest client's two");
    assert_eq!((guest.rings.load(Word::SubmitHead), guest.rings.load(Word::CompleteTail)), (8, 8));
    // A place for every answer that is taken, no more.
    for user in 0..3 {
        assert_eq!(guest.take().user, user);
    }
    guest.wake();
    eventually("three more", || guest.rings.load(Word::CompleteTail) == 11);
    served.assert_serves();
    assert_eq!(guest.rings.load(Word::SubmitHead), 11);
    drop(guest);
    served.finish();
}

#[test]
fn an_entry_is_read_once_whatever_becomes_of_it_afterwards() {
    let served = Served::ordinary();
    let guest = Guest::new(&served, 2);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let wild = Submit { memory_offset: u64::MAX, length: u32::MAX, offset: u64::MAX, ..entry(u64::MAX) };
            while !stop.load(Ordering::Relaxed) {
                guest.rings.put_submit(0, &wild);
                guest.rings.put_submit(0, &entry(1));
                std::thread::yield_now();
            }
        });
        // Whatever mixture was read: one answer each, and never outside region or medium (the mock and the windows check that).
        for _ in 0..2000 {
            let tail = guest.rings.load(Word::SubmitTail);
            guest.rings.store(Word::SubmitTail, tail.wrapping_add(2));
            guest.wake();
            guest.take();
            guest.take();
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(guest);
    served.finish();
}

#[test]
fn a_flood_of_wakes_and_descriptors_holds_up_nobody() {
    let served = Served::ordinary();
    let guest = Guest::new(&served, 8);
    let null = std::fs::File::open("/dev/null").unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if !guest.raw.send(&[TAG_WAKE], &[null.as_fd(); 32]) {
                    std::thread::yield_now();
                }
            }
        });
        let mut client = served.connect();
        for round in 0..200 {
            round_trip(&mut client, 4096, round as u8);
        }
        stop.store(true, Ordering::Relaxed);
    });
    guest.put(&[entry(4)]);
    assert_eq!(guest.take().user, 4, "it is still served itself");
    drop(guest);
    served.finish();
}

#[derive(Clone, Debug)]
enum Step {
    Word(usize, u32),
    Near(usize, u32),
    Entry(u32, [u64; 4]),
    Packet(Vec<u8>),
    Wake,
    Yield,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0..WORDS.len(), any::<u32>()).prop_map(|(word, value)| Step::Word(word, value)),
        6 => (0..WORDS.len(), 0..9u32).prop_map(|(word, more)| Step::Near(word, more)),
        8 => (any::<u32>(), any::<[u64; 4]>(), 0..12u64).prop_map(|(place, mut words, op)| {
            // Half of them are nearly requests.
            if place % 2 == 0 {
                words = [words[0], words[1] % 64 * 512, words[2] % 128 * 512, (op << 32) | (words[3] % 9 * 512)];
            }
            Step::Entry(place, words)
        }),
        1 => prop::collection::vec(any::<u8>(), 0..300).prop_map(Step::Packet),
        6 => Just(Step::Wake),
        3 => Just(Step::Yield),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever stands in the rings and comes over the socket: nobody panics, the honest client is served, and all is given back.
    #[test]
    fn no_ring_and_no_packet_harms_anyone(steps in prop::collection::vec(step(), 1..60), entries in 0..4u32, slow: bool) {
        let served = Served::ordinary();
        served.mock.set(|s| &s.slow, slow);
        let guest = Guest::new(&served, 1 << entries);
        for step in steps {
            match step {
                Step::Word(word, value) => guest.rings.store(WORDS[word], value),
                Step::Near(word, more) => {
                    guest.rings.store(WORDS[word], guest.rings.load(WORDS[word]).wrapping_add(more));
                }
                Step::Entry(place, [user, offset, memory_offset, rest]) => guest.rings.put_submit(place, &Submit {
                    user,
                    offset,
                    memory_offset,
                    length: rest as u32,
                    op: (rest >> 32) as u16,
                    flags: (rest >> 48) as u16,
                }),
                Step::Packet(packet) => drop(guest.raw.send(&packet, &[])),
                Step::Wake => guest.wake(),
                Step::Yield => std::thread::yield_now(),
            }
            prop_assert!(served.mock.in_flight() <= 1 << entries, "more in flight than the ring has answers for");
        }
        served.mock.set(|s| &s.slow, false);
        served.mock.release(None);
        served.assert_serves();
        drop(guest);
        eventually("all are gone", || served.clients() == 0);
        let mut served = served;
        let report = served.shutdown(GRACE);
        prop_assert_eq!(report.severed, 0);
        served.mock.assert_all_returned();
    }
}
