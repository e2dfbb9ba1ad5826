//! Real devices: the sim and qemu-storage-daemon, each a process with a vhost-user-blk socket.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::process::{Process, Signal};
use crate::programs;
use crate::wait::until_true;

/// A running device. Ends with its guard.
pub struct Backend {
    process: Process,
    folder: TempDir,
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
        Backend { process, folder }
    }

    /// A device of another class: `net`, with these arguments beside its socket.
    #[track_caller]
    pub fn class(class: &str, arguments: &[&str]) -> Backend {
        let folder = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(programs::class_sim());
        command.arg(class).arg("--socket").arg(folder.path().join("blk.sock")).args(arguments);
        let process = Process::start(&mut command);
        process.wait_stdout("ready ");
        Backend { process, folder }
    }

    /// qemu-storage-daemon on a raw file of `bytes` zeroes; see [`Backend::image`].
    #[track_caller]
    pub fn qemu(bytes: u64, queues: u16) -> Backend {
        let folder = tempfile::tempdir().expect("a directory");
        let (socket, image) = (folder.path().join("blk.sock"), folder.path().join("disk.img"));
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("an image");
        let node = format!("driver=file,node-name=n0,filename={},discard=unmap", image.display());
        let export = format!(
            "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        );
        let mut command = tool("qemu-storage-daemon");
        command.args(["--blockdev", &node, "--export", &export]);
        command.args(["--chardev", "stdio,id=m0", "--monitor", "chardev=m0"]);
        let process = Process::start(&mut command);
        // The monitor greets when the command line has been worked off: the export listens by then.
        process.wait_stdout("QMP");
        Backend { process, folder }
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
