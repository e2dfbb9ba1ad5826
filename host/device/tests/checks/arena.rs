//! Leases never overlap, all come back, and a retired arena hands out nothing.

use std::sync::Arc;
use std::thread;

use cofferdam_device::{ArenaError, Buffer, DmaArena, DmaRegion};
use proptest::collection::vec;
use proptest::prelude::*;

const IOVA: u64 = 0x1_0000_0000;

fn arena(pages: u64) -> DmaArena {
    DmaArena::new(Arc::new(DmaRegion::new("test-arena", pages * 4096, IOVA).unwrap())).unwrap()
}

fn pages(buffer: &Buffer) -> u64 {
    u64::from(buffer.len()).div_ceil(4096)
}

#[derive(Clone, Debug)]
enum Step {
    Lease(u32),
    Drop(prop::sample::Index),
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn leases_do_not_overlap_and_all_come_back(
        total in 1..200u64,
        steps in vec(prop_oneof![
            3 => prop_oneof![Just(4096u32), 1..20_000u32, 1..400_000u32].prop_map(Step::Lease),
            2 => any::<prop::sample::Index>().prop_map(Step::Drop),
        ], 1..200)
    ) {
        let arena = arena(total);
        let max = arena.max_lease_bytes();
        let mut held: Vec<Buffer> = Vec::new();
        for step in steps {
            match step {
                Step::Lease(bytes) => match arena.lease(bytes) {
                    Ok(buffer) => {
                        prop_assert_eq!(buffer.len(), bytes);
                        prop_assert_eq!(buffer.iova() % 4096, 0);
                        prop_assert!(buffer.iova() >= IOVA && buffer.iova() + u64::from(bytes) <= IOVA + total * 4096);
                        for other in &held {
                            let apart = buffer.iova() + pages(&buffer) * 4096 <= other.iova() || other.iova() + pages(other) * 4096 <= buffer.iova();
                            prop_assert!(apart, "{:?} overlaps {:?}", buffer, other);
                        }
                        held.push(buffer);
                    }
                    Err(ArenaError::Size { .. }) => prop_assert!(bytes > max),
                    Err(ArenaError::Exhausted { .. }) => prop_assert!(!held.is_empty(), "an empty arena gives up to {} bytes, not {}", max, bytes),
                    Err(ArenaError::Retired) => prop_assert!(false),
                },
                Step::Drop(which) => if !held.is_empty() {
                    held.swap_remove(which.index(held.len()));
                },
            }
            prop_assert_eq!(arena.leased_buffers(), held.len() as u64);
            prop_assert_eq!(arena.leased_bytes(), held.iter().map(pages).sum::<u64>() * 4096);
        }
        held.clear();
        prop_assert_eq!((arena.leased_buffers(), arena.leased_bytes()), (0, 0));
        // What waits in the stacks is joined again when it is needed.
        prop_assert_eq!(arena.lease(max).map(|buffer| buffer.len()), Ok(max));
        // Every page can be had one by one.
        let all: Vec<Buffer> = std::iter::from_fn(|| arena.lease(1).ok()).collect();
        prop_assert_eq!(all.len() as u64, total);
    }
}

#[test]
fn leases_on_many_threads_do_not_share_memory() {
    let arena = arena(64);
    thread::scope(|scope| {
        for id in 0..4u8 {
            let arena = arena.clone();
            scope.spawn(move || {
                for round in 0..2000u32 {
                    let bytes = 1 + (round * 977 + u32::from(id) * 131) % 20_000;
                    let Ok(buffer) = arena.lease(bytes) else {
                        continue;
                    };
                    buffer.fill(0, bytes, id).unwrap();
                    let mut ends = [0xff; 2];
                    buffer.read_at(0, &mut ends[..1]).unwrap();
                    buffer.read_at(bytes - 1, &mut ends[1..]).unwrap();
                    assert_eq!(ends, [id; 2]);
                }
            });
        }
    });
    assert_eq!((arena.leased_buffers(), arena.leased_bytes()), (0, 0));
}

#[test]
fn a_buffer_can_be_given_back_on_another_thread() {
    let arena = arena(4);
    let buffer = arena.lease(4096).unwrap();
    thread::spawn(move || drop(buffer)).join().unwrap();
    assert_eq!(arena.leased_buffers(), 0);
}

#[test]
fn a_copy_outside_a_lease_is_refused_even_inside_its_page() {
    let arena = arena(4);
    let buffer = arena.lease(100).unwrap();
    buffer.write_at(98, b"ab").unwrap();
    assert!(buffer.write_at(99, b"ab").is_err());
    assert!(buffer.read_at(101, &mut []).is_err());
    assert!(buffer.fill(u32::MAX, 2, 0).is_err());
    let mut back = [0; 2];
    buffer.read_at(98, &mut back).unwrap();
    assert_eq!(&back, b"ab");
}

#[test]
fn a_retired_arena_hands_out_nothing_and_its_memory_stays() {
    let arena = arena(8);
    let region = Arc::downgrade(arena.region());
    let buffer = arena.lease(4096).unwrap();
    assert_eq!(arena.retire(), 8 * 4096);
    assert_eq!(arena.retire(), 8 * 4096);
    assert!(arena.is_retired());
    assert_eq!(arena.lease(1).err(), Some(ArenaError::Retired));
    buffer.write_at(0, b"still mine").unwrap();
    drop(buffer);
    assert_eq!((arena.leased_buffers(), arena.leased_bytes()), (0, 0));
    drop(arena);
    assert_eq!(region.strong_count(), 1, "the leak is one reference, that of the memory itself");
}

#[test]
fn an_arena_that_is_dropped_frees_its_memory() {
    let arena = arena(8);
    let region = Arc::downgrade(arena.region());
    let buffer = arena.lease(4096).unwrap();
    drop(arena);
    assert!(region.upgrade().is_some(), "a lease keeps the memory");
    drop(buffer);
    assert!(region.upgrade().is_none());
}
