//! What people read. Everything here goes to stdout and is data; a stdout that is closed ends nothing.

use std::fmt::Write as _;
use std::io::Write as _;

use cofferdam_manager::{
    BindingStatus, Certificate, GuestLimits, HandleStatus, ImportInfo, ImportKind, ModuleInfo, Stage,
};

pub(crate) fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

pub(crate) fn json<T: serde::Serialize + ?Sized>(document: &T) {
    match serde_json::to_string(document) {
        Ok(text) => line(&text),
        Err(error) => tracing::error!(%error, "not representable as JSON"),
    }
}

pub(crate) fn serving(binding: &BindingStatus) {
    let size = bytes(binding.capacity_bytes);
    line(&format!(
        "{}: {} serves {} ({size}, {})",
        binding.name,
        binding.driver,
        binding.device,
        count(binding.lanes as u64, "lane")
    ));
    for port in &binding.ports {
        line(&format!("  reachable at {port}"));
    }
}

pub(crate) fn table(bindings: &[BindingStatus]) {
    if bindings.is_empty() {
        line("no bindings");
        return;
    }
    let mut rows = vec![
        ["NAME", "STATE", "DRIVER", "DEVICE", "GEN", "AGE", "HANDLES", "IN FLIGHT", "CALLS PER CORE"]
            .map(str::to_owned),
    ];
    for binding in bindings {
        let calls: Vec<String> = binding.calls.iter().map(|core| format!("{}:{}", core.core, core.crossings)).collect();
        let state = if binding.pinned { format!("{} (pinned)", binding.state) } else { binding.state.clone() };
        rows.push([
            binding.name.clone(),
            state,
            binding.driver.clone(),
            binding.device.clone(),
            binding.generation.to_string(),
            age(binding.age_seconds),
            binding.handles.len().to_string(),
            binding.requests_in_flight.to_string(),
            if calls.is_empty() { "-".into() } else { calls.join(" ") },
        ]);
    }
    let widths: Vec<usize> = (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    for row in &rows {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "{cell:<width$}  ");
        }
        line(text.trim_end());
    }
}

pub(crate) fn binding(binding: &BindingStatus) {
    line(&format!("{} ({})", binding.name, binding.state));
    line(&format!("  driver      {} (generation {})", binding.driver, binding.generation));
    line(&format!("  device      {} ({})", binding.device, bytes(binding.capacity_bytes)));
    line(&format!("  age         {}", age(binding.age_seconds)));
    line(&format!("  lanes       {}", binding.lanes));
    line(&format!(
        "  in flight   {}, {} running",
        count(binding.requests_in_flight, "request"),
        count(binding.calls_running, "call")
    ));
    line(&format!("  leased      {}", bytes(binding.leased_bytes)));
    if let Some(fault) = &binding.fault {
        line(&format!("  fault       {fault}"));
    }
    for port in &binding.ports {
        line(&format!("  port        {port}"));
    }
    for core in &binding.calls {
        line(&format!("  core {:<6} {} requests, {} calls", core.core, core.operations, core.crossings));
    }
    for handle in &binding.handles {
        let HandleStatus { id, port, peer, lane, in_flight, .. } = handle;
        line(&format!(
            "  handle {id:<4} {port} {peer} on lane {lane}, {in_flight} in flight, {} old",
            age(handle.age_seconds)
        ));
    }
}

pub(crate) fn module(path: &str, info: &ModuleInfo) {
    line(path);
    line(&format!("  sha256    {}", info.digest));
    line(&format!("  size      {}", bytes(info.bytes as u64)));
    let compiled = if info.from_cache {
        "read from the cache".to_owned()
    } else {
        format!("{:.1} ms", info.compile_micros as f64 / 1000.0)
    };
    line(&format!("  compiled  {compiled}"));
    line(&format!("  service   {}", info.service.as_str()));
    line("  asks for");
    for import in &info.imports {
        line(&format!("    {:<45} {}", import.name, import_kind(import.kind)));
    }
    let limits = GuestLimits::default();
    line(&format!(
        "  limits    {} of memory, {} ms a call, {} log lines a second (load --help to set them)",
        bytes(limits.memory_bytes as u64),
        limits.call_deadline_ms,
        limits.log_lines_per_s
    ));
    line("  gives");
    for export in &info.exports {
        line(&format!("    {export}"));
    }
}

/// `inspect FILE --json`.
pub(crate) fn module_json(info: &ModuleInfo) {
    let import = |import: &ImportInfo| serde_json::json!({ "name": import.name, "kind": import_kind(import.kind) });
    json(&serde_json::json!({
        "sha256": info.digest,
        "bytes": info.bytes,
        "compile_micros": info.compile_micros,
        "from_cache": info.from_cache,
        "service": info.service.as_str(),
        "imports": info.imports.iter().map(import).collect::<Vec<_>>(),
        "exports": info.exports,
        "limits": limits(),
    }));
}

/// What an instance may use unless `load` says otherwise (DESIGN section 9).
fn limits() -> serde_json::Value {
    let limits = GuestLimits::default();
    serde_json::json!({
        "memory_bytes": limits.memory_bytes,
        "call_deadline_ms": limits.call_deadline_ms,
        "log_lines_per_s": limits.log_lines_per_s,
        "requests_per_lane": 1024,
        "handles": 4096,
    })
}

fn import_kind(kind: ImportKind) -> &'static str {
    match kind {
        ImportKind::Capability => "capability",
        ImportKind::Wasi => "wasi (only with --allow)",
        ImportKind::Unknown => "unknown (refused)",
    }
}

pub(crate) fn certificate(certificate: &Certificate) {
    let c = certificate;
    line(&format!(
        "certificate: {} ({} on {}, generation {}): {}",
        c.name,
        c.driver,
        c.device,
        c.generation,
        outcome(c)
    ));
    line(&format!("  handles   {} revoked", c.handles_revoked));
    line(&format!(
        "  calls     {} running at close, {} drained, {} interrupted",
        c.calls_at_close, c.calls_drained, c.calls_interrupted
    ));
    line(&format!(
        "  requests  {} in flight at close, {} completed, {} failed",
        c.requests_at_close, c.requests_completed, c.requests_failed
    ));
    let stages: Vec<String> =
        c.stages.iter().map(|stage| format!("{} {}", stage_name(stage.name), micros(stage.micros))).collect();
    line(&format!("  stages    {}", stages.join(", ")));
    let r = &c.residual;
    if r.is_zero() {
        line("  left      nothing");
    } else {
        line(&format!(
            "  left      {} calls, {} handles, {} requests, {} buffers, {} of DMA memory, {} mappings, {} descriptors",
            r.calls,
            r.handles,
            r.requests,
            r.buffers,
            bytes(r.dma_bytes),
            r.mappings,
            r.fds
        ));
    }
    if c.leaked.bytes > 0 || !c.leaked.reason.is_empty() {
        line(&format!("  retired   {} on purpose: {}", bytes(c.leaked.bytes), c.leaked.reason));
    }
}

fn outcome(certificate: &Certificate) -> String {
    kebab(&certificate.outcome)
}

fn stage_name(stage: Stage) -> String {
    kebab(&stage)
}

/// The name that a value has in JSON.
fn kebab<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn micros(micros: u64) -> String {
    if micros >= 1000 { format!("{:.1} ms", micros as f64 / 1000.0) } else { format!("{micros} us") }
}

fn age(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]).replace(".0 ", " ") }
}
