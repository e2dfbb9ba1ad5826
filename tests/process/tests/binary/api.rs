//! The control API as a stranger would use it: what it answers to wrong words, and what it lets one client have.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::connect;
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::wait::{PATIENCE, until_true};

use crate::draining::frozen;
use crate::events::flood;
use crate::http::{begin, call};

#[test]
fn wrong_words_are_answered_with_a_document_that_says_what_is_wrong() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    let socket = daemon.socket();
    let long = format!("{{\"port\":\"{}\"}}", "x".repeat(60_000));
    for (method, path, body, status, code, word) in [
        ("POST", "/v1/bindings/disk/unload", "", 400, "usage", "JSON"),
        ("POST", "/v1/bindings/disk/unload", "{\"deadline_ms\":-1,\"force\":false}", 400, "usage", "deadline_ms"),
        ("POST", "/v1/bindings/disk/unload", "{\"deadline_ms\":1,\"force\":false,\"x\":1}", 400, "usage", "x"),
        ("POST", "/v1/bindings/disk/handles/one/revoke", "{\"deadline_ms\":1}", 400, "usage", "'one'"),
        ("POST", "/v1/bindings/disk/handles/-1/revoke", "{\"deadline_ms\":1}", 400, "usage", "'-1'"),
        ("POST", "/v1/bindings/disk/handles/9/revoke", "{\"deadline_ms\":1}", 404, "no-such-thing", "no handle 9"),
        ("POST", "/v1/bindings/none/handles/1/revoke", "{\"deadline_ms\":1}", 404, "no-such-thing", "'none'"),
        ("POST", "/v1/bindings/disk/ports/attach", "[]", 400, "usage", "JSON"),
        ("POST", "/v1/bindings/disk/ports/attach", "{\"port\":\"x\"}", 400, "usage", "not a port"),
        ("POST", "/v1/bindings/disk/ports/detach", &long, 400, "usage", "not a port"),
        ("POST", "/v1/bindings/none/ports/detach", "{\"port\":\"nbd:/x\"}", 404, "no-such-thing", "'none'"),
        ("GET", "/v1/bindings/none/handles", "", 404, "no-such-thing", "'none'"),
        ("GET", "/v1/bindings/none/why", "", 404, "no-such-thing", "'none'"),
        ("GET", "/v1/events?since=abc", "", 400, "usage", "since=abc"),
        ("GET", "/v1/events?since=-1&follow=true", "", 400, "usage", "since=-1"),
        ("GET", "/v1/events?follow=maybe", "", 400, "usage", "follow=maybe"),
        ("GET", "/v1/events?since=1&since=2", "", 400, "usage", "since=2"),
        ("GET", "/v1/events?from=1", "", 400, "usage", "from=1"),
        ("GET", "/v2/bindings", "", 404, "no-such-thing", "another version"),
    ] {
        let (answered, document) = call(&socket, method, path, body);
        assert_eq!((answered, document["code"].as_str()), (status, Some(code)), "{method} {path}: {document}");
        assert!(document["message"].as_str().is_some_and(|message| message.contains(word)), "{path}: {document}");
    }
    assert_eq!(daemon.binding("disk").expect("it serves on")["state"], "serving");
    daemon.stop(Duration::from_secs(5));
}

#[test]
fn calls_that_wait_leave_room_for_those_that_look_and_for_force() {
    let daemon = Daemon::start();
    let (_sim, _client) = frozen(&daemon);
    let socket = daemon.socket();
    let body = "{\"deadline_ms\":60000,\"force\":false}";
    let waiting: Vec<_> = (0..32).map(|_| begin(&socket, "POST", "/v1/bindings/disk/unload", body)).collect();
    until_true("no further call may wait", || {
        let (status, document) = call(&socket, "POST", "/v1/bindings/none/unload", body);
        status == 422 && document["message"].as_str().is_some_and(|message| message.contains("32 other calls"))
    });
    daemon.run(&["why", "disk"]).expect(0);
    let begin = Instant::now();
    assert_eq!(daemon.unload("disk", &["--force"]).outcome(), "forced");
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    for mut stream in waiting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "everyone who waited gets the certificate: {answer}");
    }
}

/// Connections that the daemon serves at once.
const CONNECTIONS: usize = 64;

#[test]
fn clients_that_stop_in_the_middle_of_a_call_do_not_keep_the_operator_out() {
    let daemon = Daemon::start();
    let stall = |_| {
        let mut stream = connect(&daemon.socket());
        let head = "POST /v1/bindings/x/unload HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{";
        stream.write_all(head.as_bytes()).expect("sent");
        stream
    };
    let stalled: Vec<UnixStream> = (0..CONNECTIONS).map(stall).collect();
    // Behind all of them in the queue: it is served when they are cut off, which is before its own client gives up.
    Process::run_for(&mut daemon.command(&["ls"]), PATIENCE).expect(0);
    for mut stream in stalled {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer, and the end of the connection");
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("did not come within 10s"), "{answer}");
    }
}

#[test]
fn clients_that_do_not_read_their_answer_do_not_keep_the_operator_out() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    // Far more text than a socket takes.
    flood(&daemon, &sim.address(), 4096);
    let mut stalled: Vec<_> = (0..CONNECTIONS).map(|_| begin(&daemon.socket(), "GET", "/v1/events", "")).collect();
    let status = |stream: &mut UnixStream| {
        let mut head = [0; 12];
        stream.read_exact(&mut head).expect("an answer that has begun");
        String::from_utf8_lossy(&head).into_owned()
    };
    let answers: Vec<_> = stalled.iter_mut().map(status).collect();
    let served = answers.iter().filter(|status| *status == "HTTP/1.1 200").count();
    assert_eq!(served, 8, "{answers:?}");
    daemon.run(&["ls"]).expect(0);
    daemon.run(&["events"]).expect_error(1, &["8 clients are being told"]);
    // Those that still do not read are cut off, in the middle of what they were to be told.
    until_true("there is room for a client that reads", || daemon.run(&["events"]).code == Some(0));
    let mut rest = Vec::new();
    for (mut stream, _) in stalled.into_iter().zip(answers).filter(|(_, status)| status == "HTTP/1.1 200") {
        rest.clear();
        // Cut off with or without an error.
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.ends_with(b"\r\n0\r\n\r\n"), "an answer that nobody read came to its end");
    }
}

#[test]
fn every_answer_says_which_daemon_gave_it() {
    let mut daemon = Daemon::start();
    let instance = |daemon: &Daemon, path: &str| {
        let mut answer = String::new();
        begin(&daemon.socket(), "GET", path, "").read_to_string(&mut answer).expect("an answer");
        let line = answer.lines().find_map(|line| line.strip_prefix("x-cofferdam-daemon: ").map(str::to_owned));
        line.unwrap_or_else(|| panic!("no daemon in {answer}"))
    };
    let first = instance(&daemon, "/v1/events?since=7");
    assert_eq!(instance(&daemon, "/v1/bindings"), first);
    assert_eq!(instance(&daemon, "/v1/nothing"), first);
    daemon.crash_and_restart();
    assert_ne!(instance(&daemon, "/v1/events?since=7"), first);
}
