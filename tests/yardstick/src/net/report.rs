//! What is printed and written.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use super::clients::Client;
use super::job::{Direction, Job};
use super::plan::DEPTH;
use super::run::Cell;
use crate::aims::Aim;
use crate::engine::Slice;
use crate::run::{Results, kiops};
use crate::stats::{Estimate, median};

/// Least part of DPDK's rate at [`DEPTH`] frames in flight.
const BOUND: f64 = 0.8;

/// One line of the table and one entry of the JSON list.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which way frames go.
    pub direction: &'static str,
    /// Bytes of a frame.
    pub bytes: u32,
    /// Frames in flight.
    pub depth: u16,
    /// Who.
    pub client: &'static str,
    /// Thousands of frames per second, the median of the rounds.
    pub kfps: f64,
    /// Of DPDK's rate in the same round.
    pub of_dpdk: Option<Estimate>,
    /// Processor time of the client per frame: of its thread, or its process.
    pub cpu_client_us: f64,
    /// Of the device.
    pub cpu_device_us: f64,
    /// Calls into the sandboxed driver per frame.
    pub crossings_per_frame: Option<f64>,
    /// Allocations of the client's thread per frame, where it is one of this process.
    pub allocations_per_frame: Option<f64>,
    /// Rounds that it was measured in.
    pub rounds: usize,
}

/// One row per cell.
#[must_use]
pub fn rows(results: &Results<Cell>) -> Vec<Row> {
    results.cells.iter().map(|(cell, slices)| row(results, cell, slices)).collect()
}

fn row(results: &Results<Cell>, cell: &Cell, slices: &[Option<Slice>]) -> Row {
    let frames = slices.iter().flatten().map(|slice| slice.requests).sum::<u64>().max(1) as f64;
    let cpu = |of: fn(&Slice) -> Duration| {
        slices.iter().flatten().map(|slice| of(slice).as_secs_f64()).sum::<f64>() * 1e6 / frames
    };
    let per = |count: u64, slice: &Slice| count as f64 / slice.requests.max(1) as f64;
    let of = |of: &dyn Fn(&Slice) -> f64| Some(median(&results.series(cell, of))).filter(|value| value.is_finite());
    let dpdk = Cell { client: Client::Dpdk, ..*cell };
    Row {
        direction: cell.job.direction.name(),
        bytes: cell.job.bytes,
        depth: cell.job.depth,
        client: cell.client.name(),
        kfps: median(&results.series(cell, kiops)),
        of_dpdk: results.ratio(cell, &dpdk, kiops),
        cpu_client_us: cpu(|slice| slice.times.client),
        cpu_device_us: cpu(|slice| slice.times.device),
        crossings_per_frame: of(&|slice| slice.crossings.map_or(f64::NAN, |crossings| per(crossings, slice))),
        allocations_per_frame: of(&|slice| per(slice.allocations, slice)).filter(|_| cell.client != Client::Dpdk),
        rounds: slices.iter().flatten().count(),
    }
}

/// The table, a block per job.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut last = None;
    for row in rows {
        let block = (row.direction, row.bytes, row.depth);
        if last != Some(block) {
            last = Some(block);
            let _ = writeln!(text, "\n{}, {} bytes, {} in flight", row.direction, row.bytes, row.depth);
            let _ = writeln!(
                text,
                "  {:10} {:>9}  {:22} {:>9} {:>9} {:>7} {:>7}",
                "client", "kframes/s", "of dpdk's", "cpu us", "device us", "cross", "alloc"
            );
        }
        let ratio = row
            .of_dpdk
            .map_or(String::new(), |Estimate { median, low, high }| format!("{median:.3} [{low:.3}, {high:.3}]"));
        let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.3}"));
        let _ = writeln!(
            text,
            "  {:10} {:>9.1}  {ratio:22} {:>9.3} {:>9.3} {:>7} {:>7}",
            row.client,
            row.kfps,
            row.cpu_client_us,
            row.cpu_device_us,
            number(row.crossings_per_frame),
            number(row.allocations_per_frame),
        );
    }
    text
}

/// All aims that something was measured for.
#[must_use]
pub fn aims(results: &Results<Cell>) -> Vec<Aim> {
    let mut aims = Vec::new();
    for direction in [Direction::Send, Direction::Receive] {
        for bytes in [64, 1500] {
            let of = |client| Cell { job: Job { direction, bytes, depth: DEPTH }, client };
            if let Some(ratio) = results.ratio(&of(Client::Cofferdam), &of(Client::Dpdk), kiops) {
                let what = format!("cofferdam / dpdk, {} {bytes} bytes, {DEPTH} in flight", direction.name());
                aims.push(Aim::at_least(what, ratio, BOUND));
            }
        }
    }
    aims
}

/// Writes the list, and beside it the summary: `net.json` and `net-summary.json`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(path: &Path, rows: &[Row], results: &Results<Cell>, aims: &[Aim]) -> Result<()> {
    let summary = json!({
        "machine": crate::machine::describe(),
        "distances_ns": results.distances_ns,
        "mishaps": results.mishaps,
        "aims": aims,
    });
    crate::report::write_both(path, rows, "net-summary.json", &summary)
}
