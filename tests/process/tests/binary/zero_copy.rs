//! The data port: programs of others that share memory with the device, and the disk that is taken from under them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::nbd::Client;
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::PATIENCE;

/// A disk with an NBD port and a data port, whose paths are the answer.
#[track_caller]
fn serve(daemon: &Daemon, device: &Backend, more: &[&str]) -> (PathBuf, PathBuf) {
    let data = daemon.path("disk.data");
    let address = format!("data:{}", data.display());
    let nbd = daemon.serve(&device.address(), "disk", &[&["--port", &address], more].concat());
    (nbd, data)
}

fn example(socket: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(programs::zero_copy());
    command.arg(socket).args(more);
    command
}

#[test]
fn a_zero_copy_client_in_mid_traffic_loses_the_disk_and_nothing_is_left() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    // The first life starts what stays.
    let (_, data) = serve(&daemon, &sim, &[]);
    let once = Process::run(&mut example(&data, &[])).expect(0);
    assert!(once.stdout.contains("32 blocks written, flushed and read back"), "{}", once.stdout);
    daemon.unload("disk", &[]).assert_clean();
    let before = daemon.census();

    let (nbd, data) = serve(&daemon, &sim, &[]);
    let mut stays = Process::start(&mut example(&data, &["64", "--stay"]));
    stays.wait_stdout("32 blocks written, flushed and read back");
    // It wrote where it said: another port shows the same disk.
    let block = Client::new(&nbd).read(64 * 4096, 4096);
    assert!(block.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1)), "the pattern of a round");
    let handles = daemon.run(&["handles", "disk"]).expect(0).stdout;
    assert!(handles.contains(&format!("data:{}", data.display())), "{handles}");

    let begin = Instant::now();
    let certificate = daemon.unload("disk", &[]);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    certificate.assert_clean();
    assert_eq!(certificate.outcome(), "unloaded");
    assert!(certificate.number("handles_revoked") >= 1);
    let ended = stays.end(PATIENCE).expect(0);
    assert!(ended.stdout.contains("revoked after"), "{}", ended.stdout);
    assert!(ended.stdout.contains("nothing is outstanding: true"), "{}", ended.stdout);
    assert!(!data.exists(), "the port's socket is removed");
    daemon.wait_census(&before);
    daemon.stop(PATIENCE);
}

#[test]
fn a_data_port_is_attached_and_detached_while_the_binding_serves_on() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let nbd = daemon.serve(&sim.address(), "disk", &[]);
    let data = daemon.path("disk.data");
    let address = format!("data:{}", data.display());
    daemon.run(&["port", "attach", "disk", &address]).expect(0);
    daemon.run(&["port", "attach", "disk", &address]).expect_error(1, &["served at", "already"]);
    let mut stays = Process::start(&mut example(&data, &["--stay"]));
    stays.wait_stdout("32 blocks written, flushed and read back");
    let change = daemon.run(&["port", "detach", "disk", &address, "--json"]).expect(0).json();
    assert_eq!(change["connections"], 1, "{change}");
    let ended = stays.end(PATIENCE).expect(0);
    assert!(ended.stdout.contains("revoked after"), "{}", ended.stdout);
    assert_eq!(Client::new(&nbd).write(0, &[1; 512]), 0);
    daemon.run(&["port", "attach", "disk", "data:relative"]).expect_error(2, &["data:"]);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn shared_memory_has_the_bounds_that_the_load_gave_it() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    let (_, data) = serve(&daemon, &sim, &["--mapped-handles", "1", "--mapped-mib", "1"]);
    let first = Process::start(&mut example(&data, &["--stay"]));
    first.wait_stdout("32 blocks written, flushed and read back");
    let second = Process::run(&mut example(&data, &["64"]));
    assert_ne!(second.code, Some(0), "{}", second.stdout);
    daemon.unload("disk", &[]).assert_clean();
    let driver = text(&programs::driver());
    for wrong in [["--mapped-handles", "5000"], ["--mapped-mib", "65537"]] {
        let load = ["load", &driver, "--device", "vhost-user:/x.sock", wrong[0], wrong[1]];
        daemon.run(&load).expect_error(2, &[wrong[0]]);
    }
}
