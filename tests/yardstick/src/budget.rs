//! What is not a rate: memory, loads, allocations, system calls, the processor time of nothing at all, and `nbdcopy`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cofferdam_manager::{HandleSpec, IoFlags, IoOp, IoRequest};
use serde::Serialize;

use crate::backend::{Backend, CAPACITY_BYTES, Kind};
use crate::clients::cofferdam::{Host, InProcess, attach};
use crate::counting;
use crate::engine::{Job, Loop, Mode, Op, PATIENCE, Times};
use crate::machine;
use crate::null::Pace;
use crate::stats::{Estimate, estimate, median};

/// Figures of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Budget {
    /// Private memory of an idle binding that has served a request, without its arena, in bytes: the mean of [`BINDINGS`].
    pub idle_binding_bytes: u64,
    /// From the component's bytes, without a cache, to the first answer.
    pub cold_load_ms: f64,
    /// The same by a new host with the compiled code in its cache.
    pub cached_load_ms: f64,
    /// The same by a host that runs already and has no cache: the compilation is most of it.
    pub uncached_load_ms: f64,
    /// By depth and mode.
    pub hot_path: Vec<HotPath>,
    /// Per cent of a core that an idle client in the default mode takes, with everything else of its process.
    pub idle_cpu_percent: f64,
    /// `nbdcopy` to nowhere, in MiB/s.
    pub nbdcopy: Option<NbdCopy>,
}

/// What the client's thread does per request.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct HotPath {
    /// The mode.
    pub mode: &'static str,
    /// Requests in flight.
    pub depth: u32,
    /// Requests that were counted.
    pub requests: u64,
    /// Allocations.
    pub allocations_per_request: f64,
    /// System calls.
    pub system_calls_per_request: f64,
    /// Crossings.
    pub crossings_per_request: f64,
}

/// Bandwidths and their ratio.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct NbdCopy {
    /// Through our port, MiB/s.
    pub cofferdam: f64,
    /// From qemu-storage-daemon's own export, MiB/s.
    pub qsd: f64,
    /// Of the same round.
    pub ratio: Estimate,
}

/// Idle bindings at a time.
pub const BINDINGS: usize = 8;

/// Measures all of it. The slow ones are done less often when `quick`.
///
/// # Errors
/// When a device, a load or a count fails.
pub fn measure(host: &Host, null_program: &Path, quick: bool) -> Result<Budget> {
    let device = Backend::start(Kind::Null, Pace::Event, 1, null_program)?;
    let scratch = tempfile::tempdir()?;
    let repeat = |count: usize, measure: &mut dyn FnMut() -> Result<f64>| -> Result<f64> {
        Ok(median(&(0..count).map(|_| measure()).collect::<Result<Vec<_>>>()?))
    };
    let loads = if quick { 5 } else { 20 };
    let cold_load_ms = repeat(if quick { 1 } else { 3 }, &mut || {
        let cache = tempfile::tempdir_in(scratch.path())?;
        load_ms(&Host::start(Some(cache.path()))?, &device)
    })?;
    let cache = scratch.path().join("cache");
    drop(first_answer(&Host::start(Some(&cache))?, &device)?);
    let cached_load_ms = repeat(loads, &mut || load_ms(&Host::start(Some(&cache))?, &device))?;
    let uncached_load_ms = repeat(loads, &mut || load_ms(host, &device))?;
    let idle_cpu_percent = idle(host, &device)?;
    drop(device);
    let idle_binding_bytes = idle_memory(host, null_program)?;
    let mut hot_path = Vec::new();
    for (mode, depth) in [
        (Mode::Poll, 1),
        (Mode::Poll, 32),
        (Mode::Poll, 128),
        (Mode::Adaptive, 1),
        (Mode::Adaptive, 32),
        (Mode::Adaptive, 128),
    ] {
        hot_path.push(count(host, null_program, mode, depth)?);
    }
    let nbdcopy = nbdcopy(host, null_program, if quick { 1 } else { 6 })?;
    Ok(Budget {
        idle_binding_bytes,
        cold_load_ms,
        cached_load_ms,
        uncached_load_ms,
        hot_path,
        idle_cpu_percent,
        nbdcopy,
    })
}

/// A binding that has answered one read.
fn first_answer(host: &Host, device: &Backend) -> Result<std::sync::Arc<cofferdam_manager::Binding>> {
    let binding = host.load(device, 1)?;
    let handle = binding.open(HandleSpec::default())?;
    let request = IoRequest {
        user: 0,
        op: IoOp::Read,
        offset: 0,
        length: 4096,
        flags: IoFlags::default(),
        buffer: Some(handle.lease(4096)?),
    };
    handle.submit(&mut vec![request])?;
    let mut done = Vec::new();
    ensure!(handle.wait(PATIENCE, &mut done) == 1, "the first request is not answered");
    done.remove(0).result?;
    drop((done, handle));
    Ok(binding)
}

/// From the load to the first answer; connecting to the device is part of it, the host is there.
fn load_ms(host: &Host, device: &Backend) -> Result<f64> {
    let start = Instant::now();
    let binding = first_answer(host, device)?;
    let took = start.elapsed().as_secs_f64() * 1e3;
    host.unload(&binding)?;
    Ok(took)
}

fn idle_memory(host: &Host, null_program: &Path) -> Result<u64> {
    // The first one pays for what all share: the module, the allocator's arenas.
    let mut kept = Vec::new();
    let mut before = 0;
    for number in 0..=BINDINGS {
        let device = Backend::start(Kind::Null, Pace::Event, 1, null_program)?;
        let binding = first_answer(host, &device)?;
        kept.push((binding, device));
        if number == 0 {
            before = machine::private_bytes()?;
        }
    }
    // What a client has touched of an arena is in shared memory (a memfd that the device maps, too), which is not counted as private.
    let grown = machine::private_bytes()?.saturating_sub(before);
    for (binding, _device) in &kept {
        host.unload(binding)?;
    }
    Ok(grown / BINDINGS as u64)
}

/// Processor time of this process and its device while a client waits for nothing, after traffic.
fn idle(host: &Host, device: &Backend) -> Result<f64> {
    let mut engine = InProcess::connect(host, device, Mode::Adaptive, 1)?;
    let job = Job { op: Op::RandRead, depth: 32 };
    let mut work = Loop::new(&mut engine, job)?;
    work.run(&mut engine, Duration::ZERO, Duration::from_millis(20), &|| Ok(Times::default()))?;
    let (own, other, start) = (machine::own_time(), device.time()?, Instant::now());
    engine.wait(Duration::from_millis(400));
    let used = (machine::own_time() - own) + (device.time()? - other);
    Ok(100.0 * used.as_secs_f64() / start.elapsed().as_secs_f64())
}

/// Counts what the thread of a client does per request.
///
/// # Errors
/// When the device fails, or system calls cannot be counted.
pub fn count(host: &Host, null_program: &Path, mode: Mode, depth: u32) -> Result<HotPath> {
    let pace = if mode == Mode::Poll { Pace::Poll } else { Pace::Event };
    let device = Backend::start(Kind::Null, pace, 1, null_program)?;
    let slice = counting::count_system_calls(|begin| {
        let mut engine = InProcess::connect(host, &device, mode, 1)?;
        let mut work = Loop::new(&mut engine, Job { op: Op::RandRead, depth })?;
        // What is taken once is taken in the warm-up.
        begin()?;
        let (warm_up, length) = (Duration::from_millis(30), Duration::from_millis(80));
        work.run(&mut engine, warm_up, length, &|| Ok(Times::default()))
    })?;
    let per = |count: u64| count as f64 / slice.requests.max(1) as f64;
    Ok(HotPath {
        mode: mode.name(),
        depth,
        requests: slice.requests,
        allocations_per_request: per(slice.allocations),
        system_calls_per_request: per(slice.system_calls.context("system calls were not counted")?),
        crossings_per_request: per(slice.crossings.unwrap_or_default()),
    })
}

/// `None` where there is no nbdcopy.
fn nbdcopy(host: &Host, null_program: &Path, rounds: usize) -> Result<Option<NbdCopy>> {
    let device = Backend::start(Kind::Qsd, Pace::Poll, 1, null_program)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        for turn in 0..2 {
            if (round + turn) % 2 == 0 {
                let binding = host.load(&device, 1)?;
                let socket = device.path("copy.sock");
                attach(&binding, &socket)?;
                let rate = copy(&format!("nbd+unix:///?socket={}", socket.display()))?;
                host.unload(&binding)?;
                ours.extend(rate);
            } else {
                theirs.extend(copy(&format!("nbd+unix:///null0?socket={}", device.nbd_socket().display()))?);
            }
        }
    }
    if ours.is_empty() || theirs.is_empty() {
        return Ok(None);
    }
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
    Ok(Some(NbdCopy { cofferdam: median(&ours), qsd: median(&theirs), ratio: estimate(&ratios) }))
}

/// Reads a whole export; MiB/s.
fn copy(uri: &str) -> Result<Option<f64>> {
    let start = Instant::now();
    let mut command = Command::new("nbdcopy");
    // The block status of a null device would let it skip everything.
    command.args(["--allocated", uri, "null:"]).stdin(Stdio::null()).stdout(Stdio::null());
    let status = match command.status() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        status => status?,
    };
    ensure!(status.success(), "nbdcopy {uri}: {status}");
    Ok(Some((CAPACITY_BYTES >> 20) as f64 / start.elapsed().as_secs_f64()))
}
