//! The processor: where threads run, what time they took, how far the cores are from each other.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// The two cores that a measurement uses; the same one twice where there is no second.
#[derive(Clone, Copy, Debug)]
pub struct Cores {
    /// Where the client's thread runs.
    pub client: usize,
    /// Where the device runs.
    pub device: usize,
}

impl Cores {
    /// The first two that this process may use.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn of_this_process() -> Result<Cores> {
        let allowed = sched_getaffinity(None).context("sched_getaffinity")?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        let client = cores.next().context("no core")?;
        Ok(Cores { client, device: cores.next().unwrap_or(client) })
    }
}

fn only(core: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(core);
    set
}

/// The calling thread stays on one core until this is dropped.
pub struct Pinned(CpuSet);

impl Pinned {
    /// Pins the calling thread. Threads that it starts meanwhile stay there for ever: start none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn to(core: usize) -> Result<Pinned> {
        let before = sched_getaffinity(None).context("sched_getaffinity")?;
        sched_setaffinity(None, &only(core)).context("sched_setaffinity")?;
        Ok(Pinned(before))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(None, &self.0);
    }
}

/// Puts every thread of a process on one core; those that it starts later follow their makers.
///
/// # Errors
/// When there is no such process.
pub fn pin_process(pid: u32, core: usize) -> Result<()> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let id = task?.file_name().to_string_lossy().parse::<i32>()?;
        // One that has ended meanwhile needs no core.
        let _ = sched_setaffinity(Pid::from_raw(id), &only(core));
    }
    Ok(())
}

fn duration(time: rustix::time::Timespec) -> Duration {
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Processor time of the calling thread.
#[must_use]
pub fn thread_time() -> Duration {
    duration(clock_gettime(ClockId::ThreadCPUTime))
}

/// Processor time of this process.
#[must_use]
pub fn own_time() -> Duration {
    duration(clock_gettime(ClockId::ProcessCPUTime))
}

/// Processor time of another process, all its threads, to the nanosecond.
///
/// # Errors
/// When there is no such process.
pub fn process_time(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both pointers are to live locals of the types that the calls take.
    let failed = unsafe {
        match libc::clock_getcpuclockid(pid as libc::pid_t, &raw mut clock) {
            0 => libc::clock_gettime(clock, &raw mut time),
            error => error,
        }
    };
    anyhow::ensure!(failed == 0, "the clock of process {pid}");
    Ok(Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32))
}

/// Bytes of memory that this process has touched and shares with nobody (`Private_*` of `smaps_rollup`).
///
/// # Errors
/// When /proc does not say.
pub fn private_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let lines = text.lines().filter(|line| line.starts_with("Private_Clean:") || line.starts_with("Private_Dirty:"));
    let mut kib = 0;
    for line in lines {
        kib += line.split_whitespace().nth(1).context("smaps_rollup")?.parse::<u64>()?;
    }
    Ok(kib << 10)
}

/// Nanoseconds that a cache line takes from one core to the other: the best of many short bursts, of which some fit between two turns of a device that polls on its core. Some 100
/// on near cores, 500 and more on far ones; infinite where no burst came to its end.
///
/// # Errors
/// When a thread cannot be pinned.
pub fn distance_ns(cores: Cores) -> Result<f64> {
    const TURNS: u32 = 200;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let ball = AtomicU32::new(0);
        let deadline = Instant::now() + Duration::from_millis(50);
        let bat = |core: usize, first: u32| -> Result<Option<Duration>> {
            let _pinned = Pinned::to(core)?;
            // From the first catch: before it the other one may have waited for its core.
            let mut start = None;
            let mut turn = first;
            while turn < 2 * TURNS {
                let mut looks = 0_u32;
                while ball.load(Ordering::Acquire) != turn {
                    looks = looks.wrapping_add(1);
                    // The other one may never get a turn on a busy machine.
                    if looks.is_multiple_of(1 << 10) && Instant::now() > deadline {
                        return Ok(None);
                    }
                }
                start.get_or_insert_with(Instant::now);
                ball.store(turn + 1, Ordering::Release);
                turn += 2;
            }
            Ok(start.map(|start| start.elapsed()))
        };
        let took = std::thread::scope(|scope| {
            let other = scope.spawn(|| bat(cores.device, 1));
            bat(cores.client, 0)?;
            other.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        })?;
        if let Some(took) = took {
            best = best.min(took.as_secs_f64() * 1e9 / f64::from(2 * TURNS));
        }
    }
    Ok(best)
}

/// The machine in a line.
#[must_use]
pub fn describe() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split(':').nth(1));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {cores} cores, Linux {}", model.unwrap_or("unknown processor").trim(), kernel.trim())
}
