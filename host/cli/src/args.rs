//! The command line. Exit codes: 0 done, 1 failed, 2 usage, 3 no such thing, 4 deadline passed and still draining.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 no such thing, 4 deadline passed and still draining.
Data goes to stdout, diagnostics to stderr. COFFERDAM_LOG sets the log filter (default: info for daemon and run, warn otherwise).

Examples:
  cofferdam run virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:/run/disk.sock
  cofferdam daemon &
  cofferdam load virtio-blk.wasm --device vhost-user:/run/blk.sock --port nbd:127.0.0.1:10809 --name disk0
  cofferdam ls
  cofferdam unload disk0 --deadline 5s";

/// Device drivers as WebAssembly components: loaded, bound to real devices, and taken out safely while they are in use.
#[derive(Parser)]
#[command(name = "cofferdam", version, after_help = AFTER_HELP, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Load a driver, serve it, and unload it on Ctrl-C, all in one foreground process without a daemon.
    ///
    /// The first Ctrl-C (or SIGTERM) unloads; a second one forces. The certificate is printed to stdout.
    Run(RunArgs),
    /// Serve bindings until SIGTERM; every other command is its client.
    Daemon(DaemonArgs),
    /// Join a driver and a device in the daemon.
    Load(LoadArgs),
    /// List bindings: state, driver, device, handles, requests in flight, calls per core.
    Ls(LsArgs),
    /// Show what a driver asks for (a file), or what a binding is doing (a name).
    Inspect(InspectArgs),
    /// Take a binding out while it is in use, and print the certificate of what was revoked, drained and left.
    ///
    /// With the deadline passed the exit code is 4, the binding admits nothing any more and stays `draining`; unload again to go on.
    Unload(UnloadArgs),
}

#[derive(Args)]
pub(crate) struct SocketArg {
    /// The daemon's control socket [default: $XDG_RUNTIME_DIR/cofferdam.sock, or /run/cofferdam.sock for root].
    #[arg(long, env = "COFFERDAM_SOCKET", value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
}

/// What `run` and `load` have in common.
#[derive(Args, Clone)]
pub(crate) struct BindArgs {
    /// The driver, a component file.
    #[arg(value_name = "DRIVER.wasm")]
    pub(crate) driver: PathBuf,
    /// The device: vhost-user:/path.sock
    #[arg(long, value_name = "ADDR")]
    pub(crate) device: String,
    /// Where to serve it; may be given more than once: nbd:/path.sock, nbd:127.0.0.1:10809
    #[arg(long = "port", value_name = "PORT")]
    pub(crate) ports: Vec<String>,
    /// Name of the binding [default: the driver's file name and a number].
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Queues to use, each with a driver instance of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: u16,
    /// Let the driver use more than its device: wasi:clocks, wasi:random, wasi:cli, wasi:filesystem=DIR. May be given more than once.
    #[arg(long = "allow", value_name = "WHAT")]
    pub(crate) allow: Vec<String>,
    /// Memory of one driver instance, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) memory_mib: u32,
    /// Longest guest call, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    pub(crate) call_deadline_ms: u32,
    /// Buffer memory shared with the device, in MiB; taken when touched.
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(4..=2048))]
    pub(crate) arena_mib: u32,
    /// Largest ring to ask the device for, in entries; a backend that takes less refuses the load.
    #[arg(long = "ring", value_name = "N", default_value_t = 256, value_parser = parse_ring)]
    pub(crate) ring_entries: u16,
    /// Requests in flight per queue.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_535))]
    pub(crate) requests: u32,
    /// Open handles of the binding.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) handles: u32,
}

#[derive(Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) bind: BindArgs,
    /// Print one JSON document per event instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct DaemonArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArg,
}

#[derive(Args)]
pub(crate) struct LoadArgs {
    #[command(flatten)]
    pub(crate) bind: BindArgs,
    /// Do not count calls: the cheapest path, and the driver stays until the daemon stops.
    #[arg(long)]
    pub(crate) pinned: bool,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct LsArgs {
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// A component file, or the name of a binding.
    #[arg(value_name = "DRIVER.wasm|NAME")]
    pub(crate) what: String,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct UnloadArgs {
    /// The binding.
    pub(crate) name: String,
    /// How long to wait for what is in flight: 500ms, 5s, 1m.
    #[arg(long, default_value = "5s", value_parser = parse_duration)]
    pub(crate) deadline: Duration,
    /// Interrupt the driver and cut the wait short. What the device may still write is retired, not freed.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print the certificate as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// `500ms`, `5s`, `1m`, or plain seconds; up to a day.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "a number and a unit: 500ms, 5s, 1m".to_owned())?;
    let millis = match unit {
        "ms" => Some(number),
        "s" | "" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => return Err(format!("unknown unit '{unit}': ms, s or m")),
    };
    millis.filter(|millis| *millis <= 86_400_000).map(Duration::from_millis).ok_or_else(|| "at most a day".to_owned())
}

/// Ring sizes are powers of two up to 32,768 (virtio 1.2, section 2.7).
fn parse_ring(text: &str) -> Result<u16, String> {
    let entries: u16 = text.parse().map_err(|_| "a number of entries".to_owned())?;
    if entries.is_power_of_two() && entries >= 2 {
        Ok(entries)
    } else {
        Err("a power of two from 2 to 32768".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_a_bound() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("5"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in ["", "s", "5h", "-1s", "99999999999999999999s", "2000m"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
