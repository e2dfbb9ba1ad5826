//! Files that are no driver, or no driver for this host, and drivers that ask for more than they were granted.

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::nbd::Client;
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::PATIENCE;

/// Each file with what its refusal must say.
const MISFITS: &[(&str, &[&str])] = &[
    ("not-wasm", &["not a WebAssembly file"]),
    ("empty-file", &["not a WebAssembly file"]),
    ("truncated", &["cannot be compiled", "unexpected end"]),
    ("core-module", &["core WebAssembly module, not a component"]),
    ("other-world", &["not a block driver", "does not export"]),
    ("other-version", &["built for cofferdam:driver", "@0.9.0", "@0.1.0"]),
    ("wasi-clocks", &["imports wasi:clocks", "not granted", "--allow wasi:clocks"]),
    ("unknown-import", &["imports acme:turbo/boost@2.0.0", "does not have"]),
];

#[test]
fn what_is_no_driver_is_refused_by_name_and_leaves_nothing() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let driver = programs::test_driver("not-wasm");
    daemon.load(&driver, &sim.address(), "x", &[]).expect(1);
    let before = daemon.census();
    for (name, words) in MISFITS {
        let file = programs::test_driver(name);
        daemon.load(&file, &sim.address(), "x", &[]).expect_error(1, words);
        let ended = daemon.load(&file, &sim.address(), "x", &["--json"]).expect_error(1, words);
        assert!(ended.stderr.starts_with(r#"{"error":{"code":"failed""#), "{}", ended.stderr);
        assert_eq!(ended.stdout, "");
    }
    // Half of a good driver: the header is right, the rest is not there.
    let whole = std::fs::read(programs::driver()).expect("the driver");
    let half = daemon.path("half.wasm");
    std::fs::write(&half, &whole[..whole.len() / 2]).expect("a file");
    daemon.load(&half, &sim.address(), "x", &[]).expect_error(1, &["cannot be compiled"]);
    assert!(daemon.bindings().is_empty());
    daemon.wait_census(&before);
    // The device is as it was.
    let socket = daemon.serve(&sim.address(), "x", &[]);
    assert_eq!(Client::new(&socket).write(0, &[1; 512]), 0);
    daemon.unload("x", &[]).assert_clean();
    daemon.wait_census(&before);
    daemon.stop(PATIENCE);
}

#[test]
fn inspect_shows_what_a_file_asks_for_and_refuses_what_is_none() {
    let daemon = Daemon::start();
    let inspect = |name: &str| daemon.run(&["inspect", &text(&programs::test_driver(name)), "--json"]);
    for name in ["not-wasm", "empty-file", "truncated", "core-module"] {
        inspect(name).expect_error(1, &[name]);
    }
    let imports = inspect("wasi-clocks").expect(0).json()["imports"].to_string();
    assert!(imports.contains("wasi:clocks") && imports.contains("--allow"), "{imports}");
    let imports = inspect("unknown-import").expect(0).json()["imports"].to_string();
    assert!(imports.contains("acme:turbo/boost") && imports.contains("refused"), "{imports}");
}

#[test]
fn a_grant_lets_an_import_in_and_a_wrong_grant_is_a_usage_error() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let load =
        |allow: &str| daemon.load(&programs::test_driver("wasi-clocks"), &sim.address(), "x", &["--allow", allow]);
    let granted = load("wasi:clocks");
    assert!(!granted.stderr.contains("not granted"), "{}", granted.stderr);
    load("wasi:random").expect_error(1, &["wasi:clocks"]);
    load("wasi:sockets").expect_error(2, &["wasi:sockets"]);
    load("everything").expect_error(2, &["everything"]);
    load("wasi:filesystem=/no/such/directory").expect_error(2, &["/no/such/directory"]);
}

#[test]
fn a_driver_file_that_cannot_be_read_is_named() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let missing = daemon.path("missing.wasm");
    daemon.load(&missing, &sim.address(), "x", &[]).expect_error(3, &["missing.wasm"]);
    daemon.load(&daemon.path(""), &sim.address(), "x", &[]).expect(1);
}
