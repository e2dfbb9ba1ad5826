//! `cargo xtask test`: the whole test run. Nothing is left out without a line in the summary that says so.

use crate::{build, demo, guests, interrupt, packages, step, vm, workspace};
use anyhow::{Result, bail};
use std::process::Command;
use std::time::{Duration, Instant};

/// What may be said on the command line.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Also run the tests that take minutes (those marked `#[ignore = "long: ..."]`).
    #[arg(long)]
    long: bool,
    /// Run only the tests whose name contains this, and no other step.
    filter: Option<String>,
}

/// A run of one crate's tests with arguments that the ordinary run does not give.
struct Extra {
    name: &'static str,
    package: &'static str,
    test: &'static str,
    arguments: &'static [&'static str],
}

/// What `--long` adds to the ignored tests. (The ordinary run includes the models, with a smaller bound.)
const LONG_RUNS: &[Extra] = &[Extra {
    name: "gate: every model and mutant",
    package: "cofferdam-gate",
    test: "models",
    arguments: &["--long"],
}];

const VM_TEST: &str = "vm-test";

/// Runs everything and prints what ran.
pub(crate) fn run(options: &Options) -> Result<()> {
    interrupt::watch()?;
    let mut summary = Summary::default();
    let result = steps(options, &mut summary);
    summary.print();
    result?;
    match summary.failures() {
        0 => Ok(()),
        failures => bail!("{failures} of {} steps failed", summary.rows.len()),
    }
}

/// The steps in order. Set-up that fails ends the run; tests that fail do not, so that one run shows all that is wrong.
fn steps(options: &Options, summary: &mut Summary) -> Result<()> {
    summary.must("Debian packages", packages::ensure)?;
    summary.must("guest drivers", build::drivers)?;
    summary.must("guests of the tests", guests::build_test_guests)?;
    summary.must("compile programs and tests", compile)?;

    summary.tests("cargo test", &mut cargo_test(options.filter.as_deref(), &[]))?;
    if options.long {
        summary.tests("cargo test, long ones", &mut cargo_test(options.filter.as_deref(), &["--ignored"]))?;
    } else {
        summary.left_out("cargo test, long ones", "only with --long");
    }

    for extra in LONG_RUNS {
        if !options.long {
            summary.left_out(extra.name, "only with --long");
        } else if options.filter.is_some() {
            summary.left_out(extra.name, "a filter was given");
        } else {
            let mut cargo = workspace::cargo();
            cargo.args(["test", "--release", "-p", extra.package, "--test", extra.test, "--"]);
            summary.tests(extra.name, cargo.args(extra.arguments))?;
        }
    }
    for (name, backend) in [("demo", demo::Backend::Sim), ("demo --backend qemu", demo::Backend::Qemu)] {
        if options.filter.is_some() {
            summary.left_out(name, "a filter was given");
        } else {
            summary.may(name, || demo::show(&demo::Options::short(backend)).map(|()| String::new()));
        }
    }
    if options.filter.is_some() {
        summary.left_out(VM_TEST, "a filter was given; `cargo xtask vm-test FILTER` takes one");
    } else {
        summary.may(VM_TEST, || vm::tests(&vm::Options::all(options.long)));
        if !options.long {
            summary.left_out("vm-test, long ones", "only with --long");
        }
    }
    Ok(())
}

/// Compiles in the selection and profile that the tests have, so that the programs that process tests start are those of this tree.
fn compile() -> Result<()> {
    build::programs(&["cofferdam", "cofferdam-sim-blk", "cofferdam-sim", "cofferdam-vm-guest"])?;
    step::run(
        "tests: release build",
        workspace::cargo().args(["test", "--release", "--workspace", "--no-run", "--quiet"]),
    )
}

fn cargo_test(filter: Option<&str>, harness: &[&str]) -> Command {
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--release", "--workspace", "--no-fail-fast"]);
    if !harness.is_empty() {
        // Not the doctests: there "ignore" means that an example is not to be run at all.
        cargo.arg("--tests");
    }
    cargo.args(filter).arg("--").args(harness);
    cargo
}

/// What ran, how it ended and how long it took.
#[derive(Default)]
struct Summary {
    rows: Vec<Row>,
}

struct Row {
    name: String,
    outcome: Outcome,
    took: Duration,
}

enum Outcome {
    Passed(String),
    Failed(String),
    LeftOut(&'static str),
}

impl Summary {
    /// A step without which the next ones make no sense.
    fn must(&mut self, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
        interrupt::check()?;
        let begin = Instant::now();
        let result = work();
        self.push(name, begin, result.as_ref().map(|()| String::new()).map_err(ToString::to_string));
        result.map_err(|error| error.context(name.to_owned()))
    }

    /// A step whose failure is noted, and which has something to say about its success.
    fn may(&mut self, name: &str, work: impl FnOnce() -> Result<String>) {
        let begin = Instant::now();
        let result = interrupt::check().and_then(|()| work());
        self.push(name, begin, result.map_err(|error| format!("{error:#}")));
    }

    /// A step that runs test programs: their totals are added up, and a run in which nothing ran is a failure.
    fn tests(&mut self, name: &str, command: &mut Command) -> Result<()> {
        interrupt::check()?;
        let begin = Instant::now();
        let mut totals = Totals::default();
        let succeeded =
            step::run_reading(&format!("{name}: {}", step::shown(command)), command, |line| totals.add(line))?;
        let result = match (succeeded, totals.passed + totals.failed) {
            (true, 0) => Err("no test ran".to_owned()),
            (true, _) => Ok(totals.to_string()),
            (false, _) => Err(totals.to_string()),
        };
        self.push(name, begin, result);
        Ok(())
    }

    fn left_out(&mut self, name: &str, why: &'static str) {
        self.rows.push(Row { name: name.to_owned(), outcome: Outcome::LeftOut(why), took: Duration::ZERO });
    }

    fn push(&mut self, name: &str, begin: Instant, result: Result<String, String>) {
        let outcome = match result {
            Ok(detail) => Outcome::Passed(detail),
            Err(why) => Outcome::Failed(why),
        };
        self.rows.push(Row { name: name.to_owned(), outcome, took: begin.elapsed() });
    }

    fn failures(&self) -> usize {
        self.rows.iter().filter(|row| matches!(row.outcome, Outcome::Failed(_))).count()
    }

    fn print(&self) {
        println!("\n{}", step::bold("Summary"));
        for Row { name, outcome, took } in &self.rows {
            let (word, detail) = match outcome {
                Outcome::Passed(detail) => ("ok", detail.as_str()),
                Outcome::Failed(why) => ("FAILED", why.as_str()),
                Outcome::LeftOut(why) => ("left out", *why),
            };
            // The first line is enough here: the whole message stood where it happened.
            let detail = detail.lines().next().unwrap_or_default();
            println!("  {word:<9} {:>12}  {name:<32} {detail}", step::seconds(*took));
        }
    }
}

/// Sums over cargo's `test result:` lines and the `N runs, N wrong` lines of the models.
#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Totals {
    fn add(&mut self, line: &str) {
        let counts = parse_result(line).or_else(|| parse_runs(line));
        let (passed, failed, ignored) = counts.unwrap_or_default();
        self.passed += passed;
        self.failed += failed;
        self.ignored += ignored;
    }
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored)
    }
}

/// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
fn parse_result(line: &str) -> Option<(u64, u64, u64)> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |word: &str| counts.split("; ").find_map(|part| part.strip_suffix(word))?.parse::<u64>().ok();
    Some((count(" passed")?, count(" failed")?, count(" ignored")?))
}

/// Reads `23 runs, 0 wrong`.
fn parse_runs(line: &str) -> Option<(u64, u64, u64)> {
    let (runs, wrong) = line.strip_suffix(" wrong")?.split_once(" runs, ")?;
    let (runs, wrong) = (runs.parse::<u64>().ok()?, wrong.parse::<u64>().ok()?);
    Some((runs.saturating_sub(wrong), wrong, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_read_from_result_lines_and_from_nothing_else() {
        let mut totals = Totals::default();
        for line in [
            "running 4 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 2 passed; 5 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.20s",
            "12 runs, 2 wrong",
            "test result: a name that somebody gave to a test ... ok",
        ] {
            totals.add(line);
        }
        assert_eq!(totals.to_string(), "15 passed, 7 failed, 1 ignored");
    }
}
