//! A device that is lost while something else happens: drivers that break down, unloads, many clients.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cofferdam_manager::{Handle, IoOp, Outcome, Phase, RestartPolicy, SubmitError, UnloadOptions};
use cofferdam_sim::{Options, Profile};

use crate::bed::{BLOCK, Bed, PATIENCE, Slot, ask, disk, filled_with, io, manager, spec, until};

const LONG: Duration = Duration::from_secs(60);
/// As often as it likes, and without a wait.
const ALWAYS: RestartPolicy =
    RestartPolicy { limit: 10_000, within: Duration::from_secs(1), backoff: Duration::ZERO, longest: Duration::ZERO };

fn bed(driver: &str, lanes: u16) -> Bed {
    let sim = disk(|options: &mut Options| options.profile = Profile { queues: lanes, ..Profile::default() });
    let (manager, slot) = (manager(), Slot::default());
    let mut load = spec(driver, &slot, &sim, LONG);
    load.restarts = Some(ALWAYS);
    let binding = manager.load(load).unwrap();
    Bed { manager, binding, sim, slot }
}

/// Writes 32 blocks and reads them back, over and over.
fn work(handle: &Handle, lane: u64, stop: &AtomicBool) -> u64 {
    let at = |nth: u64| (lane * 1000 + nth) * u64::from(BLOCK);
    for round in 1_u64.. {
        let fill = |nth: u64| (round * 31 + nth) as u8;
        let writes = (0..32).map(|nth| io(handle, nth, IoOp::Write, at(nth), fill(nth))).collect();
        assert!(ask(handle, writes).iter().all(|answer| answer.result == Ok(())), "round {round}");
        for answer in ask(handle, (0..32).map(|nth| io(handle, nth, IoOp::Read, at(nth), 0)).collect()) {
            assert_eq!((answer.result, filled_with(&answer)), (Ok(()), fill(answer.user)), "round {round}");
        }
        if stop.load(Ordering::Acquire) {
            return round;
        }
    }
    0
}

#[test]
fn a_driver_that_breaks_down_and_a_device_that_is_lost_are_both_replaced() {
    let bed = bed("test/trap-at-100", 2);
    let handles = [bed.open(0), bed.open(1)];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let clients = handles.iter().zip(0..).map(|(handle, lane)| scope.spawn(move || work(handle, lane, stop)));
        let clients: Vec<_> = clients.collect();
        for loss in 0..40 {
            let before = bed.sim.stats().answered;
            assert!(bed.sim.wait_until(PATIENCE, |stats| stats.answered > before + 400), "they stand still");
            bed.sim.die();
            until("a new session", || bed.sim.stats().sessions >= loss + 2 && bed.binding.phase() == Phase::Serving);
        }
        stop.store(true, Ordering::Release);
        clients.into_iter().for_each(|client| assert!(client.join().unwrap() > 1));
    });
    assert!(bed.binding.crash_count() > 10, "{} crashes", bed.binding.crash_count());
    drop(handles);
    bed.is_clean();
}

#[test]
fn an_unload_at_any_moment_of_a_return_leaves_nothing() {
    for round in 0..40_u64 {
        let bed = bed("virtio-blk", 2);
        let handles = [bed.open(0), bed.open(1)];
        std::thread::scope(|scope| {
            for handle in &handles {
                scope.spawn(move || {
                    let mut out = Vec::new();
                    for user in 0.. {
                        let Ok(buffer) = handle.lease(BLOCK) else { break };
                        let mut request = vec![crate::bed::bare(user, IoOp::Write, 0, BLOCK)];
                        request[0].buffer = Some(buffer);
                        match handle.submit(&mut request) {
                            Ok(()) | Err(SubmitError::Full | SubmitError::Held) => {}
                            Err(_) => break,
                        }
                        handle.poll(false, &mut out);
                        out.clear();
                    }
                });
            }
            assert!(bed.sim.wait_until(PATIENCE, |stats| stats.answered > 20));
            bed.sim.die();
            // From before the loss is noticed until the device is back, which takes some milliseconds.
            std::thread::sleep(Duration::from_micros(round * 500));
            let certificate = bed.manager.unload_binding(&bed.binding, &UnloadOptions::default()).unwrap();
            assert!(matches!(certificate.outcome, Outcome::Unloaded | Outcome::Removed), "{certificate:?}");
            assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "round {round}: {certificate:?}");
            assert_eq!(bed.sim.violations(), []);
        });
        // The device is free again.
        until("it can be claimed", || bed.sim.transport(cofferdam_sim::Drive::Threads).is_ok());
    }
}
