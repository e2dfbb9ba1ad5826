//! A virtio device behind vfio that does not offer `VIRTIO_F_ACCESS_PLATFORM`: its addresses are physical whatever the IOMMU says, so the IOMMU confines nothing.

use crate::disk::{self, NBD_PORT, free_hugepages, hugepage_files, is_kept};
use crate::host::{BLOCK_DRIVER, Host, MODEST, cofferdam, device, kernel_serves};
use crate::pci::{BYPASS0, DISK0};
use crate::vm::Vm;
use anyhow::{Result, ensure};

/// It gets D1: only the host tells it addresses, of huge pages. The same driver on the disk beside it gets D2.
pub(super) fn confined_by_the_host(vm: &mut Vm) -> Result<()> {
    let disk = BYPASS0.function()?;
    disk::forget(vm, &disk)?;
    ensure!(disk.iommu_group().is_some(), "it is in no IOMMU group, so there is nothing to go round");
    let free = free_hugepages()?;
    let host = Host::start(vm)?;
    let loaded = host.load_disk(vm, &disk, "--vfio", NBD_PORT, &[])?;
    ensure!(loaded["dma"] == "host", "confinement: {}", loaded["dma"]);
    let listed = cofferdam(vm, &["ls", "--json"])?.success()?.json()?;
    ensure!(listed[0]["dma"] == "host", "{listed}");
    ensure!(disk.driver().as_deref() == Some("vfio-pci"), "it is with {:?}", disk.driver());
    let bytes: u64 = hugepage_files(&disk).iter().map(|(_, bytes)| bytes).sum();
    ensure!(bytes > 0 && free_hugepages()? + (bytes >> 21) == free, "{bytes} bytes in huge pages");
    vm.step(&format!("loaded, with {bytes} bytes in huge pages"));
    disk::works(vm)?;
    disk::keep(vm)?;
    vm.step("verified");

    // The same component at the same time, where the device does offer it: no huge page more.
    let (beside, pages) = (DISK0.function()?, free_hugepages()?);
    let address = device(&beside);
    let line = ["load", BLOCK_DRIVER, "--device", &address, "--vfio", "--name", "beside", "--json"];
    let loaded = cofferdam(vm, &[&line[..], MODEST].concat())?.success()?.json()?;
    ensure!(loaded["dma"] == "iommu", "confinement: {}", loaded["dma"]);
    ensure!(free_hugepages()? == pages && hugepage_files(&beside).is_empty(), "huge pages behind an IOMMU");
    host.unload(vm, "beside")?;

    host.unload(vm, "disk")?;
    host.end()?;
    kernel_serves(vm, &disk)?;
    is_kept(vm, &disk)?;
    ensure!(free_hugepages()? == free && hugepage_files(&disk).is_empty(), "huge pages are left");
    Ok(())
}
