//! A log that nobody reads: `cofferdam daemon 2>&1 | less`. It holds up no command, no client and no end.

use std::io::{PipeReader, Read};
use std::process::Stdio;
use std::time::Duration;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{command, text};
use cofferdam_process_tests::nbd::Client;
use cofferdam_process_tests::process::{Process, Signal, Unread, full_pipe};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::until_true;

/// "inside 5 s whatever happens" (DESIGN section 11).
const STOP: Duration = Duration::from_secs(5);

/// Everything that came through.
fn all(mut reader: PipeReader) -> String {
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("text");
    text
}

#[test]
fn a_daemon_whose_log_nobody_reads_serves_unloads_and_stops() {
    let folder = tempfile::tempdir().expect("a directory");
    let (socket, port) = (folder.path().join("control.sock"), folder.path().join("disk.nbd"));
    let (reader, writer) = full_pipe();
    let mut daemon = {
        // The command has the pipe's writing end too, and goes here.
        let mut daemon = command(&["daemon", "--socket", &text(&socket)]);
        Unread::start(daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer))
    };
    let run = |arguments: &[&str]| Process::run(command(arguments).env("COFFERDAM_SOCKET", &socket));
    until_true("it serves", || run(&["ls"]).code == Some(0));
    let sim = Backend::sim(&["--memory", "16M"]);
    let (driver, address) = (text(&programs::test_driver("flood-log-submit")), sim.address());
    let at = format!("nbd:{}", port.display());
    let load = ["load", &driver, "--device", &address, "--name", "disk", "--port", &at, "--call-deadline-ms", "10000"];
    for _ in 0..2 {
        run(&load).expect(0);
        // The driver logs in each call, as much as it may.
        assert_eq!(Client::new(&port).write(0, &[1; 4096]), 0);
        run(&["unload", "disk", "--force"]).expect(0);
    }
    run(&load).expect(0);
    assert_eq!(Client::new(&port).write(0, &[1; 4096]), 0);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.end(STOP).code(), Some(0));
    assert!(!port.exists(), "the ladder was gone down");
    assert!(all(reader).chars().all(|c| c == '.'), "nothing had room");
}

#[test]
fn a_run_whose_log_nobody_reads_ends_with_its_certificate() {
    let (_reader, writer) = full_pipe();
    let sim = Backend::sim(&["--memory", "16M"]);
    let driver = text(&programs::driver());
    let mut run = command(&["run", &driver, "--device", &sim.address(), "--name", "disk"]);
    let mut run = Unread::start(run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(writer));
    let mut stdout = run.stdout().expect("a pipe");
    let mut said = Vec::new();
    while !String::from_utf8_lossy(&said).contains("Ctrl-C unloads") {
        let mut piece = [0; 512];
        let count = stdout.read(&mut piece).expect("it writes");
        assert_ne!(count, 0, "{}", String::from_utf8_lossy(&said));
        said.extend_from_slice(&piece[..count]);
    }
    run.signal(Signal::INT);
    assert_eq!(run.end(STOP).code(), Some(0));
    stdout.read_to_end(&mut said).expect("the rest");
    assert!(String::from_utf8_lossy(&said).contains("): unloaded\n"), "{}", String::from_utf8_lossy(&said));
}
