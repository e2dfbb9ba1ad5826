//! The situation that an entry meets: who is doing what when it comes.

use std::collections::HashSet;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_manager::{HandleState, IoOp};
use cofferdam_port_nbd::{NbdAddress, NbdOptions, NbdPort};
use cofferdam_process_tests::nbd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

use crate::client::{Client, DEPTH, Progress, Tally};
use crate::plan::Situation;
use crate::stage::{SITUATION_LANE, Stage, command_offset};

/// How long a situation may take to come about.
const PATIENCE: Duration = Duration::from_secs(10);

/// Answers of traffic before the entry comes.
const WARM: u64 = 500;

/// Everything that goes on.
pub struct Scene {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<Client>>>,
    clients: Vec<Client>,
    connections: Vec<nbd::Client>,
    /// Requests sent over each of the connections.
    sent: usize,
    /// Of the port's socket.
    _folder: Option<TempDir>,
}

fn until(what: &str, mut done: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < deadline, "the situation does not come about: {what}");
        std::thread::park_timeout(Duration::from_micros(500));
    }
    Ok(())
}

impl Scene {
    /// Brings the situation about.
    pub fn set(stage: &mut Stage, situation: Situation) -> anyhow::Result<Scene> {
        let mut scene = Scene {
            stop: Arc::default(),
            threads: Vec::new(),
            clients: Vec::new(),
            connections: Vec::new(),
            sent: 0,
            _folder: None,
        };
        match situation {
            Situation::Idle => scene.clients.push(Client::open(&stage.binding, SITUATION_LANE, "idle")?),
            Situation::Depth32 => scene.traffic(stage, WARM, false, false)?,
            Situation::Mapped => scene.traffic(stage, WARM, true, false)?,
            // The second forgotten answer is that of the 80th write.
            Situation::Lying => scene.traffic(stage, 200, false, true)?,
            Situation::Stuck => scene.call(stage, "loop")?,
            Situation::Asleep => scene.call(stage, "sleep")?,
            Situation::Hung => {
                stage.device.freeze();
                let client = scene.start(stage, 8)?;
                ensure!(client.handle().in_flight() == 8, "{} in flight", client.handle().in_flight());
            }
            Situation::Unpolled => {
                let client = scene.start(stage, DEPTH)?;
                // Used on the ring, and not looked at: its event is there and stays.
                let fd = PollFd::from_borrowed_fd(client.handle().device_fd(), PollFlags::IN);
                let wait = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
                ensure!(poll(&mut [fd], Some(&wait))? == 1, "the device answers nothing");
            }
            Situation::NeverReads => {
                let client = scene.connect(stage)?;
                for number in 0..DEPTH {
                    client.send(nbd::Command::Read, number as u64 * 4096, 256 << 10)?;
                }
                scene.sent = DEPTH;
                until("the reads are being served", || Ok(served(stage, |requests, _| requests > 8)))?;
            }
            Situation::HalfWrite => {
                let client = scene.connect(stage)?;
                let mut bytes = client.header(nbd::Command::Write, 0, 256 << 10);
                bytes.resize(bytes.len() + 100_000, 7);
                client.stream.write_all(&bytes)?;
                scene.sent = 1;
                until("half of the write is there", || Ok(served(stage, |_, leased| leased > 0)))?;
            }
        }
        Ok(scene)
    }

    fn traffic(&mut self, stage: &Stage, answers: u64, mapped: bool, may_fail: bool) -> anyhow::Result<()> {
        let mut client = Client::open(&stage.binding, SITUATION_LANE, "traffic")?;
        if mapped {
            client.map()?;
        }
        let (stop, progress) = (Arc::clone(&self.stop), Arc::new(Progress::default()));
        let count = Arc::clone(&progress);
        let thread = std::thread::Builder::new().name("traffic".into()).spawn(move || {
            client.traffic(&stop, &count)?;
            Ok(client)
        })?;
        self.threads.push(thread);
        until("traffic", || {
            ensure!(!self.threads[0].is_finished(), "the traffic has ended");
            Ok(progress.answered.load(Ordering::Acquire) > answers)
        })?;
        let failed = progress.failed.load(Ordering::Acquire);
        ensure!(failed == 0 || may_fail, "{failed} requests failed before anything happened");
        Ok(())
    }

    /// A guest that stays in the call that a command is.
    fn call(&mut self, stage: &Stage, command: &str) -> anyhow::Result<()> {
        let mut client = Client::open(&stage.binding, SITUATION_LANE, "caller")?;
        let offset = command_offset(command)?;
        self.threads.push(std::thread::Builder::new().name("caller".into()).spawn(move || {
            client.start(IoOp::Write, offset, 4096, 0)?;
            Ok(client)
        })?);
        until("the guest is in the call", || Ok(stage.binding.status().calls_running == 1))
    }

    /// Requests that were handed in and are left alone.
    fn start(&mut self, stage: &Stage, count: usize) -> anyhow::Result<&Client> {
        let mut client = Client::open(&stage.binding, SITUATION_LANE, "starter")?;
        for number in 0..count as u64 {
            ensure!(client.start(IoOp::Write, number * 4096, 4096, number as u8)?, "request {number}");
        }
        self.clients.push(client);
        self.clients.last().context("it was just put there")
    }

    /// A connection to a port that is made for it.
    fn connect(&mut self, stage: &Stage) -> anyhow::Result<&mut nbd::Client> {
        let folder = tempfile::tempdir()?;
        let path: PathBuf = folder.path().join("disk.nbd");
        let port = NbdPort::start(Arc::clone(&stage.binding), &NbdAddress::Unix(path.clone()), NbdOptions::default())?;
        let attached = stage.binding.attach_port(Box::new(port));
        ensure!(attached.is_ok(), "the port was not attached");
        self._folder = Some(folder);
        self.connections.push(nbd::Client::new(&path));
        self.connections.last_mut().context("it was just put there")
    }

    /// After the end: every client is revoked, what it was owed has come, and it has to do nothing for it. Sums up the answers.
    pub fn end(mut self, mut tally: Tally) -> anyhow::Result<Tally> {
        self.stop.store(true, Ordering::Release);
        for thread in std::mem::take(&mut self.threads) {
            let client = thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
            self.clients.push(client.context("a client")?);
        }
        for client in &mut self.clients {
            ensure!(client.handle().state() == HandleState::Revoked, "a handle that is not revoked");
            ensure!(client.handle().lease(4096).is_err(), "a revoked handle borrows memory");
            ensure!(!client.start(IoOp::Flush, 0, 0, 0)?, "a revoked handle is admitted");
            client.collect(Duration::ZERO);
            if let Some(mapped) = client.mapped() {
                ensure!(mapped.is_revoked() && mapped.is_gone(), "mapped memory outlives its handle");
                ensure!(mapped.read_at(0, &mut [0]).is_err(), "mapped memory that was revoked is still read");
                ensure!(mapped.window(0, 4096).is_err(), "mapped memory that was revoked still has windows");
                ensure!(mapped.descriptor().is_err(), "mapped memory that was revoked is still given away");
            }
            tally = tally.and(client.tally());
        }
        for connection in &mut self.connections {
            answers_then_end(connection, self.sent)?;
        }
        Ok(tally)
    }
}

/// What the server sent before it hung up: answers to requests that were made, each at most once.
pub fn answers_then_end(connection: &mut nbd::Client, sent: usize) -> anyhow::Result<()> {
    connection.stream.set_read_timeout(Some(PATIENCE))?;
    let mut answered = HashSet::new();
    loop {
        match connection.reply() {
            Ok(reply) => ensure!(answered.insert(reply.cookie), "request {} was answered twice", reply.cookie),
            Err(error) => match error.kind() {
                std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => break,
                _ => return Err(error).context("the server neither answers nor hangs up"),
            },
        }
    }
    ensure!(answered.len() <= sent, "{} answers to {sent} requests", answered.len());
    Ok(())
}

/// Asks `wanted` about the requests of the handles that are a port's, and the bytes that are lent.
fn served(stage: &Stage, wanted: impl Fn(u64, u64) -> bool) -> bool {
    let status = stage.binding.status();
    let requests = status.handles.iter().filter(|handle| handle.peer != "entry").map(|handle| handle.requests).sum();
    wanted(requests, status.leased_bytes)
}
