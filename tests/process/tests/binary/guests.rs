//! Every hostile guest of `tests/guests/hostile`, in a daemon that serves another disk meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, Command};
use cofferdam_process_tests::process::Ended;
use cofferdam_process_tests::programs;
use cofferdam_process_tests::wait::PATIENCE;

/// Guests whose load fails, each with what the message must say.
const LOAD_FAILS: &[(&str, &str)] = &[
    ("trap-attach", "(trap)"),
    ("loop-attach", "(deadline): one call ran for more than 100 ms"),
    ("eat-attach", "(out-of-memory)"),
    ("recurse-attach", "(trap)"),
    ("not-mine", "not a device of this driver"),
    ("unoffered-features", "not on offer"),
    ("negotiate-twice", "negotiated already"),
    ("never-negotiates", "without negotiating"),
    ("read-config-huge", "1073741824 bytes at offset 0"),
    ("no-queues", "0 queues"),
    ("too-many-queues", "1000 queues"),
    ("repeated-queue", "queue 0 is named twice"),
    ("queue-out-of-range", "queue 60000 does not exist"),
    ("queue-size-odd", "100 entries"),
    ("queue-size-huge", "32768 entries"),
    ("huge-state", "1048576 bytes of state"),
    ("huge-ordinary-response", "ordinary response"),
    ("trap-properties", "(trap)"),
    ("bad-block-size", "logical-block-bytes 1000"),
    ("zero-transfer", "max-transfer-bytes 0"),
    ("odd-capacity", "capacity-bytes 16777217"),
    ("trap-start", "(trap)"),
    ("refuse-start", "never starts"),
    ("window-misaligned", "not a multiple of 8"),
];

/// Guests that serve until a request is made, each with what the reason of its end must say.
const TRAFFIC_FAILS: &[(&str, &str)] = &[
    ("window-outside", "beyond the driver's memory"),
    ("window-half-outside", "beyond the driver's memory"),
    ("answer-outside", "(layout)"),
    ("answer-half-outside", "(layout)"),
    ("answer-misaligned", "(layout)"),
    ("answer-window", "(layout)"),
    ("answer-endless", "(layout)"),
    ("trap-submit", "(trap)"),
    ("trap-at-100", "(trap)"),
    ("loop-submit", "(deadline)"),
    ("eat-submit", "(out-of-memory)"),
    ("empty-list", "given and not answered"),
    ("huge-list", "(layout)"),
    ("truncated-words", "ends inside an entry"),
    ("wrong-token", "was not given"),
    ("missing-token", "given and not answered"),
    ("duplicate-token", "answered twice"),
    ("wrong-queue", "queue 4321"),
    ("payload-out-of-range", "outside the payload"),
    ("payload-short", "not covered"),
    ("payload-overflow", "outside the payload"),
    ("payload-direction", "wrong direction"),
    ("payload-overlap", "overlap"),
    ("empty-segment", "length 0"),
    ("too-many-segments", "402 words"),
    ("no-segments", "0 segments"),
    ("unknown-kind", "segment kind 15"),
    ("status-first", "an out segment after an in segment"),
    ("long-header", "1027 words"),
    ("long-status", "status bytes"),
    ("refuse-ok", "refusal with status 0"),
    ("refuse-unknown", "refusal with status 200"),
    ("trap-complete", "(trap)"),
    ("loop-complete", "(deadline)"),
    ("eat-complete", "(out-of-memory)"),
    ("missing-answer", "0 words for 1 responses"),
    ("duplicate-answer", "4 words for 1 responses"),
    ("wrong-answer-token", "was not given"),
    ("unknown-status", "77 is not a status"),
    ("half-answer", "1 words for 1 responses"),
];

/// Guests that are a nuisance and serve; the last two misbehave only with a device of another size, and when the device's configuration changes.
const SERVES: &[&str] = &[
    "well-behaved",
    "on-command",
    "window-moves",
    "flood-log",
    "long-log-line",
    "rude-log-line",
    "flood-log-submit",
    "slow-submit",
    "trap-suspend",
    "huge-suspend",
    "trap-resume",
    "loop-resume",
    "refuse-resume",
    "trap-attach-24m",
    "trap-config-changed",
];

/// Loads a hostile guest, not to be replaced (that is in `recovery`). Those that never end meet the ordinary deadline of a call; the others get time for what they do, which on a busy machine takes longer.
fn load(daemon: &Daemon, name: &str, device: &str, port: &str) -> Ended {
    let patience: &[&str] = if name.starts_with("loop-") { &[] } else { &["--call-deadline-ms", "10000"] };
    daemon.load(
        &programs::test_driver(name),
        device,
        name,
        &[&["--port", port, "--restarts", "never"], patience].concat(),
    )
}

/// Reads and writes another disk of the same daemon until told to stop; every answer must be right. Answers how many there were.
fn traffic(socket: &Path, stop: &AtomicBool) -> u64 {
    let mut client = Client::new(socket);
    let mut round = 0;
    while !stop.load(Ordering::Acquire) {
        round += 1;
        let (offset, data) = (round % 256 * 4096, [round as u8; 4096]);
        assert_eq!(client.write(offset, &data), 0, "round {round}");
        assert_eq!(client.read(offset, 4096), data, "round {round}");
    }
    round
}

/// Runs `hostile` while another disk is in use; then the daemon must hold what it held, and that disk must have been served without a single error.
fn beside_a_good_disk(hostile: impl FnOnce(&Daemon)) {
    let daemon = Daemon::start();
    let good = Backend::sim(&["--memory", "16M"]);
    let socket = daemon.serve(&good.address(), "good", &[]);
    let stop = AtomicBool::new(false);
    assert_eq!(Client::new(&socket).write(0, &[1; 512]), 0);
    daemon.wait_idle("good");
    let before = daemon.census();
    let rounds = std::thread::scope(|scope| {
        let traffic = scope.spawn(|| traffic(&socket, &stop));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| hostile(&daemon)));
        stop.store(true, Ordering::Release);
        let rounds = traffic.join();
        if let Err(failure) = result {
            std::panic::resume_unwind(failure);
        }
        rounds.expect("the good disk is served without error")
    });
    assert!(rounds > 100, "{rounds} rounds");
    assert_eq!(daemon.bindings().len(), 1);
    daemon.wait_idle("good");
    daemon.wait_census(&before);
    daemon.unload("good", &[]).assert_clean();
    daemon.stop(PATIENCE);
}

#[test]
fn every_hostile_guest_is_in_a_table_here() {
    let tables = LOAD_FAILS.iter().chain(TRAFFIC_FAILS).map(|(name, _)| name).chain(SERVES);
    let mut named: Vec<_> = tables.map(|name| (*name).to_owned()).collect();
    let mut listed = programs::behaviours();
    named.sort();
    listed.sort();
    assert_eq!(named, listed);
}

#[test]
fn a_guest_that_fails_while_it_is_loaded_fails_the_load_with_its_reason_and_leaves_nothing() {
    beside_a_good_disk(|daemon| {
        let sim = Backend::sim(&["--memory", "16M"]);
        for (name, reason) in LOAD_FAILS {
            let port = format!("nbd:{}", daemon.path("bad.nbd").display());
            load(daemon, name, &sim.address(), &port).expect_error(1, &["the driver", reason]);
            assert!(!daemon.path("bad.nbd").exists(), "{name}");
        }
        // The device has had them all and serves the good driver.
        let socket = daemon.serve(&sim.address(), "disk", &[]);
        assert_eq!(Client::new(&socket).write(0, &[1; 512]), 0);
        daemon.unload("disk", &[]).assert_clean();
    });
}

/// Writes and reads until an error. Every read that is answered well must have the data that was written.
fn use_up(socket: &Path) -> Result<(), String> {
    let mut client = Client::new(socket);
    for round in 0..128 {
        let (offset, data) = (round * 4096, [round as u8 + 1; 4096]);
        let sent = client.send_write(offset, &data).map_err(|error| error.to_string());
        let written = sent.and_then(|_| client.reply().map_err(|error| error.to_string()))?;
        if written.error != 0 {
            return Err(format!("write {round}: error {}", written.error));
        }
        let read = client.call(Command::Read, offset, 4096).map_err(|error| error.to_string())?;
        match read {
            Ok(found) => assert!(found == data, "round {round}: wrong data"),
            Err(error) => return Err(format!("read {round}: error {error}")),
        }
    }
    Ok(())
}

#[test]
fn a_guest_that_fails_in_traffic_takes_its_binding_down_by_itself_and_says_why() {
    beside_a_good_disk(|daemon| {
        let sim = Backend::sim(&["--memory", "16M"]);
        for (name, reason) in TRAFFIC_FAILS {
            let socket = daemon.path(&format!("{name}.nbd"));
            let port = format!("nbd:{}", socket.display());
            load(daemon, name, &sim.address(), &port).expect(0);
            assert!(use_up(&socket).is_err(), "{name} served 128 rounds");
            daemon.wait_gone(name);
            assert!(!socket.exists(), "{name}");
            let binding = format!("binding=\"{name}\"");
            let fault = daemon.logged(&[&binding, "binding failed"]);
            assert!(fault.contains(reason), "no {reason:?} in the reason of {name}: {fault}");
            let end = daemon.logged(&[&binding, "outcome=Failed"]);
            assert!(end.contains("clean=true leaked_bytes=0"), "{name}: {end}");
        }
        let socket = daemon.serve(&sim.address(), "disk", &[]);
        assert_eq!(use_up(&socket), Ok(()));
        daemon.unload("disk", &[]).assert_clean();
    });
}

#[test]
fn a_guest_that_is_only_a_nuisance_serves_and_unloads() {
    beside_a_good_disk(|daemon| {
        let sim = Backend::sim(&["--memory", "16M"]);
        for name in SERVES {
            let socket = daemon.path(&format!("{name}.nbd"));
            let port = format!("nbd:{}", socket.display());
            load(daemon, name, &sim.address(), &port).expect(0);
            assert_eq!(use_up(&socket), Ok(()), "{name}: {}", daemon.process.stderr());
            daemon.unload(name, &[]).assert_clean();
        }
        // 9,000 of a flood's lines are counted, not written (DESIGN section 9); a guest's line ends where the log's does.
        daemon.logged(&["binding=\"trap-config-changed\"", "outcome=Unloaded"]);
        let log = daemon.process.stderr();
        let lines = log.lines().filter(|line| line.contains("flood-log")).count();
        assert!(lines < 20_000, "{lines} lines of a flood are in the log");
        assert!(!log.contains('\u{1b}'), "a guest wrote an escape into the log");
    });
}
