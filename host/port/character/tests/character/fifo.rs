//! Random bytes on a named pipe.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::sync::mpsc::channel;
use std::time::Duration;

use cofferdam_port_character::CharacterError;
use cofferdam_sim::{ConsoleProfile, EntropyProfile, SimConsole, SimRng};

use crate::support::{Bed, PATIENCE, behaviour, open, read, until};

fn bed(rules: &[&str]) -> (SimRng, Bed) {
    let sim = SimRng::new(EntropyProfile::default(), behaviour(rules)).unwrap();
    let bed = Bed::new("virtio-rng", &sim, 1);
    (sim, bed)
}

#[test]
fn a_reader_gets_the_devices_bytes_each_once_and_in_order() {
    let (sim, bed) = bed(&["lie:answer-short@every=3"]);
    let path = bed.path("random");
    bed.attach(&format!("fifo:{path}"));
    let about = std::fs::symlink_metadata(&path).unwrap();
    assert!(about.file_type().is_fifo());
    assert_eq!(about.permissions().mode() & 0o777, 0o600);
    let whole = SimRng::stream(42, 1 << 20);
    let first = read(&open(&path, false), 300_000);
    assert_eq!(first, whole[..first.len()]);
    // The reader is gone; the next one goes on where it stopped.
    let second = read(&open(&path, false), (1 << 20) - first.len());
    assert!(second == whole[first.len()..], "another order");
    assert_eq!(sim.violations(), []);
    bed.unload();
    assert!(!std::path::Path::new(&path).exists());
}

#[test]
fn nobody_who_reads_costs_a_full_pipe_and_nothing_more() {
    let (sim, bed) = bed(&[]);
    let path = bed.path("random");
    bed.attach(&format!("fifo:{path}"));
    // 64 KiB of the pipe and four answers of 16 KiB that wait.
    until("the pipe is full", || sim.placed_bytes() >= 64 * 1024);
    let settled = |last: &mut u64| sim.placed_bytes() == std::mem::replace(last, sim.placed_bytes());
    let mut last = 0;
    until("the device rests", || {
        std::thread::park_timeout(Duration::from_millis(50));
        settled(&mut last)
    });
    assert!(last <= 128 * 1024, "{last} bytes for nobody");
    let crossings = bed.binding.status().calls.iter().map(|core| core.crossings).sum::<u64>();
    std::thread::park_timeout(Duration::from_millis(300));
    let now = bed.binding.status().calls.iter().map(|core| core.crossings).sum::<u64>();
    assert_eq!((now, sim.placed_bytes()), (crossings, last), "something goes on");
    bed.unload();
}

#[test]
fn a_blocked_reader_finds_the_end_at_unload() {
    let (sim, bed) = bed(&["hang@from=20"]);
    let path = bed.path("random");
    bed.attach(&format!("fifo:{path}"));
    let (answer, answered) = channel();
    let (began, begun) = channel();
    std::thread::spawn(move || {
        let mut pipe = File::open(path).unwrap();
        began.send(()).unwrap();
        let mut bytes = Vec::new();
        answer.send(pipe.read_to_end(&mut bytes).map(|_| bytes.len())).unwrap();
    });
    begun.recv_timeout(PATIENCE).unwrap();
    until("the device hangs", || sim.stats().waiting > 0);
    let unload = cofferdam_manager::UnloadOptions {
        deadline: Duration::from_millis(100),
        force: true,
        ..cofferdam_manager::UnloadOptions::default()
    };
    bed.manager.unload_binding(&bed.binding, &unload).unwrap();
    assert!(answered.recv_timeout(PATIENCE).unwrap().unwrap() > 0);
}

#[test]
fn a_device_that_fails_is_asked_again_but_not_without_end() {
    let (sim, bed) = bed(&["lie:length-zero@from=3"]);
    let path = bed.path("random");
    bed.attach(&format!("fifo:{path}"));
    let reader = open(&path, false);
    let got = read(&reader, 16 * 1024);
    assert_eq!(got, SimRng::stream(42, got.len()));
    std::thread::park_timeout(Duration::from_millis(500));
    let asked = sim.stats().taken;
    assert!(asked < 60, "{asked} requests in half a second");
    drop(bed);
}

#[test]
fn what_is_at_the_path_is_left_alone_unless_a_host_left_it() {
    let (_sim, bed) = bed(&[]);
    let path = bed.path("random");
    std::fs::write(&path, "mine").unwrap();
    assert!(matches!(bed.start(&format!("fifo:{path}")), Err(CharacterError::Foreign { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    std::fs::remove_file(&path).unwrap();
    // Left behind: nobody reads it.
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let make = || rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    make();
    bed.attach(&format!("fifo:{path}"));
    assert!(matches!(bed.start(&format!("fifo:{path}")), Err(CharacterError::InUse(_))), "the first is still there");
    // Somebody put another file there: it is not the port's to remove.
    std::fs::remove_file(&path).unwrap();
    make();
    bed.unload();
    assert!(std::path::Path::new(&path).exists());
}

#[test]
fn a_port_of_another_service_is_refused_by_name() {
    let sim = SimConsole::new(ConsoleProfile::default(), behaviour(&[])).unwrap();
    let console = Bed::new("virtio-console", &sim, 1);
    let error = console.start(&format!("fifo:{}", console.path("x"))).unwrap_err().to_string();
    assert!(error.contains("gives entropy; this one gives stream"), "{error}");
    assert!(!std::path::Path::new(&console.path("x")).exists());
    let (_sim, rng) = bed(&[]);
    let error = rng.start(&format!("pty:{}", rng.path("x"))).unwrap_err().to_string();
    assert!(error.contains("gives stream; this one gives entropy"), "{error}");
}
