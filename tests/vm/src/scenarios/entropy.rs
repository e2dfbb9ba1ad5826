//! A source of randomness: read from a fifo, and given to the kernel's pool only when that is asked for.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

use crate::host::{Host, MODEST, cofferdam, device, nothing_is_claimed};
use crate::pci::RNG1;
use crate::vm::{SHORT, Vm};

const FIFO: &str = "/run/random";
const PIECE_BYTES: usize = 64 * 1024;

/// Whether the bytes look random to gzip, which makes nothing shorter of such.
fn is_noise(vm: &Vm, bytes: &[u8]) -> Result<()> {
    const PATH: &str = "/tmp/noise";
    File::create(PATH)?.write_all(bytes)?;
    let packed = vm.run(["sh", "-c", &format!("gzip -c {PATH} | wc -c")])?.success()?;
    std::fs::remove_file(PATH)?;
    let packed: usize = packed.stdout.trim().parse()?;
    ensure!(packed >= bytes.len(), "{} bytes became {packed} packed", bytes.len());
    Ok(())
}

/// Descriptors of a process that lead to the kernel's pool.
fn holds_the_pool(process: u32) -> Result<bool> {
    let entries = std::fs::read_dir(format!("/proc/{process}/fd"))?.flatten();
    Ok(entries.filter_map(|entry| std::fs::read_link(entry.path()).ok()).any(|path| path.ends_with("dev/random")))
}

/// Requests of the handle that a port has.
fn requests(vm: &Vm, host: &Host, port: &str) -> Result<u64> {
    let handles = host.handles(vm, "rng")?;
    let handle = handles.iter().find(|handle| handle["port"] == port).with_context(|| format!("{handles:?}"))?;
    handle["requests"].as_u64().context("no number")
}

/// The names of the sources that the kernel has (hw_random).
fn sources_of_kernel() -> Result<Vec<String>> {
    let names = std::fs::read_to_string("/sys/class/misc/hw_random/rng_available")?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

fn random(vm: &mut Vm, via: &str) -> Result<()> {
    const POOL: &str = "entropy-pool,rate=256";
    let function = RNG1.function()?;
    let sources = sources_of_kernel()?.len();
    let host = Host::start(vm)?;
    let (address, port) = (device(&function), format!("fifo:{FIFO}"));
    let line = ["load", "/drivers/virtio-rng.wasm", "--device", &address, via, "--name", "rng", "--port", &port];
    cofferdam(vm, &[&line[..], MODEST].concat())?.success()?;
    ensure!(sources_of_kernel()?.len() == sources - 1, "the kernel has {:?}", sources_of_kernel()?);
    vm.step("loaded");
    let mut fifo = File::open(FIFO)?;
    let mut pieces = [vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]];
    for piece in &mut pieces {
        fifo.read_exact(piece)?;
        is_noise(vm, piece)?;
    }
    ensure!(pieces[0] != pieces[1], "the same {PIECE_BYTES} bytes twice");
    vm.step("read; now the pool");
    let process = host.process.id();
    ensure!(!holds_the_pool(process)?, "it has the kernel's pool, and nobody asked for that");
    cofferdam(vm, &["port", "attach", "rng", POOL])?.success()?;
    ensure!(holds_the_pool(process)?, "it does not have the kernel's pool");
    let first = requests(vm, &host, POOL)?;
    vm.wait_until("a second portion", SHORT, || Ok(requests(vm, &host, POOL)? > first.max(1)))?;
    cofferdam(vm, &["port", "detach", "rng", POOL])?.success()?;
    ensure!(!holds_the_pool(process)?, "it has the kernel's pool, and nobody asks for that any more");
    let certificate = host.unload(vm, "rng")?;
    ensure!(certificate["outcome"] == "unloaded", "{certificate}");
    // What the pipe held, and no more.
    let mut rest = Vec::new();
    fifo.read_to_end(&mut rest)?;
    ensure!(std::fs::symlink_metadata(FIFO).is_err(), "{FIFO} is still there");
    nothing_is_claimed()?;
    host.end()?;
    vm.wait_until("the kernel has its source again", SHORT, || Ok(sources_of_kernel()?.len() == sources))
}

pub(super) fn on_uio(vm: &mut Vm) -> Result<()> {
    random(vm, "--uio")
}

pub(super) fn on_vfio(vm: &mut Vm) -> Result<()> {
    random(vm, "--vfio")
}
