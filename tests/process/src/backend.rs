//! Real devices: the sim and qemu-storage-daemon, each a process with a vhost-user-blk socket.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::sync::{Mutex, PoisonError};

use tempfile::TempDir;

use crate::process::{Process, Signal};
use crate::programs;
use crate::wait::{PATIENCE, until_true};

/// A running device. Ends with its guard.
pub struct Backend {
    process: Process,
    folder: TempDir,
    /// Of qemu-storage-daemon, which can be started again.
    queues: u16,
    /// Of qemu-storage-daemon.
    monitor: Option<Mutex<ChildStdin>>,
}

impl Backend {
    /// The sim with these arguments beside its socket.
    #[track_caller]
    pub fn sim(arguments: &[&str]) -> Backend {
        let folder = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(programs::sim());
        command.arg("--socket").arg(folder.path().join("blk.sock")).args(arguments);
        let process = Process::start(&mut command);
        process.wait_stdout("ready ");
        Backend { process, folder, queues: 1, monitor: None }
    }

    /// A device of another class: `net`, with these arguments beside its socket.
    #[track_caller]
    pub fn class(class: &str, arguments: &[&str]) -> Backend {
        let folder = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(programs::class_sim());
        command.arg(class).arg("--socket").arg(folder.path().join("blk.sock")).args(arguments);
        let process = Process::start(&mut command);
        process.wait_stdout("ready ");
        Backend { process, folder, queues: 1, monitor: None }
    }

    /// qemu-storage-daemon on a raw file of `bytes` zeroes; see [`Backend::image`].
    #[track_caller]
    pub fn qemu(bytes: u64, queues: u16) -> Backend {
        let folder = tempfile::tempdir().expect("a directory");
        File::create(folder.path().join("disk.img")).and_then(|file| file.set_len(bytes)).expect("an image");
        let (process, monitor) = Backend::start_qemu(folder.path(), queues);
        Backend { process, folder, queues, monitor: Some(monitor) }
    }

    #[track_caller]
    fn start_qemu(folder: &Path, queues: u16) -> (Process, Mutex<ChildStdin>) {
        let (socket, image) = (folder.join("blk.sock"), folder.join("disk.img"));
        let node = format!("driver=file,node-name=n0,filename={},discard=unmap", image.display());
        let export = format!(
            "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        );
        let mut command = tool("qemu-storage-daemon");
        command.args(["--blockdev", &node, "--export", &export]);
        command.args(["--chardev", "stdio,id=m0", "--monitor", "chardev=m0"]);
        let mut process = Process::start(&mut command);
        // The monitor greets when the command line has been worked off: the export listens by then.
        process.wait_stdout("QMP");
        let mut monitor = process.stdin();
        writeln!(monitor, r#"{{"execute": "qmp_capabilities"}}"#).expect("a monitor that listens");
        (process, Mutex::new(monitor))
    }

    /// Kills qemu-storage-daemon as a crash would, and waits for its end.
    #[track_caller]
    pub fn crash(&mut self) {
        self.kill();
        assert_eq!(self.process.end(PATIENCE).signal, Some(Signal::KILL.as_raw()));
    }

    /// Another qemu-storage-daemon in the place of the one that crashed: the same socket and image.
    #[track_caller]
    pub fn start_again(&mut self) {
        let (process, monitor) = Backend::start_qemu(self.folder.path(), self.queues);
        (self.process, self.monitor) = (process, Some(monitor));
    }

    /// The image of a device that does not run is of another size from now on.
    #[track_caller]
    pub fn change_image(&self, bytes: u64) {
        File::options().write(true).open(self.image()).and_then(|file| file.set_len(bytes)).expect("another size");
    }

    /// Gives the image of qemu-storage-daemon another size; it tells its client of a change of configuration.
    #[track_caller]
    pub fn resize(&self, bytes: u64) {
        let monitor = self.monitor.as_ref().expect("a device with a monitor");
        let mut monitor = monitor.lock().unwrap_or_else(PoisonError::into_inner);
        writeln!(monitor, r#"{{"execute": "block_resize", "arguments": {{"node-name": "n0", "size": {bytes}}}}}"#)
            .expect("a monitor that listens");
    }

    /// As `load --device` takes it.
    pub fn address(&self) -> String {
        format!("vhost-user:{}", self.socket().display())
    }

    /// The socket's path.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("blk.sock")
    }

    /// The raw image that qemu-storage-daemon serves.
    pub fn image(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    /// When this returns it does nothing any more, and stays: a hung device.
    #[track_caller]
    pub fn freeze(&self) {
        self.process.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.process.pid());
        // The signal is only sent so far: every thread has to have met it.
        until_true("the device is stopped", || {
            let mut states = std::fs::read_dir(&tasks).into_iter().flatten().flatten().map(|task| state(&task.path()));
            states.all(|state| state == Some('T'))
        });
    }

    /// A frozen device goes on.
    pub fn thaw(&self) {
        self.process.signal(Signal::CONT);
    }

    /// Ends it as a crash would.
    pub fn kill(&self) {
        self.process.signal(Signal::KILL);
    }
}

/// A thread's state (proc(5), `stat`): the letter behind the name, which ends at the last parenthesis.
fn state(task: &Path) -> Option<char> {
    let stat = std::fs::read_to_string(task.join("stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// A program that Debian's packages have; `cargo xtask test` installs them.
pub fn tool(name: &str) -> Command {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|folder: PathBuf| Path::new(&folder).join(name).is_file());
    assert!(found, "{name} is missing: apt-get install qemu-utils libnbd-bin fio rng-tools-debian");
    Command::new(name)
}
