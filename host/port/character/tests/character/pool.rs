//! The kernel's pool. What it does with what it is given cannot be seen; how much it is given can.

use std::time::{Duration, Instant};

use cofferdam_port_character::CharacterError;
use cofferdam_sim::{EntropyProfile, SimRng};

use crate::support::{Bed, behaviour, until};

#[test]
fn the_pool_is_fed_at_the_rate_that_was_asked_for_and_by_root_alone() {
    for (address, rate) in [("entropy-pool", 64), ("entropy-pool,rate=1000", 1000)] {
        let sim = SimRng::new(EntropyProfile::default(), behaviour(&[])).unwrap();
        let bed = Bed::new("virtio-rng", &sim, 1);
        let begun = Instant::now();
        let port = match bed.start(address) {
            Ok(port) => port,
            Err(error) => {
                assert!(matches!(error, CharacterError::NotAllowed), "{error}");
                assert!(!rustix::process::geteuid().is_root() && sim.placed_bytes() == 0);
                continue;
            }
        };
        assert!(bed.binding.attach_port(Box::new(port)).is_ok());
        until("the first portion", || sim.placed_bytes() >= rate);
        until("the second", || sim.placed_bytes() >= 2 * rate);
        assert!(begun.elapsed() >= Duration::from_millis(900), "it came after {:?}", begun.elapsed());
        assert!(sim.placed_bytes() <= rate * (1 + begun.elapsed().as_secs() + 1), "{}", sim.placed_bytes());
        bed.unload();
    }
}
