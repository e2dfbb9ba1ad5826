//! The control lane against the SDK's mock device: what is negotiated, what is believed, what is refused, which queues are planned and how many pairs are used.

mod common;

use cofferdam_sdk::mock::{MockDevice, MockLive};
use cofferdam_sdk::{
    Attachment, DriverError, LaneSetup, NetProperties, Offloads, Posting, QueueOwner, QueuePlan, VirtioDevice,
    VirtioDriver, VirtioError,
};
use cofferdam_virtio_net::{VirtioNet, feature};
use common::{MAC, device, everything};
use proptest::prelude::*;

fn attach(mut device: MockDevice) -> Result<(NetProperties, Attachment), DriverError> {
    let (driver, attachment) = VirtioNet::attach(&mut device)?;
    assert_eq!(device.negotiated, Some(attachment.features));
    Ok((driver.properties(), attachment))
}

fn posting(attachment: &Attachment) -> Posting {
    attachment.queues[0].posting.unwrap()
}

#[test]
fn a_device_without_features_is_one_pair_of_plain_ethernet() {
    let (properties, attachment) = attach(MockDevice { config: Vec::new(), ..device(0) }).unwrap();
    let expected = NetProperties {
        mac: None,
        mtu: 1500,
        link_up: true,
        pairs: 1,
        max_packet_bytes: 1514,
        offloads: Offloads::default(),
    };
    assert_eq!(properties, expected);
    let posting = Posting { buffer_bytes: 2048, buffers: 256, head_bytes: 12 };
    let queues =
        [QueuePlan::posted(0, 256, QueueOwner::Set(0), posting), QueuePlan::requests(1, 256, Some(Vec::new()), 0)];
    assert_eq!((attachment.features, &attachment.queues[..]), (0, &queues[..]));
}

#[test]
fn every_field_of_configuration_space_is_read_where_its_feature_says() {
    let (properties, attachment) = attach(everything()).unwrap();
    assert_eq!(attachment.features, feature::WANTED);
    let every = Offloads {
        transmit_checksum: true,
        receive_checksum: true,
        transmit_tcp4: true,
        transmit_tcp6: true,
        receive_tcp4: true,
        receive_tcp6: true,
    };
    let expected =
        NetProperties { mac: Some(MAC), mtu: 9000, link_up: true, pairs: 1, max_packet_bytes: 65_550, offloads: every };
    assert_eq!(properties, expected);
    let owners: Vec<_> = attachment.queues.iter().map(|queue| (queue.index, queue.owner)).collect();
    let pair = |n| [(2 * n, QueueOwner::Set(n)), (2 * n + 1, QueueOwner::Set(n))];
    let expected: Vec<_> = (0..4).flat_map(pair).chain([(8, QueueOwner::Control)]).collect();
    assert_eq!(owners, expected);
    let control = &attachment.queues[8];
    assert_eq!((control.size, &control.ordinary_response, control.posting), (64, &None, None));
}

#[test]
fn configuration_space_may_end_with_the_last_field_that_the_features_bring() {
    let multiqueue = feature::MQ | feature::CTRL_VQ;
    for (features, length) in [(feature::MAC, 6), (feature::STATUS, 8), (multiqueue, 10), (feature::MTU, 12)] {
        let mut device = device(features);
        device.config.truncate(length);
        attach(device.clone()).unwrap();
        device.config.truncate(length - 1);
        assert!(matches!(attach(device), Err(DriverError::Device(_))), "{length}");
    }
}

#[test]
fn a_bit_is_not_accepted_without_those_that_it_requires() {
    use feature::*;
    let cases = [
        (HOST_TSO4 | HOST_TSO6, 0),
        (CSUM | HOST_TSO4, CSUM | HOST_TSO4),
        (GUEST_TSO4 | GUEST_TSO6 | MRG_RXBUF, MRG_RXBUF),
        // Without buffers that can be joined there is no room for joined segments.
        (GUEST_CSUM | GUEST_TSO4, GUEST_CSUM),
        (GUEST_CSUM | GUEST_TSO6 | MRG_RXBUF, GUEST_CSUM | GUEST_TSO6 | MRG_RXBUF),
        (MQ, 0),
        (MQ | CTRL_VQ, MQ | CTRL_VQ),
        (CSUM | HOST_TSO | HOST_ECN | HOST_UFO, CSUM | HOST_TSO),
        (GUEST_CSUM | GUEST_TSO | MRG_RXBUF | GUEST_ECN | GUEST_UFO, GUEST_CSUM | GUEST_TSO | MRG_RXBUF),
    ];
    for (offered, accepted) in cases {
        assert_eq!(attach(device(offered)).unwrap().1.features, accepted, "{offered:#x}");
    }
}

#[test]
fn what_breaks_the_specification_is_the_devices_fault_and_says_where() {
    type Spoil = fn(&mut MockDevice);
    let cases: [(&str, Spoil); 7] = [
        ("mac [01", |d| d.set_config(0, &[1])),
        ("mac [00", |d| d.set_config(0, &[0; 6])),
        ("max_virtqueue_pairs is 0", |d| d.set_config(8, &[0, 0])),
        ("max_virtqueue_pairs is 32769", |d| d.set_config(8, &0x8001_u16.to_le_bytes())),
        ("mtu 67", |d| d.set_config(10, &67_u16.to_le_bytes())),
        ("have 1 and 1 entries", |d| d.max_queue_size = 1),
        ("have 0 and 0 entries", |d| d.max_queue_size = 0),
    ];
    for (what, spoil) in cases {
        let mut device = everything();
        spoil(&mut device);
        let Err(DriverError::Device(text)) = attach(device) else { panic!("{what} was believed") };
        assert!(text.contains(what) && text.contains("section 5.1"), "{what}: {text}");
    }
}

#[test]
fn an_mtu_is_taken_from_68_to_65521_bytes() {
    for (mtu, taken) in [(68, true), (65_521, true), (65_522, false), (65_535, false)] {
        let mut device = everything();
        device.set_config(10, &u16::to_le_bytes(mtu));
        match attach(device) {
            Ok((properties, _)) => assert!(taken && properties.mtu == mtu),
            Err(error) => assert!(!taken && matches!(error, DriverError::Unsupported(_)), "{error}"),
        }
    }
}

#[test]
fn the_buffers_of_a_receive_queue_hold_the_largest_packet() {
    use feature::*;
    let joined = GUEST_CSUM | GUEST_TSO4 | MRG_RXBUF;
    // Offer, MTU, entries, and what is planned: bytes of a buffer and how many.
    let cases = [
        (0, 1500, 256, Some((2048, 256))),
        (0, 1500, 1024, Some((2048, 512))),
        (MRG_RXBUF, 9000, 256, Some((2048, 256))),
        (MRG_RXBUF, 9000, 4, Some((4096, 4))),
        (joined, 1500, 256, Some((4096, 256))),
        (joined, 1500, 8, Some((10_240, 8))),
        // Without joined buffers a packet is in one.
        (MTU, 9000, 256, Some((10_240, 256))),
        (MTU, 2018, 256, Some((2048, 256))),
        (MTU, 2019, 256, Some((4096, 256))),
        (MTU, 65_506, 256, Some((65_536, 64))),
        (MTU, 65_507, 256, None),
    ];
    for (offered, mtu, entries, expected) in cases {
        let mut device = MockDevice { max_queue_size: entries, ..device(offered | MTU) };
        if offered & MTU == 0 && mtu == 1500 {
            device.offered = offered;
        }
        device.set_config(10, &u16::to_le_bytes(mtu));
        let planned = attach(device).map(|(_, attachment)| {
            let posting = posting(&attachment);
            (posting.buffer_bytes, posting.buffers)
        });
        match expected {
            Some(expected) => assert_eq!(planned, Ok(expected), "{offered:#x} {mtu} {entries}"),
            None => assert!(matches!(planned, Err(DriverError::Unsupported(_))), "{planned:?}"),
        }
    }
}

#[test]
fn as_many_pairs_are_planned_as_device_operator_and_driver_allow() {
    // Queues allowed, pairs of the device, pairs planned and whether there is a control queue.
    for (allowed, pairs, expected, control) in [
        (9, 4, 4, true),
        (100, 50, 1, false),
        (101, 50, 8, true),
        // The control queue is behind all pairs, so one is used where it is not allowed.
        (8, 4, 1, false),
        (2, 1, 1, false),
        (3, 1, 1, true),
        (200, 0x8000, 1, false),
    ] {
        let mut device = MockDevice { max_queues: allowed, ..everything() };
        device.set_config(8, &u16::to_le_bytes(pairs));
        let queues = attach(device).unwrap().1.queues;
        let has_control = queues.last().unwrap().owner == QueueOwner::Control;
        assert_eq!((queues.len() / 2, has_control), (expected, control), "{allowed} {pairs}");
        assert_eq!(queues.len(), 2 * expected + usize::from(control));
        if control {
            assert_eq!(queues.last().unwrap().index, 2 * pairs);
        }
    }
    let without_pairs = MockDevice { max_queues: 3, ..device(feature::CTRL_VQ) };
    assert_eq!(attach(without_pairs).unwrap().1.queues[2].index, 2);
    let one = MockDevice { max_queues: 1, ..everything() };
    assert!(matches!(attach(one), Err(DriverError::Host(_))));
}

/// A device with more queues than the operator allows.
struct Roomy(MockDevice);

impl VirtioDevice for Roomy {
    fn device_type(&self) -> Option<u32> {
        self.0.device_type()
    }
    fn offered_features(&self) -> u64 {
        self.0.offered_features()
    }
    fn negotiate(&mut self, features: u64) -> Result<(), VirtioError> {
        self.0.negotiate(features)
    }
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, VirtioError> {
        VirtioDevice::read_config(&mut self.0, offset, length)
    }
    fn max_queues(&self) -> u16 {
        self.0.max_queues()
    }
    fn max_lanes(&self) -> u16 {
        self.0.max_lanes()
    }

    fn max_queue_size(&self, _: u16) -> u16 {
        self.0.max_queue_size
    }
}

#[test]
fn a_queue_that_exists_and_is_not_allowed_is_not_planned() {
    for allowed in 2..9 {
        let mut device = Roomy(MockDevice { max_queues: allowed, ..everything() });
        let (_, attachment) = VirtioNet::attach(&mut device).unwrap();
        assert!(attachment.queues.iter().all(|queue| queue.index < allowed), "{allowed}");
    }
}

#[test]
fn a_device_that_agrees_is_used_with_all_pairs_and_another_with_one() {
    let gone = || Err(VirtioError::Device("no answer in time".into()));
    for (answer, pairs) in [(Ok(vec![0]), 4), (Ok(vec![1]), 1), (Ok(vec![]), 1), (Ok(vec![0xff]), 1), (gone(), 1)] {
        let mut device = everything();
        let (mut driver, _) = VirtioNet::attach(&mut device).unwrap();
        assert_eq!(driver.properties().pairs, 1);
        let mut live = MockLive::new(device);
        live.answers.push_back(answer);
        driver.live(&mut live).unwrap();
        assert_eq!(live.commands, [vec![4, 0, 4, 0]]);
        assert_eq!(driver.properties().pairs, pairs);
    }
}

#[test]
fn a_device_with_one_pair_is_asked_nothing() {
    let mut device = device(feature::CTRL_VQ);
    let (mut driver, _) = VirtioNet::attach(&mut device).unwrap();
    let mut live = MockLive::new(device);
    driver.live(&mut live).unwrap();
    assert!(live.commands.is_empty());
    assert_eq!(driver.properties().pairs, 1);
}

#[test]
fn the_link_goes_up_and_down_and_nothing_else_changes() {
    let mut device = everything();
    let (mut driver, _) = VirtioNet::attach(&mut device).unwrap();
    let before = driver.properties();
    // The announcement's bit alone is no link.
    for (status, link_up) in [(2_u16, false), (1, true), (0, false), (3, true)] {
        device.set_config(6, &status.to_le_bytes());
        driver.config_changed(&mut device).unwrap();
        assert_eq!(driver.properties(), NetProperties { link_up, ..before });
    }
    device.set_config(10, &1500_u16.to_le_bytes());
    assert!(matches!(driver.config_changed(&mut device), Err(DriverError::Device(_))));
    device.set_config(10, &9000_u16.to_le_bytes());
    device.set_config(0, &[0xff; 6]);
    assert!(matches!(driver.config_changed(&mut device), Err(DriverError::Device(_))));
}

#[test]
fn another_device_type_is_not_mine_and_a_lost_device_is_the_devices_fault() {
    let disk = MockDevice { device_type: Some(2), ..everything() };
    assert!(matches!(attach(disk), Err(DriverError::NotMine(_))));
    assert!(matches!(attach(MockDevice { lost: true, ..everything() }), Err(DriverError::Device(_))));
}

#[test]
fn a_device_of_unknown_type_is_believed_only_if_it_looks_like_a_network_device() {
    use feature::*;
    let unknown = |offered| MockDevice { device_type: None, ..device(offered) };
    // All of them; QEMU's frequent ones; DPDK's, with its segmentation off; a backend that leaves the control queue to its front end; one with nothing but buffers that are joined.
    let frequent = CSUM | GUEST_CSUM | MAC | GUEST_TSO | GUEST_ECN | HOST_TSO | HOST_ECN | MRG_RXBUF | STATUS;
    let dpdk = CSUM | GUEST_CSUM | HOST_ECN | MRG_RXBUF | STATUS | CTRL_VQ | MQ;
    for offered in [OF_A_NET_DEVICE, frequent, dpdk, MRG_RXBUF | MQ | 1 << 21, MRG_RXBUF] {
        attach(unknown(offered)).unwrap();
    }
    // A disk of qemu-storage-daemon (writable, read-only, with lifetime and zones), of SPDK; an entropy device; a console; and bits that are nobody's.
    let disk = 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14;
    let zoned = disk | 1 << 15 | 1 << 17;
    for offered in [disk, disk | 1 << 5, zoned, disk & !(1 << 11) | 1 << 4, 0, 7, MRG_RXBUF | 1 << 58] {
        let Err(DriverError::NotMine(text)) = attach(unknown(offered)) else { panic!("{offered:#x} was believed") };
        assert!(text.contains("does not look like virtio-net"), "{text}");
    }
    let mut group = unknown(OF_A_NET_DEVICE);
    group.set_config(0, &[1]);
    assert!(matches!(attach(group), Err(DriverError::NotMine(_))));
}

#[test]
fn a_lane_starts_only_as_attach_has_planned_it() {
    let (_, attachment) = attach(everything()).unwrap();
    let start = |queues: &[u16], state: &[u8]| {
        let setup = LaneSetup { features: attachment.features, state: state.to_vec(), queues: queues.to_vec() };
        VirtioNet::start(&setup).map(|_| ())
    };
    assert_eq!(start(&[0, 1], &attachment.state), Ok(()));
    for (queues, state) in [(&[0][..], &attachment.state[..]), (&[0, 1, 2], &attachment.state), (&[0, 1], &[])] {
        assert!(matches!(start(queues, state), Err(DriverError::Host(_))));
    }
}

proptest! {
    /// What a device says is an allegation: it is refused, or properties and plan keep the contract's bounds.
    #[test]
    fn any_device_is_refused_or_gives_a_lawful_attachment(
        config in prop::collection::vec(any::<u8>(), 12), bits in any::<u64>(), known in any::<bool>(),
        size in any::<u16>(), max_queues in 1_u16..300, pairs in 0_u16..20, mtu in prop::option::of(60_u16..=65_535),
    ) {
        let device_type = known.then_some(1);
        let mut device = MockDevice { device_type, config, max_queue_size: size, max_queues, ..device(bits) };
        device.set_config(0, &[device.config[0] & !1]);
        device.set_config(8, &pairs.to_le_bytes());
        if let Some(mtu) = mtu {
            device.set_config(10, &mtu.to_le_bytes());
        }
        let Ok((driver, attachment)) = VirtioNet::attach(&mut device) else { return Ok(()) };
        let properties = driver.properties();
        prop_assert!((68..=65_521).contains(&properties.mtu));
        prop_assert!((u32::from(properties.mtu) + 14..=65_550).contains(&properties.max_packet_bytes));
        prop_assert_eq!(attachment.features & !bits, 0);
        prop_assert!(attachment.queues.len() <= 17);
        let has = |bit| attachment.features & bit != 0;
        for (at, queue) in attachment.queues.iter().enumerate() {
            prop_assert!(queue.index < max_queues && queue.size.is_power_of_two() && queue.size <= size);
            let Some(posting) = queue.posting else { continue };
            prop_assert!(queue.owner == QueueOwner::Set(at as u16 / 2) && queue.index == at as u16);
            prop_assert!((1..=65_536).contains(&posting.buffer_bytes));
            prop_assert!((1..=queue.size).contains(&posting.buffers) && posting.head_bytes == 12);
            // Section 5.1.4.2 and 5.1.6.3.1.
            let buffers = if has(feature::MRG_RXBUF) { u32::from(posting.buffers) } else { 1 };
            let largest = if has(feature::GUEST_TSO) { 65_562 } else { u32::from(properties.mtu) + 26 };
            prop_assert!(buffers * posting.buffer_bytes >= largest && posting.buffer_bytes >= 1526);
        }
    }
}
