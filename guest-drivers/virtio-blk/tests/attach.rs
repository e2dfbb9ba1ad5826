//! The control lane against the SDK's mock device: what is negotiated, what is believed, what is refused.

mod common;

use cofferdam_sdk::mock::MockDevice;
use cofferdam_sdk::{BlockProperties, DriverError, VirtioDriver};
use cofferdam_virtio_blk::{VirtioBlk, feature};
use common::{device, everything};

fn attach(mut device: MockDevice) -> Result<(BlockProperties, cofferdam_sdk::Attachment), DriverError> {
    let (driver, attachment) = VirtioBlk::attach(&mut device)?;
    assert_eq!(device.negotiated, Some(attachment.features));
    Ok((driver.properties(), attachment))
}

#[test]
fn a_device_without_features_is_a_plain_disk_of_512_byte_blocks() {
    let (properties, attachment) = attach(device(0)).unwrap();
    assert_eq!(attachment.features, 0);
    assert_eq!(attachment.queues.len(), 1);
    assert_eq!(attachment.queues[0].ordinary_response, Some(vec![0]));
    let expected = BlockProperties {
        capacity_bytes: 2048 * 512,
        logical_block_bytes: 512,
        physical_block_bytes: 512,
        max_transfer_bytes: 1 << 20,
        read_only: false,
        can_flush: false,
        max_discard_bytes: 0,
        discard_align_bytes: 512,
        max_write_zeroes_bytes: 0,
        write_zeroes_may_unmap: false,
        has_id: true,
    };
    assert_eq!(properties, expected);
}

#[test]
fn every_field_of_configuration_space_is_read_where_its_feature_says() {
    let (properties, attachment) = attach(everything()).unwrap();
    assert_eq!(attachment.features, feature::WANTED & !feature::RO);
    let expected = BlockProperties {
        capacity_bytes: 2048 * 512,
        logical_block_bytes: 4096,
        physical_block_bytes: 16_384,
        max_transfer_bytes: 4 * 65_536,
        read_only: false,
        can_flush: true,
        max_discard_bytes: 1024 * 512,
        discard_align_bytes: 8 * 512,
        max_write_zeroes_bytes: 512 * 512,
        write_zeroes_may_unmap: true,
        has_id: true,
    };
    assert_eq!(properties, expected);
}

#[test]
fn configuration_space_may_end_with_the_last_field_that_the_features_bring() {
    for (features, length) in [(0, 8), (feature::SIZE_MAX, 12), (feature::BLK_SIZE, 24), (feature::MQ, 36)] {
        let mut device = everything();
        (device.offered, device.max_queues) = (features, 1);
        device.config.truncate(length);
        attach(device.clone()).unwrap();
        device.config.truncate(length - 1);
        assert!(matches!(attach(device), Err(DriverError::Device(_))), "{length}");
    }
}

#[test]
fn geometry_legacy_and_new_features_are_never_accepted() {
    let mut device = everything();
    device.offered |= feature::GEOMETRY | 1 | 1 << 7 | 1 << 15 | 1 << 16 | 1 << 17 | 1 << 60;
    let (_, attachment) = attach(device).unwrap();
    assert_eq!(attachment.features & !feature::WANTED, 0);
}

#[test]
fn the_cache_mode_is_not_accepted_without_a_way_to_flush() {
    let (properties, attachment) = attach(device(feature::CONFIG_WCE)).unwrap();
    assert_eq!(attachment.features, 0);
    assert!(!properties.can_flush);
}

#[test]
fn a_read_only_device_offers_nothing_that_writes() {
    let mut device = everything();
    device.offered |= feature::RO;
    let (properties, _) = attach(device).unwrap();
    assert!(properties.read_only);
    assert_eq!((properties.max_discard_bytes, properties.max_write_zeroes_bytes), (0, 0));
}

#[test]
fn what_breaks_the_specification_is_the_devices_fault_and_says_where() {
    type Spoil = fn(&mut MockDevice);
    let cases: [(&str, Spoil); 7] = [
        ("capacity", |d| d.set_config(0, &u64::MAX.to_le_bytes())),
        ("blk_size 0", |d| d.set_config(20, &0_u32.to_le_bytes())),
        ("blk_size 1000", |d| d.set_config(20, &1000_u32.to_le_bytes())),
        ("blk_size 131072", |d| d.set_config(20, &131_072_u32.to_le_bytes())),
        ("num_queues is 0", |d| d.set_config(34, &[0, 0])),
        ("hold no block", |d| d.set_config(8, &1_u32.to_le_bytes())),
        ("queue 0 has 2 entries", |d| d.max_queue_size = 2),
    ];
    for (what, spoil) in cases {
        let mut device = everything();
        spoil(&mut device);
        let Err(DriverError::Device(text)) = attach(device) else { panic!("{what} was believed") };
        assert!(text.contains(what) && text.contains("section 5.2"), "{what}: {text}");
    }
}

#[test]
fn oddities_of_real_devices_are_taken_for_what_they_mean() {
    // qemu-storage-daemon offers SIZE_MAX with 0.
    let mut device = everything();
    device.set_config(8, &0_u32.to_le_bytes());
    assert_eq!(attach(device).unwrap().0.max_transfer_bytes, 1 << 20);
    // Linux takes a seg_max of 0 for 1.
    let mut device = everything();
    device.set_config(12, &0_u32.to_le_bytes());
    assert_eq!(attach(device).unwrap().0.max_transfer_bytes, 65_536);
    // A physical block out of reason is only a hint.
    let mut device = everything();
    device.set_config(24, &[31]);
    assert_eq!(attach(device).unwrap().0.physical_block_bytes, 4096);
    // Discard and write-zeroes that take no block are not used; an overflowing limit is a large one.
    let mut device = everything();
    device.set_config(36, &7_u32.to_le_bytes());
    device.set_config(48, &u32::MAX.to_le_bytes());
    let (properties, _) = attach(device).unwrap();
    assert_eq!((properties.max_discard_bytes, properties.max_write_zeroes_bytes), (0, u32::MAX - 4095));
}

#[test]
fn a_capacity_that_is_no_multiple_of_the_block_loses_its_tail() {
    let mut device = everything();
    device.set_config(0, &2047_u64.to_le_bytes());
    assert_eq!(attach(device).unwrap().0.capacity_bytes, 2040 * 512);
}

#[test]
fn as_many_queues_are_planned_as_device_and_operator_allow() {
    for (max_queues, num_queues, expected) in [(1, 4, 1), (8, 4, 4), (3, 4, 3), (200, 200, 64)] {
        let mut device = everything();
        device.max_queues = max_queues;
        device.set_config(34, &u16::to_le_bytes(num_queues));
        let queues = attach(device).unwrap().1.queues;
        assert_eq!(queues.len(), expected);
        assert!(queues.iter().enumerate().all(|(at, queue)| usize::from(queue.index) == at && queue.size == 256));
    }
    let mut device = everything();
    device.max_queue_size = 1000;
    assert_eq!(attach(device).unwrap().1.queues[0].size, 512);
}

#[test]
fn a_small_queue_bounds_the_transfer() {
    let mut device = everything();
    device.max_queue_size = 4;
    assert_eq!(attach(device).unwrap().0.max_transfer_bytes, 2 * 65_536);
}

#[test]
fn another_device_type_is_not_mine() {
    let mut net = device(0);
    net.device_type = Some(1);
    assert!(matches!(attach(net), Err(DriverError::NotMine(_))));
}

#[test]
fn a_device_of_unknown_type_is_believed_only_if_it_looks_like_a_disk() {
    let mut disk = everything();
    disk.device_type = None;
    attach(disk.clone()).unwrap();

    let mut net = disk.clone();
    net.offered |= 1 << 18 | 1 << 23;
    let mut tag = disk.clone();
    tag.offered = 0;
    tag.set_config(0, b"a-file-system-tag");
    let mut short = disk.clone();
    short.config.truncate(4);
    let mut size = disk;
    size.set_config(20, &99_u32.to_le_bytes());
    for strange in [net, tag, short, size] {
        let Err(DriverError::NotMine(text)) = attach(strange) else { panic!("believed") };
        assert!(text.contains("does not look like virtio-blk"), "{text}");
    }
}

#[test]
fn a_device_that_is_gone_is_the_devices_fault() {
    let mut gone = everything();
    gone.lost = true;
    assert!(matches!(attach(gone), Err(DriverError::Device(_))));
}

#[test]
fn a_resize_changes_the_capacity_and_nothing_else() {
    let mut device = everything();
    let (mut driver, _) = VirtioBlk::attach(&mut device).unwrap();
    let before = driver.properties();
    device.set_config(0, &4096_u64.to_le_bytes());
    device.set_config(8, &1024_u32.to_le_bytes());
    driver.config_changed(&mut device).unwrap();
    assert_eq!(driver.properties(), BlockProperties { capacity_bytes: 4096 * 512, ..before });
    device.set_config(20, &512_u32.to_le_bytes());
    assert!(matches!(driver.config_changed(&mut device), Err(DriverError::Device(_))));
}
