//! What a hostile reader found that only a process shows.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::nbd::Client;
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::programs;

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn ends_within(child: &mut Child, bound: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < bound {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

/// `cofferdam daemon 2>&1 | less`: nobody reads the log any more. A driver that logs fills the pipe, and then every thread that says something waits in `write(2)`: the
/// lane's, with its lease; the ladder's; and the one that got the signal, before it has started what ends the process in any case.
#[test]
fn sigterm_ends_a_daemon_whose_log_nobody_reads() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock");
    let mut daemon = command(&["daemon", "--socket", &text(&socket)]);
    let daemon = daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut daemon = Killed(daemon);
    let stderr = daemon.0.stderr.take().unwrap();
    // A small pipe, so that a few lines fill it.
    let _ = rustix::pipe::fcntl_setpipe_size(&stderr, 4096);
    let begun = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(10), "no daemon");
        std::thread::sleep(Duration::from_millis(10));
    }
    let sim = Backend::sim(&["--memory", "16M"]);
    let port = folder.path().join("disk.nbd");
    let cli = |arguments: &[&str], bound| {
        let mut command = command(arguments);
        command.env("COFFERDAM_SOCKET", &socket);
        let mut process = Process::start(&mut command);
        process.end_within(bound).map(|ended| ended.code)
    };
    let driver = text(&programs::test_driver("flood-log-submit"));
    let address = sim.address();
    let port_address = format!("nbd:{}", port.display());
    let load = ["load", &driver, "--device", &address, "--name", "disk", "--port", &port_address];
    assert_eq!(cli(&load, Duration::from_secs(60)), Some(Some(0)));
    let mut client = Client::new(&port);
    client.send_write(0, &[1; 4096]).unwrap();
    // The driver logs in `submit`, and the pipe is full.
    let mut ready = 0;
    let begun = Instant::now();
    while ready < 4096 && begun.elapsed() < Duration::from_secs(10) {
        ready = rustix::io::ioctl_fionread(&stderr).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        if begun.elapsed() > Duration::from_secs(2) {
            break;
        }
    }
    let forced = cli(&["unload", "disk", "--force"], Duration::from_secs(10));
    rustix::process::kill_process(rustix::process::Pid::from_child(&daemon.0), Signal::TERM).unwrap();
    let ended = ends_within(&mut daemon.0, Duration::from_secs(8));
    assert!(ended, "SIGTERM did not end the daemon in 8 s; before it, unload --force answered {forced:?}");
    assert_eq!(forced, Some(Some(0)), "unload --force");
}

/// A control client that begins a call and goes no further keeps its connection for ever; as many as there are connections keep the operator out.
#[test]
fn clients_that_stop_in_the_middle_of_a_call_do_not_keep_the_operator_out() {
    let daemon = Daemon::start();
    let stalled: Vec<UnixStream> = (0..64)
        .map(|_| {
            let mut stream = UnixStream::connect(daemon.socket()).unwrap();
            let head = "POST /v1/bindings/x/unload HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n";
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    // Longer than the time that a client has for its head.
    let mut ls = Process::start(&mut daemon.command(&["ls"]));
    let ended = ls.end_within(Duration::from_secs(20)).map(|ended| ended.code);
    drop(stalled);
    assert_eq!(ended, Some(Some(0)), "'ls' had no answer in 20 s");
}

/// The same for clients that do not read their answer.
#[test]
fn clients_that_do_not_read_their_answer_do_not_keep_the_operator_out() {
    let daemon = Daemon::start();
    // Something to say: the kept events of many failed loads.
    let sim = Backend::sim(&["--memory", "16M"]);
    for _ in 0..220 {
        daemon.serve(&sim.address(), "disk", &[]);
        daemon.unload("disk", &[]);
    }
    let stalled: Vec<UnixStream> = (0..64)
        .map(|_| {
            let mut stream = UnixStream::connect(daemon.socket()).unwrap();
            stream.write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            stream
        })
        .collect();
    // Each has begun to be answered.
    let mut one = [0; 1];
    for mut stream in &stalled {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(stream.read(&mut one).unwrap(), 1);
    }
    let mut ls = Process::start(&mut daemon.command(&["ls"]));
    let ended = ls.end_within(Duration::from_secs(20)).map(|ended| ended.code);
    drop(stalled);
    assert_eq!(ended, Some(Some(0)), "'ls' had no answer in 20 s");
}

/// The ladder gives the device up itself, and the watching thread takes the hang-up for a loss: a warning and a second ladder for every ordinary unload; and should that
/// one be the first to strike the binding off, its certificate counts as one that nobody has been given.
#[test]
fn an_ordinary_unload_is_no_loss_of_the_device() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    for round in 0..40 {
        daemon.serve(&sim.address(), "disk", &[]);
        daemon.unload("disk", &[]);
        let again = daemon.run(&["unload", "disk"]);
        assert_eq!(again.code, Some(3), "round {round}: {}", again.stdout);
    }
    let losses = daemon.process.stderr().lines().filter(|line| line.contains("device lost")).count();
    assert_eq!(losses, 0, "losses of a device that nobody has lost");
}
