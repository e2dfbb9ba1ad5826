//! A network device behind vhost-user as an interface, by the binary. Needs root: each test has a network of its own.

use std::net::UdpSocket;
use std::process::Command;

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::{Daemon, command, text};
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};

/// The calling thread, and what it starts, see a network of their own from here on.
#[expect(deprecated, reason = "unsafe for descriptor tables alone, which are not unshared here")]
pub(crate) fn own_network() {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("these tests run as root");
}

pub(crate) fn ip(arguments: &str) {
    Process::run(Command::new("ip").args(arguments.split(' '))).expect(0);
}

/// Packets that the interface has received; `None` when there is no such interface.
pub(crate) fn received(name: &str) -> Option<u64> {
    counts(name)?.get(1).copied()
}

/// What the kernel counts of the interface, in the order of `/proc/net/dev`.
pub(crate) fn counts(name: &str) -> Option<Vec<u64>> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().map(|count| count.parse().ok()).collect()
}

/// The device sends everything back: what the kernel sends, it receives.
fn exchange(name: &str) {
    ip(&format!("addr add 10.9.0.1/24 dev {name}"));
    ip(&format!("neigh add 10.9.0.2 lladdr 02:cf:da:00:00:02 dev {name}"));
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    let before = received(name).unwrap();
    until_true("1000 packets there and back", || {
        (0..10).for_each(|_| drop(socket.send_to(&[7; 1400], "10.9.0.2:7")));
        received(name).unwrap() >= before + 1000
    });
}

#[test]
fn run_makes_an_interface_of_a_network_device_and_takes_it_away() {
    own_network();
    let device = Backend::class("net", &["--pairs", "2"]);
    let driver = text(&programs::driver_of("net"));
    let arguments = ["run", &driver, "--device", &device.address(), "--port", "tap:lan0", "--queues", "2", "--json"];
    let mut run = Process::start(&mut command(&arguments));
    run.wait_stdout("\"serving\"");
    exchange("lan0");
    run.signal(Signal::INT);
    let ended = run.end(PATIENCE).expect(0);
    assert!(ended.stdout.contains("\"unloaded\""), "{}", ended.stdout);
    assert_eq!(received("lan0"), None);
}

#[test]
fn what_an_interface_cannot_be_made_of_is_said_and_nothing_is_left() {
    own_network();
    let device = Backend::class("net", &[]);
    let daemon = Daemon::start();
    let driver = programs::driver_of("net");
    let load = |port: &str| daemon.load(&driver, &device.address(), "net0", &["--port", port]);
    load("tap:a-name-of-16-byt").expect_error(2, &["at most 15 bytes"]);
    load("tap:lo").expect_error(1, &["'lo' exists already"]);
    daemon.wait_gone("net0");
    load("tap:lan0").expect(0);
    exchange("lan0");
    daemon.run(&["port", "attach", "net0", "tap:lan1"]).expect_error(1, &["lane 0"]);
    daemon.run(&["port", "detach", "net0", "tap:lan0"]).expect(0);
    assert_eq!(received("lan0"), None);
    daemon.run(&["port", "attach", "net0", "tap:lan1"]).expect(0);
    exchange("lan1");
    let certificate = daemon.unload("net0", &[]);
    certificate.assert_clean();
    assert_eq!(received("lan1"), None);
    // Without the capability.
    let arguments = ["run", &text(&driver), "--device", &device.address(), "--port", "tap:lan0"];
    let run = command(&arguments);
    let mut less = Command::new("setpriv");
    less.args(["--bounding-set", "-net_admin", "--inh-caps", "-net_admin", "--"])
        .arg(run.get_program())
        .args(run.get_args());
    less.envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Process::run(&mut less).expect_error(1, &["CAP_NET_ADMIN"]);
}
