//! `why` and `unload --explain`: who holds what, and what an unload leaves behind whose client has gone.

use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::certificate::Certificate;
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::nbd::Client;
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};
use serde_json::Value;

use crate::draining::{error, frozen};

const KEYS: [&str; 14] = [
    "calls",
    "cause",
    "certificate",
    "draining_ms",
    "fault",
    "forced",
    "handles",
    "name",
    "phase",
    "pinned",
    "requests",
    "retired_bytes",
    "state",
    "waits_for",
];

#[track_caller]
fn check(document: Value) -> Value {
    let mut keys: Vec<_> = document.as_object().unwrap_or_else(|| panic!("{document}")).keys().collect();
    keys.sort();
    assert_eq!(keys, KEYS, "{document}");
    document
}

#[track_caller]
fn why(daemon: &Daemon, name: &str) -> Value {
    check(daemon.run(&["why", name, "--json"]).expect(0).json())
}

#[track_caller]
fn wait_stage(daemon: &Daemon, stage: &str) {
    until_true(&format!("the binding is {stage}"), || {
        daemon.binding("disk").is_some_and(|binding| binding["stage"] == stage)
    });
}

/// A driver in an endless loop that nothing interrupts for a minute, with the client that brought it about.
pub(crate) fn looping(daemon: &Daemon) -> (Backend, Client) {
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.path("disk.nbd");
    let port = format!("nbd:{}", socket.display());
    let more = ["--port", &port, "--call-deadline-ms", "60000"];
    daemon.load(&programs::test_driver("loop-submit"), &sim.address(), "disk", &more).expect(0);
    let mut client = Client::new(&socket);
    client.send_write(0, &[1; 512]).expect("sent");
    until_true("the driver is in its loop", || {
        why(daemon, "disk")["calls"].as_array().is_some_and(|calls| !calls.is_empty())
    });
    (sim, client)
}

#[test]
fn why_of_a_binding_that_serves_says_that_it_waits_for_nothing_and_who_holds_it() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let mut client = Client::new(&socket);
    assert_eq!(client.write(0, &[1; 512]), 0);
    let idle = why(&daemon, "disk");
    assert_eq!((&idle["phase"], &idle["cause"], &idle["certificate"]), (&"serving".into(), &Value::Null, &Value::Null));
    assert_eq!(
        (&idle["waits_for"], &idle["requests"], &idle["calls"]),
        (&serde_json::json!([]), &serde_json::json!([]), &serde_json::json!([]))
    );
    assert_eq!(idle["handles"][0]["requests"], 1);
    let said = daemon.run(&["why", "disk"]).expect(0).stdout;
    assert!(said.starts_with("disk: serving\nwaits for nothing\nhandles\n  ID"), "{said}");
    for name in ["nothing", "../../etc", ""] {
        daemon.run(&["why", name]).expect_error(3, &["no binding is called"]);
    }
}

#[test]
fn why_names_the_request_the_device_and_the_handle_that_an_unload_waits_for() {
    let daemon = Daemon::start();
    let (sim, _client) = frozen(&daemon);
    daemon.run(&["unload", "disk", "--deadline", "50ms"]).expect(4);
    let now = why(&daemon, "disk");
    assert_eq!(
        (&now["phase"], &now["state"], &now["cause"]),
        (&"draining".into(), &"waiting".into(), &"unload".into())
    );
    assert!(now["draining_ms"].is_u64(), "{now}");
    let first = now["waits_for"][0].as_str().expect("a sentence");
    for word in ["1 request on the ring of", &sim.address(), "write", "handle"] {
        assert!(first.contains(word), "no {word:?} in {first}");
    }
    let request = &now["requests"][0];
    assert_eq!(
        (&request["operation"], &request["stage"], &request["lane"]),
        (&"write".into(), &"published".into(), &0.into())
    );
    assert_eq!(request["handle"], now["handles"][0]["id"]);
    let said = daemon.run(&["why", "disk"]).expect(0).stdout;
    assert!(said.starts_with("disk: draining (waiting, unload) for "), "{said}");
    let second = said.lines().nth(1).map(str::to_owned);
    assert_eq!(second.as_deref(), Some("waits for"), "{said}");
    assert!(said.contains("oldest requests\n") && said.contains("published"), "{said}");
    assert!(daemon.run(&["ls"]).expect(0).stdout.contains("draining (waiting, unload)"));
}

#[test]
fn why_of_a_binding_that_left_brings_its_certificate() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    let given = daemon.run(&["unload", "disk", "--json"]).expect(0).json();
    let told = why(&daemon, "disk");
    assert_eq!(
        (&told["phase"], &told["certificate"], &told["waits_for"]),
        (&"detached".into(), &given, &serde_json::json!([]))
    );
    let said = daemon.run(&["why", "disk"]).expect(0).stdout;
    assert!(said.starts_with("disk: detached (unload)\n") && said.contains("  left      nothing\n"), "{said}");
}

#[test]
fn why_shows_where_a_driver_loops_and_how_it_ended() {
    let daemon = Daemon::start();
    let (_sim, _client) = looping(&daemon);
    until_true("it has a backtrace", || {
        why(&daemon, "disk")["calls"][0]["backtrace"].as_array().is_some_and(|frames| !frames.is_empty())
    });
    let call = why(&daemon, "disk")["calls"][0].clone();
    assert_eq!(
        (&call["export"], &call["lane"], &call["import"]),
        (&"submit".into(), &"0".into(), &Value::Null),
        "{call}"
    );
    let said = daemon.run(&["why", "disk"]).expect(0).stdout;
    assert!(said.contains("calls into the driver\n  lane 0: submit, for ") && said.contains("    #0  "), "{said}");

    let ended = daemon.run(&["unload", "disk", "--deadline", "100ms", "--explain", "--json"]).expect(4);
    let explanation = check(error(&ended)["explanation"].clone());
    assert_eq!(explanation["calls"][0]["export"], "submit", "{explanation}");
    Certificate::parse(error(&ended)["so_far"].clone());

    let begin = Instant::now();
    let certificate = daemon.unload("disk", &["--force"]);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert_eq!((certificate.outcome(), certificate.number("calls_interrupted")), ("forced", 1));
    certificate.assert_nothing_left();
    let told = why(&daemon, "disk");
    assert_eq!(told["fault"]["kind"], "killed", "{told}");
    assert!(told["fault"]["backtrace"].as_array().is_some_and(|frames| !frames.is_empty()), "{told}");
}

#[test]
fn explain_says_on_stderr_what_it_waits_for_while_it_waits_and_when_it_gives_up() {
    let daemon = Daemon::start();
    let (sim, _client) = frozen(&daemon);
    let mut unload = Process::start(&mut daemon.command(&["unload", "disk", "--explain", "--deadline", "60s"]));
    unload.wait_stderr("'disk' waits for\n  1 request on the ring of");
    assert!(unload.is_running());
    let mut second =
        Process::start(&mut daemon.command(&["unload", "disk", "--explain", "--deadline", "60s", "--json"]));
    second.wait_stderr("{\"waiting\":{");
    let gave_up =
        daemon.run(&["unload", "disk", "--explain", "--deadline", "100ms"]).expect_error(4, &["still draining"]);
    assert!(gave_up.stderr.contains("\nwaits for\n  1 request on the ring of"), "{}", gave_up.stderr);
    assert_eq!(gave_up.stdout, "");
    let without = daemon.run(&["unload", "disk", "--deadline", "100ms", "--json"]).expect(4);
    assert_eq!(error(&without)["explanation"], Value::Null, "only who asks is explained to");
    sim.thaw();
    let ended = unload.end(PATIENCE).expect(0);
    assert!(ended.stdout.contains("): unloaded\n"), "{}", ended.stdout);
    assert_eq!(
        ended.stderr.matches("waits for").count(),
        1,
        "what has not changed is not said again: {}",
        ended.stderr
    );
    let ended = second.end(PATIENCE).expect(0);
    Certificate::parse(ended.json()).assert_clean();
    let lines: Vec<_> = ended.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).collect();
    assert_eq!(lines.len(), 1, "{}", ended.stderr);
    check(lines[0]["waiting"].clone());
}

#[test]
fn ctrl_c_on_an_unload_leaves_the_binding_draining_and_says_so() {
    for signal in [Signal::INT, Signal::TERM] {
        let daemon = Daemon::start();
        let (sim, client) = frozen(&daemon);
        let mut unload =
            Process::start(&mut daemon.command(&["unload", "disk", "--deadline", "60s", "--json", "--explain"]));
        wait_stage(&daemon, "draining");
        unload.signal(signal);
        let begin = Instant::now();
        let ended = unload.end(PATIENCE).expect(4);
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
        assert_eq!(ended.stdout, "");
        let document = ended.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).next_back();
        let error = document.expect("a document")["error"].clone();
        assert_eq!(error["code"], "still-draining");
        let message = error["message"].as_str().unwrap_or_default();
        for word in ["'disk' is still draining", "cofferdam unload disk", "cofferdam why disk"] {
            assert!(message.contains(word), "no {word:?} in {message}");
        }
        check(error["explanation"].clone());
        wait_stage(&daemon, "waiting");
        sim.thaw();
        assert_eq!(daemon.unload("disk", &[]).outcome(), "unloaded");
        client.assert_closed();
    }
}

#[test]
fn an_unload_whose_client_was_killed_stops_waiting_and_the_next_one_goes_on() {
    let daemon = Daemon::start();
    let (sim, _client) = frozen(&daemon);
    let mut unload = Process::start(&mut daemon.command(&["unload", "disk", "--deadline", "60s"]));
    wait_stage(&daemon, "draining");
    unload.signal(Signal::KILL);
    unload.end(PATIENCE);
    wait_stage(&daemon, "waiting");
    let begin = Instant::now();
    daemon.run(&["unload", "disk", "--deadline", "100ms"]).expect(4);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    sim.thaw();
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_forced_unload_goes_through_without_its_client() {
    let daemon = Daemon::start();
    let (_sim, _client) = frozen(&daemon);
    let mut unload = Process::start(&mut daemon.command(&["unload", "disk", "--deadline", "60s", "--force"]));
    until_true("it leaves", || daemon.binding("disk").is_none_or(|binding| binding["state"] != "serving"));
    unload.signal(Signal::KILL);
    unload.end(PATIENCE);
    until_true("it has left", || why(&daemon, "disk")["phase"] == "detached");
    assert_eq!(why(&daemon, "disk")["certificate"]["outcome"], "forced");
}

#[test]
fn memory_that_was_retired_is_shown_until_the_daemon_ends() {
    let daemon = Daemon::start();
    let (_sim, _client) = frozen(&daemon);
    let leaked = daemon.unload("disk", &["--force"]).leaked_bytes();
    assert!(leaked > 0);
    assert!(daemon.binding("disk").is_none(), "it has left");
    let shown = daemon.listed().first().cloned().expect("it is listed");
    assert_eq!((&shown["state"], shown["retired_bytes"].as_u64()), (&"detached".into(), Some(leaked)));
    let table = daemon.run(&["ls"]).expect(0).stdout;
    assert!(table.contains("detached (unload, ") && table.contains(" retired)"), "{table}");
    assert_eq!(why(&daemon, "disk")["retired_bytes"], leaked);
    let told = daemon.run(&["events", "--json"]).expect(0).stdout;
    assert!(told.contains("\"event\":\"retired\""), "{told}");
    // Its name and its place are free all the same.
    let other = Backend::sim(&["--memory", "16M"]);
    let driver = text(&programs::driver());
    daemon.run(&["load", &driver, "--device", &other.address(), "--name", "disk"]).expect(0);
}
