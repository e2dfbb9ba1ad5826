//! A device that is lost and comes back under its clients (`LoadSpec::reconnect`): what they see of it, and what they must not.

#![allow(unreachable_pub)]

mod bed;
mod crowd;
mod faults;
mod others;
mod promise;

use std::time::{Duration, Instant};

use bed::{
    BLOCK, Bed, MIB, PATIENCE, Slot, ask, bare, collect, disk, filled_with, io, manager, read, spec, until, write,
};
use cofferdam_manager::{
    IoError, IoOp, LoadError, Outcome, Phase, RestartError, RestartPolicy, SubmitError, UnloadOptions,
};
use cofferdam_sim::{Effect, Lie, Op, Profile, Quiescence, Rule, When};

/// Longer than any test.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

#[test]
fn what_was_in_flight_is_done_once_by_the_device_that_came_back() {
    let bed = Bed::new(2, LONG);
    let handles = [bed.open(0), bed.open(1)];
    let base = |lane: usize| lane as u64 * 8 * MIB;
    for (lane, handle) in handles.iter().enumerate() {
        let at = |nth: u64| base(lane) + nth * u64::from(BLOCK);
        let writes = (0..64).map(|nth| io(handle, nth, IoOp::Write, at(nth), nth as u8 | 1)).collect();
        assert!(ask(handle, writes).iter().all(|answer| answer.result == Ok(())));
        assert_eq!(bed::flush(handle), Ok(()));
    }
    bed.sim.add_rule(Rule::always(Effect::Gate));
    for (lane, handle) in handles.iter().enumerate() {
        let at = |nth: u64| base(lane) + nth * u64::from(BLOCK);
        let mut all: Vec<_> = (0..32).map(|nth| io(handle, nth, IoOp::Read, at(nth), 0)).collect();
        all.extend((32..48).map(|nth| io(handle, nth, IoOp::Write, at(nth), 200)));
        all.push(bare(48, IoOp::Discard, at(48), BLOCK));
        all.push(bare(49, IoOp::WriteZeroes, at(49), BLOCK));
        all.push(bare(50, IoOp::Flush, 0, 0));
        all.push(cofferdam_manager::IoRequest { length: 20, ..io(handle, 51, IoOp::GetId, 0, 0) });
        // More than the ring takes: some wait for room.
        all.extend((52..400).map(|nth| io(handle, nth, IoOp::Write, at(64 + nth), nth as u8)));
        handle.submit(&mut all).unwrap();
    }
    assert!(bed.sim.wait_until(PATIENCE, |stats| stats.gated >= 2 * 52), "{:?}", bed.sim.stats());
    bed.slot.empty();
    bed.sim.die();
    bed.until(Phase::Recovering);
    until("it waits", || bed.binding.explain().waits_for.iter().any(|what| what.contains("nobody is there")));
    assert_eq!(handles[0].submit(&mut vec![bare(9, IoOp::Flush, 0, 0)]), Err(SubmitError::Held));
    assert_eq!(handles[0].in_flight(), 400, "all are waited for");
    bed.sim.clear_rules();
    bed.slot.put(&bed.sim);
    for (lane, handle) in handles.iter().enumerate() {
        let answers = collect(handle, 400);
        for answer in &answers {
            assert_eq!(answer.result, Ok(()), "request {}", answer.user);
            if answer.user < 32 {
                assert_eq!(filled_with(answer), answer.user as u8 | 1, "read {}", answer.user);
            }
        }
        drop(answers);
        let at = |nth: u64| base(lane) + nth * u64::from(BLOCK);
        assert_eq!([read(handle, at(40)), read(handle, at(49)), read(handle, at(64 + 399))], [200, 0, 399_u32 as u8]);
    }
    bed.until(Phase::Serving);
    assert_eq!(bed.sim.stats().sessions, 2);
    drop(handles);
    bed.is_clean();
}

#[test]
fn a_client_that_sleeps_is_woken_by_the_device_that_came_back() {
    let bed = Bed::new(1, LONG);
    let handle = bed.open(0);
    for round in 0..8_u64 {
        bed.sim.add_rule(Rule::always(Effect::Gate));
        bed::submit(&handle, vec![io(&handle, round, IoOp::Write, round * MIB / 2, round as u8)]);
        std::thread::scope(|scope| {
            let handle = &handle;
            let sleeper = scope.spawn(move || {
                let mut out = Vec::new();
                let begun = Instant::now();
                while out.is_empty() && begun.elapsed() < PATIENCE {
                    handle.wait(PATIENCE, &mut out);
                }
                out.pop().map(|answer| answer.result)
            });
            assert!(bed.sim.wait_until(PATIENCE, |stats| stats.gated == 1));
            bed.sim.clear_rules();
            bed.sim.die();
            assert_eq!(sleeper.join().unwrap(), Some(Ok(())), "round {round}");
        });
        bed.until_back(round as usize + 1);
    }
    assert_eq!(read(&handle, 0), 0);
    drop(handle);
    bed.is_clean();
}

#[test]
fn another_device_in_its_place_is_refused_and_told() {
    let small = |options: &mut cofferdam_sim::Options| options.storage = cofferdam_sim::Storage::Memory(8 << 20);
    let few = |options: &mut cofferdam_sim::Options| options.profile = Profile { discard: None, ..Profile::default() };
    let other_blocks = |options: &mut cofferdam_sim::Options| options.profile.block_bytes = Some(4096);
    let twin = |options: &mut cofferdam_sim::Options| options.profile.id = *b"another disk\0\0\0\0\0\0\0\0";
    let others = [
        (disk(twin), "-> \"another disk\""),
        (disk(small), "capacity-bytes 16777216 -> 8388608"),
        (disk(few), "without 0x2000"),
        (disk(other_blocks), "logical-block-bytes 512 -> 4096"),
    ];
    for (other, reason) in others {
        let bed = Bed::new(1, LONG);
        let handle = bed.open(0);
        assert_eq!(write(&handle, 0, 7), Ok(()));
        assert_eq!(bed::flush(&handle), Ok(()));
        bed.sim.add_rule(Rule::always(Effect::Gate));
        handle.submit(&mut vec![io(&handle, 1, IoOp::Write, MIB, 8)]).unwrap();
        bed.slot.put(&other);
        bed.sim.die();
        bed.until(Phase::Failed);
        assert!(bed.given_up()[0].contains(reason), "{:?}", bed.given_up());
        assert!(bed.binding.explain().waits_for[0].contains(reason), "{:?}", bed.binding.explain().waits_for);
        assert_eq!(collect(&handle, 1)[0].result, Err(IoError::DeviceFault), "it is not kept waiting");
        assert_eq!(write(&handle, 0, 9), Err(IoError::DeviceFault));
        let asked = u64::from(reason.contains("another disk"));
        assert_eq!(other.stats().taken, asked, "nothing was given to another device but the question who it is");
        // The right one, and the same handle.
        bed.sim.clear_rules();
        bed.slot.put(&bed.sim);
        bed.binding.restart().unwrap();
        bed.until_back(1);
        assert_eq!(read(&handle, 0), 7);
        drop(handle);
        bed.is_clean();
    }
}

#[test]
fn a_device_of_another_kind_is_refused() {
    let bed = Bed::new(1, LONG);
    let rng = cofferdam_sim::SimRng::new(cofferdam_sim::EntropyProfile::default(), Default::default()).unwrap();
    bed.slot.put(&rng);
    bed.sim.die();
    bed.until(Phase::Failed);
    assert!(bed.given_up()[0].contains("virtio id 2 -> 4"), "{:?}", bed.given_up());
    bed.is_clean();
}

#[test]
fn one_that_does_not_come_back_in_time_fails_and_is_waited_for_again_by_a_restart() {
    let bed = Bed::new(2, SHORT);
    let handle = bed.open(1);
    assert_eq!(bed.binding.restart(), Err(RestartError::NotFailed("virtio-blk0".into())));
    for round in 1..=2 {
        bed.slot.empty();
        let begun = Instant::now();
        bed.sim.die();
        bed.until(Phase::Failed);
        assert!(begun.elapsed() >= SHORT, "{:?}", begun.elapsed());
        let told = bed.given_up().pop().unwrap();
        assert!(told.contains("did not come back within 200ms: nobody is there"), "{told}");
        assert_eq!(write(&handle, 0, 1), Err(IoError::DeviceFault));
        // Once more, and in vain.
        bed.binding.restart().unwrap();
        bed.until(Phase::Failed);
        bed.slot.put(&bed.sim);
        bed.binding.restart().unwrap();
        bed.until_back(round);
        assert_eq!(write(&handle, 0, 1), Ok(()));
    }
    drop(handle);
    bed.is_clean();
}

#[test]
fn a_device_that_breaks_the_rules_is_reset_and_goes_on() {
    for lie in [Lie::UsedIdUnknown, Lie::UsedIndexJump, Lie::LengthLong] {
        let bed = Bed::new(1, LONG);
        let handle = bed.open(0);
        bed.sim.add_rule(Rule { when: When::Nth(20), ..Rule::always(Effect::Lie(lie)) });
        let writes = (0..64).map(|nth| io(&handle, nth, IoOp::Write, nth * u64::from(BLOCK), nth as u8)).collect();
        let answers = ask(&handle, writes);
        assert!(answers.iter().all(|answer| answer.result == Ok(())), "{lie:?}: {answers:?}");
        drop(answers);
        bed.until_back(1);
        for nth in 0..64 {
            assert_eq!(read(&handle, nth * u64::from(BLOCK)), nth as u8);
        }
        drop(handle);
        bed.is_clean();
    }
}

#[test]
fn a_device_that_breaks_the_rules_again_and_again_fails() {
    let sim = disk(|_| {});
    let (manager, slot) = (manager(), Slot::default());
    let mut load = spec("virtio-blk", &slot, &sim, LONG);
    load.restarts = Some(RestartPolicy { limit: 3, backoff: Duration::from_millis(1), ..RestartPolicy::default() });
    let binding = manager.load(load).unwrap();
    let bed = Bed { manager, binding, sim, slot };
    let handle = bed.open(0);
    bed.sim.add_rule(Rule { op: Some(Op::Write), ..Rule::always(Effect::Lie(Lie::UsedIdUnknown)) });
    assert_eq!(write(&handle, 0, 1), Err(IoError::DeviceFault));
    bed.until(Phase::Failed);
    assert!(bed.given_up()[0].contains("too often"), "{:?}", bed.given_up());
    assert_eq!(bed.sim.stats().sessions, 4, "the first and three more");
    bed.sim.clear_rules();
    bed.binding.restart().unwrap();
    bed.until(Phase::Serving);
    assert_eq!(write(&handle, 0, 1), Ok(()));
    drop(handle);
    bed.is_clean();
}

#[test]
fn an_unload_does_not_wait_for_the_device() {
    let bed = Bed::new(1, LONG);
    let handle = bed.open(0);
    bed.sim.add_rule(Rule::always(Effect::Gate));
    let writes = (0..300).map(|nth| io(&handle, nth, IoOp::Write, nth * u64::from(BLOCK), 1));
    handle.submit(&mut writes.collect()).unwrap();
    bed.slot.empty();
    bed.sim.die();
    until("it waits", || bed.binding.explain().waits_for.iter().any(|what| what.contains("to come back")));
    let begun = Instant::now();
    let certificate = bed.manager.unload_binding(&bed.binding, &UnloadOptions::default()).unwrap();
    assert!(begun.elapsed() < LONG / 2, "{:?}", begun.elapsed());
    assert!(matches!(certificate.outcome, Outcome::Unloaded | Outcome::Removed), "{certificate:?}");
    assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    let mut out = Vec::new();
    handle.poll(false, &mut out);
    assert_eq!(out.len(), 300, "and each has its answer");
    assert!(out.iter().all(|answer| answer.result.is_err()));
}

#[test]
fn without_silence_nothing_is_given_again_and_the_binding_leaves() {
    let bed = Bed::of(disk(|options| options.quiescence = Quiescence::Drains), LONG);
    let handle = bed.open(0);
    bed.sim.add_rule(Rule { when: When::Nth(2), ..Rule::always(Effect::Lie(Lie::UsedIdUnknown)) });
    bed.sim.add_rule(Rule { when: When::Nth(1), ..Rule::always(Effect::Gate) });
    let mut writes = vec![io(&handle, 1, IoOp::Write, 0, 1), io(&handle, 2, IoOp::Write, MIB, 2)];
    handle.submit(&mut writes).unwrap();
    let mut out = Vec::new();
    until("it has left", || {
        handle.poll(true, &mut out);
        bed.binding.phase() == Phase::Detached
    });
    assert_eq!(bed.binding.certificate().unwrap().outcome, Outcome::Failed);
    assert_eq!(bed.given_up().len(), 1, "{:?}", bed.given_up());
    assert_eq!(bed.sim.stats().sessions, 1, "nobody else was given anything");
}

#[test]
fn a_region_that_a_client_has_mapped_is_still_its_own() {
    let bed = Bed::new(1, LONG);
    let (handle, late) = (bed.open(0), bed.open(0));
    let mapped = handle.map(MIB).unwrap();
    let request = |user, op, offset| {
        let buffer = Some(mapped.window(offset, BLOCK).unwrap());
        cofferdam_manager::IoRequest { buffer, ..bare(user, op, offset, BLOCK) }
    };
    mapped.fill(0, u64::from(BLOCK), 5).unwrap();
    bed.sim.add_rule(Rule::always(Effect::Gate));
    handle.submit(&mut vec![request(1, IoOp::Write, 0)]).unwrap();
    assert!(bed.sim.wait_until(PATIENCE, |stats| stats.gated == 1));
    bed.sim.clear_rules();
    bed.lose();
    assert_eq!(collect(&handle, 1)[0].result, Ok(()), "given again, from where it lies");
    assert_eq!(read(&handle, 0), 5);
    mapped.fill(0, u64::from(BLOCK), 0).unwrap();
    assert_eq!(ask(&handle, vec![request(2, IoOp::Read, 0)])[0].result, Ok(()));
    let mut bytes = [0; BLOCK as usize];
    mapped.read_at(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 5));
    let other = late.map(MIB).unwrap();
    drop((handle, mapped));
    until("its memory is gone", || bed.binding.mapped_use().regions == 1);
    drop((late, other));
    until("all of it is gone", || bed.binding.mapped_use().regions == 0);
    bed.is_clean();
}

#[test]
fn a_driver_that_is_not_replaced_cannot_be_reconnected() {
    let (sim, slot) = (disk(|_| {}), Slot::default());
    let mut load = spec("virtio-blk", &slot, &sim, LONG);
    load.restarts = None;
    assert!(matches!(manager().load(load), Err(LoadError::CannotReconnect)));
}
