//! Disks with clients at work: both queues carry their requests, and an unload in the middle of it leaves nothing.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::fio::{self, Load, VERIFY_REQUESTS};
use crate::host::{Host, cofferdam, is_clean, kernel_serves, nothing_is_claimed};
use crate::pci::{DISK0, Place};
use crate::vm::{SHORT, Vm};

/// Where the disk is served, as a port and as a path.
pub(super) const PORT: &str = "nbd:/tmp/disk.sock";
pub(super) const SOCKET: &str = "/tmp/disk.sock";

const QUEUES: u32 = 2;
const TWO: &[&str] = &["--queues", "2"];

/// How many requests the device itself has taken from each of its two queues: QEMU's word, not the host's.
pub(super) fn taken(vm: &mut Vm, place: &Place) -> Result<Vec<u64>> {
    let path = format!("/machine/peripheral/{}/virtio-backend", place.id);
    let mut all = Vec::new();
    for queue in 0..QUEUES {
        let status = vm.outside("x-query-virtio-queue-status", &json!({ "path": path, "queue": queue }))?;
        all.push(status["used-idx"].as_u64().with_context(|| format!("no used-idx: {status}"))?);
    }
    Ok(all)
}

/// Two clients, each on a lane and a queue of its own, and what they wrote comes back.
fn two_queues(vm: &mut Vm, via: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let host = Host::start(vm)?;
    let loaded = host.load_disk(vm, &disk, via, PORT, TWO)?;
    ensure!(loaded["lanes"] == QUEUES, "{loaded}");
    vm.step("loaded; verify");
    fio::verify(vm, SOCKET, QUEUES)?;
    let taken = taken(vm, &DISK0)?;
    vm.step(&format!("the device has taken {taken:?} requests"));
    // The counters of virtio 1.2, section 2.7.8, go round at 65536, which is far from here.
    ensure!(taken.iter().all(|taken| *taken >= VERIFY_REQUESTS), "each client made {VERIFY_REQUESTS}: {taken:?}");
    let mut load = Load::start(vm, SOCKET, QUEUES)?;
    host.until_loaded(vm, "disk", 2)?;
    let handles = host.handles(vm, "disk")?;
    load.goes_on()?;
    let busy = |lane: u32| handles.iter().any(|handle| handle["lane"] == lane && handle["requests"] != 0);
    ensure!((0..QUEUES).all(busy), "not on every lane: {handles:?}");
    let certificate = host.unload(vm, "disk")?;
    load.ends_with_an_error(SHORT)?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    kernel_serves(vm, &disk)?;
    host.end()
}

/// What lies behind the load's part of the disk, written by the kernel's driver: `read` gives its digest.
struct Beside {
    digest: String,
}

const BESIDE_MIB: u32 = 4;

impl Beside {
    fn write(vm: &Vm, disk: &Path, from_mib: u32) -> Result<Beside> {
        let (to, seek) = (format!("of={}", disk.display()), format!("seek={from_mib}"));
        let count = format!("count={BESIDE_MIB}");
        vm.run(["dd", "if=/dev/urandom", &to, "bs=1M", &count, &seek, "conv=fsync"])?.success()?;
        Ok(Beside { digest: Beside::read(vm, disk, from_mib)? })
    }

    /// What the medium holds, not what the kernel remembers.
    fn read(vm: &Vm, disk: &Path, from_mib: u32) -> Result<String> {
        let disk = disk.display().to_string();
        vm.run(["blockdev", "--flushbufs", &disk])?.success()?;
        let line = format!("dd if={disk} bs=1M count={BESIDE_MIB} skip={from_mib} | sha256sum");
        let digest = vm.run(["sh", "-c", &format!("set -o pipefail; {line}")])?.success()?;
        Ok(digest.stdout.trim().to_owned())
    }
}

/// Four clients on two queues, and an unload in the middle.
fn unloaded(vm: &mut Vm, via: &str) -> Result<()> {
    const JOBS: u32 = 4;
    const DEADLINE: Duration = Duration::from_secs(5);
    let disk = DISK0.function()?;
    kernel_serves(vm, &disk)?;
    let path = disk.block_device().context("no block device")?;
    let beside = Beside::write(vm, &path, fio::end_mib(JOBS))?;
    let host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, PORT, TWO)?;
    let mut load = Load::start(vm, SOCKET, JOBS)?;
    host.until_loaded(vm, "disk", 4)?;
    load.goes_on()?;
    vm.step("four clients at work; unload");
    // The exit code is 4 where the deadline has passed.
    let line = ["unload", "disk", "--json", "--deadline", &format!("{}ms", DEADLINE.as_millis())];
    let output = cofferdam(vm, &line)?.success()?;
    let certificate = output.json()?;
    vm.step(&format!("unloaded in {:.2} s", output.took.as_secs_f64()));
    // First, for it says whether a client had left before, and why.
    let told = load.ends_with_an_error(SHORT)?;
    vm.step("fio has ended");
    is_clean(&certificate)?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    ensure!(told.clients >= JOBS as usize, "{} of {JOBS} were told: {}; {certificate}", told.clients, told.said);
    ensure!(certificate["requests_failed"] == 0, "the device completed less than it had: {certificate}");
    nothing_is_claimed()?;
    kernel_serves(vm, &disk)?;
    let path = disk.block_device().context("no block device")?;
    let now = Beside::read(vm, &path, fio::end_mib(JOBS))?;
    ensure!(now == beside.digest, "what nobody wrote to is another: {} became {now}", beside.digest);
    vm.step("the kernel has the disk, and nothing beside the load has changed; load again");
    host.load_disk(vm, &disk, via, PORT, TWO)?;
    fio::verify(vm, SOCKET, 1)?;
    host.unload(vm, "disk")?;
    kernel_serves(vm, &disk)?;
    host.end()
}

pub(super) fn two_queues_on_uio(vm: &mut Vm) -> Result<()> {
    two_queues(vm, "--uio")
}

pub(super) fn two_queues_on_vfio(vm: &mut Vm) -> Result<()> {
    two_queues(vm, "--vfio")
}

pub(super) fn unloaded_on_uio(vm: &mut Vm) -> Result<()> {
    unloaded(vm, "--uio")
}

pub(super) fn unloaded_on_vfio(vm: &mut Vm) -> Result<()> {
    unloaded(vm, "--vfio")
}
