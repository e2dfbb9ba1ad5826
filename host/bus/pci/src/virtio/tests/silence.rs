//! Silence is said when it is known, and never before.

use std::time::{Duration, Instant};

use cofferdam_device::{Silence, Transport};

use crate::virtio::VirtioPci;
use crate::virtio::testing::{Did, Gone, Model, Sim, open, prepared, setup};

/// A reset that is confirmed: it is asked for, and then the status shows that it keeps what is written.
const RESET: [Did; 3] = [Did::Status(0), Did::Status(1), Did::Status(0)];

fn running(change: impl FnOnce(&mut Model)) -> (Sim, VirtioPci) {
    let sim = Sim::new(|_| {});
    let (mut device, region) = prepared(&sim);
    let _events = device.setup_queue(setup(0, &region)).unwrap();
    device.start().unwrap();
    let mut model = sim.model();
    change(&mut model);
    model.did.clear();
    drop(model);
    (sim, device)
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

fn reason(silence: Silence) -> String {
    match silence {
        Silence::Unconfirmed { reason } => reason,
        Silence::Confirmed => panic!("confirmed"),
    }
}

#[test]
fn a_reset_that_takes_its_time_is_waited_for_over_several_calls_and_asked_for_once() {
    let (sim, mut device) = running(|model| model.faults.slow_reset = 4);
    let why = reason(device.quiesce(0, Instant::now()));
    assert!(why.contains("not finished") && why.contains("0xf"), "{why}");
    assert_eq!(device.quiesce(0, soon()), Silence::Confirmed);
    assert_eq!(device.quiesce(0, soon()), Silence::Confirmed);
    assert_eq!(sim.did(), [&RESET[..], &[Did::Quiet]].concat());
    assert!(!sim.model().master);
}

#[test]
fn what_does_not_reset_is_reset_as_a_function() {
    let (sim, mut device) = running(|model| model.faults.never_resets = true);
    let before = Instant::now();
    assert_eq!(device.quiesce(0, soon()), Silence::Confirmed);
    assert!(before.elapsed() >= Duration::from_secs(2), "the device was given its time");
    assert_eq!(sim.did(), [Did::Status(0), Did::FunctionReset, Did::Quiet]);
}

#[test]
fn what_does_not_reset_at_all_is_not_silent_though_its_dma_is_off() {
    let (sim, mut device) = running(|model| {
        model.faults.never_resets = true;
        model.faults.no_function_reset = true;
    });
    let why = reason(device.quiesce(0, soon()));
    assert!(why.contains("0xf") && why.contains("no reset") && why.contains("bus mastering is off"), "{why}");
    assert!(!sim.model().master);
    // Once more, without waiting all that time again; and then it comes to its end after all.
    reason(device.quiesce(0, soon()));
    sim.model().faults.never_resets = false;
    sim.model().status = 0;
    assert_eq!(device.quiesce(0, soon()), Silence::Confirmed);
    assert_eq!(
        sim.did().iter().filter(|did| **did == Did::Status(0)).count(),
        2,
        "one reset, and one that shows that it answers"
    );
}

#[test]
fn a_function_whose_bus_mastering_stays_on_is_not_silent() {
    let (sim, mut device) = running(|model| model.faults.never_quiet = true);
    assert!(reason(device.quiesce(0, soon())).contains("bus mastering reads on"));
    sim.model().faults.never_quiet = false;
    assert_eq!(device.quiesce(0, soon()), Silence::Confirmed);
    assert_eq!(sim.did(), [&RESET[..], &[Did::Quiet, Did::Quiet]].concat());
}

#[test]
fn all_ones_are_silence_only_where_the_function_is_known_to_be_gone() {
    let (_sim, mut device) = running(|model| model.faults.gone_at = Some((0, Gone::Ones)));
    assert_eq!(device.quiesce(7, soon()), Silence::Confirmed);

    let (sim, mut device) = running(|model| {
        model.faults.gone_at = Some((0, Gone::Ones));
        model.faults.gone_in_secret = true;
        model.faults.no_function_reset = true;
    });
    assert!(reason(device.quiesce(7, soon())).contains("all ones"));
    sim.model().faults.gone_in_secret = false;
    assert_eq!(device.quiesce(7, soon()), Silence::Confirmed, "found out later");

    let (sim, mut device) = running(|model| {
        model.faults.gone_at = Some((0, Gone::Ones));
        model.faults.gone_in_secret = true;
    });
    assert_eq!(device.quiesce(7, soon()), Silence::Confirmed, "its function was reset");
    assert!(sim.did().contains(&Did::FunctionReset));
}

#[test]
fn a_status_that_reads_zero_whatever_is_written_is_no_reset() {
    // In the machine, and its registers answer nobody: it may be at work.
    let (sim, mut device) = running(|model| {
        model.faults.gone_at = Some((0, Gone::Zero));
        model.faults.gone_in_secret = true;
        model.faults.no_function_reset = true;
    });
    assert!(reason(device.quiesce(7, soon())).contains("keeps nothing"));
    assert!(!sim.model().master);
    sim.model().faults.gone_in_secret = false;
    assert_eq!(device.quiesce(7, soon()), Silence::Confirmed, "found to be out of the machine");
}

#[test]
fn a_device_that_was_never_given_a_queue_needs_no_answer() {
    let sim = Sim::new(|_| {});
    let (mut device, _region) = prepared(&sim);
    sim.model().faults.gone_at = Some((0, Gone::Ones));
    sim.model().faults.gone_in_secret = true;
    sim.model().faults.no_function_reset = true;
    assert_eq!(device.quiesce(0, soon()), Silence::Confirmed);
    assert!(!sim.did().contains(&Did::Master(true)));
}

#[test]
fn a_device_that_is_dropped_while_it_runs_is_reset_first() {
    let (sim, device) = running(|_| {});
    drop(device);
    assert_eq!(sim.did(), [&RESET[..], &[Did::Quiet, Did::Release]].concat());
    assert!(sim.model().regions.is_empty());
}

#[test]
fn nothing_is_given_to_a_device_that_was_silenced() {
    let (_sim, mut device) = running(|_| {});
    assert_eq!(device.quiesce(0, soon()), Silence::Confirmed);
    let region = crate::virtio::testing::next_scattered();
    assert!(device.map(region.clone()).is_err());
    assert!(device.setup_queue(setup(1, &region)).is_err());
    assert!(device.start().is_err());
}

#[test]
fn one_that_was_left_running_is_opened_only_after_a_reset() {
    // It needs its time, or its function's reset, or has neither.
    open(&Sim::new(|model| model.faults.slow_reset = 3)).unwrap();

    let sim = Sim::new(|model| model.faults.never_resets = true);
    open(&sim).unwrap();
    let wanted = [Did::Status(0), Did::FunctionReset, Did::Status(1), Did::Status(3), Did::TakeBack];
    assert_eq!(sim.did()[..5], wanted);

    let sim = Sim::new(|model| {
        model.faults.never_resets = true;
        model.faults.no_function_reset = true;
    });
    let error = open(&sim).err().expect("refused").to_string();
    assert!(error.contains("does not reset") && error.contains("0xf"), "{error}");
    assert_eq!(sim.did(), [Did::Status(0), Did::FunctionReset, Did::Quiet, Did::Release]);
}
