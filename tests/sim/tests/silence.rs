//! Slow, gated, hanging and dying devices, and what quiesce may say about them (DESIGN L1).

mod common;

use std::time::{Duration, Instant};

use cofferdam_device::{Silence, Transport as _, TransportError};
use cofferdam_sim::{Drive, Op, Quiescence, Stats};
use common::{Do, LIMIT, Rig, sim, sim_with};

const READ: Do = Do::Read { sector: 0, sectors: 1 };

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(20)
}

fn unconfirmed(silence: &Silence) -> bool {
    matches!(silence, Silence::Unconfirmed { .. })
}

#[test]
fn a_slow_request_takes_its_ticks_and_no_fewer() {
    let sim = sim(&["slow:3@nth=1"]);
    let mut rig = Rig::new(sim.transport(Drive::Stepped).unwrap());
    rig.add(0, 1, &READ);
    rig.add(0, 2, &READ);
    rig.publish(0);
    sim.step();
    assert_eq!(rig.pop().unwrap().unwrap().token, 2, "the second overtakes it");
    for _ in 0..2 {
        sim.step();
        assert_eq!(rig.pop(), Ok(None));
    }
    sim.step();
    assert_eq!(rig.pop().unwrap().unwrap().token, 1);
}

#[test]
fn with_threads_a_slow_request_is_answered_in_the_end() {
    let sim = sim(&["slow:5..20"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    let begun = Instant::now();
    assert_eq!(rig.status(0, &READ), 0);
    assert!(begun.elapsed() >= Duration::from_millis(4));
}

#[test]
fn the_gate_lets_through_as_many_as_it_is_told() {
    let sim = sim(&["gate@always,op=write"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    for token in 0..3 {
        rig.submit(token, &Do::Write { sector: u64::from(token), data: vec![1; 512] });
    }
    assert_eq!(rig.status(3, &READ), 0, "reads pass");
    assert!(sim.wait_until(LIMIT, |stats| stats.gated == 3));
    assert_eq!(sim.contents(0, 512).unwrap(), [0; 512], "no effect before the gate");
    sim.open_gate(2);
    assert_eq!((rig.next(0).unwrap().token, rig.next(0).unwrap().token), (0, 1));
    assert_eq!((sim.stats().gated, sim.stats().waiting), (1, 1));
    sim.open_gate(u64::MAX);
    assert_eq!(rig.next(0).unwrap().token, 2);
    assert_eq!(rig.status(4, &Do::Write { sector: 0, data: vec![1; 512] }), 0);
}

#[test]
fn a_hanging_device_is_not_silent_and_acts_when_it_is_released() {
    let sim = sim(&["hang@nth=2"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &READ), 0);
    rig.fill(1, 0xee);
    rig.submit(1, &READ);
    assert!(sim.wait_until(LIMIT, |stats| stats.hung));
    assert!(unconfirmed(&rig.transport.quiesce(1, soon())));
    rig.transport.release();
    assert_eq!(rig.data(1, 512), [0xee; 512]);
    // Nobody may have the device meanwhile.
    assert!(sim.transport(Drive::Threads).is_err());
    // The driver gave up on it, and yet it writes: this is why the memory had to be retired.
    sim.release();
    assert!(sim.wait_until(LIMIT, |stats| stats.waiting == 0));
    assert_eq!(rig.data(1, 512), [0; 512]);
    assert!(sim.wait_until(LIMIT, |_| sim.transport(Drive::Threads).is_ok()), "it lets go in the end");
}

#[test]
fn a_hang_that_ends_before_the_deadline_ends_in_silence() {
    let sim = sim(&["hang@nth=1"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    rig.submit(0, &READ);
    assert!(sim.wait_until(LIMIT, |stats| stats.hung));
    let releaser = sim.clone();
    let thread = std::thread::spawn(move || releaser.release());
    assert_eq!(rig.transport.quiesce(1, Instant::now() + LIMIT), Silence::Confirmed);
    thread.join().unwrap();
}

#[test]
fn a_reset_drops_what_was_not_executed() {
    let sim = sim(&["gate"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    rig.submit(0, &Do::Write { sector: 0, data: vec![1; 512] });
    assert!(sim.wait_until(LIMIT, |stats| stats.gated == 1));
    assert_eq!(rig.transport.quiesce(1, soon()), Silence::Confirmed);
    sim.open_gate(u64::MAX);
    assert_eq!(rig.transport.quiesce(1, soon()), Silence::Confirmed, "again");
    assert_eq!(rig.pop(), Ok(None));
    assert_eq!(sim.contents(0, 512).unwrap(), [0; 512]);
    assert_eq!(sim.stats().waiting, 0);
}

#[test]
fn a_draining_device_is_silent_when_it_has_answered() {
    let drains = |options: &mut cofferdam_sim::Options| options.quiescence = Quiescence::Drains;
    let sim_ = sim_with(&["gate@nth=1"], drains);
    let mut rig = Rig::new(sim_.transport(Drive::Threads).unwrap());
    rig.submit(0, &Do::Write { sector: 0, data: vec![1; 512] });
    assert!(unconfirmed(&rig.transport.quiesce(1, soon())));
    sim_.open_gate(1);
    assert_eq!(rig.transport.quiesce(1, Instant::now() + LIMIT), Silence::Confirmed);
    assert!(rig.pop().unwrap().is_some(), "answered, not dropped");
    assert_eq!(sim_.contents(0, 512).unwrap(), [1; 512]);

    let sim_ = sim_with(&["lie:answer-forgotten@nth=1"], drains);
    let mut rig = Rig::new(sim_.transport(Drive::Threads).unwrap());
    rig.submit(0, &READ);
    assert!(sim_.wait_until(LIMIT, |stats| stats.taken == 1));
    assert!(unconfirmed(&rig.transport.quiesce(1, soon())), "a request is unanswered for ever");
}

#[test]
fn a_dead_device_is_lost_at_once_and_silent() {
    let sim = sim(&["die@nth=2"]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &Do::Write { sector: 0, data: vec![1; 512] }), 0);
    assert!(!rig.transport.is_lost());
    rig.submit(1, &Do::Write { sector: 1, data: vec![1; 512] });
    {
        let event = rig.transport.event_fd().unwrap();
        let mut fds = [rustix::event::PollFd::new(&event, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, None).unwrap();
    }
    assert!(rig.transport.is_lost());
    assert!(matches!(rig.transport.read_config(0, &mut [0; 8]), Err(TransportError::Lost)));
    assert_eq!(rig.transport.quiesce(1, soon()), Silence::Confirmed);
    assert_eq!(sim.contents(512, 512).unwrap(), [0; 512], "not executed");
    rig.transport.release();
    rig.transport.release();
    // It comes back with the same medium.
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &READ), 0);
    assert_eq!(rig.data(0, 512), [1; 512]);
    sim.die();
    assert!(rig.transport.is_lost());
}

#[test]
fn a_frozen_device_does_not_answer_about_its_configuration() {
    let sim = sim(&[]);
    sim.hang(true);
    let mut transport = sim.transport(Drive::Threads).unwrap();
    assert!(matches!(transport.read_config(0, &mut [0; 8]), Err(TransportError::Timeout)));
    sim.release();
    transport.read_config(0, &mut [0; 8]).unwrap();
    assert!(transport.read_config(250, &mut [0; 8]).is_err());
    assert!(transport.read_config(u32::MAX, &mut [0; 8]).is_err());
}

#[test]
fn a_resize_is_told() {
    let sim = sim(&[]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    assert_eq!(rig.status(0, &Do::Read { sector: 2048, sectors: 1 }), 1);
    sim.resize(2 << 20).unwrap();
    let mut capacity = [0; 8];
    {
        let event = rig.transport.event_fd().unwrap();
        let mut fds = [rustix::event::PollFd::new(&event, rustix::event::PollFlags::IN)];
        assert_eq!(rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())), Ok(1));
    }
    assert!(!rig.transport.is_lost());
    rig.transport.read_config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), 4096);
    assert_eq!(rig.status(0, &Do::Read { sector: 2048, sectors: 1 }), 0);
}

#[test]
fn the_journal_tells_what_was_executed_once_and_in_order() {
    let sim = sim_with(&["fail:io@nth=2"], |options| options.journal = true);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    rig.status(0, &Do::Write { sector: 3, data: vec![1; 1024] });
    rig.status(0, &READ);
    let told: Vec<_> = sim
        .journal()
        .iter()
        .map(|entry| (entry.op, entry.sector, entry.payload_bytes, entry.status, entry.session))
        .collect();
    assert_eq!(told, [(Op::Write, 3, 1024, 0, 1), (Op::Read, 0, 512, 1, 1)]);
}

#[test]
fn a_sim_that_is_dropped_ends_its_threads() {
    let named = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
            .filter(|name| name.trim() == "sim-queue-17")
            .count()
    };
    // A thread gets its name only after it has started, so that is waited for as well.
    let wait_for = |count| {
        let limit = Instant::now() + LIMIT;
        while named() != count {
            assert!(Instant::now() < limit, "{} threads, not {count}", named());
            std::thread::yield_now();
        }
    };
    let sim = sim_with(&["hang"], |options| options.profile.queues = 18);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
    wait_for(1);
    rig.submit(0, &READ);
    assert!(sim.wait_until(LIMIT, |stats: &Stats| stats.hung));
    drop(rig);
    // The hanging device is still there, until its last handle goes.
    assert_eq!(named(), 1);
    drop(sim);
    wait_for(0);
}
