//! Memory that comes and goes while the rings run: with the real backend, and with backends that refuse, are late or lie.

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::{ANSWER_LIMIT, VhostUser};
use cofferdam_device::{Direction, DmaRegion, QueueAddresses, QueueSetup, Silence, Transport, TransportError};
use common::PATIENCE;
use common::disk::{Disk, reason};
use common::fake::*;
use common::qemu::Qemu;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const BASE: u64 = 0x100_0000_0000;
const BYTES: u64 = 1 << 20;

fn region(name: &str, iova: u64) -> Arc<DmaRegion> {
    Arc::new(DmaRegion::new(name, BYTES, iova).unwrap())
}

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(30)
}

fn late() -> Instant {
    Instant::now() + PATIENCE
}

/// Mappings of memfds called `name` in the process.
fn mappings(pid: i32, name: &str) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().filter(|line| line.contains(&format!("/memfd:{name}"))).count()
}

fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// A device of a fake with one ring running.
fn started(fake: &Fake) -> VhostUser {
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    device.negotiate(VERSION_1).unwrap();
    device.map(region("rings", 0x1000)).unwrap();
    let addresses = QueueAddresses { descriptors: 0x1000, available: 0x2000, used: 0x3000 };
    device.setup_queue(QueueSetup { index: 0, size: 16, addresses }).unwrap();
    device.start().unwrap();
    device
}

#[test]
fn a_running_qemu_reaches_a_new_region_and_lets_it_go_again() {
    let qemu = Qemu::file(16 << 20, 2);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 2);
    disk.write(0, 0, &[0x11; 4096]);
    let (one, two) = (region("late-one", BASE), region("late-two", BASE + 2 * BYTES));
    disk.device.map(Arc::clone(&one)).unwrap();
    disk.device.map(Arc::clone(&two)).unwrap();
    assert_eq!((mappings(qemu.pid(), "late-one"), mappings(qemu.pid(), "late-two")), (1, 1));

    // From the very end of one region to the medium, and back into the other.
    let last = BYTES - 65_536;
    one.write_at(last, &[0x5a; 65_536]).unwrap();
    disk.request_at(1, 1, 128, BASE + last, 65_536, Direction::Out);
    disk.request_at(0, 0, 128, BASE + 2 * BYTES + 512, 65_536, Direction::In);
    let mut seen = vec![0; 65_536];
    two.read_at(512, &mut seen).unwrap();
    assert!(seen == [0x5a; 65_536], "what was read is not what was written");
    assert!(qemu.image()[65_536..131_072] == [0x5a; 65_536]);

    assert_eq!(disk.device.unmap(BASE, late()), Silence::Confirmed);
    assert_eq!((mappings(qemu.pid(), "late-one"), mappings(qemu.pid(), "late-two")), (0, 1));
    assert_eq!(Arc::strong_count(&one), 1, "the transport holds it still");
    assert_eq!(disk.device.unmap(BASE, late()), Silence::Confirmed, "said once, it stays");
    disk.request_at(0, 0, 128, BASE + 2 * BYTES, 4096, Direction::In);
    assert_eq!(disk.read(0, 0, 4096), [0x11; 4096], "the first table was disturbed");
    assert_eq!(disk.quiesce(0, PATIENCE), Silence::Confirmed);
    assert_eq!(disk.device.unmap(BASE + 2 * BYTES, soon()), Silence::Confirmed);
    assert_eq!(Arc::strong_count(&two), 1);
}

#[test]
fn a_thousand_regions_leave_nothing_in_qemu() {
    let qemu = Qemu::null(1);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 1);
    let before = descriptors(qemu.pid());
    for round in 0..1000u64 {
        let iova = BASE + round * 2 * BYTES;
        let region = region("cycle", iova);
        disk.device.map(Arc::clone(&region)).unwrap();
        if round % 100 == 0 {
            region.fill(0, 4096, 0xee).unwrap();
            disk.request_at(0, 0, 0, iova, 4096, Direction::In);
            let mut seen = [0xee; 4096];
            region.read_at(0, &mut seen).unwrap();
            assert_eq!(seen, [0; 4096], "round {round}");
        }
        assert_eq!(disk.device.unmap(iova, late()), Silence::Confirmed, "round {round}");
    }
    assert_eq!(mappings(qemu.pid(), "cycle"), 0);
    assert_eq!(descriptors(qemu.pid()), before);
    assert!(!disk.device.is_lost());
}

#[test]
fn a_backend_that_is_killed_reaches_nothing_any_more() {
    let mut qemu = Qemu::null(1);
    let mut disk = Disk::start(VhostUser::connect(&qemu.address()).unwrap(), 1);
    disk.device.map(region("late", BASE)).unwrap();
    qemu.kill();
    let end = late();
    // The connection may end before the process does.
    while disk.device.unmap(BASE, soon()) != Silence::Confirmed {
        assert!(Instant::now() < end, "never confirmed");
    }
}

#[test]
fn without_memory_slots_a_running_device_takes_none() {
    let without = MQ | CONFIG | REPLY_ACK;
    // Slots without acknowledgements are none: nothing would ever be known to be gone.
    for protocol in [without, MQ | CONFIG | MEM_SLOTS, 0] {
        let mut behave = honest(VERSION_1 | PROTOCOL_FEATURES, protocol);
        let fake = Fake::serve(move |message| {
            assert!(message.request < GET_MAX_MEM_SLOTS, "request {}", message.request);
            behave(message)
        });
        let mut device = started(&fake);
        let late_region = region("late", BASE);
        let error = device.map(Arc::clone(&late_region)).unwrap_err();
        assert!(matches!(error, TransportError::Unsupported(_)), "{error}");
        assert_eq!(Arc::strong_count(&late_region), 1, "the backend never heard of it");
        let why = reason(device.unmap(0x1000, soon()));
        assert!(why.contains("first table"), "{why}");
        assert!(!device.is_lost());
        device.release();
        fake.join();
    }
}

#[test]
fn slots_are_bounded_by_what_the_backend_says_and_come_back() {
    let fake = Fake::serve(with_slots());
    let mut device = started(&fake);
    device.map(region("late", BASE)).unwrap();
    let overlap = device.map(region("late", BASE + 4096)).unwrap_err();
    assert!(matches!(overlap, TransportError::Invalid(_)), "{overlap}");
    device.map(region("late", BASE + BYTES)).unwrap();
    let full = device.map(region("late", BASE + 2 * BYTES)).unwrap_err();
    assert!(matches!(full, TransportError::Exhausted(_)), "{full}");
    assert_eq!(device.unmap(BASE, late()), Silence::Confirmed);
    device.map(region("late", BASE + 2 * BYTES)).unwrap();
    device.release();
    let why = reason(device.unmap(BASE + BYTES, soon()));
    assert!(why.contains("released"), "{why}");
    fake.join();
}

#[test]
fn a_region_that_was_refused_is_not_reached_and_the_device_goes_on() {
    let mut behave = with_slots();
    let fake = Fake::serve(move |message| match message.request {
        ADD_MEM_REG => Act::Answer(1u64.to_ne_bytes().to_vec()),
        _ => behave(message),
    });
    let mut device = started(&fake);
    let refused = region("late", BASE);
    let error = device.map(Arc::clone(&refused)).unwrap_err();
    assert!(matches!(error, TransportError::Refused(_)), "{error}");
    assert_eq!(Arc::strong_count(&refused), 1);
    assert_eq!(device.unmap(BASE, soon()), Silence::Confirmed);
    device.read_config(0, &mut [0; 8]).unwrap();
    assert!(!device.is_lost());
}

#[test]
fn a_removal_that_was_refused_is_not_confirmed() {
    let mut behave = with_slots();
    let fake = Fake::serve(move |message| match message.request {
        REM_MEM_REG => Act::Answer(1u64.to_ne_bytes().to_vec()),
        _ => behave(message),
    });
    let mut device = started(&fake);
    let kept = region("late", BASE);
    device.map(Arc::clone(&kept)).unwrap();
    let why = reason(device.unmap(BASE, soon()));
    assert!(why.contains("refused"), "{why}");
    assert_eq!(Arc::strong_count(&kept), 2, "the backend may reach it");
    assert!(!device.is_lost());
}

/// Answers like [`with_slots`], but requests of one kind only when it is sent on. Counts them.
fn holding_back(kind: u32) -> (Fake, mpsc::Sender<()>, Arc<AtomicU32>) {
    let (go, gone) = mpsc::channel();
    let count = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&count);
    let mut behave = with_slots();
    let fake = Fake::serve(move |message| {
        if message.request == kind {
            counted.fetch_add(1, Ordering::SeqCst);
            // The test that fails drops its end.
            let _ = gone.recv();
        }
        behave(message)
    });
    (fake, go, count)
}

#[test]
fn a_late_acknowledgement_costs_neither_the_device_nor_a_second_question() {
    let (fake, go, asked) = holding_back(REM_MEM_REG);
    let mut device = started(&fake);
    let late_region = region("late", BASE);
    device.map(Arc::clone(&late_region)).unwrap();
    for _ in 0..3 {
        let begun = Instant::now();
        let why = reason(device.unmap(BASE, soon()));
        assert!(why.contains("in time"), "{why}");
        assert!(begun.elapsed() < Duration::from_secs(1));
        assert!(!device.is_lost(), "late is not lost");
    }
    // Nobody else gets in between: neither the ladder ...
    let why = reason(device.quiesce(0, soon()));
    assert!(why.contains("not acknowledged"), "{why}");
    // ... nor a client that maps.
    let begun = Instant::now();
    let error = device.map(region("later", BASE + BYTES)).unwrap_err();
    assert!(matches!(error, TransportError::Timeout), "{error}");
    assert!(begun.elapsed() < ANSWER_LIMIT + Duration::from_secs(1));
    assert_eq!(Arc::strong_count(&late_region), 2);
    go.send(()).unwrap();
    assert_eq!(device.unmap(BASE, late()), Silence::Confirmed);
    assert_eq!(Arc::strong_count(&late_region), 1);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(device.quiesce(0, late()), Silence::Confirmed);
    drop(device);
    fake.join();
}

#[test]
fn a_region_whose_adding_was_never_answered_counts_as_reached_until_it_is_removed() {
    let (fake, go, asked) = holding_back(ADD_MEM_REG);
    let mut device = started(&fake);
    let late_region = region("late", BASE);
    let begun = Instant::now();
    let error = device.map(Arc::clone(&late_region)).unwrap_err();
    assert!(matches!(error, TransportError::Timeout), "{error}");
    assert!(begun.elapsed() < ANSWER_LIMIT + Duration::from_secs(1));
    assert_eq!(Arc::strong_count(&late_region), 2, "the backend has had the descriptor");
    assert!(!device.is_lost());
    reason(device.unmap(BASE, soon()));
    go.send(()).unwrap();
    assert_eq!(device.unmap(BASE, late()), Silence::Confirmed);
    assert_eq!(Arc::strong_count(&late_region), 1);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    device.read_config(0, &mut [0; 8]).unwrap();
}

#[test]
fn nonsense_for_an_acknowledgement_confirms_nothing() {
    let answers: [(&str, Option<Vec<u8>>); 4] = [
        ("four bytes", Some(answer(REM_MEM_REG, &[0; 4]))),
        ("another request's", Some(answer(ADD_MEM_REG, &[0; 8]))),
        ("no answer but a question", Some(message(REM_MEM_REG, 0x1, &[0; 8]))),
        ("the end of the connection", None),
    ];
    for (what, bytes) in answers {
        let mut behave = with_slots();
        let fake = Fake::serve(move |message| match (message.request, &bytes) {
            (REM_MEM_REG, Some(bytes)) => Act::Raw(bytes.clone()),
            (REM_MEM_REG, None) => Act::Close,
            _ => behave(message),
        });
        let mut device = started(&fake);
        let late_region = region("late", BASE);
        device.map(Arc::clone(&late_region)).unwrap();
        let why = reason(device.unmap(BASE, late()));
        assert!(!why.is_empty(), "{what}");
        reason(device.unmap(BASE, soon()));
        assert_eq!(Arc::strong_count(&late_region), 2, "{what}");
        device.release();
        fake.join();
    }
}

#[test]
fn a_backend_that_reads_nothing_bounds_a_removal_all_the_same() {
    // Answers the handshake and the start, then stops reading.
    let fake = Fake::run(|mut stream: UnixStream| {
        let mut behave = with_slots();
        while let Some(message) = receive(&mut stream) {
            if let Act::Answer(body) = behave(&message) {
                stream.write_all(&answer(message.request, &body)).unwrap();
            }
            if message.request == ADD_MEM_REG {
                break;
            }
        }
        // Until the front end has closed.
        let mut hangup = [PollFd::new(&stream, PollFlags::RDHUP)];
        let _ = poll(&mut hangup, Some(&Timespec::try_from(PATIENCE).unwrap()));
    });
    let mut device = started(&fake);
    device.map(region("late", BASE)).unwrap();
    let begun = Instant::now();
    reason(device.unmap(BASE, Instant::now() + Duration::from_secs(3600)));
    assert!(begun.elapsed() < ANSWER_LIMIT + Duration::from_secs(1), "{:?}", begun.elapsed());
    device.release();
    fake.join();
}
