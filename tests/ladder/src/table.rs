//! Runs many cells, some at a time, and makes the table.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::cell::Report;

/// Names which cells are run; all when it is not set.
pub const ONLY: &str = "COFFERDAM_LADDER_ONLY";

/// What came of a cell: its line, or why it failed.
pub type Outcome = Result<Report, String>;

/// Whether a cell of this name is to be run.
#[must_use]
pub fn wanted(name: &str) -> bool {
    std::env::var(ONLY).map_or(true, |word| name.contains(&word))
}

/// Runs `work` on each of `items`, `at_once` at a time, and gives what came of each in their order.
pub fn spread<T: Sync>(items: &[T], at_once: usize, work: impl Fn(&T) -> Outcome + Sync) -> Vec<Outcome> {
    let next = AtomicUsize::new(0);
    let outcomes: Vec<_> = items.iter().map(|_| Mutex::new(Err("never ran".to_owned()))).collect();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some((item, outcome)) = items.get(next.load(Ordering::SeqCst)).and_then(|_| {
                    let index = next.fetch_add(1, Ordering::SeqCst);
                    Some((items.get(index)?, outcomes.get(index)?))
                }) {
                    let came = work(item);
                    *outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = came;
                }
            });
        }
    });
    outcomes
        .into_iter()
        .map(|outcome| outcome.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
        .collect()
}

/// Writes the table to `target/ladder/NAME.md` and to stdout; fails with every cell that failed.
pub fn conclude(name: &str, names: &[String], outcomes: &[Outcome], left_out: &[(String, &str)], took: Duration) {
    let mut text = format!(
        "# {name}\n\n{} cells in {:.1} s. Times in ms; requests: in flight at the close, completed, failed; neighbour: the longest round of the healthy binding beside it.\n\n",
        names.len(),
        took.as_secs_f64()
    );
    text.push_str("| cell | took | bound | outcome | leaked bytes | requests | neighbour | rounds |\n");
    text.push_str("| --- | ---: | ---: | --- | ---: | --- | ---: | ---: |\n");
    let mut failures = Vec::new();
    for (cell, outcome) in names.iter().zip(outcomes) {
        match outcome {
            Ok(report) => {
                let Report { took_ms, bound_ms, outcome, leaked_bytes, requests: [at, completed, failed], .. } = report;
                let Report { neighbour_ms, rounds, .. } = report;
                let _ = writeln!(
                    text,
                    "| {cell} | {took_ms:.1} | {bound_ms:.0} | {outcome} | {leaked_bytes} | {at}, {completed}, {failed} | {neighbour_ms:.1} | {rounds} |"
                );
            }
            Err(why) => {
                let first = why.lines().next().unwrap_or_default().replace('|', "/");
                let _ = writeln!(text, "| {cell} | | | FAILED: {first} | | | | |");
                failures.push(format!("{cell}: {why}"));
            }
        }
    }
    if !left_out.is_empty() {
        text.push_str("\nWhat makes no sense:\n\n");
        for (cell, why) in left_out {
            let _ = writeln!(text, "- {cell}: {why}");
        }
    }
    let folder = target();
    let path = folder.join(format!("{name}.md"));
    std::fs::write(&path, &text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    println!("{text}");
    assert!(failures.is_empty(), "{} of {} cells failed:\n{}", failures.len(), names.len(), failures.join("\n"));
}

/// `target/ladder`.
#[must_use]
pub fn target() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/ladder");
    std::fs::create_dir_all(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    folder
}
