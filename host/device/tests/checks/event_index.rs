//! Suppression of notifications, held against section 2.7.10.1 told another way: an index that moves one by one passes `event`.

use cofferdam_device::queue::need_event;
use cofferdam_device::{QueueConfig, SplitQueue};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::device::{Device, READ, Shape, pair};

/// Whether an index that goes from `old` to `new` in steps of one leaves `event` behind.
fn passes(event: u16, new: u16, old: u16) -> bool {
    let mut at = old;
    while at != new {
        if at == event {
            return true;
        }
        at = at.wrapping_add(1);
    }
    false
}

const SMALL: Shape = Shape { header: 1, direction: None, status: 0, ..READ };

/// Brings both indices of an idle queue to `start`.
fn advance(queue: &mut SplitQueue, device: &mut Device, start: u16) {
    let chain = SMALL.chain(0, 0);
    for _ in 0..start {
        queue.add(&chain.chain()).unwrap();
        queue.publish();
        let head = device.take().unwrap().head;
        device.complete(head.into(), 0);
        queue.pop().unwrap().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn need_event_is_right_across_the_wrap(old: u16, distance in 0..200u16, near in -300..300i32, far: u16, use_far: bool) {
        let new = old.wrapping_add(distance);
        let event = if use_far { far } else { old.wrapping_add(near as u16) };
        prop_assert_eq!(need_event(event, new, old), passes(event, new, old));
    }

    #[test]
    fn publish_kicks_exactly_when_the_device_asked(batches in vec((1..8u16, -10..10i32), 1..40)) {
        let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 8, event_idx: true, indirect: false });
        let chain = SMALL.chain(0, 0);
        for (count, event) in batches {
            let old = device.available_next;
            let event = old.wrapping_add(event as u16);
            device.set_available_event(event);
            for _ in 0..count {
                queue.add(&chain.chain()).unwrap();
            }
            prop_assert_eq!(queue.publish(), passes(event, old.wrapping_add(count), old));
            prop_assert!(!queue.publish(), "there is nothing more to publish");
            while let Some(taken) = device.take() {
                device.complete(taken.head.into(), 0);
            }
            while queue.pop().unwrap().is_some() {}
        }
    }

    #[test]
    fn an_armed_queue_hears_of_the_chain_it_asked_for_and_a_disarmed_one_of_none(
        rounds in vec((1..8u16, 1..10u16, any::<bool>(), 0..8u16), 1..40)
    ) {
        let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 8, event_idx: true, indirect: false });
        let chain = SMALL.chain(0, 0);
        for (in_flight, wanted, armed, early) in rounds {
            for _ in 0..in_flight {
                queue.add(&chain.chain()).unwrap();
            }
            queue.publish();
            let heads: Vec<u16> = std::iter::from_fn(|| device.take()).map(|taken| taken.head).collect();
            let early = usize::from(early.min(in_flight));
            for head in &heads[..early] {
                device.complete((*head).into(), 0);
            }
            if armed {
                prop_assert_eq!(queue.arm_after(wanted), early > 0);
            } else {
                queue.disarm();
            }
            let mut notified = None;
            for (index, head) in heads.iter().enumerate().skip(early) {
                let old = device.used;
                device.complete((*head).into(), 0);
                if passes(device.used_event(), device.used, old) {
                    notified.get_or_insert(index + 1);
                }
            }
            if armed && early == 0 {
                prop_assert_eq!(notified, Some(usize::from(wanted.min(in_flight))));
            } else if !armed {
                prop_assert_eq!(notified, None);
            }
            while queue.pop().unwrap().is_some() {}
        }
    }
}

#[test]
fn kicks_and_calls_are_right_at_the_wrap() {
    let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 8, event_idx: true, indirect: false });
    advance(&mut queue, &mut device, u16::MAX - 3);
    let chain = SMALL.chain(0, 0);
    for round in 0..8u16 {
        let old = device.available_next;
        device.set_available_event(old.wrapping_add(round % 3));
        for _ in 0..2 {
            queue.add(&chain.chain()).unwrap();
        }
        assert_eq!(queue.publish(), round % 3 < 2);
        assert!(!queue.arm_after(2));
        let heads: Vec<u16> = std::iter::from_fn(|| device.take()).map(|taken| taken.head).collect();
        let calls: Vec<bool> = heads
            .iter()
            .map(|head| {
                let old = device.used;
                device.complete((*head).into(), 0);
                passes(device.used_event(), device.used, old)
            })
            .collect();
        assert_eq!(calls, [false, true]);
        queue.disarm();
        while queue.pop().unwrap().is_some() {}
    }
}

#[test]
fn without_event_index_the_flags_say_it() {
    let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 8, event_idx: false, indirect: false });
    let chain = SMALL.chain(0, 0);
    for (flags, kick) in [(0, true), (1, false), (0, true)] {
        device.set_used_flags(flags);
        queue.add(&chain.chain()).unwrap();
        assert_eq!(queue.publish(), kick);
    }
    assert_eq!(device.available_flags(), 0, "a queue starts armed");
    queue.disarm();
    assert_eq!(device.available_flags(), 1);
    assert!(!queue.arm_after(3));
    assert_eq!(device.available_flags(), 0);
    let head = device.take().unwrap().head;
    device.complete(head.into(), 0);
    assert!(queue.arm(), "something is there");
}

#[test]
fn a_queue_armed_for_the_next_chain_hears_of_it_alone() {
    let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 8, event_idx: true, indirect: false });
    advance(&mut queue, &mut device, u16::MAX - 3);
    let chain = SMALL.chain(0, 0);
    for _ in 0..8 {
        for _ in 0..3 {
            queue.add(&chain.chain()).unwrap();
        }
        queue.publish();
        queue.arm_next();
        let heads: Vec<u16> = std::iter::from_fn(|| device.take()).map(|taken| taken.head).collect();
        let mut calls = Vec::new();
        for head in heads {
            let old = device.used;
            device.complete(head.into(), 0);
            calls.push(passes(device.used_event(), device.used, old));
        }
        assert_eq!(calls, [true, false, false]);
        queue.pop().unwrap().unwrap();
        queue.arm_next();
        assert_eq!(device.used_event(), device.used.wrapping_sub(2), "counted from what was popped");
        while queue.pop().unwrap().is_some() {}
    }
}

#[test]
fn arming_for_the_next_chain_writes_only_what_is_not_armed_yet() {
    const MARK: u16 = 0x5555;
    let (mut queue, mut device) = pair(QueueConfig { index: 0, size: 8, event_idx: true, indirect: false });
    advance(&mut queue, &mut device, 5);
    queue.arm_next();
    assert_eq!(device.used_event(), 5);
    device.set_used_event(MARK);
    queue.arm_next();
    assert_eq!(device.used_event(), MARK, "it was armed");
    queue.disarm();
    assert_eq!(device.used_event(), 4);
    queue.arm_next();
    assert_eq!(device.used_event(), 5);
    for _ in 0..3 {
        queue.add(&SMALL.chain(0, 0).chain()).unwrap();
    }
    queue.publish();
    assert!(!queue.arm_after(3));
    queue.arm_next();
    assert_eq!(device.used_event(), 5, "it was armed for another one");

    let (mut queue, device) = pair(QueueConfig { index: 0, size: 8, event_idx: false, indirect: false });
    queue.disarm();
    queue.arm_next();
    assert_eq!(device.available_flags(), 0);
    queue.disarm();
    assert_eq!(device.available_flags(), 1);
}
