//! PCI functions, and what became of them.

use cofferdam_bus_pci::handover::{Handover, Report, Step};
use cofferdam_bus_pci::sysfs::{Group, Readiness};
use cofferdam_bus_pci::{Address, By, Via};
use serde_json::{Value, json};

use super::{bytes, line, print, table};
use crate::devices::Device;

pub(crate) fn devices(devices: &[Device]) {
    if devices.is_empty() {
        line("no PCI functions");
        return;
    }
    let or_none = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let row = |device: &Device| {
        let info = &device.info;
        [
            info.address.to_string(),
            format!("{:04x}:{:04x}", info.ids.vendor, info.ids.device),
            info.class_words().to_owned(),
            or_none(info.driver.as_deref()),
            info.group.as_ref().map_or_else(|| "-".to_owned(), |group| group.number.to_string()),
            who(device),
            usable(device),
        ]
    };
    let head = ["ADDRESS", "IDS", "CLASS", "DRIVER", "GROUP", "CLAIMED BY", "USABLE"];
    print(&table::lines("", head, devices.iter().map(row)));
}

/// Who has it, for a person.
fn who(device: &Device) -> String {
    match (&device.binding, &device.claim, &device.record) {
        (Some(name), _, _) => name.clone(),
        (None, Some(Some(claimant)), _) => format!("process {} ({})", claimant.process.pid, claimant.purpose),
        (None, Some(None), _) => "a process".to_owned(),
        (None, None, Some(record)) => match record.by {
            By::Operator => "bind".to_owned(),
            By::Load(process) => format!("nobody (process {} is gone; unbind it)", process.pid),
        },
        (None, None, None) => "-".to_owned(),
    }
}

fn usable(device: &Device) -> String {
    let info = &device.info;
    let uses = info.uses.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    let Some(via) = info.preferred() else {
        return match (&info.usable.vfio, &info.usable.uio) {
            (Readiness::No { why }, Readiness::No { why: other }) if why != other => {
                format!("no: vfio: {why}; uio: {other}")
            }
            (Readiness::No { why }, _) => format!("no: {why}"),
            _ => "no".to_owned(),
        };
    };
    let how = match info.usable.of(via).mend() {
        Some(command) => format!("{via} ('{command}')"),
        None => via.to_string(),
    };
    if uses.is_empty() { how } else { format!("{how}, by force: {uses}") }
}

/// One element of `devices --json`.
pub(crate) fn device_json(device: &Device) -> Value {
    let info = &device.info;
    let hex = |number: u16| format!("0x{number:04x}");
    let claim = device.claim.as_ref().map(|claimant| {
        json!({
            "pid": claimant.as_ref().map(|claimant| claimant.process.pid),
            "purpose": claimant.as_ref().map(|claimant| claimant.purpose.clone()),
            "binding": device.binding,
        })
    });
    json!({
        "address": info.address.to_string(),
        "vendor": hex(info.ids.vendor),
        "device": hex(info.ids.device),
        "subsystem_vendor": hex(info.ids.subsystem_vendor),
        "subsystem": hex(info.ids.subsystem),
        "class": format!("0x{:06x}", info.ids.class),
        "class_words": info.class_words(),
        "revision": info.ids.revision,
        "driver": info.driver,
        "driver_override": info.driver_override,
        "iommu_group": info.group.as_ref().map(group_json),
        "bar_bytes": info.bars.map(|bar| bar.bytes),
        "uio": readiness_json(&info.usable.uio),
        "vfio": readiness_json(&info.usable.vfio),
        "preferred": info.preferred(),
        "uses": info.uses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "claim": claim,
        "record": device.record,
    })
}

fn group_json(group: &Group) -> Value {
    let others = group
        .others
        .iter()
        .map(|member| json!({ "name": member.name, "driver": member.driver, "is_bridge": member.is_bridge }));
    json!({ "number": group.number, "type": group.kind, "others": others.collect::<Vec<_>>() })
}

fn readiness_json(readiness: &Readiness) -> Value {
    let (state, why) = match readiness {
        Readiness::Ready => ("ready", None),
        Readiness::Module(module) => ("module", Some(format!("{module} is not loaded"))),
        Readiness::No { why } => ("no", Some(why.clone())),
    };
    json!({ "state": state, "why": why, "mend": readiness.mend() })
}

/// A dry run.
pub(crate) fn steps(address: Address, via: Option<Via>, steps: &[Step], json: bool) {
    if json {
        let mut document = document(address, steps, true);
        document["via"] = json!(via);
        super::json(&document);
        return;
    }
    if steps.is_empty() {
        line(&format!("# {address}: nothing to do"));
    }
    steps.iter().for_each(|step| line(&step.to_string()));
}

fn document(address: Address, steps: &[Step], dry_run: bool) -> Value {
    let steps: Vec<String> = steps.iter().map(ToString::to_string).collect();
    json!({ "address": address.to_string(), "dry_run": dry_run, "steps": steps })
}

pub(crate) fn handed_over(done: &Handover, json: bool) {
    let Handover { address, via, steps, was_there, is_silent, freed_bytes } = done;
    if json {
        let mut document = document(*address, steps, false);
        document["via"] = json!(via);
        document["was_there"] = json!(was_there);
        document["is_silent"] = json!(is_silent);
        document["freed_bytes"] = json!(freed_bytes);
        super::json(&document);
        return;
    }
    let driver = via.driver();
    line(&match (steps.is_empty(), was_there) {
        (false, _) => format!("{address}: {driver} has it; 'cofferdam unbind pci:{address}' gives it back"),
        (true, false) => format!("{address}: {driver} has it already"),
        (true, true) => {
            format!("{address}: {driver} has it already; somebody else bound it, so nothing will be given back")
        }
    });
}

pub(crate) fn returned(done: &Report, json: bool) {
    let Report { address, driver, steps, is_silent, freed_bytes, is_kept } = done;
    if json {
        let mut document = document(*address, steps, false);
        document["driver"] = json!(driver);
        document["is_silent"] = json!(is_silent);
        document["freed_bytes"] = json!(freed_bytes);
        document["is_kept"] = json!(is_kept);
        super::json(&document);
        return;
    }
    let has = driver.as_deref().map_or_else(|| "no driver has it".to_owned(), |driver| format!("{driver} has it"));
    let when = if steps.is_empty() { " already" } else { "" };
    line(&format!("{address}: {has}{when}"));
    if *is_silent == Some(false) {
        line("  its bus mastering was not seen to be off: memory that it may have been given stays as it is");
    }
    if *freed_bytes > 0 {
        line(&format!("  {} freed that a killed host had left", bytes(*freed_bytes)));
    }
}
