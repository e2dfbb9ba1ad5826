//! A disk that is resized while its driver serves it: by the vector of configuration changes, or by bit 1 of the ISR status.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;

use crate::host::{Host, cofferdam, kernel_serves};
use crate::pci::DISK0;
use crate::vm::{SHORT, Vm};

const MIB: u64 = 1 << 20;

/// Has the disk resized and waits until the driver serves that size.
fn resize(vm: &mut Vm, mib: u64) -> Result<()> {
    vm.outside("block_resize", &json!({ "node-name": DISK0.id, "size": mib * MIB }))?;
    let served =
        || Ok(cofferdam(vm, &["inspect", "disk", "--json"])?.success()?.json()?["capacity_bytes"] == mib * MIB);
    vm.wait_until("the driver serves the new size", SHORT, served)
}

/// Writes 1 MiB at `mib` through a new connection, and reads it; whether that could be done.
fn reaches(vm: &Vm, mib: u64) -> Result<bool> {
    let at = format!("--offset={mib}m");
    let fio = "fio --name=verify --ioengine=nbd --uri=nbd+unix:///?socket=/tmp/disk.sock --rw=write --bs=64k --size=1m --verify=crc32c --do_verify=1";
    let line: Vec<&str> = fio.split(' ').chain([at.as_str()]).collect();
    Ok(vm.run_within(Duration::from_secs(60), line)?.success().is_ok())
}

fn resized(vm: &mut Vm, via: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, "nbd:/tmp/disk.sock", &[])?;
    ensure!(!reaches(vm, 80)?, "80 MiB are reached on a disk of 64 MiB");
    vm.step("grow");
    resize(vm, 96)?;
    ensure!(reaches(vm, 80)?, "80 MiB are not reached on a disk of 96 MiB");
    vm.step("shrink");
    resize(vm, 64)?;
    ensure!(!reaches(vm, 80)?, "80 MiB are reached on a disk that was shrunk to 64 MiB");
    host.unload(vm, "disk")?;
    kernel_serves(vm, &disk)?;
    host.end()
}

/// INTx.
pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    resized(vm, "--uio")
}

/// MSI-X.
pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    resized(vm, "--vfio")
}
