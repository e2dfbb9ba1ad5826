//! One daemon after the other on a disk with clients at work (`cofferdam daemon --takeover`), and new ones that come to nothing.
//!
//! That the device was not reset is its own word: its rings stay where they were and count on, while nobody but a load sets up rings. A function that stopped mastering the bus would
//! answer nobody.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::load::{PORT, SOCKET, taken};
use crate::challenger::take_everything;
use crate::disk::{free_hugepages, hugepage_files};
use crate::fio::{self, Load};
use crate::host::{DOOR, Host, MODEST, cofferdam, device, kernel_serves, nothing_is_claimed, told};
use crate::pci::{BYPASS0, DISK0, Function, Place, RNG1};
use crate::vm::{SHORT, Vm};

const JOBS: u32 = 2;
const TWO: &[&str] = &["--queues", "2"];
/// Requests on a queue that show that its clients go on.
const MORE: u64 = 50;
/// How many descriptors a new daemon may have, so that it fails sooner or later on its way. It needs about 55.
const FEW_DESCRIPTORS: [u32; 3] = [40, 44, 51];

/// What QEMU knows of the device and a reset would undo: its status, its features, where its rings are.
pub(super) fn as_started(vm: &mut Vm, place: &Place) -> Result<Value> {
    let path = format!("/machine/peripheral/{}/virtio-backend", place.id);
    let status = vm.outside("x-query-virtio-status", &json!({ "path": path }))?;
    let ring = vm.outside("x-query-virtio-queue-status", &json!({ "path": path, "queue": 0 }))?;
    let rings: Vec<_> = ["vring-desc", "vring-avail", "vring-used"].iter().map(|key| ring[*key].clone()).collect();
    ensure!(rings.iter().all(|at| at.as_u64().is_some_and(|at| at != 0)), "no ring: {ring}");
    Ok(json!([status["status"], status["guest-features"], rings]))
}

/// The device answers on its first `queues` queues.
fn goes_on(vm: &mut Vm, place: &Place, queues: usize, load: &mut Load) -> Result<()> {
    let before = taken(vm, place)?;
    let limit = std::time::Instant::now() + SHORT;
    loop {
        load.goes_on()?;
        let now = taken(vm, place)?;
        // The counters of virtio 1.2, section 2.7.8, go round at 65536.
        let made = |(now, before): (&u64, &u64)| (now + 65536 - before) % 65536 >= MORE;
        if now.iter().zip(&before).take(queues).all(made) {
            return Ok(());
        }
        ensure!(std::time::Instant::now() < limit, "the device answers nobody: {before:?}, and now {now:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The daemon says of the function that it is its, and so does the record.
fn is_of(vm: &Vm, host: &Host, disk: &Function) -> Result<()> {
    let told = told(vm, disk)?;
    let process = host.process.id();
    ensure!(told["claim"]["pid"] == process, "claimed by another one than {process}: {told}");
    ensure!(told["record"]["by"]["load"]["pid"] == process, "recorded for another one than {process}: {told}");
    Ok(())
}

/// The last daemon unloads the disk under its load: the kernel has it, and nothing is left.
fn is_unloaded(vm: &Vm, host: &Host, disk: &Function, load: Load, free_pages: u64) -> Result<()> {
    let certificate = host.unload(vm, "disk")?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    // The unload's, and the first: a client that was shown wrong data says so.
    load.ends_with_an_error(SHORT)?;
    kernel_serves(vm, disk)?;
    nothing_is_claimed()?;
    ensure!(hugepage_files(disk).is_empty() && free_hugepages()? == free_pages, "huge pages are left");
    Ok(())
}

/// Three new daemons in a row, and an unload in the last.
fn one_after_the_other(vm: &mut Vm, place: &Place, via: &str, queues: usize) -> Result<()> {
    let disk = place.function()?;
    kernel_serves(vm, &disk)?;
    let free = free_hugepages()?;
    let mut host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, PORT, if queues == 2 { TWO } else { &[] })?;
    let mut load = Load::start(vm, SOCKET, JOBS)?;
    host.until_loaded(vm, "disk", JOBS as usize)?;
    let (started, files, pages) = (as_started(vm, place)?, hugepage_files(&disk), free_hugepages()?);
    for _ in 0..3 {
        let told = host.take_over(vm)?;
        vm.step(&told);
        ensure!(told.starts_with("took over 1 binding and 2 connections"), "{told}");
        goes_on(vm, place, queues, &mut load)?;
        let now = as_started(vm, place)?;
        ensure!(now == started, "the device was {started} and is {now}");
        ensure!(disk.is_master()?, "it does not master the bus");
        ensure!(hugepage_files(&disk) == files && free_hugepages()? == pages, "its memory is another");
        is_of(vm, &host, &disk)?;
    }
    is_unloaded(vm, &host, &disk, load, free)?;
    vm.step("given back; once more, with the daemon that took over");
    host.load_disk(vm, &disk, via, PORT, &[])?;
    fio::verify(vm, SOCKET, 1)?;
    host.take_over(vm)?;
    host.unload(vm, "disk")?;
    kernel_serves(vm, &disk)?;
    host.end()
}

/// New daemons that die with everything in their hands, that have too few descriptors to adopt it, and that are too slow: their end is noticed by nobody.
fn new_ones_fail(vm: &mut Vm, via: &str, descriptors: impl IntoIterator<Item = u32>) -> Result<()> {
    let disk = DISK0.function()?;
    kernel_serves(vm, &disk)?;
    let free = free_hugepages()?;
    let mut host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, PORT, TWO)?;
    let mut load = Load::start(vm, SOCKET, JOBS)?;
    host.until_loaded(vm, "disk", JOBS as usize)?;
    let started = as_started(vm, &DISK0)?;
    let mut serves_on = |vm: &mut Vm, host: &mut Host, after: &str| -> Result<()> {
        ensure!(host.process.is_alive()?, "{after}: the old daemon has ended: {}", host.process.stderr());
        goes_on(vm, &DISK0, 2, &mut load).with_context(|| after.to_owned())?;
        let now = as_started(vm, &DISK0)?;
        ensure!(now == started, "{after}: the device was {started} and is {now}");
        ensure!(disk.is_master()?, "{after}: it does not master the bus");
        is_of(vm, host, &disk)
    };
    for _ in 0..3 {
        let hands = take_everything(Path::new(DOOR), Duration::from_secs(5))?;
        let device = &hands.state["bindings"][0]["transport"];
        ensure!(device["kind"] == "pci" && hands.descriptors.len() > 10, "{}", hands.state);
        drop(hands);
        serves_on(vm, &mut host, "one that died")?;
    }
    vm.step("three have died with everything in their hands");
    let mut whys = Vec::new();
    for most in descriptors {
        let line = format!("ulimit -n {most}; exec cofferdam daemon --takeover --socket /tmp/cofferdam.sock");
        let mut new = vm.spawn("daemon", ["sh", "-c", &line])?;
        vm.wait_until("one without descriptors", SHORT, || {
            ensure!(!new.stdout().contains("took over "), "{most} descriptors are enough");
            Ok(!new.is_alive()?)
        })?;
        let new = new.finish(SHORT)?.refusal()?;
        whys.push(format!("{most}: {}", new.stderr.lines().last().unwrap_or_default()));
        serves_on(vm, &mut host, "one without descriptors")?;
    }
    vm.step(&format!("too few descriptors: {whys:#?}"));
    let (mut late, mut successors) = (0, 0);
    for deadline in ["10ms", "50ms"] {
        let mut new = host.challenge(vm, &["--deadline", deadline])?;
        let took = |new: &crate::program::Running| new.stdout().contains("took over ");
        vm.wait_until("one that hurries", SHORT, || Ok(took(&new) || !new.is_alive()?))?;
        if took(&new) {
            host.succeeded_by(vm, new)?;
            successors += 1;
        } else {
            let why = new.finish(SHORT)?.refusal()?.stderr;
            vm.step(why.lines().last().unwrap_or_default());
            late += 1;
        }
        serves_on(vm, &mut host, "one that hurried")?;
    }
    vm.step(&format!("{late} were too slow, {successors} were not"));
    is_unloaded(vm, &host, &disk, load, free)?;
    host.end()
}

/// A device that is brought back by a daemon that did not load it.
fn returns(vm: &mut Vm, via: &str) -> Result<()> {
    let disk = DISK0.function()?;
    let free = free_hugepages()?;
    let mut host = Host::start(vm)?;
    host.load_disk(vm, &disk, via, PORT, &[TWO, &["--reconnect=2m"]].concat())?;
    let mut load = Load::start(vm, SOCKET, JOBS)?;
    host.until_loaded(vm, "disk", JOBS as usize)?;
    let told = host.take_over(vm)?;
    vm.step(&told);
    let files = hugepage_files(&disk);
    vm.unplug(&DISK0)?;
    let phase = |vm: &Vm| -> Result<String> {
        let why = cofferdam(vm, &["why", "disk", "--json"])?.success()?.json()?;
        Ok(why["phase"].as_str().unwrap_or_default().to_owned())
    };
    vm.wait_until("it is waited for", SHORT, || Ok(phase(vm)? == "recovering"))?;
    load.goes_on()?;
    vm.step("the clients wait; device_add");
    vm.plug(&DISK0)?;
    vm.wait_until("it serves", SHORT, || Ok(phase(vm)? == "serving"))?;
    goes_on(vm, &DISK0, 2, &mut load)?;
    // What the one in its place writes to has to outlive this daemon, too.
    ensure!(hugepage_files(&disk) == files, "{files:?} became {:?}", hugepage_files(&disk));
    vm.step("they go on; another daemon");
    host.take_over(vm)?;
    goes_on(vm, &DISK0, 2, &mut load)?;
    is_unloaded(vm, &host, &disk, load, free)?;
    host.end()
}

/// A source of randomness, which the last of two daemons reads.
pub(super) fn entropy(vm: &mut Vm) -> Result<()> {
    let function = RNG1.function()?;
    let mut host = Host::start(vm)?;
    let line = ["load", "/drivers/virtio-rng.wasm", "--device", &device(&function), "--uio", "--name", "rng"];
    cofferdam(vm, &[&line[..], MODEST].concat())?.success()?;
    let told = host.take_over(vm)?;
    vm.step(&told);
    cofferdam(vm, &["port", "attach", "rng", "fifo:/run/random"])?.success()?;
    let mut bytes = [0; 4096];
    std::fs::File::open("/run/random")?.read_exact(&mut bytes)?;
    ensure!(bytes.iter().any(|byte| *byte != 0), "zeroes");
    host.unload(vm, "rng")?;
    nothing_is_claimed()?;
    host.end()?;
    vm.wait_until("the kernel's driver", SHORT, || Ok(function.driver().as_deref() == RNG1.native))
}

/// Physical memory in huge pages, INTx.
pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    one_after_the_other(vm, &DISK0, "--uio", 2)
}

/// An IOMMU domain, MSI-X.
pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    one_after_the_other(vm, &DISK0, "--vfio", 2)
}

/// Physical memory in huge pages, which vfio is told of page by page.
pub(super) fn round_the_iommu(vm: &mut Vm) -> Result<()> {
    one_after_the_other(vm, &BYPASS0, "--vfio", 1)
}

pub(super) fn fails_on_uio(vm: &mut Vm) -> Result<()> {
    new_ones_fail(vm, "--uio", FEW_DESCRIPTORS)
}

pub(super) fn fails_on_vfio(vm: &mut Vm) -> Result<()> {
    new_ones_fail(vm, "--vfio", FEW_DESCRIPTORS)
}

/// With every number of descriptors at which it may fail.
pub(super) fn fails_everywhere_on_uio(vm: &mut Vm) -> Result<()> {
    new_ones_fail(vm, "--uio", 24..=FEW_DESCRIPTORS[2])
}

pub(super) fn fails_everywhere_on_vfio(vm: &mut Vm) -> Result<()> {
    new_ones_fail(vm, "--vfio", 24..=FEW_DESCRIPTORS[2])
}

pub(super) fn returns_on_uio(vm: &mut Vm) -> Result<()> {
    returns(vm, "--uio")
}

pub(super) fn returns_on_vfio(vm: &mut Vm) -> Result<()> {
    returns(vm, "--vfio")
}
