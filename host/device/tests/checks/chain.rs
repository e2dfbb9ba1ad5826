//! The check of chain words, held against an oracle that is written for clarity: it keeps a map of the payload's bytes and a list of the descriptors
//! that have to come out.

use std::collections::{BTreeMap, BTreeSet};

use cofferdam_device::words::{self, IoOp, MAX_CHAIN_WORDS, SegmentWords, parse_answers};
use cofferdam_device::{
    AnswerError, ChainBatch, ChainError, ChainRule, Direction, Expected, Outcome, Payload, QueueConfig, Status,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::device::{Piece, pair};

const PAYLOAD_BYTES: u32 = 64;
const QUEUES: [u16; 2] = [0, 5];

/// What the oracle makes of one entry.
#[derive(Debug)]
enum Said {
    Refused(Status),
    Chain { queue: u16, header: Vec<u8>, status: u32, payload: Vec<Piece>, segments: usize },
}

fn oracle(words: &[u32], requests: &[Expected]) -> Option<BTreeMap<u32, Said>> {
    let mut said = BTreeMap::new();
    let mut at = 0;
    let mut next = || {
        at += 1;
        words.get(at - 1).copied()
    };
    while let Some(token) = next() {
        let request = requests.iter().find(|request| request.token == token)?;
        let word = next()?;
        let (queue, count, top) = (word & 0xffff, word >> 16 & 0xff, word >> 24);
        let entry = if queue == 0xffff {
            let statuses = [
                Status::Io,
                Status::Unsupported,
                Status::Invalid,
                Status::NoSpace,
                Status::ReadOnly,
                Status::DeviceFault,
            ];
            let status = statuses.into_iter().find(|status| *status as u32 == top)?;
            (count == 0).then_some(Said::Refused(status))?
        } else {
            let known = QUEUES.iter().any(|known| u32::from(*known) == queue);
            (known && top == 0 && (1..=130).contains(&count)).then_some(())?;
            let mut header = Vec::new();
            let mut payload = Vec::new();
            let mut status = 0;
            let mut covered = BTreeSet::new();
            let mut inward = false;
            for _ in 0..count {
                let word = next()?;
                let (kind, length) = (word % 16, word / 16);
                (length > 0).then_some(())?;
                match kind {
                    0 => {
                        (!inward && header.len() + length as usize <= 64).then_some(())?;
                        let mut bytes = Vec::new();
                        while bytes.len() < length as usize {
                            bytes.extend(next()?.to_le_bytes());
                        }
                        let padding = bytes.split_off(length as usize);
                        padding.iter().all(|byte| *byte == 0).then_some(())?;
                        header.extend(bytes);
                    }
                    1 | 2 => {
                        let write = kind == 2;
                        (write || !inward).then_some(())?;
                        inward = write;
                        let offset = next()?;
                        let memory = request.payload?;
                        (write == (memory.direction == Direction::In)).then_some(())?;
                        (u64::from(offset) + u64::from(length) <= u64::from(memory.length)).then_some(())?;
                        for byte in offset..offset + length {
                            covered.insert(byte).then_some(())?;
                        }
                        payload.push(Piece { iova: memory.iova + u64::from(offset), length, write });
                    }
                    3 => {
                        inward = true;
                        status += length.min(1000);
                        (status <= 64).then_some(())?;
                    }
                    _ => return None,
                }
            }
            (covered.len() == request.payload.map_or(0, |payload| payload.length as usize)).then_some(())?;
            Said::Chain { queue: queue as u16, header, status, payload, segments: count as usize }
        };
        said.insert(token, entry).is_none().then_some(())?;
    }
    (said.len() == requests.len()).then_some(said)
}

/// Requests with tokens that are near each other, so that a changed word often names another.
fn requests() -> impl Strategy<Value = Vec<Expected>> {
    let direction = prop_oneof![1 => Just(None), 2 => Just(Some(Direction::In)), 2 => Just(Some(Direction::Out))];
    vec(direction, 0..6).prop_map(|directions| {
        let payload = |index: usize, direction| Payload {
            iova: 0x5000_0000 + 4096 * index as u64,
            length: PAYLOAD_BYTES,
            direction,
        };
        let request = |(index, direction): (usize, Option<Direction>)| Expected {
            token: index as u32 + 1,
            payload: direction.map(|direction| payload(index, direction)),
        };
        directions.into_iter().enumerate().map(request).collect()
    })
}

#[derive(Clone, Debug)]
struct Plan {
    header: Vec<u8>,
    second_header: Vec<u8>,
    cuts: Vec<(u32, u32)>,
    status: u32,
    queue: u16,
    refuse: Option<u8>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let cuts = prop_oneof![
        3 => (1..=16u32).prop_map(|count| {
            let piece = PAYLOAD_BYTES / count;
            let length = move |index| if index + 1 == count { PAYLOAD_BYTES - index * piece } else { piece };
            (0..count).map(|index| (index * piece, length(index))).collect::<Vec<_>>()
        }),
        1 => vec((0..PAYLOAD_BYTES + 2, 1..12u32), 1..4),
    ];
    let shuffled = (cuts, any::<bool>()).prop_map(|(mut cuts, reverse)| {
        if reverse {
            cuts.reverse();
        }
        cuts
    });
    let queue = prop_oneof![9 => Just(0), 9 => Just(5), 1 => any::<u16>()];
    let refuse = prop_oneof![6 => Just(None), 1 => (0..8u8).prop_map(Some)];
    (vec(any::<u8>(), 0..40), vec(any::<u8>(), 0..30), shuffled, 0..66u32, queue, refuse).prop_map(
        |(header, second_header, cuts, status, queue, refuse)| Plan {
            header,
            second_header,
            cuts,
            status,
            queue,
            refuse,
        },
    )
}

fn write_entry(words: &mut Vec<u32>, request: &Expected, plan: &Plan) {
    if let Some(status) = plan.refuse {
        words.extend([request.token, 0xffff | u32::from(status) << 24]);
        return;
    }
    let mut segments = Vec::new();
    segments.extend((!plan.header.is_empty()).then_some(SegmentWords::HeaderOut(&plan.header)));
    segments.extend((!plan.second_header.is_empty()).then_some(SegmentWords::HeaderOut(&plan.second_header)));
    match request.payload.map(|payload| payload.direction) {
        Some(Direction::In) => {
            segments.extend(plan.cuts.iter().map(|&(offset, length)| SegmentWords::PayloadIn { offset, length }))
        }
        Some(Direction::Out) => {
            segments.extend(plan.cuts.iter().map(|&(offset, length)| SegmentWords::PayloadOut { offset, length }))
        }
        None => {}
    }
    segments.extend((plan.status > 0).then_some(SegmentWords::StatusIn(plan.status)));
    words::push_chain(words, request.token, plan.queue, &segments);
}

/// One thing that a guest may do to well-formed words.
#[derive(Clone, Debug)]
enum Change {
    Flip(prop::sample::Index, u8),
    Small(prop::sample::Index, u32),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, u32),
}

fn change() -> impl Strategy<Value = Change> {
    let place = any::<prop::sample::Index>;
    prop_oneof![
        (place(), 0..32u8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        (place(), 0..40u32).prop_map(|(at, value)| Change::Small(at, value)),
        place().prop_map(Change::Cut),
        (place(), any::<u32>()).prop_map(|(at, value)| Change::Insert(at, value)),
    ]
}

/// Holds parser and oracle against each other, and what a ring would say of the chains that both accept.
fn compare(words: &[u32], requests: &[Expected]) -> Result<(), TestCaseError> {
    let mut batch = ChainBatch::new();
    let result = batch.parse(words, requests, &QUEUES);
    let Some(said) = oracle(words, requests) else {
        prop_assert!(result.is_err(), "accepted what breaks the layout");
        prop_assert!(batch.is_empty(), "something of a broken batch is left");
        return Ok(());
    };
    prop_assert_eq!(result, Ok(()));
    prop_assert_eq!(batch.len(), said.len());
    for outcome in batch.iter() {
        match outcome {
            Outcome::Refused { token, request, status } => {
                prop_assert_eq!(requests[request].token, token);
                prop_assert!(matches!(said.get(&token), Some(Said::Refused(expected)) if *expected == status));
            }
            Outcome::Chain(chain) => {
                prop_assert_eq!(requests[chain.request()].token, chain.token());
                let Some(Said::Chain { queue, header, status, payload, segments }) = said.get(&chain.token()) else {
                    return Err(TestCaseError::fail("a chain where the oracle has none"));
                };
                prop_assert_eq!(
                    (chain.queue(), chain.header(), chain.status_bytes()),
                    (*queue, header.as_slice(), *status as usize)
                );
                prop_assert_eq!(usize::from(chain.segment_count()), *segments);
                let (mut ring, mut device) =
                    pair(QueueConfig { index: *queue, size: 256, event_idx: false, indirect: true });
                ring.add(&chain).unwrap();
                ring.publish();
                let pieces = device.take().unwrap().pieces;
                let writable: u32 = pieces.iter().filter(|piece| piece.write).map(|piece| piece.length).sum();
                prop_assert_eq!(chain.writable_bytes(), writable);
                // What lies in the region is header and status; everything else must be payload, piece for piece.
                let (own, foreign): (Vec<Piece>, Vec<Piece>) = pieces
                    .into_iter()
                    .partition(|piece| device.region.offset_of(piece.iova, piece.length.into()).is_some());
                prop_assert_eq!(&foreign, payload);
                let sent: Vec<u8> = own
                    .iter()
                    .filter(|piece| !piece.write)
                    .flat_map(|piece| device.read(piece.iova, piece.length))
                    .collect();
                prop_assert_eq!(&sent, header);
                let answered: u32 = own.iter().filter(|piece| piece.write).map(|piece| piece.length).sum();
                prop_assert_eq!(answered, *status);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn only_what_the_layout_allows_is_accepted(requests in requests(), plans in vec(plan(), 6), rotate in 0..6usize, changes in vec(change(), 0..3)) {
        let mut words = Vec::new();
        let mut order: Vec<(&Expected, &Plan)> = requests.iter().zip(&plans).collect();
        if !order.is_empty() {
            let by = rotate % order.len();
            order.rotate_left(by);
        }
        for (request, plan) in order {
            write_entry(&mut words, request, plan);
        }
        for change in changes {
            if words.is_empty() {
                break;
            }
            let len = words.len();
            match change {
                Change::Flip(at, bit) => words[at.index(len)] ^= 1 << bit,
                Change::Small(at, value) => words[at.index(len)] = value,
                Change::Cut(at) => words.truncate(at.index(len)),
                Change::Insert(at, value) => words.insert(at.index(len), value),
            }
        }
        compare(&words, &requests)?;
    }

    #[test]
    fn whole_chains_in_any_order_and_among_others_are_as_the_oracle_says(
        given in vec((prop_oneof![8 => 0..4u32, 1 => Just(4)], 0..8u8, any::<[u8; 16]>()), 0..6), in_order: bool, change in (0..60usize, 0..32u32, 0..4u8)
    ) {
        let requests = [0, 1, 2, 3].map(read);
        let mut words = Vec::new();
        for (at, (token, kind, header)) in (0..).zip(&given) {
            let token = if in_order { at } else { *token };
            let data = SegmentWords::PayloadIn { offset: 0, length: 4096 };
            match kind {
                0 => words::push_refusal(&mut words, token, words::Status::Io),
                1 => words::push_chain(&mut words, token, QUEUES[0], &[SegmentWords::HeaderOut(&header[..7]), data, SegmentWords::StatusIn(2)]),
                2 => words::push_chain(&mut words, token, QUEUES[1], &[SegmentWords::HeaderOut(header), data, SegmentWords::StatusIn(1)]),
                _ => words::push_chain(&mut words, token, QUEUES[0], &[SegmentWords::HeaderOut(header), data, SegmentWords::StatusIn(1)]),
            }
        }
        let (place, bit, often) = change;
        if often == 0 && let Some(word) = words.get_mut(place) {
            *word ^= 1 << bit;
        }
        compare(&words, &requests[..given.len().clamp(2, 4)])?;
    }

    #[test]
    fn random_words_never_panic(words in vec(prop_oneof![any::<u32>(), 0..8u32, (0..8u32).prop_map(|count| count << 16)], 0..60), requests in requests()) {
        compare(&words, &requests)?;
    }

    #[test]
    fn answers_are_exactly_one_per_response(count in 0..10u32, words in vec(prop_oneof![0..10u32, any::<u32>()], 0..24), tidy: bool) {
        let tokens: Vec<u32> = (0..count).collect();
        let mut words = words;
        if tidy {
            words = tokens.iter().rev().flat_map(|token| [*token, words.get(*token as usize).copied().unwrap_or(0) % 8]).collect();
        }
        let pairs: Vec<(u32, u32)> = words.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        let met: BTreeSet<u32> = pairs.iter().map(|pair| pair.0).collect();
        let right = words.len() % 2 == 0 && pairs.len() == tokens.len() && met.iter().copied().eq(tokens.iter().copied()) && pairs.iter().all(|pair| pair.1 <= 6);
        let mut out = Vec::new();
        let result = parse_answers(&words, &tokens, &mut out);
        prop_assert_eq!(result.is_ok(), right);
        let got: Vec<(u32, u32)> = out.iter().map(|&(index, status)| (tokens[index], status as u32)).collect();
        prop_assert_eq!(got, if right { pairs } else { Vec::new() });
    }
}

fn read(token: u32) -> Expected {
    Expected { token, payload: Some(Payload { iova: 0x1000, length: 4096, direction: Direction::In }) }
}

#[test]
fn errors_name_the_token_and_the_rule() {
    let refuse = |token: u32| [token, 0x0100_ffff];
    let cases: &[(&[u32], u32, ChainRule)] = &[
        (&[9, 0x0100_ffff], 9, ChainRule::UnknownToken),
        (&[], 1, ChainRule::MissingToken),
        (&refuse(1), 2, ChainRule::MissingToken),
        (&[&refuse(1)[..], &refuse(1)].concat(), 1, ChainRule::DuplicateToken),
        (&[1], 1, ChainRule::Truncated),
        (&[1, 0x1_0000], 1, ChainRule::Truncated),
        (&[1, 0x1_0000, 2 | 16], 1, ChainRule::Truncated),
        (&[1, 0x1_0000, 8 << 4, 0], 1, ChainRule::Truncated),
        (&[1, 0x1_0001], 1, ChainRule::Queue(1)),
        (&[1, 0x0101_ffff], 1, ChainRule::RefusedWithSegments),
        (&[1, 0x0000_ffff], 1, ChainRule::RefusedStatus(0)),
        (&[1, 0x0700_ffff], 1, ChainRule::RefusedStatus(7)),
        (&[1, 0x0101_0000], 1, ChainRule::Reserved),
        (&[1, 0], 1, ChainRule::SegmentCount(0)),
        (&[1, 131 << 16], 1, ChainRule::SegmentCount(131)),
        (&[1, 0x1_0000, 4 | 16], 1, ChainRule::Kind(4)),
        (&[1, 0x1_0000, 3], 1, ChainRule::EmptySegment),
        (&[1, 0x2_0000, 3 | 16, 16, 0], 1, ChainRule::Order),
        (&[1, 0x1_0000, 65 << 4], 1, ChainRule::HeaderBytes),
        (&[1, 0x1_0000, u32::MAX << 4], 1, ChainRule::HeaderBytes),
        (&[1, 0x1_0000, 3 | 65 << 4], 1, ChainRule::StatusBytes),
        (&[1, 0x2_0000, 3 | 64 << 4, 3 | 1 << 4], 1, ChainRule::StatusBytes),
        (&[1, 0x1_0000, 1 << 4, 0x100], 1, ChainRule::Padding),
        (&[2, 0x1_0000, 2 | 16, 0], 2, ChainRule::NoPayload),
        (&[1, 0x1_0000, 1 | 16, 0], 1, ChainRule::Direction),
        (&[1, 0x1_0000, 2 | 16, 4096], 1, ChainRule::OutOfPayload),
        (&[1, 0x1_0000, 2 | 16, u32::MAX], 1, ChainRule::OutOfPayload),
        (&[1, 0x2_0000, 2 | 16, 8, 2 | 16, 8], 1, ChainRule::Overlap),
        (&[1, 0x2_0000, 2 | 2 << 4, 8, 2 | 2 << 4, 7], 1, ChainRule::Overlap),
    ];
    let requests = [read(1), Expected { token: 2, payload: None }];
    let mut batch = ChainBatch::new();
    for (words, token, rule) in cases {
        assert_eq!(
            batch.parse(words, &requests, &QUEUES),
            Err(ChainError::Rule { token: *token, rule: *rule }),
            "{words:x?}"
        );
    }
}

#[test]
fn a_full_batch_of_the_longest_chains_is_accepted_and_within_the_bound() {
    let mut requests: Vec<Expected> = (0..64).map(read).collect();
    for payload in requests.iter_mut().filter_map(|request| request.payload.as_mut()) {
        payload.length = 127 * 32;
    }
    let mut segments: Vec<SegmentWords<'_>> =
        (0..127).map(|index| SegmentWords::PayloadIn { offset: 32 * (126 - index), length: 32 }).collect();
    segments.splice(0..0, [SegmentWords::HeaderOut(&[1; 61]), SegmentWords::HeaderOut(&[2; 3])]);
    segments.push(SegmentWords::StatusIn(64));
    let mut words = Vec::new();
    for request in requests.iter().rev() {
        words::push_chain(&mut words, request.token, 5, &segments);
    }
    assert!(words.len() <= MAX_CHAIN_WORDS);
    let mut batch = ChainBatch::new();
    batch.parse(&words, &requests, &QUEUES).unwrap();
    assert_eq!(batch.len(), 64);
    let too_many: Vec<Expected> = (0..65).map(read).collect();
    assert_eq!(batch.parse(&words, &too_many, &QUEUES), Err(ChainError::TooManyRequests(65)));
}

#[test]
fn encoders_follow_the_tables() {
    let mut request = Vec::new();
    words::push_request(&mut request, 0xdead_beef, IoOp::WriteZeroes, words::FLAG_UNMAP, 1 << 40, 4096);
    assert_eq!(request, [0x0000_0104_dead_beef, 1 << 40, 4096]);
    let mut response = Vec::new();
    words::push_response(&mut response, 7, 4097, &[0, 1, 2, 3, 4]);
    assert_eq!(response, [7, 4097, 5, 0x0302_0100, 4]);
    let mut refusal = Vec::new();
    words::push_refusal(&mut refusal, 7, Status::ReadOnly);
    assert_eq!(refusal, [7, 0x0500_ffff]);
    let mut out = vec![(0, Status::Ok)];
    assert_eq!(parse_answers(&[7, 0, 8], &[7], &mut out), Err(AnswerError::Count { words: 3, responses: 1 }));
    assert!(out.is_empty());
    assert_eq!(parse_answers(&[8, 0], &[7], &mut out), Err(AnswerError::UnknownToken(8)));
    assert_eq!(parse_answers(&[7, 0, 7, 0], &[7, 8], &mut out), Err(AnswerError::DuplicateToken(7)));
    assert_eq!(parse_answers(&[7, 7], &[7], &mut out), Err(AnswerError::Status { token: 7, status: 7 }));
}
