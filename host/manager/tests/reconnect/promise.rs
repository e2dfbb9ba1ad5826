//! What a flush promises, over the loss of a device that takes with it what was not flushed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cofferdam_manager::{Handle, IoError, IoOp, Phase, RestartPolicy};
use cofferdam_sim::{Effect, Op, Rule};

use crate::bed::{BLOCK, Bed, PATIENCE, Slot, ask, bare, collect, disk, flush, io, manager, read, spec, until, write};

const LONG: Duration = Duration::from_secs(60);

#[test]
fn the_next_flush_of_every_handle_fails_once_if_a_write_was_acknowledged_behind_the_last_one() {
    let bed = Bed::new(2, LONG);
    let handles = [bed.open(0), bed.open(0), bed.open(1)];
    bed.lose();
    assert_eq!(handles.each_ref().map(flush), [Ok(()); 3], "nothing was written");
    assert_eq!(write(&handles[0], 0, 1), Ok(()));
    assert_eq!(flush(&handles[2]), Ok(()), "a flush on another lane covers it");
    bed.lose();
    assert_eq!(handles.each_ref().map(flush), [Ok(()); 3], "all was flushed");
    for (lane, op) in [IoOp::Write, IoOp::Discard, IoOp::WriteZeroes].into_iter().enumerate() {
        let handle = &handles[lane];
        let request = match op {
            IoOp::Write => io(handle, 1, op, 0, 3),
            op => bare(1, op, 0, BLOCK),
        };
        assert_eq!(ask(handle, vec![request])[0].result, Ok(()));
        bed.lose();
        let late = bed.open(1);
        assert_eq!(handles.each_ref().map(flush), [Err(IoError::Io); 3], "{op:?}");
        assert_eq!(handles.each_ref().map(flush), [Ok(()); 3], "once");
        assert_eq!(flush(&late), Err(IoError::Io), "nobody had heard of it as it was opened");
        assert_eq!(flush(&bed.open(1)), Ok(()), "somebody has heard of it");
    }
    drop(handles);
    bed.is_clean();
}

#[test]
fn a_flush_in_flight_is_done_again_or_fails_if_there_was_something_to_lose() {
    for is_dirty in [false, true] {
        let bed = Bed::new(1, LONG);
        let (handle, other) = (bed.open(0), bed.open(0));
        assert_eq!(write(&handle, 0, 1), Ok(()));
        if !is_dirty {
            assert_eq!(flush(&other), Ok(()));
        }
        bed.sim.add_rule(Rule { op: Some(Op::Flush), ..Rule::always(Effect::Gate) });
        handle.submit(&mut vec![bare(1, IoOp::Flush, 0, 0)]).unwrap();
        assert!(bed.sim.wait_until(PATIENCE, |stats| stats.gated == 1));
        bed.sim.clear_rules();
        bed.lose();
        let expected = if is_dirty { Err(IoError::Io) } else { Ok(()) };
        assert_eq!(collect(&handle, 1)[0].result, expected);
        assert_eq!(flush(&handle), Ok(()), "that was its one flush");
        assert_eq!(flush(&other), expected);
        drop((handle, other));
        bed.is_clean();
    }
}

#[test]
fn a_write_that_was_done_and_not_judged_is_done_again_before_it_is_acknowledged() {
    let bed = Bed::new(1, LONG);
    let handle = bed.open(0);
    // A device may say that it wrote less than it did; then its driver is asked.
    bed.sim.add_rule("lie:length-zero@always,op=write".parse().unwrap());
    let idle = bed.sim.stats();
    handle.submit(&mut vec![io(&handle, 1, IoOp::Write, 0, 7)]).unwrap();
    // Nobody looks before the device is gone.
    assert!(bed.sim.wait_until(PATIENCE, |stats| stats.answered > idle.answered));
    let before = bed.sim.stats().taken;
    bed.lose();
    assert_eq!(collect(&handle, 1)[0].result, Ok(()));
    assert_eq!(bed.sim.stats().taken - before, 2, "it is asked for its id, and given the write once more");
    assert_eq!(flush(&handle), Ok(()), "nothing that was acknowledged is lost");
    assert_eq!(read(&handle, 0), 7);
    drop(handle);
    bed.is_clean();
}

#[test]
fn a_flush_that_failed_covers_nothing() {
    let bed = Bed::new(1, LONG);
    let handle = bed.open(0);
    assert_eq!(write(&handle, 0, 1), Ok(()));
    bed.sim.add_rule(Rule { op: Some(Op::Flush), ..Rule::always(Effect::Fail(1)) });
    assert_eq!(flush(&handle), Err(IoError::Io));
    bed.sim.clear_rules();
    bed.lose();
    assert_eq!(flush(&handle), Err(IoError::Io));
    assert_eq!(flush(&handle), Ok(()));
    drop(handle);
    bed.is_clean();
}

/// A client of eight blocks of its own, one request at a time. It knows what each of them may hold: everything written since the last flush that succeeded, and what was there then. It is told by
/// a flush that fails that some of it may be lost, and writes what it finds once more.
fn client(handle: &Handle, first: u64, stop: &AtomicBool) -> (Vec<Vec<u8>>, u32) {
    let mut blocks = vec![vec![0_u8]; 8];
    let mut errors = 0;
    let at = |block: usize| (first + block as u64) * u64::from(BLOCK);
    let look = |block: usize, allowed: &[u8]| {
        let now = read(handle, at(block));
        assert!(allowed.contains(&now), "block {block}: {now} is none of {allowed:?}");
        now
    };
    for step in 1_u32.. {
        let block = (step * 5 % 8) as usize;
        match step % 5 {
            0 => match flush(handle) {
                Ok(()) => blocks.iter_mut().for_each(|allowed| drop(allowed.drain(..allowed.len() - 1))),
                Err(IoError::Io) => {
                    errors += 1;
                    for (block, allowed) in blocks.iter_mut().enumerate() {
                        let now = look(block, allowed);
                        assert_eq!(write(handle, at(block), now), Ok(()));
                        allowed.push(now);
                    }
                }
                Err(error) => panic!("{error}"),
            },
            1 => drop(look(block, &blocks[block])),
            _ => {
                let value = (step % 251) as u8 + 1;
                assert_eq!(write(handle, at(block), value), Ok(()));
                blocks[block].push(value);
            }
        }
        if stop.load(Ordering::Acquire) {
            break;
        }
    }
    // One that was starved may not have flushed since the first power cut.
    errors += u32::from(flush(handle).is_err());
    (blocks, errors)
}

#[test]
fn nothing_that_was_flushed_is_lost_by_power_cuts_under_traffic() {
    cut_power(60);
}

#[test]
#[ignore = "long: a thousand power cuts"]
fn nothing_that_was_flushed_is_lost_by_a_thousand_power_cuts() {
    cut_power(1000);
}

fn cut_power(cuts: u64) {
    let sim = disk(|options| {
        (options.profile.queues, options.profile.block_bytes) = (2, Some(BLOCK));
        options.seed = 23;
    });
    let (manager, slot) = (manager(), Slot::default());
    let mut load = spec("virtio-blk", &slot, &sim, LONG);
    load.restarts = Some(RestartPolicy { limit: 10_000, backoff: Duration::ZERO, ..RestartPolicy::default() });
    let binding = manager.load(load).unwrap();
    let bed = Bed { manager, binding, sim, slot };
    let handles = [bed.open(0), bed.open(1)];
    let stop = AtomicBool::new(false);
    let mut failed = Vec::new();
    std::thread::scope(|scope| {
        let clients = handles.iter().enumerate().map(|(number, handle)| {
            let stop = &stop;
            scope.spawn(move || client(handle, number as u64 * 100, stop))
        });
        let clients: Vec<_> = clients.collect();
        for cut in 0..cuts {
            let before = bed.sim.stats().answered;
            assert!(bed.sim.wait_until(PATIENCE, |stats| stats.answered > before + 20 + cut % 7), "they stand still");
            bed.sim.power_cut();
            until("it is back", || bed.sim.stats().sessions >= cut + 2 && bed.binding.phase() == Phase::Serving);
        }
        stop.store(true, Ordering::Release);
        for (number, client) in clients.into_iter().enumerate() {
            let (blocks, errors) = client.join().unwrap();
            failed.push(errors);
            for (block, allowed) in blocks.iter().enumerate() {
                let now = read(&handles[number], (number as u64 * 100 + block as u64) * u64::from(BLOCK));
                assert!(allowed.contains(&now), "client {number}, block {block}: {now} is none of {allowed:?}");
            }
        }
    });
    let dropped: u64 = bed.sim.power_cuts().iter().map(|cut| cut.dropped).sum();
    println!("{cuts} power cuts lost {dropped} writes, and of each client so many flushes failed: {failed:?}");
    assert!(dropped > 0 && failed.iter().all(|failed| *failed > 0), "{dropped} writes were lost, {failed:?}");
    drop(handles);
    bed.is_clean();
}
