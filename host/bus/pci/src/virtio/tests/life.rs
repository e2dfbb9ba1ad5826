//! A device's life when it behaves, and each step when it does not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::{
    Confinement, DmaRegion, QueueConfig, QueueSetup, Silence, SplitQueue, Transport, TransportError,
};

use crate::virtio::VirtioPci;
use crate::virtio::device::feature;
use crate::virtio::testing::{CAPACITY, Did, ENTRIES, FEATURES, Model, QUEUES, Sim, open, prepared, scattered, setup};

fn refused<T>(outcome: Result<T, TransportError>) -> String {
    match outcome {
        Err(TransportError::Refused(why)) => why,
        other => panic!("not refused: {:?}", other.map(drop)),
    }
}

fn invalid<T>(outcome: Result<T, TransportError>) -> String {
    match outcome {
        Err(TransportError::Invalid(why)) => why,
        other => panic!("not invalid: {:?}", other.map(drop)),
    }
}

/// What is wrong with the device, in words and in deed.
type Case = (&'static str, fn(&mut Model));

#[test]
fn the_steps_come_in_the_order_of_the_specification() {
    let sim = Sim::new(|_| {});
    let (mut device, region) = prepared(&sim);
    assert_eq!(device.offered_features(), FEATURES);
    assert_eq!((device.max_queues(), device.max_queue_size(0), device.max_queue_size(9)), (QUEUES, ENTRIES, 0));
    let first = device.setup_queue(setup(2, &region)).unwrap();
    let _second = device.setup_queue(setup(0, &region)).unwrap();
    first.doorbell.ring();
    device.start().unwrap();
    first.doorbell.ring();
    assert!(!device.is_lost());
    assert_eq!(device.quiesce(1, Instant::now() + Duration::from_secs(2)), Silence::Confirmed);
    first.doorbell.ring();
    assert!(!device.is_lost(), "a reset that was asked for is no loss");
    device.release();
    first.doorbell.ring();
    device.release();

    let iova = region.iova();
    let wanted = [
        // Reset before anything else; bus mastering only for the first queue, and off at the end.
        Did::Status(0),
        Did::Status(1),
        Did::Status(3),
        Did::TakeBack,
        Did::Status(11),
        Did::Map(iova),
        Did::Master(true),
        // The function's vectors before the device's.
        Did::Vectors(3),
        Did::ConfigVector(0),
        Did::QueueVector(2, 1),
        Did::QueueVector(0, 2),
        Did::Enable(2),
        Did::Enable(0),
        Did::Status(15),
        // What was rung before DRIVER_OK, and after.
        Did::Notify(8, 2),
        Did::Notify(8, 2),
        Did::Status(0),
        Did::Status(1),
        Did::Status(0),
        Did::Quiet,
        Did::Release,
    ];
    assert_eq!(sim.did(), wanted);
    assert_eq!(sim.model().violations, Vec::<String>::new());
    assert!(device.is_lost() && device.event_fd().is_none() && device.descriptors().is_empty());
    assert_eq!(Arc::strong_count(&region), 1, "no region is held after release");
}

#[test]
fn the_device_is_told_each_address_as_two_words() {
    let sim = Sim::new(|_| {});
    let (mut device, region) = prepared(&sim);
    let wanted = setup(1, &region);
    let _events = device.setup_queue(wanted).unwrap();
    let words = sim.model().queues[1].words;
    let address = |at: usize| u64::from(words[at]) | u64::from(words[at + 1]) << 32;
    let told = (address(0), address(2), address(4));
    assert_eq!(told, (wanted.addresses.descriptors, wanted.addresses.available, wanted.addresses.used));
    assert!(words[1] != 0, "the addresses need both words");
    assert_eq!(sim.model().queues[1].size, 16);
}

#[test]
fn rings_in_scattered_pages_are_placed_and_never_across_their_ends() {
    const PAGE: u64 = 2 << 20;
    let sim = Sim::new(|_| {});
    let mut device = open(&sim).unwrap();
    device.negotiate(feature::VERSION_1).unwrap();
    // The second page is below the first one, and is not followed by it.
    let region = scattered(&[0x1_4000_0000, 0x8000_0000]);
    device.map(Arc::clone(&region)).unwrap();
    let config = |index| QueueConfig { index, size: 256, event_idx: true, indirect: false };
    let first = SplitQueue::new(config(0), Arc::clone(&region), 0).unwrap();
    let second = SplitQueue::new(config(1), Arc::clone(&region), PAGE + 8192).unwrap();
    for (index, queue) in [(0, &first), (1, &second)] {
        let _events = device.setup_queue(QueueSetup { index, size: 256, addresses: queue.addresses() }).unwrap();
    }
    assert_eq!(sim.model().queues[0].words[..2], [0x4000_0000, 1]);
    assert_eq!(sim.model().queues[1].words[..2], [0x8000_2000, 0]);
    // Across the end of the first page, as if the pages followed each other; and at an offset instead of an address.
    for at in [0x1_4000_0000 + PAGE - 256, 0x8000_0000 + PAGE - 256, PAGE, 0] {
        let mut wrong = setup(2, &region);
        wrong.addresses.descriptors = at;
        wrong.size = 32;
        assert!(invalid(device.setup_queue(wrong)).contains("descriptor table"), "{at:#x}");
    }
}

#[test]
fn regions_that_overlap_or_are_of_the_wrong_kind_are_refused() {
    let sim = Sim::new(|_| {});
    let mut device = open(&sim).unwrap();
    device.map(scattered(&[0x4000_0000, 0x8000_0000])).unwrap();
    assert!(invalid(device.map(scattered(&[0xc000_0000, 0x8000_0000]))).contains("overlaps"));
    assert!(invalid(device.map(scattered(&[0xc000_0000, 0xc000_0000]))).contains("overlaps"));
    device.map(scattered(&[0x8020_0000, 0x4020_0000])).unwrap();
    let run = Arc::new(DmaRegion::new("run", 4096, 0x1_0000_0000).unwrap());
    assert!(invalid(device.map(run)).contains("physical"));

    let sim = Sim::new(isolated);
    let mut device = open(&sim).unwrap();
    let run = |iova| Arc::new(DmaRegion::new("run", 8192, iova).unwrap());
    device.map(run(0x10000)).unwrap();
    assert!(invalid(device.map(run(0x11000))).contains("overlaps"));
    assert!(invalid(device.map(run(0xf000))).contains("overlaps"));
    device.map(run(0xe000)).unwrap();
    assert!(invalid(device.map(scattered(&[0x4000_0000]))).contains("IOMMU"));
    for number in 2..64 {
        device.map(run(number << 20)).unwrap();
    }
    assert!(matches!(device.map(run(64 << 20)), Err(TransportError::Exhausted(_))));
}

fn isolated(model: &mut Model) {
    model.isolated = true;
    model.offered |= feature::ACCESS_PLATFORM;
}

#[test]
fn only_an_isolated_device_that_offers_it_is_confined_by_the_iommu() {
    for (isolated, offers, wanted) in [
        (false, false, Confinement::Host),
        (false, true, Confinement::Host),
        (true, false, Confinement::Host),
        (true, true, Confinement::Iommu),
    ] {
        let sim = Sim::new(|model| {
            model.isolated = isolated;
            model.offered |= if offers { feature::ACCESS_PLATFORM } else { 0 };
        });
        let (device, region) = prepared(&sim);
        assert_eq!(device.confinement(), wanted, "isolated {isolated}, offers {offers}");
        assert_eq!(region.page_bytes().is_none(), wanted == Confinement::Iommu);
        // Accepted wherever it is offered, though nobody asked for it.
        assert_eq!(sim.model().accepted & feature::ACCESS_PLATFORM != 0, offers);
    }
}

#[test]
fn memory_comes_and_goes_while_the_device_runs_only_behind_an_iommu() {
    let soon = Instant::now() + Duration::from_secs(2);
    let sim = Sim::new(isolated);
    let (mut device, region) = prepared(&sim);
    let _events = device.setup_queue(setup(0, &region)).unwrap();
    let more = Arc::new(DmaRegion::new("more", 4096, 0x7000_0000).unwrap());
    assert!(invalid(device.map(Arc::clone(&more))).contains("between"));
    device.start().unwrap();
    device.map(Arc::clone(&more)).unwrap();
    assert!(matches!(device.unmap(region.iova(), soon), Silence::Unconfirmed { .. }), "the rings are not taken away");
    assert_eq!(device.unmap(more.iova(), soon), Silence::Confirmed);
    assert_eq!(device.unmap(more.iova(), soon), Silence::Confirmed, "again");
    assert_eq!(Arc::strong_count(&more), 1);
    assert_eq!(sim.did().iter().filter(|did| matches!(did, Did::Unmap(_))).count(), 1);
    device.map(more).unwrap();

    let sim = Sim::new(|_| {});
    let (mut device, region) = prepared(&sim);
    let _events = device.setup_queue(setup(0, &region)).unwrap();
    device.start().unwrap();
    assert!(matches!(device.map(scattered(&[0x4000_0000])), Err(TransportError::Unsupported(_))));
}

#[test]
fn features_are_checked_and_the_device_may_refuse_them() {
    let sim = Sim::new(|model| model.offered |= feature::RING_PACKED | feature::NOTIFICATION_DATA);
    let mut device = open(&sim).unwrap();
    assert!(invalid(device.negotiate(feature::VERSION_1 | 1 << 5)).contains("0x20"));
    assert!(invalid(device.negotiate(1 << 6)).contains("VERSION_1"));
    refused(device.negotiate(feature::VERSION_1 | feature::RING_PACKED));
    refused(device.negotiate(feature::VERSION_1 | feature::NOTIFICATION_DATA));
    device.negotiate(feature::VERSION_1 | 1 << 6).unwrap();
    assert_eq!(sim.model().accepted, feature::VERSION_1 | 1 << 6);
    assert!(invalid(device.negotiate(feature::VERSION_1)).contains("already"));

    let sim = Sim::new(|model| model.faults.refuses_features = true);
    let mut device = open(&sim).unwrap();
    assert!(refused(device.negotiate(feature::VERSION_1)).contains("FEATURES_OK"));
    assert_eq!(sim.did().last(), Some(&Did::Status(0x83)), "given up");
}

#[test]
fn configuration_is_read_in_fields_and_in_one_state() {
    // The model complains of an access that is not as wide as its field.
    let sim = Sim::new(|model| {
        model.device_config = (0..60).collect();
        model.faults.changes = 5;
    });
    let mut device = open(&sim).unwrap();
    let mut all = [0; 60];
    device.read_config(0, &mut all).unwrap();
    assert!(all.iter().copied().eq(0..60));
    for start in 0..60u32 {
        let mut some = vec![0; (60 - start as usize).min(7)];
        device.read_config(start, &mut some).unwrap();
        assert!(some.iter().copied().eq(start as u8..start as u8 + some.len() as u8), "{some:?} at {start}");
    }
    assert_eq!(sim.model().violations, Vec::<String>::new());
    assert_eq!(sim.model().faults.changes, 0, "a state that changed was read again");
    device.read_config(0x1000, &mut []).unwrap();
    for (offset, bytes) in [(0, 0x1001), (0x1000, 1), (u32::MAX, 8)] {
        refused(device.read_config(offset, &mut vec![0; bytes]));
    }

    let sim = Sim::new(|model| model.faults.restless = true);
    let mut device = open(&sim).unwrap();
    let mut capacity = [0xaa; 8];
    let error = device.read_config(0, &mut capacity).unwrap_err();
    assert!(matches!(error, TransportError::Protocol(_)), "{error}");
    assert_eq!(capacity, [0xaa; 8], "what is not known is not told");
    sim.model().faults.restless = false;
    device.read_config(0, &mut capacity).unwrap();
    assert_eq!(u64::from_le_bytes(capacity), CAPACITY);
}

#[test]
fn queues_out_of_every_bound_are_refused_before_the_device_hears_of_them() {
    let sim = Sim::new(|model| model.queues.truncate(3));
    let mut device = open(&sim).unwrap();
    let region = device.memory("rings", 4 << 20, 0).unwrap();
    let good = setup(0, &region);
    assert!(invalid(device.setup_queue(good)).contains("negotiated"));
    device.negotiate(feature::VERSION_1).unwrap();
    assert!(invalid(device.setup_queue(good)).contains("not mapped"));
    device.map(Arc::clone(&region)).unwrap();
    let accesses = sim.model().accesses;
    let changed = |change: &dyn Fn(&mut QueueSetup)| {
        let mut setup = good;
        change(&mut setup);
        setup
    };
    for wrong in [
        changed(&|setup| setup.index = QUEUES),
        changed(&|setup| setup.index = u16::MAX),
        changed(&|setup| setup.size = 0),
        changed(&|setup| setup.size = 12),
        changed(&|setup| setup.size = 2 * ENTRIES),
        changed(&|setup| setup.size = 32768),
        changed(&|setup| setup.addresses.descriptors += 8),
        changed(&|setup| setup.addresses.available += 1),
        changed(&|setup| setup.addresses.used += 2),
        changed(&|setup| setup.addresses.used = u64::MAX - 3),
        changed(&|setup| setup.addresses.descriptors = 0),
        changed(&|setup| setup.addresses.available = region.address_of(0).wrapping_sub(16)),
    ] {
        invalid(device.setup_queue(wrong));
    }
    assert_eq!(sim.model().accesses, accesses);
    assert!(!sim.model().master, "no bus mastering for what is refused");
    let _events = device.setup_queue(good).unwrap();
    assert!(invalid(device.setup_queue(good)).contains("already"));
}

#[test]
fn a_device_that_does_not_take_a_queue_is_given_up() {
    let cases: [Case; 5] = [
        ("size", |model| model.faults.refuses_size = true),
        ("notify", |model| model.faults.notify_off = Some(0x400)),
        ("notify far", |model| model.faults.notify_off = Some(0xffff)),
        ("enable", |model| model.faults.refuses_enable = true),
        ("needs reset", |model| model.faults.extra_status = 0),
    ];
    for (name, fault) in cases {
        let sim = Sim::new(fault);
        let (mut device, region) = prepared(&sim);
        if name == "needs reset" {
            sim.model().status |= 0x40;
        }
        let outcome = device.setup_queue(setup(0, &region)).and_then(|_| device.start());
        match outcome {
            Err(TransportError::Refused(_) | TransportError::Protocol(_)) => {}
            other => panic!("{name}: {other:?}"),
        }
        assert!(matches!(sim.did().last(), Some(Did::Status(status)) if status & 0x80 != 0), "{name}: FAILED");
        assert_eq!(device.quiesce(0, Instant::now() + Duration::from_secs(2)), Silence::Confirmed);
    }
    // The last place that fits.
    let sim = Sim::new(|model| model.faults.notify_off = Some(0x3ff));
    let (mut device, region) = prepared(&sim);
    let events = device.setup_queue(setup(3, &region)).unwrap();
    device.start().unwrap();
    events.doorbell.ring();
    assert_eq!(sim.did().last(), Some(&Did::Notify(0xffc, 3)));
}

#[test]
fn what_a_device_says_of_its_queues_is_checked_when_it_is_opened() {
    let opened = |change: fn(&mut Model)| -> Result<VirtioPci, String> {
        let sim = Sim::new(|model| {
            change(model);
        });
        open(&sim).map_err(|error| error.to_string())
    };
    assert!(opened(|model| model.num_queues = 0).err().expect("refused").contains("no queues"));
    assert!(opened(|model| model.entries = 100).err().expect("refused").contains("100 entries"));
    assert!(opened(|model| model.entries = 0x8001).err().expect("refused").contains("power of two"));
    let most = opened(|model| model.num_queues = u16::MAX).unwrap();
    assert_eq!(most.max_queues(), 256);
    let absent = opened(|model| model.entries = 0).unwrap();
    assert_eq!(absent.max_queue_size(0), 0);
    assert_eq!(opened(|model| model.entries = 0x8000).unwrap().max_queue_size(0), 0x8000);
}
