//! What is on a disk, and who moves it: fio, over NBD or through the kernel's driver.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::host::cofferdam;
use crate::pci::Function;
use crate::program::{Output, Running};
use crate::vm::{SHORT, Vm};

/// Where a host of a scenario serves its disk by NBD.
pub const NBD: &str = "/tmp/disk.sock";

/// The same, as a port of `load`.
pub const NBD_PORT: &str = "nbd:/tmp/disk.sock";

/// How long fio may take over a few MiB.
const FIO_LIMIT: Duration = Duration::from_secs(120);

/// The piece that [`keep`] writes: 4 MiB from the beginning on, in blocks that know where they belong and hold a checksum.
const KEPT: &str = "--bs=64k --size=4m --verify=crc32c";

fn over_nbd(name: &str, options: &str) -> Vec<String> {
    let words = format!("fio --name={name} --thread --ioengine=nbd --uri=nbd+unix:///?socket={NBD} {options}");
    words.split_whitespace().map(str::to_owned).collect()
}

/// Runs fio over NBD.
///
/// # Errors
/// When it does not end.
pub fn fio(vm: &Vm, options: &str) -> Result<Output> {
    vm.run_within(FIO_LIMIT, over_nbd("nbd", options))
}

/// Runs fio on what the kernel's driver serves.
///
/// # Errors
/// When it does not end, or the kernel does not serve the disk.
pub fn fio_in_kernel(vm: &Vm, disk: &Function, options: &str) -> Result<Output> {
    let path = disk.block_device().context("no block device")?;
    let line = format!("fio --name=kernel --thread --ioengine=psync --filename={} {options}", path.display());
    vm.run_within(FIO_LIMIT, line.split_whitespace().collect::<Vec<_>>())
}

/// Writes and checks 2 MiB behind what is kept, over NBD.
///
/// # Errors
/// When something else was read than was written.
pub fn works(vm: &Vm) -> Result<()> {
    fio(vm, "--rw=randwrite --bs=4k --offset=8m --size=2m --iodepth=16 --verify=crc32c --do_verify=1")?.success()?;
    Ok(())
}

/// Writes what is to outlive what comes, over NBD, and flushes it. What was there before is overwritten through the kernel's driver by [`forget`].
///
/// # Errors
/// When it is not written.
pub fn keep(vm: &Vm) -> Result<()> {
    fio(vm, &format!("{KEPT} --rw=write --do_verify=0 --end_fsync=1"))?.success()?;
    Ok(())
}

/// Takes away what an earlier scenario kept, so that [`is_kept`] finds what this one wrote or nothing.
///
/// # Errors
/// When something of it is left.
pub fn forget(vm: &Vm, disk: &Function) -> Result<()> {
    let is_there = || Ok(disk.block_device().is_some_and(|path| std::fs::File::open(path).is_ok()));
    vm.wait_until("the kernel serves the disk", SHORT, is_there)?;
    let path = disk.block_device().context("no block device")?;
    vm.run(["dd", "if=/dev/zero", &format!("of={}", path.display()), "bs=64k", "count=64", "conv=fsync"])?.success()?;
    ensure!(is_kept(vm, disk).is_err(), "the check finds what is not there");
    Ok(())
}

/// Reads through the kernel's driver what [`keep`] wrote, and checks every block.
///
/// # Errors
/// When it is not what was written.
pub fn is_kept(vm: &Vm, disk: &Function) -> Result<()> {
    fio_in_kernel(vm, disk, &format!("{KEPT} --rw=read --direct=1"))?.success()?;
    Ok(())
}

/// A checksum over the whole disk, read through the kernel's driver.
///
/// # Errors
/// When it cannot be read.
pub fn sum(vm: &Vm, disk: &Function) -> Result<String> {
    let path = disk.block_device().context("no block device")?;
    vm.run(["blockdev".as_ref(), "--flushbufs".as_ref(), path.as_os_str()])?.success()?;
    let output = vm.run(["md5sum".as_ref(), path.as_os_str()])?.success()?;
    Ok(output.stdout.split_whitespace().next().context("no checksum")?.to_owned())
}

/// Starts fio, which writes 4 KiB blocks over NBD behind what is kept until somebody ends it, and waits until the binding has many of them and some are under way.
///
/// # Errors
/// When nothing is written.
pub fn under_load(vm: &Vm, binding: &str) -> Result<Running> {
    let options = "--rw=randwrite --bs=4k --offset=16m --size=16m --iodepth=32 --time_based --runtime=600";
    let mut fio = vm.spawn("load", over_nbd("load", options))?;
    vm.wait_until("many requests, and some under way", SHORT, || {
        ensure!(fio.is_alive()?, "fio ended: {}", fio.stderr());
        let bindings = cofferdam(vm, &["ls", "--json"])?.success()?.json()?;
        let bindings = bindings.as_array().context("no list")?;
        let status = bindings.iter().find(|status| status["name"] == binding).context("no such binding")?;
        let handles = status["handles"].as_array().context("no handles")?;
        let requests: u64 = handles.iter().filter_map(|handle| handle["requests"].as_u64()).sum();
        Ok(requests >= 500 && status["requests_in_flight"].as_u64() > Some(0))
    })?;
    Ok(fio)
}

/// The memory that a host shares with `disk` on uio: files, and their bytes.
pub fn hugepage_files(disk: &Function) -> Vec<(String, u64)> {
    let folder = Path::new("/dev/hugepages/cofferdam").join(disk.address());
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some((entry.file_name().to_string_lossy().into_owned(), entry.metadata().ok()?.len())))
        .collect();
    files.sort();
    files
}

/// Huge pages of 2 MiB that nobody has.
///
/// # Errors
/// When the kernel does not say.
pub fn free_hugepages() -> Result<u64> {
    hugepages("free_hugepages")
}

/// Huge pages of 2 MiB that there are.
///
/// # Errors
/// When the kernel does not say.
pub fn all_hugepages() -> Result<u64> {
    hugepages("nr_hugepages")
}

fn hugepages(which: &str) -> Result<u64> {
    let path = Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").join(which);
    Ok(std::fs::read_to_string(path)?.trim().parse()?)
}
