//! Devices, each a process of its own: what it holds is not this process's.

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cofferdam_bus_vhost_user::{ConnectError, VhostUser};
use cofferdam_process_tests::programs;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// Size of the medium: what the drivers that fail on command expect.
pub const MEDIUM_BYTES: u64 = 16 << 20;

/// Longest start, and longest stop, of a backend.
const PATIENCE: Duration = Duration::from_secs(20);

/// Between two looks at what nothing announces.
const LOOK: Duration = Duration::from_millis(1);

/// Which program is the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `cofferdam-sim-blk` on memory. It fails every flush, which no client here asks for without meaning it.
    Sim,
    /// `qemu-storage-daemon` on a raw file.
    Qemu,
}

impl Kind {
    /// For tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Sim => "sim",
            Kind::Qemu => "qemu",
        }
    }
}

/// A running device, which serves one binding after another. Killed when dropped.
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
    /// Starts one; it may not listen yet.
    pub fn start(kind: Kind) -> anyhow::Result<Backend> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("blk.sock");
        let mut command = match kind {
            Kind::Sim => {
                let mut command = Command::new(programs::sim());
                command.arg("--socket").arg(&socket).args(["--memory", &MEDIUM_BYTES.to_string()]);
                command.args(["--fault", "fail:io,op=flush"]);
                command
            }
            Kind::Qemu => {
                let image = folder.path().join("disk.img");
                File::create(&image)?.set_len(MEDIUM_BYTES)?;
                let mut command = Command::new("qemu-storage-daemon");
                command.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", image.display()));
                command.arg("--export").arg(format!(
                    "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on",
                    socket.display()
                ));
                command
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn();
        let child = child.with_context(|| {
            format!("{}: run 'cargo xtask test', which makes or installs it", command.get_program().display())
        })?;
        Ok(Backend { child, folder })
    }

    /// Connects, as soon as it listens. A device that has just lost its last client may take a moment to hear of the next.
    pub fn connect(&mut self) -> anyhow::Result<VhostUser> {
        let address = format!("vhost-user:{}", self.folder.path().join("blk.sock").display());
        let deadline = Instant::now() + PATIENCE;
        loop {
            match VhostUser::connect(&address) {
                Err(ConnectError::NobodyListens(_) | ConnectError::NotFound(_)) if Instant::now() < deadline => {
                    ensure!(self.child.try_wait()?.is_none(), "{address}: the backend has ended");
                    std::thread::park_timeout(LOOK);
                }
                result => return Ok(result?),
            }
        }
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// When this returns it does nothing any more, and stays: a hung device.
    pub fn freeze(&self) -> anyhow::Result<()> {
        kill_process(Pid::from_child(&self.child), Signal::STOP)?;
        let tasks = format!("/proc/{}/task", self.child.id());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut running = 0;
            for task in std::fs::read_dir(&tasks)?.flatten() {
                // The state is the letter behind the name, which ends at the last parenthesis (proc(5)).
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                let stopped = stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('T'));
                running += usize::from(!stopped);
            }
            if running == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the backend does not stop");
            }
            std::thread::park_timeout(LOOK);
        }
    }

    /// A frozen device goes on.
    pub fn thaw(&self) -> anyhow::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), Signal::CONT)?)
    }
}
