//! Ports and bindings apart (L6): a port comes and goes while the binding serves on.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::certificate::Certificate;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, connect};
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::wait::{PATIENCE, until_true};
use serde_json::Value;

use crate::draining::{error, frozen};

fn address(path: &Path) -> String {
    format!("nbd:{}", path.display())
}

#[track_caller]
fn keys(document: &Value) -> Vec<&String> {
    let mut keys: Vec<_> = document.as_object().unwrap_or_else(|| panic!("{document}")).keys().collect();
    keys.sort();
    keys
}

#[test]
fn a_port_is_attached_and_detached_while_the_binding_serves_on() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let first = daemon.serve(&sim.address(), "disk", &[]);
    let mut constant = Client::new(&first);
    assert_eq!(constant.write(0, &[1; 512]), 0);
    let before = daemon.census();

    let second = daemon.path("second.nbd");
    let attached = daemon.run(&["port", "attach", "disk", &address(&second), "--json"]).expect(0).json();
    assert_eq!(keys(&attached), ["binding", "port", "ports"]);
    assert_eq!(attached["ports"], serde_json::json!([address(&first), address(&second)]));
    assert_eq!(daemon.binding("disk").expect("it serves")["ports"], attached["ports"]);
    let mut guest = Client::new(&second);
    assert_eq!(guest.read(0, 512), [1; 512]);

    let detached = daemon.run(&["port", "detach", "disk", &address(&second), "--json"]).expect(0).json();
    assert_eq!(keys(&detached), ["binding", "connections", "port", "ports", "severed"]);
    assert_eq!((&detached["connections"], &detached["ports"]), (&1.into(), &serde_json::json!([address(&first)])));
    guest.assert_closed();
    assert!(!second.exists(), "the socket's file is removed");
    assert_eq!(constant.write(512, &[2; 512]), 0);
    daemon.wait_census(&before);

    // The last one, too: then it can be reached again by another.
    let said = daemon.run(&["port", "detach", "disk", &address(&first)]).expect(0).stdout;
    assert!(said.contains("disk: detached nbd:") && said.contains("reachable at no address"), "{said}");
    constant.assert_closed();
    let said = daemon.run(&["port", "attach", "disk", &address(&first)]).expect(0).stdout;
    assert!(
        said.contains("disk: attached nbd:") && said.contains(&format!("reachable at {}", address(&first))),
        "{said}"
    );
    assert_eq!(Client::new(&first).read(512, 512), [2; 512]);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn port_0_is_answered_with_the_real_one_by_which_it_is_detached() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    let attached = daemon.run(&["port", "attach", "disk", "nbd:127.0.0.1:0", "--json"]).expect(0).json();
    let real = attached["port"].as_str().expect("an address");
    assert!(real.starts_with("nbd:127.0.0.1:") && !real.ends_with(":0"), "{real}");
    daemon.run(&["port", "detach", "disk", "nbd:127.0.0.1:0"]).expect_error(3, &["has no port", real]);
    daemon.run(&["port", "detach", "disk", real]).expect(0);
}

#[test]
fn a_port_that_is_there_or_is_not_or_cannot_be_is_refused_and_nothing_changes() {
    let daemon = Daemon::start();
    let (sim, other) = (Backend::sim(&["--memory", "16M"]), Backend::sim(&["--memory", "16M"]));
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let other_socket = daemon.serve(&other.address(), "other", &[]);
    let here = address(&socket);
    // Whoever has been answered has found every thread at work.
    connect(&socket);
    connect(&other_socket);
    let before = daemon.census();
    daemon.run(&["port", "attach", "disk", &here]).expect_error(1, &["'disk' is served at", "already"]);
    daemon.run(&["port", "attach", "other", &here]).expect_error(1, &["in use"]);
    daemon.run(&["port", "attach", "disk", "nbd:/no/such/directory/x"]).expect_error(1, &["does not exist"]);
    daemon.run(&["port", "detach", "other", &here]).expect_error(3, &["'other' has no port", "other.nbd"]);
    let ended = daemon.run(&["port", "detach", "disk", "nbd:/nothing.nbd", "--json"]).expect(3);
    assert_eq!((error(&ended)["code"].as_str(), ended.stdout.as_str()), (Some("no-such-thing"), ""));
    for how in ["attach", "detach"] {
        for wrong in ["nbd", "nbd:", "nbd:relative.nbd", "nbd:192.0.2.1:1", "tup:x", "", "nbd:/x\n/"] {
            daemon.run(&["port", how, "disk", wrong]).expect_error(2, &["nbd"]);
        }
        for name in ["nothing", "../disk", ""] {
            daemon.run(&["port", how, name, &here]).expect_error(3, &["no binding is called"]);
        }
        daemon.run(&["port", how, "disk"]).expect_error(2, &["Usage"]);
    }
    daemon.run(&["port"]).expect_error(2, &["Usage"]);
    daemon.wait_census(&before);
    connect(&socket);
    daemon.run(&["port", "detach", "disk", &here]).expect(0);
    daemon.run(&["port", "detach", "disk", &here]).expect_error(3, &["it has none"]);
}

#[test]
fn a_binding_has_at_most_16_ports() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    daemon.serve(&sim.address(), "disk", &[]);
    for _ in 1..16 {
        daemon.run(&["port", "attach", "disk", "nbd:127.0.0.1:0"]).expect(0);
    }
    daemon.run(&["port", "attach", "disk", "nbd:127.0.0.1:0"]).expect_error(1, &["16 ports"]);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn detaching_a_port_under_traffic_severs_its_clients_and_none_of_the_other_ports() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "64M"]);
    let (first, second) = (daemon.serve(&sim.address(), "disk", &[]), daemon.path("second.nbd"));
    daemon.run(&["port", "attach", "disk", &address(&second)]).expect(0);
    let arguments = "--name=load --ioengine=nbd --rw=randrw --bs=4k --size=32M --iodepth=32 --time_based --runtime=60";
    let mut fio = tool("fio");
    fio.current_dir(daemon.path("")).args(arguments.split_whitespace());
    fio.arg(format!("--uri=nbd+unix:///?socket={}", second.display()));
    let mut fio = Process::start(&mut fio);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = Client::new(&first);
            let mut byte = 0u8;
            while !stop.load(Ordering::Acquire) {
                byte = byte.wrapping_add(1);
                assert_eq!(client.write(48 << 20, &[byte; 4096]), 0);
                assert_eq!(client.read(48 << 20, 4096), [byte; 4096]);
                rounds.fetch_add(1, Ordering::AcqRel);
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            until_true("fio is at work", || {
                let handles = daemon.binding("disk").map(|binding| binding["handles"].clone()).unwrap_or_default();
                let handles = handles.as_array().cloned().unwrap_or_default();
                handles.iter().filter(|handle| handle["requests"].as_u64() > Some(100)).count() == 2
            });
            let detached = daemon.run(&["port", "detach", "disk", &address(&second), "--json"]).expect(0);
            assert!(detached.took < Duration::from_secs(3), "{:?}", detached.took);
            assert_eq!(detached.json()["connections"], 1);
            assert_ne!(fio.end(PATIENCE).code, Some(0), "fio has lost its disk");
            let now = rounds.load(Ordering::Acquire);
            until_true("the other port serves on", || rounds.load(Ordering::Acquire) > now + 100);
        }));
        stop.store(true, Ordering::Release);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    daemon.wait_idle("disk");
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_port_can_be_detached_while_an_unload_waits_and_none_can_be_attached() {
    let daemon = Daemon::start();
    let (sim, client) = frozen(&daemon);
    let mut unload = Process::start(&mut daemon.command(&["unload", "disk", "--json", "--deadline", "60s"]));
    until_true("it drains", || daemon.binding("disk").is_some_and(|binding| binding["state"] == "draining"));
    let more = address(&daemon.path("more.nbd"));
    daemon.run(&["port", "attach", "disk", &more]).expect_error(1, &["'disk' is leaving"]);
    assert!(!daemon.path("more.nbd").exists());
    let socket = daemon.path("disk.nbd");
    daemon.run(&["port", "detach", "disk", &address(&socket)]).expect(0);
    client.assert_closed();
    assert!(!socket.exists());
    assert!(unload.is_running(), "the request is with the device still");
    sim.thaw();
    Certificate::parse(unload.end(PATIENCE).expect(0).json()).assert_clean();
}
