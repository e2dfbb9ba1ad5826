//! The commands that look at the machine: what they print has the same shape everywhere. Nothing here hands a function over.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use cofferdam_process_tests::host::command;
use cofferdam_process_tests::process::{Ended, Process};
use serde_json::Value;

#[track_caller]
fn run(arguments: &[&str]) -> Ended {
    // A socket that is not there: these commands need no daemon.
    Process::run(command(arguments).env("COFFERDAM_SOCKET", "/nonexistent/cofferdam.sock"))
}

#[track_caller]
fn keys(document: &Value) -> Vec<&str> {
    document.as_object().unwrap_or_else(|| panic!("no object: {document}")).keys().map(String::as_str).collect()
}

/// The last function of the last bus of a domain that no machine has.
const NOWHERE: &str = "pci:fffffff0:ff:1f.7";

#[test]
fn doctor_says_the_same_things_about_every_machine() {
    let document = run(&["doctor", "--json"]).expect(0).json();
    assert_eq!(keys(&document), ["checks", "vhost_user_ready"]);
    assert_eq!(document["vhost_user_ready"], true, "or no test of a device could run here");
    let checks = &document["checks"];
    let mut names = [
        "vhost-user",
        "memfd",
        "gate",
        "rseq",
        "membarrier",
        "permissions",
        "memlock",
        "hugepages",
        "iommu",
        "uio",
        "vfio",
        "iommufd",
        "nbd",
        "tap",
    ];
    names.sort_unstable();
    assert_eq!(keys(checks), names);
    for (name, check) in checks.as_object().expect("an object") {
        assert_eq!(keys(check), ["detail", "mend", "status"], "{name}");
        assert!(["ok", "limited", "missing"].iter().any(|status| check["status"] == *status), "{name}: {check}");
        assert!(check["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{name}: {check}");
        assert!(check["status"] != "ok" || check["mend"].is_null(), "what is well needs no mending: {name}: {check}");
    }
    let text = run(&["doctor"]).expect(0).stdout;
    assert!(names.iter().all(|name| text.lines().any(|line| line.starts_with(name))), "{text}");
}

#[test]
fn doctor_tells_a_mechanism_that_is_forced_and_how_to_let_go_of_it() {
    let mut doctor = command(&["doctor", "--json"]);
    let gate = Process::run(doctor.env("COFFERDAM_GATE", "xadd")).expect(0).json()["checks"]["gate"].clone();
    assert_eq!((&gate["status"], &gate["mend"]), (&"limited".into(), &"unset COFFERDAM_GATE".into()), "{gate}");
}

#[test]
fn devices_describes_every_function_in_the_same_words() {
    let Ok(listed) = std::fs::read_dir("/sys/bus/pci/devices") else {
        assert!(!Path::new("/sys/bus/pci").exists());
        run(&["devices"]).expect_error(1, &["/sys/bus/pci/devices"]);
        return;
    };
    let document = run(&["devices", "--json"]).expect(0).json();
    let devices = document.as_array().expect("a list");
    assert_eq!(devices.len(), listed.count(), "no function is left out");
    for device in devices {
        let expected = [
            "address",
            "bar_bytes",
            "claim",
            "class",
            "class_words",
            "device",
            "driver",
            "driver_override",
            "iommu_group",
            "preferred",
            "record",
            "revision",
            "subsystem",
            "subsystem_vendor",
            "uio",
            "uses",
            "vendor",
            "vfio",
        ];
        assert_eq!(keys(device), expected);
        let address = device["address"].as_str().expect("an address");
        let attribute = |name: &str| {
            let path = format!("/sys/bus/pci/devices/{address}/{name}");
            std::fs::read_to_string(path).expect("an attribute").trim().to_owned()
        };
        for name in ["vendor", "device", "class"] {
            assert_eq!(device[name], attribute(name), "{address}");
        }
        assert_eq!(device["bar_bytes"].as_array().map(Vec::len), Some(6));
        for via in ["uio", "vfio"] {
            assert_eq!(keys(&device[via]), ["mend", "state", "why"]);
            assert!(["ready", "module", "no"].iter().any(|state| device[via]["state"] == *state), "{device}");
        }
    }
    let text = run(&["devices"]).expect(0).stdout;
    assert_eq!(text.lines().count(), if devices.is_empty() { 1 } else { devices.len() + 1 }, "{text}");
}

#[test]
fn a_function_that_is_not_there_and_an_address_that_is_none_have_exit_codes_of_their_own() {
    for command in ["bind", "unbind"] {
        for flags in [&["--dry-run"][..], &["--dry-run", "--force", "--json"]] {
            run(&[&[command, NOWHERE], flags].concat()).expect_error(3, &["no such PCI function"]);
            run(&[&[command, "../../x"], flags].concat()).expect_error(2, &["not the address"]);
        }
        run(&[command]).expect(2);
    }
    run(&["bind", NOWHERE, "--uio", "--vfio"]).expect(2);
}

#[test]
fn a_function_that_a_living_process_has_claimed_is_not_given_back() {
    // Not the one of the other tests: they run beside this one.
    let name = SocketAddr::from_abstract_name("cofferdam/pci/fffffff0:ff:1f.6").expect("a name");
    let _claim = UnixDatagram::bind_addr(&name).expect("nobody has it");
    run(&["unbind", "pci:fffffff0:ff:1f.6", "--dry-run"]).expect_error(1, &["already claimed"]);
}
