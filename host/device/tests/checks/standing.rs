//! A queue of posted buffers that another process goes on with: what is with the device stays there, and what it has used is found once.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use cofferdam_device::{QueueConfig, QueueError, SplitQueue, Standing};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::device::{Device, PAYLOAD_IOVA, pair};

const SIZE: u16 = 8;
const LENGTH: u32 = 100;

fn config(event_idx: bool) -> QueueConfig {
    QueueConfig { index: 3, size: SIZE, event_idx, indirect: false }
}

fn place(token: u32) -> u64 {
    PAYLOAD_IOVA + u64::from(token) * 4096
}

fn length(token: u32) -> Option<u32> {
    (token < SIZE.into()).then_some(LENGTH)
}

fn resume(device: &Device, config: QueueConfig, standing: &Standing) -> Result<SplitQueue, QueueError> {
    SplitQueue::resume_posted(config, Arc::clone(&device.region), 4096, standing, length)
}

#[derive(Clone, Debug)]
enum Step {
    /// So many buffers that are not with the device are posted.
    Post(u8),
    /// The device uses one of those that it has, in any order.
    Use(prop::sample::Index),
    Pop,
    Resume,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..=8u8).prop_map(Step::Post),
        6 => any::<prop::sample::Index>().prop_map(Step::Use),
        5 => Just(Step::Pop),
        2 => Just(Step::Resume),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn each_buffer_is_found_once_and_in_the_order_of_its_use_whoever_goes_on(
        event_idx: bool,
        steps in vec(step(), 1..400),
    ) {
        let config = config(event_idx);
        let (mut queue, mut device) = pair(config);
        let mut free: BTreeSet<u32> = (0..u32::from(SIZE)).collect();
        let (mut with_device, mut used) = (Vec::new(), VecDeque::new());
        for step in steps {
            match step {
                Step::Post(count) => {
                    for _ in 0..count {
                        let Some(token) = free.pop_first() else { break };
                        queue.add_buffer(token, place(token), LENGTH).unwrap();
                    }
                    queue.publish();
                    while let Some(taken) = device.take() {
                        let piece = &taken.pieces[0];
                        prop_assert_eq!((taken.pieces.len(), piece.length, piece.write), (1, LENGTH, true));
                        with_device.push((taken.head, ((piece.iova - PAYLOAD_IOVA) / 4096) as u32));
                    }
                }
                Step::Use(which) => {
                    if !with_device.is_empty() {
                        let (head, token) = with_device.swap_remove(which.index(with_device.len()));
                        device.complete(head.into(), token + 1);
                        used.push_back((token, token + 1));
                    }
                }
                Step::Pop => {
                    let popped = queue.pop_written().unwrap();
                    prop_assert_eq!(popped, used.pop_front());
                    free.extend(popped.map(|(token, _)| token));
                }
                Step::Resume => {
                    let standing = queue.standing().unwrap();
                    prop_assert_eq!(standing.posted.len(), with_device.len() + used.len());
                    let mut before = vec![0; device.region.len() as usize];
                    let mut after = before.clone();
                    device.region.read_at(0, &mut before).unwrap();
                    queue = resume(&device, config, &standing).unwrap();
                    device.region.read_at(0, &mut after).unwrap();
                    prop_assert!(before == after, "the ring was written to");
                    prop_assert_eq!(usize::from(queue.free()), free.len());
                    prop_assert_eq!(queue.standing(), Some(standing));
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_so_is_not_gone_on_with() {
    let config = config(true);
    let (mut queue, mut device) = pair(config);
    for token in 0..3 {
        queue.add_buffer(token, place(token), LENGTH).unwrap();
    }
    assert_eq!(queue.standing(), None, "it is not published");
    queue.publish();
    let is = queue.standing().unwrap();
    assert_eq!(is, Standing { available: 3, used_next: 0, posted: vec![(0, 0), (1, 1), (2, 2)] });
    type Change = fn(&mut Standing);
    let changes: [(&str, Change); 6] = [
        ("one less", |standing| standing.posted.truncate(2)),
        ("a descriptor twice", |standing| standing.posted[0].0 = 1),
        ("no such descriptor", |standing| standing.posted[0].0 = SIZE),
        ("no such buffer", |standing| standing.posted[0].1 = 8),
        ("the ring stands elsewhere", |standing| (standing.available, standing.used_next) = (4, 1)),
        ("more than there is room for", |standing| standing.used_next = 3_u16.wrapping_sub(9)),
    ];
    for (what, change) in changes {
        let mut standing = is.clone();
        change(&mut standing);
        assert!(resume(&device, config, &standing).is_err(), "{what}");
    }
    // A device that says more than it was given has broken the ring, for whomever.
    device.set_used(4);
    assert!(resume(&device, config, &is).is_err());
    device.set_used(0);
    device.complete(0, LENGTH + 1);
    let mut lies = resume(&device, config, &is).unwrap();
    assert!(lies.pop_written().is_err(), "it wrote more than there was");
    assert_eq!(lies.standing(), None);
}
