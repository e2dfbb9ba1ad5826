//! How long an unload takes, stage by stage, idle and under load. `cargo xtask bench unload` prints a table.
//!
//! Arguments: `--json PATH` writes a list of `{"backend","load","stage","unloads","median_us","p90_us","p99_us","max_us"}` and beside it a plot of the
//! distributions (`PATH` with the ending `svg`); `--quick` does fewer unloads.
//!
//! How it is measured: each unload is that of a fresh binding of the virtio-blk driver on a device in another process; the stages are the certificate's own, `whole` is
//! what the caller waits, by the wall clock. Under load means that a client has 32 requests of 4 KiB in flight, reads and writes at random places: in this process, or an
//! NBD client on a Unix socket, in a thread here. The cases take turns, so that what else the machine does meets all of them alike. Stages that did not happen are not
//! in the table.

mod report;

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use cofferdam_manager::{Certificate, HandleSpec, UnloadOptions};
use cofferdam_port_nbd::{NbdAddress, NbdOptions, NbdPort};
use cofferdam_soak_tests::backend::Kind;
use cofferdam_soak_tests::client::{Client, write_and_read};
use cofferdam_soak_tests::world::{GOOD, World};

use report::Report;

/// Requests in flight of a client.
const DEPTH: usize = 32;
/// Answers that it has had before the unload: it is in its stride then.
const WARM: u64 = 4 * DEPTH as u64;
/// Unloads of each case.
const UNLOADS: u64 = 400;
const QUICK_UNLOADS: u64 = 40;

/// What the binding does when it is unloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// A client has a handle open and nothing in flight.
    Idle,
    /// A client in this process.
    InProcess,
    /// A client of the NBD port.
    Nbd,
}

impl Load {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Load::Idle => "idle",
            Load::InProcess => "in-process, depth 32",
            Load::Nbd => "nbd, depth 32",
        }
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().position(|argument| argument == name);
    let json = has("--json").map(|at| arguments.get(at + 1).context("--json needs a path")).transpose()?;
    let unloads = if has("--quick").is_some() { QUICK_UNLOADS } else { UNLOADS };
    let mut world = World::new(&[GOOD])?;
    let mut report = Report::default();
    for number in 0..unloads {
        for backend in [Kind::Sim, Kind::Qemu] {
            for load in [Load::Idle, Load::InProcess, Load::Nbd] {
                let (certificate, micros) =
                    unload(&mut world, backend, load, number).with_context(|| format!("{backend:?}, {load:?}"))?;
                report.add(backend, load, &certificate, micros);
            }
        }
    }
    report.print();
    if let Some(path) = json {
        report.write(path.as_ref()).with_context(|| path.clone())?;
    }
    Ok(())
}

/// Loads, brings the client into its stride, and unloads; the certificate, and what the caller waited in microseconds.
fn unload(world: &mut World, backend: Kind, load: Load, number: u64) -> anyhow::Result<(Certificate, u64)> {
    let device = world.backend(backend)?.connect()?;
    let binding = world.manager.load(world.spec(GOOD, "measured", device)?)?;
    let handle = binding.open(HandleSpec { label: "idle".into(), ..HandleSpec::default() })?;
    write_and_read(&handle, number)?;
    let mut client = match load {
        Load::Idle => None,
        Load::InProcess => Some(Client::in_process(&binding, DEPTH, number)?.0),
        Load::Nbd => {
            let path = world.port_path();
            let address = NbdAddress::Unix(path.clone());
            let port = NbdPort::start(Arc::clone(&binding), &address, NbdOptions::default())?;
            if binding.attach_port(Box::new(port)).is_err() {
                bail!("a binding that serves refuses a port");
            }
            Some(Client::nbd(&path, DEPTH, number)?)
        }
    };
    if let Some(client) = &mut client {
        client.wait_busy(WARM)?;
    }
    let begin = Instant::now();
    let certificate = world.manager.unload_binding(&binding, &UnloadOptions::default())?;
    let micros = u64::try_from(begin.elapsed().as_micros())?;
    ensure!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    client.map_or(Ok(()), Client::end)?;
    Ok((certificate, micros))
}
