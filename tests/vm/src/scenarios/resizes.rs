//! A disk that is resized while its driver serves it: by the vector of configuration changes, or by bit 1 of the ISR status.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
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

/// The size in MiB that a new connection is told (NBD, fixed newstyle, `NBD_OPT_EXPORT_NAME`).
fn told() -> Result<u64> {
    let mut stream = UnixStream::connect("/tmp/disk.sock")?;
    stream.set_read_timeout(Some(SHORT))?;
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "{greeting:?}");
    // The client's flags, the option without a name, and its length of 0.
    stream.write_all(&[&[0, 0, 0, 1], &b"IHAVEOPT"[..], &[0, 0, 0, 1], &[0; 4]].concat())?;
    let mut size = [0; 8];
    stream.read_exact(&mut size)?;
    Ok(u64::from_be_bytes(size) / MIB)
}

/// Writes 1 MiB at `mib` through a new connection, and reads it.
fn verify(vm: &Vm, mib: u64) -> Result<()> {
    let at = format!("--offset={mib}m");
    let fio = "fio --name=verify --ioengine=nbd --uri=nbd+unix:///?socket=/tmp/disk.sock --rw=write --bs=64k --size=1m --verify=crc32c --do_verify=1";
    let line: Vec<&str> = fio.split(' ').chain([at.as_str()]).collect();
    vm.run_within(Duration::from_secs(60), line)?.success()?;
    Ok(())
}

fn resized(vm: &mut Vm, via: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, "nbd:/tmp/disk.sock", &[])?;
    ensure!(told()? == 64, "the disk has 64 MiB");
    vm.step("grow");
    resize(vm, 96)?;
    ensure!(told()? == 96, "a new connection is told another size");
    verify(vm, 80)?;
    vm.step("shrink");
    resize(vm, 64)?;
    ensure!(told()? == 64, "a new connection is told the old size");
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
