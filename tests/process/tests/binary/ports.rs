//! Where a binding is served, and what it is called.

use std::os::unix::net::UnixListener;

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, connect};
use cofferdam_process_tests::process::{Ended, Process};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::PATIENCE;

#[track_caller]
fn load(daemon: &Daemon, sim: &Backend, name: &str, port: &str) -> Ended {
    daemon.load(&programs::driver(), &sim.address(), name, &["--port", port])
}

#[test]
fn a_port_that_cannot_be_had_fails_the_load_and_leaves_nothing() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "16M"]);
    load(&daemon, &sim, "x", "nbd:/no/such/directory/x.nbd").expect(1);
    let before = daemon.census();
    for wrong in [
        "nbd",
        "nbd:",
        "nbd:relative.nbd",
        "nbd:127.0.0.1",
        "nbd:localhost:10809",
        "nbd:/directory/",
        "tup:x",
        "",
        &format!("nbd:/{}", "x".repeat(120)),
    ] {
        load(&daemon, &sim, "x", wrong).expect_error(2, &["nbd"]);
    }
    for public in ["nbd:0.0.0.0:10809", "nbd:192.0.2.1:10809", "nbd:[::]:10809"] {
        load(&daemon, &sim, "x", public).expect_error(2, &["only loopback"]);
    }
    load(&daemon, &sim, "x", "nbd:/no/such/directory/x.nbd").expect_error(1, &["'/no/such/directory' does not exist"]);

    let live = daemon.path("live.nbd");
    let _listener = UnixListener::bind(&live).expect("a socket");
    load(&daemon, &sim, "x", &format!("nbd:{}", live.display())).expect_error(1, &["in use"]);
    connect(&live);
    let file = daemon.path("file");
    std::fs::write(&file, "precious").expect("a file");
    load(&daemon, &sim, "x", &format!("nbd:{}", file.display())).expect_error(1, &["not a socket"]);
    assert_eq!(std::fs::read(&file).expect("the file"), b"precious");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = format!("nbd:{}", tcp.local_addr().expect("an address"));
    load(&daemon, &sim, "x", &taken).expect_error(1, &["in use"]);

    // The first port was fine: it is taken down with the rest.
    let (first, second) = (format!("nbd:{}", daemon.path("first.nbd").display()), format!("nbd:{}", live.display()));
    let driver = programs::driver();
    daemon.load(&driver, &sim.address(), "x", &["--port", &first, "--port", &second]).expect_error(1, &["in use"]);
    assert!(!daemon.path("first.nbd").exists());
    assert!(daemon.bindings().is_empty());
    daemon.wait_census(&before);

    load(&daemon, &sim, "x", &first).expect(0);
    daemon.unload("x", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

#[test]
fn names_are_unique_and_harmless() {
    let daemon = Daemon::start();
    let (one, two) = (Backend::sim(&["--memory", "16M"]), Backend::sim(&["--memory", "16M"]));
    let driver = programs::driver();
    let socket = daemon.serve(&one.address(), "disk", &[]);
    assert_eq!(Client::new(&socket).write(0, &[1; 512]), 0);
    daemon.wait_idle("disk");
    let before = daemon.census();
    daemon.load(&driver, &two.address(), "disk", &[]).expect_error(1, &["'disk' exists already", "--name"]);
    for bad in ["", "a/b", "../x", ".hidden", "-x", "a b", "ä", "\n", &"x".repeat(65)] {
        daemon.load(&driver, &two.address(), bad, &[]).expect_error(if bad == "-x" { 2 } else { 1 }, &[]);
    }
    daemon.wait_census(&before);
    assert_eq!(Client::new(&socket).write(0, &[1; 512]), 0, "the first one serves on");

    // Without a name one is made up from the driver's.
    let driver = driver.to_str().expect("UTF-8");
    let made = daemon.run(&["load", driver, "--device", &two.address(), "--json"]).expect(0).json();
    assert_eq!(made["name"], "virtio-blk0");
    daemon.stop(PATIENCE);
}

#[test]
fn two_bindings_cannot_have_one_port_and_one_binding_can_have_two() {
    let daemon = Daemon::start();
    let (one, two) = (Backend::sim(&["--memory", "16M"]), Backend::sim(&["--memory", "16M"]));
    let socket = daemon.serve(&one.address(), "one", &[]);
    load(&daemon, &two, "two", &format!("nbd:{}", socket.display())).expect_error(1, &["in use"]);
    let unix = daemon.path("two.nbd");
    let driver = programs::driver();
    daemon
        .load(
            &driver,
            &two.address(),
            "two",
            &["--port", &format!("nbd:{}", unix.display()), "--port", "nbd:127.0.0.1:0"],
        )
        .expect(0);
    let ports = daemon.binding("two").expect("it serves")["ports"].clone();
    let tcp = ports[1].as_str().and_then(|port| port.strip_prefix("nbd:")).expect("the real port is shown").to_owned();
    assert_eq!(Client::new(&unix).write(0, &[7; 512]), 0);
    let read =
        Process::run(tool("qemu-io").args(["-r", "-f", "raw", "-c", "read -P 7 0 512", &format!("nbd://{tcp}")]))
            .expect(0);
    assert!(!read.stdout.contains("failed"), "{}", read.stdout);
    assert_eq!(Client::new(&socket).read(0, 512), [0; 512], "the other disk is another");
    daemon.unload("two", &[]).assert_clean();
    assert!(!unix.exists());
}
