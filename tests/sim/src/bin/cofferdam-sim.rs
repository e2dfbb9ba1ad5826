//! A vhost-user backend of another class than block: net, console or entropy, with its other side in the same process. See
//! `--help`; block is `cofferdam-sim-blk`.
//!
//! Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot start or go on, 2 for a wrong command line, 3 when a scripted
//! fault made the device die.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use cofferdam_sim::{
    Behaviour, ConsoleProfile, EntropyProfile, NetProfile, PortProfile, Program, Rings, Rule, SimConsole, SimNet,
    SimRng, Transmit,
};

const AFTER_HELP: &str = "\
One line is printed when connections are taken: `ready SOCKET`. One front end is served after another.
SIGTERM and SIGINT end it and remove the socket.

Faults are EFFECT[@WHEN][,op=OP][,queue=N]:
  EFFECT  slow:TICKS  slow:A..B  reorder  fail:io  hang  freeze  die
          lie:NAME (used-id-unknown, buffers-zero, ...)  config:NAME (mtu-zero, ...)
  WHEN    always  nth=N  every=N  from=N  chance=P
  OP      transmit  receive  control  message  entropy
A tick is about a millisecond. A name that does not exist is answered with those that do.

Orders, one a line; what is none of them is named on standard error:
  open PORT  close PORT  size COLUMNS ROWS  plug PORT  unplug PORT
With orders there is room for one port more than there are at first.

Examples:
  cofferdam-sim rng --socket /tmp/rng.sock --fault lie:answer-short
  cofferdam-sim net --socket /tmp/net.sock --pairs 2 --mtu 9000
  cofferdam-sim net --socket /tmp/net.sock --transmit sink --generate 64 --poll
  cofferdam-sim console --socket /tmp/console.sock --port shell --port log";

/// A virtio device behind a vhost-user socket, which can be told to misbehave
#[derive(Parser)]
#[command(name = "cofferdam-sim", version, after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    class: Class,
}

#[derive(Subcommand)]
enum Class {
    /// An entropy device
    Rng {
        #[command(flatten)]
        common: Common,
    },
    /// A net device, whose peer sends every frame back
    Net {
        #[command(flatten)]
        common: Common,

        /// Bytes that frames may have behind their Ethernet header
        #[arg(long, value_name = "BYTES", default_value_t = 1500)]
        mtu: u16,

        /// Pairs of queues, 1 to 31
        #[arg(long, value_name = "N", default_value_t = 1)]
        pairs: u16,

        /// What is done with transmitted frames
        #[arg(long, value_name = "WHAT", default_value = "echo")]
        transmit: Peer,

        /// Fill every posted buffer with a frame of this length, as fast as it can be
        #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(14..))]
        generate: Option<u16>,

        /// Offer no mergeable buffers
        #[arg(long)]
        no_mergeable: bool,

        /// Offer neither checksum nor segmentation offloads
        #[arg(long)]
        no_offloads: bool,
    },
    /// A console, whose ports send back what they are sent
    Console {
        #[command(flatten)]
        common: Common,

        /// Columns of the terminal
        #[arg(long, value_name = "N", default_value_t = 80)]
        columns: u16,

        /// Rows of the terminal
        #[arg(long, value_name = "N", default_value_t = 25)]
        rows: u16,

        /// A further port with this name; may be given several times
        #[arg(long = "port", value_name = "NAME", conflicts_with = "no_multiport")]
        ports: Vec<String>,

        /// Port 0 alone, without control queues
        #[arg(long)]
        no_multiport: bool,

        /// Send bytes without end on port 0
        #[arg(long)]
        flood: bool,

        /// Take orders about the other side on standard input: see below
        #[arg(long)]
        orders: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Peer {
    /// Send them back
    Echo,
    /// Swallow them
    Sink,
}

#[derive(clap::Args)]
struct Common {
    /// Where to listen; a socket file that nobody listens on is taken over
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    /// Largest ring in entries, a power of two
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue_size: u16,

    /// Offer neither indirect descriptors nor event indices
    #[arg(long)]
    plain_ring: bool,

    /// Seed of everything that is drawn
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// A fault; may be given several times
    #[arg(long = "fault", value_name = "SPEC")]
    faults: Vec<Rule>,

    /// Look this long for more before sleeping, in microseconds
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "poll")]
    spin_us: u64,

    /// Never sleep: one core per queue
    #[arg(long)]
    poll: bool,
}

impl Common {
    fn rings(&self) -> Rings {
        Rings { size: self.queue_size, indirect: !self.plain_ring, event_idx: !self.plain_ring }
    }

    fn behaviour(&self) -> Behaviour {
        Behaviour {
            seed: self.seed,
            rules: self.faults.clone(),
            spin: if self.poll { Duration::MAX } else { Duration::from_micros(self.spin_us) },
            ..Behaviour::default()
        }
    }
}

const NAME: &str = "cofferdam-sim";

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let program = Program::begin()?;
    match arguments.class {
        Class::Rng { common } => {
            let sim = SimRng::new(EntropyProfile { rings: common.rings() }, common.behaviour())?;
            program.serve(&sim, &common.socket, NAME)
        }
        Class::Net { common, mtu, pairs, transmit, generate, no_mergeable, no_offloads } => {
            let profile = NetProfile {
                mtu: Some(mtu),
                checksum: !no_offloads,
                guest_checksum: !no_offloads,
                host_tso: !no_offloads,
                guest_tso: !no_offloads,
                mergeable: !no_mergeable,
                pairs,
                rings: common.rings(),
                ..NetProfile::default()
            };
            let sim = SimNet::new(profile, common.behaviour())?;
            sim.set_transmit(match transmit {
                Peer::Echo => Transmit::Echo,
                Peer::Sink => Transmit::Sink,
            });
            let frame = generate.map(|bytes| SimNet::test_frame(usize::from(bytes)));
            sim.set_generator(frame.as_deref());
            program.serve(&sim, &common.socket, NAME)
        }
        Class::Console { common, columns, rows, ports, no_multiport, flood, orders } => {
            let named = ports.into_iter().map(|name| PortProfile { name: Some(name), console: false });
            let ports: Vec<_> = std::iter::once(PortProfile { name: None, console: true }).chain(named).collect();
            let count = u16::try_from(ports.len()).unwrap_or(u16::MAX).saturating_add(orders.into());
            let profile = ConsoleProfile {
                size: Some((columns, rows)),
                multiport: !no_multiport,
                max_ports: count,
                ports,
                rings: common.rings(),
            };
            let sim = SimConsole::new(profile, common.behaviour())?;
            (0..count).for_each(|port| sim.set_echo(port, true));
            sim.set_flood(0, flood);
            if orders {
                let sim = sim.clone();
                std::thread::spawn(move || take_orders(&sim));
            }
            program.serve(&sim, &common.socket, NAME)
        }
    }
}

/// Does what standard input says until it ends.
fn take_orders(sim: &SimConsole) {
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<_> = line.split_whitespace().collect();
        let number = |at: usize| words.get(at).and_then(|word| word.parse().ok());
        match (words.first().copied(), number(1), number(2)) {
            (Some("open"), Some(port), None) => sim.set_open(port, true),
            (Some("close"), Some(port), None) => sim.set_open(port, false),
            (Some("size"), Some(columns), Some(rows)) => sim.resize(columns, rows),
            (Some("plug"), Some(port), None) => {
                sim.add_port(port, PortProfile { name: Some("plugged".into()), console: false });
                sim.set_echo(port, true);
            }
            (Some("unplug"), Some(port), None) => sim.remove_port(port),
            _ => eprintln!("{NAME}: no such order: {line}"),
        }
    }
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{NAME}: {error:#}");
            ExitCode::FAILURE
        }
    }
}
