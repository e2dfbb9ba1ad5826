//! DPDK's testpmd as a process: a vhost-user device, or a client of one.
//!
//! It forwards from its start until it is killed. What it has counted is asked over its telemetry socket, which a thread of its own answers in some 50 us without a word to the
//! thread that forwards; so its counters are read by the same clock as everybody's. Memory is ordinary pages: no huge ones are needed, nor a device.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send, socket};
use tempfile::TempDir;

use super::job::{Direction, Job};
use crate::engine::PATIENCE;
use crate::machine::{self, Cores};

/// Longest start: DPDK looks at the whole machine first.
const START: Duration = Duration::from_secs(30);
/// Longest answer of the telemetry socket, in bytes (`max_output_len`).
const ANSWER_BYTES: usize = 16_384;

/// What it does with frames (testpmd's forwarding modes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// Drops what comes.
    RxOnly,
    /// Makes frames of so many bytes.
    TxOnly(u32),
    /// Sends back what comes, as it is.
    Io,
}

/// Frames of its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// That came to it.
    pub received: u64,
    /// That its peer has.
    pub sent: u64,
}

/// A running testpmd. Killed when dropped.
pub struct Testpmd {
    child: Child,
    telemetry: OwnedFd,
    folder: TempDir,
}

/// Killed if it does not become a [`Testpmd`].
struct Starting(Option<Child>);

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Testpmd {
    /// A device that forwards on `cores.device`; everything else of it sleeps on the other core.
    ///
    /// # Errors
    /// When the program is missing or ends.
    pub fn device(forward: Forward, cores: Cores) -> Result<Testpmd> {
        let folder = tempfile::tempdir()?;
        let path = socket_in(&folder);
        let vdev = format!("net_vhost0,iface={},queues=1", path.display());
        Testpmd::start(folder, &vdev, (cores.client, cores.device), forward, None, || path.exists())
    }

    /// A client that forwards on `cores.client`.
    ///
    /// # Errors
    /// As [`Testpmd::device`].
    pub fn client(device: &Path, job: Job, cores: Cores) -> Result<Testpmd> {
        let depth = job.depth;
        // A frame takes one descriptor: its header is put in front of it, in the same buffer.
        let vdev = format!("net_virtio_user0,path={},queues=1,queue_size={depth},packed_vq=0", device.display());
        let forward = match job.direction {
            Direction::Send => Forward::TxOnly(job.bytes),
            Direction::Receive => Forward::RxOnly,
        };
        Testpmd::start(tempfile::tempdir()?, &vdev, (cores.device, cores.client), forward, Some(depth), || true)
    }

    fn start(
        folder: TempDir,
        vdev: &str,
        (idle, busy): (usize, usize),
        forward: Forward,
        ring_entries: Option<u16>,
        ready: impl Fn() -> bool,
    ) -> Result<Testpmd> {
        let mut command = Command::new("dpdk-testpmd");
        // Where it keeps its sockets; else a place for all processes of the machine.
        command.env("RUNTIME_DIRECTORY", folder.path());
        command.arg(format!("--lcores=0@{idle},1@{busy}"));
        command.args(["--no-huge", "-m", "128", "--no-pci", "--file-prefix=bench", "--vdev", vdev, "--"]);
        command.args(["--total-num-mbufs=4096", "--burst=64", "--nb-cores=1"]);
        match forward {
            Forward::RxOnly => command.arg("--forward-mode=rxonly"),
            Forward::TxOnly(bytes) => command.arg("--forward-mode=txonly").arg(format!("--txpkts={bytes}")),
            Forward::Io => command.arg("--forward-mode=io"),
        };
        if let Some(entries) = ring_entries {
            command.args([format!("--txd={entries}"), format!("--rxd={entries}")]);
        }
        // It ends when there is something to read, or the end of it.
        let log = std::fs::File::create(folder.path().join("log"))?;
        command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("dpdk-testpmd (Debian and Ubuntu: the package dpdk-dev)")?;
        let mut starting = Starting(Some(child));
        let telemetry = folder.path().join("dpdk/bench/dpdk_telemetry.v2");
        let deadline = Instant::now() + START;
        let telemetry = loop {
            let child = starting.0.as_mut().context("a child")?;
            if let Some(status) = child.try_wait()? {
                let said = std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
                anyhow::bail!("dpdk-testpmd: {status}\n{said}");
            }
            if ready()
                && let Some(socket) = reach(&telemetry)?
            {
                break socket;
            }
            ensure!(Instant::now() < deadline, "dpdk-testpmd does not come up");
            std::thread::park_timeout(Duration::from_millis(1));
        };
        let child = starting.0.take().context("a child")?;
        let testpmd = Testpmd { child, telemetry, folder };
        // It introduces itself first.
        testpmd.answer()?;
        Ok(testpmd)
    }

    /// Of a device: where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket_in(&self.folder)
    }

    /// What its port has counted.
    ///
    /// # Errors
    /// When it has ended.
    pub fn counters(&self) -> Result<Counters> {
        send(&self.telemetry, b"/ethdev/stats,0", SendFlags::NOSIGNAL).context("telemetry")?;
        let answer: serde_json::Value = serde_json::from_str(&self.answer()?)?;
        let of = |name: &str| answer["/ethdev/stats"][name].as_u64().with_context(|| format!("{name} in {answer}"));
        Ok(Counters { received: of("ipackets")?, sent: of("opackets")? })
    }

    fn answer(&self) -> Result<String> {
        let mut fds = [PollFd::new(&self.telemetry, PollFlags::IN)];
        let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        ensure!(poll(&mut fds, Some(&limit))? > 0, "dpdk-testpmd does not say what it has counted");
        let mut bytes = vec![0; ANSWER_BYTES];
        let (length, _) = recv(&self.telemetry, &mut bytes[..], RecvFlags::empty())?;
        bytes.truncate(length);
        Ok(String::from_utf8(bytes)?)
    }

    /// Processor time that it has used.
    ///
    /// # Errors
    /// When it has ended.
    pub fn time(&self) -> Result<Duration> {
        machine::process_time(self.child.id())
    }
}

fn socket_in(folder: &TempDir) -> PathBuf {
    folder.path().join("net.sock")
}

/// `None`: nobody listens yet.
fn reach(path: &Path) -> Result<Option<OwnedFd>> {
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?).map_err(std::io::Error::from) {
        Ok(()) => Ok(Some(socket)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => Ok(None),
        Err(error) => Err(error).context("telemetry"),
    }
}
