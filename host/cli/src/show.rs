//! What people read. Everything here goes to stdout and is data; a stdout that is closed ends nothing.
//!
//! Drivers, devices and clients have a say in some of these texts, so no control character of theirs reaches a terminal. JSON is another matter: its reader unpacks it.

mod crash;
mod devices;
mod doctor;
mod event;
mod explanation;
mod table;

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use cofferdam_manager::{
    BindingStatus, Certificate, DeviceId, GuestLimits, HandleStatus, ImportInfo, ImportKind, ModuleInfo, RevokeReport,
    Stage, UpgradeReport,
};

use crate::control::{PortChange, mapped_handles, mapped_mib};

pub(crate) use crash::crashes;
pub(crate) use devices::{device_json, devices, handed_over, returned, steps};
pub(crate) use doctor::{doctor, doctor_json};
pub(crate) use event::event;
pub(crate) use explanation::{explanation, explanation_lines, fingerprint};

pub(crate) fn line(text: &str) {
    let text = harmless(text);
    let _ = match STDOUT_IS_TAKEN.load(Ordering::Relaxed) {
        false => writeln!(std::io::stdout().lock(), "{text}"),
        true => writeln!(std::io::stderr().lock(), "{text}"),
    };
}

/// Standard output is a device's console.
static STDOUT_IS_TAKEN: AtomicBool = AtomicBool::new(false);

/// From here on everything goes to standard error.
pub(crate) fn leave_stdout() {
    STDOUT_IS_TAKEN.store(true, Ordering::Relaxed);
}

fn print(lines: &[String]) {
    lines.iter().for_each(|text| line(text));
}

/// The text with control characters written out.
pub(crate) fn harmless(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.chars().any(char::is_control) {
        return text.into();
    }
    let write_out = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(write_out).collect::<String>().into()
}

pub(crate) fn json<T: serde::Serialize + ?Sized>(document: &T) {
    match serde_json::to_string(document) {
        Ok(text) => line(&text),
        Err(error) => tracing::error!(%error, "not representable as JSON"),
    }
}

pub(crate) fn serving(binding: &BindingStatus) {
    let size = given(binding);
    line(&format!(
        "{}: {} serves {} ({size}, {})",
        binding.name,
        binding.driver,
        binding.device,
        count(binding.lanes as u64, "lane")
    ));
    reachable(&binding.ports);
}

pub(crate) fn bindings(bindings: &[BindingStatus]) {
    if bindings.is_empty() {
        line("no bindings");
        return;
    }
    let row = |binding: &BindingStatus| {
        let calls: Vec<String> = binding.calls.iter().map(|core| format!("{}:{}", core.core, core.crossings)).collect();
        [
            binding.name.clone(),
            state(binding),
            binding.driver.clone(),
            binding.device.clone(),
            binding.generation.to_string(),
            age(binding.age_seconds),
            binding.handles.len().to_string(),
            binding.requests_in_flight.to_string(),
            if calls.is_empty() { "-".into() } else { calls.join(" ") },
        ]
    };
    let head = ["NAME", "STATE", "DRIVER", "DEVICE", "GEN", "AGE", "HANDLES", "IN FLIGHT", "CALLS PER CORE"];
    print(&table::lines("", head, bindings.iter().map(row)));
}

/// How large a disk is; of another device, what it is.
fn given(binding: &BindingStatus) -> String {
    match binding.service.as_str() {
        "block" | "" => bytes(binding.capacity_bytes),
        service => service.to_owned(),
    }
}

/// `serving`, `serving (pinned)`, `draining (waiting, unload)`.
fn state(binding: &BindingStatus) -> String {
    let stage = (binding.stage != binding.state).then(|| binding.stage.clone());
    let trusted = (binding.dma == "trusted").then(|| "trusted with DMA".to_owned());
    let retired = (binding.retired_bytes > 0).then(|| format!("{} retired", bytes(binding.retired_bytes)));
    let notes = [stage, binding.cause.clone(), binding.pinned.then(|| "pinned".to_owned()), trusted, retired];
    let notes: Vec<String> = notes.into_iter().flatten().collect();
    if notes.is_empty() { binding.state.clone() } else { format!("{} ({})", binding.state, notes.join(", ")) }
}

pub(crate) fn handles(binding: &str, handles: &[HandleStatus]) {
    if handles.is_empty() {
        line(&format!("{binding} has no handles"));
        return;
    }
    print(&handle_lines("", handles));
}

fn handle_lines(indent: &str, handles: &[HandleStatus]) -> Vec<String> {
    let row = |handle: &HandleStatus| {
        [
            handle.id.to_string(),
            handle.port.clone(),
            handle.peer.clone(),
            handle.lane.to_string(),
            age(handle.age_seconds),
            handle.in_flight.to_string(),
            handle.requests.to_string(),
        ]
    };
    let head = ["ID", "PORT", "PEER", "LANE", "AGE", "IN FLIGHT", "REQUESTS"];
    table::lines(indent, head, handles.iter().map(row))
}

pub(crate) fn upgraded(report: &UpgradeReport) {
    let UpgradeReport { name, from, to, generation, prepare_micros, blackout_micros, .. } = report;
    line(&format!("{name}: {from} -> {to} (generation {generation})"));
    line(&format!("  made ready in {}, clients waited {blackout_micros} us", millis(*prepare_micros / 1000)));
}

pub(crate) fn revoked(report: &RevokeReport) {
    let RevokeReport { binding, handle, port, peer, .. } = report;
    line(&format!("handle {handle} of {binding} is revoked ({port}, {peer})"));
    line(&format!(
        "  {} in flight, all answered after {}",
        count(report.requests_at_revoke, "request"),
        micros(report.micros)
    ));
}

pub(crate) fn port(change: &PortChange) {
    let PortChange { binding, port, .. } = change;
    match (change.connections, change.severed) {
        (Some(connections), Some(severed)) => line(&format!(
            "{binding}: detached {port} ({}, {severed} severed with answers unsent)",
            count(connections, "connection")
        )),
        _ => line(&format!("{binding}: attached {port}")),
    }
    reachable(&change.ports);
}

fn reachable(ports: &[String]) {
    for port in ports {
        line(&format!("  reachable at {port}"));
    }
    if ports.is_empty() {
        line("  reachable at no address (see 'cofferdam port attach')");
    }
}

pub(crate) fn binding(binding: &BindingStatus) {
    line(&format!("{} ({})", binding.name, state(binding)));
    line(&format!("  driver      {} (generation {})", binding.driver, binding.generation));
    if binding.crashes > 0 {
        let crashes = count(binding.crashes, "time");
        line(&format!("  broke down  {crashes} (see 'cofferdam crashes {}')", binding.name));
    }
    line(&format!("  device      {} ({})", binding.device, given(binding)));
    line(&format!("  age         {}", age(binding.age_seconds)));
    line(&format!("  lanes       {}", binding.lanes));
    line(&format!(
        "  in flight   {}, {} running",
        count(binding.requests_in_flight, "request"),
        count(binding.calls_running, "call")
    ));
    line(&format!("  leased      {}", bytes(binding.leased_bytes)));
    if let Some(away) = &binding.away {
        line(&format!("  away        {away}"));
    }
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
    let ids: Vec<String> = info.devices.iter().map(ToString::to_string).collect();
    line(&format!("  devices   {}", if ids.is_empty() { "lists none".to_owned() } else { ids.join(", ") }));
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
        "devices": info.devices.iter().map(device_id_json).collect::<Vec<_>>(),
        "imports": info.imports.iter().map(import).collect::<Vec<_>>(),
        "exports": info.exports,
        "limits": limits(),
    }));
}

/// One entry of a device table; `null` fits everything.
fn device_id_json(id: &DeviceId) -> serde_json::Value {
    let hex = |id: Option<u16>| id.map(|id| format!("0x{id:04x}"));
    match *id {
        DeviceId::Virtio(id) => serde_json::json!({ "bus": "virtio", "device": id }),
        DeviceId::Pci { vendor, device, class, class_mask } => serde_json::json!({
            "bus": "pci",
            "vendor": hex(vendor),
            "device": hex(device),
            "class": format!("0x{class:06x}"),
            "class_mask": format!("0x{class_mask:06x}"),
        }),
    }
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
        "mapped_handles": mapped_handles(),
        "mapped_bytes": u64::from(mapped_mib()) << 20,
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

pub(crate) fn count(number: u64, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}

fn micros(micros: u64) -> String {
    if micros >= 1000 { format!("{:.1} ms", micros as f64 / 1000.0) } else { format!("{micros} us") }
}

fn millis(millis: u64) -> String {
    match millis {
        0..=999 => format!("{millis} ms"),
        1000..=119_999 => format!("{:.1} s", millis as f64 / 1000.0),
        _ => age(millis / 1000),
    }
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
