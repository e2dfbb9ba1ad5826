//! The command line. Exit codes: 0 done, 1 failed, 2 usage, 3 no such thing, 4 deadline passed and still draining.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use cofferdam_manager::MAX_RESTARTS;

use crate::control::{LONGEST_HOLD, LONGEST_REVOKE, LONGEST_TAKEOVER, mapped_handles, mapped_mib};
use crate::help;

/// Device drivers as WebAssembly components: loaded, bound to real devices, and taken out safely while they are in use.
#[derive(Parser)]
#[command(name = "cofferdam", version, after_help = help::ALL, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Load a driver, serve it, and unload it on Ctrl-C, all in one foreground process without a daemon.
    ///
    /// The first Ctrl-C (or SIGTERM) unloads; a second one forces. The certificate is printed to stdout.
    #[command(after_help = help::RUN)]
    Run(RunArgs),
    /// Serve bindings until SIGTERM; every other command is its client.
    #[command(after_help = help::DAEMON)]
    Daemon(DaemonArgs),
    /// Join a driver and a device in the daemon.
    #[command(after_help = help::LOAD)]
    Load(LoadArgs),
    /// List bindings: state, driver, device, handles, requests in flight, calls per core.
    ///
    /// A binding that has left is listed as long as memory of it is retired, which is until the daemon ends.
    #[command(after_help = help::LS)]
    Ls(LsArgs),
    /// Show what a driver asks for (a file), or what a binding is doing (a name).
    #[command(after_help = help::INSPECT)]
    Inspect(InspectArgs),
    /// List who holds a binding: its handles with port, peer, lane, age and requests.
    #[command(after_help = help::HANDLES)]
    Handles(NameArgs),
    /// Take one handle away from its client, while the others are served on.
    ///
    /// The client is told at once; the command waits until what the handle had in flight is answered, at most for the deadline.
    #[command(after_help = help::REVOKE)]
    Revoke(RevokeArgs),
    /// Explain what a binding does or waits for, or how it ended.
    #[command(after_help = help::WHY)]
    Why(NameArgs),
    /// Show what happened, in order: every change of a binding's state with its cause.
    #[command(after_help = help::EVENTS)]
    Events(EventsArgs),
    /// Serve a binding at one more address, or at one less.
    #[command(after_help = help::PORT, disable_help_subcommand = true)]
    Port(PortArgs),
    /// Take a binding out while it is in use, and print the certificate of what was revoked, drained and left.
    ///
    /// With the deadline passed the exit code is 4, the binding admits nothing any more and stays `draining`; unload again to go on.
    #[command(after_help = help::UNLOAD)]
    Unload(UnloadArgs),
    /// Put another version of its driver in the place of the one that serves, under its clients.
    ///
    /// What goes wrong brings the old one back: a refusal at once; a crash, or calls that take much longer than before, as long as the probation lasts.
    #[command(after_help = help::UPGRADE)]
    Upgrade(UpgradeArgs),
    /// Put the driver back that was there before the last upgrade.
    #[command(after_help = help::ROLLBACK)]
    Rollback(RollbackArgs),
    /// Try once more with a binding that is 'failed' because its driver broke down too often. Its clients keep their handles.
    #[command(after_help = help::RESTART)]
    Restart(NameArgs),
    /// Show how a binding's driver broke down: the last 16 times, with the guest's stack and its last calls.
    #[command(after_help = help::CRASHES)]
    Crashes(NameArgs),
    /// List PCI functions: what they are, who has them, and whether uio or vfio can have them. Needs no daemon.
    #[command(after_help = help::DEVICES)]
    Devices(LsArgs),
    /// Take a PCI function from the kernel's driver and hand it to uio or vfio. Needs no daemon.
    ///
    /// A load does this by itself and undoes it; what is bound by hand stays bound until 'unbind'.
    #[command(after_help = help::BIND)]
    Bind(DeviceBindArgs),
    /// Give a PCI function back to the kernel driver that it came from. Needs no daemon, and works after a host was killed.
    #[command(after_help = help::UNBIND)]
    Unbind(UnbindArgs),
    /// Say what this machine can do, and the command that mends what it cannot.
    #[command(after_help = help::DOCTOR)]
    Doctor(DoctorArgs),
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
    /// The driver, a component file [default: the one that lists the device's id, of those in --drivers; vhost-user devices have none to tell].
    #[arg(value_name = "DRIVER.wasm")]
    pub(crate) driver: Option<PathBuf>,
    /// Where to look for a driver [default: ../lib/cofferdam/drivers or ../drivers beside the folder of the program, else /usr/lib/cofferdam/drivers].
    #[arg(long, env = "COFFERDAM_DRIVERS", value_name = "DIR")]
    pub(crate) drivers: Option<PathBuf>,
    /// The device: vhost-user:/path.sock, or a PCI function (pci:0000:00:04.0, see 'cofferdam devices').
    #[arg(long, value_name = "ADDR")]
    pub(crate) device: String,
    /// Where to serve it; may be given more than once: a disk at nbd:/path.sock, nbd:127.0.0.1:10809, or data:/path.sock for zero-copy clients; an entropy device at fifo:/path or entropy-pool; a console at pty:/link or stdio; a network device at tap:NAME. See 'cofferdam port --help'.
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
    /// Hand a PCI function over to uio_pci_generic: any machine, but nothing keeps the device's DMA in bounds except the host's own care.
    #[arg(long, conflicts_with = "vfio")]
    pub(crate) uio: bool,
    /// Hand a PCI function over to vfio-pci: an IOMMU keeps the device to the binding's memory [default, where there is an IOMMU].
    #[arg(long)]
    pub(crate) vfio: bool,
    /// Let the driver have its device reach any memory of this machine. Only for a driver that hands addresses to a device without an IOMMU, and that you trust as you do
    /// the kernel; recorded, and shown by 'ls'.
    #[arg(long)]
    pub(crate) trust_dma: bool,
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
    /// How often a driver that breaks down is replaced while its clients wait: COUNT/TIME, or 'never': then the binding leaves with the first time. Past the limit it is
    /// 'failed', and clients get errors until 'cofferdam restart'.
    #[arg(long, value_name = "COUNT/TIME", default_value = "5/30m", value_parser = parse_restarts)]
    pub(crate) restarts: Restarts,
    /// The wait before the second restart within that time; the first is at once, and each further one waits twice as long, 10 s at most.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = parse_short_duration)]
    pub(crate) restart_wait: Duration,
    /// Bring a device back that is lost (its backend died, it was unplugged) or breaks the rules: clients wait for it, at most so long (30s if that is not said). It has to be the same.
    #[arg(long, value_name = "WAIT", num_args = 0..=1, require_equals = true, default_missing_value = "30s", value_parser = parse_duration)]
    pub(crate) reconnect: Option<Duration>,
    /// Open handles of the binding.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) handles: u32,
    /// Clients that may share memory with the device for zero-copy I/O (data ports).
    #[arg(long, value_name = "N", default_value_t = mapped_handles(), value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub(crate) mapped_handles: u32,
    /// Memory that all of them may share with it together, in MiB (each at most 4096); taken when touched.
    #[arg(long, value_name = "MIB", default_value_t = mapped_mib(), value_parser = clap::value_parser!(u32).range(0..=65_536))]
    pub(crate) mapped_mib: u32,
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
    /// Take over from the daemon that serves the socket: its bindings, with the devices, the memory and the connections of clients, who wait for a moment and see no error.
    /// That daemon then ends. If anything is in the way it serves on.
    #[arg(long)]
    pub(crate) takeover: bool,
    /// How long clients may be held for that: 10ms to 10s.
    #[arg(long, value_name = "TIME", default_value = "2s", requires = "takeover", value_parser = parse_takeover_deadline)]
    pub(crate) deadline: Duration,
    /// Print JSON: one document, when everything is taken over.
    #[arg(long, requires = "takeover")]
    pub(crate) json: bool,
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
pub(crate) struct UpgradeArgs {
    /// The binding.
    pub(crate) name: String,
    /// The new driver, a component file.
    #[arg(value_name = "NEW.wasm")]
    pub(crate) driver: PathBuf,
    /// How long clients may be held, at most 5s; after that the old driver goes on.
    #[arg(long, default_value = "1s", value_parser = parse_hold)]
    pub(crate) deadline: Duration,
    /// How long the old driver comes back by itself.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub(crate) probation: Duration,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct RollbackArgs {
    /// The binding.
    pub(crate) name: String,
    /// How long clients may be held, at most 5s.
    #[arg(long, default_value = "1s", value_parser = parse_hold)]
    pub(crate) deadline: Duration,
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
    /// While it waits, and when it gives up, say on stderr what it waits for.
    #[arg(long)]
    pub(crate) explain: bool,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print the certificate as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `handles` and `why` ask for.
#[derive(Args)]
pub(crate) struct NameArgs {
    /// The binding.
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct RevokeArgs {
    /// The binding.
    pub(crate) name: String,
    /// The handle's number, as `handles` shows it.
    pub(crate) handle: u64,
    /// How long to wait for what it has in flight, at most a minute: 500ms, 5s.
    #[arg(long, default_value = "5s", value_parser = parse_short_duration)]
    pub(crate) deadline: Duration,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens from now on, until Ctrl-C or the daemon's end.
    #[arg(long)]
    pub(crate) follow: bool,
    /// Begin with this number [default: the oldest that is kept].
    #[arg(long, value_name = "SEQ")]
    pub(crate) since: Option<u64>,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print one JSON document a line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct PortArgs {
    #[command(subcommand)]
    pub(crate) command: PortCommand,
}

#[derive(Subcommand)]
pub(crate) enum PortCommand {
    /// Serve a binding at one more address.
    #[command(after_help = help::PORT)]
    Attach(PortChangeArgs),
    /// Stop serving a binding at an address. Its clients there are severed, the binding and its other ports serve on.
    #[command(after_help = help::PORT)]
    Detach(PortChangeArgs),
}

#[derive(Args)]
pub(crate) struct PortChangeArgs {
    /// The binding.
    pub(crate) name: String,
    /// The address: nbd:/path.sock, nbd:127.0.0.1:10809, data:/path.sock, fifo:/path, entropy-pool, pty:/link, tap:NAME
    #[arg(value_name = "PORT")]
    pub(crate) port: String,
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct DeviceBindArgs {
    /// The function: pci:0000:00:04.0
    #[arg(value_name = "ADDR")]
    pub(crate) device: String,
    /// To uio_pci_generic: for machines without an IOMMU [default: vfio where the IOMMU group allows it, else uio].
    #[arg(long, conflicts_with = "vfio")]
    pub(crate) uio: bool,
    /// To vfio-pci: an IOMMU keeps the device to the memory that it was given.
    #[arg(long)]
    pub(crate) vfio: bool,
    #[command(flatten)]
    pub(crate) how: HandoverArgs,
}

#[derive(Args)]
pub(crate) struct UnbindArgs {
    /// The function: pci:0000:00:04.0
    #[arg(value_name = "ADDR")]
    pub(crate) device: String,
    #[command(flatten)]
    pub(crate) how: HandoverArgs,
}

/// What `bind` and `unbind` have in common.
#[derive(Args)]
pub(crate) struct HandoverArgs {
    /// Say what would be done, as commands to type, and do nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// bind: take it although it is mounted, swapped to or carries the default route. unbind: although no record tells where it came from.
    #[arg(long)]
    pub(crate) force: bool,
    /// Where to ask which binding has a function that is refused.
    #[command(flatten)]
    pub(crate) socket: SocketArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct DoctorArgs {
    /// Print JSON.
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

/// The same, up to a minute.
fn parse_short_duration(text: &str) -> Result<Duration, String> {
    parse_duration(text)
        .and_then(|duration| if duration <= LONGEST_REVOKE { Ok(duration) } else { Err("at most a minute".to_owned()) })
}

/// Ring sizes are powers of two up to 32,768 (virtio 1.2, section 2.7).
/// What `--restarts` says: so many within so long, or never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Restarts(pub(crate) Option<(u32, Duration)>);

fn parse_restarts(text: &str) -> Result<Restarts, String> {
    if text == "never" {
        return Ok(Restarts(None));
    }
    let (count, within) = text.split_once('/').ok_or("a count and a time, 5/30m, or never")?;
    let count: u32 = count.parse().map_err(|_| "a count and a time: 5/30m")?;
    if count > MAX_RESTARTS {
        return Err(format!("at most {MAX_RESTARTS} restarts can be asked for"));
    }
    Ok(Restarts(Some((count, parse_duration(within)?))))
}

/// What clients can be asked to wait without being told (DESIGN section 9).
fn parse_hold(text: &str) -> Result<Duration, String> {
    let hold = parse_duration(text)?;
    let fits = (Duration::from_millis(1)..=LONGEST_HOLD).contains(&hold);
    fits.then_some(hold).ok_or_else(|| format!("1ms to {LONGEST_HOLD:?}"))
}

fn parse_takeover_deadline(text: &str) -> Result<Duration, String> {
    let hold = parse_duration(text)?;
    let fits = (Duration::from_millis(10)..=LONGEST_TAKEOVER).contains(&hold);
    fits.then_some(hold).ok_or_else(|| format!("10ms to {LONGEST_TAKEOVER:?}"))
}

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
    fn restarts_are_a_count_within_a_time_or_never() {
        let half_an_hour = Duration::from_secs(1800);
        assert_eq!(parse_restarts("5/30m"), Ok(Restarts(Some((5, half_an_hour)))));
        assert_eq!(parse_restarts("0/1s"), Ok(Restarts(Some((0, Duration::from_secs(1))))));
        assert_eq!(parse_restarts("never"), Ok(Restarts(None)));
        for bad in ["", "5", "5/", "/5m", "-1/5m", "5/5x", "10001/1s", "always"] {
            assert!(parse_restarts(bad).is_err(), "{bad}");
        }
    }

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
    fn a_revoke_waits_for_a_minute_at_most() {
        assert_eq!(parse_short_duration("1m"), Ok(Duration::from_secs(60)));
        assert!(parse_short_duration("61s").is_err());
    }

    #[test]
    fn every_command_has_examples_and_exit_codes() {
        use clap::CommandFactory;
        for command in Cli::command().get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            for part in ["Exit codes: 0 ", "Examples:\n  cofferdam "] {
                assert!(help.contains(part), "{}: no {part:?}", command.get_name());
            }
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
