//! Devices that break their specification, as a terminal and a named pipe show them.

use std::io::{ErrorKind, Read};

use cofferdam_manager::{Binding, Phase};
use cofferdam_sim::{ConsoleProfile, EntropyProfile, SimConsole, SimRng};

use crate::support::{Bed, behaviour, noise, open, read, until, write};

fn console() -> (SimConsole, Bed, String) {
    let sim = SimConsole::new(ConsoleProfile::default(), behaviour(&[])).unwrap();
    let bed = Bed::new("virtio-console", &sim, 1);
    let link = bed.path("console");
    bed.attach(&format!("pty:{link}"));
    (sim, bed, link)
}

/// The binding has left by itself with nothing behind it but why.
#[track_caller]
fn has_failed(binding: &Binding) {
    until("the binding has left", || binding.certificate().is_some());
    let certificate = binding.certificate().unwrap();
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    assert!(binding.status().fault.is_some(), "{certificate:?}");
}

#[test]
fn lies_about_ports_change_nothing_and_the_terminal_goes_on() {
    let (sim, bed, link) = console();
    sim.set_echo(0, true);
    let terminal = open(&link, true);
    for lie in ["message-garbage", "message-short", "port-unknown", "event-unknown", "length-zero", "length-one"] {
        sim.add_rule(format!("lie:{lie},op=message").parse().unwrap());
        let before = sim.stats().answered;
        for columns in 1..=20 {
            sim.resize(columns, 24);
        }
        until(lie, || sim.stats().answered > before);
        sim.clear_rules();
        write(&terminal, lie.as_bytes());
        assert_eq!(read(&terminal, lie.len()), lie.as_bytes());
        assert_eq!(bed.binding.phase(), Phase::Serving, "{lie}");
    }
    sim.resize(132, 43);
    let size = || rustix::termios::tcgetwinsize(&terminal).map(|size| (size.ws_col, size.ws_row)).unwrap();
    until("the true size", || size() == (132, 43));
    bed.unload();
}

#[test]
fn a_buffer_in_which_nothing_came_is_no_input_and_the_next_bytes_come() {
    let (sim, bed, link) = console();
    let terminal = open(&link, true);
    sim.add_rule("lie:length-zero,op=receive".parse().unwrap());
    for _ in 0..200 {
        sim.feed(0, b"lost");
    }
    until("the lies are told", || sim.waiting(0) == 0);
    sim.clear_rules();
    let bytes = noise(100_000);
    sim.feed(0, &bytes);
    assert!(read(&terminal, bytes.len()) == bytes, "not what came after");
    assert_eq!(bed.binding.phase(), Phase::Serving);
    bed.unload();
}

#[test]
fn a_console_that_says_it_wrote_past_its_buffers_is_hung_up_on() {
    let (sim, bed, link) = console();
    let mut terminal = open(&link, true);
    sim.feed(0, b"good");
    assert_eq!(read(&terminal, 4), b"good");
    sim.add_rule("lie:length-long,op=receive".parse().unwrap());
    sim.feed(0, b"too much");
    has_failed(&bed.binding);
    // None of it is shown.
    let mut rest = Vec::new();
    let end = terminal.read_to_end(&mut rest);
    assert!(end.is_ok() || end.is_err_and(|error| error.kind() != ErrorKind::WouldBlock));
    assert_eq!(rest, b"");
    assert!(std::fs::symlink_metadata(&link).is_err());
}

#[test]
fn a_source_that_says_it_gave_more_than_was_asked_for_ends_and_gives_nothing_of_it() {
    let sim = SimRng::new(EntropyProfile::default(), behaviour(&[])).unwrap();
    let bed = Bed::new("virtio-rng", &sim, 1);
    let path = bed.path("random");
    bed.attach(&format!("fifo:{path}"));
    let mut pipe = open(&path, false);
    let mut bytes = read(&pipe, 1000);
    sim.add_rule("lie:length-long".parse().unwrap());
    let mut piece = vec![0; 64 * 1024];
    until("the end", || match pipe.read(&mut piece) {
        Ok(count) => {
            bytes.extend_from_slice(&piece[..count]);
            count == 0
        }
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    });
    has_failed(&bed.binding);
    let whole = SimRng::stream(42, bytes.len());
    let odd = bytes.iter().zip(&whole).position(|(one, other)| one != other);
    assert_eq!(odd, None, "of {} bytes", bytes.len());
    assert!(!std::path::Path::new(&path).exists());
}
