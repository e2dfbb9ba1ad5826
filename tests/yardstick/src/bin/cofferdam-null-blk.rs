//! The null device of the block bench as a process: see `cofferdam_yardstick::null`.

use std::path::PathBuf;

use clap::Parser;
use cofferdam_yardstick::null::{NullDisk, Pace, serve};

/// A vhost-user-blk device that answers at once
#[derive(Parser)]
struct Arguments {
    /// Where to listen
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Claimed size
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 30)]
    capacity: u64,
    /// Queues
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: u16,
    /// How it waits
    #[arg(long, value_enum, default_value_t = Pace::Poll)]
    pace: Pace,
}

fn main() -> anyhow::Result<()> {
    // It is of no use without the bench that started it, which may be killed.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let Arguments { socket, capacity, queues, pace } = Arguments::parse();
    serve(&socket, NullDisk { capacity_bytes: capacity, queues, pace })?;
    Ok(())
}
