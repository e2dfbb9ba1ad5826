//! Disks that go away while clients are at work on them: asked for (QMP `device_del`), and pulled out with nobody told (slot power off).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::load::{PORT, SOCKET};
use crate::fio::{self, Load};
use crate::host::{Host, cofferdam, is_clean, kernel_serves, nothing_is_claimed};
use crate::pci::{DISK0, Function, rescan};
use crate::program::Running;
use crate::vm::{SHORT, Vm};

const JOBS: u32 = 2;

/// Hugepages that nobody has; nothing where there are none.
fn free_hugepages() -> Option<String> {
    std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").ok()
}

fn now_micros() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros())?)
}

/// A host with a disk that clients are at work on.
struct Scene {
    host: Host,
    load: Load,
    disk: Function,
    hugepages: Option<String>,
}

impl Scene {
    fn set(vm: &Vm, via: &str) -> Result<Scene> {
        let disk = DISK0.function()?;
        let hugepages = free_hugepages();
        let host = Host::start(vm)?;
        host.load_disk(vm, &disk, via, PORT, &["--queues", "2"])?;
        let mut load = Load::start(vm, SOCKET, JOBS)?;
        host.until_loaded(vm, "disk", JOBS as usize)?;
        load.goes_on()?;
        Ok(Scene { host, load, disk, hugepages })
    }

    /// The device went at `since`: the binding leaves for that reason and by itself, whatever was waiting for it ends, and nothing of it is left in the host.
    fn end(self, vm: &Vm, since: u64) -> Result<(Host, Function, Value)> {
        let Scene { mut host, load, disk, hugepages } = self;
        let told = load.ends_with_an_error(SHORT)?;
        vm.step("fio has ended");
        let certificate = host.leaves_by_itself(vm, "disk")?;
        ensure!(certificate["outcome"] == "removed", "{certificate}");
        ensure!(told.clients >= JOBS as usize, "{} of {JOBS} were told: {}", told.clients, told.said);
        let (noticed, cause) = host.came_to(vm, "disk", "closing")?;
        ensure!(cause == "removed", "it left for {cause}");
        let (detached, _) = host.came_to(vm, "disk", "detached")?;
        let millis = |from: u64, to: u64| to.saturating_sub(from) / 1000;
        let (noticing, leaving) = (millis(since, noticed), millis(noticed, detached));
        vm.step(&format!("noticed after {noticing} ms, left within {leaving} ms: {}", certificate["stages"]));
        let bindings = cofferdam(vm, &["ls", "--json"])?.success()?.json()?;
        ensure!(bindings.as_array().context("no list")?.is_empty(), "still listed: {bindings}");
        ensure!(host.process.is_alive()?, "the daemon has ended");
        ensure!(free_hugepages() == hugepages, "free hugepages: {hugepages:?} became {:?}", free_hugepages());
        Ok((host, disk, certificate))
    }
}

/// The disk is there again and is as any other.
fn serves_again(vm: &Vm, host: Host, via: &str) -> Result<()> {
    let disk = DISK0.function()?;
    kernel_serves(vm, &disk)?;
    vm.step("the kernel has it again; load");
    host.load_disk(vm, &disk, via, PORT, &["--queues", "2"])?;
    fio::verify(vm, SOCKET, 1)?;
    let certificate = host.unload(vm, "disk")?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    kernel_serves(vm, &disk)?;
    nothing_is_claimed()?;
    host.end()
}

/// The kernel asks before it lets a device go, and gets it.
fn unplugged(vm: &mut Vm, via: &str) -> Result<()> {
    let scene = Scene::set(vm, via)?;
    vm.step("clients at work; device_del");
    let since = now_micros()?;
    vm.unplug(&DISK0)?;
    vm.step("the kernel let go of it");
    let (host, _, certificate) = scene.end(vm, since)?;
    is_clean(&certificate)?;
    nothing_is_claimed()?;
    vm.plug(&DISK0)?;
    serves_again(vm, host, via)
}

/// How long the kernel may take to forget a function: it gives a reset of one that is gone 65 seconds, and more in emulation.
const FORGOTTEN: Duration = Duration::from_secs(180);

/// Nobody is asked, and nobody is told. Power comes back when the kernel has forgotten the function: while it closes one through vfio it keeps everybody from the port's registers too.
fn powered_off(vm: &mut Vm, via: &str) -> Result<()> {
    let slot = DISK0.slot()?;
    let scene = Scene::set(vm, via)?;
    vm.step("clients at work; power off");
    let since = now_micros()?;
    slot.power(false)?;
    let forgotten = is_pulled_out(vm, scene, since).and_then(|(host, mut removal)| {
        vm.wait_until("the removal", FORGOTTEN, || Ok(!removal.is_alive()?))?;
        ensure!(!DISK0.is_present(), "the kernel does not forget it");
        Ok(host)
    });
    // Whatever came of it: the next scenario wants the disk.
    slot.power(true)?;
    let host = forgotten?;
    vm.step("the kernel has forgotten it");
    vm.wait_until("neither claim nor record", SHORT, || Ok(nothing_is_claimed().is_ok()))?;
    rescan()?;
    vm.wait_until("it is there again", SHORT, || Ok(DISK0.is_present()))?;
    serves_again(vm, host, via)
}

/// The binding is over, and the kernel is being told that the function is gone, which lasts where it is still closing it.
fn is_pulled_out(vm: &Vm, scene: Scene, since: u64) -> Result<(Host, Running)> {
    let (host, disk, mut certificate) = scene.end(vm, since)?;
    ensure!(DISK0.is_present(), "the kernel was told");
    if vm.topology == "vfio" {
        // The kernel resets the function as it closes it, and waits for an answer. What it has not closed is said, and is no memory.
        let left = &certificate["residual"]["fds"];
        vm.step(&format!("the kernel still holds {left} descriptors"));
        certificate["residual"]["fds"] = 0.into();
    } else {
        nothing_is_claimed()?;
    }
    is_clean(&certificate)?;
    vm.step(&format!("now with {:?}; remove", disk.driver()));
    let line = format!("echo 1 > {}/remove", disk.folder().display());
    Ok((host, vm.spawn("remove", ["sh", "-c", &line])?))
}

pub(super) fn unplugged_on_uio(vm: &mut Vm) -> Result<()> {
    unplugged(vm, "--uio")
}

pub(super) fn unplugged_on_vfio(vm: &mut Vm) -> Result<()> {
    unplugged(vm, "--vfio")
}

pub(super) fn powered_off_on_uio(vm: &mut Vm) -> Result<()> {
    powered_off(vm, "--uio")
}

pub(super) fn powered_off_on_vfio(vm: &mut Vm) -> Result<()> {
    powered_off(vm, "--vfio")
}
