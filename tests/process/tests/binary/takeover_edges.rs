//! A daemon that is told to stop, or killed, while another one takes over from it, one that is not of the same user, a full disk, and what both daemons say, write down and need.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::challenger::{Challenger, stand_between};
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::nbd::{Client, Command as Op};
use cofferdam_process_tests::process::{Process, Signal, Unread, full_pipe};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::takeover::{door, is_clean, under_load};

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

/// The end of a process, by a signal that nothing can be done about.
fn kill(process: &OwnedFd) {
    // It may have ended by itself.
    let _ = pidfd_send_signal(process, Signal::KILL);
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], None);
}

#[test]
fn an_old_daemon_that_is_killed_with_its_last_word_leaves_everything_to_the_new_one() {
    let (mut daemon, _device, socket) = bed();
    let mut idle = Client::new(&socket);
    // Where the others do not write.
    assert_eq!(idle.write(8 << 20, &[5; BLOCK]), 0);
    let (seen, ()) = under_load(&socket, || {
        for _ in 0..3 {
            let pid = Pid::from_raw(daemon.process.pid() as i32).expect("a process");
            let old = pidfd_open(pid, PidfdFlags::empty()).expect("a descriptor of it");
            let between = stand_between(&door(&daemon), move |says| {
                if says == "commit" {
                    kill(&old);
                }
            });
            let next = daemon.challenge(&LONG);
            next.wait_stdout("cofferdam daemon on");
            between.join().expect("no panic");
            let ended = std::mem::replace(&mut daemon.process, next).end(PATIENCE);
            assert!(ended.signal == Some(Signal::KILL.as_raw()) || ended.code == Some(0), "{ended:?}");
            let second = ["daemon", "--socket", &text(&daemon.socket())];
            daemon.run(&second).expect_error(1, &["another daemon serves this socket"]);
            assert_eq!(daemon.binding("disk").expect("listed")["state"], "serving");
        }
        daemon.take_over();
    });
    println!("{seen:?}");
    assert_eq!(idle.read(8 << 20, BLOCK as u32), [5; BLOCK]);
    drop(idle);
    is_clean(daemon);
}

/// How long a daemon takes to end once it has said that it commits.
fn end_after_commit(stderr: Stdio) -> Duration {
    let folder = tempfile::tempdir().expect("a directory");
    let socket = folder.path().join("c.sock");
    let mut old = {
        // The command has the pipe's writing end too, and goes here.
        let mut daemon = command(&["daemon", "--socket", &text(&socket)]);
        Unread::start(daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr))
    };
    let door = folder.path().join("c.sock.takeover");
    until_true("it serves", || door.exists());
    let mut new = Challenger::new(&door);
    new.hello(10_000).expect("manifest");
    new.say(&json!({"says": "prepared"}));
    new.expect("state");
    new.say(&json!({"says": "ready"}));
    new.expect("commit");
    let committed = Instant::now();
    assert_eq!(old.end(PATIENCE).code(), Some(0));
    committed.elapsed()
}

#[test]
fn an_old_daemon_ends_with_its_commit_also_when_nobody_reads_its_log() {
    let (_reader, writer) = full_pipe();
    println!("{:?} where the log is taken", end_after_commit(Stdio::null()));
    // The quickest of some: the machine has other things to do.
    let took = (0..3).map(|_| end_after_commit(writer.try_clone().expect("a duplicate").into())).min();
    println!("{took:?} where it is not");
    assert!(took.is_some_and(|took| took < Duration::from_millis(500)), "{took:?}");
}

/// Reports of `disk` in the spool beside the daemon's socket.
fn reports(daemon: &Daemon) -> Vec<String> {
    let folder = std::fs::read_dir(daemon.path("state/cofferdam/crashes"));
    let files = folder.into_iter().flatten().flatten().map(|file| file.path());
    let reports = files.filter(|path| path.extension().is_some_and(|kind| kind == "json"));
    reports.map(|path| std::fs::read_to_string(path).expect("a report")).filter(|text| text.contains("disk")).collect()
}

/// A daemon with `disk`, whose driver is replaced as often as it takes.
fn serve(daemon: &Daemon, driver: &str) -> (Backend, PathBuf) {
    let (device, socket) = (Backend::sim(&["--memory", "16M"]), daemon.path("disk.nbd"));
    let port = format!("nbd:{}", socket.display());
    let more = ["--port", &port, "--call-deadline-ms", "10000", "--restarts", "1000/1s", "--restart-wait", "0ms"];
    daemon.load(&programs::test_driver(driver), &device.address(), "disk", &more).expect(0);
    (device, socket)
}

#[test]
fn a_driver_that_breaks_down_in_the_last_moment_has_its_report() {
    let mut daemon = Daemon::start();
    let (_device, socket) = serve(&daemon, "trap-suspend");
    let mut client = Client::new(&socket);
    assert_eq!(client.write(0, &[4; BLOCK]), 0);
    // It is asked what it knows when nobody else is in it any more.
    daemon.take_over();
    assert_eq!(daemon.binding("disk").expect("listed")["crashes"], 1);
    let reports = reports(&daemon);
    assert!(reports.len() == 1 && reports[0].contains("\"suspend\""), "{reports:?}");
    assert_eq!(client.read(0, BLOCK as u32), [4; BLOCK]);
    drop(client);
    is_clean(daemon);
}

/// A write here has `on-command` panic (`tests/guests/hostile/src/lane.rs`).
const TRAP: u64 = 15 << 20;
/// NBD_EIO.
const EIO: u32 = 5;

#[test]
fn clients_are_not_held_while_crashes_are_written_down() {
    let mut daemon = Daemon::start();
    let (_device, socket) = serve(&daemon, "on-command");
    // Every report is written behind a look at all that are there.
    let spool = daemon.path("state/cofferdam/crashes");
    std::fs::create_dir_all(&spool).expect("the spool");
    for number in 0..20_000 {
        File::create(spool.join(format!("other-{number:020}.json"))).expect("a file");
    }
    let mut client = Client::new(&socket);
    let held = (0..3).map(|_| {
        assert_eq!(client.write(TRAP, &[1; BLOCK]), EIO, "what breaks two drivers is failed");
        let next = daemon.challenge(&["--deadline", "10s", "--json"]);
        next.wait_stdout("}");
        std::mem::replace(&mut daemon.process, next).end(PATIENCE).expect(0);
        let said: serde_json::Value = serde_json::from_str(&daemon.process.stdout()).expect("one document");
        said["held_micros"].as_u64().expect("a number")
    });
    let held = held.min();
    println!("held for {held:?} us");
    assert!(held.is_some_and(|held| held < 150_000), "{held:?}");
    drop(client);
    is_clean(daemon);
}

/// A disk of its own, for this test alone: gone when it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    #[expect(deprecated, reason = "unsafe for descriptor tables alone, which are not unshared here")]
    fn on(folder: &Path) -> SmallDisk {
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS).expect("these tests run as root");
        // What is mounted from here on is seen by this thread and what it starts.
        Process::run(Command::new("mount").args(["--make-rprivate", "/"])).expect(0);
        let options = ["-t", "tmpfs", "-o", "size=512k", "tmpfs"];
        Process::run(Command::new("mount").args(options).arg(folder)).expect(0);
        SmallDisk(folder.to_owned())
    }

    /// Leaves no byte.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut filler = File::create(&path).expect("a file");
        while filler.write_all(&[7; 4096]).is_ok() {}
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_full_disk_loses_reports_and_keeps_no_daemon_from_its_place() {
    let folder = tempfile::tempdir().expect("a directory");
    let disk = SmallDisk::on(folder.path());
    let mut daemon = Daemon::start_at(folder);
    let (_device, socket) = serve(&daemon, "on-command");
    let mut client = Client::new(&socket);
    assert_eq!(client.write(0, &[3; BLOCK]), 0);
    let filler = disk.fill();
    for _ in 0..2 {
        assert_eq!(client.write(TRAP, &[1; BLOCK]), EIO, "what breaks two drivers is failed");
        daemon.logged(&["a crash could not be written down", "No space left"]);
        // The new one finds no room for compiled drivers either.
        let mut next = command(&["daemon", "--takeover", "--socket", &text(&daemon.socket()), "--deadline", "10s"]);
        next.envs([("XDG_STATE_HOME", daemon.path("state")), ("XDG_CACHE_HOME", daemon.path("cache"))]);
        let said = daemon.followed_by(Process::start(&mut next));
        assert!(said.starts_with("took over 1 binding and 1 connection"), "{said}");
        assert_eq!(client.read(0, BLOCK as u32), [3; BLOCK]);
    }
    let left = std::fs::read_dir(daemon.path("state/cofferdam/crashes")).expect("the spool").count();
    assert_eq!(left, 0, "halves of reports");
    std::fs::remove_file(filler).expect("removed");
    assert_eq!(client.write(TRAP, &[1; BLOCK]), EIO);
    drop(client);
    daemon.unload("disk", &[]).assert_clean();
    assert_eq!(reports(&daemon).len(), 2, "there is room again");
    daemon.stop(PATIENCE);
}
