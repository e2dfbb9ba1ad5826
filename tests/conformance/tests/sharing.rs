//! Several clients on one lane.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_conformance::driver_path;
use cofferdam_manager::{Config, Handle, HandleSpec, IoFlags, IoOp, IoRequest, LoadSpec, Manager, UnloadOptions};
use cofferdam_sim::{Drive, Effect, Op, Options, Rule, Sim, When};

fn one(handle: &Handle, op: IoOp, offset: u64) -> anyhow::Result<Vec<IoRequest>> {
    let buffer = Some(handle.lease(4096)?);
    Ok(vec![IoRequest { user: 1, op, offset, length: 4096, flags: IoFlags::default(), buffer }])
}

fn load(manager: &Manager, sim: &Sim) -> anyhow::Result<std::sync::Arc<cofferdam_manager::Binding>> {
    let path = driver_path("virtio-blk.wasm");
    let component =
        std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask build' first", path.display()))?;
    Ok(manager.load(LoadSpec::new("virtio-blk.wasm", component, Box::new(sim.transport(Drive::Threads)?)))?)
}

/// A client that polls without asking for notifications takes the one that a sleeper has asked for, and goes away. The sleeper must still hear of its
/// own answer.
#[test]
fn a_sleeper_is_woken_although_a_busy_poller_took_its_notification() -> anyhow::Result<()> {
    let manager = Manager::new(Config { cache_dir: Some(driver_path("../test-cache")) })?;
    let gate = Rule { effect: Effect::Gate, when: When::Always, op: Some(Op::Read), queue: None };
    let sim = Sim::new(Options { rules: vec![gate], ..Options::default() })?;
    let binding = load(&manager, &sim)?;
    for round in 0..50 {
        let sleeper = binding.open(HandleSpec::default())?;
        let busy = binding.open(HandleSpec::default())?;
        let (about_to_sleep, go) = mpsc::channel();
        std::thread::scope(|scope| {
            let slept = scope.spawn(move || -> anyhow::Result<Duration> {
                sleeper.submit(&mut one(&sleeper, IoOp::Read, 0)?)?;
                let mut done = Vec::new();
                sleeper.poll(true, &mut done);
                about_to_sleep.send(())?;
                let before = Instant::now();
                while done.is_empty() && before.elapsed() < Duration::from_secs(10) {
                    sleeper.wait(Duration::from_secs(10), &mut done);
                }
                ensure!(done.len() == 1, "not woken");
                Ok(before.elapsed())
            });
            go.recv()?;
            busy.submit(&mut one(&busy, IoOp::Write, 4096)?)?;
            let mut done = Vec::new();
            while done.is_empty() {
                busy.poll(false, &mut done);
            }
            sim.open_gate(1);
            let slept = slept.join().map_err(|_| anyhow::anyhow!("the sleeper panicked"))??;
            ensure!(slept < Duration::from_secs(5), "round {round}: woken after {slept:?}");
            Ok(())
        })?;
    }
    ensure!(manager.unload_binding(&binding, &UnloadOptions::default())?.residual.is_zero());
    Ok(())
}

/// A client that goes away with requests in flight leaves nobody behind who polls: its buffers come back all the same.
#[test]
fn what_a_closed_handle_had_in_flight_is_answered_without_any_client() -> anyhow::Result<()> {
    let manager = Manager::new(Config { cache_dir: Some(driver_path("../test-cache")) })?;
    let gate = Rule { effect: Effect::Gate, when: When::Always, op: None, queue: None };
    let sim = Sim::new(Options { rules: vec![gate], ..Options::default() })?;
    let binding = load(&manager, &sim)?;
    let handle = binding.open(HandleSpec::default())?;
    handle.submit(&mut one(&handle, IoOp::Write, 0)?)?;
    drop(handle);
    ensure!(binding.status().requests_in_flight == 1, "{:?}", binding.status());
    sim.open_gate(1);
    let patience = Instant::now() + Duration::from_secs(10);
    while binding.status().requests_in_flight > 0 || binding.status().leased_bytes > 0 {
        ensure!(Instant::now() < patience, "{:?}", binding.status());
        std::thread::yield_now();
    }
    ensure!(manager.unload_binding(&binding, &UnloadOptions::default())?.residual.is_zero());
    Ok(())
}
