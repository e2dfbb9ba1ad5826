//! Two functions in one host: what one binding has is not taken for what another has left.

use crate::disk::{self, NBD_PORT};
use crate::host::{BLOCK_DRIVER, Host, MODEST, cofferdam, device, kernel_serves};
use crate::pci::{DISK0, DISK1};
use crate::vm::{SHORT, Vm};
use anyhow::{Result, ensure};

/// One is unloaded while the other is written to, and leaves nothing; the other has noticed nothing.
pub(super) fn one_goes(vm: &mut Vm) -> Result<()> {
    let (stays, goes) = (DISK0.function()?, DISK1.function()?);
    let via = format!("--{}", vm.topology);
    let host = Host::start(vm)?;
    host.load_disk(vm, &stays, &via, NBD_PORT, &[])?;
    let address = device(&goes);
    let line = ["load", BLOCK_DRIVER, "--device", &address, &via, "--name", "other"];
    cofferdam(vm, &[&line[..], MODEST].concat())?.success()?;
    let mut fio = disk::under_load(vm, "disk")?;
    vm.step("two disks, one of them written to");
    host.unload(vm, "other")?;
    kernel_serves(vm, &goes)?;
    ensure!(fio.is_alive()?, "what was written to the other disk has ended: {}", fio.stderr());
    // Its end is not waited for: it is in the middle of its 600 s.
    drop(fio);
    disk::works(vm)?;
    vm.step("one has left");
    vm.wait_until("fio's connection has ended", SHORT, || {
        let bindings = cofferdam(vm, &["ls", "--json"])?.success()?.json()?;
        Ok(bindings[0]["handles"].as_array().is_some_and(Vec::is_empty))
    })?;
    host.unload(vm, "disk")?;
    kernel_serves(vm, &stays)?;
    host.end()
}
