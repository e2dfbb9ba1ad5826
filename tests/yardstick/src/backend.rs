//! Devices, each a process of its own.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::machine;
use crate::null::Pace;

/// Size of every medium.
pub const CAPACITY_BYTES: u64 = 4 << 30;

/// Longest start of a backend.
const START: Duration = Duration::from_secs(20);

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Kind {
    /// Answers at once and touches nothing: `cofferdam-null-blk`.
    Null,
    /// `qemu-storage-daemon`, null-co with an iothread.
    Qsd,
}

impl Kind {
    /// As in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Null => "null",
            Kind::Qsd => "qsd",
        }
    }
}

/// A running device, which serves one client after another. Killed when dropped.
pub struct Backend {
    child: Child,
    folder: TempDir,
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Backend {
    /// Starts one and waits until it listens. `null_program` is `cofferdam-null-blk`; of `qsd`, `pace` says nothing: it polls and sleeps as it likes.
    ///
    /// # Errors
    /// When the program is missing or ends.
    pub fn start(kind: Kind, pace: Pace, queues: u16, null_program: &Path) -> Result<Backend> {
        let folder = tempfile::tempdir()?;
        let (blk, nbd) = (folder.path().join("blk.sock"), folder.path().join("nbd.sock"));
        let mut command = match kind {
            Kind::Null => {
                let mut command = Command::new(null_program);
                command.arg("--socket").arg(&blk).args(["--capacity", &CAPACITY_BYTES.to_string()]);
                command.args(["--queues", &queues.to_string()]);
                command.args(["--pace", if pace == Pace::Poll { "poll" } else { "event" }]);
                command
            }
            Kind::Qsd => {
                let mut command = Command::new("qemu-storage-daemon");
                command.args(["--object", "iothread,id=io0"]);
                command.args([
                    "--blockdev",
                    &format!("driver=null-co,node-name=null0,size={CAPACITY_BYTES},read-zeroes=off"),
                ]);
                let export = format!(
                    "type=vhost-user-blk,id=blk0,node-name=null0,iothread=io0,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                    blk.display()
                );
                command.args(["--export", &export]);
                command.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", nbd.display())]);
                command.args(["--export", "type=nbd,id=nbd0,node-name=null0,name=null0,writable=on"]);
                command
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn();
        let child = child.with_context(|| command.get_program().display().to_string())?;
        let mut backend = Backend { child, folder };
        let deadline = Instant::now() + START;
        // Of qsd the NBD server is first, so that whoever sees the vhost-user socket sees both.
        while !blk.exists() || (kind == Kind::Qsd && UnixStream::connect(&nbd).is_err()) {
            ensure!(backend.child.try_wait()?.is_none(), "{} has ended", command.get_program().display());
            ensure!(Instant::now() < deadline, "{} does not listen", command.get_program().display());
            std::thread::park_timeout(Duration::from_millis(1));
        }
        Ok(backend)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The vhost-user socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("blk.sock")
    }

    /// The NBD socket of `qsd`; its export is `null0`.
    #[must_use]
    pub fn nbd_socket(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    /// A path in its folder, for a socket of ours.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Processor time that it has used.
    ///
    /// # Errors
    /// When it has ended.
    pub fn time(&self) -> Result<Duration> {
        machine::process_time(self.pid())
    }

    /// What its threads are doing, for the message of an error: state, place in the kernel and processor time of each.
    #[must_use]
    pub fn threads(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let line = |task: std::fs::DirEntry| {
            let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
            // The state is the letter behind the name, which ends at the last parenthesis (proc(5)).
            let state = read("stat").rsplit_once(')').map(|(_, rest)| rest.chars().take(2).collect::<String>());
            let state = state.unwrap_or_default();
            format!("{}:{state} in {} after {} ns", read("comm").trim(), read("wchan"), read("schedstat").trim())
        };
        tasks.map(line).collect::<Vec<_>>().join("; ")
    }

    /// Puts it on one core.
    ///
    /// # Errors
    /// When it has ended.
    pub fn pin(&self, core: usize) -> Result<()> {
        machine::pin_process(self.pid(), core)
    }
}
