//! The commands for PCI functions, as an operator types them.

use crate::disk::{self, NBD_PORT};
use crate::host::{BLOCK_DRIVER, Host, cofferdam, device, kernel_serves, told};
use crate::mount::Mount;
use crate::pci::{DISK0, DISK1, Function, RNG0, places};
use crate::vm::{SHORT, Vm};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;

/// What makes this machine's functions usable, and what cannot.
struct Way {
    option: &'static str,
    via: &'static str,
    driver: &'static str,
    other: &'static str,
    /// Why the other cannot.
    why: &'static str,
}

fn way(vm: &Vm) -> Way {
    match vm.topology.as_str() {
        "uio" => Way { option: "--uio", via: "uio", driver: "uio_pci_generic", other: "vfio", why: "no IOMMU" },
        _ => Way { option: "--vfio", via: "vfio", driver: "vfio-pci", other: "uio", why: "translates addresses" },
    }
}

/// `devices` is right about every function of the topology, by what sysfs says of it.
fn shown(vm: &Vm, way: &Way) -> Result<()> {
    let text = cofferdam(vm, &["devices"])?.success()?.stdout;
    for place in places(&vm.topology) {
        let function = place.function()?;
        let told = told(vm, &function)?;
        let (vendor, id) = (function.attribute("vendor")?, function.attribute("device")?);
        ensure!(told["vendor"] == vendor && told["device"] == id, "{}: {told}", place.id);
        ensure!(told["class"] == function.attribute("class")?, "{}: {told}", place.id);
        ensure!(told["driver"].as_str() == place.native, "{}: {told}", place.id);
        let group = told["iommu_group"]["number"].as_u64().map(|group| group.to_string());
        ensure!(group == function.iommu_group(), "{}: {told}", place.id);
        ensure!(told[way.via]["state"] == "ready" && told["preferred"] == way.via, "{}: {told}", place.id);
        let why = told[way.other]["why"].as_str().unwrap_or_default();
        ensure!(told[way.other]["state"] == "no" && why.contains(way.why), "{}: {told}", place.id);
        ensure!(told["uses"] == json!([]) && told["claim"].is_null() && told["record"].is_null(), "{told}");
        // The table has the same: address, ids, class, driver, group, claimed by, usable.
        let line = text.lines().find(|line| line.starts_with(&function.address())).context("not in the table")?;
        let driver = place.native.unwrap_or("-");
        for word in [&*function.ids()?, driver, &*group.unwrap_or("-".to_owned()), way.via] {
            ensure!(line.split_whitespace().any(|part| part == word), "no {word:?} in {line:?}");
        }
    }
    // A bridge is shown and cannot be had.
    let bridge = text.lines().find(|line| line.contains("bridge")).context("no bridge")?;
    ensure!(bridge.contains("not for binding"), "{bridge:?}");
    let address = bridge.split_whitespace().next().context("no address")?;
    cofferdam(vm, &["bind", &format!("pci:{address}")])?.refusal()?.saying("not for binding")?;
    Ok(())
}

/// All that a hand-over changes.
fn state(disk: &Function) -> Result<Value> {
    let record = std::fs::read_to_string(record(disk)).ok();
    let (driver, only) = (disk.driver(), disk.attribute("driver_override")?);
    Ok(json!({ "driver": driver, "driver_override": only, "record": record, "block": disk.block_device() }))
}

fn record(disk: &Function) -> String {
    format!("/run/cofferdam/pci/{}.json", disk.address())
}

/// `bind` and `unbind`, each dry, for real and again; and a load between.
pub(super) fn by_hand(vm: &mut Vm) -> Result<()> {
    let way = way(vm);
    shown(vm, &way)?;
    vm.step("devices");
    let disk = DISK0.function()?;
    kernel_serves(vm, &disk)?;
    let address = device(&disk);
    let before = state(&disk)?;

    let dry = cofferdam(vm, &["bind", &address, "--dry-run"])?.success()?;
    ensure!(dry.stdout.contains(&format!("echo '{}' > ", way.driver)), "{}", dry.stdout);
    let dry = cofferdam(vm, &["bind", &address, "--dry-run", "--json"])?.success()?.json()?;
    ensure!(dry["dry_run"] == true && dry["via"] == way.via, "{dry}");
    ensure!(state(&disk)? == before, "a dry run changed {before} to {}", state(&disk)?);

    let bound = cofferdam(vm, &["bind", &address, "--json"])?.success()?.json()?;
    // The dry run has told every step; but for the time, which is in no step's text.
    ensure!(bound["steps"] == dry["steps"] && bound["via"] == way.via, "{bound} is not {dry}");
    ensure!(disk.driver().as_deref() == Some(way.driver), "it is with {:?}", disk.driver());
    ensure!(disk.block_device().is_none(), "the kernel still serves the disk");
    let now = told(vm, &disk)?;
    ensure!(now["record"]["by"] == "operator" && now["record"]["driver"] == "virtio-pci", "{now}");
    let line = cofferdam(vm, &["devices"])?.success()?.stdout;
    let line = line.lines().find(|line| line.starts_with(&disk.address())).context("not in the table")?.to_owned();
    ensure!(line.contains(way.driver) && line.split_whitespace().any(|word| word == "bind"), "{line:?}");
    vm.step("bound");

    let after = state(&disk)?;
    cofferdam(vm, &["bind", &address])?.success()?.saying("has it already")?;
    ensure!(state(&disk)? == after, "bound again, {after} became {}", state(&disk)?);

    // A load uses it as it is, and leaves it bound.
    let host = Host::start(vm)?;
    host.load_disk(vm, &disk, way.option, NBD_PORT, &[])?;
    disk::works(vm)?;
    let line = cofferdam(vm, &["devices", "--socket", "/tmp/cofferdam.sock"])?.success()?.stdout;
    let line = line.lines().find(|line| line.starts_with(&disk.address())).context("not in the table")?.to_owned();
    ensure!(line.split_whitespace().any(|word| word == "disk"), "no binding in {line:?}");
    for command in ["bind", "unbind"] {
        cofferdam(vm, &[command, &address])?.refusal()?.saying("'cofferdam unload disk'")?;
        cofferdam(vm, &[command, &address, "--dry-run"])?.refusal()?.saying("'cofferdam unload disk'")?;
    }
    host.unload(vm, "disk")?;
    ensure!(state(&disk)? == after, "unloaded, {after} became {}", state(&disk)?);
    ensure!(!disk.is_master()?, "unloaded, and it masters the bus");
    host.end()?;
    vm.step("loaded and unloaded, still bound");

    let dry = cofferdam(vm, &["unbind", &address, "--dry-run", "--json"])?.success()?.json()?;
    ensure!(state(&disk)? == after, "a dry run changed {after} to {}", state(&disk)?);
    let done = cofferdam(vm, &["unbind", &address, "--json"])?.success()?.json()?;
    ensure!(done["steps"] == dry["steps"] && done["driver"] == "virtio-pci", "{done} is not {dry}");
    ensure!(done["is_silent"] == true && done["freed_bytes"] == 0, "{done}");
    kernel_serves(vm, &disk)?;
    ensure!(state(&disk)? == before, "given back, {before} became {}", state(&disk)?);
    cofferdam(vm, &["unbind", &address])?.success()?.saying("virtio-pci has it already")?;
    ensure!(!Path::new(&record(&disk)).exists(), "a record is left");
    vm.step("given back");

    // What is not there, and what is no address.
    let absent = cofferdam(vm, &["bind", "pci:0000:00:1e.7"])?.refusal()?;
    ensure!(absent.status.code() == Some(3), "{:?}", absent.status);
    let wrong = cofferdam(vm, &["bind", "pci:../../etc"])?.refusal()?;
    ensure!(wrong.status.code() == Some(2), "{:?}", wrong.status);
    // The other way is refused with its reason.
    let other = format!("--{}", way.other);
    cofferdam(vm, &["bind", &device(&RNG0.function()?), &other])?.refusal()?.saying(way.why)?;
    Ok(())
}

/// `doctor` tells what this machine has.
pub(super) fn doctor(vm: &mut Vm) -> Result<()> {
    let told = cofferdam(vm, &["doctor", "--json"])?.success()?.json()?;
    let check = |name: &str, status: &str, part: &str| {
        let check = &told["checks"][name];
        let detail = check["detail"].as_str().unwrap_or_default();
        ensure!(check["status"] == status && detail.contains(part), "{name}: {check}");
        ensure!(status == "ok" || name == "iommufd" || !check["mend"].is_null(), "nothing mends {name}: {check}");
        Ok(())
    };
    ensure!(told["vhost_user_ready"] == true, "{told}");
    check("permissions", "ok", "root")?;
    check("uio", "ok", "uio_pci_generic")?;
    check("nbd", "ok", "nbd")?;
    let (free, all) = (disk::free_hugepages()?, disk::all_hugepages()?);
    check("hugepages", "ok", &format!("mounted at /dev/hugepages; 2048 KiB: {free} of {all} free"))?;
    if vm.topology == "vfio" {
        let groups = std::fs::read_dir("/sys/kernel/iommu_groups")?.count();
        check("iommu", "ok", &format!("{groups} groups"))?;
        check("vfio", "ok", "vfio-pci")?;
    } else {
        check("iommu", "missing", "uio")?;
        check("vfio", "limited", "no IOMMU")?;
    }
    cofferdam(vm, &["doctor"])?.success()?.saying("hugepages")?;
    Ok(())
}

/// A disk with a mounted file system is taken by no command, and all of them name the mount.
pub(super) fn in_use(vm: &mut Vm) -> Result<()> {
    const AT: &str = "/mnt/used";
    let disk = DISK1.function()?;
    kernel_serves(vm, &disk)?;
    let node = disk.block_device().context("no block device")?;
    vm.run(["mkfs.ext4".as_ref(), "-q".as_ref(), "-F".as_ref(), node.as_os_str()])?.success()?;
    let mount = Mount::new(vm, &node, AT, "rw")?;
    std::fs::write(format!("{AT}/file"), "content")?;
    let name = node.file_name().context("no name")?.to_string_lossy().into_owned();
    let used = format!("{name} is mounted at {AT}");
    let address = device(&disk);
    let via = format!("--{}", vm.topology);
    let how = format!("'cofferdam bind {address} --force'");
    let host = Host::start(vm)?;
    let load = ["load", BLOCK_DRIVER, "--device", &address, "--name", "disk", &via];
    let run = ["run", BLOCK_DRIVER, "--device", &address, &via];
    for line in [&["bind", &address][..], &["bind", &address, &via], &["bind", &address, "--dry-run"], &load, &run] {
        cofferdam(vm, line)?.refusal()?.saying(&used)?.saying(&how)?;
        ensure!(disk.driver().as_deref() == Some("virtio-pci"), "it is with {:?} after {line:?}", disk.driver());
    }
    vm.step("refused five times");
    let told = told(vm, &disk)?;
    ensure!(told["uses"] == json!([used]), "{told}");
    ensure!(told["record"].is_null() && told["claim"].is_null() && told["driver_override"].is_null(), "{told}");
    // The file system has noticed nothing.
    std::fs::write(format!("{AT}/other"), "more")?;
    vm.run(["sync"])?.success()?;
    ensure!(std::fs::read(format!("{AT}/file"))? == b"content", "the file has changed");
    mount.end()?;
    vm.run(["fsck.ext4".as_ref(), "-fn".as_ref(), node.as_os_str()])?.success()?;
    vm.step("unmounted: taken and given back");
    // The mount in the way was the only reason.
    vm.wait_until("the kernel has let go of the mount", SHORT, || {
        Ok(cofferdam(vm, &["bind", &address, "--dry-run"])?.success().is_ok())
    })?;
    cofferdam(vm, &["bind", &address, &via])?.success()?;
    cofferdam(vm, &["unbind", &address])?.success()?;
    host.end()
}
