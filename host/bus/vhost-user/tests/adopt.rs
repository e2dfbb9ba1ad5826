//! A device whose front end is exchanged: the backend, which writes down what it hears, hears nothing of it.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::{KIND, VhostUser};
use cofferdam_device::{
    DmaRegion, Exported, QueueAddresses, QueueEvents, QueueSetup, Silence, Transport, TransportError,
};
use common::fake::{Act, CONFIG, Fake, GET_CONFIG, MQ, PROTOCOL_FEATURES, REPLY_ACK, VERSION_1, honest};

const IOVA: u64 = 0x1000_0000;
const BYTES: u64 = 16384;

/// A backend, how many messages it has had, and what it says its configuration is.
fn backend() -> (Fake, Arc<AtomicUsize>) {
    let heard = Arc::new(AtomicUsize::new(0));
    let (count, mut behave) = (Arc::clone(&heard), honest(VERSION_1 | PROTOCOL_FEATURES, MQ | CONFIG | REPLY_ACK));
    let changes = Mutex::new(0_u8);
    let fake = Fake::serve(move |message| {
        count.fetch_add(1, Ordering::SeqCst);
        if message.request == GET_CONFIG {
            // Other bytes each time.
            let mut answer = message.body.clone();
            let mut change = changes.lock().unwrap();
            *change += 1;
            answer[12..].fill(*change);
            return Act::Answer(answer);
        }
        behave(message)
    });
    (fake, heard)
}

fn running(fake: &Fake) -> (VhostUser, Arc<DmaRegion>, QueueEvents) {
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    device.negotiate(VERSION_1).unwrap();
    device.read_config(0, &mut [0; 60]).unwrap();
    let region = Arc::new(DmaRegion::new("adopt", BYTES, IOVA).unwrap());
    device.map(Arc::clone(&region)).unwrap();
    let addresses = QueueAddresses { descriptors: IOVA, available: IOVA + 4096, used: IOVA + 8192 };
    let events = device.setup_queue(QueueSetup { index: 0, size: 16, addresses }).unwrap();
    device.start().unwrap();
    (device, region, events)
}

fn adopted(exported: Exported, region: &DmaRegion) -> Result<VhostUser, TransportError> {
    let mut device = VhostUser::adopt(exported)?;
    let memory = DmaRegion::adopt(region.duplicate().unwrap(), BYTES, IOVA).unwrap();
    device.adopt_memory(Arc::new(memory))?;
    Ok(device)
}

fn now() -> Instant {
    Instant::now()
}

#[test]
fn the_backend_hears_nothing_of_it_and_the_next_front_end_goes_on() {
    let (fake, heard) = backend();
    let (mut old, region, events) = running(&fake);
    old.exportable().unwrap();
    let quiet = heard.load(Ordering::SeqCst);
    let exported = old.export().unwrap();
    let mut new = adopted(exported, &region).unwrap();
    assert_eq!((new.address(), new.offered_features()), (old.address(), old.offered_features()));
    assert_eq!((new.max_queues(), new.backend_pid()), (old.max_queues(), old.backend_pid()));
    let mut config = [[0; 60]; 2];
    old.read_config(0, &mut config[0]).unwrap();
    new.read_config(0, &mut config[1]).unwrap();
    assert_eq!(config, [[1; 60]; 2], "what was read last");
    for device in [&mut old, &mut new] {
        assert!(device.read_config(0, &mut [0; 61]).is_err(), "more than is known");
        assert!(matches!(device.quiesce(0, now()), Silence::Unconfirmed { .. }), "who has it is not known here");
        assert!(!device.is_lost() && !device.take_config_change());
        assert!(device.export().is_err(), "once is enough");
    }
    let kick = events.doorbell.descriptor().unwrap().try_clone_to_owned().unwrap();
    assert!(new.adopt_queue(1, kick.try_clone().unwrap()).is_err(), "it does not run");
    let bell = new.adopt_queue(0, kick).unwrap();
    bell.ring();
    assert!(common::readable(events.doorbell.descriptor().unwrap()), "it is the same doorbell");
    assert_eq!(heard.load(Ordering::SeqCst), quiet);
    // The first one goes as a process goes that has handed over.
    drop(old);
    assert_eq!(heard.load(Ordering::SeqCst), quiet);
    new.resume();
    new.read_config(0, &mut [0; 60]).unwrap();
    assert_eq!(heard.load(Ordering::SeqCst), quiet + 1);
    assert!(!new.is_lost());
    assert_eq!(new.quiesce(0, now() + Duration::from_secs(5)), Silence::Confirmed);
    assert!(matches!(VhostUser::connect(&fake.address()), Err(error) if error.to_string().contains("claimed")));
    drop(new);
    fake.join();
}

#[test]
fn a_front_end_that_takes_its_device_back_goes_on_whatever_the_other_one_did() {
    let (fake, heard) = backend();
    let (mut old, region, _events) = running(&fake);
    for adopts in [false, true] {
        let exported = old.export().unwrap();
        let quiet = heard.load(Ordering::SeqCst);
        if adopts {
            let mut new = adopted(exported, &region).unwrap();
            new.release();
        }
        assert_eq!(heard.load(Ordering::SeqCst), quiet);
        old.resume();
        old.read_config(0, &mut [0; 60]).unwrap();
    }
    assert!(!old.is_lost());
    drop(old);
    fake.join();
}

#[test]
fn what_does_not_run_or_is_shared_with_clients_is_not_exported() {
    let (fake, _) = backend();
    let mut device = VhostUser::connect(&fake.address()).unwrap();
    assert!(device.exportable().unwrap_err().to_string().contains("does not run"));
    assert!(device.export().is_err());
    device.release();
    assert!(device.export().is_err());
}

#[test]
fn what_was_received_is_checked() {
    let (fake, _) = backend();
    let (mut old, region, events) = running(&fake);
    type Change = fn(&mut Exported);
    let changes: [Change; 9] = [
        |exported| exported.kind = "pci".into(),
        |exported| exported.state.clear(),
        |exported| exported.state = exported.state.replace("\"address\":\"", "\"address\":\"x"),
        |exported| exported.state = exported.state.replace("\"max_queues\":", "\"max_queues\":999"),
        |exported| exported.state = exported.state.replace("\"queues\":[0]", "\"queues\":[0,0]"),
        |exported| exported.state = exported.state.replace("\"queues\":[0]", "\"queues\":[2]"),
        |exported| exported.state = exported.state.replace("\"memory\":[[", "\"memory\":[[1"),
        |exported| drop(exported.descriptors.pop()),
        |exported| exported.descriptors.push(std::fs::File::open("/dev/null").unwrap().into()),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut exported = old.export().unwrap();
        assert_eq!(exported.kind, KIND);
        change(&mut exported);
        assert!(adopted(exported, &region).is_err(), "change {number}");
        old.resume();
    }
    let mut new = VhostUser::adopt(old.export().unwrap()).unwrap();
    let other = Arc::new(DmaRegion::new("adopt", 4096, IOVA).unwrap());
    assert!(new.adopt_memory(other).is_err(), "memory of another length");
    let kick = events.doorbell.descriptor().unwrap().try_clone_to_owned().unwrap();
    assert!(new.adopt_queue(0, kick).is_err(), "the device reaches memory that nobody has");
    drop((old, new));
    fake.join();
}
