//! The table, the aim, the file and the plot.

use std::path::Path;

use anyhow::Context;
use cofferdam_manager::{Certificate, Stage};
use cofferdam_soak_tests::backend::Kind;
use cofferdam_soak_tests::chart::{self, Line};
use serde::Serialize;

use crate::Load;

/// What the caller waits.
const WHOLE: &str = "whole";
/// DESIGN section 5: what was answered has 100 ms to get to its clients. An unload of a healthy device stays inside that, all in all.
const AIM_MS: f64 = 100.0;

/// The unloads of one case.
struct Case {
    backend: Kind,
    load: Load,
    /// Microseconds of each stage, in the ladder's order; last the whole.
    stages: Vec<(String, Vec<u64>)>,
    /// Requests in flight when the gate closed.
    in_flight: Vec<u64>,
}

/// One line of the table.
#[derive(Serialize)]
struct Row<'a> {
    backend: &'static str,
    load: &'static str,
    stage: &'a str,
    unloads: usize,
    median_us: u64,
    p90_us: u64,
    p99_us: u64,
    max_us: u64,
}

/// All of them.
#[derive(Default)]
pub(crate) struct Report {
    cases: Vec<Case>,
}

impl Report {
    pub(crate) fn add(&mut self, backend: Kind, load: Load, certificate: &Certificate, micros: u64) {
        let place = self.cases.iter().position(|case| case.backend == backend && case.load == load);
        let place = place.unwrap_or_else(|| {
            self.cases.push(Case { backend, load, stages: Vec::new(), in_flight: Vec::new() });
            self.cases.len() - 1
        });
        let case = &mut self.cases[place];
        case.in_flight.push(certificate.requests_at_close);
        let times = certificate.stages.iter().map(|stage| (name(stage.name), stage.micros));
        for (name, micros) in times.chain([(WHOLE.to_owned(), micros)]) {
            match case.stages.iter_mut().find(|(known, _)| *known == name) {
                Some((_, values)) => values.push(micros),
                None => case.stages.push((name, vec![micros])),
            }
        }
    }

    fn rows(&self) -> Vec<Row<'_>> {
        let row = |case: &Case, stage, values: &[u64]| {
            let sorted = sorted(values);
            let at = |share: usize| sorted[(sorted.len() - 1) * share / 100];
            let (backend, load) = (case.backend.name(), case.load.name());
            Row {
                backend,
                load,
                stage,
                unloads: sorted.len(),
                median_us: at(50),
                p90_us: at(90),
                p99_us: at(99),
                max_us: at(100),
            }
        };
        let cases = self.cases.iter();
        cases.flat_map(|case| case.stages.iter().map(move |(stage, values)| row(case, stage, values))).collect()
    }

    pub(crate) fn print(&self) {
        for case in &self.cases {
            let in_flight = sorted(&case.in_flight);
            println!(
                "{}, {}: {} unloads, {} requests in flight in the median",
                case.backend.name(),
                case.load.name(),
                in_flight.len(),
                in_flight[in_flight.len() / 2]
            );
            println!("  {:<12} {:>9} {:>9} {:>9} {:>9}   us", "stage", "median", "p90", "p99", "max");
            for row in
                self.rows().iter().filter(|row| (row.backend, row.load) == (case.backend.name(), case.load.name()))
            {
                let Row { stage, median_us, p90_us, p99_us, max_us, .. } = row;
                println!("  {stage:<12} {median_us:>9} {p90_us:>9} {p99_us:>9} {max_us:>9}");
            }
        }
        println!();
        for row in self.rows().iter().filter(|row| row.stage == WHOLE) {
            let p99 = row.p99_us as f64 / 1000.0;
            let verdict = if p99 <= AIM_MS { "met" } else { "MISSED" };
            let what = format!("{}, {}: p99 of the whole", row.backend, row.load);
            println!("{what:44} {p99:6.2} ms   at most {AIM_MS:<5} {verdict}");
        }
    }

    /// Writes the list to `path` and the plot beside it.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, serde_json::to_string_pretty(&self.rows())? + "\n")?;
        let mut lines = Vec::new();
        for case in &self.cases {
            let (_, values) = case.stages.iter().find(|(name, _)| name == WHOLE).context("every unload has a whole")?;
            let sorted = sorted(values);
            let share = |at: usize| 100.0 * (at + 1) as f64 / sorted.len() as f64;
            lines.push(Line {
                name: format!("{}, {}", case.backend.name(), case.load.name()),
                points: sorted.iter().enumerate().map(|(at, micros)| (*micros as f64 / 1000.0, share(at))).collect(),
            });
        }
        let title = format!(
            "How long an unload takes, over {} unloads each",
            self.cases.first().map_or(0, |case| case.in_flight.len())
        );
        chart::distributions(&path.with_extension("svg"), &title, "milliseconds, logarithmic", &lines)
    }
}

/// As the certificate spells it.
fn name(stage: Stage) -> String {
    serde_json::to_value(stage).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn sorted(values: &[u64]) -> Vec<u64> {
    let mut values = values.to_vec();
    values.sort_unstable();
    values
}
