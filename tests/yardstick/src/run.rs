//! Rounds: on one device, one client after the other, each in all its jobs, and again from the beginning.
//!
//! A device serves one client at a time, so each turn connects, works through the jobs, and leaves. What is compared is a round's own: ratios of the same round, seconds apart.
//! Whoever begins changes with the round.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::backend::{Backend, Kind};
use crate::clients::Client;
use crate::clients::cofferdam::Host;
use crate::engine::{Apart, Job, Loop, Mode, Slice, Times};
use crate::machine::{self, Cores, Pinned};
use crate::null::Pace;
use crate::plan::{Group, Plan};
use crate::stats::{Estimate, estimate};

/// One thing that was measured once per round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cell {
    /// The device.
    pub backend: Kind,
    /// How the client waits.
    pub mode: Mode,
    /// Queues.
    pub queues: u16,
    /// The load.
    pub job: Job,
    /// Who.
    pub client: Client,
}

/// What was measured, by cell and round.
pub struct Results<C = Cell> {
    /// The slice of each round; a round in which it was not measured has none.
    pub cells: BTreeMap<C, Vec<Option<Slice>>>,
    /// Distance of the two cores at the beginning of each round.
    pub distances_ns: Vec<f64>,
    /// Clients that this build does not have.
    pub absent: Vec<Client>,
    /// Turns that failed and were done again on a new device. To be looked into: none is expected.
    pub mishaps: Vec<String>,
}

impl<C> Default for Results<C> {
    fn default() -> Self {
        Results { cells: BTreeMap::new(), distances_ns: Vec::new(), absent: Vec::new(), mishaps: Vec::new() }
    }
}

impl<C: Ord> Results<C> {
    /// One number per round: NaN where it was not measured.
    #[must_use]
    pub fn series(&self, cell: &C, of: impl Fn(&Slice) -> f64) -> Vec<f64> {
        let slices = self.cells.get(cell).map(Vec::as_slice).unwrap_or_default();
        slices.iter().map(|slice| slice.as_ref().map_or(f64::NAN, &of)).collect()
    }
}

impl<C: Ord> Results<C> {
    /// Keeps what was measured of a cell in one of so many rounds.
    pub fn note(&mut self, cell: C, round: usize, rounds: usize, slice: Slice) {
        self.cells.entry(cell).or_insert_with(|| vec![None; rounds])[round] = Some(slice);
    }

    /// A turn has failed. What it measured is measured again: nothing is left out.
    ///
    /// # Errors
    /// The same error, when there were too many of them.
    pub fn mishap(&mut self, error: anyhow::Error) -> Result<()> {
        if self.mishaps.len() == MISHAPS {
            return Err(error);
        }
        eprintln!("{error:#}");
        self.mishaps.push(format!("{error:#}"));
        Ok(())
    }

    /// The ratio of two cells, round by round, of rounds in which both found the cores alike ([`Apart::is_like`]): NaN if there is none of those, so that no aim is taken for met; `None` when
    /// one of them was not measured.
    #[must_use]
    pub fn ratio(&self, over: &C, under: &C, of: impl Fn(&Slice) -> f64) -> Option<Estimate> {
        let both_measured = self.cells.contains_key(over) && self.cells.contains_key(under);
        both_measured.then(|| estimate(&self.ratios(over, under, of)))
    }

    /// The same as a list.
    fn ratios(&self, over: &C, under: &C, of: impl Fn(&Slice) -> f64) -> Vec<f64> {
        let (Some(over), Some(under)) = (self.cells.get(over), self.cells.get(under)) else { return Vec::new() };
        let both = over.iter().zip(under).filter_map(|(over, under)| over.as_ref().zip(under.as_ref()));
        let alike = both.filter(|(over, under)| match (over.apart, under.apart) {
            (Some(over), Some(under)) => over.is_like(under),
            _ => true,
        });
        alike.map(|(over, under)| of(over) / of(under)).filter(|ratio| ratio.is_finite()).collect()
    }

    /// What a reader of the figures should know, as lines.
    #[must_use]
    pub fn remarks(&self) -> String {
        let mut text = String::new();
        if let Some((near, far)) = self.distances()
            && far > 2.0 * near
        {
            text += &format!(
                "the cores moved during the run ({near:.0} to {far:.0} ns apart): rates mix two machines, ratios are of rounds in which both found the cores alike\n"
            );
        }
        for mishap in &self.mishaps {
            text += &format!("had to be done again: {mishap}\n");
        }
        for client in &self.absent {
            text += &format!("not in this build: {}\n", client.name());
        }
        text
    }

    /// The 10th and the 90th of a hundred distances of the cores: a core that was busy when it was asked says nothing.
    #[must_use]
    pub fn distances(&self) -> Option<(f64, f64)> {
        let mut sorted: Vec<f64> = self.distances_ns.iter().copied().filter(|distance| distance.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        Some((*sorted.get(sorted.len() / 10)?, *sorted.get(sorted.len() * 9 / 10)?))
    }
}

/// Thousands of requests per second.
#[must_use]
pub fn kiops(slice: &Slice) -> f64 {
    slice.requests as f64 / slice.elapsed.as_secs_f64() / 1e3
}

/// Microseconds per request.
#[must_use]
pub fn per_request_us(slice: &Slice, time: Duration) -> f64 {
    time.as_secs_f64() * 1e6 / (slice.requests.max(1)) as f64
}

/// Turns that may fail in one run before it is given up: qemu-storage-daemon 10 ends by an assertion of its own once in some thousand connections.
const MISHAPS: usize = 3;

/// The devices of one run, started when they are first needed.
struct Devices<'a> {
    null_program: &'a Path,
    running: Vec<((Kind, Pace, bool), Backend)>,
}

impl Devices<'_> {
    /// The device for clients that wait like this. Its core is its own, unless an NBD server and its client need both.
    fn get(&mut self, kind: Kind, mode: Mode, nbd: bool, cores: Cores) -> Result<&Backend> {
        let pace = if mode == Mode::Poll || kind == Kind::Qsd { Pace::Poll } else { Pace::Event };
        let key = (kind, pace, nbd);
        let at = match self.running.iter().position(|(known, _)| *known == key) {
            Some(at) => at,
            None => {
                self.running.push((key, Backend::start(kind, pace, 2, self.null_program)?));
                self.running.len() - 1
            }
        };
        let device = &self.running[at].1;
        if !nbd {
            device.pin(cores.device)?;
        }
        Ok(device)
    }

    /// Ends those of this kind; they are started again when they are needed.
    fn forget(&mut self, kind: Kind) {
        self.running.retain(|((known, _, _), _)| *known != kind);
    }
}

/// Measures in rounds: notes how far apart the cores are, has `turn` measure what there is once, and again.
///
/// # Errors
/// What `turn` says.
pub fn rounds<C: Ord>(
    count: usize,
    cores: Cores,
    mut turn: impl FnMut(usize, &mut Results<C>) -> Result<()>,
) -> Result<Results<C>> {
    let mut results = Results::default();
    let start = Instant::now();
    for round in 0..count {
        let distance = machine::distance_ns(cores)?;
        results.distances_ns.push(distance);
        turn(round, &mut results)?;
        eprintln!(
            "round {}/{count}: {distance:.0} ns between the cores, {:.0} s",
            round + 1,
            start.elapsed().as_secs_f64()
        );
    }
    Ok(results)
}

/// Measures everything in `plan`.
///
/// # Errors
/// When a device or a client fails: a bench that left something out in silence would flatter somebody.
pub fn measure(plan: &Plan, host: &Host, null_program: &Path, cores: Cores) -> Result<Results> {
    let mut devices = Devices { null_program, running: Vec::new() };
    rounds(plan.rounds, cores, |round, results| {
        for group in &plan.groups {
            let count = group.clients.len();
            for client in (0..count).map(|at| group.clients[(at + round) % count]) {
                loop {
                    let device = devices.get(group.backend, group.mode, client.is_nbd(), cores)?;
                    let Err(error) = turn(plan, group, client, host, device, cores, round, results) else { break };
                    let (name, backend, mode) = (client.name(), group.backend.name(), group.mode.name());
                    let threads = device.threads();
                    let error = error.context(format!("{name} on {backend}, {mode}, round {round}; device: {threads}"));
                    results.mishap(error)?;
                    devices.forget(group.backend);
                }
            }
        }
        Ok(())
    })
}

#[expect(clippy::too_many_arguments, reason = "one turn of one client in one group of one round")]
fn turn(
    plan: &Plan,
    group: &Group,
    client: Client,
    host: &Host,
    device: &Backend,
    cores: Cores,
    round: usize,
    results: &mut Results,
) -> Result<()> {
    let Some(mut engine) = client.connect(host, device, group.mode, group.queues)? else {
        if !results.absent.contains(&client) {
            results.absent.push(client);
        }
        return Ok(());
    };
    // Connecting starts threads, which must not be pinned with this one.
    let _pinned = if client.is_nbd() { None } else { Some(Pinned::to(cores.client)?) };
    let before = machine::distance_ns(cores)?;
    let mut slices = Vec::with_capacity(group.jobs.len());
    for job in &group.jobs {
        let mut work = Loop::new(&mut *engine, *job)?;
        slices.push((*job, work.run(&mut *engine, plan.warm_up, plan.slice, &|| times(device))?));
    }
    let apart = Some(Apart { before, after: machine::distance_ns(cores)? });
    for (job, slice) in slices {
        let cell = Cell { backend: group.backend, mode: group.mode, queues: group.queues, job, client };
        results.note(cell, round, plan.rounds, Slice { apart, ..slice });
    }
    Ok(())
}

/// Who has used the processor for how long.
///
/// # Errors
/// When the device has ended.
pub fn times(device: &Backend) -> Result<Times> {
    let client = machine::thread_time();
    Ok(Times { client, port: machine::own_time().saturating_sub(client), device: device.time()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rounds_in_which_both_found_the_cores_alike_are_compared() {
        let slice = |requests, before, after| Slice {
            requests,
            elapsed: Duration::from_secs(1),
            apart: Some(Apart { before, after }),
            ..Slice::default()
        };
        let frames = |slice: &Slice| slice.requests as f64;
        let mut results = Results::default();
        let of = |over: Slice, under: Slice, round: usize, results: &mut Results<&str>| {
            results.note("over", round, 4, over);
            results.note("under", round, 4, under);
        };
        of(slice(300, 40.0, 45.0), slice(100, 50.0, 39.0), 0, &mut results);
        of(slice(900, 40.0, 45.0), slice(100, 500.0, 510.0), 1, &mut results);
        of(slice(900, 40.0, 500.0), slice(100, 41.0, 41.0), 2, &mut results);
        of(slice(500, 510.0, 480.0), slice(100, 600.0, 400.0), 3, &mut results);
        assert_eq!(results.ratios(&"over", &"under", frames), [3.0, 5.0]);
        assert_eq!(results.ratio(&"over", &"under", frames).map(|ratio| ratio.median), Some(4.0));
        let mut moved = Results::default();
        of(slice(900, 40.0, 45.0), slice(100, 500.0, 510.0), 1, &mut moved);
        assert!(moved.ratio(&"over", &"under", frames).is_some_and(|ratio| ratio.median.is_nan()), "not compared");
        assert_eq!(moved.ratio(&"over", &"another", frames), None);
    }
}
