//! How fast the net device is by itself, measured on demand:
//! `cargo test --release -p cofferdam-sim --test classes -- --ignored --nocapture`. No assertion about time.

use std::time::{Duration, Instant};

use cofferdam_sim::{Behaviour, Drive, NetHeader, NetProfile, SimNet, Transmit};

use crate::rig::Rig;

#[test]
#[ignore = "a measurement, and it takes two cores for itself"]
fn frames_of_64_bytes_per_second() {
    for (name, queue) in [("received", 0), ("transmitted", 1)] {
        let behaviour = Behaviour { spin: Duration::MAX, ..Behaviour::default() };
        let sim = SimNet::new(NetProfile::default(), behaviour).unwrap();
        sim.set_transmit(Transmit::Sink);
        sim.set_generator(Some(&SimNet::test_frame(64)));
        let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap(), 0);
        let frame = [&NetHeader::default().to_bytes()[..], &SimNet::test_frame(64)].concat();
        let begun = Instant::now();
        let mut frames = 0u64;
        for token in 0.. {
            if rig.in_flight(queue) >= 32 {
                frames += u64::from(rig.pop(queue).unwrap().is_some());
                if begun.elapsed() > Duration::from_secs(1) {
                    break;
                }
                if rig.in_flight(queue) >= 32 {
                    continue;
                }
            }
            if queue == 0 { rig.post(queue, token, 128) } else { rig.send(queue, token, &frame) }
        }
        println!("{name}: {frames} frames in a second by a driver that fills 4,096 bytes for each");
    }
}
