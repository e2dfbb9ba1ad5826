//! The processes of the demo and their files. Dropped, everything is gone, whatever happened.

use super::Backend;
use super::story::Story;
use crate::process::Process;
use crate::workspace;
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Size of the disk: a multiple of what one client's share must be a multiple of.
pub(crate) const DISK_BYTES: u64 = 64 << 20;
/// Queues of the device.
const QUEUES: u32 = 2;
/// What any of the programs may take to come up or to answer.
const LIMIT: Duration = Duration::from_secs(20);

/// How long it is watched for that.
const AT_REST: Duration = Duration::from_millis(100);
/// What the daemon may take to close the last descriptor after the certificate was printed.
const LETTING_GO: Duration = Duration::from_secs(2);

/// Everything that the demo starts. The order of the fields is the order of the end: first the host, then the device, then the files.
pub(crate) struct Stage {
    daemon: Option<Process>,
    device: Option<Process>,
    folder: TempDir,
}

/// What a process holds, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// Open descriptors.
    pub(crate) descriptors: usize,
    /// Mappings of memory files, which is what DMA arenas and rings are.
    pub(crate) memory_files: usize,
}

impl Holdings {
    fn of(id: u32) -> Result<Holdings> {
        let descriptors = std::fs::read_dir(format!("/proc/{id}/fd"))?.count();
        let mappings = std::fs::read_to_string(format!("/proc/{id}/maps"))?;
        let memory_files = mappings.lines().filter(|line| line.contains("/memfd:")).count();
        Ok(Holdings { descriptors, memory_files })
    }
}

impl Stage {
    /// An empty stage with a folder of its own.
    pub(crate) fn new() -> Result<Stage> {
        let folder = tempfile::Builder::new().prefix("cofferdam.").tempdir()?;
        Ok(Stage { daemon: None, device: None, folder })
    }

    /// A file on the stage.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts the device.
    pub(crate) fn start_device(&mut self, backend: Backend, story: &Story) -> Result<()> {
        File::create(self.path("disk.img"))?.set_len(DISK_BYTES)?;
        let (image, socket, pidfile) = (self.path("disk.img"), self.path("disk.sock"), self.path("device.pid"));
        let (image, socket) = (image.display(), socket.display());
        let mut command;
        match backend {
            Backend::Sim => {
                command = Command::new(workspace::program("cofferdam-sim-blk"));
                command.args([
                    "--socket",
                    &socket.to_string(),
                    "--file",
                    &image.to_string(),
                    "--queues",
                    &QUEUES.to_string(),
                ]);
            }
            Backend::Qemu => {
                command = Command::new("qemu-storage-daemon");
                command.args(["--blockdev", &format!("driver=file,node-name=disk,filename={image}")]);
                command.args([
                    "--export",
                    &format!(
                        "vhost-user-blk,id=disk0,node-name=disk,addr.type=unix,addr.path={socket},writable=on,num-queues={QUEUES}"
                    ),
                ]);
                command.args(["--pidfile", &pidfile.display().to_string()]);
            }
        }
        story.command(&command);
        let mut device = Process::start("device", &mut command, self.folder.path())?;
        // Connecting to find out would take the one connection that the device serves.
        device.wait_until("the device was ready", LIMIT, |device| match backend {
            Backend::Sim => device.stdout().contains('\n'),
            Backend::Qemu => pidfile.metadata().is_ok_and(|metadata| metadata.len() > 0),
        })?;
        self.device = Some(device);
        Ok(())
    }

    /// Starts the host.
    pub(crate) fn start_daemon(&mut self, story: &Story) -> Result<()> {
        let socket = self.path("control.sock");
        let mut command = Command::new(workspace::program("cofferdam"));
        command.arg("daemon").arg("--socket").arg(&socket);
        story.command(&command);
        let mut daemon = Process::start("daemon", &mut command, self.folder.path())?;
        daemon.wait_until("the daemon listened", LIMIT, |_| UnixStream::connect(&socket).is_ok())?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// A `cofferdam` command that speaks to the daemon of this stage.
    pub(crate) fn cofferdam(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(workspace::program("cofferdam"));
        command.args(arguments).env("COFFERDAM_SOCKET", self.path("control.sock"));
        command
    }

    /// Shows and runs such a command; returns what it printed.
    pub(crate) fn run(&self, story: &Story, arguments: &[&str]) -> Result<String> {
        let mut command = self.cofferdam(arguments);
        story.command(&command);
        let mut process = Process::start("command", &mut command, self.folder.path())?;
        let status = process.finish(LIMIT)?;
        if !status.success() {
            bail!("cofferdam {}: {status}{}", arguments.join(" "), process.last_words());
        }
        Ok(process.stdout())
    }

    /// What the daemon holds when it does nothing: the least that is seen for a while, since a connection to its socket counts until it has noticed the end.
    pub(crate) fn daemon_at_rest(&self) -> Result<Holdings> {
        let id = self.daemon.as_ref().context("the daemon is not running")?.id();
        let mut least = Holdings::of(id)?;
        let begin = Instant::now();
        while begin.elapsed() < AT_REST {
            let now = Holdings::of(id)?;
            least.descriptors = least.descriptors.min(now.descriptors);
            least.memory_files = least.memory_files.min(now.memory_files);
        }
        Ok(least)
    }

    /// Waits until the daemon holds no more than `bound`: its answer to the last command may still be on its way out.
    pub(crate) fn wait_for_daemon_to_hold(&mut self, bound: Holdings) -> Result<Holdings> {
        let daemon = self.daemon.as_mut().context("the daemon is not running")?;
        let mut now = Holdings::of(daemon.id())?;
        daemon
            .wait_until("letting go of what the binding had", LETTING_GO, |daemon| {
                now = Holdings::of(daemon.id()).unwrap_or(now);
                now.descriptors <= bound.descriptors && now.memory_files <= bound.memory_files
            })
            .with_context(|| format!("the daemon holds {now:?}, and held {bound:?} before the driver was loaded"))?;
        Ok(now)
    }

    /// Ends the daemon with SIGTERM, which must work.
    pub(crate) fn stop_daemon(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("the daemon is not running")?;
        let status = daemon.stop()?;
        ensure!(status.success(), "the daemon ended with {status}{}", daemon.last_words());
        Ok(())
    }

    /// What the processes said on standard error, for a failure that they may explain.
    pub(crate) fn last_words(&self) -> String {
        let processes = [("daemon", &self.daemon), ("device", &self.device)];
        let words = processes.map(|(name, process)| {
            let said = process.as_ref().map_or_else(|| "; it has ended".to_owned(), Process::last_words);
            if said.is_empty() { String::new() } else { format!("the {name}{said}\n") }
        });
        words.concat()
    }
}
