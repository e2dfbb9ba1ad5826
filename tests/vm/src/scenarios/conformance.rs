//! The suite that the simulated devices and the vhost-user backends are put under (`tests/conformance`), on PCI functions.

use crate::host::{BLOCK_DRIVER, device, kernel_serves};
use crate::pci::{PLAIN0, READONLY0, SUITE0};
use crate::vm::Vm;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// Cases that run on these disks: all of them. A suite that has grown has to be counted anew.
const CASES: usize = 22;

/// Three disks, for what the cases wish for: queues and ranges, a ring without features, no writes.
fn suite(vm: &mut Vm, via: &str) -> Result<()> {
    let functions = [SUITE0.function()?, PLAIN0.function()?, READONLY0.function()?];
    // The cases start with an empty disk, which is what the program has to make of these. The last one takes no writes.
    for function in &functions[..2] {
        kernel_serves(vm, function)?;
        let node = function.block_device().context("no block device")?;
        vm.run(["dd", "if=/dev/urandom", &format!("of={}", node.display()), "bs=64k", "count=32", "conv=fsync"])?
            .success()?;
    }
    vm.step("full of something else");
    let addresses: Vec<_> = functions.iter().map(device).collect();
    let line = ["cofferdam-conformance", via, "--driver", BLOCK_DRIVER, "--cache-dir", "/var/cache/cofferdam"];
    let line: Vec<_> = line.into_iter().chain(addresses.iter().map(String::as_str)).collect();
    let output = vm.run_within(Duration::from_secs(240), line)?.success()?;
    output.stdout.lines().for_each(|line| vm.step(line.trim()));
    let passed = output.stdout.lines().filter(|line| line.contains(" ... ok ")).count();
    ensure!(passed == CASES, "{passed} cases passed, and not {CASES}");
    let output = output.saying(&format!("{CASES} cases passed"))?;
    ensure!(!output.stdout.contains("cannot be made"), "a case has no disk to run on");
    for function in &functions {
        kernel_serves(vm, function)?;
    }
    Ok(())
}

/// Physical memory in huge pages, INTx.
pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    suite(vm, "--uio")
}

/// An IOMMU domain, MSI-X.
pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    suite(vm, "--vfio")
}
