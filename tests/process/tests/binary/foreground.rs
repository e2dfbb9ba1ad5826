//! `cofferdam run`: one process that loads, serves, and unloads on a signal.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::certificate::Certificate;
use cofferdam_process_tests::fake::{Fake, Pretence};
use cofferdam_process_tests::host::{command, text};
use cofferdam_process_tests::nbd::{Client, Command, EINVAL};
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};
use tempfile::TempDir;

/// `cofferdam run`, serving.
struct Run {
    process: Process,
    socket: PathBuf,
    _folder: TempDir,
}

impl Run {
    #[track_caller]
    fn start(device: &Backend, more: &[&str]) -> Run {
        let folder = tempfile::tempdir().expect("a directory");
        let socket = folder.path().join("disk.nbd");
        let (driver, port) = (text(&programs::driver()), format!("nbd:{}", socket.display()));
        let fixed = ["run", &driver, "--device", &device.address(), "--port", &port, "--name", "disk"];
        let process = Process::start(&mut command(&[&fixed[..], more].concat()));
        process.wait_stdout(if more.contains(&"--json") { "\"serving\"" } else { "Ctrl-C unloads" });
        Run { process, socket, _folder: folder }
    }
}

/// The certificate among the documents that `run --json` printed.
#[track_caller]
fn certificate(stdout: &str) -> Certificate {
    let last = stdout.lines().last().expect("a document");
    let mut document: serde_json::Value = serde_json::from_str(last).expect("JSON");
    assert_eq!(document["event"], "unloaded", "{document}");
    Certificate::parse(document["certificate"].take())
}

#[test]
fn a_signal_prints_the_certificate_and_ends_with_0() {
    for signal in [Signal::INT, Signal::TERM] {
        let sim = Backend::sim(&["--memory", "16M"]);
        let mut run = Run::start(&sim, &[]);
        assert_eq!(Client::new(&run.socket).write(0, &[1; 512]), 0);
        run.process.signal(signal);
        let ended = run.process.end(PATIENCE).expect(0);
        assert!(ended.stdout.contains("certificate: disk (virtio-blk.wasm on vhost-user:"), "{}", ended.stdout);
        assert!(ended.stdout.contains("): unloaded\n"), "{}", ended.stdout);
        assert!(ended.stdout.contains("  left      nothing\n"), "{}", ended.stdout);
        assert!(!run.socket.exists(), "the port's socket is removed");
    }
}

#[test]
fn a_signal_with_json_prints_the_certificate_as_a_document() {
    let sim = Backend::sim(&["--memory", "16M"]);
    let mut run = Run::start(&sim, &["--json"]);
    run.process.signal(Signal::INT);
    let ended = run.process.end(PATIENCE).expect(0);
    let certificate = certificate(&ended.stdout);
    certificate.assert_clean();
    assert_eq!(certificate.outcome(), "unloaded");
}

#[test]
fn a_second_ctrl_c_forces_a_hung_device_and_says_what_was_retired() {
    let sim = Backend::sim(&["--memory", "16M", "--fault", "hang,op=write"]);
    let mut run = Run::start(&sim, &["--json"]);
    let mut client = Client::new(&run.socket);
    let write = client.send_write(0, &[1; 4096]).expect("sent");
    // Requests of one connection are taken in order: when this one is refused, the write is with the device.
    client.send(Command::Read, 1, 1).expect("sent");
    assert_eq!(client.reply().expect("an answer").error, EINVAL);
    run.process.signal(Signal::INT);
    run.process.wait_stderr("cause=\"unload\"");
    run.process.signal(Signal::INT);
    let begin = Instant::now();
    let ended = run.process.end(PATIENCE).expect(0);
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    let certificate = certificate(&ended.stdout);
    assert_eq!(certificate.outcome(), "forced");
    certificate.assert_nothing_left();
    assert!(certificate.leaked_bytes() > 0);
    assert!(
        certificate.leak_reason().contains("1 request that the device may still act on"),
        "{}",
        certificate.leak_reason()
    );
    // L1: a write that may still happen is not answered as failed.
    assert!(
        client.reply().map_or(true, |reply| reply.cookie != write),
        "an answer to a write that is still with the device"
    );
}

#[test]
fn one_ctrl_c_gives_a_hung_device_5_s_and_no_more() {
    let sim = Backend::sim(&["--memory", "16M", "--fault", "hang,op=write"]);
    let mut run = Run::start(&sim, &["--json"]);
    let mut client = Client::new(&run.socket);
    client.send_write(0, &[1; 4096]).expect("sent");
    client.send(Command::Read, 1, 1).expect("sent");
    assert_eq!(client.reply().expect("an answer").error, EINVAL);
    let begin = Instant::now();
    run.process.signal(Signal::INT);
    let ended = run.process.end(PATIENCE).expect(0);
    assert!((5..8).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    let certificate = certificate(&ended.stdout);
    assert_eq!(certificate.outcome(), "forced");
    assert!(certificate.leaked_bytes() > 0);
}

#[test]
fn run_ends_by_itself_with_an_error_and_its_certificate_when_the_device_dies() {
    let sim = Backend::sim(&["--memory", "16M"]);
    let mut run = Run::start(&sim, &["--json"]);
    let mut client = Client::new(&run.socket);
    assert_eq!(client.write(0, &[1; 512]), 0);
    sim.kill();
    let ended = run.process.end(PATIENCE).expect_error(1, &["went away"]);
    let certificate = certificate(&ended.stdout);
    certificate.assert_clean();
    assert_eq!(certificate.outcome(), "removed");
    client.assert_closed();
}

#[test]
fn ctrl_c_during_a_load_calls_it_off() {
    for signal in [Signal::INT, Signal::TERM] {
        let fake = Fake::start(Pretence::Block);
        let driver = text(&programs::test_driver("loop-attach"));
        let arguments = ["run", &driver, "--device", &fake.address(), "--call-deadline-ms", "60000", "--json"];
        let mut run = Process::start(&mut command(&arguments));
        // From here on it connects, compiles, and is in a loop of the driver that nothing else ends for a minute.
        until_true("the device is asked", || fake.messages() > 0);
        run.signal(signal);
        let ended = run.end(Duration::from_secs(10)).expect_error(1, &["interrupted while it was loading"]);
        assert_eq!(ended.stdout, "", "it never served");
    }
}

#[test]
fn run_that_cannot_serve_fails_and_prints_no_certificate() {
    let sim = Backend::sim(&["--memory", "16M"]);
    let driver = text(&programs::driver());
    let run = |more: &[&str]| {
        let fixed = ["run", &driver, "--device", &sim.address(), "--json"];
        Process::run(&mut command(&[&fixed[..], more].concat()))
    };
    let ended = run(&["--port", "nbd:/no/such/directory/disk.nbd"]).expect_error(1, &["/no/such/directory"]);
    assert_eq!(ended.stdout, "");
    run(&["--port", "nbd:relative.nbd"]).expect_error(2, &["absolute"]);
    run(&["--name", "../x"]).expect_error(1, &["not a usable name"]);
    run(&["--queues", "0"]).expect_error(2, &["--queues"]);
}
