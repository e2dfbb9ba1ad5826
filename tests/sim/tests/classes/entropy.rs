//! The entropy device.

use cofferdam_device::DeviceFault;
use cofferdam_sim::ring::Violation;
use cofferdam_sim::{Drive, EntropyProfile, SimRng};

use crate::rig::{Rig, behaviour};

fn rig(rules: &[&str]) -> (SimRng, Rig) {
    let sim = SimRng::new(EntropyProfile::default(), behaviour(rules)).unwrap();
    let rig = Rig::new(sim.transport(Drive::Stepped).unwrap(), 0);
    (sim, rig)
}

#[test]
fn buffers_are_filled_with_the_seeds_stream() {
    let sim = SimRng::new(EntropyProfile::default(), behaviour(&[])).unwrap();
    let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
    assert_eq!(rig.transport.device_type(), Some(4));
    let mut got = Vec::new();
    for (token, length) in [(0, 1), (1, 4096), (2, 7), (3, 1000)] {
        rig.post(0, token, length);
        let (used, bytes) = rig.receive(0);
        assert_eq!((used, bytes.len()), (token, length as usize));
        got.extend(bytes);
    }
    assert_eq!(got, SimRng::stream(42, got.len()));
    assert_eq!((sim.violations(), sim.placed_bytes()), (vec![], got.len() as u64));
}

#[test]
fn an_answer_can_be_short_empty_or_claim_too_much() {
    let (sim, mut rig) = rig(&["lie:answer-short@nth=1", "lie:length-zero@nth=2", "lie:length-long@nth=3"]);
    rig.post(0, 0, 100);
    sim.step();
    let used = rig.pop(0).unwrap().unwrap();
    assert!((1..100).contains(&used.written), "{used:?}");
    assert_eq!(rig.data(0, 0, used.written), SimRng::stream(42, used.written as usize));
    assert_eq!(rig.data(0, 0, 100)[used.written as usize..], vec![0xee; 100 - used.written as usize]);
    rig.post(0, 1, 100);
    sim.step();
    assert_eq!(rig.pop(0).unwrap().unwrap().written, 0);
    assert_eq!(rig.data(0, 1, 100), [0xee; 100], "nothing was placed");
    rig.post(0, 2, 100);
    sim.step();
    assert!(matches!(rig.pop(0), Err(DeviceFault::Overrun { .. })));
}

#[test]
fn an_answer_can_be_slow() {
    let (sim, mut rig) = rig(&["slow:3"]);
    rig.post(0, 0, 8);
    let answered: Vec<_> = (0..5).map(|_| sim.step()).collect();
    assert_eq!(answered, [0, 0, 0, 1, 0]);
}

#[test]
fn a_buffer_to_read_is_a_breach_by_the_driver() {
    let (sim, mut rig) = rig(&[]);
    rig.send(0, 0, b"what for?");
    sim.step();
    assert_eq!(rig.pop(0), Ok(None));
    assert_eq!(sim.violations(), [Violation::NotARequest { head: 0, readable_bytes: 9, writable_bytes: 0 }]);
}
