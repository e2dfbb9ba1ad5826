//! What to measure: the whole matrix, or what the command line leaves of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::backend::Kind;
use crate::clients::Client;
use crate::engine::{Job, Mode, Op};

/// The block data path beside its peers
///
/// Every list may be given several times or with commas; what is not given is measured in full.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "block")]
pub struct Arguments {
    /// Clients to measure
    #[arg(long, value_enum, value_delimiter = ',')]
    pub client: Vec<Client>,
    /// Devices to measure on
    #[arg(long, value_enum, value_delimiter = ',')]
    pub backend: Vec<Kind>,
    /// Requests in flight
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=128))]
    pub depth: Vec<u32>,
    /// Operations
    #[arg(long, value_enum, value_delimiter = ',')]
    pub op: Vec<Op>,
    /// Ways to wait
    #[arg(long, value_enum, value_delimiter = ',')]
    pub mode: Vec<Mode>,
    /// Queues
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=2))]
    pub queues: Vec<u16>,
    /// Fewer rounds, shorter slices, random reads only: under a minute
    #[arg(long)]
    pub quick: bool,
    /// Rounds
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Length of a slice in milliseconds
    #[arg(long)]
    pub slice_ms: Option<u64>,
    /// Rates only: no memory, load and count figures
    #[arg(long)]
    pub rates_only: bool,
    /// Only the host's path by itself, each batch (`--depth`) for a second: for a profiler
    #[arg(long)]
    pub solo: bool,
    /// Where the list of measurements goes; the summary and the plot go beside it
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Another null device that knows the options of `cofferdam-null-blk`
    #[arg(long, hide = true)]
    pub null_program: Option<PathBuf>,
    /// What cargo gives every bench
    #[arg(long, hide = true)]
    pub bench: bool,
}

/// What is measured on one connection.
#[derive(Clone, Debug)]
pub struct Group {
    /// The device.
    pub backend: Kind,
    /// How clients wait.
    pub mode: Mode,
    /// Queues.
    pub queues: u16,
    /// Who, in the order of the first round.
    pub clients: Vec<Client>,
    /// What, one after the other.
    pub jobs: Vec<Job>,
}

/// The whole.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One after the other, in every round.
    pub groups: Vec<Group>,
    /// Rounds.
    pub rounds: usize,
    /// Before a slice is measured: qemu-storage-daemon takes some milliseconds to make up its mind about polling.
    pub warm_up: Duration,
    /// What is measured of one job in one round. Short, and often: what interrupts a slice spoils that one, and the median does not see it; two processes that poll
    /// are interrupted every few milliseconds on a machine that does anything else.
    pub slice: Duration,
}

const DEPTHS: [u32; 4] = [1, 4, 32, 128];
const IN_PROCESS: [Client; 4] = [Client::Cofferdam, Client::Blkio, Client::Bare, Client::Native];
const OVER_NBD: [Client; 2] = [Client::CofferdamNbd, Client::QsdNbd];

/// `all` without what is not in `wanted`, where that says something.
pub(crate) fn chosen<T: Copy + PartialEq>(all: &[T], wanted: &[T]) -> Vec<T> {
    all.iter().copied().filter(|item| wanted.is_empty() || wanted.contains(item)).collect()
}

impl Plan {
    /// What the arguments leave.
    #[must_use]
    pub fn new(arguments: &Arguments) -> Plan {
        let (rounds, warm_up_ms, slice_ms) = if arguments.quick { (24, 3, 5) } else { (60, 5, 20) };
        let jobs = |ops: &[Op], depths: &[u32]| {
            let mut jobs = Vec::new();
            for op in chosen(ops, &arguments.op) {
                jobs.extend(chosen(depths, &arguments.depth).into_iter().map(|depth| Job { op, depth }));
            }
            jobs
        };
        let mut groups = Vec::new();
        let mut add = |backend, mode, queues, clients: &[Client], jobs: Vec<Job>| {
            let wanted = arguments.mode.is_empty() || arguments.mode.contains(&mode);
            let wanted = wanted && (arguments.queues.is_empty() || arguments.queues.contains(&queues));
            let wanted = wanted && (arguments.backend.is_empty() || arguments.backend.contains(&backend));
            let clients: Vec<_> =
                chosen(clients, &arguments.client).into_iter().filter(|client| client.has(mode)).collect();
            if wanted && !clients.is_empty() && !jobs.is_empty() {
                groups.push(Group { backend, mode, queues, clients, jobs });
            }
        };
        for backend in [Kind::Null, Kind::Qsd] {
            for mode in [Mode::Poll, Mode::Event, Mode::Adaptive] {
                let mut random = jobs(&[Op::RandRead, Op::RandWrite], &DEPTHS);
                if arguments.quick && arguments.op.is_empty() {
                    random.retain(|job| job.op == Op::RandRead);
                } else {
                    random.extend(jobs(&[Op::SeqRead, Op::SeqWrite], &[1, 32]));
                }
                add(backend, mode, 1, &IN_PROCESS, random);
            }
            if !arguments.quick || !arguments.queues.is_empty() {
                // One thread of the client and one of the device serve both, on two cores: more threads would measure the scheduler.
                add(backend, Mode::Poll, 2, &IN_PROCESS, jobs(&[Op::RandRead], &[4, 32, 128]));
            }
        }
        let mut over_nbd = jobs(&[Op::RandRead], &[1, 32, 128]);
        if !arguments.quick {
            over_nbd.extend(jobs(&[Op::RandWrite], &[32]));
            over_nbd.extend(jobs(&[Op::SeqRead], &[32]));
        }
        add(Kind::Qsd, Mode::Event, 1, &OVER_NBD, over_nbd);
        let slice = Duration::from_millis(arguments.slice_ms.unwrap_or(slice_ms));
        Plan { groups, rounds: arguments.rounds.unwrap_or(rounds), warm_up: Duration::from_millis(warm_up_ms), slice }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(plan: &Plan) -> Duration {
        let slices: usize = plan.groups.iter().map(|group| group.clients.len() * group.jobs.len()).sum();
        (plan.slice + plan.warm_up) * (slices * plan.rounds) as u32
    }

    #[test]
    fn a_full_run_takes_under_a_quarter_of_an_hour_and_a_quick_one_under_a_minute() {
        // The rest of either is for connecting, loading, and what is not a rate.
        assert!(length(&Plan::new(&Arguments::default())) < Duration::from_secs(13 * 60));
        assert!(length(&Plan::new(&Arguments { quick: true, ..Arguments::default() })) < Duration::from_secs(40));
    }

    #[test]
    fn what_is_asked_for_is_all_that_is_measured() {
        let arguments = Arguments::parse_from(["block", "--client", "bare,blkio", "--depth", "32", "--mode", "poll"]);
        let plan = Plan::new(&arguments);
        assert!(!plan.groups.is_empty());
        for group in &plan.groups {
            assert_eq!(group.mode, Mode::Poll);
            assert_eq!(group.clients, [Client::Blkio, Client::Bare]);
            assert!(group.jobs.iter().all(|job| job.depth == 32));
        }
    }
}
