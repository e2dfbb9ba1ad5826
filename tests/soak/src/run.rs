//! Many cycles in a row, what they leave in `target/soak`, and the verdict.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::census::Census;
use crate::chart::{self, Line};
use crate::cycle::{self, Times};
use crate::judge;
use crate::plan::{BAD_DRIVERS, Plan};
use crate::world::{self, World, target};

/// Which cycles, and of which seed.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// The seed.
    pub seed: u64,
    /// The first cycle's number.
    pub first: u64,
    /// How many.
    pub cycles: u64,
}

impl Span {
    /// This span, unless `COFFERDAM_SOAK_SEED`, `COFFERDAM_SOAK_FIRST` and `COFFERDAM_SOAK_CYCLES` say otherwise.
    pub fn or_asked_for(self) -> anyhow::Result<Span> {
        let number = |name: &str, unless: u64| match std::env::var(name) {
            Ok(text) => text.parse().with_context(|| format!("{name}={text}")),
            Err(_) => Ok(unless),
        };
        Ok(Span {
            seed: number("COFFERDAM_SOAK_SEED", self.seed)?,
            first: number("COFFERDAM_SOAK_FIRST", self.first)?,
            cycles: number("COFFERDAM_SOAK_CYCLES", self.cycles)?,
        })
    }
}

/// One cycle that has ended.
struct Row {
    number: u64,
    plan: Plan,
    times: Times,
    whole: Duration,
    census: Census,
}

/// How the allocator is told to keep nothing for later: one arena for all threads, and free memory at its end given back from 128 KiB on. Threads come and go in each
/// cycle, and with an arena for every few of them resident memory takes thousands of cycles to settle.
const ALLOCATOR: [(&str, &str); 2] = [("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "131072")];

/// Runs the test `name` of this program once more in a process of its own whose allocator is set up for [`soak`], which it then calls; here it only waits for it.
///
/// # Errors
/// See [`soak`]; its message was printed there.
pub fn alone(name: &str, span: Span) -> anyhow::Result<()> {
    if ALLOCATOR.iter().all(|(variable, value)| std::env::var(variable).is_ok_and(|is| is == *value)) {
        return soak(span);
    }
    let mut again = Command::new(std::env::current_exe()?);
    again.args(["--exact", name, "--include-ignored", "--nocapture"]).envs(ALLOCATOR);
    let status = again.status()?;
    ensure!(status.success(), "the soak failed, see above ({status})");
    Ok(())
}

/// Goes through the cycles; writes `soak.csv` and a plot of each series into `target/soak`, also when a cycle fails.
///
/// # Errors
/// A cycle in which something did not hold, with what replays it; or what has grown.
pub fn soak(span: Span) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    let begin = Instant::now();
    let result = cycles(span, &mut rows);
    let folder = target().join("soak");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("soak.csv"), csv(&rows))?;
    plots(&folder, span, &rows)?;
    print!("{}", table(&rows, begin.elapsed()));
    result?;
    let series: Vec<Census> = rows.iter().map(|row| row.census).collect();
    if series.len() < judge::LEAST_CYCLES {
        println!("{} cycles of seed {}, too few to judge what grows", series.len(), span.seed);
        return Ok(());
    }
    println!(
        "resident memory: {:+.0} bytes per cycle, at most {:.0}",
        judge::rss_slope(&series),
        judge::rss_bound(series.len())
    );
    let growth = judge::growth(&series);
    ensure!(growth.is_empty(), "seed {}: {}; see {}", span.seed, growth.join("; "), folder.display());
    Ok(())
}

fn cycles(span: Span, rows: &mut Vec<Row>) -> anyhow::Result<()> {
    let drivers: Vec<_> = BAD_DRIVERS.into_iter().chain([world::GOOD, world::ON_COMMAND]).collect();
    let mut world = World::new(&drivers)?;
    for number in span.first..span.first.saturating_add(span.cycles) {
        let plan = Plan::draw(span.seed, number);
        let begin = Instant::now();
        let replay = || {
            format!(
                "cycle {number} of seed {} ({plan:?}); again with COFFERDAM_SOAK_SEED={} COFFERDAM_SOAK_FIRST={number} COFFERDAM_SOAK_CYCLES=1",
                span.seed, span.seed
            )
        };
        let times = cycle::run(&mut world, &plan, number).with_context(replay)?;
        let census = Census::settled(rows.last().map(|row| &row.census)).with_context(replay)?;
        rows.push(Row { number, plan, times, whole: begin.elapsed(), census });
        if rows.len().is_multiple_of(1000) {
            eprintln!("    {} cycles: {census:?}", rows.len());
        }
    }
    Ok(())
}

fn csv(rows: &[Row]) -> String {
    let mut text = String::from(
        "cycle,way,backend,in_process,nbd,rss_kib,descriptors,mappings,threads,connect_us,load_us,first_io_us,traffic_us,leave_us,cycle_us\n",
    );
    for Row { number, plan, times, whole, census } in rows {
        let Census { rss_kib, descriptors, mappings, threads } = census;
        let Times { connect, load, first_io, traffic, leave } = times;
        let (way, backend) = (plan.way.name(), plan.backend.name());
        let _ = writeln!(
            text,
            "{number},{way},{backend},{},{},{rss_kib},{descriptors},{mappings},{threads},{connect},{load},{first_io},{traffic},{leave},{}",
            plan.in_process,
            plan.nbd,
            whole.as_micros()
        );
    }
    text
}

/// A plot's file, what it shows, its unit, and where the number comes from.
type Plot = (&'static str, &'static str, &'static str, fn(&Census) -> f64);

fn plots(folder: &Path, span: Span, rows: &[Row]) -> anyhow::Result<()> {
    let plots: [Plot; 4] = [
        ("rss", "Resident memory", "MiB", |census| census.rss_kib as f64 / 1024.0),
        ("fds", "Open descriptors", "descriptors", |census| census.descriptors as f64),
        ("maps", "Mappings", "mappings", |census| census.mappings as f64),
        ("threads", "Threads", "threads", |census| census.threads as f64),
    ];
    for (file, what, unit, of) in plots {
        let points = rows.iter().map(|row| (row.number as f64, of(&row.census))).collect();
        let path: PathBuf = folder.join(file).with_extension("svg");
        let title = format!("{what} after each of {} load-use-leave cycles (seed {})", rows.len(), span.seed);
        chart::over_cycles(&path, &title, unit, &Line { name: what.to_owned(), points })?;
    }
    Ok(())
}

/// Median and 99th percentile of each part by way out, and the share of each part in the whole.
fn table(rows: &[Row], took: Duration) -> String {
    let mut by_way = BTreeMap::<&str, Vec<&Row>>::new();
    for row in rows {
        by_way.entry(row.plan.way.name()).or_default().push(row);
        by_way.entry("all of them").or_default().push(row);
    }
    let mut text = format!("{} cycles in {:.1} s; milliseconds, median/p99\n", rows.len(), took.as_secs_f64());
    let _ = writeln!(
        text,
        "{:<14} {:>6} {:>13} {:>13} {:>13} {:>13} {:>13} {:>13}",
        "way out", "cycles", "connect", "load", "first I/O", "traffic", "leave", "whole"
    );
    for (way, rows) in by_way {
        let _ = write!(text, "{way:<14} {:>6}", rows.len());
        let parts: [fn(&Row) -> u64; 6] = [
            |row| row.times.connect,
            |row| row.times.load,
            |row| row.times.first_io,
            |row| row.times.traffic,
            |row| row.times.leave,
            |row| u64::try_from(row.whole.as_micros()).unwrap_or(u64::MAX),
        ];
        for part in parts {
            let mut values: Vec<u64> = rows.iter().map(|row| part(row)).collect();
            values.sort_unstable();
            let at = |share: usize| values[(values.len() - 1) * share / 100] as f64 / 1000.0;
            let _ = write!(text, " {:>13}", format!("{:.1}/{:.1}", at(50), at(99)));
        }
        text.push('\n');
    }
    text
}
