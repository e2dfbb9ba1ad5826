//! The queue with a device that lies. No lie is believed, none panics, and the chains in flight stay accounted for.

use std::collections::BTreeSet;

use cofferdam_device::{AddError, DeviceFault, QueueConfig, SplitQueue};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::device::{Device, READ, Taken, pair};

const SIZE: u16 = 16;

#[derive(Clone, Debug)]
enum Lie {
    /// An id outside the table.
    UnknownId(u32),
    /// A descriptor in the middle of a chain, or a free one, or the head of a chain that is not published.
    NotAHead(prop::sample::Index),
    /// An id that was used before and not published again.
    Twice,
    /// More bytes than were offered.
    Overrun(u32),
    /// `used.idx` moves by this much more than what is in flight.
    Jump(u16),
    /// `used.idx` moves back by this much.
    Back(u16),
}

fn lie() -> impl Strategy<Value = Lie> {
    prop_oneof![
        (u32::from(SIZE)..).prop_map(Lie::UnknownId),
        any::<prop::sample::Index>().prop_map(Lie::NotAHead),
        Just(Lie::Twice),
        prop_oneof![1..4u32, 1..u32::MAX - 513].prop_map(Lie::Overrun),
        prop_oneof![1..4u16, 1..1000u16].prop_map(Lie::Jump),
        prop_oneof![1..4u16, 1..1000u16].prop_map(Lie::Back),
    ]
}

/// A queue that has answered `before` chains, and has `published` and `added` more.
fn busy(indirect: bool, event_idx: bool, before: u32, published: u32, added: u32) -> (SplitQueue, Device, Vec<Taken>) {
    let (mut queue, mut device) = pair(QueueConfig { index: 1, size: SIZE, event_idx, indirect });
    for token in 0..before {
        queue.add(&READ.chain(token, 1).chain()).unwrap();
        queue.publish();
        let taken = device.take().unwrap();
        device.complete(taken.head.into(), 513);
        assert_eq!(queue.pop().unwrap().map(|used| used.token), Some(token));
    }
    for token in before..before + published {
        queue.add(&READ.chain(token, 1).chain()).unwrap();
    }
    queue.publish();
    let held = std::iter::from_fn(|| device.take()).collect();
    for token in before + published..before + published + added {
        queue.add(&READ.chain(token, 1).chain()).unwrap();
    }
    (queue, device, held)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_lie_poisons_the_queue_and_answers_nothing(
        lie in lie(), indirect: bool, event_idx: bool, before in 0..40u32, published in 1..4u32, added in 0..2u32, honest in 0..3u32
    ) {
        let (mut queue, mut device, mut held) = busy(indirect, event_idx, before, published, added);
        let honest = honest.min(published - 1);
        let mut expected: BTreeSet<u32> = (before..before + published + added).collect();
        let mut last_used = None;
        for token in before..before + honest {
            let taken = held.remove(0);
            device.complete(taken.head.into(), 0);
            last_used = Some(taken.head);
            expected.remove(&token);
        }
        match lie {
            Lie::UnknownId(id) => device.complete(id, 0),
            Lie::NotAHead(which) => {
                let heads: BTreeSet<u16> = held.iter().map(|taken| taken.head).collect();
                let others: Vec<u16> = (0..SIZE).filter(|index| !heads.contains(index)).collect();
                // The head of a chain that the device has just used is another lie, `Twice`.
                let id = others[which.index(others.len())];
                device.complete(id.into(), 0);
            }
            Lie::Twice => match last_used {
                Some(head) => device.complete(head.into(), 0),
                None => {
                    let head = u32::from(held.remove(0).head);
                    device.complete(head, 0);
                    prop_assert_eq!(queue.pop().unwrap().map(|used| used.token), Some(before));
                    expected.remove(&before);
                    device.complete(head, 0);
                }
            },
            Lie::Overrun(more) => device.complete(held[0].head.into(), 513 + more),
            Lie::Jump(more) => device.set_used(device.used.wrapping_add(held.len() as u16).wrapping_add(more)),
            Lie::Back(less) => device.set_used(device.used.wrapping_sub(honest as u16).wrapping_sub(less)),
        }
        let fault = loop {
            match queue.pop() {
                Ok(Some(used)) => prop_assert!((before..before + honest).contains(&used.token), "a lie was believed: {:?}", used),
                Ok(None) => prop_assert!(false, "a lie was not seen"),
                Err(fault) => break fault,
            }
        };
        if matches!(lie, Lie::Jump(_) | Lie::Back(_)) {
            // Such an index says nothing about which elements are true, so the honest ones before it are not answered either.
            let is_index = matches!(fault, DeviceFault::UsedIndex { .. });
            prop_assert!(is_index);
            expected.extend(before..before + honest);
        }
        prop_assert_eq!(queue.fault(), Some(fault));
        prop_assert_eq!(queue.pop(), Err(fault));
        prop_assert_eq!(queue.add(&READ.chain(99, 1).chain()), Err(AddError::Poisoned(fault)));
        prop_assert!(!queue.publish());
        prop_assert!(device.take().is_none(), "a poisoned queue publishes nothing");
        prop_assert!(queue.arm(), "nobody sleeps on a poisoned queue");
        let outstanding: BTreeSet<u32> = queue.outstanding().map(|chain| chain.token).collect();
        prop_assert_eq!(outstanding, expected);
    }

    #[test]
    fn a_device_that_scribbles_over_the_whole_ring_gains_nothing(
        seed: u64, indirect: bool, event_idx: bool, published in 1..5u32, moves in vec(0..6u16, 1..30)
    ) {
        let (mut queue, mut device, held) = busy(indirect, event_idx, 0, published, 0);
        let mut open: BTreeSet<u32> = (0..published).collect();
        let mut random = seed | 1;
        let mut next = move || { random ^= random << 13; random ^= random >> 7; random ^= random << 17; random };
        let base = SplitQueue::bytes(SIZE, indirect);
        let mut token = published;
        for steps in moves {
            for _ in 0..64 {
                let offset = 4096 + next() % (base - 8);
                device.region.write_at(offset, &next().to_le_bytes()).unwrap();
            }
            // Half of the time the used ring names what is in flight, so that it is not all over at the first look.
            for _ in 0..steps {
                let id = if next() & 1 == 0 { u32::from(held[next() as usize % held.len()].head) } else { next() as u32 % 20 };
                device.complete(id, next() as u32 % 600);
            }
            device.set_used(device.used);
            let mut popped = 0;
            while let Ok(Some(used)) = queue.pop() {
                prop_assert!(open.remove(&used.token), "answered twice or never asked: {:?}", used);
                prop_assert!(used.written <= used.offered && used.offered == READ.writable() && used.status().len() == 1);
                popped += 1;
                prop_assert!(popped <= SIZE);
            }
            let chain = READ.chain(token, 1);
            match queue.add(&chain.chain()) {
                Ok(()) => { open.insert(token); token += 1; }
                Err(AddError::NoRoom { .. }) => {}
                Err(AddError::Poisoned(_)) => { prop_assert!(queue.fault().is_some()); }
                Err(other) => prop_assert!(false, "{}", other),
            }
            queue.publish();
            let outstanding: BTreeSet<u32> = queue.outstanding().map(|chain| chain.token).collect();
            prop_assert_eq!(&outstanding, &open);
        }
    }
}

#[test]
fn a_lie_that_is_taken_back_is_not_forgiven() {
    let (mut queue, mut device, held) = busy(false, true, 0, 2, 0);
    device.complete(u32::from(SIZE), 0);
    device.complete(held[1].head.into(), 0);
    let fault = queue.pop().unwrap_err();
    device.used = device.used.wrapping_sub(2);
    device.complete(held[0].head.into(), 0);
    device.complete(held[1].head.into(), 0);
    assert_eq!((queue.pop(), queue.pop()), (Err(fault), Err(fault)));
    assert_eq!(queue.in_flight(), 2);
}
