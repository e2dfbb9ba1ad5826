//! The test-bed itself: what every other scenario relies on.

use crate::pci::{DISK0, DISK1, EDU0, Function, places};
use crate::vm::{SHORT, Vm};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{Read, Write};
use std::path::Path;

/// Writes a word to the disk through the kernel's driver and reads it back.
fn works(vm: &Vm, disk: &Function, word: &[u8; 512]) -> Result<()> {
    // The node is there before the disk behind it can be opened.
    let is_there = || Ok(disk.block_device().is_some_and(|path| fs::File::open(path).is_ok()));
    vm.wait_until("the kernel serves the disk", SHORT, is_there)?;
    let path = disk.block_device().context("no block device")?;
    let mut file = fs::OpenOptions::new().write(true).open(&path)?;
    file.write_all(word)?;
    file.sync_all()?;
    vm.run(["blockdev".as_ref(), "--flushbufs".as_ref(), path.as_os_str()])?.success()?;
    let mut read = [0; 512];
    fs::File::open(&path)?.read_exact(&mut read)?;
    ensure!(read == *word, "{} holds something else than was written", path.display());
    Ok(())
}

/// Every device of the topology is where the tables say, with its ids, and the kernel's driver serves the disks.
pub(super) fn boots(vm: &mut Vm) -> Result<()> {
    for place in places(&vm.topology) {
        let function = place.function()?;
        let ids = function.ids()?;
        vm.step(&format!("{} is {} {ids}, group {:?}", place.id, function.address(), function.iommu_group()));
        let expected: &[&str] = match place.id {
            "edu0" => &["1234:11e8"],
            "rng0" => &["1af4:1005", "1af4:1044"],
            "net0" | "net1" => &["1af4:1041"],
            "rng1" => &["1af4:1044"],
            "console0" | "console1" => &["1af4:1043"],
            "legacy0" => &["1af4:1001"],
            "bypass0" => &["1af4:1042", "1af4:1001"],
            _ => &["1af4:1042"],
        };
        ensure!(expected.contains(&ids.as_str()), "{} is {ids}", place.id);
        ensure!(function.driver().as_deref() == place.native, "{} is with {:?}", place.id, function.driver());
        ensure!(function.iommu_group().is_some() == (vm.topology == "vfio"), "groups are only where an IOMMU is");
    }
    works(vm, &DISK0.function()?, &[0x5a; 512])?;
    works(vm, &DISK1.function()?, &[0xa5; 512])?;
    if vm.topology == "uio" {
        let pages = fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")?;
        ensure!(pages.trim() == "96", "{} free hugepages", pages.trim());
        ensure!(fs::read_to_string("/proc/mounts")?.contains(" /dev/hugepages hugetlbfs "), "no hugetlbfs");
    }
    for program in [
        "fio --version",
        "nbd-client --version",
        "mkfs.ext4 -V",
        "fsck.ext4 -V",
        "iperf3 --version",
        "ip -Version",
        "ping -V",
    ] {
        let line: Vec<_> = program.split(' ').collect();
        let took = vm.run(&line)?.success()?.took;
        vm.step(&format!("{program}: {:.2} s", took.as_secs_f64()));
    }
    Ok(())
}

/// `uio_pci_generic` takes a disk away from the kernel, and gives it back.
pub(super) fn uio_takes_a_disk(vm: &mut Vm) -> Result<()> {
    let disk = DISK0.function()?;
    works(vm, &disk, &[1; 512])?;
    vm.step("to uio_pci_generic");
    disk.give_to(Some("uio_pci_generic"))?;
    let uio = disk.folder().join("uio").read_dir()?.next().context("no uio device")??;
    vm.wait_until("the node of the uio device", SHORT, || Ok(Path::new("/dev").join(uio.file_name()).exists()))?;
    ensure!(disk.block_device().is_none(), "the kernel still serves the disk");
    vm.step("and back");
    disk.give_to(None)?;
    works(vm, &disk, &[2; 512])?;
    vm.step("edu too, which has an interrupt of its own");
    let edu = EDU0.function()?;
    edu.give_to(Some("uio_pci_generic"))?;
    edu.give_to(None)
}

/// `vfio-pci` takes a disk away from the kernel, and gives it back.
pub(super) fn vfio_takes_a_disk(vm: &mut Vm) -> Result<()> {
    let disk = DISK0.function()?;
    works(vm, &disk, &[3; 512])?;
    vm.step("to vfio-pci");
    disk.give_to(Some("vfio-pci"))?;
    let group = disk.iommu_group().context("no group")?;
    vm.wait_until("the node of the group", SHORT, || Ok(Path::new("/dev/vfio").join(&group).exists()))?;
    ensure!(Path::new("/dev/vfio/vfio").exists(), "no container");
    ensure!(disk.block_device().is_none(), "the kernel still serves the disk");
    vm.step("and back");
    disk.give_to(None)?;
    works(vm, &disk, &[4; 512])
}

/// A disk that the kernel drives is pulled out and plugged in again.
pub(super) fn unplugs(vm: &mut Vm) -> Result<()> {
    works(vm, &DISK1.function()?, &[5; 512])?;
    vm.step("device_del");
    vm.unplug(&DISK1)?;
    vm.step("gone; device_add");
    vm.plug(&DISK1)?;
    vm.step("there again");
    works(vm, &DISK1.function()?, &[6; 512])?;
    vm.step("reads what is written");
    ensure!(vm.unplug(&EDU0).is_err(), "a device that is not on a port was unplugged");
    Ok(())
}

/// The second time, no code is compiled.
pub(super) fn inspects(vm: &mut Vm) -> Result<()> {
    for time in ["first", "second"] {
        let output = vm.run(["cofferdam", "inspect", "/drivers/virtio-blk.wasm"])?.success()?;
        vm.step(&format!("cofferdam inspect, {time} time: {:.2} s", output.took.as_secs_f64()));
    }
    Ok(())
}
