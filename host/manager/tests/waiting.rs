//! `Handle::wait` in its default mode: nothing is missed, and no processor time is taken where there is nothing to wait for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cofferdam_manager::{
    Binding, Buffer, Completion, Config, Handle, HandleSpec, HandleState, IoOp, IoRequest, LoadSpec, Manager,
    UnloadOptions,
};
use cofferdam_sim::{Drive, Effect, Options, Rule, Sim, Storage};
use rustix::time::{ClockId, clock_gettime};

/// Only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(20);
const BYTES: u32 = 512;

fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

/// A device that answers as many requests as the test lets through.
fn gated() -> Sim {
    let rules = vec![Rule::always(Effect::Gate)];
    Sim::new(Options { storage: Storage::Memory(16 << 20), rules, ..Options::default() }).unwrap()
}

fn load(manager: &Manager, sim: &Sim) -> Arc<Binding> {
    let path = format!("{}/../../target/drivers/virtio-blk.wasm", env!("CARGO_MANIFEST_DIR"));
    let driver = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"));
    manager.load(LoadSpec::new("virtio-blk.wasm", driver, Box::new(sim.transport(Drive::Threads).unwrap()))).unwrap()
}

fn read(user: u64, buffer: Buffer) -> IoRequest {
    let offset = user * u64::from(BYTES);
    IoRequest { user, op: IoOp::Read, offset, length: BYTES, flags: Default::default(), buffer: Some(buffer) }
}

fn submit(handle: &Handle, user: u64) {
    let mut requests = vec![read(user, handle.lease(BYTES).unwrap())];
    handle.submit(&mut requests).unwrap();
    assert!(requests.is_empty());
}

fn unload(manager: &Manager, binding: &Binding) {
    let certificate = manager.unload(binding.name(), &UnloadOptions::default()).unwrap();
    assert!(certificate.residual.is_zero(), "{certificate:?}");
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The share of a core that a wait of `length` takes, which has to end by its time-out.
fn cost(handle: &Handle, length: Duration) -> f64 {
    let (before, start, mut out) = (thread_time(), Instant::now(), Vec::new());
    assert_eq!(handle.wait(length, &mut out), 0);
    let (took, used) = (start.elapsed(), thread_time() - before);
    assert!(took >= length, "{took:?}");
    used.as_secs_f64() / took.as_secs_f64()
}

/// xorshift64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Lets a few requests through at a time, and none for 0 to 2 ms in between, until told to stop.
fn answer_now_and_then(sim: &Sim, seed: u64, stop: &AtomicBool) {
    let mut dice = Dice(seed);
    while !stop.load(Ordering::Relaxed) {
        sim.open_gate(1 + dice.below(24));
        // Delays of every kind: within a look, within the look and the sleep after it, far behind both.
        let delay = Duration::from_micros([5, 50, 100, 300, 2000][dice.below(5) as usize].min(1 + dice.below(2000)));
        let start = Instant::now();
        while start.elapsed() < delay {
            if delay > Duration::from_micros(60) {
                std::thread::park_timeout(delay);
            }
        }
    }
    sim.open_gate(u64::MAX);
}

/// Keeps `depth` requests in flight until `total` are answered. Every wait is for longer than any delay, so one that ends by its time-out has missed an answer.
fn work(handle: &Handle, depth: u64, total: u64, polls: bool) {
    let mut done: Vec<Completion> = Vec::new();
    let mut buffers: Vec<Buffer> = (0..depth).map(|_| handle.lease(BYTES).unwrap()).collect();
    let (mut asked, mut answered) = (0, 0);
    while answered < total {
        let batch = (total - asked).min(buffers.len() as u64);
        let mut requests: Vec<_> = buffers.drain(..batch as usize).map(|buffer| read(asked % 1000, buffer)).collect();
        asked += batch;
        handle.submit(&mut requests).unwrap();
        assert!(requests.is_empty());
        if polls {
            // Takes what others sleep for, without asking for notifications itself.
            handle.poll(false, &mut done);
        } else {
            assert!(handle.wait(PATIENCE, &mut done) > 0, "slept for {PATIENCE:?} with {} in flight", asked - answered);
        }
        for completion in done.drain(..) {
            completion.result.unwrap();
            buffers.extend(completion.buffer);
            answered += 1;
        }
    }
    // Who brought the last answer has it counted when it gives the lane back, for which an armed look waits.
    handle.poll(true, &mut done);
    assert_eq!((answered, done.len(), handle.in_flight()), (total, 0, 0));
}

#[test]
fn waiters_who_share_a_lane_miss_no_answer_however_late_it_is() {
    let (manager, sim) = (manager(), gated());
    let binding = load(&manager, &sim);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| answer_now_and_then(&sim, 0x5eed, &stop));
        let waiters: Vec<_> = [(1, false), (2, false), (7, false), (32, false), (16, true)]
            .into_iter()
            .map(|(depth, polls)| {
                let handle = binding.open(HandleSpec::default()).unwrap();
                // 20,000 in all, in proportion to what each has in flight, so that they end together.
                scope.spawn(move || work(&handle, depth, depth * 345, polls))
            })
            .collect();
        let results: Vec<_> = waiters.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        stop.store(true, Ordering::Relaxed);
        results.into_iter().for_each(|result| result.unwrap());
    });
    unload(&manager, &binding);
}

#[test]
fn waiting_for_nothing_takes_no_processor_time() {
    let (manager, sim) = (manager(), gated());
    let binding = load(&manager, &sim);
    let handle = binding.open(HandleSpec::default()).unwrap();
    let cost = cost(&handle, Duration::from_secs(1));
    assert!(cost < 0.01, "{:.2} % of a core with nothing in flight", cost * 100.0);
    drop(handle);
    unload(&manager, &binding);
}

#[test]
fn waiting_for_a_device_that_does_not_answer_takes_no_processor_time() {
    let (manager, sim) = (manager(), gated());
    let binding = load(&manager, &sim);
    let handle = binding.open(HandleSpec::default()).unwrap();
    submit(&handle, 1);
    let long = cost(&handle, Duration::from_secs(1));
    assert!(long < 0.01, "{:.2} % of a core in one wait", long * 100.0);
    // A client that wakes up every 2 ms to do something else: its looks get rare.
    let (before, start) = (thread_time(), Instant::now());
    for _ in 0..500 {
        cost(&handle, Duration::from_millis(2));
    }
    let (used, took) = (thread_time() - before, start.elapsed());
    let often = used.as_secs_f64() / took.as_secs_f64();
    assert!(often < 0.05, "{:.2} % of a core in short waits", often * 100.0);
    sim.open_gate(1);
    let mut out = Vec::new();
    assert_eq!(handle.wait(PATIENCE, &mut out), 1);
    drop(handle);
    unload(&manager, &binding);
}

#[test]
fn a_wait_ends_when_the_handle_is_revoked_and_brings_the_last_answer() {
    let (manager, sim) = (manager(), gated());
    let binding = load(&manager, &sim);
    for round in 0..20 {
        let in_flight = round % 2;
        let handle = binding.open(HandleSpec::default()).unwrap();
        let (id, manager, binding) = (handle.id(), &manager, &binding);
        if in_flight > 0 {
            submit(&handle, 1);
        }
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let (start, mut out) = (Instant::now(), Vec::new());
                loop {
                    // In this order: once it is over, one more wait brings what is left, and returns at once.
                    let over = handle.state() == HandleState::Revoked && handle.in_flight() == 0;
                    handle.wait(PATIENCE, &mut out);
                    assert!(start.elapsed() < PATIENCE, "it goes on waiting");
                    if over {
                        return out.len();
                    }
                }
            });
            let revoker = scope.spawn(move || manager.revoke(binding.name(), id, Duration::from_secs(10)));
            sim.open_gate(in_flight);
            assert_eq!(waiter.join().unwrap() as u64, in_flight);
            revoker.join().unwrap().unwrap();
        });
    }
    unload(&manager, &binding);
}
