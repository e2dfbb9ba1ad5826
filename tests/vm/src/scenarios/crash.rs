//! The host is killed while its device writes.
//!
//! What must hold is DESIGN's rule for uio: memory that the device was told of is nobody else's before the device is known to be silent. The kernel takes the mapping of a process
//! that ends before it closes its descriptors, and only the close of `/dev/uioN` has uio_pci_generic switch bus mastering off: what bridges that moment, and a kernel that
//! does not switch it off, are the named files.

use crate::disk::{self, NBD_PORT, free_hugepages, hugepage_files, is_kept};
use crate::host::{Host, cofferdam, device, kernel_serves, told};
use crate::pci::{BYPASS0, DISK0, Function};
use crate::vm::{SHORT, Vm};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

const PAGE_BYTES: u64 = 2 << 20;

/// A host that was killed.
struct Killed {
    process: u32,
    /// What it shared with the function in named files, before it was killed.
    files: Vec<(String, u64)>,
    /// Huge pages that were free before it had any.
    free: u64,
}

/// Serves the disk, writes what has to outlive the host, and kills the host while fio writes elsewhere.
fn kill(vm: &Vm, disk: &Function, via: &str) -> Result<Killed> {
    disk::forget(vm, disk)?;
    let free = free_hugepages()?;
    let host = Host::start(vm)?;
    host.load_disk(vm, disk, via, NBD_PORT, &[])?;
    disk::keep(vm)?;
    vm.step("written and flushed; traffic");
    let mut fio = disk::under_load(vm, "disk")?;
    let files = hugepage_files(disk);
    ensure!(disk.is_master()?, "the device writes and does not master the bus");
    ensure!(fio.is_alive()?, "nobody writes any more");
    let process = host.kill()?;
    vm.step("killed");
    fio.finish(SHORT)?.refusal()?;
    Ok(Killed { process, files, free })
}

/// The driver of uio or vfio has the function still, which is silent, and `devices` says who left it.
fn is_left(vm: &Vm, disk: &Function, driver: &str, killed: &Killed) -> Result<()> {
    ensure!(disk.driver().as_deref() == Some(driver), "it is with {:?}", disk.driver());
    // uio_pci_generic switches it off when its node is closed, vfio-pci when the device is.
    ensure!(!disk.is_master()?, "it masters the bus still");
    let told = told(vm, disk)?;
    ensure!(told["claim"].is_null(), "claimed: {}", told["claim"]);
    ensure!(told["driver"] == driver, "{told}");
    let gone = format!("nobody (process {} is gone; unbind it)", killed.process);
    cofferdam(vm, &["devices"])?.success()?.saying(&gone)?;
    Ok(())
}

/// What was in named files is in them still, and the kernel has given none of it to anybody.
fn holds(disk: &Function, killed: &Killed) -> Result<u64> {
    let bytes: u64 = killed.files.iter().map(|(_, bytes)| bytes).sum();
    ensure!(bytes > 0, "no memory in named files");
    let files = hugepage_files(disk);
    ensure!(files == killed.files, "{:?} became {files:?}", killed.files);
    let free = free_hugepages()?;
    ensure!(free + bytes / PAGE_BYTES == killed.free, "{free} of {} pages free, {bytes} bytes in files", killed.free);
    Ok(bytes)
}

/// The steps that were taken hold these, in this order.
fn in_order(done: &Value, parts: &[&str]) -> Result<()> {
    let mut steps = done["steps"].as_array().context("no steps")?.iter().filter_map(Value::as_str);
    for part in parts {
        ensure!(steps.any(|step| step.contains(part)), "no {part:?}, or not in order: {}", done["steps"]);
    }
    Ok(())
}

/// The kernel's driver serves the disk, with all that was written and flushed, and writes to it; no trace of the host is left.
fn is_good(vm: &Vm, disk: &Function, free: u64) -> Result<()> {
    kernel_serves(vm, disk)?;
    is_kept(vm, disk)?;
    disk::fio_in_kernel(vm, disk, "--rw=randwrite --bs=4k --offset=16m --size=1m --verify=crc32c --do_verify=1")?
        .success()?;
    ensure!(hugepage_files(disk).is_empty(), "{:?}", hugepage_files(disk));
    ensure!(free_hugepages()? == free, "{} huge pages are free, {free} were", free_hugepages()?);
    let told = told(vm, disk)?;
    ensure!(told["record"].is_null() && told["driver_override"].is_null(), "{told}");
    Ok(())
}

/// Kills, unbinds, and looks.
fn killed_and_given_back(vm: &mut Vm, via: &str, driver: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let killed = kill(vm, &disk, via)?;
    is_left(vm, &disk, driver, &killed)?;
    let mut left = 0;
    if via == "--uio" {
        left = holds(&disk, &killed)?;
        vm.step(&format!("{left} bytes are still in {} files; bus mastering on again", killed.files.len()));
        // As on a kernel whose uio_pci_generic leaves it on: silence is not taken for granted.
        disk.set_master()?;
    } else {
        ensure!(killed.files.is_empty(), "huge pages behind an IOMMU: {:?}", killed.files);
    }
    let address = device(&disk);
    let done = cofferdam(vm, &["unbind", &address, "--json"])?.success()?.json()?;
    vm.step("unbound");
    ensure!(done["is_silent"] == true, "not seen to be silent: {done}");
    ensure!(done["freed_bytes"] == left, "{left} bytes were left: {done}");
    ensure!(done["driver"] == "virtio-pci", "{done}");
    in_order(&done, &["/driver/unbind", "COMMAND=0:4", "/reset", "# free", "drivers_probe", "/driver "])?;
    is_good(vm, &disk, killed.free)
}

/// The function stays with uio, its memory stays in named files, and `unbind` silences it before it frees them.
pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    killed_and_given_back(vm, "--uio", "uio_pci_generic")
}

/// The kernel takes the IOMMU's mappings and resets; `unbind` gives the function back.
pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    killed_and_given_back(vm, "--vfio", "vfio-pci")
}

/// The next host takes the function as it is, and the memory only after its reset.
fn loaded_again(vm: &mut Vm, disk: &Function, via: &str) -> Result<()> {
    let killed = kill(vm, disk, via)?;
    holds(disk, &killed)?;
    let host = Host::start(vm)?;
    host.load_disk(vm, disk, via, NBD_PORT, &[])?;
    let files = hugepage_files(disk);
    let old = files.iter().filter(|file| killed.files.contains(file)).count();
    ensure!(old == 0, "{old} of {} files are the killed host's", files.len());
    vm.step("loaded again");
    disk::works(vm)?;
    host.unload(vm, "disk")?;
    host.end()?;
    is_good(vm, disk, killed.free)
}

/// On uio.
pub(super) fn loaded_again_on_uio(vm: &mut Vm) -> Result<()> {
    loaded_again(vm, &DISK0.function()?, "--uio")
}

/// Physical addresses behind vfio: named files there, too.
pub(super) fn loaded_again_round_the_iommu(vm: &mut Vm) -> Result<()> {
    loaded_again(vm, &BYPASS0.function()?, "--vfio")
}
