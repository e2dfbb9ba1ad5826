//! `cofferdam events`: everything that happened, in order, and nothing lost without a word.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::process::{Process, Signal, Unread};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until, until_true};
use serde_json::Value;

use crate::http::{call, follow};

fn documents(stdout: &str) -> Vec<Value> {
    stdout.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// Everything that is kept.
#[track_caller]
fn events(daemon: &Daemon) -> Vec<Value> {
    documents(&daemon.run(&["events", "--json"]).expect(0).stdout)
}

#[track_caller]
fn number(document: &Value, key: &str) -> u64 {
    document[key].as_u64().unwrap_or_else(|| panic!("{key} in {document}"))
}

/// The records must follow each other without a hole, but for what a gap says.
#[track_caller]
fn assert_complete(records: &[Value]) {
    for pair in records.windows(2) {
        let step = if pair[0]["event"] == "gap" { number(&pair[0], "missed") } else { 1 };
        assert_eq!(number(&pair[1], "seq"), number(&pair[0], "seq") + step, "{} {}", pair[0], pair[1]);
    }
}

/// At least so many records: a load that fails in the middle is a dozen.
pub(crate) fn flood(daemon: &Daemon, device: &str, records: u64) {
    let driver = programs::test_driver("not-mine");
    let body = serde_json::json!({
        "driver": driver, "device": device, "ports": [], "name": "flood", "queues": 1, "allow": [], "pinned": false,
        "memory_mib": 1, "call_deadline_ms": 1000, "arena_mib": 4, "ring_entries": 16, "requests": 16, "handles": 16,
    });
    let begin = newest(daemon);
    while newest(daemon) < begin + records {
        for _ in 0..50 {
            let (status, document) = call(&daemon.socket(), "POST", "/v1/bindings", &body.to_string());
            assert_eq!((status, document["code"].as_str()), (422, Some("failed")), "{document}");
        }
    }
}

/// The number of the newest record.
fn newest(daemon: &Daemon) -> u64 {
    events(daemon).last().map_or(0, |record| number(record, "seq"))
}

#[test]
fn every_transition_of_a_life_is_told_once_in_order_and_with_its_cause() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let mut follower = Process::start(&mut daemon.command(&["events", "--follow", "--json"]));
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    follower.wait_stdout("\"serving\"");
    daemon.run(&["port", "detach", "disk", &format!("nbd:{}", socket.display())]).expect(0);
    daemon.unload("disk", &[]).assert_clean();
    follower.wait_stdout("\"to\":\"detached\"");
    let told = documents(&follower.stdout());
    assert_complete(&told);
    assert_eq!(told, events(&daemon), "a follower is told what everyone is told");
    assert!(told.iter().all(|record| record["binding"] == "disk" && record["generation"] == 1), "{told:?}");
    let states: Vec<_> = told.iter().filter(|record| record["event"] == "state").collect();
    for pair in states.windows(2) {
        assert_eq!(pair[0]["to"], pair[1]["from"]);
    }
    let all: Vec<_> = states.iter().filter_map(|record| record["to"].as_str()).collect();
    for state in ["serving", "closing", "revoking", "draining", "quiescing", "answering", "detached"] {
        assert!(all.contains(&state), "no {state} among {all:?}");
    }
    for record in &states {
        let leaving = record["phase"] != "loading" && record["phase"] != "serving";
        assert_eq!(record["cause"].as_str(), leaving.then_some("unload"), "{record}");
    }
    let kinds: Vec<_> = told.iter().filter_map(|record| record["event"].as_str()).collect();
    assert!(kinds.contains(&"port-attached") && kinds.contains(&"port-detached"), "{kinds:?}");

    let text = daemon.run(&["events"]).expect(0).stdout;
    assert_eq!(text.lines().count(), told.len(), "{text}");
    for word in ["Z      1  disk/1  ", "loading -> serving", "port attached: nbd:", "port detached: nbd:", "unload"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    follower.signal(Signal::INT);
    follower.end(PATIENCE).expect(0);
}

#[test]
fn since_begins_with_a_record_and_a_number_of_another_life_with_the_oldest() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    let all = events(&daemon);
    let last = number(all.last().expect("something happened"), "seq");
    let since =
        |from: u64| documents(&daemon.run(&["events", "--json", "--since", &from.to_string()]).expect(0).stdout);
    assert_eq!(since(last), all[all.len() - 1..]);
    assert_eq!(since(1), all);
    assert_eq!(since(last + 1), Vec::<Value>::new());
    assert_eq!(since(u64::MAX), all);
    for wrong in ["x", "-1", "", "99999999999999999999"] {
        daemon.run(&["events", "--since", wrong]).expect(2);
    }
    let mut follower =
        Process::start(&mut daemon.command(&["events", "--follow", "--json", "--since", &last.to_string()]));
    daemon.unload("disk", &[]).assert_clean();
    follower.wait_stdout("\"to\":\"detached\"");
    assert_eq!(number(&documents(&follower.stdout())[0], "seq"), last);
    assert!(follower.is_running());
}

#[test]
fn the_daemons_end_ends_a_follower_with_0_after_the_last_record() {
    let mut daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    let mut follower = Process::start(&mut daemon.command(&["events", "--follow"]));
    follower.wait_stdout("serving");
    daemon.crash_and_restart();
    let ended = follower.end(PATIENCE).expect(0);
    assert!(ended.stderr.contains("the daemon went away"), "{}", ended.stderr);

    daemon.serve(&sim.address(), "disk", &[]);
    let mut follower = Process::start(&mut daemon.command(&["events", "--follow", "--json"]));
    follower.wait_stdout("\"serving\"");
    daemon.stop(Duration::from_secs(5));
    let ended = follower.end(PATIENCE).expect(0);
    assert!(ended.stderr.contains("the daemon has stopped"), "{}", ended.stderr);
    let told = documents(&ended.stdout);
    assert_complete(&told);
    let last = told.last().expect("records");
    assert_eq!((&last["to"], &last["cause"]), (&"detached".into(), &"shutdown".into()), "{last}");
}

#[test]
fn a_follower_that_stops_reading_holds_up_nobody_and_is_told_of_the_gap() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "before", &[]);
    let follower = Process::start(&mut daemon.command(&["events", "--follow", "--json"]));
    follower.wait_stdout("\"serving\"");
    let text = Process::start(&mut daemon.command(&["events", "--follow"]));
    text.wait_stdout("serving");
    follower.signal(Signal::STOP);
    text.signal(Signal::STOP);
    daemon.unload("before", &[]).assert_clean();
    // More than the log keeps.
    flood(&daemon, &sim.address(), 7000);
    daemon.serve(&sim.address(), "after", &[]);
    follower.signal(Signal::CONT);
    text.signal(Signal::CONT);
    follower.wait_stdout("\"binding\":\"after\"");
    text.wait_stdout("  after/1  ");
    let told = documents(follower.stdout().trim_end_matches(|c| c != '\n'));
    assert_complete(&told);
    let gaps: Vec<_> = told.iter().filter(|record| record["event"] == "gap").collect();
    assert!(!gaps.is_empty() && gaps.iter().all(|gap| gap["binding"] == "" && number(gap, "missed") > 0), "{gaps:?}");
    assert_eq!(told[0]["seq"], 1);
    assert!(text.stdout().contains("events missed: they are no longer kept --"));

    // Nor does a stdout that nobody reads hold up Ctrl-C.
    let mut blocked = daemon.command(&["events", "--follow", "--json"]);
    let mut blocked = Unread::start(blocked.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut stdout = blocked.stdout().expect("a pipe");
    stdout.read_exact(&mut [0; 1]).expect("it writes");
    blocked.signal(Signal::INT);
    assert_eq!(blocked.end(PATIENCE).code(), Some(0));
    daemon.stop(Duration::from_secs(5));
}

#[test]
fn a_17th_follower_is_refused_until_one_goes_and_nothing_of_them_stays() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    let before = daemon.census();
    let mut followers: Vec<_> = (0..16).map(|_| follow(&daemon.socket())).collect();
    daemon.run(&["events", "--follow"]).expect_error(1, &["16 clients follow"]);
    daemon.run(&["events"]).expect(0);
    followers.pop();
    let begin = std::time::Instant::now();
    let mut again = follow_when_possible(&daemon);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    let mut line = String::new();
    while !line.contains("\"serving\"") {
        line.clear();
        assert_ne!(again.read_line(&mut line).expect("a line"), 0);
    }
    drop((followers, again));
    daemon.wait_census(&before);
}

#[track_caller]
fn follow_when_possible(daemon: &Daemon) -> BufReader<std::os::unix::net::UnixStream> {
    until("a place is free", || {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| follow(&daemon.socket()))).ok()
    })
}

#[test]
fn a_reader_of_the_output_that_goes_away_ends_the_follower() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    let mut command = Command::new("sh");
    let line = format!("{} events --follow | head -n 1", programs::cofferdam().display());
    let mut pipeline = Process::start(command.args(["-c", &line]).env("COFFERDAM_SOCKET", daemon.socket()));
    pipeline.wait_stdout("disk/1");
    // It notices with the next thing that it has to say.
    until_true("it ends", || {
        daemon.run(&["port", "attach", "disk", "nbd:127.0.0.1:0"]);
        !pipeline.is_running()
    });
    pipeline.end(PATIENCE).expect(0);
}
