//! A console's port as a pseudo terminal.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::Duration;

use cofferdam_port_character::CharacterError;
use cofferdam_sim::{ConsoleProfile, PortProfile, SimConsole};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{LocalModes, tcgetattr, tcgetwinsize};

use crate::support::{Bed, PATIENCE, behaviour, noise, open, read, until, write};

fn console(multiport: bool) -> SimConsole {
    let ports = vec![
        PortProfile { name: None, console: true },
        PortProfile { name: Some("org.cofferdam.test".to_owned()), console: false },
    ];
    let profile = ConsoleProfile { ports, multiport, ..ConsoleProfile::default() };
    SimConsole::new(profile, behaviour(&[])).unwrap()
}

fn bed(multiport: bool) -> (SimConsole, Bed, String) {
    let sim = console(multiport);
    let bed = Bed::new("virtio-console", &sim, 2);
    let link = bed.path("console");
    bed.attach(&format!("pty:{link}"));
    (sim, bed, link)
}

fn hung_up(terminal: &File) -> bool {
    let mut fds = [PollFd::new(terminal, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    fds[0].revents().contains(PollFlags::HUP)
}

/// Reads until there is nothing for a while; how much it was.
fn drain(mut terminal: &File) -> usize {
    let (mut bytes, mut buffer) = (0, vec![0; 64 * 1024]);
    loop {
        match terminal.read(&mut buffer) {
            Ok(count) => bytes += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn bytes_go_both_ways_through_a_raw_terminal() {
    for multiport in [true, false] {
        let (sim, bed, link) = bed(multiport);
        let terminal = open(&link, true);
        assert!(!tcgetattr(&terminal).unwrap().local_modes.intersects(LocalModes::ECHO | LocalModes::ICANON));
        sim.feed(0, b"login: ");
        assert_eq!(read(&terminal, 7), b"login: ");
        write(&terminal, b"root\r\x03\x04\n");
        assert_eq!(sim.wait_written(0, 8, PATIENCE).unwrap(), b"root\r\x03\x04\n");
        assert_eq!(sim.violations(), []);
        bed.unload();
    }
}

#[test]
fn a_paste_of_10_mib_comes_back_whole_and_in_order() {
    let (sim, bed, link) = bed(true);
    sim.set_echo(0, true);
    let terminal = open(&link, true);
    let sent = noise(10 << 20);
    let (writer, bytes) = (terminal.try_clone().unwrap(), sent.clone());
    let writing = std::thread::spawn(move || write(&writer, &bytes));
    let got = read(&terminal, sent.len());
    writing.join().unwrap();
    assert!(got == sent, "differs at {:?}", got.iter().zip(&sent).position(|(a, b)| a != b));
    assert_eq!(sim.waiting(0), 0);
    bed.unload();
}

#[test]
fn a_flood_that_nobody_reads_is_held_back_and_then_goes_on_where_it_was() {
    let (sim, bed, link) = bed(true);
    let terminal = open(&link, true);
    assert!(sim.wait_open(0, true, PATIENCE));
    let leased = bed.binding.status().leased_bytes;
    sim.set_flood(0, true);
    let answered = |last: &mut u64| {
        std::thread::park_timeout(Duration::from_millis(100));
        let now = sim.stats().answered;
        std::mem::replace(last, now) == now
    };
    let mut last = 0;
    until("the flood stands", || answered(&mut last));
    assert_eq!(bed.binding.status().leased_bytes, leased, "memory of the binding");
    // Nobody reads: the device is not given buffers, and nothing moves.
    let standing = sim.stats().answered;
    std::thread::park_timeout(Duration::from_millis(300));
    assert_eq!(sim.stats().answered, standing);
    let whole: Vec<u8> = (0..2 << 20).map(SimConsole::flood_byte).collect();
    assert!(read(&terminal, whole.len()) == whole, "something is missing, or twice");
    // And with nobody there at all.
    drop(terminal);
    assert!(sim.wait_open(0, false, PATIENCE));
    until("the flood stands again", || answered(&mut last));
    bed.unload();
}

#[test]
fn a_device_that_takes_nothing_holds_the_writer_back() {
    let (sim, bed, link) = bed(true);
    sim.set_echo(0, true);
    let terminal = open(&link, true);
    // Echoed bytes that are not read fill the device, which then takes nothing more.
    let bytes = noise(1 << 20);
    let mut sent = 0;
    let mut idle = 0;
    while idle < 20 {
        use std::io::Write;
        match (&terminal).write(&bytes[sent % bytes.len()..]) {
            Ok(count) => (sent, idle) = (sent + count, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                idle += 1;
                std::thread::park_timeout(Duration::from_millis(20));
            }
        }
    }
    assert!(sent < 3 << 20, "{sent} bytes taken for nobody");
    assert!(bed.binding.status().requests_in_flight <= 1);
    let got = read(&terminal, sent);
    assert!(got.iter().zip(bytes.iter().cycle()).all(|(a, b)| a == b));
    bed.unload();
}

#[test]
fn a_terminal_that_is_closed_and_opened_again_goes_on_and_the_device_knows() {
    let (sim, bed, link) = bed(true);
    assert!(sim.wait_open(0, false, PATIENCE));
    for round in 0..5_u8 {
        let terminal = open(&link, true);
        assert!(sim.wait_open(0, true, PATIENCE), "round {round}");
        sim.feed(0, &[b'a' + round; 3]);
        assert_eq!(read(&terminal, 3), [b'a' + round; 3]);
        // What was written before the close is not lost with it.
        write(&terminal, &[b'0' + round; 100]);
        drop(terminal);
        assert_eq!(sim.wait_written(0, 100, PATIENCE).unwrap(), [b'0' + round; 100]);
        assert!(sim.wait_open(0, false, PATIENCE), "round {round}");
    }
    // As fast as it goes.
    for _ in 0..200 {
        drop(open(&link, true));
    }
    let terminal = open(&link, true);
    assert!(sim.wait_open(0, true, PATIENCE));
    sim.feed(0, b"still here");
    assert_eq!(read(&terminal, 10), b"still here");
    bed.unload();
}

#[test]
fn a_storm_of_resizes_ends_with_the_last_size() {
    for multiport in [true, false] {
        let (sim, bed, link) = bed(multiport);
        let terminal = open(&link, true);
        let size = || tcgetwinsize(&terminal).map(|size| (size.ws_col, size.ws_row)).unwrap();
        until("the first size", || size() == (80, 25));
        for columns in 1..=1000 {
            sim.resize(columns, 50);
        }
        sim.resize(132, 43);
        until("the last size", || size() == (132, 43));
        sim.set_echo(0, true);
        write(&terminal, b"alive");
        assert_eq!(read(&terminal, 5), b"alive");
        bed.unload();
    }
}

#[test]
fn unload_hangs_up_and_takes_the_link_away() {
    let (sim, bed, link) = bed(true);
    let mut terminal = open(&link, true);
    sim.feed(0, b"last words");
    assert_eq!(read(&terminal, 10), b"last words");
    assert!(!hung_up(&terminal));
    bed.unload();
    assert!(hung_up(&terminal));
    assert_eq!(terminal.read(&mut [0; 8]).unwrap(), 0);
    assert!(!Path::new(&link).exists() && std::fs::symlink_metadata(&link).is_err());
}

#[test]
fn detaching_tells_the_device_and_another_port_can_take_its_place() {
    let (sim, bed, link) = bed(true);
    let first = open(&link, true);
    assert!(sim.wait_open(0, true, PATIENCE));
    let second = bed.start(&format!("pty:{}", bed.path("second")));
    assert!(matches!(second, Err(CharacterError::Open(_))), "two on one port of the device: {second:?}");
    assert!(!Path::new(&bed.path("second")).exists());
    bed.binding.detach_port(&format!("pty:{link}")).unwrap();
    assert!(hung_up(&first));
    assert!(sim.wait_open(0, false, PATIENCE));
    bed.attach(&format!("pty:{link}"));
    let again = open(&link, true);
    sim.feed(0, b"hello");
    assert_eq!(read(&again, 5), b"hello");
    bed.unload();
}

#[test]
fn ports_have_numbers_and_may_be_pulled_out() {
    let (sim, bed, _link) = bed(true);
    let link = bed.path("one");
    bed.attach(&format!("pty:{link},port=1"));
    let terminal = open(&link, true);
    assert!(sim.wait_open(1, true, PATIENCE));
    sim.feed(1, b"one");
    assert_eq!(read(&terminal, 3), b"one");
    sim.remove_port(1);
    let ports = || match bed.binding.offer().as_deref() {
        Some(cofferdam_manager::Offer::Stream(stream)) => stream.ports.len(),
        _ => 0,
    };
    until("the port is out", || ports() == 1);
    write(&terminal, b"kept");
    sim.add_port(1, PortProfile::default());
    assert!(sim.wait_open(1, true, PATIENCE), "it is told again");
    assert_eq!(sim.wait_written(1, 4, PATIENCE).unwrap(), b"kept");
    let error = bed.start(&format!("pty:{},port=7", bed.path("seven"))).unwrap_err().to_string();
    assert!(error.contains("no port 7") && error.contains("it has 0, 1"), "{error}");
    drain(&terminal);
    bed.unload();
}

#[test]
fn what_is_at_the_path_is_left_alone_unless_a_host_left_it() {
    let sim = console(false);
    let bed = Bed::new("virtio-console", &sim, 1);
    let link = bed.path("console");
    let start = || bed.start(&format!("pty:{link}"));
    std::fs::write(&link, "mine").unwrap();
    assert!(matches!(start(), Err(CharacterError::Foreign { .. })));
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", &link).unwrap();
    assert!(matches!(start(), Err(CharacterError::Foreign { .. })));
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("/dev/pts/999999", &link).unwrap();
    let port = start().unwrap();
    let leads = std::fs::read_link(&link).unwrap();
    assert!(leads.exists() && leads != Path::new("/dev/pts/999999"));
    drop(port);
    assert!(std::fs::symlink_metadata(&link).is_err());
}
