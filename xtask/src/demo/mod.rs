//! `cargo xtask demo`: the main job, told step by step.
//!
//! ```text
//! device (vhost-user-blk) <-> cofferdam daemon [ virtio-blk.wasm ] <-> NBD socket <-> four clients of this program
//! ```
//!
//! The clients fill the disk and check it, then read and write at random. In the middle of that the driver is unloaded. Then everything that can be checked
//! from outside is: that the clients got honest errors and never wrong data, that what was flushed is on the medium, that the certificate leaves nothing,
//! that the daemon holds no more than before, and that after another load everything acknowledged can be read. Any failure fails the demo.
//!
//! [`stage`] has the processes, [`traffic`] one client, [`nbd`] its connection, [`pattern`] the contents, [`certificate`] the proof, [`story`] the voice.

mod certificate;
mod nbd;
mod pattern;
mod stage;
mod story;
mod traffic;

use crate::{build, interrupt, packages, workspace};
use anyhow::{Context, Result, bail, ensure};
use certificate::Certificate;
use nbd::Connection;
use stage::{DISK_BYTES, Stage};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};
use story::{Story, count};
use traffic::{Client, DEPTH, Ending, Signals, Tally};

/// What stands behind the vhost-user socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// The device of tests/sim, built here.
    Sim,
    /// A real qemu-storage-daemon (Debian: qemu-utils or qemu-system-common).
    Qemu,
}

/// What may be said on the command line.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which device to serve.
    #[arg(long, value_enum, default_value = "sim")]
    backend: Backend,
    /// Seconds of traffic before the driver is unloaded.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
}

impl Options {
    /// As the test run wants it.
    pub(crate) fn short(backend: Backend) -> Options {
        Options { backend, seconds: 2 }
    }
}

const CLIENTS: u64 = 4;

/// Builds what is needed and shows it.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.backend == Backend::Qemu && !packages::is_installed("qemu-storage-daemon") {
        bail!("qemu-storage-daemon is not installed; it is in Debian's qemu-utils or qemu-system-common");
    }
    build::drivers()?;
    build::programs(&["cofferdam", "cofferdam-sim-blk"])?;
    interrupt::watch()?;
    show(options)
}

/// Shows the main job with programs that have been built already.
pub(crate) fn show(options: &Options) -> Result<()> {
    let mut stage = Stage::new()?;
    let result = play(&mut stage, options);
    if result.is_err() && !interrupt::requested() {
        eprint!("{}", stage.last_words());
    }
    result
}

fn play(stage: &mut Stage, options: &Options) -> Result<()> {
    let mut story = Story::begin("A WebAssembly driver serves a disk, and is unloaded while the disk is in use");
    let driver = workspace::driver("virtio-blk").display().to_string();

    story.step("A virtio disk appears behind a vhost-user socket");
    stage.start_device(options.backend, &story)?;
    story.step("The host starts, with nothing in it");
    stage.start_daemon(&story)?;
    let before = stage.daemon_at_rest()?;

    story.step("What the driver asks for");
    story.lines(&stage.run(&story, &["inspect", &driver])?);
    story.step("The driver is loaded: it drives the disk and serves it to NBD clients");
    load(stage, &story, &driver)?;

    story.step(&format!("{CLIENTS} clients fill the disk and read it back, {DEPTH} requests in flight each"));
    let mut clients: Vec<Client> =
        (0..CLIENTS).map(|index| Client::new(index * DISK_BYTES / CLIENTS, DISK_BYTES / CLIENTS)).collect();
    let mut connections = connect(stage)?;
    let (tally, begin) = (Tally::default(), Instant::now());
    together(&mut clients, &mut connections, |client, connection| client.fill(connection, &tally))?;
    story.line(&format!("{}, every byte checked", told(&tally, begin.elapsed())));

    story
        .step(&format!("They read and write at random; after {} s the driver is unloaded under them", options.seconds));
    let certificate = unload_under_load(stage, &story, &mut clients, &mut connections, options.seconds)?;
    drop(connections);

    story.step("The certificate");
    for line in certificate.lines() {
        story.line(&line);
    }
    certificate.hold_to_it()?;

    story.step("Nobody has to believe it");
    ensure!(!stage.path("disk0.sock").exists(), "the NBD socket is still there");
    let after = stage.wait_for_daemon_to_hold(before)?;
    story.line(&format!(
        "the daemon holds {} descriptors and {} memory files; before the load it was {} and {}",
        after.descriptors, after.memory_files, before.descriptors, before.memory_files
    ));
    check_medium(stage, &clients)?;
    story.line("every write that was flushed is on the medium");

    story.step("The driver comes back, and all that was acknowledged can be read");
    load(stage, &story, &driver)?;
    clients.iter_mut().for_each(Client::reconnect);
    let mut connections = connect(stage)?;
    let (tally, begin) = (Tally::default(), Instant::now());
    together(&mut clients, &mut connections, |client, connection| client.read_all(connection, &tally))?;
    story.line(&format!("{}, every byte checked", told(&tally, begin.elapsed())));
    drop(connections);
    let certificate = Certificate::parse(&stage.run(&story, &["unload", "disk0", "--json"])?)?;
    certificate.hold_to_it()?;

    story.step("The host leaves on SIGTERM");
    stage.stop_daemon()?;
    story.end("Everything held.");
    Ok(())
}

fn load(stage: &Stage, story: &Story, driver: &str) -> Result<()> {
    let device = format!("vhost-user:{}", stage.path("disk.sock").display());
    let port = format!("nbd:{}", stage.path("disk0.sock").display());
    story.lines(&stage.run(story, &["load", driver, "--device", &device, "--port", &port, "--name", "disk0"])?);
    Ok(())
}

fn connect(stage: &Stage) -> Result<Vec<Connection>> {
    (0..CLIENTS)
        .map(|_| {
            let connection = Connection::open(&stage.path("disk0.sock"))?;
            ensure!(connection.size_bytes() == DISK_BYTES, "the export has {} bytes", connection.size_bytes());
            Ok(connection)
        })
        .collect()
}

/// Runs `work` for every client at the same time; the first error wins.
fn together<T: Send>(
    clients: &mut [Client],
    connections: &mut [Connection],
    work: impl Fn(&mut Client, &mut Connection) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    thread::scope(|scope| {
        let threads: Vec<_> = clients
            .iter_mut()
            .zip(connections)
            .map(|(client, connection)| scope.spawn(|| work(client, connection)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn unload_under_load(
    stage: &Stage,
    story: &Story,
    clients: &mut [Client],
    connections: &mut [Connection],
    traffic_seconds: u64,
) -> Result<Certificate> {
    let (tally, signals, begin) = (Tally::default(), Signals::default(), Instant::now());
    let (certificate, endings) = thread::scope(|scope| {
        let traffic = scope
            .spawn(|| together(clients, connections, |client, connection| client.run(connection, &tally, &signals)));
        let certificate =
            watch_then_unload(stage, story, &tally, &signals, Duration::from_secs(traffic_seconds), || {
                traffic.is_finished()
            });
        if certificate.is_err() {
            signals.abandon.store(true, Ordering::Relaxed);
        }
        let endings = traffic.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (certificate, endings)
    });
    // A client that found something wrong says more than an unload that failed after it.
    let (endings, certificate) = match (endings, certificate) {
        (Err(client), Ok(_)) => return Err(client),
        (Err(_), Err(unload)) if interrupt::requested() => return Err(unload),
        (Err(client), Err(unload)) => bail!("{client:#}; and the unload: {unload:#}"),
        (Ok(endings), certificate) => (endings, certificate?),
    };
    let elapsed = begin.elapsed();
    story.line(&format!("the clients: {}, never wrong data", told(&tally, elapsed)));
    say_endings(story, clients, endings)?;
    Ok(certificate)
}

/// Prints a line each second, then unloads.
fn watch_then_unload(
    stage: &Stage,
    story: &Story,
    tally: &Tally,
    signals: &Signals,
    length: Duration,
    over: impl Fn() -> bool,
) -> Result<Certificate> {
    let begin = Instant::now();
    let mut told_seconds = 0;
    while begin.elapsed() < length {
        interrupt::check()?;
        ensure!(!over(), "the clients stopped before the unload");
        thread::sleep(Duration::from_millis(20));
        let seconds = begin.elapsed().as_secs();
        if seconds > told_seconds {
            told_seconds = seconds;
            story.line(&format!(
                "{seconds:>3} s  {:>11} reads {:>11} writes {:>7} flushes",
                count(tally.reads.load(Ordering::Relaxed)),
                count(tally.writes.load(Ordering::Relaxed)),
                count(tally.flushes.load(Ordering::Relaxed)),
            ));
        }
    }
    story.lines(&stage.run(story, &["ls"])?);
    signals.leaving.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    let printed = stage.run(story, &["unload", "disk0", "--json"])?;
    story.line(&format!("done after {:.1} ms", begin.elapsed().as_secs_f64() * 1000.0));
    Certificate::parse(&printed)
}

fn say_endings(story: &Story, clients: &[Client], endings: Vec<Ending>) -> Result<()> {
    let mut latencies = Vec::new();
    let mut refused = std::collections::BTreeMap::<u32, u64>::new();
    let mut cut_off = 0;
    for ending in endings {
        latencies.extend(ending.latencies_us);
        cut_off += ending.cut_off;
        for (error, times) in ending.refused {
            *refused.entry(error).or_default() += times;
        }
    }
    latencies.sort_unstable();
    let percentile =
        |percent: usize| latencies.get((latencies.len() * percent / 100).min(latencies.len().saturating_sub(1)));
    let (Some(median), Some(late)) = (percentile(50), percentile(99)) else { bail!("not one request succeeded") };
    story.line(&format!("latency with {CLIENTS} x {DEPTH} in flight: median {median} us, 99 % below {late} us"));

    let names = [(5, "EIO"), (108, "ESHUTDOWN")];
    let by_name: Vec<_> = names
        .iter()
        .filter_map(|(error, name)| refused.get(error).map(|times| format!("{} answered {name}", count(*times))))
        .chain((cut_off > 0).then(|| format!("{} ended by the hang-up", count(cut_off))))
        .collect();
    ensure!(!by_name.is_empty(), "no client noticed that the driver had gone");
    let in_doubt: usize = clients.iter().map(Client::in_doubt).sum();
    story.line(&format!("when it left: {}; {in_doubt} writes were not acknowledged", by_name.join(", ")));
    Ok(())
}

fn check_medium(stage: &Stage, clients: &[Client]) -> Result<()> {
    let medium = File::open(stage.path("disk.img")).context("the disk image is gone")?;
    for client in clients {
        client.check_medium(|offset, bytes| medium.read_exact_at(bytes, offset))?;
    }
    Ok(())
}

fn told(tally: &Tally, elapsed: Duration) -> String {
    let (reads, writes) = (tally.reads.load(Ordering::Relaxed), tally.writes.load(Ordering::Relaxed));
    let bytes = tally.bytes.load(Ordering::Relaxed);
    let per_second = |number: u64| (number as f64 / elapsed.as_secs_f64()) as u64;
    format!(
        "{} reads and {} writes in {:.1} s ({} per second, {} MiB/s)",
        count(reads),
        count(writes),
        elapsed.as_secs_f64(),
        count(per_second(reads + writes)),
        count(per_second(bytes) >> 20),
    )
}
