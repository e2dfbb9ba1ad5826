//! One cell of the matrix, from beginning to end.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_manager::{Certificate, Manager};
use serde::{Deserialize, Serialize};

use crate::client::Tally;
use crate::growth::Holdings;
use crate::loads::{self, FailingLoad};
use crate::neighbour::Neighbour;
use crate::plan::{Entry, Plan, Retired, Situation, plan};
use crate::scene::Scene;
use crate::stage::{self, Stage};

/// How often a cell may be run until one round has left nothing behind; see `growth`.
const ROUNDS: usize = 3;
/// How long what ends by itself (threads of helpers, closed pipes) may take.
const SETTLE: Duration = Duration::from_millis(700);
/// How much longer than its bound a cell is watched, so that the message can say what happened.
const BEYOND: Duration = Duration::from_secs(5);

/// What is printed of a cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// `entry x situation`.
    pub name: String,
    /// From the entry to the end, in milliseconds.
    pub took_ms: f64,
    /// What was allowed.
    pub bound_ms: f64,
    /// How it ended.
    pub outcome: String,
    /// Bytes retired on purpose.
    pub leaked_bytes: u64,
    /// Requests in flight at the close, completed, failed.
    pub requests: [u64; 3],
    /// The longest round of the healthy binding beside it, in milliseconds.
    pub neighbour_ms: f64,
    /// How often it was run until nothing had grown.
    pub rounds: usize,
}

/// What one round came to.
pub(crate) struct Round {
    pub(crate) took: Duration,
    pub(crate) bound: Duration,
    pub(crate) outcome: String,
    pub(crate) leaked_bytes: u64,
    pub(crate) requests: [u64; 3],
}

/// A cell.
#[derive(Clone, Copy, Debug)]
pub enum Cell {
    /// An entry in a situation.
    Way(Entry, Situation),
    /// A load that fails.
    Load(FailingLoad),
}

impl Cell {
    /// All that make sense.
    #[must_use]
    pub fn all() -> Vec<Cell> {
        let pairs = Entry::ALL.iter().flat_map(|entry| Situation::ALL.map(|situation| (*entry, situation)));
        let ways = pairs.filter(|(entry, situation)| plan(*entry, *situation).is_ok());
        ways.map(|(entry, situation)| Cell::Way(entry, situation))
            .chain(FailingLoad::all().into_iter().map(Cell::Load))
            .collect()
    }

    /// `entry x situation`.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Cell::Way(entry, situation) => format!("{entry} x {situation}"),
            Cell::Load(load) => load.name(),
        }
    }

    /// Runs it beside a healthy binding, until a round has left nothing behind.
    pub fn run(&self) -> anyhow::Result<Report> {
        let manager = stage::manager()?;
        let neighbour = Neighbour::start(&manager)?;
        // What is made once is made before the first look: pools of threads, and stacks for as many threads as there are at once.
        ways(&manager, Entry::Unload, Situation::Depth32).context("warming up")?;
        if matches!(self, Cell::Way(Entry::Shutdown, _)) {
            ways(&stage::manager()?, Entry::Shutdown, Situation::Idle).context("warming up")?;
        }
        neighbour.goes_on(20)?;
        let mut before = Holdings::of("self");
        let mut grown = Vec::new();
        for rounds in 1..=ROUNDS {
            let round = match self {
                // A shutdown takes all bindings of its manager: this one has a manager of its own.
                Cell::Way(Entry::Shutdown, situation) => ways(&stage::manager()?, Entry::Shutdown, *situation)?,
                Cell::Way(entry, situation) => ways(&manager, *entry, *situation)?,
                Cell::Load(load) => loads::fails(&manager, *load)?,
            };
            neighbour.goes_on(3)?;
            ensure!(round.took <= round.bound, "took {:?}, {:?} are allowed", round.took, round.bound);
            grown = settle(&before, round.leaked_bytes);
            if grown.is_empty() {
                let neighbour = neighbour.end()?;
                return Ok(self.report(&round, neighbour, rounds));
            }
            eprintln!("round {rounds}: {}", grown.join("; "));
            before = Holdings::of("self");
        }
        anyhow::bail!("in each of {ROUNDS} rounds there was more afterwards: {}", grown.join("; "))
    }

    fn report(&self, round: &Round, neighbour: Duration, rounds: usize) -> Report {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        Report {
            name: self.name(),
            took_ms: ms(round.took),
            bound_ms: ms(round.bound),
            outcome: round.outcome.clone(),
            leaked_bytes: round.leaked_bytes,
            requests: round.requests,
            neighbour_ms: ms(neighbour),
            rounds,
        }
    }
}

/// Looks until nothing is left that was not there before, for at most [`SETTLE`]; what is left.
fn settle(before: &Holdings, retired_bytes: u64) -> Vec<String> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let grown = Holdings::of("self").growth(before, retired_bytes);
        if grown.is_empty() || Instant::now() >= deadline {
            return grown;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// One round of an entry in a situation.
fn ways(manager: &Manager, entry: Entry, situation: Situation) -> anyhow::Result<Round> {
    let plan = plan(entry, situation).map_err(|why| anyhow::anyhow!(why))?;
    let mut stage = Stage::set(manager, entry, situation).context("setting the stage")?;
    let scene = Scene::set(&mut stage, situation).context("bringing the situation about")?;
    let (drained_first, took) = stage.enter(entry, situation, plan.bound + BEYOND)?;
    ensure!(drained_first == plan.drains_first, "'still draining' first: {drained_first}");
    let mut certificate = stage.certificate()?;
    // What the test keeps open is found, and is all that is found.
    let own = stage.own_descriptors();
    let found = certificate.residual.fds;
    certificate.residual.fds = found.checked_sub(own).with_context(|| format!("{found} found of {own} descriptors"))?;
    let tally = scene.end(finish_entry(&mut stage)?)?;
    certificate_is_right(&certificate, &plan, tally)?;
    let first = if drained_first { "draining, then " } else { "" };
    Ok(Round {
        took,
        bound: plan.bound,
        outcome: format!("{first}{}", serde_json::to_value(certificate.outcome)?.as_str().unwrap_or_default()),
        leaked_bytes: certificate.leaked.bytes,
        requests: [certificate.requests_at_close, certificate.requests_completed, certificate.requests_failed],
    })
}

fn finish_entry(stage: &mut Stage) -> anyhow::Result<Tally> {
    stage.entry.collect(Duration::ZERO);
    Ok(stage.entry.tally())
}

fn certificate_is_right(certificate: &Certificate, plan: &Plan, tally: Tally) -> anyhow::Result<()> {
    let c = certificate;
    ensure!(c.outcome == plan.outcome, "{:?} instead of {:?}: {c:?}", c.outcome, plan.outcome);
    ensure!(c.residual.is_zero(), "left: {:?} in {c:?}", c.residual);
    let retired = c.leaked.bytes > 0;
    match plan.retired {
        Retired::Nothing => ensure!(!retired && c.leaked.reason.is_empty(), "retired without need: {c:?}"),
        Retired::Memory => ensure!(retired, "freed while the device may act: {c:?}"),
        Retired::Either => {}
    }
    ensure!(!retired || !c.leaked.reason.is_empty(), "retired without a reason: {c:?}");
    ensure!(tally.strange == 0, "answered twice: {tally:?}");
    ensure!(tally.wrong == 0, "wrong data: {tally:?}");
    let abandoned = c.requests_at_close.saturating_sub(c.requests_completed + c.requests_failed);
    if retired {
        ensure!(tally.unanswered() <= abandoned, "{tally:?}, {abandoned} abandoned: {c:?}");
    } else {
        ensure!(tally.unanswered() == 0, "never answered: {tally:?}: {c:?}");
        ensure!(abandoned == 0, "abandoned although the device is silent: {c:?}");
    }
    ensure!(!c.stages.is_empty(), "{c:?}");
    Ok(())
}
