//! Who holds a binding, and taking a handle away from one client while the others are served on.

use std::time::Duration;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, Command};
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::wait::until_true;
use serde_json::Value;

use crate::draining::{error, frozen};

/// `handles NAME --json`.
#[track_caller]
fn handles(daemon: &Daemon, name: &str) -> Vec<Value> {
    let document = daemon.run(&["handles", name, "--json"]).expect(0).json();
    document.as_array().unwrap_or_else(|| panic!("{document}")).clone()
}

#[track_caller]
fn wait_handles(daemon: &Daemon, name: &str, count: usize) -> Vec<Value> {
    until_true(&format!("'{name}' has {count} handles"), || handles(daemon, name).len() == count);
    handles(daemon, name)
}

#[test]
fn handles_lists_every_client_with_its_port_peer_lane_and_requests() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    assert!(daemon.run(&["handles", "disk"]).expect(0).stdout.contains("disk has no handles"));
    assert!(handles(&daemon, "disk").is_empty());
    let mut one = Client::new(&socket);
    assert_eq!(one.write(0, &[1; 512]), 0);
    let _two = Client::new(&socket);
    let list = wait_handles(&daemon, "disk", 2);
    let mut keys: Vec<_> = list[0].as_object().expect("an object").keys().collect();
    keys.sort();
    assert_eq!(keys, ["age_seconds", "id", "in_flight", "lane", "peer", "port", "requests"]);
    assert_eq!((&list[0]["requests"], &list[0]["in_flight"], &list[0]["lane"]), (&1.into(), &0.into(), &0.into()));
    assert!(list[0]["peer"].as_str().is_some_and(|peer| peer.contains("pid=")), "{}", list[0]);
    let table = daemon.run(&["handles", "disk"]).expect(0).stdout;
    for word in ["ID", "PORT", "PEER", "LANE", "AGE", "IN FLIGHT", "REQUESTS", "pid="] {
        assert!(table.contains(word), "no {word:?} in {table}");
    }
    assert_eq!(table.lines().count(), 3, "{table}");
}

#[test]
fn a_revoked_handle_loses_its_client_and_the_others_are_served_on() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let mut keeper = Client::new(&socket);
    assert_eq!(keeper.write(0, &[1; 512]), 0);
    let kept = wait_handles(&daemon, "disk", 1)[0]["id"].as_u64().expect("a number");
    let loser = Client::new(&socket);
    let list = wait_handles(&daemon, "disk", 2);
    let lost = list.iter().filter_map(|handle| handle["id"].as_u64()).find(|id| *id != kept).expect("another");

    let report = daemon.run(&["revoke", "disk", &lost.to_string(), "--json"]).expect(0).json();
    let mut keys: Vec<_> = report.as_object().expect("an object").keys().collect();
    keys.sort();
    assert_eq!(keys, ["binding", "handle", "micros", "peer", "port", "requests_at_revoke", "requests_left"]);
    assert_eq!(
        (&report["binding"], &report["handle"], &report["requests_left"]),
        (&"disk".into(), &lost.into(), &0.into())
    );
    loser.assert_closed();
    assert_eq!(keeper.write(512, &[2; 512]), 0);
    assert_eq!(wait_handles(&daemon, "disk", 1)[0]["id"], kept);
    // A client that comes back gets a new handle.
    let again = Client::new(&socket);
    let list = wait_handles(&daemon, "disk", 2);
    assert!(list.iter().all(|handle| handle["id"] != lost), "{list:?}");
    let said = daemon.run(&["revoke", "disk", &list[1]["id"].to_string()]).expect(0).stdout;
    assert!(said.contains("of disk is revoked") && said.contains("0 requests in flight, all answered"), "{said}");
    again.assert_closed();
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_handle_with_requests_at_a_hung_device_is_revoked_and_the_command_says_4() {
    let daemon = Daemon::start();
    let (sim, client) = frozen(&daemon);
    let id = handles(&daemon, "disk")[0]["id"].to_string();
    let ended = daemon.run(&["revoke", "disk", &id, "--deadline", "100ms", "--json"]).expect(4);
    assert_eq!(ended.stdout, "");
    let error = error(&ended);
    assert_eq!(error["code"], "still-draining");
    assert_eq!((&error["revoked"]["requests_at_revoke"], &error["revoked"]["requests_left"]), (&1.into(), &1.into()));
    let message = error["message"].as_str().unwrap_or_default();
    assert!(message.contains("'disk'") && message.contains("1 request of it is still with the device"), "{message}");
    assert_eq!(daemon.binding("disk").expect("it serves")["state"], "serving");
    sim.thaw();
    client.assert_closed();
    daemon.wait_idle("disk");
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_revocation_that_waits_ends_when_the_device_answers() {
    let daemon = Daemon::start();
    let (sim, client) = frozen(&daemon);
    let id = handles(&daemon, "disk")[0]["id"].to_string();
    let mut revoke = Process::start(&mut daemon.command(&["revoke", "disk", &id, "--deadline", "60s", "--json"]));
    until_true("it is recorded", || daemon.run(&["events", "--json"]).expect(0).stdout.contains("\"handle-revoked\""));
    assert!(revoke.is_running());
    sim.thaw();
    let report = revoke.end(Duration::from_secs(10)).expect(0).json();
    assert_eq!((&report["requests_at_revoke"], &report["requests_left"]), (&1.into(), &0.into()));
    client.assert_closed();
}

#[test]
fn handles_and_revoke_of_what_is_not_there_end_with_3_and_wrong_words_with_2() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    for name in ["nothing", "../../etc", "", "a b"] {
        daemon.run(&["handles", name]).expect_error(3, &["no binding is called"]);
        daemon.run(&["revoke", name, "1"]).expect_error(3, &["no binding is called"]);
    }
    daemon.run(&["revoke", "disk", "99"]).expect_error(3, &["'disk' has no handle 99"]);
    daemon.run(&["revoke", "disk", &u64::MAX.to_string()]).expect_error(3, &["has no handle"]);
    let ended = daemon.run(&["revoke", "disk", "99", "--json"]).expect(3);
    assert_eq!((error(&ended)["code"].as_str(), ended.stdout.as_str()), (Some("no-such-thing"), ""));
    for wrong in ["one", "-1", "1.5", "99999999999999999999", ""] {
        daemon.run(&["revoke", "disk", wrong]).expect(2);
    }
    daemon.run(&["revoke", "disk", "1", "--deadline", "2m"]).expect_error(2, &["at most a minute"]);
    daemon.run(&["revoke", "disk"]).expect_error(2, &["Usage"]);
    assert_eq!(Client::new(&socket).call(Command::Read, 0, 512).expect("an answer"), Ok(vec![0; 512]));
}
