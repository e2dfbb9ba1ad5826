//! A device that lies: whatever it says, no request is answered twice or with somebody else's data, the host lives, and the binding ends on the ladder.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_conformance::driver_path;
use cofferdam_manager::{
    Binding, Cause, Config, Handle, HandleSpec, IoFlags, IoOp, IoRequest, LoadSpec, Manager, Outcome, Residual,
    UnloadOptions,
};
use cofferdam_sim::{ConfigLie, Drive, Effect, Lie, Op, Options, Profile, Quiescence, Rule, Sim, When};

const BLOCK: u32 = 4096;
/// The virtio device id of a block device.
const CLASS: u32 = 2;
const SEED: u64 = 0x11e5;

fn manager() -> anyhow::Result<Manager> {
    Ok(Manager::new(Config { cache_dir: Some(driver_path("../test-cache")) })?)
}

fn spec(sim: &Sim) -> anyhow::Result<LoadSpec> {
    let path = driver_path("virtio-blk.wasm");
    let component =
        std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask build' first", path.display()))?;
    Ok(LoadSpec::new("virtio-blk.wasm", component, Box::new(sim.transport(Drive::Threads)?)))
}

fn request(handle: &Handle, user: u64, op: IoOp) -> anyhow::Result<IoRequest> {
    let buffer = handle.lease(BLOCK)?;
    // Marks what the buffer held before: a read that shows it was never answered by the device.
    buffer.fill(0, BLOCK, 0x5a)?;
    let offset = user * u64::from(BLOCK);
    Ok(IoRequest { user, op, offset, length: BLOCK, flags: IoFlags::default(), buffer: Some(buffer) })
}

/// What came of 64 reads of a disk full of zeroes.
#[derive(Debug, Default)]
struct Outcomes {
    good: usize,
    failed: usize,
    wrong: usize,
    twice: usize,
    unanswered: usize,
}

fn read_64(binding: &std::sync::Arc<Binding>) -> anyhow::Result<Outcomes> {
    let handle = binding.open(HandleSpec::default())?;
    let mut requests = Vec::new();
    for user in 0..64 {
        requests.push(request(&handle, user, IoOp::Read)?);
    }
    let mut seen = [false; 64];
    let mut outcomes = Outcomes::default();
    // Two halves, so that a lie of the first is met by the second.
    let second = requests.split_off(32);
    for mut half in [requests, second] {
        let _ = handle.submit(&mut half);
        let mut done = Vec::new();
        let patience = Instant::now() + Duration::from_millis(300);
        handle.poll(true, &mut done);
        while handle.in_flight() > 0 && Instant::now() < patience {
            handle.wait(Duration::from_millis(20), &mut done);
        }
        for completion in done {
            let again = std::mem::replace(&mut seen[completion.user as usize], true);
            outcomes.twice += usize::from(again);
            if completion.result.is_err() {
                outcomes.failed += 1;
                continue;
            }
            let mut bytes = vec![0xff; BLOCK as usize];
            match completion.buffer.map(|buffer| buffer.read_at(0, &mut bytes)) {
                Some(Ok(())) if bytes.iter().all(|byte| *byte == 0) => outcomes.good += 1,
                Some(Ok(())) => outcomes.wrong += 1,
                // Revoked while it was looked at: no data, which is no wrong data.
                _ => outcomes.failed += 1,
            }
        }
    }
    outcomes.unanswered = seen.iter().filter(|seen| !**seen).count();
    Ok(outcomes)
}

/// A device in this process that hangs or has died keeps its own end of the one call event until it is dropped; nothing else may be left.
fn nothing_but_the_devices_end(residual: &Residual) -> bool {
    Residual { fds: 0, ..residual.clone() }.is_zero() && residual.fds <= 1
}

/// Lies that no driver can see from the ring: the device says that it is done and well.
fn invisible(lie: Lie) -> bool {
    matches!(lie, Lie::PayloadFlipped | Lie::PayloadUnwritten)
}

#[test]
fn no_lie_about_a_request_is_believed_and_every_binding_ends() -> anyhow::Result<()> {
    let manager = manager()?;
    for (name, lie) in Lie::NAMES.iter().filter(|(_, lie)| lie.class().is_none_or(|class| class == CLASS)) {
        let rule = Rule { effect: Effect::Lie(*lie), when: When::Nth(20), op: Some(Op::Read), queue: None };
        let options = Options { seed: SEED, rules: vec![rule], quiescence: Quiescence::Resets, ..Options::default() };
        let sim = Sim::new(options)?;
        let binding = manager.load(spec(&sim)?)?;
        let outcomes = read_64(&binding)?;
        println!("{name}: {outcomes:?}, fault: {:?}", binding.status().fault);
        ensure!(outcomes.twice == 0, "{name}: answered twice, {outcomes:?}");
        if !invisible(*lie) {
            ensure!(outcomes.wrong == 0, "{name}: wrong data, {outcomes:?}");
        }
        let before = Instant::now();
        let options =
            UnloadOptions { deadline: Duration::from_millis(500), force: true, cancel: None, cause: Cause::Unload };
        let certificate = manager.unload_binding(&binding, &options).with_context(|| (*name).to_owned())?;
        ensure!(before.elapsed() < Duration::from_secs(8), "{name}: took {:?}", before.elapsed());
        ensure!(certificate.residual.is_zero(), "{name}: {:?}", certificate.residual);
    }
    Ok(())
}

#[test]
fn a_ring_that_the_device_broke_takes_the_binding_down_by_itself() -> anyhow::Result<()> {
    let manager = manager()?;
    for lie in [Lie::UsedIdUnknown, Lie::UsedIdIdle, Lie::LengthLong, Lie::UsedIndexJump] {
        let rule = Rule { effect: Effect::Lie(lie), when: When::Nth(5), op: Some(Op::Read), queue: None };
        let sim = Sim::new(Options { seed: SEED, rules: vec![rule], ..Options::default() })?;
        let binding = manager.load(spec(&sim)?)?;
        let outcomes = read_64(&binding)?;
        ensure!(outcomes.wrong + outcomes.twice == 0, "{lie:?}: {outcomes:?}");
        let patience = Instant::now() + Duration::from_secs(10);
        while manager.get(binding.name()).is_some() {
            ensure!(Instant::now() < patience, "{lie:?}: still there, {:?}", binding.status());
            std::thread::yield_now();
        }
        let certificate = binding.certificate().context("what is gone has a certificate")?;
        ensure!(certificate.outcome == Outcome::Failed, "{lie:?}: {:?}", certificate.outcome);
        ensure!(certificate.residual.is_zero(), "{lie:?}: {:?}", certificate.residual);
    }
    Ok(())
}

#[test]
fn no_lie_in_configuration_space_harms_the_host() -> anyhow::Result<()> {
    let manager = manager()?;
    for (name, lie) in ConfigLie::NAMES.iter().filter(|(_, lie)| lie.class().is_none_or(|class| class == CLASS)) {
        let rules = vec![Rule::always(Effect::Config(*lie))];
        let sim = Sim::new(Options { seed: SEED, rules, profile: Profile::default(), ..Options::default() })?;
        match manager.load(spec(&sim)?) {
            Err(error) => println!("{name}: refused: {error}"),
            Ok(binding) => {
                let outcomes = read_64(&binding)?;
                println!("{name}: served, {outcomes:?}");
                ensure!(outcomes.wrong + outcomes.twice == 0, "{name}: {outcomes:?}");
                let forced = UnloadOptions { force: true, ..UnloadOptions::default() };
                let certificate = manager.unload_binding(&binding, &forced)?;
                ensure!(certificate.residual.is_zero(), "{name}: {:?}", certificate.residual);
            }
        }
        ensure!(manager.bindings().is_empty(), "{name}: something is left");
    }
    Ok(())
}

#[test]
fn a_hung_device_is_drained_until_the_deadline_and_then_by_force() -> anyhow::Result<()> {
    let manager = manager()?;
    let sim = Sim::new(Options { seed: SEED, quiescence: Quiescence::Drains, ..Options::default() })?;
    let binding = manager.load(spec(&sim)?)?;
    let handle = binding.open(HandleSpec::default())?;
    sim.hang(false);
    let mut requests = vec![request(&handle, 1, IoOp::Write)?, request(&handle, 2, IoOp::Read)?];
    handle.submit(&mut requests)?;

    let polite = UnloadOptions { deadline: Duration::from_millis(200), ..UnloadOptions::default() };
    let error = manager.unload_binding(&binding, &polite).expect_err("a hung device cannot be drained");
    ensure!(error.to_string().contains("2 requests"), "{error}");
    ensure!(manager.get(binding.name()).is_some(), "a draining binding is still listed");

    let mut answers = Vec::new();
    let certificate = manager.unload_binding(&binding, &UnloadOptions { force: true, ..polite })?;
    handle.poll(false, &mut answers);
    ensure!(answers.is_empty(), "answered while the device may still act: {answers:?}");
    ensure!(certificate.leaked.bytes > 0, "{:?}", certificate.leaked);
    ensure!(certificate.requests_failed == 0 && certificate.requests_completed == 0, "{certificate:?}");
    ensure!(nothing_but_the_devices_end(&certificate.residual), "{certificate:?}");
    // What the device still writes now goes to memory that was retired: nothing of the host's.
    sim.release();
    Ok(())
}

#[test]
fn a_drain_that_was_given_up_goes_on_when_the_device_does() -> anyhow::Result<()> {
    let manager = manager()?;
    let sim = Sim::new(Options { seed: SEED, quiescence: Quiescence::Drains, ..Options::default() })?;
    let binding = manager.load(spec(&sim)?)?;
    let handle = binding.open(HandleSpec::default())?;
    sim.hang(false);
    let mut requests = vec![request(&handle, 1, IoOp::Write)?, request(&handle, 2, IoOp::Read)?];
    handle.submit(&mut requests)?;
    let polite = UnloadOptions { deadline: Duration::from_millis(100), ..UnloadOptions::default() };
    ensure!(manager.unload_binding(&binding, &polite).is_err());
    sim.release();
    let certificate = manager.unload_binding(&binding, &UnloadOptions::default())?;
    let mut answers = Vec::new();
    handle.poll(false, &mut answers);
    ensure!(answers.len() == 2 && answers.iter().all(|answer| answer.result.is_ok()), "{answers:?}");
    ensure!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    ensure!(certificate.outcome == Outcome::Unloaded && certificate.requests_completed == 2, "{certificate:?}");
    Ok(())
}

#[test]
fn a_lost_device_takes_the_binding_down_by_itself() -> anyhow::Result<()> {
    let manager = manager()?;
    let sim = Sim::new(Options { seed: SEED, ..Options::default() })?;
    let binding = manager.load(spec(&sim)?)?;
    let handle = binding.open(HandleSpec::default())?;
    sim.die();
    let patience = Instant::now() + Duration::from_secs(10);
    while binding.certificate().is_none() {
        ensure!(Instant::now() < patience, "still there: {:?}", binding.status());
        handle.wait(Duration::from_millis(10), &mut Vec::new());
    }
    let certificate = binding.certificate().context("what is gone has a certificate")?;
    ensure!(certificate.outcome == Outcome::Removed, "{certificate:?}");
    ensure!(nothing_but_the_devices_end(&certificate.residual), "{certificate:?}");
    Ok(())
}
