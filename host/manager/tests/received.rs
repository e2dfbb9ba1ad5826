//! Drivers that fail where they say what arrived: the binding leaves by itself, what was posted comes back, and the device serves the next driver.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Arrivals, Binding, Config, GuestLimits, Handle, HandleSpec, LoadSpec, Manager, Offer, Outcome, Phase, UnloadOptions,
};
use cofferdam_sim::{Behaviour, ConsoleProfile, Drive, Quiescence, SimConsole};

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);

/// `tests/guests/hostile-stream`: so many bytes in one buffer, and what the driver then does.
const FAULTS: [(usize, &str, &str); 11] = [
    (1001, "trap", "(trap)"),
    (1002, "loop", "(deadline)"),
    (1003, "eat", "(out-of-memory)"),
    (1004, "truncated-words", "received: the words end inside"),
    (1005, "huge-list", "received: 4194304 words"),
    (1006, "reserved-bits", "received: reserved bits"),
    (1007, "no-pieces", "received: an arrival of 0 pieces"),
    (1008, "unknown-buffer", "was not given"),
    (1009, "beyond-written", "1010 bytes at 0"),
    (1010, "twice", "named up to 1010"),
    (1011, "empty-piece", "0 bytes at 0"),
];
const NOTHING_ARRIVED: usize = 1012;
const GOES_ON: usize = 1013;

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Bed {
    sim: SimConsole,
    manager: Manager,
}

impl Bed {
    fn new() -> Bed {
        let behaviour = Behaviour { quiescence: Quiescence::default(), ..Behaviour::default() };
        let sim = SimConsole::new(ConsoleProfile::default(), behaviour).unwrap();
        let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
        Bed { sim, manager: Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap() }
    }

    /// Loads a component, opens its port 0 and takes what arrives there.
    fn load(&self, component: &str) -> (Arc<Binding>, Handle) {
        let path = format!("{}/../../target/drivers/{component}", env!("CARGO_MANIFEST_DIR"));
        let driver =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask test' first"));
        let transport = Box::new(self.sim.transport(Drive::Threads).unwrap());
        let mut spec = LoadSpec::new(component, driver, transport);
        // What eats is to come to its memory's end before its time is over.
        spec.limits = GuestLimits { memory_bytes: 32 << 20, call_deadline_ms: 1000, ..GuestLimits::default() };
        // What becomes of a driver that is replaced is in `recovery.rs`.
        spec.restarts = None;
        let binding = self.manager.load(spec).unwrap();
        until("the port", || match binding.offer().as_deref() {
            Some(Offer::Stream(stream)) => !stream.ports.is_empty(),
            _ => false,
        });
        binding.set_open(0, true).unwrap();
        let handle = binding.open(HandleSpec { receives: true, ..HandleSpec::default() }).unwrap();
        (binding, handle)
    }
}

/// The next arrival.
fn next(handle: &Handle) -> Arrivals {
    let mut all = Arrivals::new();
    until("an arrival", || {
        handle.receive(true, &mut all);
        !all.is_empty()
    });
    all
}

/// Those of the first.
fn bytes(arrivals: &Arrivals) -> Vec<u8> {
    let mut bytes = Vec::new();
    arrivals.first().unwrap().read(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_driver_that_fails_in_received_takes_its_binding_down_and_leaves_the_posted_buffers_to_the_next() {
    for (count, name, words) in FAULTS {
        let bed = Bed::new();
        let (binding, handle) = bed.load("test/hostile-stream.wasm");
        bed.sim.feed(0, b"before");
        let kept = next(&handle);
        assert_eq!(bytes(&kept), b"before", "{name}");
        bed.sim.feed(0, &vec![7; count]);
        let mut arrivals = Arrivals::new();
        until(name, || {
            handle.receive(true, &mut arrivals);
            binding.certificate().is_some()
        });
        assert!(arrivals.is_empty(), "{name}: something arrived that the driver did not say");
        let certificate = binding.certificate().unwrap();
        assert_eq!((binding.phase(), certificate.outcome), (Phase::Detached, Outcome::Failed), "{name}");
        assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{name}: {certificate:?}");
        assert_eq!((certificate.handles_revoked, certificate.requests_failed), (1, 0), "{name}: {certificate:?}");
        let fault = binding.status().fault.map(|fault| fault.to_string()).unwrap_or_default();
        assert!(fault.contains(words), "{name}: {fault:?} does not say {words:?}");
        // What a client still holds of what arrived before is an error, and holds nothing.
        assert!(kept.first().unwrap().read(&mut Vec::new()).is_err(), "{name}");
        drop((kept, handle));
        assert_eq!(bed.sim.violations(), [], "{name}");
        // The device is whole: another driver serves it.
        let (binding, handle) = bed.load("virtio-console.wasm");
        bed.sim.feed(0, b"after");
        until(name, || bytes(&next(&handle)).ends_with(b"after"));
        drop(handle);
        let certificate = bed.manager.unload_binding(&binding, &UnloadOptions::default()).unwrap();
        assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{name}: {certificate:?}");
    }
}

#[test]
fn what_a_driver_drops_or_leaves_unfinished_is_the_devices_again_or_goes_with_the_binding() {
    let bed = Bed::new();
    let (binding, handle) = bed.load("test/hostile-stream.wasm");
    // More often than there are buffers.
    for round in 0..200_u32 {
        bed.sim.feed(0, &[9; NOTHING_ARRIVED]);
        until("the buffer is used and dropped", || {
            assert_eq!(handle.receive(true, &mut Arrivals::new()), 0);
            bed.sim.waiting(0) == 0
        });
        if round % 50 == 0 {
            // A buffer of its own, once the device is asked again.
            std::thread::sleep(Duration::from_millis(5));
            handle.receive(true, &mut Arrivals::new());
            bed.sim.feed(0, b"good");
            assert_eq!(bytes(&next(&handle)), b"good");
        }
    }
    bed.sim.feed(0, &[9; GOES_ON]);
    until("the buffer is used", || {
        assert_eq!(handle.receive(true, &mut Arrivals::new()), 0);
        bed.sim.waiting(0) == 0
    });
    assert_eq!(binding.phase(), Phase::Serving);
    let certificate = bed.manager.unload_binding(&binding, &UnloadOptions::default()).unwrap();
    assert_eq!(certificate.outcome, Outcome::Unloaded);
    assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
}
