//! What is printed and written.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::budget::Budget;
use crate::engine::Slice;
use crate::run::{Cell, Results, kiops};
use crate::solo::Solo;
use crate::stats::{median, percentile};

/// One line of the table and one entry of the JSON list.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Who.
    pub client: &'static str,
    /// The device.
    pub backend: &'static str,
    /// How the client waits.
    pub mode: &'static str,
    /// What.
    pub op: &'static str,
    /// Requests in flight.
    pub depth: u32,
    /// Queues.
    pub queues: u16,
    /// Thousands of requests per second, the median of the rounds.
    pub kiops: f64,
    /// Latency, sampled, over all rounds.
    pub p50_us: f64,
    /// As above.
    pub p99_us: f64,
    /// As above.
    pub p999_us: f64,
    /// Processor time of the client's thread per request.
    pub cpu_client_us: f64,
    /// Of what serves it: the device, and the port's threads where there is a port.
    pub cpu_backend_us: f64,
    /// The port's part of `cpu_backend_us`.
    pub cpu_port_us: f64,
    /// Calls into the sandboxed driver per request.
    pub crossings_per_request: Option<f64>,
    /// Allocations of the client's thread per request.
    pub allocations_per_request: f64,
    /// Rounds that it was measured in.
    pub rounds: usize,
}

/// One row per cell.
#[must_use]
pub fn rows(results: &Results) -> Vec<Row> {
    results.cells.iter().map(|(cell, slices)| row(results, cell, slices)).collect()
}

fn row(results: &Results, cell: &Cell, slices: &[Option<Slice>]) -> Row {
    let of = |of: &dyn Fn(&Slice) -> f64| median(&results.series(cell, of));
    let mut latencies: Vec<u32> =
        slices.iter().flatten().flat_map(|slice| slice.latencies_ns.iter().copied()).collect();
    latencies.sort_unstable();
    let latency = |per_mille| percentile(&latencies, per_mille) / 1e3;
    let per = |count: u64, slice: &Slice| count as f64 / slice.requests.max(1) as f64;
    // Of an in-process client the other threads of this process are nobody's: the clock of its own runtime.
    // Sums, not medians: the kernel counts another process's time in ticks, which are long beside a slice.
    let requests = slices.iter().flatten().map(|slice| slice.requests).sum::<u64>().max(1) as f64;
    let cpu = |of: fn(&Slice) -> Duration| {
        slices.iter().flatten().map(|slice| of(slice).as_secs_f64()).sum::<f64>() * 1e6 / requests
    };
    let port = if cell.client.is_nbd() { cpu(|slice| slice.times.port) } else { 0.0 };
    let crossings = of(&|slice| slice.crossings.map_or(f64::NAN, |crossings| per(crossings, slice)));
    Row {
        client: cell.client.name(),
        backend: cell.backend.name(),
        mode: cell.mode.name(),
        op: cell.job.op.name(),
        depth: cell.job.depth,
        queues: cell.queues,
        kiops: of(&kiops),
        p50_us: latency(500),
        p99_us: latency(990),
        p999_us: latency(999),
        cpu_client_us: cpu(|slice| slice.times.client),
        cpu_backend_us: port + cpu(|slice| slice.times.device),
        cpu_port_us: port,
        crossings_per_request: Some(crossings).filter(|crossings| crossings.is_finite()),
        allocations_per_request: of(&|slice| per(slice.allocations, slice)),
        rounds: slices.iter().flatten().count(),
    }
}

/// The table, a block per device, mode, operation and number of queues.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut last = None;
    let mut sorted: Vec<&Row> = rows.iter().collect();
    sorted.sort_by_key(|row| (row.backend, row.mode, row.queues, row.op, row.depth));
    for row in sorted {
        let block = (row.backend, row.mode, row.queues, row.op);
        if last != Some(block) {
            last = Some(block);
            let queues = if row.queues == 1 { String::new() } else { format!(", {} queues", row.queues) };
            let _ = writeln!(text, "\n{}, {}, {}{queues}", row.backend, row.mode, row.op);
            let _ = writeln!(
                text,
                "  {:>5} {:14} {:>9} {:>8} {:>8} {:>8} {:>9} {:>9} {:>7} {:>7}",
                "depth", "client", "kIOPS", "p50 us", "p99 us", "p99.9", "cpu us", "device us", "cross", "alloc"
            );
        }
        let crossings = row.crossings_per_request.map_or(String::new(), |crossings| format!("{crossings:.3}"));
        let _ = writeln!(
            text,
            "  {:>5} {:14} {:>9.1} {:>8.2} {:>8.2} {:>8.1} {:>9.3} {:>9.3} {crossings:>7} {:>7.3}",
            row.depth,
            row.client,
            row.kiops,
            row.p50_us,
            row.p99_us,
            row.p999_us,
            row.cpu_client_us,
            row.cpu_backend_us,
            row.allocations_per_request
        );
    }
    text
}

/// The budget as lines.
#[must_use]
pub fn budget_lines(budget: &Budget) -> String {
    let mut text = String::from("\nper request of the hot path (null device)\n");
    for path in &budget.hot_path {
        let _ = writeln!(
            text,
            "  {:8} depth {:>3}: {:.4} allocations, {:.4} system calls, {:.4} crossings ({} requests)",
            path.mode,
            path.depth,
            path.allocations_per_request,
            path.system_calls_per_request,
            path.crossings_per_request,
            path.requests
        );
    }
    let _ = writeln!(
        text,
        "load to first answer: cold {:.0} ms, cached {:.1} ms, by a running host without a cache {:.1} ms; idle binding {:.2} MiB beyond its arena",
        budget.cold_load_ms,
        budget.cached_load_ms,
        budget.uncached_load_ms,
        budget.idle_binding_bytes as f64 / 1048576.0
    );
    if let Some(copy) = &budget.nbdcopy {
        let _ = writeln!(
            text,
            "nbdcopy: ours {:.0} MiB/s, qemu-storage-daemon's own {:.0} MiB/s",
            copy.cofferdam, copy.qsd
        );
    }
    text
}

/// Writes the list, and beside it the summary: `block.json` and `block-summary.json`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(
    path: &Path,
    rows: &[Row],
    results: &Results,
    solo: &[Solo],
    budget: Option<&Budget>,
    aims: &[crate::aims::Aim],
) -> Result<()> {
    let summary = json!({
        "machine": crate::machine::describe(),
        "distances_ns": results.distances_ns,
        "mishaps": results.mishaps,
        "aims": aims,
        "solo": solo,
        "budget": budget,
    });
    write_both(path, rows, "block-summary.json", &summary)
}

/// Writes a bench's list, and its summary beside it.
pub(crate) fn write_both<R: serde::Serialize>(
    path: &Path,
    rows: &[R],
    summary_name: &str,
    summary: &serde_json::Value,
) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_string_pretty(rows)?)?;
    std::fs::write(path.with_file_name(summary_name), serde_json::to_string_pretty(summary)?)?;
    Ok(())
}
