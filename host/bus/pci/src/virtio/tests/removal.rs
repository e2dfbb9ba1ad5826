//! A function that goes away is lost, at whatever step, and what its registers read then is no data.

use std::time::{Duration, Instant};

use cofferdam_device::{Silence, Transport, TransportError};

use crate::virtio::device::feature;
use crate::virtio::testing::{CAPACITY, Did, Gone, Sim, open, setup};

/// A whole life. What it answers is what the first step that failed said, and whether the function was open by then.
fn live(sim: &Sim) -> Result<(), (bool, String)> {
    let mut device = open(sim).map_err(|error| (false, error.to_string()))?;
    let run = |device: &mut crate::virtio::VirtioPci| -> Result<(), TransportError> {
        device.negotiate(feature::VERSION_1)?;
        let mut capacity = [0xaa; 8];
        match device.read_config(0, &mut capacity) {
            Ok(()) => assert_eq!(u64::from_le_bytes(capacity), CAPACITY, "what nobody answered was taken for data"),
            Err(error) => {
                assert_eq!(capacity, [0xaa; 8]);
                return Err(error);
            }
        }
        let region = device.memory("rings", 4 << 20, 0).unwrap();
        device.map(region.clone())?;
        let first = device.setup_queue(setup(0, &region))?;
        let _second = device.setup_queue(setup(1, &region))?;
        device.start()?;
        first.doorbell.ring();
        if device.is_lost() { Err(TransportError::Lost) } else { Ok(()) }
    };
    let outcome = run(&mut device);
    let lost = device.is_lost();
    if let Err(error) = &outcome {
        assert!(matches!(error, TransportError::Lost), "{error}");
        assert!(lost);
        assert!(matches!(device.read_config(0, &mut [0; 4]), Err(TransportError::Lost)));
    }
    let silence = device.quiesce(3, Instant::now() + Duration::from_secs(5));
    if !sim.model().faults.gone_in_secret {
        assert_eq!(silence, Silence::Confirmed, "what is out of the machine reaches nothing");
    }
    device.release();
    assert_eq!(sim.did().last(), Some(&Did::Release));
    outcome.map_err(|error| (true, error.to_string()))
}

/// Register accesses of a life without trouble, up to the last look.
fn accesses() -> usize {
    let sim = Sim::new(|_| {});
    live(&sim).unwrap();
    sim.model().accesses
}

#[test]
fn removal_before_any_access_is_noticed_and_nothing_of_it_is_believed() {
    let all = accesses();
    assert!(all > 60, "{all}");
    for gone in [Gone::Ones, Gone::Zero] {
        for in_secret in [false, true] {
            let (mut at_open, mut later) = (0, 0);
            for at in 0..all {
                let sim = Sim::new(|model| {
                    model.faults.gone_at = Some((at, gone));
                    model.faults.gone_in_secret = in_secret;
                    model.faults.no_function_reset = true;
                });
                match live(&sim) {
                    Err((false, why)) => {
                        let mute = in_secret && why.contains("all ones");
                        assert!(why.contains("the device is gone") || mute, "at access {at}, {gone:?}: {why}");
                        at_open += 1;
                    }
                    Err((true, _)) => later += 1,
                    // In the reset at the end, which comes after the last look.
                    Ok(()) => assert!(at + 8 >= all, "access {at} of {all}, {gone:?}: not noticed"),
                }
                assert_eq!(sim.model().violations, Vec::<String>::new());
            }
            assert!(at_open > 5 && later > 40, "{at_open} {later}");
        }
    }
}

#[test]
fn a_running_device_that_is_gone_is_lost_for_good() {
    for gone in [Gone::Ones, Gone::Zero] {
        for in_secret in [false, true] {
            let sim = Sim::new(|model| model.faults.gone_in_secret = in_secret);
            let (mut device, region) = crate::virtio::testing::prepared(&sim);
            let events = device.setup_queue(setup(0, &region)).unwrap();
            device.start().unwrap();
            sim.remove(gone);
            assert!(device.is_lost());
            // Back, or something else in its place: it is not the device that was started.
            sim.model().faults.gone_at = None;
            assert!(device.is_lost());
            let before = sim.did();
            events.doorbell.ring();
            assert_eq!(sim.did(), before, "a lost device is not notified");
            assert!(matches!(device.read_config(0, &mut [0; 8]), Err(TransportError::Lost)));
        }
    }
}

#[test]
fn a_device_that_resets_itself_or_asks_for_it_is_lost() {
    for status in [0x00, 0x4f, 0x01, 0x40] {
        let sim = Sim::new(|_| {});
        let (mut device, region) = crate::virtio::testing::prepared(&sim);
        let _events = device.setup_queue(setup(0, &region)).unwrap();
        device.start().unwrap();
        assert!(!device.is_lost());
        sim.model().status = status;
        assert!(device.read_config(0, &mut [0; 8]).is_err());
        assert!(device.is_lost(), "{status:#x}");
        // It is there, so it is asked for silence like any other.
        assert_eq!(device.quiesce(0, Instant::now() + Duration::from_secs(2)), Silence::Confirmed);
        assert_eq!(sim.did()[sim.did().len() - 2..], [Did::Status(0), Did::Quiet]);
    }
}
