//! Rounds, as of the block bench: for each job one client after the other, each on a connection of its own, and again from the beginning. Whoever begins changes with the round.
//!
//! Whoever works in this process counts its own frames, and they are held against the device's counter afterwards, over the whole connection: of what was sent each frame, of what was
//! received all but those that lay in the ring at the end. DPDK's client is a process that cannot be asked to stop after so many frames: the device's counter alone tells, twice, a
//! slice apart.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::clients::{Client, Connected, moved};
use super::job::{Direction, Job, WINDOW, Windows, within_patience, work};
use super::plan::Plan;
use super::testpmd::{Forward, Testpmd};
use crate::clients::cofferdam::Host;
use crate::engine::{Apart, PATIENCE, Slice, Times};
use crate::machine::{self, Cores, Pinned};
use crate::run::{Results, rounds};

/// One thing that was measured once per round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cell {
    /// The load.
    pub job: Job,
    /// Who.
    pub client: Client,
}

/// How often a device's counter is looked at while it changes.
const LOOK: Duration = Duration::from_millis(1);

/// Measures everything in `plan`.
///
/// # Errors
/// When a device or a client fails.
pub fn measure(plan: &Plan, host: &Host, cores: Cores) -> Result<Results<Cell>> {
    let mut devices: Vec<(Forward, Testpmd)> = Vec::new();
    rounds(plan.rounds, cores, |round, results| {
        for job in &plan.jobs {
            let count = plan.clients.len();
            for client in (0..count).map(|at| plan.clients[(at + round) % count]) {
                loop {
                    let forward = device_for(*job);
                    let at = match devices.iter().position(|(known, _)| *known == forward) {
                        Some(at) => at,
                        None => {
                            devices.push((forward, Testpmd::device(forward, cores)?));
                            devices.len() - 1
                        }
                    };
                    let before = machine::distance_ns(cores)?;
                    match turn(plan, client, *job, host, &devices[at].1, cores) {
                        Ok(mut slice) => {
                            slice.apart = Some(Apart { before, after: machine::distance_ns(cores)? });
                            results.note(Cell { job: *job, client }, round, plan.rounds, slice);
                            break;
                        }
                        Err(error) => {
                            let job = format!("{}, {job:?}, round {round}", client.name());
                            results.mishap(error.context(job))?;
                            devices.swap_remove(at);
                        }
                    }
                }
            }
            // One that nobody listens to goes on making frames: those of the next job's device need the core.
            devices.retain(|(forward, _)| *forward == Forward::RxOnly);
        }
        Ok(())
    })
}

fn device_for(job: Job) -> Forward {
    match job.direction {
        Direction::Send => Forward::RxOnly,
        Direction::Receive => Forward::TxOnly(job.bytes),
    }
}

fn turn(plan: &Plan, client: Client, job: Job, host: &Host, device: &Testpmd, cores: Cores) -> Result<Slice> {
    let counted = || anyhow::Ok(moved(device.counters()?, job));
    let before = counted()?;
    let mut station = match client.connect(host, device, job, cores)? {
        Connected::Here(station) => station,
        Connected::There(process) => {
            within_patience("the device takes or gives no frame", || {
                std::thread::park_timeout(LOOK);
                Ok(counted()? > before)
            })?;
            std::thread::park_timeout(plan.warm_up);
            return watch(plan.slice, &process, device, &counted);
        }
    };
    // Connecting starts threads, which must not be pinned with this one.
    let pinned = Pinned::to(cores.client)?;
    let times = || Ok(Times { client: machine::thread_time(), port: Duration::ZERO, device: device.time()? });
    let (slice, all) = work(&mut *station, plan.warm_up, plan.slice, &times)?;
    drop((pinned, station));
    let seen = counted()?.checked_sub(before).context("the device's counter went back")?;
    let slack = if job.direction == Direction::Send { 0 } else { u64::from(job.depth) };
    let agrees = (all..=all + slack).contains(&seen);
    ensure!(agrees, "{all} frames were counted here and {seen} by the device");
    Ok(slice)
}

/// A slice of a client that works by itself.
fn watch(length: Duration, client: &Testpmd, device: &Testpmd, counted: &dyn Fn() -> Result<u64>) -> Result<Slice> {
    let times = || anyhow::Ok(Times { client: client.time()?, port: Duration::ZERO, device: device.time()? });
    // When the device said so: half-way between question and answer, if that can be told well enough.
    let look = || -> Result<_> {
        let asked = Instant::now();
        let frames = counted()?;
        let took = asked.elapsed();
        Ok((asked + took / 2, frames, took < WINDOW / 20))
    };
    let (mut windows, start, before) = (Windows::default(), Instant::now(), times()?);
    let mut last = look()?;
    while start.elapsed() < length || (windows.is_empty() && start.elapsed() < PATIENCE) {
        std::thread::park_timeout(WINDOW.saturating_sub(last.0.elapsed()));
        let next = look()?;
        let frames = next.1.checked_sub(last.1).context("the device's counter went back")?;
        if last.2 && next.2 && next.0 - last.0 >= WINDOW * 9 / 10 {
            windows.note(frames, next.0 - last.0);
        } else {
            windows.pass(frames);
        }
        last = next;
    }
    ensure!(!windows.is_empty(), "the device is too busy to say what it has counted");
    Ok(windows.slice(times()?.since(before), None, 0))
}
