//! The queue with an honest device that does everything in the most inconvenient legal way.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use cofferdam_device::{AddError, Direction, DmaRegion, QueueConfig, QueueError, SplitQueue};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::device::{Device, PAYLOAD_IOVA, Piece, READ, SEGMENT_BYTES, Shape, Taken, pair};

#[derive(Clone, Debug)]
enum Step {
    Add(Shape),
    Publish,
    /// The device uses one of what it holds, in any order, having written part of what it may.
    Complete {
        which: prop::sample::Index,
        part: u8,
        status: u8,
    },
    Pop,
    Arm(u16),
    ArmNext,
    Disarm,
    /// Another process goes on with the ring, if nothing is on it.
    Resume,
}

fn shape() -> impl Strategy<Value = Shape> {
    let direction = prop_oneof![Just(None), Just(Some(Direction::In)), Just(Some(Direction::Out))];
    let any = (0..=64u8, 1..=12u8, direction, 0..=64u8)
        .prop_map(|(header, payload_segments, direction, status)| Shape { header, payload_segments, direction, status })
        .prop_filter("a chain has a segment", |shape| shape.segments() > 0);
    // The commonest shape, whose descriptors are written ahead, with statuses of the usual and of other lengths.
    let direction = prop_oneof![Just(Direction::In), Just(Direction::Out)];
    let whole = (direction, prop_oneof![4 => Just(1), 1 => 1..=64u8]).prop_map(|(direction, status)| Shape {
        direction: Some(direction),
        status,
        ..READ
    });
    // And that of a packet.
    let packet = prop_oneof![Just(Direction::In), Just(Direction::Out)].prop_map(|direction| Shape {
        header: 12,
        direction: Some(direction),
        status: 0,
        ..READ
    });
    prop_oneof![any, whole, packet]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => shape().prop_map(Step::Add),
        2 => Just(Step::Publish),
        4 => (any::<prop::sample::Index>(), any::<u8>(), any::<u8>()).prop_map(|(which, part, status)| Step::Complete { which, part, status }),
        4 => Just(Step::Pop),
        1 => (1..8u16).prop_map(Step::Arm),
        1 => Just(Step::ArmNext),
        1 => Just(Step::Disarm),
        2 => Just(Step::Resume),
    ]
}

struct Live {
    token: u32,
    shape: Shape,
    taken: Taken,
}

/// Holds what the device sees of a chain against what was asked for.
fn check_taken(device: &Device, taken: &Taken, token: u32, shape: Shape) {
    let mut pieces = taken.pieces.iter();
    if shape.header > 0 {
        let piece = pieces.next().unwrap();
        assert!(!piece.write);
        assert_eq!(device.read(piece.iova, piece.length), shape.header_bytes(token));
    }
    if let Some(direction) = shape.direction {
        for index in 0..u64::from(shape.payload_segments) {
            let iova = PAYLOAD_IOVA + u64::from(token) * 0x10_0000 + index * u64::from(SEGMENT_BYTES);
            let expected = Piece { iova, length: SEGMENT_BYTES, write: direction == Direction::In };
            assert_eq!(pieces.next(), Some(&expected));
        }
    }
    if shape.status > 0 {
        let piece = pieces.next().unwrap();
        assert!(piece.write);
        assert_eq!(
            device.read(piece.iova, piece.length),
            vec![0xff; shape.status.into()],
            "status bytes are filled before they are offered"
        );
    }
    assert_eq!(pieces.next(), None);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_chain_is_seen_as_asked_and_answered_once_as_used(
        order in 0..7u32, event_idx: bool, indirect: bool, steps in vec(step(), 1..160)
    ) {
        let config = QueueConfig { index: 3, size: 1 << order, event_idx, indirect };
        let (mut queue, mut device) = pair(config);
        let mut token = 0;
        let mut added = VecDeque::new();
        let mut held: Vec<Live> = Vec::new();
        let mut used = VecDeque::new();
        for step in steps {
            match step {
                Step::Add(shape) => {
                    let before = (queue.free(), queue.in_flight());
                    let segments = shape.segments();
                    match queue.add(&shape.chain(token, 3).chain()) {
                        Ok(()) => {
                            let taken = before.0 - queue.free();
                            prop_assert!(taken == segments || (indirect && taken == 1));
                            added.push_back((token, shape));
                            token += 1;
                        }
                        Err(AddError::TooLong { .. }) => prop_assert!(segments > config.size),
                        Err(AddError::NoRoom { needed, free }) => {
                            prop_assert_eq!(free, before.0);
                            prop_assert!(needed > free && (needed == segments || (indirect && needed == 1)));
                            prop_assert_eq!((queue.free(), queue.in_flight()), before);
                        }
                        Err(other) => prop_assert!(false, "{}", other),
                    }
                }
                Step::Publish => {
                    let kick = queue.publish();
                    prop_assert!(!kick || !added.is_empty());
                    while let Some(taken) = device.take() {
                        let (token, shape) = added.pop_front().expect("more chains than were added");
                        check_taken(&device, &taken, token, shape);
                        held.push(Live { token, shape, taken });
                    }
                    prop_assert!(added.is_empty(), "publish shows everything");
                    // No descriptor serves two chains at once; what was used and not popped has not been given away either.
                    let all = held.iter().map(|live| &live.taken).chain(used.iter().map(|(_, _, _, taken)| taken));
                    let indices: Vec<u16> = all.flat_map(|taken| taken.descriptors.iter().copied()).collect();
                    prop_assert_eq!(indices.iter().collect::<BTreeSet<_>>().len(), indices.len());
                    prop_assert_eq!(usize::from(config.size - queue.free()), indices.len());
                }
                Step::Complete { which, part, status } => {
                    if held.is_empty() {
                        continue;
                    }
                    let live = held.swap_remove(which.index(held.len()));
                    let written = (u64::from(live.shape.writable()) * u64::from(part) / 255) as u32;
                    let mut expected = vec![0xff; live.shape.status.into()];
                    if let Some(piece) = live.taken.pieces.last().filter(|piece| piece.write && live.shape.status > 0) {
                        expected[0] = status;
                        device.write(piece.iova, &[status]);
                    }
                    device.complete(live.taken.head.into(), written);
                    used.push_back((live.token, written, expected, live.taken));
                }
                Step::Pop => match (queue.pop().unwrap(), used.pop_front()) {
                    (Some(got), Some((token, written, status, _))) => {
                        prop_assert_eq!((got.token, got.written, got.status()), (token, written, status.as_slice()));
                        prop_assert!(got.offered >= got.written);
                    }
                    (None, None) => {}
                    (got, expected) => prop_assert!(false, "popped {:?}, expected {:?}", got, expected.map(|used| used.0)),
                },
                Step::Arm(count) => prop_assert_eq!(queue.arm_after(count), !used.is_empty()),
                Step::ArmNext => queue.arm_next(),
                Step::Resume => {
                    if let Some(position) = queue.position() {
                        queue = SplitQueue::resume(config, Arc::clone(&device.region), 4096, position).unwrap();
                    }
                }
                Step::Disarm => queue.disarm(),
            }
            let expected: BTreeMap<u32, bool> = added.iter().map(|(token, _)| (*token, false))
                .chain(held.iter().map(|live| (live.token, true)))
                .chain(used.iter().map(|used| (used.0, true)))
                .collect();
            let outstanding: BTreeMap<u32, bool> = queue.outstanding().map(|chain| (chain.token, chain.published)).collect();
            prop_assert_eq!(usize::from(queue.in_flight()), expected.len());
            prop_assert_eq!(usize::from(queue.unpublished()), added.len());
            prop_assert_eq!(outstanding, expected);
        }
    }
}

#[test]
fn indices_wrap_without_losing_a_chain() {
    for size in [1, 2, 4] {
        let (mut queue, mut device) = pair(QueueConfig { index: 0, size, event_idx: true, indirect: true });
        let chain = Shape { header: 0, payload_segments: 1, direction: None, status: 1 }.chain(9, 0);
        for round in 0..70_000u32 {
            queue.add(&chain.chain()).unwrap();
            queue.publish();
            let taken = device.take().unwrap();
            assert!(device.take().is_none());
            device.complete(taken.head.into(), round & 1);
            let used = queue.pop().unwrap().unwrap();
            assert_eq!((used.token, used.written), (9, round & 1));
            assert_eq!(queue.pop(), Ok(None));
        }
        assert_eq!((queue.free(), queue.in_flight()), (size, 0));
    }
}

#[test]
fn descriptors_that_were_written_ahead_serve_every_other_chain_as_well() {
    let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 16, event_idx: true, indirect: false });
    let long = Shape { payload_segments: 14, ..READ };
    let other = Shape { direction: Some(Direction::Out), status: 9, ..READ };
    for round in 0..8 {
        for (count, shape) in
            [(5, READ), (1, long), (5, other), (16, Shape { header: 1, direction: None, status: 0, ..READ })]
        {
            for index in 0..count {
                let token = 40 * round + index;
                queue.add(&shape.chain(token, 0).chain()).unwrap();
            }
            queue.publish();
            let taken: Vec<Taken> = std::iter::from_fn(|| device.take()).collect();
            assert_eq!(taken.len(), count as usize);
            for (index, taken) in (0..).zip(&taken) {
                check_taken(&device, taken, 40 * round + index, shape);
            }
            // Backwards, so that sets are not used again in the order in which they were made.
            taken.iter().rev().for_each(|taken| device.complete(taken.head.into(), 0));
            while queue.pop().unwrap().is_some() {}
            assert_eq!(queue.free(), 16);
        }
    }
}

#[test]
fn a_crowded_ring_turns_to_indirect_chains() {
    let (mut queue, _) = pair(QueueConfig { index: 0, size: 128, event_idx: true, indirect: true });
    let chain = READ.chain(1, 0);
    let mut count = 0;
    while queue.add(&chain.chain()).is_ok() {
        count += 1;
    }
    // 32 direct ones in the first three quarters, one descriptor each from there.
    assert_eq!(count, 32 + 32);
    assert_eq!(queue.free(), 0);

    // Of two descriptors a chain of two takes one, so that another finds room.
    let (mut small, _) = pair(QueueConfig { index: 0, size: 2, event_idx: true, indirect: true });
    let two = Shape { payload_segments: 0, ..READ };
    assert_eq!((small.add(&two.chain(1, 0).chain()), small.free()), (Ok(()), 1));
    assert_eq!((small.add(&two.chain(2, 0).chain()), small.free()), (Ok(()), 0));

    let (mut direct, _) = pair(QueueConfig { index: 0, size: 128, event_idx: true, indirect: false });
    let mut count = 0;
    while direct.add(&chain.chain()).is_ok() {
        count += 1;
    }
    assert_eq!(count, 42);
}

#[test]
fn a_long_chain_takes_one_descriptor_where_the_device_does_indirect_ones() {
    let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 128, event_idx: true, indirect: true });
    let long = Shape { payload_segments: 126, ..READ };
    queue.add(&long.chain(5, 0).chain()).unwrap();
    assert_eq!(queue.free(), 127);
    queue.publish();
    let taken = device.take().unwrap();
    check_taken(&device, &taken, 5, long);
    assert_eq!(
        queue.add(&Shape { payload_segments: 127, ..READ }.chain(6, 0).chain()),
        Err(AddError::TooLong { segments: 129, size: 128 })
    );
}

#[test]
fn a_chain_for_another_queue_is_refused() {
    let (mut queue, _) = pair(QueueConfig { index: 0, size: 8, event_idx: false, indirect: false });
    assert_eq!(queue.add(&READ.chain(1, 2).chain()), Err(AddError::WrongQueue { chain: 2, queue: 0 }));
}

#[test]
fn a_place_that_does_not_fit_is_refused() {
    use cofferdam_device::{DmaRegion, QueueError, SplitQueue};
    use std::sync::Arc;
    let region = Arc::new(DmaRegion::new("test-ring", 8192, 0).unwrap());
    let config = |size| QueueConfig { index: 0, size, event_idx: true, indirect: false };
    let make = |size, offset| SplitQueue::new(config(size), Arc::clone(&region), offset).err();
    for size in [0, 3, 100] {
        assert_eq!(make(size, 0), Some(QueueError::Size(size)));
    }
    assert_eq!(make(2, 64), Some(QueueError::Alignment(64)));
    for (size, offset) in [(2, 8192), (2, u64::MAX - 4095), (256, 0), (32768, 4096)] {
        assert!(matches!(make(size, offset), Some(QueueError::OutOfRegion { .. })), "{size} at {offset}");
    }
    assert_eq!(make(2, 4096), None);
}

fn bytes(region: &DmaRegion) -> Vec<u8> {
    let mut all = vec![0; region.len() as usize];
    region.read_at(0, &mut all).unwrap();
    all
}

#[test]
fn a_ring_is_gone_on_with_wherever_its_indices_stand_and_is_not_written_to_for_that() {
    for (event_idx, indirect) in [(false, false), (true, true)] {
        let config = QueueConfig { index: 0, size: 8, event_idx, indirect };
        let (mut queue, mut device) = pair(config);
        // Past the end of 16 bits, with a stop at every place around it.
        for token in 0..65_600 {
            queue.add(&READ.chain(token, 0).chain()).unwrap();
            assert!(queue.position().is_none(), "something is on it");
            queue.publish();
            let taken = device.take().unwrap();
            check_taken(&device, &taken, token, READ);
            device.complete(taken.head.into(), READ.writable());
            assert_eq!(queue.pop().unwrap().map(|used| used.token), Some(token));
            if !(16..65_520).contains(&token) {
                let position = queue.position().unwrap();
                assert_eq!(position, (token + 1) as u16);
                let before = bytes(&device.region);
                queue = SplitQueue::resume(config, Arc::clone(&device.region), 4096, position).unwrap();
                assert!(before == bytes(&device.region), "the ring was written to");
            }
        }
    }
}

#[test]
fn a_ring_that_stands_somewhere_else_is_not_gone_on_with() {
    let config = QueueConfig { index: 0, size: 8, event_idx: true, indirect: false };
    let (mut queue, mut device) = pair(config);
    let resume = |device: &Device, position| SplitQueue::resume(config, Arc::clone(&device.region), 4096, position);
    for wrong in [1, 8, u16::MAX] {
        let refused = resume(&device, wrong).map(|_| ());
        assert_eq!(refused, Err(QueueError::Moved { available: 0, used: 0, expected: wrong }));
    }
    queue.add(&READ.chain(0, 0).chain()).unwrap();
    queue.publish();
    assert_eq!(queue.position(), None);
    assert!(resume(&device, 0).is_err() && resume(&device, 1).is_err(), "a chain is on it");
    let taken = device.take().unwrap();
    device.complete(taken.head.into(), READ.writable());
    assert_eq!(queue.position(), None, "it was not taken off yet");
    queue.pop().unwrap();
    resume(&device, 1).unwrap();
    // A device that says more than it was given has broken the ring, for whomever.
    device.set_used(3);
    assert!(queue.pop().is_err());
    assert_eq!(queue.position(), None);
    assert!(resume(&device, 1).is_err());
    let far = SplitQueue::resume(config, Arc::clone(&device.region), device.region.len(), 0);
    assert!(matches!(far, Err(QueueError::OutOfRegion { .. })));
}
