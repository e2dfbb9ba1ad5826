//! Interrupts reach the queues they are for, whatever the function has.

use std::os::fd::{AsFd, BorrowedFd};

use cofferdam_device::{QueueEvents, Transport, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::claimed::Interrupts;
use crate::virtio::VirtioPci;
use crate::virtio::testing::{Did, Gone, Model, Sim, prepared, setup};

/// Three queues, started.
fn started(sim: &Sim) -> (VirtioPci, Vec<QueueEvents>) {
    let (mut device, region) = prepared(sim);
    let events = (0..3).map(|index| device.setup_queue(setup(index, &region)).unwrap()).collect();
    device.start().unwrap();
    (device, events)
}

fn readable(fd: BorrowedFd<'_>, wait_seconds: i64) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: wait_seconds, tv_nsec: 0 })).unwrap() > 0
}

fn take(fd: BorrowedFd<'_>) {
    rustix::io::read(fd, &mut [0; 8]).unwrap();
}

fn wirings(sim: &Sim) -> Vec<Did> {
    sim.did().into_iter().filter(|did| matches!(did, Did::Vectors(_) | Did::Line(_))).collect()
}

/// Asks the function of the line that was asserted, as a backend does.
fn assert_line(sim: &Sim) -> bool {
    // Outside of the model's lock, which the registers need.
    let wired = sim.model().wired.take();
    let Some(Interrupts::Line { mut acknowledge, signal }) = wired else { panic!("no line is wired") };
    let ours = acknowledge();
    if ours {
        signal.iter().for_each(crate::virtio::testing::ring);
    }
    sim.model().wired = Some(Interrupts::Line { acknowledge, signal });
    ours
}

/// What is wrong with the device, and what is done about its interrupts.
type Case = (fn(&mut Model), &'static [Did]);

#[test]
fn each_queue_has_a_vector_where_there_are_enough() {
    let sim = Sim::new(|_| {});
    let (mut device, events) = started(&sim);
    assert_eq!(wirings(&sim), [Did::Vectors(4)]);
    sim.model().interrupt(2);
    assert!(readable(events[1].call.as_fd(), 10));
    assert!(!readable(events[0].call.as_fd(), 0) && !readable(events[2].call.as_fd(), 0));
    assert!(!readable(device.event_fd().unwrap(), 0));
    sim.model().interrupt(0);
    assert!(readable(device.event_fd().unwrap(), 10), "the configuration changed");
    assert!(!device.is_lost() && device.take_config_change());
    assert!(!device.take_config_change(), "said once");
    assert!(!readable(device.event_fd().unwrap(), 0), "and that was noticed");
    (0..3).for_each(|_| sim.model().interrupt(0));
    assert!(!device.is_lost() && device.take_config_change() && !device.take_config_change(), "three are one");
    sim.model().interrupt(2);
    assert!(!device.is_lost() && !device.take_config_change(), "a queue's vector is no change");
    for event in &events {
        let flags = rustix::fs::fcntl_getfl(&event.call).unwrap();
        assert!(flags.contains(rustix::fs::OFlags::NONBLOCK));
        assert!(rustix::io::fcntl_getfd(&event.call).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[test]
fn one_vector_reaches_every_queue_where_there_are_too_few() {
    let few: [Case; 3] = [
        // The function has no more, or not so many may be used; or the device has no room for more, and says so.
        (|model| model.msix = 3, &[Did::Vectors(2)]),
        (|model| model.config_space[0x42] = 1, &[Did::Vectors(2)]),
        (|model| model.faults.vectors_end = Some(3), &[Did::Vectors(4), Did::Vectors(2)]),
    ];
    for (fault, wanted) in few {
        let sim = Sim::new(fault);
        let (mut device, events) = started(&sim);
        assert_eq!(wirings(&sim), wanted);
        assert!(sim.model().queues[..3].iter().all(|queue| queue.vector == 1));
        for _ in 0..3 {
            sim.model().interrupt(1);
            // Whoever empties one takes nothing from the others.
            for event in &events {
                assert!(readable(event.call.as_fd(), 10));
                take(event.call.as_fd());
            }
        }
        sim.model().interrupt(0);
        assert!(readable(device.event_fd().unwrap(), 10));
        assert!(!device.is_lost() && device.take_config_change());
        device.release();
    }
}

#[test]
fn the_line_serves_where_there_are_no_vectors() {
    let none: [Case; 4] = [
        (|model| model.msix = 0, &[Did::Line(3)]),
        (|model| model.config_space[0x40] = 0, &[Did::Line(3)]),
        (|model| model.faults.refuses_vectors = true, &[Did::Line(3)]),
        (|model| model.faults.vectors_end = Some(0), &[Did::Vectors(4), Did::Vectors(2), Did::Line(3)]),
    ];
    for (fault, wanted) in none {
        let sim = Sim::new(fault);
        let (mut device, events) = started(&sim);
        assert_eq!(wirings(&sim), wanted);
        assert!(sim.model().queues.iter().all(|queue| queue.vector == 0xffff));
        assert!(!assert_line(&sim), "the line is another function's");
        assert!(events.iter().all(|event| !readable(event.call.as_fd(), 0)));
        sim.model().isr = 1;
        assert!(assert_line(&sim));
        assert_eq!(sim.model().isr, 0, "acknowledged");
        assert!(events.iter().all(|event| readable(event.call.as_fd(), 10)));
        assert!(!readable(device.event_fd().unwrap(), 0));
        assert!(!device.is_lost() && !device.take_config_change(), "bit 0 is the queues'");
        sim.model().isr = 2;
        assert!(assert_line(&sim));
        assert!(readable(device.event_fd().unwrap(), 10), "the configuration changed");
        assert!(!device.is_lost() && device.take_config_change());
        sim.model().isr = 3;
        assert!(assert_line(&sim), "both at once");
        assert!(!device.is_lost() && device.take_config_change());
        sim.remove(Gone::Ones);
        assert!(!assert_line(&sim), "nobody's answer is no reason");
        assert!(readable(device.event_fd().unwrap(), 10), "somebody has to look");
        assert!(device.is_lost());
    }
}

#[test]
fn a_function_that_cannot_interrupt_is_refused() {
    let sim = Sim::new(|model| (model.msix, model.line) = (0, false));
    let (mut device, region) = prepared(&sim);
    let _events = device.setup_queue(setup(0, &region)).unwrap();
    match device.start() {
        Err(TransportError::Refused(why)) => assert!(why.contains("interrupt"), "{why}"),
        other => panic!("{other:?}"),
    }
}
