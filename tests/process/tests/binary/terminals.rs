//! A console under the programs that people use on terminals: `socat`, `expect`, and `cofferdam run` itself.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::process::{Process, Signal};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};
use rustix::fs::OFlags;

const PASTE_BYTES: usize = 10 << 20;

/// A console of the sim, which says again what it is told, as a terminal.
struct Bed {
    daemon: Daemon,
    link: PathBuf,
    _sim: Backend,
}

impl Bed {
    #[track_caller]
    fn new(arguments: &[&str]) -> Bed {
        let (daemon, sim) = (Daemon::start(), Backend::class("console", arguments));
        let link = daemon.path("console");
        let port = format!("pty:{}", link.display());
        daemon.load(&programs::shipped_driver("virtio-console"), &sim.address(), "tty", &["--port", &port]).expect(0);
        Bed { daemon, link, _sim: sim }
    }

    /// `socat` between its standard streams and the terminal.
    fn socat(&self) -> Command {
        let mut socat = tool("socat");
        socat.arg("-t").arg("20").arg("-").arg(format!("{},rawer", self.link.display()));
        socat
    }

    #[track_caller]
    fn unload(self) {
        self.daemon.unload("tty", &[]).assert_clean();
    }
}

/// Starts a script of `expect`. An `expect` that is in vain ends it with 9, or 8 at the end of what it reads.
#[track_caller]
fn expect(script: &str) -> Process {
    let seconds = PATIENCE.as_secs();
    let begin = format!("set timeout {seconds}\nexpect_before timeout {{ exit 9 }} eof {{ exit 8 }}\n");
    let mut expect = tool("expect");
    Process::start(expect.arg("-c").arg(begin + script).env("XDG_CACHE_HOME", programs::cache()))
}

fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[test]
fn socat_pastes_10_mib_and_gets_them_back_whole_and_in_order() {
    let bed = Bed::new(&[]);
    let (sent, got) = (bed.daemon.path("sent"), bed.daemon.path("got"));
    let bytes = noise(PASTE_BYTES);
    std::fs::write(&sent, &bytes).expect("a file");
    // Two, because one would wait with its write for room that its own read makes. What it reads from is open when what it writes to is there.
    let (link, rawer) = (bed.link.display().to_string(), format!("{},rawer", bed.link.display()));
    let mut reader = Process::start(tool("socat").args(["-u", &rawer, &format!("CREATE:{}", got.display())]));
    until_true("the reader", || got.exists());
    let writer = Process::run(tool("socat").args(["-u", &format!("OPEN:{},rdonly", sent.display()), &link]));
    writer.expect(0);
    let length = || std::fs::metadata(&got).map_or(0, |about| about.len());
    until_true("all of it", || length() >= PASTE_BYTES as u64);
    assert!(reader.is_running());
    // The unload hangs up, and socat ends of its own accord.
    bed.daemon.unload("tty", &[]).assert_clean();
    reader.end(PATIENCE).expect(0);
    let read = std::fs::read(&got).expect("a file");
    let odd = read.iter().zip(&bytes).position(|(one, other)| one != other);
    assert_eq!((read.len(), odd), (PASTE_BYTES, None));
}

#[test]
fn expect_talks_to_a_terminal_until_the_unload_hangs_up() {
    let bed = Bed::new(&[]);
    let script = format!(
        r#"spawn -noecho -open [open {} r+]
fconfigure $spawn_id -translation binary
send "who is there?\r"
expect -ex "who is there?\r"
send "a b c\x03\x1d\r"
expect -ex "a b c\x03\x1d\r"
puts stderr "both came"
expect_before timeout {{ exit 9 }} eof {{ exit 0 }}
expect -ex "what nobody says" {{ exit 7 }}"#,
        bed.link.display()
    );
    let mut expect = expect(&script);
    expect.wait_stderr("both came");
    bed.unload();
    expect.end(PATIENCE).expect(0);
}

#[test]
fn run_on_a_terminal_is_one_for_expect() {
    let sim = Backend::class("console", &[]);
    let line = format!(
        "{} run {} --device {} --port stdio --name tty",
        text(&programs::cofferdam()),
        text(&programs::shipped_driver("virtio-console")),
        sim.address()
    );
    let mut expect = expect(&format!(
        r#"spawn {line}
expect "Ctrl-\] unloads."
send "who is there?\r"
expect -ex "who is there?\r"
send "\x03still here"
expect -ex "\x03still here"
send "\x1d"
expect -ex "certificate: tty"
expect -ex "left      nothing"
expect_before
expect eof
set ended [wait]
if {{[lindex $ended 2] != 0 || [lindex $ended 3] != 0}} {{ puts stderr $ended; exit 6 }}"#
    ));
    expect.end(PATIENCE).expect(0);
}

#[test]
fn a_terminal_is_closed_and_opened_again_by_one_program_after_another() {
    let bed = Bed::new(&[]);
    for round in 0..20 {
        let word = format!("round {round}\r");
        let mut socat = Process::start(&mut bed.socat());
        let mut stdin = socat.stdin();
        stdin.write_all(word.as_bytes()).expect("typed");
        socat.wait_stdout(&word);
        // Nothing of the rounds before is said again.
        assert_eq!(socat.stdout(), word);
        if round % 2 == 0 {
            // As a crash: the kernel closes it.
            socat.signal(Signal::KILL);
        } else {
            drop(stdin);
            socat.signal(Signal::TERM);
        }
        socat.end(PATIENCE);
    }
    bed.unload();
}

/// Memory of a process in KiB (proc(5), `status`).
fn resident_kib(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn a_flood_that_nobody_reads_costs_no_memory_and_an_unload_in_it_is_clean() {
    let bed = Bed::new(&["--flood"]);
    let process = bed.daemon.process.pid();
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
    let mut terminal =
        File::options().read(true).write(true).custom_flags(flags).open(&bed.link).expect("the terminal");
    take(&mut terminal, 1 << 20);
    let (memory, begun) = (resident_kib(process), arrivals(&bed));
    // It stands when nothing has come for a while.
    let mut last = (begun, std::time::Instant::now());
    until_true("the flood stands", || {
        let now = arrivals(&bed);
        if now != last.0 {
            last = (now, std::time::Instant::now());
        }
        last.1.elapsed() > Duration::from_millis(500)
    });
    let grown = resident_kib(process).saturating_sub(memory);
    assert!(grown < 2048, "{grown} KiB more");
    for _ in 0..8 {
        take(&mut terminal, 1 << 20);
    }
    assert!(arrivals(&bed) > last.0);
    assert!(resident_kib(process).saturating_sub(memory) < 2048);
    bed.unload();
}

/// Reads so many bytes.
#[track_caller]
fn take(terminal: &mut File, bytes: usize) {
    let (mut piece, mut taken) = (vec![0; 64 * 1024], 0);
    until_true("the flood goes on", || {
        while let Ok(count) = terminal.read(&mut piece) {
            taken += count;
            if taken >= bytes {
                return true;
            }
        }
        false
    });
}

/// How many buffers have come to the terminal.
#[track_caller]
fn arrivals(bed: &Bed) -> u64 {
    let binding = bed.daemon.binding("tty").expect("it serves");
    binding["arrivals"].as_u64().unwrap_or_else(|| panic!("{binding}"))
}
