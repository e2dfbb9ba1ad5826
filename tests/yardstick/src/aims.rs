//! The aims of the data path, each beside what was measured.
//!
//! A ratio is one of the same round; an aim is met when the end of the 95 % interval that is against it is within 3 % of it.

use std::fmt::Write as _;

use serde::Serialize;

use crate::backend::Kind;
use crate::budget::Budget;
use crate::clients::Client;
use crate::engine::{Job, Mode, Op, Slice};
use crate::run::{Cell, Results, kiops, per_request_us};
use crate::stats::Estimate;

/// How far the end of an interval may be off.
const TOLERANCE: f64 = 0.03;

/// One aim.
#[derive(Clone, Debug, Serialize)]
pub struct Aim {
    /// In words.
    pub what: String,
    /// What was measured.
    pub value: Estimate,
    /// Whether the bound is the least or the most.
    pub at_least: bool,
    /// The bound.
    pub bound: f64,
    /// Whether it is met.
    pub met: bool,
}

impl Aim {
    /// An aim from below.
    #[must_use]
    pub fn at_least(what: String, value: Estimate, bound: f64) -> Aim {
        Aim { what, value, at_least: true, bound, met: value.low >= bound * (1.0 - TOLERANCE) }
    }

    fn at_most(what: String, value: Estimate, bound: f64) -> Aim {
        Aim { what, value, at_least: false, bound, met: value.high <= bound * (1.0 + TOLERANCE) }
    }
}

/// A figure without an interval, against a bound without a tolerance.
pub(crate) fn figure(what: &str, value: f64, bound: f64) -> Aim {
    let value = Estimate { median: value, low: value, high: value };
    Aim { what: what.to_owned(), value, at_least: false, bound, met: value.median <= bound }
}

struct Look<'a> {
    results: &'a Results,
    aims: Vec<Aim>,
}

/// A cell with one queue.
fn cell(backend: Kind, mode: Mode, op: Op, depth: u32, client: Client) -> Cell {
    Cell { backend, mode, queues: 1, job: Job { op, depth }, client }
}

impl Look<'_> {
    fn faster(&mut self, what: &str, over: &Cell, under: &Cell, bound: f64) {
        if let Some(ratio) = self.results.ratio(over, under, kiops) {
            let Job { op, depth } = over.job;
            self.aims.push(Aim::at_least(format!("{what}, {} depth {depth}", op.name()), ratio, bound));
        }
    }
}

/// All aims that something was measured for.
#[must_use]
pub fn aims(results: &Results, budget: Option<&Budget>) -> Vec<Aim> {
    let mut look = Look { results, aims: Vec::new() };
    for op in [Op::RandRead, Op::RandWrite] {
        null(&mut look, op);
        qsd(&mut look, op);
    }
    for depth in [32, 128] {
        let of = |client| cell(Kind::Qsd, Mode::Event, Op::RandRead, depth, client);
        look.faster("NBD port / qsd's own NBD", &of(Client::CofferdamNbd), &of(Client::QsdNbd), 2.0);
    }
    let mut aims = look.aims;
    if let Some(budget) = budget {
        figures(&mut aims, budget);
    }
    aims
}

fn null(look: &mut Look<'_>, op: Op) {
    let of = |depth, client| cell(Kind::Null, Mode::Poll, op, depth, client);
    for depth in [1, 32, 128] {
        let bound = if depth == 1 { 1.0 } else { 1.5 };
        look.faster("null: cofferdam / blkio", &of(depth, Client::Cofferdam), &of(depth, Client::Blkio), bound);
    }
    for depth in [32, 128] {
        look.faster("null: cofferdam / bare", &of(depth, Client::Cofferdam), &of(depth, Client::Bare), 0.5);
    }
    let (sandboxed, native) = (of(32, Client::Cofferdam), of(32, Client::Native));
    if let Some(ratio) = look.results.ratio(&native, &sandboxed, kiops) {
        let what = format!("null: time per request, cofferdam / native, {} depth 32", op.name());
        look.aims.push(Aim::at_most(what, ratio, 1.25));
    }
}

fn qsd(look: &mut Look<'_>, op: Op) {
    for mode in [Mode::Poll, Mode::Event] {
        for depth in [1, 4, 32, 128] {
            let of = |client| cell(Kind::Qsd, mode, op, depth, client);
            let (ours, theirs) = (of(Client::Cofferdam), of(Client::Blkio));
            look.faster(&format!("qsd, {}: cofferdam / blkio", mode.name()), &ours, &theirs, 1.0);
            let both = |slice: &Slice| per_request_us(slice, slice.times.client + slice.times.device);
            if let Some(ratio) = look.results.ratio(&ours, &theirs, both) {
                let what =
                    format!("qsd, {}: CPU per request, cofferdam / blkio, {} depth {depth}", mode.name(), op.name());
                look.aims.push(Aim::at_most(what, ratio, 1.0));
            }
        }
    }
    for (depth, bound) in [(1, 5.0), (32, 1.3), (128, 1.8)] {
        let ours = cell(Kind::Qsd, Mode::Adaptive, op, depth, Client::Cofferdam);
        let theirs = cell(Kind::Qsd, Mode::Event, op, depth, Client::Blkio);
        look.faster("qsd: cofferdam adaptive / blkio event", &ours, &theirs, bound);
    }
}

fn figures(aims: &mut Vec<Aim>, budget: &Budget) {
    if let Some(copy) = &budget.nbdcopy {
        aims.push(Aim::at_least("nbdcopy: NBD port / qsd's own NBD".into(), copy.ratio, 1.0));
    }
    for path in &budget.hot_path {
        let of = |what: &str| format!("{what} per request, {} depth {}", path.mode, path.depth);
        // Of a hundred thousand requests a handful of anything is a warm-up, not the hot path.
        aims.push(figure(&of("allocations"), path.allocations_per_request, 0.001));
        if path.depth >= 32 {
            aims.push(figure(&of("system calls"), path.system_calls_per_request, 0.001));
        }
    }
    aims.push(figure("idle client, default mode: per cent of a core", budget.idle_cpu_percent, 0.5));
    aims.push(figure("idle binding beyond its arena, MiB", budget.idle_binding_bytes as f64 / 1048576.0, 4.0));
    aims.push(figure("cached load to first answer, ms", budget.cached_load_ms, 10.0));
    aims.push(figure("cold load to first answer, ms", budget.cold_load_ms, 500.0));
}

/// As lines.
#[must_use]
pub fn lines(aims: &[Aim]) -> String {
    let mut text = String::from("\naims: median [95 % interval] of ratios of the same round\n");
    for Aim { what, value, at_least, bound, met } in aims {
        let Estimate { median, low, high } = value;
        let relation = if *at_least { "at least" } else { "at most" };
        let verdict = if *met { "met" } else { "MISSED" };
        let _ = writeln!(text, "  {what:72} {median:8.3} [{low:7.3}, {high:7.3}]  {relation:8} {bound:<6} {verdict}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn slice(requests: u64) -> Option<Slice> {
        Some(Slice { requests, elapsed: Duration::from_secs(1), ..Slice::default() })
    }

    #[test]
    fn an_aim_is_met_by_the_end_of_the_interval_and_not_by_the_median() {
        let mut results = Results::default();
        let of = |client| cell(Kind::Null, Mode::Poll, Op::RandRead, 32, client);
        results.cells.insert(of(Client::Blkio), (0..12).map(|_| slice(100)).collect());
        // The median is 1.6, but three of twelve rounds are at 1.0.
        let uneven = (0..12).map(|round| slice(if round < 3 { 100 } else { 160 })).collect();
        results.cells.insert(of(Client::Cofferdam), uneven);
        let found = aims(&results, None);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!((found[0].value.median - 1.6).abs() < 1e-9 && !found[0].met, "{found:?}");
        results.cells.insert(of(Client::Cofferdam), (0..12).map(|_| slice(147)).collect());
        assert!(aims(&results, None)[0].met, "within 3 %");
        results.cells.insert(of(Client::Cofferdam), (0..12).map(|_| slice(144)).collect());
        assert!(!aims(&results, None)[0].met, "not within 3 %");
    }
}
