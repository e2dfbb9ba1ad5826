//! The console device.

use cofferdam_sim::console::ControlMessage;
use cofferdam_sim::console::{
    CONSOLE_PORT, DEVICE_READY, MESSAGE_BYTES, PORT_ADD, PORT_NAME, PORT_OPEN, PORT_READY, PORT_REMOVE, RESIZE,
};
use cofferdam_sim::{ConsoleProfile, Drive, PortProfile, SimConsole};

use crate::rig::{LIMIT, Rig, behaviour};

const MULTIPORT: u64 = 1 << 1;

pub(crate) fn sim(rules: &[&str]) -> SimConsole {
    let ports = vec![
        PortProfile { name: None, console: true },
        PortProfile { name: Some("org.cofferdam.test".to_owned()), console: false },
    ];
    SimConsole::new(ConsoleProfile { ports, ..ConsoleProfile::default() }, behaviour(rules)).unwrap()
}

fn say(rig: &mut Rig, id: u32, event: u16, value: u16) {
    rig.send(3, 0, &ControlMessage { id, event, value, rest: Vec::new() }.to_bytes());
    rig.next(3);
}

fn hear(rig: &mut Rig) -> (u32, u16, u16, Vec<u8>) {
    let (token, bytes) = rig.receive(2);
    rig.post(2, token, 64);
    let ControlMessage { id, event, value, rest } = ControlMessage::from_bytes(&bytes).expect("a message");
    (id, event, value, rest)
}

/// Goes through the conversation up to both ports open.
pub(crate) fn open(rig: &mut Rig) {
    for token in 0..8 {
        rig.post(2, token, 64);
    }
    say(rig, 0, DEVICE_READY, 1);
    assert_eq!([hear(rig), hear(rig)], [(0, PORT_ADD, 1, vec![]), (1, PORT_ADD, 1, vec![])]);
    say(rig, 0, PORT_READY, 1);
    let told = [hear(rig), hear(rig), hear(rig)];
    assert_eq!(told, [(0, CONSOLE_PORT, 1, vec![]), (0, RESIZE, 1, vec![80, 0, 25, 0]), (0, PORT_OPEN, 1, vec![])]);
    say(rig, 1, PORT_READY, 1);
    assert_eq!([hear(rig), hear(rig)], [(1, PORT_NAME, 1, b"org.cofferdam.test".to_vec()), (1, PORT_OPEN, 1, vec![])]);
    say(rig, 0, PORT_OPEN, 1);
    say(rig, 1, PORT_OPEN, 1);
}

#[test]
fn configuration_space_has_size_and_number_of_ports() {
    let sim = sim(&[]);
    let mut rig = Rig::new(sim.transport(Drive::Stepped).unwrap(), 0);
    assert_eq!((rig.transport.device_type(), rig.transport.max_queues()), (Some(3), 10));
    assert_eq!(rig.config(12), [80, 0, 25, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    sim.resize(300, 100);
    assert!(rig.is_told());
    assert_eq!(rig.config(4), [44, 1, 100, 0]);
}

#[test]
fn ports_are_announced_opened_and_carry_bytes_both_ways() {
    let sim = sim(&[]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    assert_eq!(sim.feed(1, b"early"), 5);
    rig.post(4, 0, 3);
    rig.post(4, 1, 3);
    assert!(!sim.is_open(1));
    open(&mut rig);
    assert!(sim.wait_open(1, true, LIMIT));
    assert_eq!([rig.receive(4), rig.receive(4)], [(0, b"ear".to_vec()), (1, b"ly".to_vec())]);
    rig.send(1, 0, b"to the ");
    rig.send(1, 1, b"console");
    rig.send(5, 0, b"to port 1");
    assert_eq!(sim.wait_written(0, 14, LIMIT).unwrap(), b"to the console");
    assert_eq!(sim.wait_written(1, 9, LIMIT).unwrap(), b"to port 1");
    assert_eq!(sim.violations(), []);
    say(&mut rig, 1, PORT_OPEN, 0);
    assert!(sim.wait_open(1, false, LIMIT));
}

#[test]
fn the_other_side_closes_resizes_adds_and_removes() {
    let sim = sim(&[]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    open(&mut rig);
    sim.set_open(1, false);
    assert_eq!(hear(&mut rig), (1, PORT_OPEN, 0, vec![]));
    sim.resize(132, 43);
    assert_eq!(hear(&mut rig), (0, RESIZE, 1, vec![132, 0, 43, 0]));
    sim.add_port(3, PortProfile::default());
    assert_eq!(hear(&mut rig), (3, PORT_ADD, 1, vec![]));
    sim.remove_port(1);
    assert_eq!(hear(&mut rig), (1, PORT_REMOVE, 1, vec![]));
    assert!(!sim.is_open(1));
    // One that is not there is not removed twice by a claim of the driver.
    say(&mut rig, 1, PORT_READY, 1);
    say(&mut rig, u32::MAX, PORT_OPEN, 1);
    sim.send_control(b"last");
    assert_eq!(rig.receive(2).1, b"last");
}

#[test]
fn without_multiport_there_is_one_port_that_is_always_open() {
    let sim = sim(&[]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), MULTIPORT);
    rig.post(0, 0, 64);
    sim.feed(0, b"login: ");
    assert_eq!(rig.receive(0).1, b"login: ");
    rig.send(1, 0, b"root");
    assert_eq!(sim.wait_written(0, 4, LIMIT).unwrap(), b"root");
}

/// Sends `total` bytes through an echoing port, reading only when nothing more can be sent.
pub(crate) fn paste(rig: &mut Rig, total: u32) {
    let byte = |at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8;
    for token in 0..16 {
        rig.post(0, token, 1000);
    }
    let (mut sent, mut got, mut token) = (0u32, 0u32, 0);
    while got < total {
        while sent < total && rig.in_flight(1) < 32 {
            let bytes: Vec<u8> = (sent..total.min(sent + 4096)).map(byte).collect();
            sent += bytes.len() as u32;
            rig.send(1, token, &bytes);
            token += 1;
        }
        while rig.pop(1).unwrap().is_some() {}
        let (buffer, bytes) = rig.receive(0);
        assert!(bytes.iter().zip(got..).all(|(found, at)| *found == byte(at)), "after {got} bytes");
        got += bytes.len() as u32;
        rig.post(0, buffer, 1000);
    }
    assert_eq!(got, total);
}

#[test]
fn a_paste_of_4_mib_comes_back_whole_and_in_order() {
    let sim = sim(&[]);
    sim.set_echo(0, true);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), MULTIPORT);
    paste(&mut rig, 4 << 20);
    assert_eq!(sim.waiting(0), 0);
}

#[test]
fn an_echo_that_nobody_reads_holds_the_driver_back() {
    let sim = sim(&[]);
    sim.set_echo(0, true);
    let mut rig = Rig::new(sim.transport(Drive::Stepped).unwrap(), MULTIPORT);
    let mut answered = 0;
    // 2 MiB, of which one fits.
    for token in 0..512 {
        if rig.in_flight(1) < 32 {
            rig.send(1, token, &[1; 4096]);
        }
        sim.step();
        answered += u32::from(rig.pop(1).unwrap().is_some());
    }
    assert_eq!((answered, sim.waiting(0)), (256, 1 << 20));
    rig.post(0, 0, 4096);
    sim.step();
    assert!(rig.pop(0).unwrap().is_some() && rig.pop(1).unwrap().is_some(), "it goes on when it is read");
}

#[test]
fn floods_have_as_many_bytes_and_messages_as_there_are_buffers() {
    let sim = sim(&[]);
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    open(&mut rig);
    sim.set_flood(0, true);
    for token in 0..20 {
        rig.post(0, token, 500);
    }
    let bytes: Vec<u8> = (0..20).flat_map(|_| rig.receive(0).1).collect();
    assert!(bytes.iter().zip(0..).all(|(byte, at)| *byte == SimConsole::flood_byte(at)) && bytes.len() == 10_000);
    let resize = ControlMessage { id: 0, event: RESIZE, value: 1, rest: vec![1, 0, 1, 0] };
    sim.flood_control(&resize.to_bytes(), 1000);
    for _ in 0..1000 {
        assert_eq!(hear(&mut rig), (0, RESIZE, 1, vec![1, 0, 1, 0]));
    }
    assert_eq!(rig.pop(2), Ok(None));
}

#[test]
fn every_lie_in_a_control_message_is_told() {
    let told = |lie: &str| {
        let sim = sim(&[&format!("lie:{lie},op=message")]);
        let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
        rig.post(2, 0, 64);
        say(&mut rig, 0, DEVICE_READY, 1);
        rig.receive(2).1
    };
    let honest = told("notification-spurious");
    assert_eq!(honest, [0, 0, 0, 0, 1, 0, 1, 0]);
    let garbage = told("message-garbage");
    assert!(garbage != honest && garbage.len() == honest.len());
    assert!((1..MESSAGE_BYTES).contains(&told("message-short").len()));
    let port = ControlMessage::from_bytes(&told("port-unknown")).unwrap();
    assert!(port.id >= 4 && port.event == PORT_ADD);
    let event = ControlMessage::from_bytes(&told("event-unknown")).unwrap();
    assert!(event.id == 0 && event.event > PORT_NAME);
}
