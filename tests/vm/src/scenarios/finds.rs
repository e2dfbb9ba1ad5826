//! Loads that name no driver: found by the device's id, among the drivers of the machine.

use crate::host::{Host, cofferdam, device, kernel_serves};
use crate::pci::{DISK0, EDU0};
use crate::vm::Vm;
use anyhow::{Result, ensure};

/// A disk gets the block driver. A function that several drivers list, or none, is refused before anything is done to it.
pub(super) fn by_id(vm: &mut Vm) -> Result<()> {
    let (disk, edu) = (DISK0.function()?, EDU0.function()?);
    let host = Host::start(vm)?;
    let load = |function: &str, drivers: &str| {
        cofferdam(vm, &["load", "--device", function, "--drivers", drivers, "--name", "found", "--uio", "--json"])
    };
    let had = edu.driver();
    let address = device(&edu);
    load(&address, "/drivers")?.refusal()?.saying("pci:1234:11e8")?.saying("virtio-blk.wasm (virtio:2)")?;
    load(&address, "/drivers/test")?.refusal()?.saying("edu.wasm")?.saying("edu-dma.wasm")?;
    ensure!(edu.driver() == had, "it was taken from {had:?}, and {:?} has it", edu.driver());

    let found = load(&device(&disk), "/drivers")?.success()?.json()?;
    ensure!(found["driver"] == "virtio-blk.wasm", "{found}");
    ensure!(disk.block_device().is_none(), "the kernel still serves the disk");
    host.unload(vm, "found")?;
    kernel_serves(vm, &disk)?;
    host.end()
}
