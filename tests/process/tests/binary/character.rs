//! Ports of bytes: random ones on a fifo, a console on a pseudo terminal and on the terminal of `run`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until, until_true};
use rustix::fs::OFlags;

/// Blocks of 20,000 bits that `rngtest` judges: 20 MB.
const BLOCKS: u64 = 8000;

fn fifo(daemon: &Daemon, seed: &str, name: &str) -> (Backend, String) {
    let sim = Backend::class("rng", &["--seed", seed]);
    let path = text(&daemon.path(&format!("{name}.fifo")));
    let port = format!("fifo:{path}");
    daemon.load(&programs::shipped_driver("virtio-rng"), &sim.address(), name, &["--port", &port]).expect(0);
    (sim, path)
}

fn bytes_of(path: &str, bytes: usize) -> Vec<u8> {
    let mut got = vec![0; bytes];
    File::open(path).and_then(|mut pipe| pipe.read_exact(&mut got)).expect("random bytes");
    got
}

#[test]
fn a_fifo_gives_each_byte_of_the_device_once_and_in_order() {
    let daemon = Daemon::start();
    let (_one, first) = fifo(&daemon, "7", "first");
    let (_same, second) = fifo(&daemon, "7", "second");
    let (_other, third) = fifo(&daemon, "8", "third");
    // The same seed is the same stream, whoever reads how much of it at once.
    let whole = bytes_of(&first, 1 << 20);
    let parts: Vec<u8> = [1000, 300_000, 1, (1 << 20) - 301_001].map(|bytes| bytes_of(&second, bytes)).concat();
    assert!(whole == parts);
    assert!(whole[..1000] != bytes_of(&third, 1000)[..]);
    let mut reader = File::open(&first).expect("the fifo");
    daemon.unload("first", &[]).assert_clean();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).expect("the end");
    assert!(rest.len() <= 64 * 1024, "what the pipe held");
    assert!(!Path::new(&first).exists());
    // A reader that is still there disturbs nobody.
    let _reader = File::open(&second).expect("the fifo");
    daemon.stop(PATIENCE);
    assert!(!Path::new(&second).exists() && !Path::new(&third).exists());
}

#[test]
fn rngtest_finds_20_mb_random() {
    let daemon = Daemon::start();
    let (_sim, path) = fifo(&daemon, "1", "rng");
    let pipe = File::open(path).expect("the fifo");
    let mut rngtest = tool("rngtest");
    let output = rngtest.arg(format!("--blockcount={BLOCKS}")).stdin(pipe).output().expect("rngtest");
    let report = String::from_utf8_lossy(&output.stderr);
    let number = |name: &str| -> u64 {
        let line = report.lines().find_map(|line| line.split_once(name)).unwrap_or_else(|| panic!("{name}: {report}"));
        line.1.trim().parse().unwrap_or_else(|_| panic!("{report}"))
    };
    let (good, bad) = (number("FIPS 140-2 successes:"), number("FIPS 140-2 failures:"));
    assert_eq!(good + bad, BLOCKS, "{report}");
    // Of true randomness about eight blocks in ten thousand fail.
    assert!(bad <= 20, "{report}");
}

#[test]
fn a_console_is_a_terminal_until_the_unload_hangs_up() {
    let daemon = Daemon::start();
    let sim = Backend::class("console", &[]);
    // What the first needed for good (a compiled driver, a thread of the runtime) is not the second's.
    console(&daemon, &sim);
    let before = daemon.census();
    console(&daemon, &sim);
    daemon.wait_census(&before);
}

#[track_caller]
fn console(daemon: &Daemon, sim: &Backend) {
    let link = daemon.path("console");
    let port = format!("pty:{}", link.display());
    daemon.load(&programs::shipped_driver("virtio-console"), &sim.address(), "tty", &["--port", &port]).expect(0);
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let mut terminal = File::options().read(true).write(true).custom_flags(flags).open(&link).expect("the terminal");
    terminal.write_all(b"who is there?\r").expect("room");
    let mut answer = Vec::new();
    until_true("the echo", || {
        let mut piece = [0; 100];
        let count = terminal.read(&mut piece).unwrap_or(0);
        answer.extend_from_slice(&piece[..count]);
        answer == b"who is there?\r"
    });
    assert_eq!(daemon.run(&["handles", "tty", "--json"]).expect(0).json()[0]["port"], port);
    daemon.unload("tty", &[]).assert_clean();
    until("the hang-up", || match terminal.read(&mut [0; 100]) {
        Ok(0) => Some(()),
        Ok(_) => None,
        Err(error) => error.raw_os_error().filter(|code| *code == rustix::io::Errno::IO.raw_os_error()).map(|_| ()),
    });
    assert!(std::fs::symlink_metadata(&link).is_err());
}

#[test]
fn run_with_pipes_passes_every_byte_and_ends_with_the_input() {
    let sim = Backend::class("console", &[]);
    let driver = text(&programs::shipped_driver("virtio-console"));
    let mut run = command(&["run", &driver, "--device", &sim.address(), "--port", "stdio", "--name", "tty"]);
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run");
    let mut stdin = child.stdin.take().expect("a pipe");
    // Ctrl-C and Ctrl-] are bytes like all others.
    let sent: Vec<u8> = (0..3_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let bytes = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes).expect("all of it"));
    let output = child.wait_with_output().expect("its end");
    writer.join().expect("written");
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(output.stdout == sent, "{} of {} bytes; {log}", output.stdout.len(), sent.len());
    assert!(log.contains("certificate: tty") && log.contains("left      nothing"), "{log}");
}

/// `script` gives the program a terminal; what is typed comes from a pipe.
#[test]
fn run_on_a_terminal_ends_with_its_escape_and_gives_the_terminal_back() {
    let sim = Backend::class("console", &[]);
    let cache = tempfile::tempdir().expect("a directory");
    for signalled in [false, true] {
        let driver = text(&programs::shipped_driver("virtio-console"));
        let binary = text(&programs::cofferdam());
        let line = format!(
            "stty -g; {binary} run {driver} --device {} --port stdio --name tty; echo code $?; stty -g",
            sim.address()
        );
        let mut script = tool("script");
        script.args(["--quiet", "--return", "--command", &line, "/dev/null"]);
        script.env("XDG_CACHE_HOME", cache.path());
        let mut script = Process::start(&mut script);
        let mut keys = script.stdin();
        script.wait_stdout("Ctrl-] unloads.");
        keys.write_all(b"echoed\x03").expect("typed");
        script.wait_stdout("echoed\x03");
        if signalled {
            let pid = run_below(script.pid());
            rustix::process::kill_process(pid, Signal::TERM).expect("a signal");
        } else {
            keys.write_all(b"last\x1d").expect("typed");
        }
        let ended = script.end(PATIENCE).expect(0);
        // Nothing but numbers: lines of the log may run into each other on a terminal.
        let is_settings =
            |line: &&str| line.contains(':') && line.trim().chars().all(|each| each.is_ascii_hexdigit() || each == ':');
        let settings: Vec<&str> = ended.stdout.lines().filter(is_settings).collect();
        assert_eq!(settings.len(), 2, "{}", ended.stdout);
        assert_eq!(settings[0].trim(), settings[1].trim(), "{}", ended.stdout);
        assert!(ended.stdout.contains("code 0") && ended.stdout.contains("certificate: tty"), "{}", ended.stdout);
    }
}

/// The process called `cofferdam` below process `root`.
fn run_below(root: u32) -> rustix::process::Pid {
    let of = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let mut below = vec![root];
    while let Some(pid) = below.pop() {
        if std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "cofferdam") {
            return rustix::process::Pid::from_raw(pid as i32).expect("a process");
        }
        below.extend(of(pid).split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
    }
    panic!("no cofferdam below {root}");
}

#[test]
fn a_port_that_does_not_fit_is_refused_with_what_it_needs() {
    let daemon = Daemon::start();
    let (rng, disk) = (Backend::class("rng", &[]), Backend::sim(&["--memory", "16M"]));
    let console = Backend::class("console", &[]);
    let at = |name: &str| text(&daemon.path(name));
    let cases = [
        ("virtio-rng", &rng, format!("nbd:{}", at("a")), "block", "entropy"),
        ("virtio-rng", &rng, format!("data:{}", at("a")), "block", "entropy"),
        ("virtio-rng", &rng, format!("pty:{}", at("a")), "stream", "entropy"),
        ("virtio-blk", &disk, format!("fifo:{}", at("a")), "entropy", "block"),
        ("virtio-blk", &disk, "entropy-pool".to_owned(), "entropy", "block"),
        ("virtio-console", &console, format!("fifo:{}", at("a")), "entropy", "stream"),
        ("virtio-console", &console, format!("nbd:{}", at("a")), "block", "stream"),
    ];
    for (driver, device, port, needs, gives) in &cases {
        let ended = daemon.load(&programs::shipped_driver(driver), &device.address(), "x", &["--port", port]);
        ended.expect_error(2, &[port, &format!("gives '{needs}'"), &format!("gives '{gives}'")]);
        assert!(daemon.bindings().is_empty() && !daemon.path("a").exists());
    }
    let driver = programs::shipped_driver("virtio-console");
    let load = |port: &str| daemon.load(&driver, &console.address(), "tty", &["--port", port]);
    load("stdio").expect_error(2, &["'cofferdam run'"]);
    load("pty:relative").expect_error(2, &["absolute path"]);
    // What the system said is in the message.
    load(&format!("pty:{}", at(&"n".repeat(300)))).expect_error(1, &["failed: File name too long"]);
    load(&format!("pty:{},port=9", at("a"))).expect_error(1, &["no port 9"]);
    std::fs::write(at("mine"), "mine").expect("a file");
    load(&format!("pty:{}", at("mine"))).expect_error(1, &["left alone"]);
    daemon.load(&driver, &console.address(), "tty", &[]).expect(0);
    daemon.run(&["port", "attach", "tty", "stdio"]).expect_error(2, &["'cofferdam run'"]);
    daemon.run(&["port", "attach", "tty", &format!("pty:{}", at("tty"))]).expect(0);
    daemon.run(&["port", "attach", "tty", &format!("pty:{}", at("two"))]).expect_error(1, &["another client"]);
    daemon.run(&["port", "detach", "tty", &format!("pty:{}", at("tty"))]).expect(0);
    assert!(std::fs::symlink_metadata(at("tty")).is_err());
}
