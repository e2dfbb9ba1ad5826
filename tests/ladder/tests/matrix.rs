//! The matrix inside a process: every way out in every situation, each cell in a process of its own, so that what it leaves behind can be counted.

use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam_ladder_tests::cell::Cell;
use cofferdam_ladder_tests::plan::{Entry, Situation, plan};
use cofferdam_ladder_tests::table::{Outcome, conclude, spread, wanted};
use cofferdam_process_tests::process::Process;

/// In the environment of a process that runs one cell.
const CELL: &str = "COFFERDAM_LADDER_CELL";
/// What the report of a cell begins with on its stdout.
const REPORT: &str = "CELL ";
/// Cells at once: most of them wait most of the time, and each has its own processes.
const AT_ONCE: usize = 4;
/// The most that a cell may take with all its rounds, its stage and its neighbour.
const CELL_BOUND: Duration = Duration::from_secs(60);

#[test]
fn every_way_out_in_every_situation_ends_in_time_with_its_certificate_and_leaves_nothing() {
    if let Ok(name) = std::env::var(CELL) {
        return one(&name);
    }
    let begin = Instant::now();
    let cells: Vec<_> = Cell::all().into_iter().filter(|cell| wanted(&cell.name())).collect();
    assert!(!cells.is_empty(), "no cell has such a name");
    let outcomes = spread(&cells, AT_ONCE, |cell| in_a_process(&cell.name()));
    let names: Vec<_> = cells.iter().map(Cell::name).collect();
    let pairs = Entry::ALL.iter().flat_map(|entry| Situation::ALL.map(|situation| (*entry, situation)));
    let left_out: Vec<_> = pairs
        .filter_map(|(entry, situation)| Some((format!("{entry} x {situation}"), plan(entry, situation).err()?)))
        .collect();
    conclude("matrix", &names, &outcomes, &left_out, begin.elapsed());
}

/// In the process of a cell.
fn one(name: &str) {
    let cell = Cell::all().into_iter().find(|cell| cell.name() == name).unwrap_or_else(|| panic!("no cell {name}"));
    match cell.run() {
        Ok(report) => println!("{REPORT}{}", serde_json::to_string(&report).expect("a report is JSON")),
        Err(error) => panic!("{error:#}"),
    }
}

fn in_a_process(name: &str) -> Outcome {
    let this = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new(this);
    command.args(["every_way_out", "--nocapture", "--test-threads=1"]).env(CELL, name);
    // One heap that gives back what it can: what is left is then what is held.
    command.env("MALLOC_ARENA_MAX", "1").env("MALLOC_TRIM_THRESHOLD_", "65536");
    let mut process = Process::start(&mut command);
    let Some(ended) = process.end_within(CELL_BOUND) else {
        return Err(format!("still ran after {CELL_BOUND:?}: {}", process.stderr()));
    };
    let report = ended.stdout.lines().find_map(|line| line.split_once(REPORT)).map(|(_, report)| report);
    match report.and_then(|report| serde_json::from_str(report).ok()) {
        Some(report) if ended.code == Some(0) => Ok(report),
        _ => Err(why(&ended.stderr, ended.code, ended.signal)),
    }
}

/// The message of the panic, and nothing else of what was said.
fn why(stderr: &str, code: Option<i32>, signal: Option<i32>) -> String {
    let mut lines = stderr.lines().skip_while(|line| !line.contains("panicked at"));
    let place = lines.next().unwrap_or("no panic").to_owned();
    let message: Vec<_> = lines.take_while(|line| !line.starts_with("note: ")).collect();
    format!("{} ({place}; exit code {code:?}, signal {signal:?})", message.join(" "))
}
