//! The transport against peers that are wrong: none may make it hang, panic or believe them.

mod common;

use std::io::Write;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::mpsc;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::{ANSWER_LIMIT, ConnectError, MAX_REGIONS, VhostUser};
use cofferdam_device::{DmaRegion, QueueAddresses, QueueSetup, Silence, Transport, TransportError};
use common::disk::reason;
use common::fake::*;
use common::{PATIENCE, readable};

/// Everything that is bounded must end in this time, on a loaded machine too.
const BOUND: Duration = Duration::from_secs(5);

fn refused(fake: &Fake) -> ConnectError {
    VhostUser::connect(&fake.address()).err().expect("connected")
}

fn region(iova: u64) -> Arc<DmaRegion> {
    Arc::new(DmaRegion::new("test", 65_536, iova).unwrap())
}

fn setup(index: u16, size: u16) -> QueueSetup {
    let addresses = QueueAddresses { descriptors: 0x1000, available: 0x2000, used: 0x3000 };
    QueueSetup { index, size, addresses }
}

/// A device with one ring running.
fn started(fake: &Fake) -> VhostUser {
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    device.negotiate(VERSION_1).unwrap();
    device.map(region(0x1000)).unwrap();
    device.setup_queue(setup(0, 16)).unwrap();
    device.start().unwrap();
    device
}

#[test]
fn what_is_not_a_socket_that_listens_is_named_for_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.sock");
    let address = format!("vhost-user:{}", path.display());
    let error = || VhostUser::connect(&address).err().unwrap();
    assert!(matches!(error(), ConnectError::NotFound(_)));
    std::fs::write(&path, "").unwrap();
    assert!(matches!(error(), ConnectError::NotASocket(_)));
    std::fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    assert!(matches!(error(), ConnectError::NobodyListens(_)));
    std::fs::remove_file(&path).unwrap();
    let _datagrams = UnixDatagram::bind(&path).unwrap();
    assert!(error().to_string().contains("not a stream socket"));
    let inside = VhostUser::connect(&format!("{address}/inside.sock")).err().unwrap();
    assert!(matches!(inside, ConnectError::NotFound(_)));
    let relative = VhostUser::connect("vhost-user:x.sock").err().unwrap();
    assert!(matches!(relative, ConnectError::Address { .. }));
}

#[test]
fn answers_that_break_the_protocol_are_not_a_vhost_user_device() {
    let garbage: [(&str, Vec<u8>); 7] = [
        ("HTTP", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec()),
        ("zeroes", vec![0; 64]),
        ("ones", vec![0xff; 64]),
        ("another request", answer(2, &[0; 8])),
        ("not an answer", message(1, 0x1, &[0; 8])),
        ("another version", message(1, 0x6, &[0; 8])),
        ("too short", answer(1, &[0; 4])),
    ];
    for (name, bytes) in garbage {
        let fake = Fake::serve(move |_| Act::Raw(bytes.clone()));
        let error = refused(&fake);
        assert!(matches!(error, ConnectError::NotVhostUser { .. }), "{name}: {error}");
        fake.join();
    }
    // A length beyond reason is refused as it is, not waited for and not allocated.
    let mut long = message(1, 0x5, &[]);
    long[8..].copy_from_slice(&u32::MAX.to_ne_bytes());
    let fake = Fake::serve(move |_| Act::Raw(long.clone()));
    assert!(refused(&fake).to_string().contains("4294967295 bytes"));
}

#[test]
fn a_peer_that_closes_at_any_step_of_the_handshake_is_said_to_have_closed() {
    for step in [GET_FEATURES, GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_OWNER] {
        let mut behave = complete();
        let fake = Fake::serve(move |message| if message.request == step { Act::Close } else { behave(message) });
        let error = refused(&fake);
        assert!(matches!(error, ConnectError::Closed(_)), "step {step}: {error}");
        assert!(matches!(TransportError::from(error), TransportError::Lost));
    }
    let fake = Fake::run(drop);
    assert!(matches!(refused(&fake), ConnectError::Closed(_)));
}

#[test]
fn a_peer_that_never_answers_is_given_up_in_time() {
    let peers = [
        Fake::serve(|_| Act::Nothing),
        // Half a header, and half an answer.
        Fake::serve(|_| Act::Raw(answer(GET_FEATURES, &[0; 8])[..6].to_vec())),
        Fake::serve(|_| Act::Raw(answer(GET_FEATURES, &[0; 8])[..15].to_vec())),
    ];
    // All at once: each takes the whole limit.
    std::thread::scope(|scope| {
        for fake in &peers {
            scope.spawn(move || {
                let begun = Instant::now();
                let error = refused(fake);
                let took = begun.elapsed();
                assert!(matches!(error, ConnectError::Silent(_)), "{error}");
                assert!(took >= ANSWER_LIMIT && took < BOUND, "{took:?}");
            });
        }
    });
}

#[test]
fn a_peer_that_never_accepts_is_given_up_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full.sock");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _fills_the_queue = UnixStream::connect(&path).unwrap();
    let begun = Instant::now();
    let error = VhostUser::connect(&format!("vhost-user:{}", path.display())).err().unwrap();
    assert!(matches!(error, ConnectError::Silent(_)), "{error}");
    assert!(begun.elapsed() < BOUND);
}

#[test]
fn a_legacy_device_is_refused_by_name() {
    let fake = Fake::serve(honest(PROTOCOL_FEATURES, MQ | CONFIG | REPLY_ACK));
    let error = refused(&fake).to_string();
    assert!(error.contains("VIRTIO_F_VERSION_1"), "{error}");
}

#[test]
fn a_device_without_queues_is_refused() {
    let mut behave = complete();
    let fake = Fake::serve(move |message| match message.request {
        GET_QUEUE_NUM => Act::Answer(vec![0; 8]),
        _ => behave(message),
    });
    assert!(refused(&fake).to_string().contains("no queues"));
}

#[test]
fn a_device_without_configuration_space_is_no_block_device() {
    let fake = Fake::serve(honest(VERSION_1 | PROTOCOL_FEATURES, REPLY_ACK));
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    assert_eq!(device.max_queues(), 1, "no MQ, one queue");
    let error = device.read_config(0, &mut [0; 8]).unwrap_err();
    assert!(matches!(error, TransportError::Refused(_)));
    assert!(error.to_string().contains("not a block device?"), "{error}");
}

#[test]
fn configuration_of_the_wrong_length_is_not_believed() {
    // (answer, what it is): qemu's and rust-vmm's refusals, and lies about the size.
    let head = |size: u32| [0, size, 0].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
    let cases = [
        (vec![], true),
        (head(0), true),
        (head(8), false),
        ([head(4), vec![0; 4]].concat(), false),
        ([head(8), vec![0; 64]].concat(), false),
        (vec![1; 5], false),
    ];
    for (body, refusal) in cases {
        let mut behave = complete();
        let fake = Fake::serve(move |message| match message.request {
            GET_CONFIG => Act::Answer(body.clone()),
            _ => behave(message),
        });
        let mut device = VhostUser::connect(&fake.address()).unwrap();
        match device.read_config(0, &mut [0; 8]).unwrap_err() {
            TransportError::Refused(_) => assert!(refusal),
            TransportError::Protocol(_) => assert!(!refusal),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_device_without_any_protocol_feature_is_driven_too() {
    let fake = Fake::serve(honest(VERSION_1, 0));
    let mut device = started(&fake);
    assert_eq!(device.max_queues(), 1);
    device.release();
    fake.join();
}

#[test]
fn a_refusal_keeps_the_connection_and_the_region() {
    let mut behave = complete();
    let mut first = true;
    let fake = Fake::serve(move |message| match message.request {
        SET_MEM_TABLE if std::mem::take(&mut first) => Act::Answer(1u64.to_ne_bytes().to_vec()),
        _ => behave(message),
    });
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    let memory = region(0x1000);
    let error = device.map(Arc::clone(&memory)).unwrap_err();
    assert!(matches!(error, TransportError::Refused(_)), "{error}");
    // The backend has had the descriptor, so the region lives until release.
    assert_eq!(Arc::strong_count(&memory), 2);
    device.map(region(0x10_0000)).unwrap();
    assert!(!device.is_lost());
    device.release();
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn misuse_is_refused_before_it_reaches_the_backend() {
    let fake = Fake::serve(complete());
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    let invalid = |result: Result<(), TransportError>, what: &str| match result {
        Err(TransportError::Invalid(_)) => {}
        other => panic!("{what}: {other:?}"),
    };
    invalid(device.negotiate(VERSION_1 | 1), "a feature that was not offered");
    invalid(device.negotiate(0), "a legacy driver");
    invalid(device.start(), "start before negotiate");
    invalid(device.setup_queue(setup(0, 16)).map(drop), "a queue before negotiate");
    device.negotiate(VERSION_1 | PROTOCOL_FEATURES).unwrap();
    invalid(device.negotiate(VERSION_1), "negotiate twice");
    invalid(device.setup_queue(setup(0, 16)).map(drop), "rings in memory that is not mapped");
    device.map(region(0x1000)).unwrap();
    invalid(device.map(region(0x1_0000)), "an overlap");
    for at in 1..MAX_REGIONS as u64 {
        device.map(region(at << 20)).unwrap();
    }
    invalid(device.map(region(1 << 30)), "a ninth region");
    invalid(device.setup_queue(setup(2, 16)).map(drop), "a queue that the device has not");
    invalid(device.setup_queue(setup(0, 24)).map(drop), "a size that is no power of two");
    invalid(device.setup_queue(setup(0, 0)).map(drop), "an empty ring");
    invalid(device.setup_queue(setup(0, 2048)).map(drop), "a ring that is too large");
    let mut crooked = setup(0, 16);
    crooked.addresses.descriptors += 8;
    invalid(device.setup_queue(crooked).map(drop), "a misaligned ring");
    let mut outside = setup(0, 16);
    outside.addresses.used = 0x1_0ffc;
    invalid(device.setup_queue(outside).map(drop), "a ring over the end of its region");
    device.setup_queue(setup(0, 16)).unwrap();
    invalid(device.setup_queue(setup(0, 16)).map(drop), "a queue twice");
    invalid(device.map(region(1 << 30)), "memory after a ring");
    device.start().unwrap();
    invalid(device.start(), "start twice");
    invalid(device.setup_queue(setup(1, 16)).map(drop), "a queue after start");
    assert!(!device.is_lost());
    device.release();
    invalid(device.read_config(0, &mut [0; 8]), "after release");
}

#[test]
fn an_iommu_feature_is_refused() {
    let platform = 1 << 33;
    let fake = Fake::serve(honest(VERSION_1 | platform, 0));
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    assert_eq!(device.offered_features(), VERSION_1 | platform);
    let error = device.negotiate(VERSION_1 | platform).unwrap_err();
    assert!(matches!(error, TransportError::Refused(_)), "{error}");
}

#[test]
fn a_message_that_nobody_asked_for_ends_the_device() {
    let (send, wait) = mpsc::channel();
    let fake = Fake::run(move |mut stream| {
        let mut behave = complete();
        for _ in 0..6 {
            let Some(message) = receive(&mut stream) else { return };
            if let Act::Answer(body) = behave(&message) {
                stream.write_all(&answer(message.request, &body)).unwrap();
            }
        }
        wait.recv().unwrap();
        stream.write_all(b"!").unwrap();
        // Until the front end has closed.
        while receive(&mut stream).is_some() {}
    });
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    assert!(!device.is_lost());
    send.send(()).unwrap();
    assert!(readable(device.event_fd().unwrap()));
    assert!(device.is_lost());
    let lost = device.read_config(0, &mut [0; 8]).unwrap_err();
    assert!(matches!(lost, TransportError::Lost), "{lost}");
    fake.join();
}

#[test]
fn a_backend_in_this_process_is_never_taken_for_gone() {
    let fake = Fake::serve(complete());
    let mut device = started(&fake);
    assert_eq!(device.backend_pid(), None);
    let why = reason(device.quiesce(2, Instant::now()));
    assert!(why.contains("the backend has: 2") && why.contains("this process"), "{why}");
    assert_eq!(device.quiesce(0, Instant::now() + PATIENCE), Silence::Confirmed);
    device.release();
    fake.join();
}

#[test]
fn a_ring_that_stops_late_is_confirmed_by_the_next_call() {
    let asked = Arc::new(Barrier::new(2));
    let (permit, permitted) = mpsc::channel::<()>();
    let mut behave = complete();
    let in_fake = Arc::clone(&asked);
    let mut questions = 0;
    let fake = Fake::serve(move |message| {
        if message.request == GET_VRING_BASE {
            questions += 1;
            assert_eq!((questions, message.index()), (1, 0), "asked once");
            in_fake.wait();
            permitted.recv().unwrap();
        }
        behave(message)
    });
    let mut device = started(&fake);
    let why = reason(device.quiesce(0, Instant::now()));
    assert!(why.contains("stopping ring 0") && why.contains("in time"), "{why}");
    asked.wait();
    assert!(!device.is_lost(), "late is not lost");
    permit.send(()).unwrap();
    assert_eq!(device.quiesce(0, Instant::now() + PATIENCE), Silence::Confirmed);
    device.release();
    fake.join();
}

#[test]
fn a_ring_that_never_stops_is_unconfirmed_by_the_deadline() {
    let mut behave = complete();
    let fake = Fake::serve(move |message| match message.request {
        GET_VRING_BASE => Act::Nothing,
        _ => behave(message),
    });
    let mut device = started(&fake);
    let begun = Instant::now();
    let why = reason(device.quiesce(0, begun + Duration::from_millis(100)));
    assert!(begun.elapsed() < BOUND);
    assert!(why.contains("stopping ring 0"), "{why}");
    device.release();
    let why = reason(device.quiesce(0, Instant::now()));
    assert!(why.contains("released before it was silent"), "{why}");
    fake.join();
}

#[test]
fn garbage_for_the_end_of_a_ring_is_no_end() {
    let mut behave = complete();
    let fake = Fake::serve(move |message| match message.request {
        GET_VRING_BASE => Act::Answer(vec![0; 3]),
        _ => behave(message),
    });
    let mut device = started(&fake);
    for _ in 0..2 {
        // The connection is over then, and an ended connection does not make a device silent that was never heard to stop.
        let why = reason(device.quiesce(0, Instant::now() + Duration::from_millis(200)));
        assert!(why.contains("ring 0") || why.contains("malformed"), "{why}");
    }
}

#[test]
fn a_message_that_is_not_acknowledged_ends_the_connection_in_time() {
    let mut behave = complete();
    let fake = Fake::serve(move |message| match message.request {
        SET_FEATURES => Act::Nothing,
        _ => behave(message),
    });
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    let begun = Instant::now();
    let error = device.negotiate(VERSION_1).unwrap_err();
    assert!(matches!(error, TransportError::Timeout), "{error}");
    assert!(begun.elapsed() < BOUND);
    // Out of step: never used again, and the backend is told.
    assert!(device.is_lost());
    fake.join();
}

#[test]
fn no_ring_given_is_silence_from_the_start() {
    let fake = Fake::serve(complete());
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    device.negotiate(VERSION_1).unwrap();
    device.map(region(0x1000)).unwrap();
    assert_eq!(device.quiesce(0, Instant::now()), Silence::Confirmed);
}
