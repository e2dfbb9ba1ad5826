//! The whole way: a device in one process, the host in this one, the client in a third. The disk is taken away in the middle of traffic.

use std::io::{BufRead, BufReader, Lines};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_bus_vhost_user::VhostUser;
use cofferdam_manager::{Binding, Config, LoadSpec, Manager, UnloadOptions};
use cofferdam_port_data::{DataAddress, DataOptions, DataPort};

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Process {
    fn start(program: &Path, args: &[&str]) -> (Process, Lines<BufReader<ChildStdout>>) {
        let mut child = Command::new(program)
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}; run 'cargo xtask build' first", program.display()));
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        (Process(child), lines)
    }

    fn succeeds(mut self) {
        let status = self.0.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

/// What this process holds, as the kernel counts it.
#[derive(Debug, PartialEq, Eq)]
struct Census {
    descriptors: usize,
    threads: usize,
    memfd_mappings: usize,
    memfds: usize,
}

fn census() -> Census {
    let count = |directory: &str| std::fs::read_dir(directory).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let memfds = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("/memfd:"))
        .count();
    Census {
        descriptors: count("/proc/self/fd"),
        threads: count("/proc/self/task"),
        memfd_mappings: maps.lines().filter(|line| line.contains("/memfd:")).count(),
        memfds,
    }
}

/// What it holds when nothing changes any more: what a binding leaves behind with the watching thread takes a moment to go.
fn settled() -> Census {
    let (start, mut seen, mut since) = (Instant::now(), census(), Instant::now());
    while since.elapsed() < Duration::from_millis(300) {
        assert!(start.elapsed() < Duration::from_secs(10), "never quiet: {seen:?}");
        let now = census();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
    seen
}

fn eventually_equals(before: &Census) {
    let start = Instant::now();
    while census() != *before {
        assert!(start.elapsed() < Duration::from_secs(10), "before {before:?}, now {:?}", census());
        std::thread::yield_now();
    }
}

struct Site {
    manager: Manager,
    directory: tempfile::TempDir,
    target: PathBuf,
    _device: Process,
}

impl Site {
    fn new() -> Site {
        let target = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target");
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("disk.sock");
        let (device, mut ready) = Process::start(
            &target.join("release/cofferdam-sim-blk"),
            &["--memory", "8M", "--socket", socket.to_str().unwrap()],
        );
        ready.next().expect("a device that says when it is ready").unwrap();
        Site { manager: Manager::new(Config::default()).unwrap(), directory, target, _device: device }
    }

    fn load(&self) -> Arc<Binding> {
        let driver = self.target.join("drivers/virtio-blk.wasm");
        let component = std::fs::read(&driver).unwrap();
        let device = format!("vhost-user:{}", self.directory.path().join("disk.sock").display());
        let transport = Box::new(VhostUser::connect(&device).unwrap());
        let spec = LoadSpec { name: Some("disk".into()), ..LoadSpec::new("virtio-blk.wasm", component, transport) };
        let binding = self.manager.load(spec).unwrap();
        let address: DataAddress = format!("data:{}", self.socket()).parse().unwrap();
        let port = DataPort::start(Arc::clone(&binding), &address, DataOptions::default()).unwrap();
        binding.attach_port(Box::new(port)).map_err(|_| "the binding leaves").unwrap();
        binding
    }

    fn socket(&self) -> String {
        self.directory.path().join("disk.data").display().to_string()
    }

    fn client(&self, args: &[&str]) -> (Process, Lines<BufReader<ChildStdout>>) {
        let socket = self.socket();
        Process::start(Path::new(env!("CARGO_BIN_EXE_cofferdam-example-zero-copy")), &[&[&socket[..]], args].concat())
    }
}

fn expect(lines: &mut Lines<BufReader<ChildStdout>>, what: &str) -> String {
    let line = lines.next().unwrap_or_else(|| panic!("the client ended before it said '{what}'")).unwrap();
    assert!(line.contains(what), "'{line}' instead of '{what}'");
    line
}

/// One test, so that nothing else of this process is counted.
#[test]
fn clients_in_other_processes_do_zero_copy_io_until_the_disk_is_taken_away_and_nothing_is_left() {
    let site = Site::new();
    // The first load starts what stays: the manager's threads, the engine.
    let warm = site.load();
    site.manager.unload(warm.name(), &UnloadOptions::default()).unwrap();
    drop(warm);
    let before = settled();

    let binding = site.load();
    let (once, mut lines) = site.client(&[]);
    expect(&mut lines, "bytes of disk");
    expect(&mut lines, "32 blocks written, flushed and read back");
    once.succeeds();
    drop(lines);

    // Two at a time, each with memory of its own. One is killed in mid traffic, the other is there when the disk goes.
    let (killed, mut lines_of_killed) = site.client(&["--stay"]);
    let (stays, mut lines) = site.client(&["64", "--stay"]);
    for lines in [&mut lines_of_killed, &mut lines] {
        expect(lines, "bytes of disk");
        expect(lines, "32 blocks");
    }
    drop((killed, lines_of_killed));

    let start = Instant::now();
    let certificate = site.manager.unload(binding.name(), &UnloadOptions::default()).unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
    assert!(expect(&mut lines, "revoked after").contains("nothing is outstanding: true"));
    stays.succeeds();
    drop(lines);
    assert!(!Path::new(&site.socket()).exists());
    drop(binding);
    eventually_equals(&before);

    // And again, with a handle that is revoked alone: the client hears of it, the others and the port stay.
    let binding = site.load();
    let (revoked, mut lines) = site.client(&["--stay"]);
    let handle: u64 =
        expect(&mut lines, "bytes of disk").split([' ', ':']).nth(1).unwrap().parse().expect("a handle's number");
    expect(&mut lines, "32 blocks");
    site.manager.revoke(binding.name(), handle, Duration::from_secs(5)).unwrap();
    expect(&mut lines, "revoked after");
    revoked.succeeds();
    drop(lines);
    let (again, mut lines) = site.client(&[]);
    expect(&mut lines, "bytes of disk");
    expect(&mut lines, "32 blocks");
    again.succeeds();
    drop(lines);
    let certificate = site.manager.unload(binding.name(), &UnloadOptions::default()).unwrap();
    assert!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    drop(binding);
    eventually_equals(&before);
}
