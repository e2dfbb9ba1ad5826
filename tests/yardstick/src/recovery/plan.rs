//! What to measure: everything, or what the command line leaves of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::engine::Op;
use crate::plan::chosen;

/// What a driver that breaks down, or is exchanged, costs its clients
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "recovery")]
pub struct Arguments {
    /// What requests do: randread, randwrite
    #[arg(long, value_enum, value_delimiter = ',')]
    pub op: Vec<Op>,
    /// Crashes in a second: 1, 10
    #[arg(long, value_delimiter = ',')]
    pub crashes: Vec<u32>,
    /// Requests in flight
    #[arg(long, default_value_t = 32)]
    pub depth: u32,
    /// Seconds with crashes for each of the rates, and as many without
    #[arg(long)]
    pub seconds: Option<u32>,
    /// Less of everything: about a minute
    #[arg(long)]
    pub quick: bool,
    /// Where the list of measurements goes; the summary goes beside it
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// `cofferdam-null-blk`; found by itself when cargo runs this
    #[arg(long, hide = true)]
    pub null_program: Option<PathBuf>,
    /// What cargo gives every bench
    #[arg(long, hide = true)]
    pub bench: bool,
}

/// The whole.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What requests do, and how often the driver breaks down in a second of crashes.
    pub cells: Vec<(Op, u32)>,
    /// Requests in flight.
    pub depth: u32,
    /// Pairs of a quiet second and one with crashes.
    pub pairs: u32,
    /// Upgrades one after the other.
    pub upgrades: u32,
    /// From one to the next.
    pub upgrade_every: Duration,
    /// How long the machine is looked at while it has nothing else to do.
    pub noise: Duration,
}

impl Plan {
    /// What the arguments leave.
    #[must_use]
    pub fn new(arguments: &Arguments) -> Plan {
        let mut cells = Vec::new();
        for op in chosen(&[Op::RandRead, Op::RandWrite], &arguments.op) {
            cells.extend(chosen(&[1, 10], &arguments.crashes).into_iter().map(|rate| (op, rate)));
        }
        let quick = arguments.quick;
        Plan {
            cells,
            depth: arguments.depth,
            pairs: arguments.seconds.unwrap_or(if quick { 5 } else { 30 }),
            upgrades: if quick { 100 } else { 600 },
            upgrade_every: Duration::from_millis(100),
            noise: Duration::from_secs(if quick { 1 } else { 5 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_all_that_is_measured() {
        let arguments = Arguments::parse_from(["recovery", "--op", "randwrite", "--crashes", "10", "--seconds", "3"]);
        let plan = Plan::new(&arguments);
        assert_eq!((plan.cells, plan.pairs, plan.depth), (vec![(Op::RandWrite, 10)], 3, 32));
        assert_eq!(Plan::new(&Arguments { quick: true, ..Arguments::default() }).cells.len(), 4, "the aims need them");
    }
}
