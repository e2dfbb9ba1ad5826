//! A load that names no driver. (What a PCI function's driver is found by is tested where there are functions to take: `tests/vm`.)

use std::path::Path;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::PATIENCE;
use serde_json::json;

/// No machine has this function.
const NOWHERE: &str = "pci:fffffffe:00:04.0";

fn drivers() -> String {
    text(programs::driver().parent().expect("a folder"))
}

#[test]
fn every_shipped_driver_lists_its_device_and_inspect_shows_it() {
    for (name, id) in [("virtio-net", 1), ("virtio-blk", 2), ("virtio-console", 3), ("virtio-rng", 4)] {
        let driver = Path::new(&drivers()).join(name).with_extension("wasm");
        let inspect =
            |more: &[&str]| Process::run(&mut command(&[&["inspect", &text(&driver)], more].concat())).expect(0);
        assert_eq!(inspect(&["--json"]).json()["devices"], json!([{ "bus": "virtio", "device": id }]), "{name}");
        let shown = inspect(&[]).stdout;
        assert!(shown.contains(&format!("  devices   virtio:{id}\n")), "{shown}");
    }
    let edu = Process::run(&mut command(&["inspect", &text(&programs::test_driver("edu")), "--json"])).expect(0);
    let listed = json!([{ "bus": "pci", "vendor": "0x1234", "device": "0x11e8", "class": "0x000000", "class_mask": "0x000000" }]);
    assert_eq!(edu.json()["devices"], listed);
}

#[test]
fn a_table_of_garbage_is_named_by_inspect_and_load() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let mut component = std::fs::read(programs::driver()).expect("the driver");
    let section = b"\x11cofferdam:devices";
    let at = component.windows(section.len()).position(|window| window == section).expect("a table") + section.len();
    // No kind of entry that there is.
    component[at] = 77;
    let driver = daemon.path("garbage.wasm");
    std::fs::write(&driver, component).expect("a file");
    let words = ["cofferdam:devices", "entry 0: 0x4d"];
    daemon.run(&["inspect", &text(&driver)]).expect_error(1, &words);
    daemon.load(&driver, &sim.address(), "x", &[]).expect_error(1, &words);
    assert!(daemon.bindings().is_empty());
    daemon.stop(PATIENCE);
}

#[test]
fn a_device_that_cannot_say_what_it_is_needs_a_named_driver() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let words =
        ["does not say what it is; name its driver", "virtio-blk.wasm (virtio:2)", "virtio-rng.wasm (virtio:4)"];
    let folder = drivers();
    let load = ["load", "--device", &sim.address(), "--drivers", &folder];
    daemon.run(&load).expect_error(2, &words);
    // Without a word the daemon's own: those of the tree that it was built in.
    daemon.run(&load[..3]).expect_error(2, &words);
    Process::run(&mut command(&["run", "--device", &sim.address(), "--drivers", &folder])).expect_error(2, &words);
    let mut named = daemon.command(&load[..3]);
    named.env("COFFERDAM_DRIVERS", daemon.path("none"));
    Process::run(&mut named).expect_error(3, &["/none"]);
    assert!(daemon.bindings().is_empty());
    // A named driver needs no folder.
    let driver = text(&programs::driver());
    let named = [&["load", &driver], &load[1..3], &["--drivers", "/no/such/folder"]].concat();
    daemon.run(&named).expect(0);
    daemon.stop(PATIENCE);
}

#[test]
fn a_function_that_is_not_there_is_told_before_a_driver_is_looked_for() {
    let daemon = Daemon::start();
    let load = |device: &str, folder: &str| daemon.run(&["load", "--device", device, "--drivers", folder]);
    load(NOWHERE, &drivers()).expect_error(3, &["no such PCI function"]);
    load(NOWHERE, "/no/such/folder").expect_error(3, &["no such PCI function"]);
    load("pci:0000:00:04", &drivers()).expect_error(2, &["pci:0000:00:04.0"]);
    load("usb:1-1", &drivers()).expect_error(2, &["not a device address"]);
    daemon.stop(PATIENCE);
}
