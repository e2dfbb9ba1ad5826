//! Networks, consoles and entropy on one daemon after the other: interfaces, terminals, pipes and data sockets are passed on as they are. The network needs root: each test has one of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::challenger::Challenger;
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};
use rustix::fs::OFlags;

use crate::network::{counts, ip, own_network, received};
use crate::takeover::{DEATHS, door};

/// What `ip` says of the interface: its number, flags, carrier.
fn interface(name: &str) -> String {
    Process::run(Command::new("ip").args(["-o", "link", "show", name])).expect(0).stdout
}

/// The interface as a wire on which the device sends everything back.
struct Wire {
    name: &'static str,
    socket: UdpSocket,
    sent: u64,
}

impl Wire {
    /// Packets that are on their way at the most: fewer than the kernel's queue holds.
    const WINDOW: u64 = 200;

    fn new(name: &'static str) -> Wire {
        ip(&format!("addr add 10.9.0.1/24 dev {name}"));
        ip(&format!("neigh add 10.9.0.2 lladdr 02:cf:da:00:00:02 dev {name}"));
        Wire { name, socket: UdpSocket::bind("10.9.0.1:0").expect("a socket"), sent: 0 }
    }

    /// Packets that came back, that were sent, and that were dropped on either way; the kernel has things to say of its own.
    fn counts(&self) -> [u64; 3] {
        let counts = counts(self.name).expect("the interface");
        [counts[1], counts[9], counts[3] + counts[11]]
    }

    fn send(&mut self) {
        self.socket.send_to(&self.sent.to_le_bytes(), "10.9.0.2:7").expect("sent");
        self.sent += 1;
    }

    /// Sends until it is told to stop.
    fn work(&mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            self.send();
            while self.sent.saturating_sub(self.counts()[0]) >= Wire::WINDOW && !stop.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
        }
    }

    /// Every packet has come back, and none twice: that one would have come before the last.
    fn is_whole(&mut self) {
        self.send();
        until_true("every packet has come back, once", || {
            let [back, sent, _] = self.counts();
            sent >= self.sent && back == sent
        });
        assert_eq!(self.counts()[2], 0, "dropped");
    }
}

#[test]
fn an_interface_keeps_its_carrier_and_loses_no_packet_while_five_daemons_follow_each_other() {
    own_network();
    let device = Backend::class("net", &["--pairs", "2"]);
    let mut daemon = Daemon::start();
    let more = ["--port", "tap:lan0", "--queues", "2"];
    daemon.load(&programs::driver_of("net"), &device.address(), "net", &more).expect(0);
    let mut wire = Wire::new("lan0");
    let was = interface("lan0");
    let monitor = Process::start(Command::new("ip").args(["monitor", "link"]));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Release);
            }
        }
        let working = scope.spawn(|| wire.work(&stop));
        let stopping = Stop(&stop);
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(30));
            let said = daemon.take_over();
            assert!(said.starts_with("took over 1 binding and 1 connection"), "{said}");
            println!("{said}");
        }
        drop(stopping);
        working.join().expect("no panic");
    });
    wire.is_whole();
    println!("{} packets there and back", wire.sent);
    assert!(wire.sent > 1000, "{}", wire.sent);
    assert_eq!(interface("lan0"), was);
    assert_eq!(monitor.stdout(), "", "nobody heard of a change");
    assert_eq!(daemon.binding("net").expect("listed")["ports"][0], "tap:lan0");
    daemon.unload("net", &[]).assert_clean();
    assert_eq!(received("lan0"), None);
    daemon.stop(PATIENCE);
}

fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// A console of the sim, which says again what it is told, as a terminal.
fn console(daemon: &Daemon, sim: &Backend) -> String {
    let link = daemon.path("console");
    let port = format!("pty:{}", link.display());
    daemon.load(&programs::shipped_driver("virtio-console"), &sim.address(), "tty", &["--port", &port]).expect(0);
    text(&link)
}

#[test]
fn ten_mib_pasted_into_a_terminal_come_back_whole_and_in_order_over_three_takeovers() {
    const PASTE_BYTES: usize = 10 << 20;
    let (mut daemon, sim) = (Daemon::start(), Backend::class("console", &[]));
    let link = console(&daemon, &sim);
    let leads_to = std::fs::read_link(&link).expect("a link");
    let (sent, got) = (daemon.path("sent"), daemon.path("got"));
    let bytes = noise(PASTE_BYTES);
    std::fs::write(&sent, &bytes).expect("a file");
    // Two, because one would wait with its write for room that its own read makes.
    let rawer = format!("{link},rawer");
    let mut reader = Process::start(tool("socat").args(["-u", &rawer, &format!("CREATE:{}", got.display())]));
    until_true("the reader", || got.exists());
    let length = || std::fs::metadata(&got).map_or(0, |about| about.len() as usize);
    let mut writer = Process::start(tool("socat").args(["-u", &format!("OPEN:{},rdonly", sent.display()), &link]));
    for turn in 1..4 {
        until_true("a part of it", || length() >= PASTE_BYTES * turn / 5);
        println!("{} at {} bytes", daemon.take_over(), length());
    }
    writer.end(PATIENCE).expect(0);
    until_true("all of it", || length() >= PASTE_BYTES);
    assert!(reader.is_running(), "nobody hung up");
    assert_eq!(std::fs::read_link(&link).expect("the link"), leads_to);
    daemon.unload("tty", &[]).assert_clean();
    reader.end(PATIENCE).expect(0);
    let read = std::fs::read(&got).expect("a file");
    let odd = read.iter().zip(&bytes).position(|(one, other)| one != other);
    assert_eq!((read.len(), odd), (PASTE_BYTES, None));
    assert!(std::fs::symlink_metadata(&link).is_err(), "the last one removes the link");
    daemon.stop(PATIENCE);
}

#[test]
fn what_waits_for_a_reader_of_a_terminal_is_handed_on() {
    let (mut daemon, sim) = (Daemon::start(), Backend::class("console", &[]));
    let link = console(&daemon, &sim);
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let mut terminal = File::options().read(true).write(true).custom_flags(flags).open(&link).expect("the terminal");
    // More than terminal, host and posted buffers hold: nobody reads the echo. The device takes all of it.
    let bytes = noise(1 << 20);
    let mut typed = 0;
    until_true("all of it is typed", || {
        while let Ok(more @ 1..) = terminal.write(&bytes[typed..]) {
            typed += more;
        }
        typed == bytes.len()
    });
    daemon.wait_in_flight("tty", 0);
    for _ in 0..3 {
        daemon.take_over();
    }
    let mut got = Vec::new();
    until_true("all of it", || {
        let mut piece = [0; 4096];
        while let Ok(more) = terminal.read(&mut piece) {
            got.extend_from_slice(&piece[..more]);
        }
        got.len() >= typed
    });
    assert!(got == bytes);
    // Nobody is there over the next one, and then somebody is.
    drop(terminal);
    daemon.take_over();
    let mut terminal = File::options().read(true).write(true).custom_flags(flags).open(&link).expect("the terminal");
    terminal.write_all(b"still there?\r").expect("room");
    let mut answer = Vec::new();
    until_true("the echo", || {
        let mut piece = [0; 100];
        let more = terminal.read(&mut piece).unwrap_or(0);
        answer.extend_from_slice(&piece[..more]);
        answer == b"still there?\r"
    });
    daemon.unload("tty", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

#[test]
fn a_reader_of_random_bytes_never_sees_their_end_and_the_kernel_is_given_its_part() {
    let mut daemon = Daemon::start();
    let rng = Backend::class("rng", &[]);
    let fifo = daemon.path("random");
    let port = format!("fifo:{}", fifo.display());
    daemon.load(&programs::driver_of("rng"), &rng.address(), "rng", &["--port", &port]).expect(0);
    daemon.run(&["port", "attach", "rng", "entropy-pool,rate=1"]).expect(0);
    let inode = std::fs::metadata(&fifo).expect("the pipe").ino();
    let mut pipe = File::open(&fifo).expect("the pipe");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let (mut bytes, mut sum) = (vec![0; 64 << 10], 0_u64);
            while !stop.load(Ordering::Acquire) {
                let more = pipe.read(&mut bytes).expect("bytes");
                assert!(more > 0, "the end after {sum} bytes");
                sum += more as u64;
            }
            sum
        });
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(20));
            let said = daemon.take_over();
            assert!(said.starts_with("took over 1 binding and 2 connections"), "{said}");
        }
        std::thread::sleep(Duration::from_millis(20));
        stop.store(true, Ordering::Release);
        println!("{} random bytes", reading.join().expect("no panic"));
    });
    assert_eq!(std::fs::metadata(&fifo).expect("the pipe").ino(), inode);
    let listed = daemon.binding("rng").expect("listed");
    assert_eq!(listed["ports"], serde_json::json!([port, "entropy-pool,rate=1"]));
    daemon.unload("rng", &[]).assert_clean();
    assert!(!fifo.exists());
    daemon.stop(PATIENCE);
}

#[test]
fn a_data_port_is_handed_on_while_nobody_shares_memory_and_serves_whoever_comes_then() {
    let (mut daemon, sim) = (Daemon::start(), Backend::sim(&["--memory", "16M"]));
    let nbd = daemon.serve(&sim.address(), "disk", &[]);
    let data = text(&daemon.path("disk.data"));
    daemon.run(&["port", "attach", "disk", &format!("data:{data}")]).expect(0);
    let inode = std::fs::metadata(&data).expect("the socket").ino();
    let share = || Process::run(Command::new(programs::zero_copy()).arg(&data)).expect(0);
    for _ in 0..3 {
        assert!(share().stdout.contains("32 blocks written, flushed and read back"));
        daemon.wait_idle("disk");
        let said = daemon.take_over();
        assert!(said.starts_with("took over 1 binding and 0 connections"), "{said}");
    }
    share();
    let stays = Process::start(Command::new(programs::zero_copy()).args([&data, "64", "--stay"]));
    stays.wait_stdout("32 blocks written, flushed and read back");
    let words = ["serves on", "data:", "its clients (1) share memory with the device"];
    daemon.challenge(&[]).end(PATIENCE).expect_error(1, &words);
    assert_eq!(std::fs::metadata(&data).expect("the socket").ino(), inode);
    daemon.unload("disk", &[]).assert_clean();
    assert!(!Path::new(&data).exists() && !nbd.exists());
    daemon.stop(PATIENCE);
}

#[test]
fn a_new_daemon_may_die_at_every_step_and_interfaces_terminals_and_pipes_stay() {
    own_network();
    let mut daemon = Daemon::start();
    let net = Backend::class("net", &[]);
    daemon.load(&programs::driver_of("net"), &net.address(), "net", &["--port", "tap:lan0"]).expect(0);
    let sim = Backend::class("console", &[]);
    let link = console(&daemon, &sim);
    let rng = Backend::class("rng", &[]);
    let fifo = text(&daemon.path("random"));
    daemon.load(&programs::driver_of("rng"), &rng.address(), "rng", &["--port", &format!("fifo:{fifo}")]).expect(0);
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let mut terminal = File::options().read(true).write(true).custom_flags(flags).open(&link).expect("the terminal");
    let mut wire = Wire::new("lan0");
    let was = interface("lan0");
    let mut serves = |name: &str| {
        (0..100).for_each(|_| wire.send());
        wire.is_whole();
        terminal.write_all(name.as_bytes()).expect("room");
        let mut answer = Vec::new();
        until_true("the echo", || {
            let mut piece = [0; 100];
            let more = terminal.read(&mut piece).unwrap_or(0);
            answer.extend_from_slice(&piece[..more]);
            answer == name.as_bytes()
        });
        let mut random = [0; 100_000];
        File::open(&fifo).and_then(|mut pipe| pipe.read_exact(&mut random)).expect("random bytes");
        assert_eq!(interface("lan0"), was);
    };
    serves("before");
    for (number, death) in DEATHS.iter().enumerate() {
        death(&mut Challenger::new(&door(&daemon)));
        serves(&format!("death {number}"));
    }
    let said = daemon.take_over();
    assert!(said.starts_with("took over 3 bindings and 3 connections"), "{said}");
    serves("after");
    for name in ["net", "tty", "rng"] {
        daemon.unload(name, &[]).assert_clean();
    }
    assert!(!Path::new(&fifo).exists() && std::fs::symlink_metadata(&link).is_err());
    daemon.stop(PATIENCE);
}
