//! What is printed and written.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::crashes;
use super::noise::Spread;
use super::upgrades;
use crate::aims::{self, Aim};
use crate::engine::Op;
use crate::stats::{Estimate, estimate, paired};

/// Most of the time that pauses may take, by what requests do and by the rate of crashes.
fn bound_percent(op: Op, rate: u32) -> Option<f64> {
    match rate {
        1 if op.reads() => Some(2.0),
        1 => Some(3.0),
        10 => Some(15.0),
        _ => None,
    }
}

/// Most that the 99th of 100 pauses may take, in microseconds.
const PAUSE_US: f64 = 3000.0;
/// The same of blackouts.
const BLACKOUT_US: f64 = 1000.0;
/// What memory may grow by in hundreds of upgrades and still be called flat, in MiB.
const GROWTH_MIB: f64 = 4.0;

/// One line of the table and one entry of the JSON list.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What requests do.
    pub op: &'static str,
    /// Crashes in a second, as ordered.
    pub crashes_per_second: u32,
    /// Seconds with crashes, and as many without.
    pub seconds: usize,
    /// Crashes that there were.
    pub crashes: usize,
    /// Thousands of requests per second in the quiet seconds.
    pub quiet_kiops: f64,
    /// And in those with crashes.
    pub crashing_kiops: f64,
    /// The sum of the client's pauses over the time with crashes.
    pub loss_percent: f64,
    /// What of the throughput is missing in a second with crashes, against the quiet one before it.
    pub throughput_loss_percent: Estimate,
    /// The client's pauses.
    pub pause: Spread,
    /// From when a fault was known until another driver was there.
    pub recovery: Spread,
    /// The client's longest time without an answer around times at which nothing was.
    pub quiet: Spread,
    /// How late a sleeping thread woke.
    pub late: Spread,
}

/// The row of a cell.
#[must_use]
pub fn row(measured: &crashes::Measured) -> Row {
    let seconds = measured.pairs.len();
    let quiet: Vec<_> = measured.pairs.iter().map(|pair| pair.0 as f64).collect();
    let crashing: Vec<_> = measured.pairs.iter().map(|pair| pair.1 as f64).collect();
    let kiops = |answers: &[f64]| answers.iter().sum::<f64>() / seconds as f64 / 1000.0;
    let ratio = estimate(&paired(&crashing, &quiet));
    let percent = |ratio: f64| 100.0 * (1.0 - ratio);
    let pauses_us: u64 = measured.pauses_us.iter().map(|pause| u64::from(*pause)).sum();
    Row {
        op: measured.op.name(),
        crashes_per_second: measured.rate,
        seconds,
        crashes: measured.pauses_us.len(),
        quiet_kiops: kiops(&quiet),
        crashing_kiops: kiops(&crashing),
        loss_percent: pauses_us as f64 / seconds as f64 / 10_000.0,
        throughput_loss_percent: Estimate {
            median: percent(ratio.median),
            low: percent(ratio.high),
            high: percent(ratio.low),
        },
        pause: Spread::of(measured.pauses_us.clone()),
        recovery: Spread::of(measured.recoveries_us.clone()),
        quiet: Spread::of(measured.quiet_us.clone()),
        late: Spread::of(measured.late_us.clone()),
    }
}

/// Of the upgrades.
#[derive(Clone, Debug, Serialize)]
pub struct Upgrades {
    /// How long clients were held.
    pub blackout: Spread,
    /// The client's longest time without an answer during an upgrade, its preparation included.
    pub pause: Spread,
    /// The same of the time before it.
    pub quiet: Spread,
    /// How late a sleeping thread woke.
    pub late: Spread,
    /// Memory of the process after a tenth of the upgrades, in MiB.
    pub before_mib: f64,
    /// And at the end.
    pub after_mib: f64,
}

impl Upgrades {
    /// What is told of them.
    #[must_use]
    pub fn of(measured: &upgrades::Measured) -> Upgrades {
        let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
        Upgrades {
            blackout: Spread::of(measured.blackouts_us.clone()),
            pause: Spread::of(measured.pauses_us.clone()),
            quiet: Spread::of(measured.quiet_us.clone()),
            late: Spread::of(measured.late_us.clone()),
            before_mib: mib(measured.private_bytes.0),
            after_mib: mib(measured.private_bytes.1),
        }
    }
}

fn spread(spread: &Spread) -> String {
    format!("{:>7.0} {:>7.0} {:>7.0}", spread.p50_us, spread.p99_us, spread.max_us)
}

/// The table.
#[must_use]
pub fn table(rows: &[Row], upgrades: &Upgrades, spin: &Spread) -> String {
    let mut text = format!(
        "\n{:9} {:>5} {:>7} {:>8} {:>8} {:>7}  {:22} {:>23} {:>23} {:>23} {:>23}\n{:>48} {:22} {}\n",
        "",
        "per s",
        "crashes",
        "quiet",
        "crashing",
        "loss",
        "loss of throughput",
        "pause, client",
        "no driver",
        "client when quiet",
        "late wake-ups",
        "kIOPS    kIOPS       %",
        "  %, by pairs",
        format!("{:>7} {:>7} {:>7} ", "p50 us", "p99", "max").repeat(4),
    );
    for row in rows {
        let Estimate { median, low, high } = row.throughput_loss_percent;
        let _ = writeln!(
            text,
            "{:9} {:>5} {:>7} {:>8.1} {:>8.1} {:>7.3}  {:22} {} {} {} {}",
            row.op,
            row.crashes_per_second,
            row.crashes,
            row.quiet_kiops,
            row.crashing_kiops,
            row.loss_percent,
            format!("{median:.2} [{low:.2}, {high:.2}]"),
            spread(&row.pause),
            spread(&row.recovery),
            spread(&row.quiet),
            spread(&row.late),
        );
    }
    let _ = writeln!(text, "\n{} upgrades: {:>34} {:>7} {:>7}", upgrades.blackout.count, "p50 us", "p99", "max");
    for (what, of) in [
        ("blackout", &upgrades.blackout),
        ("client's longest pause during one", &upgrades.pause),
        ("client's longest pause before it", &upgrades.quiet),
        ("late wake-ups", &upgrades.late),
    ] {
        let _ = writeln!(text, "  {what:40} {}", spread(of));
    }
    let _ = writeln!(text, "  memory: {:.1} MiB, {:.1} at the end", upgrades.before_mib, upgrades.after_mib);
    let _ = writeln!(
        text,
        "\nthe idle machine: a spinning thread was kept from running {} times, p50 {:.0}, p99 {:.0}, longest {:.0} us",
        spin.count, spin.p50_us, spin.p99_us, spin.max_us
    );
    text
}

/// All aims that something was measured for.
#[must_use]
pub fn aims(measured: &[crashes::Measured], rows: &[Row], upgrades: &Upgrades) -> Vec<Aim> {
    let mut aims = Vec::new();
    for (measured, row) in measured.iter().zip(rows) {
        if let Some(bound) = bound_percent(measured.op, measured.rate) {
            let what = format!("loss, {}, {} crashes a second: per cent", row.op, row.crashes_per_second);
            aims.push(aims::figure(&what, row.loss_percent, bound));
        }
    }
    let all = Spread::of(measured.iter().flat_map(|measured| measured.pauses_us.iter().copied()).collect());
    if all.count > 0 {
        aims.push(aims::figure(&format!("pause per crash, p99 of {}: us", all.count), all.p99_us, PAUSE_US));
    }
    let blackout = &upgrades.blackout;
    if blackout.count > 0 {
        let what = format!("blackout of an upgrade, p99 of {}: us", blackout.count);
        aims.push(aims::figure(&what, blackout.p99_us, BLACKOUT_US));
        let grown = upgrades.after_mib - upgrades.before_mib;
        aims.push(aims::figure("growth of memory in upgrades: MiB", grown, GROWTH_MIB));
    }
    aims
}

/// Writes the list, and beside it the summary: `recovery.json` and `recovery-summary.json`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(path: &Path, rows: &[Row], upgrades: &Upgrades, spin: &Spread, aims: &[Aim]) -> Result<()> {
    let summary = json!({
        "machine": crate::machine::describe(),
        "upgrades": upgrades,
        "idle_spin": spin,
        "aims": aims,
    });
    crate::report::write_both(path, rows, "recovery-summary.json", &summary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_is_the_sum_of_pauses_over_the_seconds_with_crashes() {
        let measured = crashes::Measured {
            op: Op::RandWrite,
            rate: 1,
            pairs: vec![(1000, 900), (1000, 1000)],
            pauses_us: vec![20_000, 40_000],
            recoveries_us: vec![100, 200],
            quiet_us: vec![50, 60],
            late_us: vec![60],
        };
        let row = row(&measured);
        assert!((row.loss_percent - 3.0).abs() < 1e-9, "{}", row.loss_percent);
        assert!((row.throughput_loss_percent.median - 5.0).abs() < 1e-9, "{:?}", row.throughput_loss_percent);
        assert_eq!((row.crashes, row.seconds, row.crashing_kiops), (2, 2, 0.95));
        let upgrades = upgrades::Measured {
            blackouts_us: vec![100, 200],
            pauses_us: vec![300, 400],
            quiet_us: vec![100, 100],
            private_bytes: (10 << 20, 15 << 20),
            late_us: vec![60],
        };
        let upgrades = Upgrades::of(&upgrades);
        let aims = aims(&[measured], std::slice::from_ref(&row), &upgrades);
        let met: Vec<_> = aims.iter().map(|aim| aim.met).collect();
        assert_eq!(
            met,
            [true, false, true, false],
            "the p99 of the pauses and the memory are over their bounds: {aims:?}"
        );
        let text = table(&[row], &upgrades, &Spread::of(vec![30]));
        assert!(text.contains("randwrite") && text.contains("3.000") && text.contains("2 upgrades"), "{text}");
    }
}
