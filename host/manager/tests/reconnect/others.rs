//! Devices that are no disks: what is given again, and what is not.

use std::sync::Arc;
use std::time::Duration;

use cofferdam_manager::{Arrivals, Binding, Completion, Handle, HandleSpec, IoError, IoOp, Offer, Phase};
use cofferdam_sim::{
    Behaviour, ConsoleProfile, Effect, EntropyProfile, Frame, NetProfile, Op, Rule, SimConsole, SimNet, SimRng,
};

use crate::bed::{PATIENCE, Slot, bare, collect, manager, spec, submit, until};

const LONG: Duration = Duration::from_secs(60);

fn send(handle: &Handle, user: u64, op: IoOp, payload: &[u8]) {
    let length = payload.len() as u32;
    let buffer = handle.lease(length).unwrap();
    buffer.write_at(0, payload).unwrap();
    submit(handle, vec![cofferdam_manager::IoRequest { buffer: Some(buffer), ..bare(user, op, 0, length) }]);
}

fn receiver(binding: &Arc<Binding>) -> Handle {
    binding.open(HandleSpec { receives: true, ..HandleSpec::default() }).unwrap()
}

fn results(answers: &[Completion]) -> Vec<Result<(), IoError>> {
    answers.iter().map(|answer| answer.result).collect()
}

fn taken(handle: &Handle, bytes: usize) -> Vec<u8> {
    let (mut got, mut arrivals) = (Vec::new(), Arrivals::new());
    until("the bytes", || {
        handle.receive(true, &mut arrivals);
        arrivals.iter().for_each(|arrival| arrival.read(&mut got).unwrap());
        arrivals.clear();
        got.len() >= bytes
    });
    got
}

fn is_back(binding: &Binding) {
    until("it is back", || binding.phase() == Phase::Serving);
}

#[test]
fn bytes_of_entropy_are_asked_for_again() {
    let (manager, slot) = (manager(), Slot::default());
    let sim = SimRng::new(EntropyProfile::default(), Behaviour::default()).unwrap();
    let binding = manager.load(spec("virtio-rng", &slot, &sim, LONG)).unwrap();
    let handle = binding.open(HandleSpec::default()).unwrap();
    sim.add_rule(Rule::always(Effect::Gate));
    (0..4).for_each(|user| send(&handle, user, IoOp::Fill, &[0; 64]));
    assert!(sim.wait_until(PATIENCE, |stats| stats.gated > 0));
    sim.clear_rules();
    sim.die();
    let answers = collect(&handle, 4);
    assert!(answers.iter().all(|answer| answer.result == Ok(()) && answer.bytes > 0), "{answers:?}");
    is_back(&binding);
    assert_eq!(sim.violations(), []);
}

#[test]
fn bytes_that_a_console_was_given_are_not_sent_twice_and_what_it_had_sent_is_not_lost() {
    let (manager, slot) = (manager(), Slot::default());
    let sim = SimConsole::new(ConsoleProfile::default(), Behaviour::default()).unwrap();
    let binding = manager.load(spec("virtio-console", &slot, &sim, LONG)).unwrap();
    let has_port = || matches!(&*binding.offer().unwrap(), Offer::Stream(streams) if !streams.ports.is_empty());
    until("the console", has_port);
    let handle = receiver(&binding);
    let _ = binding.set_open(0, true);
    send(&handle, 1, IoOp::Send, b"one ");
    assert_eq!(results(&collect(&handle, 1)), [Ok(())]);
    until("all is fed", || sim.feed(0, b"before ") == 7);
    until("it has it", || sim.waiting(0) == 0);
    sim.add_rule(Rule { op: Some(Op::Transmit), ..Rule::always(Effect::Gate) });
    send(&handle, 2, IoOp::Send, b"two ");
    assert!(sim.wait_until(PATIENCE, |stats| stats.gated == 1));
    sim.clear_rules();
    sim.die();
    assert_eq!(results(&collect(&handle, 1)), [Err(IoError::Io)], "whether it is out is not known");
    is_back(&binding);
    until("the console is named again", has_port);
    send(&handle, 3, IoOp::Send, b"three ");
    assert_eq!(results(&collect(&handle, 1)), [Ok(())]);
    assert_eq!(sim.wait_written(0, 10, PATIENCE).unwrap(), b"one three ");
    until("all is fed", || sim.feed(0, b"behind") == 6);
    assert_eq!(taken(&handle, 13), b"before behind", "in order, and once");
    assert_eq!(sim.violations(), []);
}

#[test]
fn packets_that_a_network_device_had_are_dropped_and_counted_and_the_rest_goes_on() {
    let (manager, slot) = (manager(), Slot::default());
    let sim = SimNet::new(NetProfile::default(), Behaviour::default()).unwrap();
    let binding = manager.load(spec("virtio-net", &slot, &sim, LONG)).unwrap();
    let handle = receiver(&binding);
    let frame = |number: u8| {
        let mut frame = SimNet::test_frame(100);
        frame[20] = number;
        frame
    };
    for round in 0..4_u8 {
        let dropped = binding.status().dropped;
        sim.add_rule(Rule { op: Some(Op::Transmit), ..Rule::always(Effect::Gate) });
        (0..3).for_each(|user| send(&handle, user, IoOp::Transmit, &frame(100 + round)));
        assert!(sim.wait_until(PATIENCE, |stats| stats.gated == 3));
        sim.clear_rules();
        sim.die();
        assert_eq!(results(&collect(&handle, 3)), [Err(IoError::Io); 3]);
        assert_eq!(binding.status().dropped, dropped + 3);
        until("a new session", || sim.stats().sessions == u64::from(round) + 2);
        is_back(&binding);
        send(&handle, 1, IoOp::Transmit, &frame(round));
        assert_eq!(results(&collect(&handle, 1)), [Ok(())]);
        let sent = sim.wait_sent(1, PATIENCE).unwrap();
        assert_eq!(sent.iter().map(|sent| sent.bytes[20]).collect::<Vec<_>>(), [round], "and none of the others");
        assert!(sim.inject(Frame::plain(&frame(50 + round))));
        assert_eq!(taken(&handle, 100)[20], 50 + round);
    }
    assert_eq!(sim.violations(), []);
}
