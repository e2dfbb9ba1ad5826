//! The block driver on PCI functions: loaded, used, unloaded, and the disk back with the kernel.

use crate::host::{Host, cofferdam, device, kernel_serves};
use crate::pci::{DISK0, EDU0, LEGACY0};
use crate::vm::{SHORT, Vm};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::time::Duration;

/// Loads the driver, writes through NBD and checks what was written, unloads, and has the kernel read it.
fn drive(vm: &mut Vm, via: &str, confinement: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let host = Host::start(vm)?;
    vm.step("load");
    let loaded = host.load_disk(vm, &disk, via, "nbd:/tmp/disk.sock", &[])?;
    ensure!(loaded["dma"] == confinement, "confinement: {}", loaded["dma"]);
    vm.step("served");
    let fio = "fio --name=verify --ioengine=nbd --uri=nbd+unix:///?socket=/tmp/disk.sock --rw=randwrite --bs=4k --size=2m --iodepth=16 --verify=crc32c --do_verify=1";
    vm.run_within(Duration::from_secs(120), fio.split(' ').collect::<Vec<_>>())?.success()?;
    vm.step("verified; unload");
    let certificate = host.unload(vm, "disk")?;
    ensure!(certificate["outcome"] == "unloaded" || certificate["outcome"] == "detached", "{certificate}");
    kernel_serves(vm, &disk)?;
    host.end()
}

/// Physical memory in huge pages, INTx.
pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    drive(vm, "--uio", "host")
}

/// An IOMMU domain, MSI-X.
pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    drive(vm, "--vfio", "iommu")
}

/// A transitional device is refused, with what mends it, and goes back.
pub(super) fn legacy_is_refused(vm: &mut Vm) -> Result<()> {
    let disk = LEGACY0.function()?;
    let driver = disk.driver();
    let address = device(&disk);
    let line = ["run", "/drivers/virtio-blk.wasm", "--device", &address, "--uio"];
    cofferdam(vm, &line)?.refusal()?.saying("disable-legacy=on")?;
    ensure!(disk.driver() == driver, "it is with {:?}", disk.driver());
    Ok(())
}

/// Loads a driver of edu, whose `attach` does all that it does, and unloads it; what the binding said of its device's confinement.
fn edu(vm: &Vm, driver: &str, more: &[&str]) -> Result<String> {
    let address = device(&EDU0.function()?);
    let host = Host::start(vm)?;
    let path = format!("/drivers/test/{driver}.wasm");
    let line = ["load", &path, "--device", &address, "--name", "edu", "--call-deadline-ms", "5000", "--json"];
    let loaded = cofferdam(vm, &[&line[..], more].concat())?.success()?.json()?;
    host.unload(vm, "edu")?;
    host.end()?;
    Ok(loaded["dma"].as_str().unwrap_or_default().to_owned())
}

/// Eight bytes of the machine's memory, as QEMU sees it.
fn memory(vm: &mut Vm, address: u64) -> Result<String> {
    let line = json!({ "command-line": format!("xp /1gx {address:#x}") });
    let answer = vm.outside("human-monitor-command", &line)?;
    let text = answer.as_str().context("no text")?.trim().to_owned();
    Ok(text.split_whitespace().next_back().context("no value")?.to_owned())
}

/// Where `edu-guess` copies from and to (`tests/guests/edu`).
const GUESS: (u64, u64) = (0x100_0000, 0x9000);

/// Without an IOMMU a driver of registers alone programs an address that it made up, and nothing happens; on the operator's word it does, so the test can fail.
pub(super) fn a_guess_on_uio(vm: &mut Vm) -> Result<()> {
    let (source, before) = (memory(vm, GUESS.0)?, memory(vm, GUESS.1)?);
    ensure!(source != before, "{source} is there already");
    ensure!(edu(vm, "edu-guess", &["--uio"])? == "host", "the function is trusted");
    let after = memory(vm, GUESS.1)?;
    ensure!(after == before, "the DMA happened: {before} became {after}");
    vm.step("nothing happened; now with --trust-dma");
    ensure!(edu(vm, "edu-guess", &["--uio", "--trust-dma"])? == "trusted", "the function is not trusted");
    let after = memory(vm, GUESS.1)?;
    ensure!(after == source, "the DMA did not happen: {source} at {:#x}, {after} at {:#x}", GUESS.0, GUESS.1);
    Ok(())
}

/// Behind an IOMMU addresses are served: out to the device and back, with an interrupt.
pub(super) fn edu_on_vfio(vm: &mut Vm) -> Result<()> {
    ensure!(edu(vm, "edu-dma", &["--vfio"])? == "iommu", "no IOMMU");
    Ok(())
}

/// A DMA beside the driver's memory faults in the IOMMU and changes nothing.
pub(super) fn a_stray_on_vfio(vm: &mut Vm) -> Result<()> {
    ensure!(edu(vm, "edu-stray", &["--vfio"])? == "iommu", "no IOMMU");
    let faulted = || Ok(vm.kernel_log.lines()?.iter().any(|line| line.contains("DMAR") && line.contains("00:05.0")));
    vm.wait_until("the fault in the kernel's log", SHORT, faulted)
}

/// edu, whose driver programs it itself: addresses only where an IOMMU is, or on the operator's word.
pub(super) fn edu_on_uio(vm: &mut Vm) -> Result<()> {
    let address = device(&EDU0.function()?);
    let line = ["run", "/drivers/test/edu-dma.wasm", "--device", &address, "--uio"];
    cofferdam(vm, &line)?.refusal()?.saying("--trust-dma")?;
    Ok(())
}
