//! A disk that is unplugged while clients are at work on it, and plugged in again at its place: with `--reconnect` they wait, and go on.

use anyhow::{Context, Result, ensure};

use super::load::{PORT, SOCKET};
use crate::fio::Load;
use crate::host::{Host, cofferdam, kernel_serves, nothing_is_claimed};
use crate::pci::DISK0;
use crate::vm::{SHORT, Vm};

const JOBS: u32 = 2;
/// Requests of each client that show that it goes on.
const MORE: u64 = 100;

/// Least number of requests that any client has made.
fn requests(host: &Host, vm: &Vm) -> Result<u64> {
    let handles = host.handles(vm, "disk")?;
    ensure!(handles.len() >= JOBS as usize, "a client has left: {handles:?}");
    // One that looked and left again has made none.
    let made = handles.iter().filter_map(|handle| handle["requests"].as_u64()).filter(|made| *made > 0);
    Ok(made.min().unwrap_or(0))
}

fn phase(vm: &Vm) -> Result<String> {
    let why = cofferdam(vm, &["why", "disk", "--json"])?.success()?.json()?;
    Ok(format!("{} {}", why["phase"].as_str().unwrap_or_default(), why["waits_for"]))
}

fn comes_back(vm: &mut Vm, via: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, PORT, &["--queues", "2", "--reconnect=2m"])?;
    let mut load = Load::start(vm, SOCKET, JOBS)?;
    host.until_loaded(vm, "disk", JOBS as usize)?;
    vm.step("clients at work; device_del");
    vm.unplug(&DISK0)?;
    vm.wait_until("it is waited for", SHORT, || {
        let phase = phase(vm)?;
        Ok(phase.starts_with("recovering") && phase.contains("to come back"))
    })?;
    load.goes_on()?;
    let before = requests(&host, vm)?;
    vm.step("the clients wait; device_add");
    vm.plug(&DISK0)?;
    vm.wait_until("it serves", SHORT, || Ok(phase(vm)?.starts_with("serving")))?;
    vm.step("it serves again");
    vm.wait_until("the clients go on", SHORT, || Ok(requests(&host, vm)? > before + MORE))?;
    load.goes_on()?;
    let events = cofferdam(vm, &["events"])?.success()?.stdout;
    let back = events.lines().find(|line| line.contains("device back after"));
    vm.step(back.context("nothing says that it came back")?);
    let certificate = host.unload(vm, "disk")?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    // The unload's, and the first: a client that was shown wrong data says so.
    load.ends_with_an_error(SHORT)?;
    kernel_serves(vm, &disk)?;
    nothing_is_claimed()?;
    host.end()
}

/// Physical memory in huge pages, INTx.
pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    comes_back(vm, "--uio")
}

/// An IOMMU domain, MSI-X.
pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    comes_back(vm, "--vfio")
}
