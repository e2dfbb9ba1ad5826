//! How fast the null device is, measured on demand: `cargo test --release -p cofferdam-sim --test throughput -- --ignored --nocapture`.
//! No assertion about time: the bench of the front end has those.

mod common;

use std::time::{Duration, Instant};

use cofferdam_sim::{Drive, Storage};
use common::{Do, Rig, sim_with};

#[test]
#[ignore = "a measurement, and it takes two cores for itself"]
fn null_device_requests_per_second() {
    for (name, spin) in [("poll", Duration::MAX), ("event", Duration::ZERO)] {
        let sim = sim_with(&[], |options| {
            options.storage = Storage::Null(1 << 30);
            options.spin = spin;
        });
        let mut rig = Rig::new(sim.transport(Drive::Threads).unwrap());
        let begun = Instant::now();
        let mut answered = 0u64;
        for token in 0..16 {
            rig.add(0, token, &Do::Read { sector: 0, sectors: 8 });
        }
        rig.publish(0);
        while begun.elapsed() < Duration::from_secs(1) {
            let mut more = false;
            if spin.is_zero() {
                let used = rig.next(0).unwrap();
                rig.add(0, used.token, &Do::Read { sector: 0, sectors: 8 });
                (answered, more) = (answered + 1, true);
            }
            while let Some(used) = rig.pop().unwrap() {
                rig.add(0, used.token, &Do::Read { sector: 0, sectors: 8 });
                (answered, more) = (answered + 1, true);
            }
            if more {
                rig.publish(0);
            }
        }
        let stats = sim.stats();
        println!(
            "{name}: {answered} requests in a second, {} doorbells, {} notifications",
            stats.doorbells, stats.notifications
        );
    }
}
