//! A file system of the kernel's, over the kernel's own NBD client, on a disk that a driver component drives.

use crate::disk::{NBD, NBD_PORT};
use crate::host::{Host, kernel_serves};
use crate::mount::Mount;
use crate::pci::DISK0;
use crate::vm::Vm;
use anyhow::{Context, Result, ensure};
use std::path::Path;

/// What is copied: programs and the components, some MiB in files of all sizes.
const TREES: [&str; 2] = ["/usr/sbin", "/drivers"];

/// The kernel's client; dropped, it lets go.
struct Client<'a> {
    vm: &'a Vm,
}

impl<'a> Client<'a> {
    const NODE: &'static str = "/dev/nbd0";

    fn new(vm: &'a Vm) -> Result<Self> {
        vm.run(["nbd-client", "-unix", NBD, Self::NODE])?.success()?;
        Ok(Client { vm })
    }

    fn end(self) -> Result<()> {
        self.vm.run(["nbd-client", "-d", Self::NODE])?.success()?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        let _ = self.vm.run(["nbd-client", "-d", Self::NODE]);
    }
}

/// Checksums of all files below, with their paths.
fn sums(vm: &Vm, root: &str, trees: &[&str]) -> Result<String> {
    let trees: Vec<_> = trees.iter().map(|tree| tree.trim_start_matches('/')).collect();
    let line = format!("cd {root} && find {} -type f | sort | xargs md5sum", trees.join(" "));
    let sums = vm.run(["sh", "-c", &line])?.success()?.stdout;
    ensure!(sums.lines().count() > 20, "{} files", sums.lines().count());
    Ok(sums)
}

fn mounted(vm: &Vm, via: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let before = sums(vm, "/", &TREES)?;
    let host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, NBD_PORT, &[])?;
    let client = Client::new(vm)?;
    vm.step("the kernel is a client");
    vm.run(["mkfs.ext4", "-q", "-F", Client::NODE])?.success()?;
    let mount = Mount::new(vm, Path::new(Client::NODE), "/mnt/nbd", "rw")?;
    vm.step("mounted; copy");
    vm.run(["mkdir", "-p", "/mnt/nbd/usr"])?.success()?;
    vm.run(["cp", "-a", TREES[0], "/mnt/nbd/usr/"])?.success()?;
    vm.run(["cp", "-a", TREES[1], "/mnt/nbd/"])?.success()?;
    mount.end()?;
    // Nothing of it is in the kernel's cache any more.
    vm.run(["blockdev", "--flushbufs", Client::NODE])?.success()?;
    let mount = Mount::new(vm, Path::new(Client::NODE), "/mnt/nbd", "ro")?;
    ensure!(sums(vm, "/mnt/nbd", &TREES)? == before, "other files over NBD");
    mount.end()?;
    client.end()?;
    vm.step("copied, read back and unmounted; unload");
    host.unload(vm, "disk")?;
    host.end()?;
    kernel_serves(vm, &disk)?;
    let node = disk.block_device().context("no block device")?;
    vm.run(["fsck.ext4".as_ref(), "-fn".as_ref(), node.as_os_str()])?.success()?;
    let mount = Mount::new(vm, &node, "/mnt/kernel", "ro")?;
    ensure!(sums(vm, "/mnt/kernel", &TREES)? == before, "other files with the kernel's driver");
    vm.step("the same files with the kernel's driver");
    mount.end()
}

/// INTx and huge pages.
pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    mounted(vm, "--uio")
}

/// MSI-X and an IOMMU.
pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    mounted(vm, "--vfio")
}
