//! The real backend: qemu-storage-daemon with one vhost-user-blk export.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use tempfile::TempDir;

/// A running daemon; killed when dropped.
pub struct Qemu {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    folder: TempDir,
}

impl Qemu {
    /// A disk of 1 GiB that reads as zeroes.
    pub fn null(queues: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::start(folder, "driver=null-co,node-name=n0,size=1073741824,read-zeroes=on", queues)
    }

    /// A disk of `bytes` bytes in a file.
    pub fn file(bytes: u64, queues: u16) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let node = format!("driver=file,node-name=n0,filename={},discard=unmap", image.display());
        Self::start(folder, &node, queues)
    }

    fn start(folder: TempDir, node: &str, queues: u16) -> Self {
        let socket = folder.path().join("blk.sock");
        let export = format!(
            "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={},writable=on,num-queues={queues},iothread=t0",
            socket.display()
        );
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--object", "iothread,id=t0", "--blockdev", node, "--export", &export])
            .args(["--chardev", "stdio,id=m0", "--monitor", "chardev=m0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cannot start qemu-storage-daemon, which this test needs (Debian: apt-get install qemu-utils)");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut qemu = Qemu { child, input, output, folder };
        // The monitor greets when the daemon has worked off its command line: the export listens by then.
        let greeting = qemu.line();
        assert!(greeting.contains("QMP"), "qemu-storage-daemon did not start: {greeting}");
        qemu.command(r#"{"execute":"qmp_capabilities"}"#);
        qemu
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("blk.sock")
    }

    pub fn address(&self) -> String {
        format!("vhost-user:{}", self.path().display())
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn image(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("disk.img")).unwrap()
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// Ends the daemon as a crash would. Does not wait: what the front end sees must be enough.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Takes the export away and goes on running.
    pub fn remove_export(&mut self) {
        self.command(r#"{"execute":"block-export-del","arguments":{"id":"e0","mode":"hard"}}"#);
    }

    /// Gives the medium another size, and tells the front end.
    pub fn resize(&mut self, bytes: u64) {
        let arguments = format!(r#"{{"node-name":"n0","size":{bytes}}}"#);
        self.command(&format!(r#"{{"execute":"block_resize","arguments":{arguments}}}"#));
    }

    fn command(&mut self, command: &str) {
        writeln!(self.input, "{command}").unwrap();
        loop {
            let line = self.line();
            assert!(!line.contains("\"error\"") && !line.is_empty(), "{command}: {line}");
            if line.contains("\"return\"") {
                return;
            }
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
