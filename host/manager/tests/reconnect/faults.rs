//! A driver that breaks down over the device that came back: it is tried again, as often and as soon as its policy for restarts says.

use std::time::Duration;

use cofferdam_manager::{Phase, RestartPolicy};

use super::bed::{Bed, MIB, disk, read, until, write};

const LONG: Duration = Duration::from_secs(60);
/// Panics in `attach` to a disk of 24 MiB (`tests/guests/hostile`).
const DRIVER: &str = "test/trap-attach-24m";
const POISON: u64 = 24 * MIB;

/// The device is lost, and what comes in its place breaks the driver down.
fn comes_back_as_poison(bed: &Bed) {
    bed.slot.empty();
    bed.sim.die();
    bed.until(Phase::Recovering);
    bed.sim.resize(POISON).unwrap();
    bed.slot.put(&bed.sim);
}

#[test]
fn a_driver_that_breaks_down_over_a_device_that_came_back_is_tried_again() {
    let spool = tempfile::tempdir().unwrap();
    let bed = Bed::with(disk(|_| {}), DRIVER, LONG, |spec| spec.crash_dir = Some(spool.path().to_owned()));
    let handle = bed.open(0);
    assert_eq!(write(&handle, 0, 7), Ok(()));
    comes_back_as_poison(&bed);
    until("two attempts", || bed.binding.crash_count() >= 2);
    assert_eq!((bed.binding.phase(), bed.given_up()), (Phase::Recovering, Vec::new()));
    bed.sim.resize(16 * MIB).unwrap();
    bed.until_back(1);
    assert_eq!(read(&handle, 0), 7);
    drop(handle);
    bed.is_clean();
    let crashes = bed.binding.crashes();
    assert!(crashes.iter().all(|crash| crash.lane == "control" && crash.kind == "trap"), "{crashes:#?}");
    assert!(crashes.iter().all(|crash| crash.backtrace.iter().any(|frame| frame.contains("attach"))), "{crashes:#?}");
    assert_eq!(std::fs::read_dir(spool.path()).unwrap().count(), crashes.len(), "each is written down");
}

#[test]
fn one_that_always_breaks_down_fails_the_binding_and_an_operator_can_try_again() {
    let policy =
        RestartPolicy { limit: 3, backoff: Duration::ZERO, longest: Duration::ZERO, ..RestartPolicy::default() };
    let bed = Bed::with(disk(|_| {}), DRIVER, LONG, |spec| spec.restarts = Some(policy));
    let handle = bed.open(0);
    assert_eq!(write(&handle, 0, 7), Ok(()));
    comes_back_as_poison(&bed);
    bed.until(Phase::Failed);
    // The loss is the first of three.
    assert_eq!(bed.binding.crash_count(), 3);
    let why = bed.given_up();
    assert!(why.len() == 1 && why[0].contains("too often over it"), "{why:?}");
    bed.sim.resize(16 * MIB).unwrap();
    bed.binding.restart().unwrap();
    bed.until_back(1);
    assert_eq!(read(&handle, 0), 7);
    drop(handle);
    bed.is_clean();
}
