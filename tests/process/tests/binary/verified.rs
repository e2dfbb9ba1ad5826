//! fio, which checks every block that it reads, while drivers break down under it at random points, or are exchanged: no wrong data, no lost write, no error.

use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::faulty::{self, Crashes, Kind, Orders, Point};
use cofferdam_process_tests::host::{Daemon, text};
use cofferdam_process_tests::process::{Ended, Process};
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::{PATIENCE, until_true};

const DISK: u64 = 64 << 20;
/// Connections, each on a lane of its own, with a half of the disk.
const JOBS: u64 = 2;

/// What fio does one after the other: writes everything, reads at random, writes at random, both; the last two with a flush for every 32 writes. What is written is checked.
fn jobs(socket: &str, seconds: u64) -> String {
    let half = DISK / JOBS;
    format!(
        "[global]\nioengine=nbd\nuri=nbd+unix:///?socket={socket}\nthread=1\nnumjobs={JOBS}\nsize={half}\noffset_increment={half}\niodepth=8\n\
         verify=crc32c\nverify_fatal=1\nverify_state_save=0\nexitall_on_error=1\n\
         [fill]\nrw=write\nbs=64k\nverify_interval=4k\ndo_verify=0\n\
         [read]\nstonewall\nrw=randread\nbs=4k\ntime_based=1\nruntime={seconds}\n\
         [write]\nstonewall\nrw=randwrite\nbsrange=4k-64k\nfsync=32\nverify_backlog=32\ntime_based=1\nruntime={seconds}\n\
         [mixed]\nstonewall\nrw=randrw\nbsrange=4k-64k\nfsync=32\nverify_backlog=32\ntime_based=1\nruntime={seconds}\n"
    )
}

fn is_content(ended: &Ended) {
    let said = format!("{}{}", ended.stdout, ended.stderr);
    assert_eq!(ended.code, Some(0), "{said}");
    for wrong in ["verify", "bad magic", "bad header", "error"] {
        assert!(!ended.stderr.contains(wrong), "{said}");
    }
    assert_eq!(said.matches("err= 0").count() as u64, 4 * JOBS, "every job ends well: {said}");
}

/// Waits for the end of fio, which must be a good one, and collects crashes meanwhile.
fn while_it_runs(
    fio: &mut Process,
    bound: Duration,
    crashes: &mut Crashes,
    daemon: &Daemon,
    mut now_and_then: impl FnMut(u64),
) {
    let begin = Instant::now();
    for round in 1.. {
        let ended = fio.end_within(Duration::from_millis(400));
        crashes.collect(daemon, "disk");
        if let Some(ended) = ended {
            if ended.code != Some(0) {
                eprint!("{crashes}");
            }
            return is_content(&ended);
        }
        assert!(begin.elapsed() < PATIENCE + bound, "fio still runs");
        now_and_then(round);
    }
}

/// fio for `seconds` of each of its jobs, with so many crashes of the driver in each second.
fn verify(per_second: u64, seconds: u64) {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(DISK, 2);
    let socket = daemon.path("disk.nbd");
    let port = format!("nbd:{}", socket.display());
    let orders = Orders {
        mean_us: JOBS * 1_000_000 / per_second,
        judges: true,
        points: Point::ALL.to_vec(),
        kinds: Kind::ALL.to_vec(),
        ..Orders::default()
    };
    // Long enough for a call on a busy machine: two that are cut off for nothing would fail their request.
    let more = ["--port", &port, "--queues", "2", "--call-deadline-ms", "200"];
    faulty::load(&daemon, &orders, &qemu.address(), "disk", &more);
    let file = daemon.path("verify.fio");
    std::fs::write(&file, jobs(socket.to_str().expect("UTF-8"), seconds)).expect("a job file");
    let (begin, mut crashes) = (Instant::now(), Crashes::default());
    let expected = 3 * seconds * per_second;
    // Their number is drawn: with bad luck one run has hardly any.
    for _ in 0..5 {
        let mut fio = Process::start(tool("fio").current_dir(daemon.path("")).arg(&file));
        while_it_runs(&mut fio, Duration::from_secs(20 * seconds), &mut crashes, &daemon, |round| {
            if (round * per_second).is_multiple_of(10) {
                // The control lane has something to do, and may break down over it.
                qemu.resize(DISK + (round % 2 + 1) * 512);
            }
        });
        if crashes.count() >= expected / 3 {
            break;
        }
    }
    let (kinds, lanes) = (crashes.by(|crash| crash["kind"].as_str()), crashes.by(|crash| crash["lane"].as_str()));
    let calls = crashes.by(|crash| crash["calls"][0]["export"].as_str());
    let pauses = crashes.pauses("trap");
    let (count, took) = (crashes.count(), begin.elapsed());
    println!("{count} crashes in {took:?}: {kinds:?}, lanes {lanes:?}, calls {calls:?}");
    println!(
        "pauses of traps: {} us median, {:?} us longest",
        pauses.get(pauses.len() / 2).unwrap_or(&0),
        pauses.last()
    );
    assert!(count >= expected / 3, "{count} crashes of about {expected}");
    if expected >= 60 {
        for (found, wanted) in [(&kinds, 4), (&lanes, 3)] {
            assert_eq!(found.len(), wanted, "{found:?}");
        }
        assert!(calls.contains_key("submit") && calls.contains_key("complete"), "{calls:?}");
    }
    // The last crash may be just now.
    until_true("it serves", || daemon.binding("disk").is_some_and(|disk| disk["state"] == "serving"));
    daemon.unload("disk", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

/// Memory that a process has for itself and that no file is behind, in bytes: buffers that a device shares do not count.
fn anonymous_bytes(pid: u32) -> u64 {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:")).expect("a line of it");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("a number") << 10
}

/// One driver for the other every tenth of a second, while fio does each of its jobs for `seconds`.
fn upgrade_again_and_again(seconds: u64) {
    /// Most that memory may grow by, however many upgrades there are: a driver's code and two instances of it are about as much.
    const GROWTH: u64 = 8 << 20;
    let daemon = Daemon::start();
    let qemu = Backend::qemu(DISK, 2);
    // A busy machine is no breakdown of a driver.
    let socket = daemon.serve(&qemu.address(), "disk", &["--queues", "2", "--call-deadline-ms", "10000"]);
    let file = daemon.path("verify.fio");
    std::fs::write(&file, jobs(socket.to_str().expect("UTF-8"), seconds)).expect("a job file");
    let drivers = [programs::test_driver("well-behaved"), programs::driver()].map(|path| text(&path));
    let (begin, mut blackouts, mut before) = (Instant::now(), Vec::new(), 0);
    // On a busy machine there are few in one run.
    for _ in 0..5 {
        let mut fio = Process::start(tool("fio").current_dir(daemon.path("")).arg(&file));
        let run = Instant::now();
        let ended = loop {
            if let Some(ended) = fio.end_within(Duration::from_millis(100)) {
                break ended;
            }
            assert!(run.elapsed() < PATIENCE + Duration::from_secs(20 * seconds), "fio still runs");
            let driver = &drivers[blackouts.len() % 2];
            let upgrade = ["upgrade", "disk", driver, "--probation", "0s", "--deadline", "5s", "--json"];
            let report = daemon.run(&upgrade).expect(0).json();
            blackouts.push(report["blackout_micros"].as_u64().expect("a number"));
            if blackouts.len() == 10 {
                before = anonymous_bytes(daemon.process.pid());
            }
        };
        is_content(&ended);
        if blackouts.len() >= 15 {
            break;
        }
    }
    let after = anonymous_bytes(daemon.process.pid());
    let upgrades = blackouts.len();
    blackouts.sort_unstable();
    println!(
        "{upgrades} upgrades in {:?}: blackout {} us median, {} us p99, {} us longest; memory {before} and {after} bytes",
        begin.elapsed(),
        blackouts[upgrades / 2],
        blackouts[upgrades * 99 / 100],
        blackouts[upgrades - 1]
    );
    assert!(upgrades >= 15, "{upgrades} upgrades");
    assert!(after < before + GROWTH, "memory: {before} bytes after ten upgrades, {after} after {upgrades}");
    let disk = daemon.binding("disk").expect("listed");
    assert_eq!(
        (disk["state"].as_str(), daemon.run(&["crashes", "disk", "--json"]).json()),
        (Some("serving"), serde_json::json!([]))
    );
    daemon.unload("disk", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

#[test]
fn fio_does_not_notice_an_upgrade_every_tenth_of_a_second() {
    upgrade_again_and_again(2);
}

#[test]
#[ignore = "long: upgrades for minutes"]
fn fio_does_not_notice_an_upgrade_every_tenth_of_a_second_for_minutes() {
    upgrade_again_and_again(40);
}

#[test]
fn fio_sees_no_wrong_data_and_no_error_with_a_crash_a_second() {
    verify(1, 3);
}

#[test]
fn fio_sees_no_wrong_data_and_no_error_with_ten_crashes_a_second() {
    verify(10, 3);
}

#[test]
#[ignore = "long: three minutes with a crash a second"]
fn fio_sees_no_wrong_data_and_no_error_in_minutes_with_a_crash_a_second() {
    verify(1, 60);
}

#[test]
#[ignore = "long: three minutes with ten crashes a second"]
fn fio_sees_no_wrong_data_and_no_error_in_minutes_with_ten_crashes_a_second() {
    verify(10, 60);
}
