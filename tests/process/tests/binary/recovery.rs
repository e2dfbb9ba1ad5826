//! Drivers that break down under an NBD client: what the client sees, and what an operator is told and can do.

use std::path::PathBuf;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, Command};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::until_true;
use tempfile::TempDir;

/// A write here has `on-command` panic (`tests/guests/hostile/src/lane.rs`).
const TRAP: u64 = 15 << 20;
/// NBD_EIO.
const EIO: u32 = 5;

/// A daemon with one binding, `disk`, whose driver is replaced as `restarts` says.
fn serve(state: &TempDir, driver: &str, restarts: &[&str]) -> (Daemon, Backend, PathBuf) {
    let daemon = Daemon::start_in(&[("XDG_STATE_HOME", state.path().to_str().expect("UTF-8"))]);
    let sim = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.path("disk.nbd");
    let port = format!("nbd:{}", socket.display());
    let more = [&["--port", &port, "--call-deadline-ms", "10000"], restarts].concat();
    daemon.load(&programs::test_driver(driver), &sim.address(), "disk", &more).expect(0);
    (daemon, sim, socket)
}

#[test]
fn a_client_does_not_notice_a_driver_that_traps_at_every_hundredth_request() {
    let state = tempfile::tempdir().expect("a directory");
    let (daemon, _sim, socket) = serve(&state, "trap-at-100", &["--restarts", "1000/1s", "--restart-wait", "0ms"]);
    let mut client = Client::new(&socket);
    for round in 0..600_u64 {
        let (offset, data) = (round % 256 * 4096, [round as u8; 4096]);
        assert_eq!(client.write(offset, &data), 0, "round {round}");
        assert_eq!(client.call(Command::Read, offset, 4096).expect("served"), Ok(data.to_vec()), "round {round}");
    }
    let crashes = daemon.run(&["crashes", "disk", "--json"]).expect(0).json();
    let crashes = crashes.as_array().expect("a list");
    assert!(crashes.len() >= 10, "{} crashes of 1,200 requests", crashes.len());
    let last = &crashes[crashes.len() - 1];
    assert_eq!((last["kind"].as_str(), last["lane"].as_str()), (Some("trap"), Some("0")), "{last:#}");
    assert_eq!(last["calls"][0]["export"], "submit");
    until_true("a core dump is written", || {
        let crashes = daemon.run(&["crashes", "disk", "--json"]).expect(0).json();
        crashes[0]["core"].as_str().is_some_and(|core| std::fs::metadata(core).is_ok())
    });
    let told = daemon.run(&["crashes", "disk"]).expect(0).stdout;
    for words in ["disk crash ", "(generation ", "trap: ", "#submit", "last calls: ", "clients waited ", "core dump: "]
    {
        assert!(told.contains(words), "no {words:?} in {told}");
    }
    assert_eq!(daemon.binding("disk").expect("listed")["state"], "serving");
    drop(client);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn past_the_limit_a_client_gets_errors_and_an_operator_can_try_again() {
    let state = tempfile::tempdir().expect("a directory");
    let (daemon, _sim, socket) = serve(&state, "on-command", &["--restarts", "1/30m"]);
    let mut client = Client::new(&socket);
    daemon.run(&["restart", "disk"]).expect_error(1, &["'disk' has not failed"]);
    assert_eq!(client.write(TRAP, &[1; 4096]), EIO, "what breaks two drivers is failed");
    until_true("it has failed", || daemon.binding("disk").is_some_and(|disk| disk["state"] == "failed"));
    assert_eq!(client.write(0, &[1; 4096]), EIO, "at once, on the same connection");
    let why = daemon.run(&["why", "disk"]).expect(0).stdout;
    assert!(why.contains("failed") && why.contains("cofferdam restart disk"), "{why}");
    daemon.run(&["restart", "disk"]).expect(0);
    assert_eq!(client.write(0, &[2; 4096]), 0);
    assert_eq!(client.read(0, 4096), [2; 4096]);
    drop(client);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_binding_that_has_failed_is_unloaded_like_any_other() {
    let state = tempfile::tempdir().expect("a directory");
    let (daemon, _sim, socket) = serve(&state, "on-command", &["--restarts", "0/1s"]);
    let mut client = Client::new(&socket);
    assert_eq!(client.write(TRAP, &[1; 4096]), EIO);
    daemon.unload("disk", &[]).assert_clean();
    client.assert_closed();
}

#[test]
fn a_client_does_not_notice_an_upgrade_and_its_rollback() {
    let state = tempfile::tempdir().expect("a directory");
    let (daemon, _sim, socket) = serve(&state, "well-behaved", &[]);
    let mut client = Client::new(&socket);
    assert_eq!(client.write(0, &[1; 4096]), 0);
    let new = programs::shipped_driver("virtio-blk");
    let new = new.to_str().expect("UTF-8");
    let report = daemon.run(&["upgrade", "disk", new, "--json"]).expect(0).json();
    assert_eq!((report["from"].as_str(), report["to"].as_str()), (Some("well-behaved.wasm"), Some("virtio-blk.wasm")));
    assert_eq!(report["generation"], 2);
    assert_eq!(client.read(0, 4096), [1; 4096], "the same connection");
    assert_eq!(daemon.binding("disk").expect("listed")["driver"], "virtio-blk.wasm");
    let told = daemon.run(&["rollback", "disk"]).expect(0).stdout;
    assert!(told.contains("disk: virtio-blk.wasm -> well-behaved.wasm") && told.contains("clients waited"), "{told}");
    daemon.run(&["rollback", "disk"]).expect_error(1, &["has had no other driver"]);
    let refuses = programs::test_driver("refuse-resume");
    let refuses = refuses.to_str().expect("UTF-8");
    daemon.run(&["upgrade", "disk", refuses]).expect_error(1, &["cannot take over", "from nobody"]);
    daemon.run(&["upgrade", "nothing", new]).expect_error(3, &["no binding is called 'nothing'"]);
    daemon.run(&["upgrade", "disk", "/nowhere.wasm"]).expect_error(3, &["/nowhere.wasm"]);
    assert_eq!(client.write(4096, &[2; 4096]), 0);
    drop(client);
    daemon.unload("disk", &[]).assert_clean();
}
