//! The binary: its line, its signals, its exit codes and its messages.

mod common;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{Do, Rig, connect, wait_lost};

const READ: Do = Do::Read { sector: 0, sectors: 1 };

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    /// Starts the binary and waits for its line.
    fn start(path: &Path, arguments: &[&str]) -> Self {
        Self::of(&mut Command::new(env!("CARGO_BIN_EXE_cofferdam-sim-blk")), path, arguments)
    }

    fn of(command: &mut Command, path: &Path, arguments: &[&str]) -> Self {
        let mut child = command.arg("--socket").arg(path).args(arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, format!("ready {}\n", path.display()));
        Self(child)
    }

    fn terminate(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.0.wait().unwrap().code()
    }
}

#[test]
fn the_binary_serves_ends_on_sigterm_and_removes_its_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let image = folder.path().join("disk.img");
    std::fs::write(&image, vec![3; 1 << 16]).unwrap();
    let mut process = Process::start(&path, &["--queues", "2", "--file", image.to_str().unwrap()]);
    let mut rig = Rig::new(connect(&path));
    assert_eq!(rig.status(0, &READ), 0);
    assert_eq!(rig.data(0, 512), [3; 512]);
    assert_eq!(rig.status(0, &Do::Write { sector: 1, data: vec![4; 512] }), 0);
    assert_eq!(rig.status(0, &Do::Flush), 0);
    assert_eq!(process.terminate(), Some(0));
    assert!(wait_lost(&mut rig));
    assert!(!path.exists());
    assert_eq!(std::fs::read(&image).unwrap()[512..1024], [4; 512]);
}

#[test]
fn the_binary_dies_of_its_script_with_code_3() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let mut process =
        Process::start(&path, &["--null", "1G", "--seed", "9", "--fault", "die@nth=3", "--fault", "slow:1"]);
    let mut rig = Rig::new(connect(&path));
    assert_eq!((rig.status(0, &READ), rig.status(1, &READ)), (0, 0));
    rig.submit(2, &READ);
    assert!(wait_lost(&mut rig));
    assert_eq!(process.0.wait().unwrap().code(), Some(3));
}

#[test]
fn the_binary_refuses_what_it_cannot_do_with_a_message() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("blk.sock");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam-sim-blk"));
        let output = command.arg("--socket").arg(&path).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for (arguments, code, message) in [
        (&["--fault", "lie:nothing"][..], 2, "used-id-unknown"),
        (&["--memory", "12Q"], 2, "64M"),
        (&["--memory", "1M", "--null", "1M"], 2, "cannot be used with"),
        (&["--file", "/nowhere/at/all"], 1, "cannot open the medium"),
        (&["--queues", "0"], 1, "1 to 64 queues"),
        (&["--memory", "100"], 1, "not even one block"),
    ] {
        let (found, text) = run(arguments);
        assert_eq!(found, Some(code), "{arguments:?}: {text}");
        assert!(text.contains(message), "{arguments:?}: {text}");
        assert!(!path.exists());
    }
}

#[test]
fn the_binary_of_the_other_classes_serves_each() {
    use cofferdam_device::Transport as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sim.sock");
    for (class, arguments, queues, config) in [
        ("rng", &[][..], 1, &[][..]),
        ("net", &["--pairs", "2", "--mtu", "9000"], 5, &[1, 0, 2, 0, 0x28, 0x23]),
        ("console", &["--columns", "132", "--rows", "43", "--port", "log"], 6, &[132, 0, 43, 0, 2, 0, 0, 0]),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cofferdam-sim"));
        let mut process = Process::of(command.arg(class), &path, arguments);
        let mut transport = connect(&path);
        assert_eq!(transport.max_queues(), queues, "{class}");
        let mut found = vec![0; config.len()];
        transport.read_config(if class == "net" { 6 } else { 0 }, &mut found).unwrap();
        assert_eq!(found, config, "{class}");
        assert_eq!(process.terminate(), Some(0));
    }
}
