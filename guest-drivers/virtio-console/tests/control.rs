//! What device and driver say to each other about ports, message for message.

use cofferdam_sdk::mock::{MockDevice, MockLive, control_words};
use cofferdam_sdk::{ControlBuffers, DriverError, StreamDriver, StreamPort, VirtioDevice, VirtioDriver, VirtioError};
use cofferdam_virtio_console::{DEVICE_TYPE, VirtioConsole, feature};
use proptest::prelude::*;

/// Events of section 5.3.6.2.
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const DEVICE_REMOVE: u16 = 2;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Ports that have queues, and ports that the device may name.
const SERVED: u32 = 3;
const DECLARED: u32 = 5;

/// A message as the specification lays it out.
fn message(id: u32, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes(), rest].concat()
}

/// A driver with MULTIPORT, and its device.
struct Console {
    driver: VirtioConsole,
    live: MockLive,
}

impl Console {
    fn new() -> Self {
        let queues = 2 * SERVED as u16 + 2;
        let mut device = MockDevice { offered: feature::MULTIPORT, max_queues: queues, ..MockDevice::new(DEVICE_TYPE) };
        device.set_config(4, &DECLARED.to_le_bytes());
        let (driver, _) = VirtioConsole::attach(&mut device).unwrap();
        Self { driver, live: MockLive::new(device) }
    }

    /// The device sends `messages` in one batch; gives what the driver sent meanwhile.
    fn events(&mut self, messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
        self.live.commands.clear();
        let messages: Vec<_> = messages.iter().map(Vec::as_slice).collect();
        let words = control_words(&messages);
        self.driver.control_events(&mut self.live, ControlBuffers::new(&words)).unwrap();
        self.live.commands.clone()
    }

    fn ports(&self) -> Vec<StreamPort> {
        self.driver.properties().ports
    }
}

fn port(index: u32) -> StreamPort {
    StreamPort { index, set: index as u16, name: None, console: false, open: false, size: None }
}

#[test]
fn a_live_driver_says_that_it_is_ready_and_nothing_else() {
    let mut console = Console::new();
    console.driver.live(&mut console.live).unwrap();
    assert_eq!(console.live.commands, [message(0, DEVICE_READY, 1, &[])]);
    assert_eq!(console.ports(), []);
}

#[test]
fn without_multiport_the_device_is_told_nothing() {
    let mut device = MockDevice { max_queues: 2, ..MockDevice::new(DEVICE_TYPE) };
    let (mut driver, _) = VirtioConsole::attach(&mut device).unwrap();
    let mut live = MockLive::new(device);
    driver.live(&mut live).unwrap();
    driver.set_open(&mut live, 0, true).unwrap();
    driver.set_open(&mut live, 0, false).unwrap();
    assert_eq!(live.commands, Vec::<Vec<u8>>::new());
    assert!(driver.properties().ports[0].open, "it is not the driver's to close");
}

#[test]
fn a_port_is_added_described_and_removed_as_qemu_does_it() {
    let mut console = Console::new();
    assert_eq!(console.events(&[message(1, DEVICE_ADD, 1, &[])]), [message(1, PORT_READY, 1, &[])]);
    assert_eq!(console.ports(), [port(1)]);
    // The order in which QEMU answers PORT_READY, with the NUL that it puts behind the name.
    let described = [
        message(1, CONSOLE_PORT, 1, &[]),
        message(1, PORT_NAME, 1, b"org.example.agent\0"),
        message(1, PORT_OPEN, 1, &[]),
        message(1, RESIZE, 0, &[132, 0, 43, 0]),
    ];
    assert_eq!(console.events(&described), [message(1, PORT_OPEN, 1, &[])], "section 5.3.6.2.2");
    let name = Some("org.example.agent".to_owned());
    assert_eq!(console.ports(), [StreamPort { name, console: true, open: true, size: Some((132, 43)), ..port(1) }]);
    assert_eq!(console.events(&[message(1, PORT_OPEN, 0, &[])]), Vec::<Vec<u8>>::new());
    assert!(!console.ports()[0].open);
    assert_eq!(console.events(&[message(1, DEVICE_REMOVE, 1, &[])]), Vec::<Vec<u8>>::new());
    assert_eq!(console.ports(), []);
    // Who comes back under the number is another one.
    console.events(&[message(1, DEVICE_ADD, 1, &[])]);
    assert_eq!(console.ports(), [port(1)]);
}

#[test]
fn a_port_that_is_added_again_keeps_what_is_known_of_it() {
    let mut console = Console::new();
    console.events(&[message(0, DEVICE_ADD, 1, &[]), message(0, PORT_NAME, 1, b"a"), message(0, PORT_OPEN, 1, &[])]);
    assert_eq!(console.events(&[message(0, DEVICE_ADD, 1, &[])]), [message(0, PORT_READY, 1, &[])]);
    assert_eq!(console.ports(), [StreamPort { name: Some("a".into()), open: true, ..port(0) }]);
}

#[test]
fn a_port_without_queues_is_refused_and_one_beyond_all_is_ignored() {
    let mut console = Console::new();
    for (id, answer) in
        [(SERVED - 1, Some(1)), (SERVED, Some(0)), (DECLARED - 1, Some(0)), (DECLARED, None), (u32::MAX, None)]
    {
        let answers: Vec<_> = answer.map(|value| message(id, PORT_READY, value, &[])).into_iter().collect();
        assert_eq!(console.events(&[message(id, DEVICE_ADD, 1, &[])]), answers, "port {id}");
    }
    assert_eq!(console.ports(), [port(SERVED - 1)]);
}

#[test]
fn messages_that_make_no_sense_change_nothing_and_are_answered_by_nothing() {
    let mut console = Console::new();
    console.events(&[message(0, DEVICE_ADD, 1, &[])]);
    let before = console.ports();
    let mut nonsense = vec![
        message(0, DEVICE_READY, 1, &[]),
        message(0, PORT_READY, 1, &[]),
        message(0, 8, 1, &[]),
        message(0, u16::MAX, 1, &[]),
        message(0, RESIZE, 0, &[80, 0, 25]),
    ];
    nonsense.extend((0..8).map(|length| message(0, DEVICE_REMOVE, 0, &[])[..length].to_vec()));
    for id in [1, SERVED, DECLARED, u32::MAX] {
        for event in [DEVICE_REMOVE, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME] {
            nonsense.push(message(id, event, 1, &[1, 0, 1, 0]));
        }
    }
    for message in nonsense {
        assert_eq!(console.events(std::slice::from_ref(&message)), Vec::<Vec<u8>>::new(), "{message:?}");
        assert_eq!(console.ports(), before, "{message:?}");
    }
}

#[test]
fn a_name_is_cut_between_characters_and_an_empty_one_is_none() {
    let mut console = Console::new();
    console.events(&[message(0, DEVICE_ADD, 1, &[])]);
    let long = "\u{e4}".repeat(100);
    let cases: [(&[u8], Option<String>); 5] = [
        (b"\0", None),
        (b"", None),
        (b"a\0b\0\0", Some("a\0b".into())),
        (long.as_bytes(), Some("\u{e4}".repeat(64))),
        (&[0xff; 240], Some("\u{fffd}".repeat(42))),
    ];
    for (bytes, name) in cases {
        console.events(&[message(0, PORT_NAME, 1, bytes)]);
        assert_eq!(console.ports()[0].name, name);
    }
}

#[test]
fn a_size_is_shown_of_a_console_alone_and_zero_is_unknown() {
    let mut console = Console::new();
    console.events(&[message(2, DEVICE_ADD, 1, &[]), message(2, RESIZE, 0, &[80, 0, 25, 0])]);
    assert_eq!(console.ports()[0].size, None);
    console.events(&[message(2, CONSOLE_PORT, 1, &[])]);
    assert_eq!(console.ports()[0].size, Some((80, 25)));
    console.events(&[message(2, RESIZE, 0, &[80, 0, 0, 0, 9])]);
    assert_eq!(console.ports()[0].size, None);
}

#[test]
fn configuration_space_changes_no_size_that_came_by_message() {
    let mut console = Console::new();
    let adds =
        [message(0, DEVICE_ADD, 1, &[]), message(0, CONSOLE_PORT, 1, &[]), message(0, RESIZE, 0, &[80, 0, 25, 0])];
    console.events(&adds);
    // Nor is it read, so a device that is gone does not matter.
    console.live.device.lost = true;
    console.driver.config_changed(&mut console.live.device).unwrap();
    assert_eq!(console.ports()[0].size, Some((80, 25)));
}

#[test]
fn the_device_is_told_when_a_port_is_opened_or_closed_here() {
    let mut console = Console::new();
    console.events(&[message(1, DEVICE_ADD, 1, &[])]);
    console.live.commands.clear();
    for open in [true, false] {
        console.driver.set_open(&mut console.live, 1, open).unwrap();
    }
    assert_eq!(console.live.commands, [message(1, PORT_OPEN, 1, &[]), message(1, PORT_OPEN, 0, &[])]);
    for absent in [0, SERVED, u32::MAX] {
        let refused = console.driver.set_open(&mut console.live, absent, true);
        assert!(matches!(refused, Err(DriverError::Host(_))), "port {absent}");
    }
    assert_eq!(console.live.commands.len(), 2);
    assert!(!console.ports()[0].open, "what is said here is not what the other side says");
}

#[test]
fn a_device_that_answers_no_command_is_the_devices_fault() {
    let silent = || Err(VirtioError::Device("no answer in time".into()));
    let mut console = Console::new();
    console.live.answers.push_back(silent());
    assert!(matches!(console.driver.live(&mut console.live), Err(DriverError::Device(_))));

    let mut console = Console::new();
    console.live.answers.extend([Ok(Vec::new()), silent()]);
    let adds = [0, 1, 2].map(|id| message(id, DEVICE_ADD, 1, &[]));
    let words = control_words(&adds.each_ref().map(Vec::as_slice));
    let events = console.driver.control_events(&mut console.live, ControlBuffers::new(&words));
    assert!(matches!(events, Err(DriverError::Device(_))));
    assert_eq!(console.live.commands.len(), 2, "nothing is sent after that");
    assert!(matches!(console.driver.set_open(&mut console.live, 0, true), Err(DriverError::Device(_))));
}

/// Sent to the device by one instance is known to the next: it announces itself, and the device says all again.
#[test]
fn an_instance_that_replaces_another_learns_its_ports_from_the_device() {
    let said = [message(0, DEVICE_ADD, 1, &[]), message(0, PORT_NAME, 1, b"again"), message(0, PORT_OPEN, 1, &[])];
    let (mut first, mut second) = (Console::new(), Console::new());
    first.events(&said);
    second.live = first.live.clone();
    second.live.commands.clear();
    second.driver.live(&mut second.live).unwrap();
    assert_eq!(second.live.commands, [message(0, DEVICE_READY, 1, &[])]);
    second.events(&said);
    assert_eq!(first.ports(), second.ports());
}

/// Mostly messages about ports that there could be, with events that there are.
fn any_message() -> impl Strategy<Value = Vec<u8>> {
    let id = prop_oneof![6 => 0..=DECLARED, 1 => any::<u32>()];
    let event = prop_oneof![8 => 0..=8_u16, 1 => any::<u16>()];
    let sensible = (id, event, any::<u16>(), prop::collection::vec(any::<u8>(), 0..=248))
        .prop_map(|(id, event, value, rest)| message(id, event, value, &rest));
    prop_oneof![8 => sensible, 1 => prop::collection::vec(any::<u8>(), 0..=256)]
}

/// What a port went through, kept the simplest way there is: the last message of each kind since it was added.
fn replay(messages: &[Vec<u8>], id: u32) -> Option<(bool, bool)> {
    let mut port = None;
    for bytes in messages.iter().filter(|bytes| bytes.len() >= 8 && bytes[..4] == id.to_le_bytes()) {
        let (event, value) = (u16::from_le_bytes([bytes[4], bytes[5]]), u16::from_le_bytes([bytes[6], bytes[7]]));
        port = match (event, port) {
            (DEVICE_ADD, None) => Some((false, false)),
            (DEVICE_REMOVE, _) => None,
            (CONSOLE_PORT, Some((_, open))) => Some((true, open)),
            (PORT_OPEN, Some((console, _))) => Some((console, value != 0)),
            (_, same) => same,
        };
    }
    port
}

proptest! {
    /// Whatever the device sends: no panic, ports within the contract's bounds and those of a model, one answer at most to each message.
    #[test]
    fn no_message_takes_the_driver_out_of_its_bounds(messages in prop::collection::vec(any_message(), 0..=64)) {
        let mut console = Console::new();
        let answers = console.events(&messages);
        prop_assert!(answers.len() <= messages.len());
        for answer in &answers {
            prop_assert_eq!(answer.len(), 8);
            let event = u16::from_le_bytes([answer[4], answer[5]]);
            prop_assert!(event == PORT_READY || event == PORT_OPEN);
            prop_assert!(u32::from_le_bytes([answer[0], answer[1], answer[2], answer[3]]) < DECLARED);
        }
        let ports = console.ports();
        for number in 0..SERVED {
            let seen = ports.iter().find(|port| port.index == number);
            prop_assert_eq!(seen.map(|port| (port.console, port.open)), replay(&messages, number));
        }
        prop_assert!(ports.len() <= SERVED as usize);
        for (at, port) in ports.iter().enumerate() {
            prop_assert!(port.index < SERVED && u32::from(port.set) == port.index);
            prop_assert!(ports[..at].iter().all(|other| other.index < port.index));
            prop_assert!(port.name.as_ref().is_none_or(|name| (1..=128).contains(&name.len())));
            prop_assert!(port.console || port.size.is_none());
            prop_assert!(port.size.is_none_or(|(cols, rows)| cols > 0 && rows > 0));
        }
    }

    /// Words that are no buffers at all do no harm either.
    #[test]
    fn words_that_are_no_buffers_end_the_batch(words in prop::collection::vec(any::<u32>(), 0..=64)) {
        let mut console = Console::new();
        console.driver.control_events(&mut console.live, ControlBuffers::new(&words)).unwrap();
        prop_assert!(console.ports().len() <= SERVED as usize);
    }

    /// Whatever configuration space says.
    #[test]
    fn no_configuration_plans_a_queue_that_is_not_there(
        config in prop::collection::vec(any::<u8>(), 0..=12),
        offered in 0..=feature::OF_A_CONSOLE,
        max_queues in prop_oneof![1..=70_u16, any::<u16>()],
        max_queue_size in any::<u16>(),
    ) {
        let mut device = MockDevice { offered, max_queues, max_queue_size, config, ..MockDevice::new(DEVICE_TYPE) };
        if let Ok((driver, attachment)) = VirtioConsole::attach(&mut device) {
            prop_assert_eq!(Some(attachment.features), device.negotiated);
            prop_assert!((2..=64).contains(&attachment.queues.len()) && attachment.queues.len() % 2 == 0);
            for (at, queue) in attachment.queues.iter().enumerate() {
                prop_assert!(queue.index < max_queues && queue.size.is_power_of_two());
                prop_assert!(queue.size <= device.max_queue_size(queue.index));
                prop_assert!(attachment.queues[..at].iter().all(|other| other.index != queue.index));
            }
            prop_assert!(driver.properties().ports.len() <= 1);
        }
    }
}
