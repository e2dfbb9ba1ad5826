//! A vhost-user-blk backend for demonstrations, tests and benches: the sim behind a socket. See `--help`.
//!
//! Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot start or go on, 2 for a wrong command line, 3 when a scripted
//! fault made the device die.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use cofferdam_sim::{Options, Profile, Program, Rule, Sim, Storage};

const AFTER_HELP: &str = "\
One line is printed when connections are taken: `ready SOCKET`. One front end is served after another.
SIGTERM and SIGINT end it and remove the socket.

Faults are EFFECT[@WHEN][,op=OP][,queue=N]:
  EFFECT  slow:TICKS  slow:A..B  reorder  fail:io  fail:unsupported  hang  freeze  die  power-cut
          lie:NAME (used-id-unknown, length-long, ...)  config:NAME (capacity-zero, ...)
  WHEN    always  nth=N  every=N  from=N  chance=P
  OP      read  write  flush  get-id  discard  write-zeroes
A tick is about a millisecond. A name that does not exist is answered with those that do.

Examples:
  cofferdam-sim-blk --socket /tmp/blk.sock --memory 64M
  cofferdam-sim-blk --socket /tmp/blk.sock --file disk.img --read-only
  cofferdam-sim-blk --socket /tmp/blk.sock --null 1G --queues 2 --poll
  cofferdam-sim-blk --socket /tmp/blk.sock --memory 64M --seed 7 --fault fail:io@chance=0.01,op=read --fault reorder";

/// A virtio-blk device behind a vhost-user socket, which can be told to misbehave
#[derive(Parser)]
#[command(name = "cofferdam-sim-blk", version, after_help = AFTER_HELP)]
struct Arguments {
    /// Where to listen; a socket file that nobody listens on is taken over
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,

    #[command(flatten)]
    medium: Medium,

    /// Number of queues, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,

    /// Largest ring in entries, a power of two
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue_size: u16,

    /// Offer neither indirect descriptors nor event indices
    #[arg(long)]
    plain_ring: bool,

    /// Logical block size in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    block_size: u32,

    /// Refuse writes, and say so
    #[arg(long)]
    read_only: bool,

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

/// Where the bytes are; 64 MiB in memory when nothing is said.
#[derive(clap::Args)]
#[group(required = false, multiple = false)]
struct Medium {
    /// Serve this file
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,

    /// Serve memory of this size, such as 64M or 1G
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    memory: Option<u64>,

    /// Answer at once without touching payload, claiming this size
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    null: Option<u64>,
}

/// Reads a size with an optional binary unit.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text:?} is not a number of bytes, such as 4096, 64M or 1G"))?;
    // An i64 is what a file offset can be.
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes <= i64::MAX as u64)
        .ok_or_else(|| format!("{text} is too large"))
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let program = Program::begin()?;
    let storage = match (arguments.medium.file, arguments.medium.memory, arguments.medium.null) {
        (Some(path), _, _) => Storage::File(path),
        (_, _, Some(bytes)) => Storage::Null(bytes),
        (_, bytes, _) => Storage::Memory(bytes.unwrap_or(64 << 20)),
    };
    let sim = Sim::new(Options {
        profile: Profile {
            queues: arguments.queues,
            queue_size: arguments.queue_size,
            block_bytes: Some(arguments.block_size),
            read_only: arguments.read_only,
            indirect: !arguments.plain_ring,
            event_idx: !arguments.plain_ring,
            ..Profile::default()
        },
        storage,
        seed: arguments.seed,
        rules: arguments.faults,
        spin: if arguments.poll { Duration::MAX } else { Duration::from_micros(arguments.spin_us) },
        ..Options::default()
    })?;
    program.serve(&sim, &arguments.socket, "cofferdam-sim-blk")
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cofferdam-sim-blk: {error:#}");
            ExitCode::FAILURE
        }
    }
}
