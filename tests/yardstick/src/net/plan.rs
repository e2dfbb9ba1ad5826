//! What to measure: everything, or what the command line leaves of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use super::clients::Client;
use super::job::{Direction, Job};
use crate::plan::chosen;

/// The net data path beside its peers
///
/// Every list may be given several times or with commas; what is not given is measured in full.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "net")]
pub struct Arguments {
    /// Clients to measure
    #[arg(long, value_enum, value_delimiter = ',')]
    pub client: Vec<Client>,
    /// Ways that frames go
    #[arg(long, value_enum, value_delimiter = ',')]
    pub direction: Vec<Direction>,
    /// Bytes of a frame, with its link header: 64, 1500
    #[arg(long, value_delimiter = ',')]
    pub bytes: Vec<u32>,
    /// Frames in flight: 32, 64, 128
    #[arg(long, value_delimiter = ',')]
    pub depth: Vec<u16>,
    /// Fewer rounds, 64 frames in flight only: about a minute
    #[arg(long)]
    pub quick: bool,
    /// Rounds
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Length of a slice in milliseconds
    #[arg(long)]
    pub slice_ms: Option<u64>,
    /// Only the host's path by itself, each batch (`--depth`) for a second: for a profiler
    #[arg(long)]
    pub solo: bool,
    /// Where the list of measurements goes; the summary goes beside it
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// What cargo gives every bench
    #[arg(long, hide = true)]
    pub bench: bool,
}

/// The whole.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One after the other, in every round.
    pub jobs: Vec<Job>,
    /// Who, in the order of the first round.
    pub clients: Vec<Client>,
    /// Rounds.
    pub rounds: usize,
    /// Before a slice is measured.
    pub warm_up: Duration,
    /// What is measured of one job in one round, by windows ([`super::job::Windows`]).
    pub slice: Duration,
}

const CLIENTS: [Client; 3] = [Client::Cofferdam, Client::Dpdk, Client::Bare];
const DIRECTIONS: [Direction; 2] = [Direction::Send, Direction::Receive];
const BYTES: [u32; 2] = [64, 1500];
const DEPTHS: [u16; 3] = [32, 64, 128];
/// The depth of the aims.
pub const DEPTH: u16 = 64;

impl Plan {
    /// What the arguments leave.
    #[must_use]
    pub fn new(arguments: &Arguments) -> Plan {
        let quick = arguments.quick;
        let (rounds, slice_ms) = if quick { (8, 100) } else { (24, 200) };
        let depths: &[u16] = if quick && arguments.depth.is_empty() { &[DEPTH] } else { &DEPTHS };
        let mut jobs = Vec::new();
        for direction in chosen(&DIRECTIONS, &arguments.direction) {
            for bytes in chosen(&BYTES, &arguments.bytes) {
                let job = |depth| Job { direction, bytes, depth };
                jobs.extend(chosen(depths, &arguments.depth).into_iter().map(job));
            }
        }
        Plan {
            jobs,
            clients: chosen(&CLIENTS, &arguments.client),
            rounds: arguments.rounds.unwrap_or(rounds),
            warm_up: Duration::from_millis(10),
            slice: Duration::from_millis(arguments.slice_ms.unwrap_or(slice_ms)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_all_that_is_measured() {
        let arguments = Arguments::parse_from(["net", "--client", "bare", "--bytes", "1500", "--direction", "receive"]);
        let plan = Plan::new(&arguments);
        assert_eq!(plan.clients, [Client::Bare]);
        let job = |depth| Job { direction: Direction::Receive, bytes: 1500, depth };
        assert_eq!(plan.jobs, DEPTHS.map(job));
        let quick = Plan::new(&Arguments { quick: true, ..Arguments::default() });
        assert_eq!(quick.jobs.len(), 4);
        assert!(quick.jobs.iter().all(|job| job.depth == DEPTH) && quick.clients.len() == 3, "the aims need them");
    }
}
