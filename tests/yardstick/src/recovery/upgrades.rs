//! One component for another under an NBD client, again and again.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cofferdam_manager::UpgradeSpec;

use super::client::{self, Seen, unix_us};
use super::noise;
use super::plan::Plan;
use crate::backend::{Backend, Kind};
use crate::clients::cofferdam::{Host, Loaded, attach, driver_path};
use crate::clients::nbd::NbdClient;
use crate::engine::{Job, Op};
use crate::machine;
use crate::null::Pace;

/// Two builds of the same driver.
const BUILDS: [&str; 2] = ["test/well-behaved.wasm", "virtio-blk.wasm"];

/// What was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Of each upgrade: how long clients were held, in microseconds.
    pub blackouts_us: Vec<u32>,
    /// Of each upgrade: the longest time without an answer from when the new component was given until it served, in microseconds. Its compilation and its checks are in that time.
    pub pauses_us: Vec<u32>,
    /// As `pauses_us`, of as long a time before each, in which nothing was.
    pub quiet_us: Vec<u32>,
    /// Memory of this process that it shares with nobody, after a tenth of the upgrades and at the end, in bytes.
    pub private_bytes: (u64, u64),
    /// How late a sleeping thread woke meanwhile, in microseconds.
    pub late_us: Vec<u32>,
}

/// Begin, end and blackout of an upgrade, in microseconds.
type Upgrade = (u64, u64, u64);

/// All of them.
///
/// # Errors
/// When the client sees an error, or an upgrade is refused.
pub fn measure(host: &Host, null_program: &Path, plan: &Plan) -> Result<Measured> {
    let device = Backend::start(Kind::Qsd, Pace::Event, 1, null_program)?;
    let binding = host.load(&device, 1)?;
    let loaded = Loaded { manager: host.manager.clone(), binding };
    let socket = device.path("upgrades.sock");
    attach(&loaded.binding, &socket)?;
    let mut client = NbdClient::connect(&socket, "")?;
    let stop = AtomicBool::new(false);
    let (seen, upgrades, late_us) = std::thread::scope(|scope| -> Result<_> {
        let sleeper = scope.spawn(|| noise::sleep_until(&stop));
        let upgrader = scope.spawn(|| {
            let upgrades = exchange(&loaded, plan);
            stop.store(true, Ordering::Release);
            upgrades
        });
        let seen = client::run(&mut client, Job { op: Op::RandRead, depth: plan.depth }, &stop);
        stop.store(true, Ordering::Release);
        let upgrades = upgrader.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        let late = sleeper.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        Ok((seen?, upgrades?, late))
    })?;
    ensure!(loaded.binding.crash_count() == 0, "a driver broke down");
    let (upgrades, private_bytes) = upgrades;
    Ok(judge(&seen, &upgrades, private_bytes, late_us))
}

fn judge(seen: &Seen, upgrades: &[Upgrade], private_bytes: (u64, u64), late_us: Vec<u32>) -> Measured {
    let short = |micros: u64| u32::try_from(micros).unwrap_or(u32::MAX);
    let longest = |from: u64, to: u64| short(seen.longest_us(from, to));
    Measured {
        blackouts_us: upgrades.iter().map(|(_, _, blackout)| short(*blackout)).collect(),
        pauses_us: upgrades.iter().map(|(begin, end, _)| longest(*begin, *end)).collect(),
        quiet_us: upgrades.iter().map(|(begin, end, _)| longest(begin - (end - begin), begin - 1)).collect(),
        private_bytes,
        late_us,
    }
}

fn exchange(loaded: &Loaded, plan: &Plan) -> Result<(Vec<Upgrade>, (u64, u64))> {
    let read = |name: &str| {
        let path = driver_path(name);
        std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask test'", path.display()))
    };
    let builds = [read(BUILDS[0])?, read(BUILDS[1])?];
    let mut upgrades = Vec::new();
    let mut after_warm_up = 0;
    let mut next = Instant::now();
    for round in 0..plan.upgrades as usize {
        next += plan.upgrade_every;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        let (driver, component) = (BUILDS[round % 2].to_owned(), builds[round % 2].clone());
        let spec = UpgradeSpec { driver, component, deadline: Duration::from_secs(1), probation: Duration::ZERO };
        let begin = unix_us();
        let report = loaded.manager.upgrade(loaded.name(), spec)?;
        upgrades.push((begin, unix_us(), report.blackout_micros));
        if round == plan.upgrades as usize / 10 {
            after_warm_up = machine::private_bytes()?;
        }
    }
    Ok((upgrades, (after_warm_up, machine::private_bytes()?)))
}
