//! The suite that the simulated devices and the vhost-user backends are put under (`tests/conformance`), on PCI functions.

use crate::host::{BLOCK_DRIVER, device, kernel_serves};
use crate::pci::{CONSOLE0, CONSOLE1, Function, NET0, NET1, PLAIN0, READONLY0, RNG1, SUITE0};
use crate::vm::{SHORT, Vm};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// A suite takes some ten seconds where nobody else uses the processor.
const LIMIT: Duration = Duration::from_secs(500);

/// What one class has: a suite that has grown has to be counted anew.
struct Class {
    name: &'static str,
    driver: &'static str,
    /// Cases that run on these functions.
    cases: usize,
    /// Cases that need what QEMU's functions are not.
    absent: usize,
}

const BLOCK: Class = Class { name: "block", driver: BLOCK_DRIVER, cases: 34, absent: 0 };
/// Absent: rings without features (2), one buffer for each packet, offloads (2), which a cable of QEMU's has not, two queues, a link that goes down.
const NET: Class = Class { name: "net", driver: "/drivers/virtio-net.wasm", cases: 36, absent: 7 };
/// Absent: rings without features (2), two ports that drop nothing, what only the simulated other side does (3).
const STREAM: Class = Class { name: "stream", driver: "/drivers/virtio-console.wasm", cases: 34, absent: 6 };
/// Absent: rings without features (2).
const ENTROPY: Class = Class { name: "entropy", driver: "/drivers/virtio-rng.wasm", cases: 26, absent: 2 };

/// Runs the suite, and counts.
fn suite(vm: &Vm, via: &str, class: &Class, functions: &[Function], more: &[&str]) -> Result<()> {
    let addresses: Vec<_> = functions.iter().map(device).collect();
    let mut line = vec!["cofferdam-conformance", via, "--class", class.name, "--driver", class.driver];
    line.extend(["--cache-dir", "/var/cache/cofferdam"]);
    line.extend(more);
    line.extend(addresses.iter().map(String::as_str));
    let mut program = vm.spawn("conformance", &line)?;
    let mut told = 0;
    // Each case as it comes, so that a machine that is slow is not taken for one that hangs.
    vm.wait_until("the suite ends", LIMIT, || {
        let is_alive = program.is_alive()?;
        let said = program.stdout();
        let whole = said.rfind('\n').map_or(0, |end| end + 1);
        said[told..whole].lines().for_each(|line| vm.step(line.trim()));
        told = whole;
        Ok(!is_alive)
    })?;
    let output = program.finish(SHORT)?.success()?;
    let count = |what: &str| output.stdout.lines().filter(|line| line.contains(what)).count();
    let (passed, absent) = (count(" ... ok "), count(" ... this device cannot be made so"));
    ensure!(passed == class.cases, "{passed} cases passed, and not {}", class.cases);
    ensure!(absent == class.absent, "{absent} cases have nothing to run on, and not {}", class.absent);
    output.saying(&format!("{passed} cases passed"))?;
    Ok(())
}

/// Three disks, for what the cases wish for: queues and ranges, a ring without features, no writes.
fn disks(vm: &mut Vm, via: &str) -> Result<()> {
    let functions = [SUITE0.function()?, PLAIN0.function()?, READONLY0.function()?];
    // The cases start with an empty disk, which is what the program has to make of these. The last one takes no writes.
    for function in &functions[..2] {
        kernel_serves(vm, function)?;
        let node = function.block_device().context("no block device")?;
        vm.run(["dd", "if=/dev/urandom", &format!("of={}", node.display()), "bs=64k", "count=32", "conv=fsync"])?
            .success()?;
    }
    vm.step("full of something else");
    suite(vm, via, &BLOCK, &functions, &[])?;
    for function in &functions {
        kernel_serves(vm, function)?;
    }
    Ok(())
}

/// The entry of `folder` below the function's virtio device, when the kernel has made it.
fn entry(vm: &Vm, function: &Function, folder: &str) -> Result<String> {
    let find = || {
        let mut virtio = function.folder().read_dir().ok()?.flatten().map(|entry| entry.path());
        let entry = virtio.find_map(|path| path.join(folder).read_dir().ok())?.flatten().next()?;
        entry.file_name().into_string().ok()
    };
    vm.wait_until(&format!("the kernel has {folder} of {}", function.address()), SHORT, || Ok(find().is_some()))?;
    find().context("gone again")
}

/// A card, whose cable ends in one of the kernel's.
fn network(vm: &mut Vm, via: &str) -> Result<()> {
    let card = NET0.function()?;
    let far = entry(vm, &NET1.function()?, "net")?;
    vm.run(["ip", "link", "set", "dev", &far, "up"])?.success()?;
    let result = suite(vm, via, &NET, std::slice::from_ref(&card), &[]);
    // What is still on the cable is taken off: as long as something is, QEMU's main thread has no rest.
    let near = entry(vm, &card, "net")?;
    vm.run(["ip", "link", "set", "dev", &near, "up"])?.success()?;
    for end in [&far, &near] {
        vm.run(["ip", "link", "set", "dev", end, "down"])?.success()?;
    }
    result
}

/// A console, whose port 1 ends in one of the kernel's.
fn console(vm: &mut Vm, via: &str) -> Result<()> {
    let console = CONSOLE0.function()?;
    ensure!(CONSOLE1.is_present(), "there is no other side");
    let find = || {
        let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().map(|entry| entry.path());
        let named = |name: &str| ports.into_iter().find(|path| is_called(path, name));
        Some(format!("/dev/{}", named("org.cofferdam.console1.1")?.file_name()?.to_str()?))
    };
    vm.wait_until("the other side's port", SHORT, || {
        Ok(find().is_some_and(|path| std::path::Path::new(&path).exists()))
    })?;
    let peer = find().context("gone again")?;
    vm.step(&format!("the other side is {peer}"));
    suite(vm, via, &STREAM, &[console], &["--peer", &peer])
}

fn is_called(port: &std::path::Path, name: &str) -> bool {
    std::fs::read_to_string(port.join("name")).is_ok_and(|text| text.trim_end() == name)
}

fn entropy(vm: &mut Vm, via: &str) -> Result<()> {
    suite(vm, via, &ENTROPY, &[RNG1.function()?], &[])
}

/// Physical memory in huge pages, INTx.
pub(super) fn disks_on_uio(vm: &mut Vm) -> Result<()> {
    disks(vm, "--uio")
}

/// An IOMMU domain, MSI-X.
pub(super) fn disks_on_vfio(vm: &mut Vm) -> Result<()> {
    disks(vm, "--vfio")
}

pub(super) fn network_on_uio(vm: &mut Vm) -> Result<()> {
    network(vm, "--uio")
}

pub(super) fn network_on_vfio(vm: &mut Vm) -> Result<()> {
    network(vm, "--vfio")
}

pub(super) fn console_on_uio(vm: &mut Vm) -> Result<()> {
    console(vm, "--uio")
}

pub(super) fn console_on_vfio(vm: &mut Vm) -> Result<()> {
    console(vm, "--vfio")
}

pub(super) fn entropy_on_uio(vm: &mut Vm) -> Result<()> {
    entropy(vm, "--uio")
}

pub(super) fn entropy_on_vfio(vm: &mut Vm) -> Result<()> {
    entropy(vm, "--vfio")
}
