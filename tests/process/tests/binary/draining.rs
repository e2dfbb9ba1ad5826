//! Unloads that meet a hung device: deadlines, resumption, force; and what else `unload` answers.

use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::certificate::Certificate;
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::nbd::{Client, Command, ESHUTDOWN};
use cofferdam_process_tests::process::{Ended, Process};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{until, until_true};
use serde_json::Value;

use crate::why::looping;

/// One write that the device has and does not answer, because it is stopped.
pub(crate) fn frozen(daemon: &Daemon) -> (Backend, Client) {
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let mut client = Client::new(&socket);
    assert_eq!(client.write(4096, &[1; 4096]), 0);
    sim.freeze();
    client.send_write(0, &[1; 4096]).expect("sent");
    daemon.wait_in_flight("disk", 1);
    (sim, client)
}

#[track_caller]
fn unload_too_early(daemon: &Daemon) -> Value {
    let ended = daemon.run(&["unload", "disk", "--deadline", "100ms", "--json"]).expect(4);
    assert_eq!(ended.stdout, "");
    error(&ended)
}

/// The error document on stderr.
#[track_caller]
pub(crate) fn error(ended: &Ended) -> Value {
    let document = ended.stderr.lines().find_map(|line| serde_json::from_str::<Value>(line).ok());
    let document = document.unwrap_or_else(|| panic!("no document in {}", ended.stderr));
    assert!(document["error"]["message"].is_string(), "{document}");
    document["error"].clone()
}

#[test]
fn an_unload_that_meets_its_deadline_says_what_it_waits_for_and_stays_draining() {
    let daemon = Daemon::start();
    let (sim, mut client) = frozen(&daemon);
    // On a busy machine the answer may come from somebody who has no certificate.
    let error = until("the unload itself answers", || {
        let error = unload_too_early(&daemon);
        error["so_far"].is_object().then_some(error)
    });
    assert_eq!(error["code"], "still-draining");
    let message = error["message"].as_str().unwrap_or_default();
    for word in ["'disk'", "1 request on the ring", &sim.address(), "unload again", "--force"] {
        assert!(message.contains(word), "no {word:?} in {message}");
    }
    let so_far = Certificate::parse(error["so_far"].clone());
    assert_eq!((so_far.outcome(), so_far.number("requests_at_close")), ("draining", 1));
    let plain = daemon
        .run(&["unload", "disk", "--deadline", "50ms"])
        .expect_error(4, &["still draining", "1 request on the ring"]);
    assert_eq!(plain.stdout, "");

    let table = daemon.run(&["ls"]).expect(0).stdout;
    assert!(table.contains("draining"), "{table}");
    // Nothing is admitted any more, and the name and the device are not free.
    assert_eq!(client.call(Command::Read, 0, 512).expect("an answer"), Err(ESHUTDOWN));
    let other = Backend::sim(&["--memory", "16M"]);
    daemon.load(&programs::driver(), &other.address(), "disk", &[]).expect_error(1, &["'disk' exists already"]);
    daemon.load(&programs::driver(), &sim.address(), "other", &[]).expect_error(1, &["claimed"]);
}

/// How much later than its deadline a command may end: 200 ms are the daemon's, the rest is that of a busy machine.
const LATE: Duration = Duration::from_secs(2);

#[test]
fn an_unload_and_a_revocation_end_by_their_deadline_in_the_middle_of_a_call_that_does_not() {
    let daemon = Daemon::start();
    let (_sim, _client) = looping(&daemon);
    let id = daemon.binding("disk").expect("it serves")["handles"][0]["id"].to_string();
    let deadline = Duration::from_millis(300);
    let revoke = daemon.run(&["revoke", "disk", &id, "--deadline", "300ms", "--json"]).expect(4);
    assert!((deadline..deadline + LATE).contains(&revoke.took), "{:?}", revoke.took);
    assert_eq!(error(&revoke)["code"], "still-draining");
    for _ in 0..2 {
        let unload = daemon.run(&["unload", "disk", "--deadline", "300ms", "--explain", "--json"]).expect(4);
        assert!((deadline..deadline + LATE).contains(&unload.took), "{:?}", unload.took);
        let explanation = &error(&unload)["explanation"];
        assert_eq!(explanation["phase"], "draining", "{explanation}");
        assert_eq!(explanation["calls"][0]["export"], "submit", "{explanation}");
    }
    assert_eq!(daemon.unload("disk", &["--force"]).outcome(), "forced");
}

#[test]
fn an_unload_ends_by_its_deadline_when_an_answer_of_the_device_brings_the_driver_into_a_loop() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.path("disk.nbd");
    let (port, driver) = (format!("nbd:{}", socket.display()), programs::test_driver("loop-complete"));
    daemon.load(&driver, &sim.address(), "disk", &["--port", &port, "--call-deadline-ms", "60000"]).expect(0);
    sim.freeze();
    let mut client = Client::new(&socket);
    client.send_write(0, &[1; 4096]).expect("sent");
    daemon.wait_in_flight("disk", 1);
    // Without a port there is no client's thread to take the device's answers: the host's own bring them to the driver, which is in a loop from then on.
    daemon.run(&["port", "detach", "disk", &port]).expect(0);
    // Shorter than the time after which it explains itself in between.
    let deadline = Duration::from_millis(800);
    let begin = Instant::now();
    let arguments = ["unload", "disk", "--deadline", "800ms", "--explain", "--json"];
    let mut unload = Process::start(&mut daemon.command(&arguments));
    until_true("it drains", || daemon.binding("disk").is_some_and(|binding| binding["state"] == "draining"));
    sim.thaw();
    let ended = unload.end(deadline + LATE).expect(4);
    assert!(begin.elapsed() >= deadline);
    let error = error(&ended);
    assert_eq!(error["code"], "still-draining");
    assert_eq!(error["explanation"]["calls"][0]["export"], "complete", "{error}");
    assert_eq!(daemon.unload("disk", &["--force"]).outcome(), "forced");
    daemon.stop(Duration::from_secs(5));
}

#[test]
fn a_second_unload_completes_once_the_device_goes_on() {
    let daemon = Daemon::start();
    let (sim, mut client) = frozen(&daemon);
    unload_too_early(&daemon);
    sim.thaw();
    let certificate = daemon.unload("disk", &[]);
    certificate.assert_clean();
    assert_eq!(certificate.outcome(), "unloaded");
    assert_eq!((certificate.number("requests_at_close"), certificate.number("requests_completed")), (1, 1));
    assert_eq!(client.reply().expect("the answer goes out").error, 0);
    client.assert_closed();
}

#[test]
fn an_unload_that_waits_completes_when_the_device_goes_on() {
    let daemon = Daemon::start();
    let (sim, client) = frozen(&daemon);
    let mut unload = Process::start(&mut daemon.command(&["unload", "disk", "--json", "--deadline", "60s"]));
    until_true("it drains", || daemon.binding("disk").is_some_and(|binding| binding["state"] == "draining"));
    assert!(unload.is_running());
    sim.thaw();
    Certificate::parse(unload.end(Duration::from_secs(10)).expect(0).json()).assert_clean();
    drop(client);
}

#[test]
fn a_second_unload_completes_once_the_device_is_killed() {
    let daemon = Daemon::start();
    let (sim, mut client) = frozen(&daemon);
    unload_too_early(&daemon);
    sim.kill();
    let certificate = daemon.unload("disk", &[]);
    certificate.assert_clean();
    assert_eq!((certificate.number("requests_completed"), certificate.number("requests_failed")), (0, 1));
    let answer = client.reply();
    assert!(answer.is_ok_and(|reply| reply.error != 0), "a request of a dead device is answered as failed");
}

#[test]
fn force_ends_it_at_once_and_says_what_was_retired() {
    let daemon = Daemon::start();
    let (sim, mut client) = frozen(&daemon);
    let before_unload = daemon.census();
    unload_too_early(&daemon);
    let certificate = daemon.unload("disk", &["--force", "--deadline", "60s"]);
    assert_eq!(certificate.outcome(), "forced");
    certificate.assert_nothing_left();
    assert!(certificate.leaked_bytes() > 0);
    assert!(certificate.leak_reason().contains("requests that the backend has: 1"), "{}", certificate.leak_reason());
    assert_eq!((certificate.number("requests_completed"), certificate.number("requests_failed")), (0, 0));
    assert!(client.reply().is_err(), "what the device may still do is answered to nobody (L1)");
    assert!(daemon.bindings().is_empty());
    assert!(daemon.census().fits_in(&before_unload));

    // The people's version says it too, and the daemon serves on.
    drop(sim);
    let (_sim, _client) = frozen(&daemon);
    let text = daemon.run(&["unload", "disk", "--force"]).expect(0).stdout;
    assert!(text.contains("): forced\n") && text.contains("  retired   "), "{text}");
    daemon.stop(Duration::from_secs(5));
}

#[test]
fn unload_of_what_is_not_there_ends_with_3_and_wrong_words_with_2() {
    let daemon = Daemon::start();
    for name in ["nothing", "../../etc", "", "a b"] {
        daemon.run(&["unload", name]).expect_error(3, &["no binding is called"]);
    }
    let ended = daemon.run(&["unload", "nothing", "--json"]).expect(3);
    assert_eq!((error(&ended)["code"].as_str(), ended.stdout.as_str()), (Some("no-such-thing"), ""));
    daemon.run(&["inspect", "nothing"]).expect_error(3, &["no binding is called 'nothing'"]);
    daemon.run(&["inspect", "/no/such/file.wasm"]).expect_error(3, &["/no/such/file.wasm"]);
    daemon.run(&["unload", "nothing", "--deadline", "soon"]).expect_error(2, &["--deadline"]);
    let wrong: [&[&str]; 5] = [&[], &["unload"], &["fly"], &["ls", "--colour"], &["load", "x.wasm"]];
    for arguments in wrong {
        daemon.run(arguments).expect_error(2, &["Usage"]);
    }
    daemon.run(&["load", "--device", "x"]).expect_error(2, &["'x' is not a device address"]);
}

#[test]
fn a_pinned_driver_leaves_only_with_the_daemon() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &["--pinned"]);
    daemon.run(&["unload", "disk"]).expect_error(1, &["--pinned"]);
    assert_eq!(Client::new(&socket).write(0, &[1; 512]), 0);
    assert_eq!(daemon.binding("disk").expect("it serves")["pinned"], true);
    daemon.stop(Duration::from_secs(5));
}

#[test]
fn inspect_and_ls_show_a_binding_and_its_handles() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let mut client = Client::new(&socket);
    assert_eq!(client.write(0, &[1; 512]), 0);
    let shown = daemon.run(&["inspect", "disk", "--json"]).expect(0).json();
    assert_eq!(
        (&shown["state"], &shown["generation"], &shown["capacity_bytes"]),
        (&"serving".into(), &1.into(), &(16 << 20).into())
    );
    assert_eq!(shown["handles"][0]["requests"], 1, "{shown}");
    assert!(
        shown["calls"].as_array().is_some_and(|cores| cores.iter().any(|core| core["crossings"].as_u64() > Some(0)))
    );
    let table = daemon.run(&["ls"]).expect(0).stdout;
    for word in ["disk", "serving", "virtio-blk.wasm", &sim.address()] {
        assert!(table.contains(word), "{table}");
    }
    let file = daemon.run(&["inspect", &text(&programs::driver()), "--json"]).expect(0).json();
    assert_eq!(file["service"], "block", "{file}");
    let limits = &file["limits"];
    assert_eq!((&limits["mapped_handles"], &limits["mapped_bytes"]), (&16.into(), &(256 << 20).into()), "{limits}");
    assert!(
        file["imports"].as_array().is_some_and(|imports| imports.iter().all(|import| import["kind"] == "capability")),
        "{file}"
    );
}
