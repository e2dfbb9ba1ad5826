//! One daemon after the other under the same clients, and new ones that come to nothing at every step.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::challenger::{Challenger, framed};
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::nbd::{Client, Command, connect};
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};
use serde_json::{Value, json};

const BLOCK: usize = 4096;
/// Requests that each client has under way.
const DEPTH: u64 = 8;

/// What a client saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    requests: u64,
    longest: Duration,
}

/// Writes and reads its own blocks, some at a time, until it is told to stop. Every answer has to come, on this one connection, with the right data.
fn work(socket: &Path, client: u64, stop: &AtomicBool, at_work: &AtomicU64) -> Seen {
    let mut nbd = Client::new(socket);
    let mut seen = Seen::default();
    for round in 0.. {
        let fill = |slot: u64| (round as u8).wrapping_mul(7) ^ (client * DEPTH + slot) as u8;
        let offset = |slot: u64| ((client * 32 + round % 4) * DEPTH + slot) * BLOCK as u64;
        let begun = Instant::now();
        for slot in 0..DEPTH {
            nbd.send_write(offset(slot), &[fill(slot); BLOCK]).expect("sent");
        }
        (0..DEPTH).for_each(|_| assert_eq!(nbd.reply().expect("an answer").error, 0, "client {client}"));
        if round % 8 == 0 {
            assert_eq!(nbd.flush(), 0);
        }
        let first = nbd.send(Command::Read, offset(0), BLOCK as u32).expect("sent");
        for slot in 1..DEPTH {
            nbd.send(Command::Read, offset(slot), BLOCK as u32).expect("sent");
        }
        for _ in 0..DEPTH {
            let reply = nbd.reply().expect("an answer");
            let slot = reply.cookie - first;
            assert_eq!(reply.error, 0, "client {client}");
            assert!(reply.data == [fill(slot); BLOCK], "client {client}, round {round}, block {slot}: wrong data");
        }
        seen.longest = seen.longest.max(begun.elapsed());
        seen.requests += 2 * DEPTH;
        if round == 0 {
            at_work.fetch_add(1, Ordering::AcqRel);
        }
        if stop.load(Ordering::Acquire) {
            break;
        }
    }
    seen
}

/// Runs `change` while four clients work. Each of them must have worked before it and after it, too.
pub(crate) fn under_load<R>(socket: &Path, change: impl FnOnce() -> R) -> (Vec<Seen>, R) {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let (stop, at_work) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (stop, at_work) = (&stop, &at_work);
        let clients: Vec<_> = (0..4).map(|client| scope.spawn(move || work(socket, client, stop, at_work))).collect();
        let stopping = Stop(stop);
        until_true("every client is at work", || {
            at_work.load(Ordering::Acquire) == 4 || clients.iter().any(|client| client.is_finished())
        });
        let result = change();
        drop(stopping);
        (clients.into_iter().map(|client| client.join().expect("no panic")).collect(), result)
    })
}

/// A daemon with a binding of two lanes, `disk`, and its port.
fn bed() -> (Daemon, Backend, PathBuf) {
    bed_on(Backend::sim(&["--memory", "16M", "--queues", "2"]))
}

fn bed_on(device: Backend) -> (Daemon, Backend, PathBuf) {
    let daemon = Daemon::start();
    let socket = daemon.serve(&device.address(), "disk", &["--queues", "2"]);
    (daemon, device, socket)
}

/// Where a new daemon asks.
pub(crate) fn door(daemon: &Daemon) -> PathBuf {
    let mut path = daemon.socket().into_os_string();
    path.push(".takeover");
    path.into()
}

/// The binding leaves and leaves nothing behind, and so does the daemon.
pub(crate) fn is_clean(daemon: Daemon) {
    daemon.unload("disk", &[]).assert_clean();
    assert!(!daemon.path("disk.nbd").exists(), "the last daemon removes the port's socket");
    let own = [daemon.socket(), door(&daemon)];
    assert!(own.iter().all(|path| path.exists()));
    daemon.stop(Duration::from_secs(5));
    assert!(own.iter().all(|path| !path.exists()), "and its own");
}

fn take_over_in_a_row(count: u32, device: Backend) {
    let (mut daemon, _device, socket) = bed_on(device);
    let pid = daemon.process.pid();
    // One that asks nothing during all that, and one that is half-way through its handshake.
    let (mut idle, mut early) = (Client::new(&socket), connect(&socket));
    early.read_exact(&mut [0; 18]).expect("a greeting");
    let (seen, said) = under_load(&socket, || {
        (0..count)
            .map(|_| {
                std::thread::sleep(Duration::from_millis(30));
                daemon.take_over()
            })
            .collect::<Vec<_>>()
    });
    assert_ne!(daemon.process.pid(), pid);
    assert!(said.iter().all(|line| line.starts_with("took over 1 binding and 6 connections")), "{said:?}");
    let mut held: Vec<f64> = said
        .iter()
        .map(|line| line.split(' ').rev().nth(1).and_then(|ms| ms.parse().ok()).unwrap_or_else(|| panic!("{line}")))
        .collect();
    held.sort_by(f64::total_cmp);
    let longest = seen.iter().map(|seen| seen.longest).max().unwrap_or_default();
    let requests: u64 = seen.iter().map(|seen| seen.requests).sum();
    println!(
        "{count} takeovers, {requests} requests: clients were held for {:.3} ms (median), {:.3} ms (most); the longest round of a client took {longest:?}",
        held[held.len() / 2],
        held[held.len() - 1]
    );
    assert!(seen.iter().all(|seen| seen.requests >= 2 * DEPTH));
    let second = ["daemon", "--socket", &text(&daemon.socket())];
    daemon.run(&second).expect_error(1, &["another daemon serves this socket"]);
    assert_eq!(idle.read(0, 512).len(), 512);
    early.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x02\0\0\0\0").expect("sent");
    let mut answer = [0; 20];
    early.read_exact(&mut answer).expect("an answer to the abort");
    assert_eq!(answer[12..16], [0, 0, 0, 1]);
    drop(idle);
    is_clean(daemon);
}

#[test]
fn clients_see_a_pause_and_no_error_while_ten_daemons_follow_each_other() {
    take_over_in_a_row(10, Backend::sim(&["--memory", "16M", "--queues", "2"]));
}

#[test]
fn a_device_that_people_use_serves_one_daemon_after_the_other() {
    take_over_in_a_row(3, Backend::qemu(16 << 20, 2));
}

#[test]
#[ignore = "long: two hundred takeovers"]
fn clients_see_a_pause_and_no_error_while_two_hundred_daemons_follow_each_other() {
    take_over_in_a_row(200, Backend::sim(&["--memory", "16M", "--queues", "2"]));
}

#[test]
fn a_port_on_tcp_and_the_control_socket_answer_before_during_and_after() {
    let (mut daemon, _sim, socket) = bed();
    daemon.run(&["port", "attach", "disk", "nbd:127.0.0.1:0"]).expect(0);
    let ports = daemon.binding("disk").expect("listed")["ports"].clone();
    let address = ports[1].as_str().and_then(|port| port.strip_prefix("nbd:")).expect("an address").to_owned();
    let greeting = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..8], b"NBDMAGIC");
    };
    let mut before = TcpStream::connect(&address).expect("connects");
    greeting(&mut before);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Whoever comes at any moment is served in the end.
        let comers = scope.spawn(|| {
            let mut count = 0;
            while !stop.load(Ordering::Acquire) {
                drop(Client::new(&socket));
                greeting(&mut TcpStream::connect(&address).expect("connects"));
                count += 1;
            }
            count
        });
        for _ in 0..5 {
            assert!(daemon.take_over().starts_with("took over 1 binding"));
            let disk = daemon.binding("disk").expect("listed");
            assert_eq!((disk["state"].as_str(), &disk["ports"]), (Some("serving"), &ports));
        }
        stop.store(true, Ordering::Release);
        assert!(comers.join().expect("no panic") > 0);
    });
    before.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x02\0\0\0\0").expect("sent");
    before.read_exact(&mut [0; 20]).expect("an answer to the abort");
    let events = daemon.run(&["events", "--json"]).expect(0).stdout;
    assert!(events.contains("\"taken-over\""), "{events}");
    // Everything that can be done with a binding can be done with one that was taken over.
    let new = text(&programs::test_driver("well-behaved"));
    assert_eq!(daemon.run(&["upgrade", "disk", &new, "--probation", "0s", "--json"]).expect(0).json()["generation"], 2);
    daemon.take_over();
    let disk = daemon.binding("disk").expect("listed");
    assert_eq!((disk["generation"].as_u64(), disk["driver"].as_str()), (Some(2), Some("well-behaved.wasm")));
    daemon.run(&["port", "detach", "disk", &format!("nbd:{address}")]).expect(0);
    is_clean(daemon);
}

#[test]
fn a_driver_that_breaks_down_after_a_takeover_is_replaced_and_its_crashes_are_counted_on() {
    let mut daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.path("disk.nbd");
    let port = format!("nbd:{}", socket.display());
    let more = ["--port", &port, "--call-deadline-ms", "10000", "--restarts", "1000/1s", "--restart-wait", "0ms"];
    daemon.load(&programs::test_driver("trap-at-100"), &sim.address(), "disk", &more).expect(0);
    let mut client = Client::new(&socket);
    let mut crashes = 0;
    for turn in 0..3_u8 {
        for round in 0..150_u64 {
            let data = [turn ^ round as u8; BLOCK];
            assert_eq!(client.write(round * BLOCK as u64, &data), 0, "round {round}");
            assert_eq!(client.read(round * BLOCK as u64, BLOCK as u32), data, "round {round}");
        }
        let now = daemon.binding("disk").expect("listed")["crashes"].as_u64().expect("a number");
        assert!(now > crashes, "{crashes}, then {now}");
        crashes = now;
        daemon.take_over();
        assert_eq!(daemon.binding("disk").expect("listed")["crashes"], crashes);
    }
    drop(client);
    is_clean(daemon);
}

#[test]
fn whoever_has_nothing_to_take_over_or_no_right_to_it_says_so_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a directory");
    let daemon = Daemon::start();
    let socket = folder.path().join("c.sock");
    let alone = ["daemon", "--takeover", "--socket", &text(&socket)];
    daemon.run(&alone).expect_error(1, &["no daemon to take over from", "start one without --takeover"]);
    assert_eq!(std::fs::read_dir(folder.path()).expect("the directory").count(), 0);
    let mode = std::fs::metadata(door(&daemon)).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    daemon.run(&["daemon", "--deadline", "1s"]).expect(2);
    daemon.challenge(&["--deadline", "1h"]).end(PATIENCE).expect(2);
}

#[test]
fn what_cannot_be_handed_over_is_named_and_serves_on() {
    let (daemon, _sim, socket) = bed();
    let pinned = Backend::sim(&["--memory", "1M"]);
    daemon.load(&programs::driver(), &pinned.address(), "fast", &["--pinned"]).expect(0);
    let data = text(&daemon.path("d.data"));
    daemon.run(&["port", "attach", "disk", &format!("data:{data}")]).expect(0);
    let sharer = Process::start(std::process::Command::new(programs::zero_copy()).args([&data, "64", "--stay"]));
    sharer.wait_stdout("32 blocks written, flushed and read back");
    let mut client = Client::new(&socket);
    let words = ["serves on", "'fast': it is pinned", "'disk': data:"];
    daemon.challenge(&[]).end(PATIENCE).expect_error(1, &words);
    assert_eq!(client.write(0, &[3; BLOCK]), 0);
    assert_eq!(client.read(0, BLOCK as u32), [3; BLOCK]);
}

#[test]
fn a_device_that_does_not_answer_keeps_its_daemon_and_nothing_is_lost() {
    let (mut daemon, sim, socket) = bed();
    let mut client = Client::new(&socket);
    assert_eq!(client.write(0, &[5; BLOCK]), 0);
    sim.freeze();
    client.send(Command::Read, 0, BLOCK as u32).expect("sent");
    daemon.wait_in_flight("disk", 1);
    let begun = Instant::now();
    let refused = daemon.challenge(&["--deadline", "1s"]).end(PATIENCE);
    refused.expect_error(1, &["serves on", "within 1s", "under way"]);
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    sim.thaw();
    assert_eq!(client.reply().expect("an answer").data, [5; BLOCK]);
    daemon.take_over();
    assert_eq!(client.read(0, BLOCK as u32), [5; BLOCK]);
    drop(client);
    is_clean(daemon);
}

/// How a new daemon may come to its end before the commit, one way for each step.
pub(crate) const DEATHS: [fn(&mut Challenger); 8] = [
    |_| {},
    |new| {
        new.hello(10_000);
    },
    |new| {
        new.hello(10_000).expect("manifest");
    },
    |new| {
        new.hello(10_000).expect("manifest");
        new.say(&json!({"says": "failed", "reason": "it has its reasons"}));
        new.expect("refused");
    },
    // It never hears that clients are held.
    |new| {
        new.hello(10_000).expect("manifest");
        new.say(&json!({"says": "prepared"}));
    },
    // It dies with everything in its hands.
    |new| {
        new.hello(10_000).expect("manifest");
        new.say(&json!({"says": "prepared"}));
        new.expect("state");
    },
    |new| {
        new.hello(10_000).expect("manifest");
        new.say(&json!({"says": "prepared"}));
        new.expect("state");
        new.say(&json!({"says": "failed", "reason": "at the last moment"}));
        new.expect("refused");
    },
    // In the middle of a message.
    |new| {
        new.hello(10_000).expect("manifest");
        new.say(&json!({"says": "prepared"}));
        new.expect("state");
        new.stream.write_all(b"cfto").expect("sent");
    },
];

#[test]
fn a_new_daemon_may_die_at_every_step_and_the_old_one_serves_on() {
    let slow = "slow:6000,op=write-zeroes";
    let (mut daemon, _sim, socket) = bed_on(Backend::sim(&["--memory", "16M", "--queues", "2", "--fault", slow]));
    let pid = daemon.process.pid();
    let die = |daemon: &Daemon| DEATHS.iter().for_each(|death| death(&mut Challenger::new(&door(daemon))));
    // The thread that bounds holds stays for a while.
    die(&daemon);
    until_true("everything serves", || daemon.process.stderr().matches("serving on").count() >= DEATHS.len());
    let before = daemon.census();
    let (seen, ()) = under_load(&socket, || {
        (0..3).for_each(|_| die(&daemon));
        // And the real one, killed when it says how far it is. A request that takes longer than it waits keeps it from being there before that.
        let mut client = Client::new(&socket);
        for word in ["asked the daemon", "prepared 1 binding"] {
            client.send(Command::WriteZeroes, 8 << 20, BLOCK as u32).expect("sent");
            let mut new = daemon.challenge(&["--deadline", "1s"]);
            new.wait_stdout(word);
            new.signal(Signal::KILL);
            new.end(PATIENCE);
            assert_eq!(client.reply().expect("an answer").error, 0);
        }
    });
    println!("{seen:?}");
    assert_eq!((daemon.process.pid(), daemon.process.is_running()), (pid, true));
    daemon.wait_idle("disk");
    daemon.wait_census(&before);
    under_load(&socket, || daemon.take_over());
    is_clean(daemon);
}

#[test]
fn a_new_daemon_that_hangs_holds_nobody_for_longer_than_it_asked_for() {
    let (mut daemon, _sim, socket) = bed();
    let mut client = Client::new(&socket);
    let mut new = Challenger::new(&door(&daemon));
    new.hello(2000).expect("manifest");
    // Everybody is served while it prepares.
    assert_eq!(client.write(0, &[9; BLOCK]), 0);
    let begun = Instant::now();
    new.say(&json!({"says": "prepared"}));
    new.expect("state");
    assert_eq!(client.read(0, BLOCK as u32), [9; BLOCK]);
    let held = begun.elapsed();
    assert!(held >= Duration::from_secs(2) && held < PATIENCE, "held for {held:?}");
    daemon.logged(&["no takeover", "does not answer in time"]);
    drop(new);
    daemon.take_over();
    assert_eq!(client.read(0, BLOCK as u32), [9; BLOCK]);
    drop(client);
    is_clean(daemon);
}

#[test]
fn a_device_that_dies_while_it_is_held_is_noticed_by_the_one_that_has_it() {
    let (daemon, sim, socket) = bed();
    let mut client = Client::new(&socket);
    let mut new = Challenger::new(&door(&daemon));
    new.hello(10_000).expect("manifest");
    new.say(&json!({"says": "prepared"}));
    new.expect("state");
    sim.kill();
    drop(new);
    daemon.wait_gone("disk");
    assert_ne!(client.call(Command::Read, 0, 512).map_or(1, |answer| answer.err().unwrap_or(0)), 0);
    daemon.stop(Duration::from_secs(5));
}

#[test]
fn garbage_at_the_door_is_shown_the_door() {
    let (mut daemon, _sim, socket) = bed();
    let mut client = Client::new(&socket);
    let messages = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        b"cfto\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
        b"cfto\x02\0\0\0\0\0\0\0[}".to_vec(),
        framed(&json!({"says": "hello"})),
        framed(&json!({"says": "commit"})),
    ];
    for bytes in messages {
        let mut stream = connect(&door(&daemon));
        stream.write_all(&bytes).expect("sent");
        let mut rest = Vec::new();
        // An end, or a reset over what was not read.
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(client.write(0, &[1; BLOCK]), 0);
    }
    let mut old = Challenger::new(&door(&daemon));
    old.say(&json!({"says": "hello", "version": 77, "deadline_ms": 1, "more": [1]}));
    let refused = old.expect("refused");
    assert!(refused["reason"].as_str().is_some_and(|why| why.contains("version 77")), "{refused}");
    daemon.take_over();
    assert_eq!(client.read(0, BLOCK as u32), [1; BLOCK]);
}

#[test]
fn an_old_daemon_that_dies_or_talks_nonsense_leaves_the_new_one_with_a_clean_end() {
    let folder = tempfile::tempdir().expect("a directory");
    let socket = folder.path().join("c.sock");
    let listener = UnixListener::bind(folder.path().join("c.sock.takeover")).expect("a socket");
    let manifest = json!({"says": "manifest", "process": 1, "bindings": []});
    let state =
        |count: u64| json!({"says": "state", "held_since": {"secs": 0, "nanos": 0}, "bindings": [], "count": count});
    let plays: [(Vec<Value>, &str); 7] = [
        (vec![], "it has gone"),
        (vec![json!("what?")], "does not speak this protocol"),
        (vec![json!({"says": "refused", "reason": "not today"})], "not today"),
        (vec![json!({"says": "commit"})], "no manifest"),
        (vec![manifest.clone()], "it has gone"),
        (vec![manifest.clone(), state(0)], "descriptors are announced"),
        (vec![manifest, json!({"says": "commit"})], "no state"),
    ];
    for (play, why) in plays {
        let mut new = Process::start(&mut cofferdam_process_tests::host::command(&[
            "daemon",
            "--takeover",
            "--socket",
            &text(&socket),
        ]));
        let (stream, _) = listener.accept().expect("it comes");
        let mut old = Challenger::on(stream);
        old.expect("hello");
        for (at, message) in play.iter().enumerate() {
            if at == 1 {
                old.expect("prepared");
            }
            old.say(message);
        }
        drop(old);
        new.end(PATIENCE).expect_error(1, &["serves on", why]);
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("the directory").count(), 1, "it has left nothing");
}

#[test]
fn calls_that_change_a_binding_and_a_takeover_keep_out_of_each_others_way() {
    let (mut daemon, sim, socket) = bed();
    let mut client = Client::new(&socket);
    // Held for as long as the other one says nothing.
    let mut new = Challenger::new(&door(&daemon));
    new.hello(10_000).expect("manifest");
    new.say(&json!({"says": "prepared"}));
    new.expect("state");
    daemon.run(&["unload", "disk"]).expect_error(1, &["another daemon is taking over"]);
    assert_eq!(daemon.binding("disk").expect("it can be looked at")["state"], "serving");
    drop(new);
    assert_eq!(client.write(0, &[2; BLOCK]), 0);
    // A binding that leaves is not handed over.
    sim.freeze();
    client.send(Command::Flush, 0, 0).expect("sent");
    daemon.wait_in_flight("disk", 1);
    let mut unload = Process::start(&mut daemon.command(&["unload", "disk", "--deadline", "20s"]));
    until_true("it drains", || daemon.binding("disk").is_some_and(|disk| disk["state"] == "draining"));
    daemon.challenge(&[]).end(PATIENCE).expect_error(1, &["'disk': it is draining"]);
    sim.thaw();
    unload.end(PATIENCE).expect(0);
    drop(client);
    // With nothing bound there is still a daemon to be replaced.
    assert!(daemon.take_over().starts_with("took over 0 bindings"));
    daemon.stop(Duration::from_secs(5));
}
