//! The daemon's own life: its socket, its end, and its sudden death.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::nbd::{Client, Command, connect};
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};

/// "inside 5 s whatever happens" (DESIGN section 11).
const STOP: Duration = Duration::from_secs(5);

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("it exists").permissions().mode() & 0o777
}

#[test]
fn a_second_daemon_on_the_same_socket_is_refused() {
    let daemon = Daemon::start();
    let socket = text(&daemon.socket());
    Process::run(&mut command(&["daemon", "--socket", &socket])).expect_error(1, &[&socket, "another daemon"]);
    assert!(daemon.bindings().is_empty(), "the first one serves on");
    daemon.stop(STOP);
}

#[test]
fn a_stale_socket_file_is_taken_over_and_anything_else_is_left_alone() {
    let folder = tempfile::tempdir().expect("a directory");
    let stale = folder.path().join("stale.sock");
    drop(UnixListener::bind(&stale).expect("a socket"));
    let _daemon = Daemon::start_on(&stale);
    Process::run(command(&["ls", "--json"]).env("COFFERDAM_SOCKET", &stale)).expect(0);

    let live = folder.path().join("live.sock");
    let _listener = UnixListener::bind(&live).expect("a socket");
    Process::run(&mut command(&["daemon", "--socket", &text(&live)])).expect_error(1, &["something else listens"]);
    assert!(live.exists());

    let file = folder.path().join("file");
    std::fs::write(&file, "precious").expect("a file");
    Process::run(&mut command(&["daemon", "--socket", &text(&file)])).expect_error(1, &["not a socket"]);
    assert_eq!(std::fs::read(&file).expect("the file"), b"precious");

    let nowhere = folder.path().join("missing/control.sock");
    Process::run(&mut command(&["daemon", "--socket", &text(&nowhere)])).expect_error(1, &["missing/control.sock"]);
}

#[test]
fn sockets_are_for_their_owner_alone() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let port = daemon.serve(&sim.address(), "disk", &[]);
    assert_eq!(mode(&daemon.socket()), 0o600);
    assert_eq!(mode(&port), 0o600);
}

#[test]
fn sigterm_ends_an_idle_daemon_at_once_and_removes_its_sockets() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let (control, port) = (daemon.socket(), daemon.serve(&sim.address(), "disk", &[]));
    let begin = Instant::now();
    daemon.process.signal(cofferdam_process_tests::process::Signal::TERM);
    until_true("the sockets are gone", || !control.exists() && !port.exists());
    let ended = daemon.stop(STOP);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(ended.stderr.contains("clean=true"), "{}", ended.stderr);
}

#[test]
fn sigterm_ends_the_daemon_in_5_s_with_a_hung_device_and_a_client_that_never_reads() {
    let daemon = Daemon::start();
    let hung = Backend::sim(&["--memory", "16M", "--fault", "hang,op=write"]);
    let good = Backend::sim(&["--memory", "16M"]);
    let (hung_port, good_port) =
        (daemon.serve(&hung.address(), "hung", &[]), daemon.serve(&good.address(), "good", &[]));
    let mut stuck = Client::new(&hung_port);
    stuck.send_write(0, &[1; 4096]).expect("sent");
    let mut deaf = Client::new(&good_port);
    for _ in 0..32 {
        deaf.send(Command::Read, 0, 1 << 20).expect("sent");
    }
    daemon.wait_in_flight("hung", 1);
    // A control client that says nothing, and one whose unload waits.
    let _mute = connect(&daemon.socket());
    let mut waiting = Process::start(&mut daemon.command(&["unload", "hung", "--deadline", "60s"]));
    until_true("it drains", || daemon.binding("hung").is_some_and(|binding| binding["state"] == "draining"));
    let begin = Instant::now();
    let ended = daemon.stop(STOP);
    assert!(begin.elapsed() < STOP, "{:?}", begin.elapsed());
    assert!(ended.stderr.contains("leaked_bytes="), "{}", ended.stderr);
    assert_ne!(waiting.end(PATIENCE).code, None);
}

#[test]
fn a_killed_daemon_leaves_nothing_that_stops_the_next_one() {
    let mut daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let port = daemon.serve(&sim.address(), "disk", &[]);
    assert_eq!(Client::new(&port).write(0, &[9; 512]), 0);
    daemon.crash_and_restart();
    assert!(port.exists(), "the socket file is stale");
    // The same device, whose claim must have vanished, and the same port.
    assert_eq!(daemon.serve(&sim.address(), "disk", &[]), port);
    assert_eq!(Client::new(&port).read(0, 512), [9; 512]);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_control_client_that_talks_garbage_harms_nobody() {
    let daemon = Daemon::start();
    let before = daemon.census();
    for words in [
        "\0\u{1}garbage\r\n\r\n",
        "GET /v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n",
        "POST /v1/bindings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\n{\"a\"",
        "POST /v1/bindings HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n",
    ] {
        let mut stream = connect(&daemon.socket());
        stream.write_all(words.as_bytes()).expect("sent");
        stream.shutdown(std::net::Shutdown::Write).expect("half closed");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{words:?}: {answer}");
    }
    assert!(daemon.bindings().is_empty());
    daemon.wait_census(&before);
    daemon.stop(STOP);
}

#[test]
fn without_a_daemon_every_command_says_how_to_start_one() {
    let folder = tempfile::tempdir().expect("a directory");
    let socket = text(&folder.path().join("none.sock"));
    let driver = text(&programs::driver());
    let commands: [&[&str]; 11] = [
        &["ls"],
        &["inspect", "disk"],
        &["handles", "disk"],
        &["revoke", "disk", "1"],
        &["why", "disk"],
        &["events"],
        &["events", "--follow"],
        &["port", "attach", "disk", "nbd:/x.sock"],
        &["port", "detach", "disk", "nbd:/x.sock"],
        &["unload", "disk", "--explain"],
        &["load", &driver, "--device", "vhost-user:/x.sock"],
    ];
    for arguments in commands {
        let mut command = command(&[arguments, &["--socket", &socket]].concat());
        Process::run(&mut command).expect_error(1, &[&socket, "cofferdam daemon"]);
    }
}
