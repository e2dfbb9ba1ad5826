//! Drivers that ask for what is outside every bound, on a real disk. What each does is in `tests/guests/hostile/behaviours.txt`; that all of them are refused over vhost-user is
//! shown in `tests/process`. Here a device stands behind them that reads and writes memory by itself.

use crate::disk::{self, NBD, NBD_PORT, hugepage_files};
use crate::host::{Host, MODEST, cofferdam, device, is_clean, kernel_serves};
use crate::pci::{DISK0, Function};
use crate::program::Output;
use crate::vm::{SHORT, Vm};
use anyhow::{Result, ensure};
use std::path::Path;

/// Drivers whose load fails, each with what the message must say.
const LOAD_FAILS: &[(&str, &str)] = &[("queue-size-huge", "32768 entries")];

/// The rest of them.
const MORE_LOAD_FAILS: &[(&str, &str)] = &[
    ("read-config-huge", "1073741824 bytes at offset 0"),
    ("queue-out-of-range", "queue 60000 does not exist"),
    ("queue-size-odd", "100 entries"),
    ("too-many-queues", "1000 queues"),
    ("repeated-queue", "queue 0 is named twice"),
    ("no-queues", "0 queues"),
    ("unoffered-features", "not on offer"),
    ("never-negotiates", "without negotiating"),
    ("huge-state", "1048576 bytes of state"),
    ("huge-ordinary-response", "ordinary response"),
    ("zero-transfer", "max-transfer-bytes 0"),
    ("window-misaligned", "not a multiple of 8"),
];

/// Drivers that serve until something is read, each with what the reason of their end must say.
const TRAFFIC_FAILS: &[(&str, &str)] =
    &[("payload-out-of-range", "outside the payload"), ("long-status", "status bytes")];

/// The rest of them.
const MORE_TRAFFIC_FAILS: &[(&str, &str)] = &[
    ("wrong-queue", "queue 4321"),
    ("payload-overflow", "outside the payload"),
    ("payload-direction", "wrong direction"),
    ("payload-overlap", "overlap"),
    ("payload-short", "not covered"),
    ("empty-segment", "length 0"),
    ("too-many-segments", "402 words"),
    ("long-header", "1027 words"),
    ("status-first", "an out segment after an in segment"),
    ("huge-list", "(layout)"),
    ("wrong-token", "was not given"),
    ("wrong-answer-token", "was not given"),
    ("window-outside", "beyond the driver's memory"),
    ("window-half-outside", "beyond the driver's memory"),
    ("answer-outside", "(layout)"),
    ("answer-half-outside", "(layout)"),
];

/// Loads a hostile driver.
fn load(vm: &Vm, disk: &Function, name: &str) -> Result<Output> {
    let (path, address, via) = (format!("/drivers/test/{name}.wasm"), device(disk), format!("--{}", vm.topology));
    let line = ["load", &path, "--device", &address, &via, "--name", name, "--port", NBD_PORT, "--restarts", "never"];
    cofferdam(vm, &[&line[..], MODEST, &["--json"]].concat())
}

/// The kernel's driver has the disk again, and nothing is left of a binding.
fn is_back(vm: &Vm, disk: &Function, name: &str) -> Result<()> {
    vm.wait_until(&format!("{name} has left"), SHORT, || {
        let bindings = cofferdam(vm, &["ls", "--json"])?.success()?.json()?;
        Ok(bindings.as_array().is_some_and(Vec::is_empty) && disk.driver().as_deref() == Some("virtio-pci"))
    })?;
    ensure!(!Path::new(NBD).exists(), "{name}: its socket is left");
    ensure!(hugepage_files(disk).is_empty(), "{name}: {:?}", hugepage_files(disk));
    Ok(())
}

fn refused(vm: &Vm, loads: &[(&str, &str)], traffic: &[(&str, &str)]) -> Result<()> {
    let disk = DISK0.function()?;
    // Something to be read, and to be changed by who should not.
    kernel_serves(vm, &disk)?;
    let fill = "--rw=write --bs=64k --size=2m --verify=crc32c --do_verify=0 --end_fsync=1";
    disk::fio_in_kernel(vm, &disk, fill)?.success()?;
    let before = disk::sum(vm, &disk)?;
    // A host that was killed by another scenario leaves its socket.
    let _ = std::fs::remove_file(NBD);
    vm.step("filled and summed up");
    let mut host = Host::start(vm)?;
    for (name, reason) in loads {
        load(vm, &disk, name)?.refusal()?.saying("the driver")?.saying(reason)?;
        is_back(vm, &disk, name)?;
        vm.step(name);
    }
    for (name, reason) in traffic {
        let loaded = load(vm, &disk, name)?.success()?.json()?;
        ensure!(loaded["state"] == "serving", "{name}: {loaded}");
        disk::fio(vm, "--rw=read --bs=4k --size=512k")?.refusal()?;
        is_back(vm, &disk, name)?;
        let log = host.process.stderr();
        let line = |parts: &[&str]| log.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        let binding = format!("binding=\"{name}\"");
        ensure!(line(&[&binding, "binding failed", reason]), "{name} did not end for {reason:?}: {log}");
        ensure!(line(&[&binding, "outcome=Failed", "clean=true leaked_bytes=0"]), "{name} left something: {log}");
        vm.step(name);
    }
    ensure!(host.process.is_alive()?, "the host has ended");
    // The device has had them all, and serves the good driver of the same host.
    kernel_serves(vm, &disk)?;
    let after = disk::sum(vm, &disk)?;
    ensure!(before == after, "the disk's content has changed");
    vm.step("the disk is as it was");
    host.load_disk(vm, &disk, &format!("--{}", vm.topology), NBD_PORT, &[])?;
    disk::works(vm)?;
    let certificate = host.unload(vm, "disk")?;
    is_clean(&certificate)?;
    kernel_serves(vm, &disk)?;
    host.end()
}

/// A few of each kind.
pub(super) fn some(vm: &mut Vm) -> Result<()> {
    refused(vm, LOAD_FAILS, TRAFFIC_FAILS)
}

/// The others.
pub(super) fn others(vm: &mut Vm) -> Result<()> {
    refused(vm, MORE_LOAD_FAILS, MORE_TRAFFIC_FAILS)
}
