//! A daemon that is told to stop while another one takes over from it, one that is not of the same user, and what both say and need.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::nbd::{Client, Command as Op};
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::wait::{PATIENCE, until_true};

const BLOCK: usize = 4096;
/// Nobody is held so long: each test ends it earlier.
const LONG: [&str; 2] = ["--deadline", "10s"];

fn bed() -> (Daemon, Backend, PathBuf) {
    let (daemon, device) = (Daemon::start(), Backend::sim(&["--memory", "16M", "--queues", "2"]));
    let socket = daemon.serve(&device.address(), "disk", &["--queues", "2"]);
    (daemon, device, socket)
}

#[test]
fn a_signal_to_stop_ends_a_long_hold_and_everything_leaves_as_it_should() {
    for signal in [Signal::TERM, Signal::INT] {
        let (mut daemon, device, socket) = bed();
        let mut client = Client::new(&socket);
        assert_eq!(client.write(0, &[5; BLOCK]), 0);
        device.freeze();
        let cookie = client.send(Op::Read, 0, BLOCK as u32).expect("sent");
        daemon.wait_in_flight("disk", 1);
        let mut new = daemon.challenge(&LONG);
        // It waits for the device by now.
        until_true("clients are held", || {
            let attach = daemon.run(&["port", "detach", "disk", "nbd:/nowhere"]);
            attach.stderr.contains("another daemon is taking over")
        });
        let begun = Instant::now();
        daemon.process.signal(signal);
        // What is with the device has a part of the stop's time to be answered.
        daemon.logged(&["no takeover", "called off"]);
        device.thaw();
        new.end(PATIENCE).expect_error(1, &["serves on", "called off"]);
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        let reply = client.reply().expect("an answer");
        assert_eq!((reply.cookie, reply.data), (cookie, vec![5; BLOCK]));
        let ended = daemon.process.end(PATIENCE).expect(0);
        assert!(ended.stderr.contains("outcome=Shutdown clean=true leaked_bytes=0"), "{}", ended.stderr);
        assert!(!socket.exists() && !daemon.socket().exists());
    }
}

/// `program` of user `nobody`.
fn of_nobody(program: &Command) -> Command {
    let mut other = Command::new("setpriv");
    other.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    other.arg(program.get_program()).args(program.get_args());
    other.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    other
}

fn open_to_all(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("the mode");
}

#[test]
fn another_user_takes_nothing_over_not_even_where_the_socket_lets_him_in() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be somebody else");
        return;
    }
    let (mut daemon, _device, socket) = bed();
    let mut client = Client::new(&socket);
    let new = command(&["daemon", "--takeover", "--socket", &text(&daemon.socket())]);
    open_to_all(daemon.socket().parent().expect("a directory"), 0o755);
    Process::run(&mut of_nobody(&new)).expect_error(1, &["no daemon to take over from", "ermission denied"]);
    // The mode is one lock, whom the kernel says to be there the other.
    let door = PathBuf::from(format!("{}.takeover", daemon.socket().display()));
    open_to_all(&door, 0o666);
    Process::run(&mut of_nobody(&new)).expect_error(1, &["serves on", "it has gone"]);
    daemon.logged(&["takeover refused", "user 65534"]);
    assert_eq!(client.write(0, &[1; BLOCK]), 0);
    daemon.take_over();
    assert_eq!(client.read(0, BLOCK as u32), [1; BLOCK]);
    drop(client);
    daemon.unload("disk", &[]).assert_clean();
}

/// The soft and the hard limit of open descriptors of a process.
fn limits(process: &Process) -> (String, String) {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.pid())).expect("its limits");
    let line = limits.lines().find(|line| line.starts_with("Max open files")).expect("the line");
    let mut words = line.split_whitespace().skip(3).map(str::to_owned);
    (words.next().expect("soft"), words.next().expect("hard"))
}

#[test]
fn a_daemon_may_have_as_many_descriptors_as_its_hard_limit_says() {
    let folder = tempfile::tempdir().expect("a directory");
    let own = command(&["daemon", "--socket", &text(&folder.path().join("c.sock"))]);
    let mut low = Command::new("sh");
    low.args(["-c", "ulimit -S -n 200 && exec \"$0\" \"$@\""]).arg(own.get_program()).args(own.get_args());
    low.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut daemon = Process::start(&mut low);
    daemon.wait_stdout("cofferdam daemon on");
    let (soft, hard) = limits(&daemon);
    assert_ne!(hard, "200", "the test would show nothing");
    assert_eq!(soft, hard);
    daemon.signal(Signal::TERM);
    daemon.end(PATIENCE).expect(0);
}

#[test]
fn a_takeover_is_told_in_one_document_if_that_is_asked_for() {
    let (mut daemon, _device, socket) = bed();
    let client = Client::new(&socket);
    daemon.run(&["daemon", "--json"]).expect(2);
    let old = daemon.process.pid();
    let next = daemon.challenge(&["--json"]);
    next.wait_stdout("}");
    std::mem::replace(&mut daemon.process, next).end(PATIENCE).expect(0);
    assert_eq!(daemon.binding("disk").expect("listed")["state"], "serving");
    let said: serde_json::Value = serde_json::from_str(&daemon.process.stdout()).expect("one document");
    assert_eq!((&said["process"], &said["connections"]), (&old.into(), &1.into()));
    assert_eq!(said["bindings"], serde_json::json!(["disk"]));
    assert!(said["held_micros"].as_u64().is_some_and(|micros| micros > 0), "{said}");
    drop(client);
    daemon.unload("disk", &[]).assert_clean();
}
