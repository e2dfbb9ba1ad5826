//! The block driver on PCI functions: loaded, used, unloaded, and the disk back with the kernel.

use crate::pci::{DISK0, EDU0, Function, LEGACY0};
use crate::vm::{SHORT, Vm};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// A load compiles the driver, the first time.
const LOAD: Duration = Duration::from_secs(60);
const SOCKET: &str = "/tmp/cofferdam.sock";
const PORT: &str = "nbd:/tmp/disk.sock";

fn cofferdam(vm: &Vm, line: &[&str]) -> Result<crate::program::Output> {
    vm.run_within(LOAD, [&["env", "COFFERDAM_SOCKET=/tmp/cofferdam.sock", "cofferdam"], line].concat())
}

/// Loads the driver, writes through NBD and checks what was written, unloads, and has the kernel read it.
fn drive(vm: &mut Vm, via: &str, confinement: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let address = format!("pci:{}", disk.address());
    let daemon = vm.spawn("daemon", ["cofferdam", "daemon", "--socket", SOCKET])?;
    vm.wait_until("the daemon", SHORT, || Ok(std::path::Path::new(SOCKET).exists()))?;
    vm.step("load");
    let line = [
        "load",
        "/drivers/virtio-blk.wasm",
        "--device",
        &address,
        via,
        "--name",
        "disk",
        "--port",
        PORT,
        "--arena-mib",
        "8",
    ];
    let loaded = cofferdam(vm, &[&line[..], &["--json"]].concat())?.success()?.json()?;
    ensure!(loaded["dma"] == confinement, "confinement: {}", loaded["dma"]);
    ensure!(disk.block_device().is_none(), "the kernel still serves the disk");
    vm.step("served");
    let fio = "fio --name=verify --ioengine=nbd --uri=nbd+unix:///?socket=/tmp/disk.sock --rw=randwrite --bs=4k --size=2m --iodepth=16 --verify=crc32c --do_verify=1";
    vm.run_within(Duration::from_secs(120), fio.split(' ').collect::<Vec<_>>())?.success()?;
    vm.step("verified; unload");
    let certificate = cofferdam(vm, &["unload", "disk", "--json"])?.success()?.json()?;
    let residual = certificate["residual"].as_object().context("no residual")?;
    ensure!(residual.values().all(|left| left == 0), "{certificate}");
    ensure!(certificate["leaked"]["bytes"] == 0, "{certificate}");
    ensure!(certificate["outcome"] == "unloaded" || certificate["outcome"] == "detached", "{certificate}");
    back(vm, &disk)?;
    daemon.terminate(SHORT)?.success()?;
    Ok(())
}

fn back(vm: &Vm, disk: &Function) -> Result<()> {
    vm.wait_until("the kernel serves the disk again", SHORT, || {
        Ok(disk.block_device().is_some_and(|path| path.exists()))
    })?;
    let path = disk.block_device().context("no block device")?;
    vm.run([
        "dd".as_ref(),
        format!("if={}", path.display()).as_ref(),
        "of=/dev/null".as_ref(),
        "bs=64k".as_ref(),
        "count=32".as_ref(),
    ] as [&std::ffi::OsStr; 5])?
        .success()?;
    Ok(())
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
    let address = format!("pci:{}", disk.address());
    let line = ["run", "/drivers/virtio-blk.wasm", "--device", &address, "--uio"];
    cofferdam(vm, &line)?.refusal()?.saying("disable-legacy=on")?;
    ensure!(disk.driver() == driver, "it is with {:?}", disk.driver());
    Ok(())
}

/// edu, whose driver programs it itself: addresses only where an IOMMU is, or on the operator's word.
pub(super) fn edu_on_uio(vm: &mut Vm) -> Result<()> {
    let address = format!("pci:{}", EDU0.function()?.address());
    let line = ["run", "/drivers/test/edu-dma.wasm", "--device", &address, "--uio"];
    cofferdam(vm, &line)?.refusal()?.saying("--trust-dma")?;
    Ok(())
}
