//! Another component in the place of a driver, under its clients; and what brings the old one back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cofferdam_device::TransportError;
use cofferdam_device::transport::Transport;
use cofferdam_manager::{
    Binding, Config, EventKind, HandleSpec, IoFlags, IoOp, IoRequest, LoadSpec, Manager, Outcome, Phase, SubmitError,
    UnloadOptions, UpgradeError, UpgradeReport, UpgradeSpec,
};
use cofferdam_sim::{Drive, Hooked, Hooks, Options, Profile, Sim, Storage};

const BLOCK: u32 = 4096;
/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);

struct Bed {
    manager: Manager,
    binding: Arc<Binding>,
    sim: Sim,
}

fn component(name: &str) -> Vec<u8> {
    let path = format!("{}/../../target/drivers/{name}.wasm", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn bed(driver: &str, lanes: u16) -> Bed {
    bed_with(driver, lanes, |_| {})
}

fn bed_with(driver: &str, lanes: u16, change: impl FnOnce(&mut LoadSpec)) -> Bed {
    bed_over(driver, lanes, |device| device, change)
}

fn bed_over(
    driver: &str,
    lanes: u16,
    wrap: impl FnOnce(Box<dyn Transport>) -> Box<dyn Transport>,
    change: impl FnOnce(&mut LoadSpec),
) -> Bed {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    let manager = Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap();
    let profile = Profile { queues: lanes, ..Profile::default() };
    let sim = Sim::new(Options { profile, storage: Storage::Memory(16 << 20), ..Options::default() }).unwrap();
    let device = wrap(Box::new(sim.transport(Drive::Threads).unwrap()));
    let mut spec = LoadSpec::new(driver, component(driver), device);
    (spec.name, spec.queues) = (Some("disk".into()), Some(lanes));
    change(&mut spec);
    let binding = manager.load(spec).unwrap();
    Bed { manager, binding, sim }
}

impl Bed {
    fn upgrade(&self, driver: &str, probation: Duration) -> Result<UpgradeReport, UpgradeError> {
        let (deadline, component) = (Duration::from_secs(2), component(driver));
        self.manager.upgrade("disk", UpgradeSpec { driver: driver.into(), component, deadline, probation })
    }

    fn rollbacks(&self) -> Vec<(String, String, String)> {
        let mut events = self.manager.events(None);
        let events = std::iter::from_fn(|| events.next(Duration::ZERO));
        let rolled = events.filter_map(|event| match event.what {
            EventKind::RolledBack { from, to, reason } => Some((from, to, reason)),
            _ => None,
        });
        rolled.collect()
    }

    fn is_clean(&self) {
        let certificate = self.manager.unload_binding(&self.binding, &UnloadOptions::default()).unwrap();
        assert_eq!(certificate.outcome, Outcome::Unloaded, "{certificate:?}");
        assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
        assert_eq!(self.sim.violations(), []);
    }

    /// Runs `work` while clients of every lane write and read, each its own blocks; how many requests were served. Each must have been, and with the right data.
    fn under_load<R>(&self, work: impl FnOnce() -> R) -> (u64, R) {
        let stop = AtomicBool::new(false);
        let lanes = self.binding.lanes();
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..lanes)
                .map(|lane| {
                    let stop = &stop;
                    scope.spawn(move || client(&self.binding, lane, stop))
                })
                .collect();
            // Also when the work fails: the scope waits for them.
            let stopping = Stop(&stop);
            let result = work();
            drop(stopping);
            (clients.into_iter().map(|client| client.join().unwrap()).sum(), result)
        })
    }
}

/// Tells the clients to stop.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Writes and reads 16 blocks at a time until it is told to stop.
fn client(binding: &Arc<Binding>, lane: usize, stop: &AtomicBool) -> u64 {
    const DEPTH: u64 = 16;
    let handle = binding.open(HandleSpec { lane, ..HandleSpec::default() }).unwrap();
    let (mut served, mut out) = (0, Vec::new());
    for round in 0.. {
        let fill = round as u8;
        for op in [IoOp::Write, IoOp::Read] {
            let mut requests: Vec<IoRequest> = (0..DEPTH)
                .map(|user| {
                    let buffer = handle.lease(BLOCK).unwrap();
                    buffer.fill(0, BLOCK, if op == IoOp::Write { fill } else { !fill }).unwrap();
                    let offset = (lane as u64 * 1024 + (round * DEPTH + user) % 1024) * u64::from(BLOCK);
                    IoRequest { user, op, offset, length: BLOCK, flags: IoFlags::default(), buffer: Some(buffer) }
                })
                .collect();
            let deadline = Instant::now() + PATIENCE;
            while out.len() < DEPTH as usize {
                assert!(Instant::now() < deadline, "lane {lane}: {} of {DEPTH} answered", out.len());
                match handle.submit(&mut requests) {
                    Ok(()) | Err(SubmitError::Held | SubmitError::Full) => {}
                    Err(error) => panic!("{error}"),
                }
                handle.poll(false, &mut out);
            }
            for completion in out.drain(..) {
                assert_eq!(completion.result, Ok(()), "lane {lane}, round {round}");
                let mut bytes = vec![0; BLOCK as usize];
                completion.buffer.unwrap().read_at(0, &mut bytes).unwrap();
                assert!(bytes.iter().all(|byte| *byte == fill), "lane {lane}, round {round}: wrong data");
            }
            served += DEPTH;
        }
        if stop.load(Ordering::Acquire) {
            break;
        }
    }
    served
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const NO_PROBATION: Duration = Duration::ZERO;
const PROBATION: Duration = Duration::from_secs(60);

#[test]
fn clients_do_not_notice_one_upgrade_after_the_other() {
    let bed = bed("virtio-blk", 2);
    let (served, blackouts) = bed.under_load(|| {
        let drivers = ["test/well-behaved", "virtio-blk"];
        let mut blackouts: Vec<_> = (0..50)
            .map(|round| {
                std::thread::sleep(Duration::from_millis(20));
                let report = bed.upgrade(drivers[round % 2], NO_PROBATION).unwrap();
                assert_eq!((report.to.as_str(), &*bed.binding.driver()), (drivers[round % 2], drivers[round % 2]));
                report.blackout_micros
            })
            .collect();
        blackouts.sort_unstable();
        blackouts
    });
    println!("{served} requests, blackout {} us median, {} us longest", blackouts[25], blackouts[49]);
    assert!(served > 1000, "{served}");
    assert_eq!((bed.binding.phase(), bed.binding.crash_count(), bed.binding.generation()), (Phase::Serving, 0, 51));
    bed.is_clean();
}

#[test]
fn a_driver_that_cannot_take_over_changes_nothing() {
    let bed = bed("virtio-blk", 2);
    let refusals = [
        ("test/trap-attach", "panics"),
        ("test/trap-resume", "unreachable"),
        ("test/loop-resume", "ms"),
        ("test/refuse-resume", "takes over from nobody"),
        ("test/refuse-start", "never starts"),
        ("test/trap-start", "unreachable"),
        ("test/trap-properties", "unreachable"),
        ("test/repeated-queue", "named twice"),
        ("test/no-queues", "0 queues"),
        // Without an ordinary response: not what is set up.
        ("test/trap-complete", "other queues"),
        ("test/not-mine", "no device is"),
        ("virtio-rng", "service"),
    ];
    let (served, ()) = bed.under_load(|| {
        for (driver, reason) in refusals {
            match bed.upgrade(driver, PROBATION) {
                Err(UpgradeError::Refused(why)) => {
                    assert!(why.contains(reason) || driver == "test/trap-attach", "{driver}: {why}");
                }
                other => panic!("{driver}: {other:?}"),
            }
            assert_eq!((&*bed.binding.driver(), bed.binding.phase()), ("virtio-blk", Phase::Serving), "{driver}");
        }
    });
    assert!(served >= 64, "{served}");
    assert_eq!((bed.binding.crash_count(), bed.rollbacks()), (0, Vec::new()));
    assert_eq!(bed.binding.roll_back(Duration::from_secs(1)), Err(UpgradeError::NothingBefore("disk".into())));
    bed.is_clean();
}

#[test]
fn a_new_driver_that_hangs_before_anybody_is_held_holds_up_no_call_of_the_one_that_serves() {
    let bed = bed_with("virtio-blk", 1, |spec| spec.limits.call_deadline_ms = 60_000);
    std::thread::scope(|scope| {
        let upgrade = scope.spawn(|| bed.upgrade("test/loop-resume", NO_PROBATION));
        until("the new one hangs", || {
            bed.binding.explain().calls.iter().any(|call| call.export == "resume" && call.age_ms > 0)
        });
        bed.sim.resize(32 << 20).unwrap();
        until("the old one has heard of it", || {
            bed.binding.geometry().is_some_and(|disk| disk.capacity_bytes == 32 << 20)
        });
        assert!(!upgrade.is_finished());
        let forced = UnloadOptions { force: true, ..UnloadOptions::default() };
        let certificate = bed.manager.unload_binding(&bed.binding, &forced).unwrap();
        assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
        assert!(upgrade.join().unwrap().is_err());
    });
}

/// Slow to tell its configuration once it is told to be.
struct Slow(Arc<AtomicBool>);

const SLOW: Duration = Duration::from_millis(400);

impl Hooks for Slow {
    fn read_config(&mut self, device: &mut dyn Transport, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        if self.0.load(Ordering::Relaxed) {
            std::thread::sleep(SLOW);
        }
        device.read_config(offset, into)
    }
}

#[test]
fn nobody_is_held_for_as_long_as_a_device_takes_to_tell_its_configuration() {
    let is_slow = Arc::new(AtomicBool::new(false));
    let slow = Slow(Arc::clone(&is_slow));
    let bed = bed_over("virtio-blk", 2, |device| Box::new(Hooked::new(device, slow)), |_| {});
    is_slow.store(true, Ordering::Relaxed);
    let report = bed.upgrade("virtio-blk", Duration::ZERO).unwrap();
    let told = u128::from(report.prepare_micros);
    assert!(told >= SLOW.as_micros(), "the new driver has not read the configuration at all: {report:?}");
    assert!(u128::from(report.blackout_micros) < SLOW.as_micros(), "clients waited for the device: {report:?}");
    is_slow.store(false, Ordering::Relaxed);
    bed.is_clean();
}

#[test]
fn a_configuration_that_changes_around_an_upgrade_is_known_afterwards() {
    let bed = bed("virtio-blk", 2);
    for turn in 1..=20 {
        let bytes = (16 + turn) << 20;
        std::thread::scope(|scope| {
            scope.spawn(|| bed.sim.resize(bytes).unwrap());
            bed.upgrade("virtio-blk", Duration::ZERO).unwrap();
        });
        until("the new capacity", || bed.binding.geometry().unwrap().capacity_bytes == bytes);
    }
    bed.is_clean();
}

#[test]
fn a_new_driver_that_breaks_down_on_probation_is_taken_out_again() {
    for driver in ["test/trap-submit", "test/loop-submit", "test/trap-at-100", "test/wrong-token"] {
        let bed = bed("virtio-blk", 2);
        let (served, ()) = bed.under_load(|| {
            bed.upgrade(driver, PROBATION).unwrap();
            until("the old one is back", || !bed.rollbacks().is_empty() && &*bed.binding.driver() == "virtio-blk");
            until("it serves", || bed.binding.phase() == Phase::Serving);
            std::thread::sleep(Duration::from_millis(50));
        });
        assert!(served >= 64, "{driver}: {served}");
        let rollbacks = bed.rollbacks();
        assert_eq!(rollbacks.len(), 1, "{driver}: {rollbacks:?}");
        let (from, to, reason) = &rollbacks[0];
        assert_eq!((from.as_str(), to.as_str()), (driver, "virtio-blk"));
        assert!(reason.contains("faulted"), "{reason}");
        bed.is_clean();
    }
}

#[test]
fn a_new_driver_whose_calls_take_much_longer_is_taken_out_again() {
    let bed = bed("virtio-blk", 1);
    let (_, ()) = bed.under_load(|| {
        // Calls of the old one are seen while the new one is made ready.
        std::thread::sleep(Duration::from_millis(50));
        bed.upgrade("test/slow-submit", PROBATION).unwrap();
        until("the old one is back", || !bed.rollbacks().is_empty());
    });
    assert_eq!(&*bed.binding.driver(), "virtio-blk");
    let rollbacks = bed.rollbacks();
    assert!(rollbacks.len() == 1 && rollbacks[0].2.contains("a call takes"), "{rollbacks:?}");
    assert_eq!(bed.binding.crash_count(), 0);
    bed.is_clean();
}

#[test]
fn an_old_driver_that_cannot_say_what_it_knows_is_replaced_all_the_same() {
    for driver in ["test/trap-suspend", "test/huge-suspend"] {
        let bed = bed(driver, 1);
        let (_, report) = bed.under_load(|| bed.upgrade("virtio-blk", NO_PROBATION));
        assert_eq!(report.unwrap().to, "virtio-blk");
        bed.is_clean();
        // And if the next one breaks down after that, it goes on as well as it can: a fresh instance of it.
        let bed = self::bed(driver, 1);
        let (_, refused) = bed.under_load(|| bed.upgrade("test/trap-properties", NO_PROBATION));
        assert!(matches!(refused, Err(UpgradeError::Refused(_))), "{refused:?}");
        assert_eq!((&*bed.binding.driver(), bed.binding.phase()), (driver, Phase::Serving));
        assert_eq!(bed.binding.crash_count(), 1, "it was asked what it knows, and broke down");
        bed.is_clean();
        // One that refuses to take over does so before anybody is asked or held.
        let bed = self::bed(driver, 1);
        let (_, refused) = bed.under_load(|| bed.upgrade("test/refuse-resume", NO_PROBATION));
        assert!(matches!(refused, Err(UpgradeError::Refused(_))), "{refused:?}");
        assert_eq!((&*bed.binding.driver(), bed.binding.crash_count()), (driver, 0));
        bed.is_clean();
    }
}

#[test]
fn a_rollback_by_hand_brings_back_what_was_there_before_and_only_once() {
    let bed = bed("virtio-blk", 2);
    let (_, ()) = bed.under_load(|| {
        bed.upgrade("test/well-behaved", NO_PROBATION).unwrap();
        let back = bed.binding.roll_back(Duration::from_secs(1)).unwrap();
        assert_eq!((back.from.as_str(), back.to.as_str()), ("test/well-behaved", "virtio-blk"));
    });
    assert_eq!(bed.binding.roll_back(Duration::from_secs(1)), Err(UpgradeError::NothingBefore("disk".into())));
    bed.is_clean();
}

#[test]
fn an_unload_on_probation_leaves_nothing_and_does_not_wait() {
    let bed = bed("virtio-blk", 2);
    bed.upgrade("test/well-behaved", PROBATION).unwrap();
    let begun = Instant::now();
    bed.is_clean();
    assert!(begun.elapsed() < PROBATION / 2, "{:?}", begun.elapsed());
    assert!(matches!(bed.upgrade("virtio-blk", PROBATION), Err(UpgradeError::NoSuchBinding(_))));
}
