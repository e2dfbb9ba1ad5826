//! Which devices are taken, with what features and queues, and what is said of them before they run.

use cofferdam_sdk::mock::MockDevice;
use cofferdam_sdk::{
    Attachment, DriverError, Posting, QueueOwner, QueuePlan, StreamPort, StreamProperties, VirtioDriver,
};
use cofferdam_virtio_console::{DEVICE_TYPE, MAX_PORTS, MAX_WRITE_BYTES, VirtioConsole, feature};

/// A device with `offered` features, `queues` queues, and a configuration of 80 columns, 25 rows and `ports` ports.
fn device(offered: u64, queues: u16, ports: u32) -> MockDevice {
    let mut device = MockDevice { offered, max_queues: queues, ..MockDevice::new(DEVICE_TYPE) };
    device.set_config(0, &[80, 0, 25, 0]);
    device.set_config(4, &ports.to_le_bytes());
    device
}

fn attach(device: &MockDevice) -> Result<(VirtioConsole, Attachment), DriverError> {
    VirtioConsole::attach(&mut device.clone())
}

fn posted(index: u16, size: u16, owner: QueueOwner, buffer_bytes: u32) -> QueuePlan {
    QueuePlan::posted(index, size, owner, Posting { buffer_bytes, buffers: size, head_bytes: 0 })
}

fn the_port(size: Option<(u16, u16)>) -> StreamProperties {
    let port = StreamPort { index: 0, set: 0, name: None, console: true, open: true, size };
    StreamProperties { ports: vec![port], max_write_bytes: MAX_WRITE_BYTES }
}

#[test]
fn a_device_without_multiport_is_one_open_console_with_two_queues() {
    let mut simple = device(feature::SIZE | feature::EMERG_WRITE, 2, 0);
    let (driver, attachment) = VirtioConsole::attach(&mut simple).unwrap();
    assert_eq!(simple.negotiated, Some(feature::SIZE), "emergency write is not accepted");
    let queues = vec![posted(0, 16, QueueOwner::Set(0), 4096), QueuePlan::requests(1, 16, Some(Vec::new()), 0)];
    assert_eq!(attachment, Attachment { features: feature::SIZE, queues, state: Vec::new() });
    assert_eq!(driver.properties(), the_port(Some((80, 25))));
}

#[test]
fn multiport_gives_the_control_lane_two_queues_and_each_port_a_set() {
    let offered = feature::SIZE | feature::MULTIPORT;
    let (driver, attachment) = attach(&device(offered, 64, 3)).unwrap();
    assert_eq!(attachment.features, offered);
    let requests = |index, set| QueuePlan::requests(index, 16, Some(Vec::new()), set);
    let commands = QueuePlan { index: 3, size: 64, ordinary_response: None, owner: QueueOwner::Control, posting: None };
    let queues = [
        posted(0, 16, QueueOwner::Set(0), 4096),
        requests(1, 0),
        posted(4, 16, QueueOwner::Set(1), 4096),
        requests(5, 1),
        posted(6, 16, QueueOwner::Set(2), 4096),
        requests(7, 2),
        posted(2, 64, QueueOwner::Control, 256),
        commands,
    ];
    assert_eq!(attachment.queues, queues);
    assert_eq!(driver.properties().ports, [], "ports come by message");
}

#[test]
fn as_many_ports_are_planned_as_have_queues_and_fit_into_a_plan() {
    for (queues, max_ports, served) in [
        (4, 1, 1),
        (4, 31, 1),
        (5, 31, 1),
        (6, 31, 2),
        (64, 31, 31),
        (64, 30, 30),
        (1024, 511, 31),
        (u16::MAX, 32_767, 31),
    ] {
        let (_, attachment) = attach(&device(feature::MULTIPORT, queues, max_ports)).unwrap();
        assert_eq!(attachment.queues.len(), 2 * served + 2, "{queues} queues, {max_ports} ports");
        assert!(attachment.queues.len() <= 64 && served <= MAX_PORTS as usize);
        assert!(attachment.queues.iter().all(|queue| queue.index < queues));
    }
}

#[test]
fn without_room_for_control_queues_port_0_is_served_alone() {
    for queues in [2, 3] {
        let mut narrow = device(feature::MULTIPORT | feature::SIZE, queues, 4);
        let (driver, attachment) = VirtioConsole::attach(&mut narrow).unwrap();
        assert_eq!((narrow.negotiated, attachment.queues.len()), (Some(feature::SIZE), 2));
        assert_eq!(driver.properties(), the_port(Some((80, 25))));
    }
}

#[test]
fn rings_are_powers_of_two_that_the_device_has() {
    for (max, port, control) in [(1, 1, 1), (3, 2, 2), (24, 16, 16), (32, 16, 32), (100, 16, 64), (u16::MAX, 16, 64)] {
        let device = MockDevice { max_queue_size: max, ..device(feature::MULTIPORT, 4, 1) };
        let (_, attachment) = attach(&device).unwrap();
        assert_eq!(
            attachment.queues.iter().map(|queue| queue.size).collect::<Vec<_>>(),
            [port, port, control, control]
        );
        for queue in attachment.queues {
            assert!(queue.posting.is_none_or(|posting| posting.buffers == queue.size));
        }
    }
}

#[test]
fn a_device_that_breaks_its_specification_is_refused() {
    let broken = |device: &MockDevice| match attach(device) {
        Err(DriverError::Device(text)) => text,
        other => panic!("{other:?}"),
    };
    for ports in [0, 32_768, u32::MAX] {
        assert!(broken(&device(feature::MULTIPORT, 64, ports)).contains("max_nr_ports"));
    }
    assert!(broken(&device(0, 1, 1)).contains("receiveq"));
    assert!(broken(&MockDevice { max_queue_size: 0, ..device(0, 2, 1) }).contains("receiveq"));
    let short = MockDevice { config: vec![80, 0], ..device(feature::SIZE, 2, 1) };
    assert!(broken(&short).contains("configuration"));
    assert!(broken(&MockDevice { lost: true, ..device(0, 2, 1) }).contains("gone"));
}

#[test]
fn a_device_without_fields_is_not_asked_for_any() {
    let bare = MockDevice { config: Vec::new(), ..device(0, 2, 1) };
    assert_eq!(attach(&bare).unwrap().0.properties(), the_port(None));
}

#[test]
fn devices_of_other_kinds_are_left_to_other_drivers() {
    let refused = |device: &MockDevice| matches!(attach(device), Err(DriverError::NotMine(_)));
    for other in [0, 1, 2, 4, u32::MAX] {
        assert!(refused(&MockDevice { device_type: Some(other), ..device(0, 2, 1) }));
    }
    // Where the transport cannot tell, it is decided by what the device shows.
    let unknown = |offered, queues, ports| MockDevice { device_type: None, ..device(offered, queues, ports) };
    for bit in 3..64 {
        assert!(refused(&unknown(feature::SIZE | 1 << bit, 2, 1)), "feature {bit}");
    }
    assert!(refused(&unknown(0, 1, 1)), "too few queues");
    assert!(refused(&unknown(feature::MULTIPORT, 64, 0)), "no ports");
    for offered in 0..=feature::OF_A_CONSOLE {
        assert!(attach(&unknown(offered, 64, 2)).is_ok(), "features {offered:#x}");
    }
}

#[test]
fn a_size_that_changes_is_read_again_without_multiport() {
    let mut device = device(feature::SIZE, 2, 1);
    let (mut driver, _) = VirtioConsole::attach(&mut device).unwrap();
    for (config, size) in [([132, 0, 43, 0], Some((132, 43))), ([0, 1, 1, 0], Some((256, 1))), ([0, 0, 43, 0], None)] {
        device.set_config(0, &config);
        driver.config_changed(&mut device).unwrap();
        assert_eq!(driver.properties(), the_port(size));
    }
    device.lost = true;
    assert!(matches!(driver.config_changed(&mut device), Err(DriverError::Device(_))));
}
