//! A driver that breaks down by itself under an NBD client: never in even seconds, at a mean rate in odd ones.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cofferdam_manager::{Binding, CrashReport, LoadSpec, Phase, RestartPolicy};
use guest_faulty_blk::{Kind, Orders, Point};

use super::client::{self, LOOK, Seen, unix_us};
use super::noise;
use crate::backend::{Backend, Kind as Device};
use crate::clients::cofferdam::{Host, Loaded, attach, connect};
use crate::clients::nbd::NbdClient;
use crate::engine::{Job, Op};
use crate::null::Pace;

/// From the load to the first second that counts: the driver may have to be compiled.
const LEAD_US: u64 = 2_000_000;
/// How long after a crash an answer is looked for. What takes longer is found as well: it is one gap.
const AFTER_US: u64 = 300;
/// As often as it takes: more than this are not made of any driver.
const ALWAYS: RestartPolicy = RestartPolicy {
    limit: 10_000,
    within: Duration::from_secs(3600),
    backoff: Duration::ZERO,
    longest: Duration::ZERO,
};

/// What was measured of one kind of load at one rate of crashes.
#[derive(Clone, Debug)]
pub struct Measured {
    /// What requests did.
    pub op: Op,
    /// Crashes in a second, as ordered.
    pub rate: u32,
    /// Requests answered in each pair of seconds: in the quiet one, and in the one with crashes.
    pub pairs: Vec<(u64, u64)>,
    /// Of each crash: the time without an answer that the client saw, in microseconds.
    pub pauses_us: Vec<u32>,
    /// Of each crash: from when the fault was known until another driver was there, in microseconds.
    pub recoveries_us: Vec<u32>,
    /// As `pauses_us`, of as many times in the quiet seconds at which nothing was.
    pub quiet_us: Vec<u32>,
    /// How late a sleeping thread woke meanwhile, in microseconds.
    pub late_us: Vec<u32>,
}

/// Loads the driver with these orders and serves it over NBD.
fn serve(host: &Host, device: &Backend, orders: &Orders, spool: &Path) -> Result<(Loaded, NbdClient)> {
    let path = crate::clients::cofferdam::driver_path("test/faulty-blk.wasm");
    let component = std::fs::read(&path).with_context(|| format!("{}: run 'cargo xtask test'", path.display()))?;
    let transport = connect(&device.socket())?;
    let mut spec = LoadSpec::new("faulty-blk.wasm", orders.write_into(&component), Box::new(transport));
    (spec.queues, spec.restarts) = (Some(1), Some(ALWAYS));
    (spec.grants.wasi_clocks, spec.crash_dir) = (true, Some(spool.to_owned()));
    let binding = host.manager.load(spec)?;
    let loaded = Loaded { manager: host.manager.clone(), binding };
    let socket = device.path("recovery.sock");
    attach(&loaded.binding, &socket)?;
    let client = NbdClient::connect(&socket, "")?;
    Ok((loaded, client))
}

/// One cell.
///
/// # Errors
/// When the client sees an error, or there is nothing to measure.
pub fn measure(host: &Host, null_program: &Path, (op, rate): (Op, u32), depth: u32, pairs: u32) -> Result<Measured> {
    let device = Backend::start(Device::Qsd, Pace::Event, 1, null_program)?;
    let spool = tempfile::tempdir()?;
    // From an even second on, so that quiet and not quiet ones come in pairs.
    let first = (unix_us() + LEAD_US).div_ceil(2_000_000) * 2;
    let orders = Orders {
        mean_us: 1_000_000 / u64::from(rate.max(1)),
        from_ms: first * 1000,
        period_us: 1_000_000,
        // Three for each request that a predecessor was given, and two for each that it judged.
        settle: 5 * u64::from(depth),
        judges: true,
        points: vec![Point::Before, Point::After, Point::Judge, Point::Judged],
        kinds: vec![Kind::Trap],
        ..Orders::default()
    };
    let (loaded, mut client) = serve(host, &device, &orders, spool.path())?;
    let end = first + 2 * u64::from(pairs);
    let stop = AtomicBool::new(false);
    let (seen, reports, late_us) = std::thread::scope(|scope| -> Result<_> {
        let sleeper = scope.spawn(|| noise::sleep_until(&stop));
        let watcher = scope.spawn(|| watch(&loaded.binding, &stop, end));
        let seen = client::run(&mut client, Job { op, depth }, &stop);
        stop.store(true, Ordering::Release);
        let reports = watcher.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        let late = sleeper.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        Ok((seen?, reports, late))
    })?;
    ensure!(loaded.binding.phase() == Phase::Serving, "the driver was not replaced");
    drop((client, loaded));
    let reports = reports.into_values().filter(|report| (first..end).contains(&(report.unix_micros / 1_000_000)));
    Ok(judge((op, rate), &seen, &reports.collect::<Vec<_>>(), first..end, late_us))
}

/// Collects crash reports, of which only the last few are kept, and stops everybody at the `end`.
fn watch(binding: &Arc<Binding>, stop: &AtomicBool, end: u64) -> BTreeMap<u64, CrashReport> {
    let mut reports = BTreeMap::new();
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(LOOK);
        reports.extend(binding.crashes().into_iter().map(|report| (report.number, report)));
        if unix_us() / 1_000_000 >= end {
            stop.store(true, Ordering::Release);
        }
    }
    // A pause is known when it is over.
    reports.extend(binding.crashes().into_iter().map(|report| (report.number, report)));
    reports
}

fn judge(
    (op, rate): (Op, u32),
    seen: &Seen,
    reports: &[CrashReport],
    seconds: std::ops::Range<u64>,
    late_us: Vec<u32>,
) -> Measured {
    let of = |second: u64| seen.answers.get(&second).copied().unwrap_or(0);
    let short = |micros: u64| u32::try_from(micros).unwrap_or(u32::MAX);
    let at = |at_us: u64, pause_us: u64| short(seen.longest_us(at_us, at_us + pause_us + AFTER_US));
    let crashes = reports.iter().map(|report| (report.unix_micros, report.pause_micros.unwrap_or(0)));
    Measured {
        op,
        rate,
        pairs: seconds.step_by(2).map(|second| (of(second), of(second + 1))).collect(),
        pauses_us: crashes.clone().map(|(at_us, pause_us)| at(at_us, pause_us)).collect(),
        recoveries_us: crashes.clone().map(|(_, pause_us)| short(pause_us)).collect(),
        // A second earlier it was quiet.
        quiet_us: crashes.map(|(at_us, pause_us)| at(at_us - 1_000_000, pause_us)).collect(),
        late_us,
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Gap;
    use super::*;

    fn report(number: u64, unix_micros: u64, pause_micros: u64) -> CrashReport {
        let text = String::new;
        CrashReport {
            number,
            unix_micros,
            binding: text(),
            driver: text(),
            digest: text(),
            device: text(),
            generation: number,
            lane: text(),
            kind: text(),
            message: text(),
            backtrace: Vec::new(),
            calls: Vec::new(),
            pause_micros: Some(pause_micros),
            core: None,
        }
    }

    #[test]
    fn a_pause_is_the_time_without_an_answer_around_a_crash_and_not_another() {
        let second = 1_000_000;
        let gaps = [
            (10 * second + 400, 10 * second + 500),
            (11 * second, 11 * second + 800),
            (11 * second + 5000, 11 * second + 9000),
        ];
        let gaps = gaps.map(|(from_us, to_us)| Gap { from_us, to_us }).to_vec();
        let answers = BTreeMap::from([(10, 1000), (11, 900), (12, 1000), (13, 1000)]);
        let seen = Seen { answers, gaps };
        let measured = judge((Op::RandRead, 1), &seen, &[report(1, 11 * second + 300, 200)], 10..14, Vec::new());
        assert_eq!(measured.pairs, [(1000, 900), (1000, 1000)]);
        assert_eq!((measured.pauses_us, measured.recoveries_us, measured.quiet_us), (vec![800], vec![200], vec![100]));
    }
}
