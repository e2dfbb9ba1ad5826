//! One cell of the matrix from a shell.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::certificate::Certificate;
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::nbd::Client;
use cofferdam_process_tests::process::{Ended, Process, Signal};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};

use crate::cell::Report;
use crate::growth::Holdings;
use crate::shell::data::{DataClient, socket_beside};
use crate::shell::plan::{Entry, Plan, Situation, plan};
use crate::shell::scene::{Scene, View, device};
use crate::sleeper;
use crate::stage::command_offset;

const NAME: &str = "disk";
/// One heap that gives back what it can: what is left is then what is held.
const HEAP: &[(&str, &str)] = &[("MALLOC_ARENA_MAX", "1"), ("MALLOC_TRIM_THRESHOLD_", "65536")];
/// As in `crate::cell`.
const ROUNDS: usize = 3;
const SETTLE: Duration = Duration::from_millis(1500);

/// What one round came to.
struct Round {
    took: Duration,
    certificate: Certificate,
    drained_first: bool,
}

/// Runs a cell.
pub fn run(entry: Entry, situation: Situation, sleeper: &Path) -> anyhow::Result<Report> {
    let plan = plan(entry, situation).map_err(|why| anyhow::anyhow!(why))?;
    if entry.is_foreground() {
        let round = foreground(entry, situation, &plan)?;
        return report(entry, situation, &plan, &round, None, 1);
    }
    let daemon = Daemon::start_in(HEAP);
    let neighbour = Neighbour::start(&daemon)?;
    warm_up(&daemon);
    if entry == Entry::Sigterm {
        let round = sigterm(daemon, situation, &plan, sleeper, neighbour)?;
        return report(entry, situation, &plan, &round, None, 1);
    }
    let pid = daemon.process.pid().to_string();
    let mut before = Holdings::of(&pid);
    let mut grown = Vec::new();
    for rounds in 1..=ROUNDS {
        let round = with_daemon(&daemon, entry, situation, &plan, sleeper)?;
        let retired = round.certificate.leaked_bytes();
        grown = settle(&pid, &before, retired);
        if grown.is_empty() {
            let longest = neighbour.end(&daemon)?;
            ended_well(&daemon.stop(PATIENCE))?;
            return report(entry, situation, &plan, &round, Some(longest), rounds);
        }
        eprintln!("round {rounds}: {}", grown.join("; "));
        before = Holdings::of(&pid);
    }
    anyhow::bail!("in each of {ROUNDS} rounds the daemon held more afterwards: {}", grown.join("; "))
}

fn report(
    entry: Entry,
    situation: Situation,
    plan: &Plan,
    round: &Round,
    neighbour: Option<Duration>,
    rounds: usize,
) -> anyhow::Result<Report> {
    let c = &round.certificate;
    ensure!(round.took <= plan.bound, "took {:?}, {:?} are allowed", round.took, plan.bound);
    ensure!(round.drained_first == plan.drains_first, "exit code 4 first: {}", round.drained_first);
    ensure!(c.outcome() == plan.outcome, "{} instead of {}: {c:?}", c.outcome(), plan.outcome);
    ensure!((c.leaked_bytes() > 0) == plan.retired, "retired: {c:?}");
    ensure!(c.leak_reason().is_empty() != plan.retired, "retired without a reason: {c:?}");
    c.assert_nothing_left();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    Ok(Report {
        name: format!("{entry} x {situation}"),
        took_ms: ms(round.took),
        bound_ms: ms(plan.bound),
        outcome: format!("{}{}", if round.drained_first { "exit code 4, then " } else { "" }, c.outcome()),
        leaked_bytes: c.leaked_bytes(),
        requests: ["requests_at_close", "requests_completed", "requests_failed"].map(|key| c.number(key)),
        neighbour_ms: neighbour.map_or(0.0, ms),
        rounds,
    })
}

fn settle(pid: &str, before: &Holdings, retired: u64) -> Vec<String> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let grown = Holdings::of(pid).growth(before, retired);
        if grown.is_empty() || Instant::now() >= deadline {
            return grown;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// What is made once is made before the first look.
fn warm_up(daemon: &Daemon) {
    let sim = Backend::sim(&device(Situation::Idle));
    let data = daemon.path("warm-up.data");
    let port = format!("data:{}", data.display());
    let socket = daemon.serve(&sim.address(), NAME, &["--queues", "2", "--port", &port]);
    let clients = [0; 3].map(|_| Client::new(&socket));
    for mut client in clients {
        assert_eq!(client.write(0, &[1; 512]), 0);
    }
    let mapped = DataClient::start(&data).expect("the warm-up's data client is served");
    daemon.unload(NAME, &[]).assert_clean();
    mapped.end().expect("the warm-up's data client is told");
}

/// What `load` and `run` are told, beside device and port.
fn arguments(entry: Entry, situation: Situation, sleeper: &Path) -> (PathBuf, Vec<&'static str>) {
    // Only the guest that is to overrun meets a deadline.
    let call = if entry == Entry::Overrun { "100" } else { "60000" };
    let fixed = vec!["--queues", "2", "--call-deadline-ms", call, "--restarts", "never"];
    match situation {
        Situation::Asleep => (sleeper.to_owned(), [fixed, vec!["--allow", sleeper::GRANT]].concat()),
        _ => (programs::test_driver("on-command"), fixed),
    }
}

/// Both ports are there in every cell, whoever comes to them.
fn ports(socket: &Path) -> [String; 4] {
    let port = "--port".to_owned();
    let data = socket_beside(socket);
    [port.clone(), format!("nbd:{}", socket.display()), port, format!("data:{}", data.display())]
}

/// Loads, and brings the situation about.
fn set(
    daemon: &Daemon,
    entry: Entry,
    situation: Situation,
    sleeper: &Path,
) -> anyhow::Result<(Backend, Scene, PathBuf)> {
    let backend = Backend::sim(&device(situation));
    let socket = daemon.path("disk.nbd");
    let ports = ports(&socket);
    let (driver, more) = arguments(entry, situation, sleeper);
    daemon
        .load(&driver, &backend.address(), NAME, &[&ports.each_ref().map(String::as_str)[..], &more].concat())
        .expect(0);
    let status = || daemon.binding(NAME).unwrap_or_default();
    let view = View { pid: daemon.process.pid(), status: Some(&status) };
    let scene = Scene::set(situation, &socket, &backend, &view)?;
    Ok((backend, scene, socket))
}

fn with_daemon(
    daemon: &Daemon,
    entry: Entry,
    situation: Situation,
    plan: &Plan,
    sleeper: &Path,
) -> anyhow::Result<Round> {
    let (backend, scene, socket) = set(daemon, entry, situation, sleeper)?;
    // Lanes get the next client in turn: this one's is not the situation's.
    let mut by_entry = entry.command().map(|_| Client::new(&socket));
    let begin = Instant::now();
    let mut drained_first = false;
    let certificate = match entry {
        Entry::Unload => daemon.unload(NAME, &[]),
        Entry::Force => daemon.unload(NAME, &["--force"]),
        Entry::Deadline => {
            let ended = daemon.run(&["unload", NAME, "--deadline", "300ms", "--json"]);
            if ended.code == Some(4) {
                drained_first = true;
                still_draining(daemon, &ended)?;
                daemon.unload(NAME, &["--force"])
            } else {
                Certificate::parse(ended.expect(0).json())
            }
        }
        _ => {
            match (&mut by_entry, entry.command()) {
                (Some(client), Some(name)) => drop(client.send_write(command_offset(name)?, &[0; 4096])?),
                _ => backend.kill(),
            }
            let patience = plan.bound + Duration::from_secs(5);
            while daemon.binding(NAME).is_some() {
                ensure!(begin.elapsed() < patience, "still there: {:?}", daemon.binding(NAME));
            }
            // Nobody has unloaded it: whoever asks first is told how it ended.
            daemon.unload(NAME, &[])
        }
    };
    let took = begin.elapsed();
    ensure!(daemon.binding(NAME).is_none(), "it is still listed");
    ensure!(!socket.exists() && !socket_beside(&socket).exists(), "a port's socket is still there");
    daemon.run(&["unload", NAME]).expect_error(3, &["no binding is called"]);
    if let Some(mut client) = by_entry {
        // The command that ended the guest is not answered well.
        ensure!(client.reply().map_or(true, |reply| reply.error != 0), "the command was answered well");
    }
    scene.end()?;
    Ok(Round { took, certificate, drained_first })
}

/// Exit code 4: the error's document, with what it waits for and what is known so far, and the binding's state.
fn still_draining(daemon: &Daemon, ended: &Ended) -> anyhow::Result<()> {
    ensure!(ended.stdout.is_empty(), "{}", ended.stdout);
    let document = ended.stderr.lines().find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let error = document.context("no document on stderr")?["error"].take();
    ensure!(error["code"] == "still-draining", "{error}");
    let message = error["message"].as_str().unwrap_or_default();
    for word in ["'disk'", "unload again", "--force"] {
        ensure!(message.contains(word), "no {word:?} in {message}");
    }
    let so_far = Certificate::parse(error["so_far"].clone());
    ensure!(so_far.outcome() == "draining", "{so_far:?}");
    let state = daemon.binding(NAME).context("a draining binding is listed")?["state"].clone();
    ensure!(state == "draining", "{state}");
    let why = daemon.run(&["why", NAME, "--json"]).expect(0).json();
    let waits_for = why["waits_for"].as_array().map_or(0, Vec::len);
    ensure!(why["phase"] == "draining" && waits_for > 0, "{why}");
    Ok(())
}

fn sigterm(
    daemon: Daemon,
    situation: Situation,
    plan: &Plan,
    sleeper: &Path,
    neighbour: Neighbour,
) -> anyhow::Result<Round> {
    let (_backend, scene, socket) = set(&daemon, Entry::Sigterm, situation, sleeper)?;
    // It leaves with the daemon: until now nothing may have happened to it.
    let (_, _neighbours_device) = neighbour.stop()?;
    let mut events = Process::start(&mut daemon.command(&["events", "--json", "--follow"]));
    events.wait_stdout(NAME);
    let begin = Instant::now();
    daemon.process.signal(Signal::TERM);
    let Daemon { mut process, .. } = daemon;
    let ended = process.end_within(plan.bound + Duration::from_secs(5)).context("the daemon goes on")?;
    let took = begin.elapsed();
    ended_well(&ended)?;
    ensure!(ended.code == Some(0), "exit code {:?}: {}", ended.code, ended.stderr);
    ensure!(!socket.exists() && !socket_beside(&socket).exists(), "a port's socket is still there");
    scene.end()?;
    let _ = events.end_within(Duration::from_secs(5)).context("'events --follow' outlives its daemon")?;
    // The daemon has nobody to give a certificate to: its log line has the same facts.
    let line = ended.stderr.lines().find(|line| line.contains("unloaded") && line.contains("binding=\"disk\""));
    let line = line.with_context(|| format!("no line about the end of '{NAME}': {}", ended.stderr))?;
    Ok(Round { took, certificate: from_log(line)?, drained_first: false })
}

/// A certificate with what the daemon's last line about a binding says.
fn from_log(line: &str) -> anyhow::Result<Certificate> {
    let value = |key: &str| {
        let rest = line.split_once(&format!("{key}=")).map(|(_, rest)| rest);
        rest.and_then(|rest| rest.split_whitespace().next()).with_context(|| format!("no {key} in {line}"))
    };
    ensure!(value("clean")? == "true", "{line}");
    let leaked: u64 = value("leaked_bytes")?.parse()?;
    let outcome = value("outcome")?.to_lowercase();
    let reason = if leaked > 0 { "see the log" } else { "" };
    Ok(Certificate::parse(serde_json::json!({
        "name": NAME, "driver": "", "device": "", "generation": 1, "outcome": outcome, "handles_revoked": 0, "calls_at_close": 0,
        "calls_drained": 0, "calls_interrupted": 0, "requests_at_close": 0, "requests_completed": 0, "requests_failed": 0,
        "stages": [{ "name": "release", "micros": 0 }], "leaked": { "bytes": leaked, "reason": reason },
        "residual": { "calls": 0, "handles": 0, "requests": 0, "buffers": 0, "dma_bytes": 0, "mappings": 0, "fds": 0 },
    })))
}

fn foreground(entry: Entry, situation: Situation, plan: &Plan) -> anyhow::Result<Round> {
    let backend = Backend::sim(&device(situation));
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("disk.nbd");
    let (driver, more) = arguments(entry, situation, Path::new(""));
    let (driver, ports, address) = (text(&driver), ports(&socket), backend.address());
    let fixed = ["run", &driver, "--device", &address, "--name", NAME, "--json"];
    let ports = ports.each_ref().map(String::as_str);
    let mut process = Process::start(&mut command(&[&fixed[..], &ports, &more].concat()));
    process.wait_stdout("\"serving\"");
    let scene = Scene::set(situation, &socket, &backend, &View { pid: process.pid(), status: None })?;
    let begin = Instant::now();
    process.signal(Signal::INT);
    if entry == Entry::CtrlCTwice {
        process.wait_stderr("from=\"serving\"");
        process.signal(Signal::INT);
    }
    let ended = process.end_within(plan.bound + Duration::from_secs(5)).context("run goes on")?;
    let took = begin.elapsed();
    ended_well(&ended)?;
    ensure!(ended.code == Some(0), "exit code {:?}: {}", ended.code, ended.stderr);
    ensure!(!socket.exists() && !socket_beside(&socket).exists(), "a port's socket is still there");
    scene.end()?;
    let last = ended.stdout.lines().last().context("no document on stdout")?;
    let mut document: serde_json::Value = serde_json::from_str(last)?;
    ensure!(document["event"] == "unloaded", "{document}");
    Ok(Round { took, certificate: Certificate::parse(document["certificate"].take()), drained_first: false })
}

fn ended_well(ended: &Ended) -> anyhow::Result<()> {
    let panic = ended.stderr.lines().find(|line| line.starts_with("thread '") && line.contains("panicked"));
    ensure!(panic.is_none(), "{panic:?}");
    Ok(())
}

/// A healthy disk of the same daemon, in use all the time.
struct Neighbour {
    stop: Arc<AtomicBool>,
    client: JoinHandle<anyhow::Result<Duration>>,
    device: Backend,
}

impl Neighbour {
    fn start(daemon: &Daemon) -> anyhow::Result<Neighbour> {
        let device = Backend::sim(&["--memory", "4M"]);
        let socket = daemon.serve(&device.address(), "neighbour", &[]);
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let mut client = Client::new(&socket);
        let client = std::thread::Builder::new().name("neighbour".into()).spawn(move || {
            let (mut longest, mut round) = (Duration::ZERO, 0_u64);
            while !told.load(Ordering::Acquire) {
                round += 1;
                let (offset, data) = (round % 512 * 4096, [round as u8; 4096]);
                let begin = Instant::now();
                client.send_write(offset, &data)?;
                ensure!(client.reply()?.error == 0, "the neighbour's write, round {round}");
                let read = client.call(cofferdam_process_tests::nbd::Command::Read, offset, 4096)?;
                ensure!(read.as_deref() == Ok(&data[..]), "the neighbour's read, round {round}");
                longest = longest.max(begin.elapsed());
                std::thread::park_timeout(Duration::from_millis(1));
            }
            Ok(longest)
        })?;
        Ok(Neighbour { stop, client, device })
    }

    /// Ends its client; nothing may have happened to it. The longest round.
    fn stop(self) -> anyhow::Result<(Duration, Backend)> {
        self.stop.store(true, Ordering::Release);
        let longest = self.client.join().map_err(|_| anyhow::anyhow!("the neighbour's client panicked"))?;
        Ok((longest?, self.device))
    }

    fn end(self, daemon: &Daemon) -> anyhow::Result<Duration> {
        let (longest, _device) = self.stop()?;
        until_true("the neighbour is idle", || {
            daemon.binding("neighbour").is_some_and(|binding| binding["requests_in_flight"] == 0)
        });
        daemon.unload("neighbour", &[]).assert_clean();
        Ok(longest)
    }
}
