//! A backend that dies under NBD clients and comes back (`--reconnect`): qemu-storage-daemon, killed and started again at its socket.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cofferdam_process_tests::backend::Backend;
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, Command};
use cofferdam_process_tests::wait::until_true;

const DISK: u64 = 16 << 20;
/// NBD_EIO.
const EIO: u32 = 5;
const BLOCK: u64 = 4096;
/// Requests in flight of one client.
const DEPTH: u64 = 16;

fn state(daemon: &Daemon) -> String {
    daemon.binding("disk").expect("listed")["state"].as_str().expect("a state").to_owned()
}

fn until_state(daemon: &Daemon, wanted: &str) {
    until_true(wanted, || state(daemon) == wanted);
}

/// What is in a block after its `round`th write.
fn fill(block: u64, round: u64) -> u8 {
    (block * 7 + round) as u8
}

/// Writes and reads its own quarter of the disk until it is told to stop, and takes no error but of a flush. How many flushes failed.
fn traffic(socket: &Path, quarter: u64, stop: &AtomicBool, rounds: &AtomicU64) -> u64 {
    let mut client = Client::new(socket);
    let blocks = DISK / 4 / BLOCK;
    let at = |block: u64| quarter * (DISK / 4) + block * BLOCK;
    let mut failed = 0;
    let mut written = vec![0; blocks as usize];
    for round in 1.. {
        let first = round * DEPTH % blocks;
        for block in first..first + DEPTH {
            client.send_write(at(block), &[fill(block, round); BLOCK as usize]).expect("sent");
            written[block as usize] = round;
        }
        for _ in 0..DEPTH {
            assert_eq!(client.reply().expect("an answer").error, 0, "a write, round {round}");
        }
        for block in first..first + DEPTH {
            client.send(Command::Read, at(block), BLOCK as u32).expect("sent");
        }
        let cookies: Vec<_> = (0..DEPTH).map(|_| client.reply().expect("an answer")).collect();
        let least = cookies.iter().map(|reply| reply.cookie).min().expect("some");
        for reply in cookies {
            let block = first + reply.cookie - least;
            assert_eq!(reply.error, 0, "a read, round {round}");
            assert!(reply.data.iter().all(|byte| *byte == fill(block, round)), "block {block}, round {round}");
        }
        if round % 50 == 0 {
            match client.flush() {
                0 => {}
                EIO => failed += 1,
                error => panic!("a flush: error {error}"),
            }
        }
        rounds.fetch_add(1, Ordering::AcqRel);
        if stop.load(Ordering::Acquire) {
            break;
        }
    }
    for (block, round) in written.into_iter().enumerate().filter(|(_, round)| *round > 0) {
        let data = client.read(at(block as u64), BLOCK as u32);
        assert!(data.iter().all(|byte| *byte == fill(block as u64, round)), "block {block} at the end");
    }
    failed
}

fn crash_under_traffic(crashes: u64) {
    let daemon = Daemon::start();
    let mut backend = Backend::qemu(DISK, 2);
    let more = ["--queues", "2", "--reconnect", "--restarts", "1000/1s", "--restart-wait", "0ms"];
    let socket = daemon.serve(&backend.address(), "disk", &more);
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let clients = (0..4).map(|quarter| {
            let (socket, stop, rounds) = (&socket, &stop, &rounds);
            scope.spawn(move || traffic(socket, quarter, stop, rounds))
        });
        let clients: Vec<_> = clients.collect();
        for _ in 0..crashes {
            let before = rounds.load(Ordering::Acquire);
            until_true("traffic", || {
                assert!(clients.iter().all(|client| !client.is_finished()), "a client has failed");
                rounds.load(Ordering::Acquire) > before + 100
            });
            backend.crash();
            until_state(&daemon, "recovering");
            let why = daemon.run(&["why", "disk"]).expect(0).stdout;
            assert!(why.contains("to come back") && why.contains(" s left"), "{why}");
            backend.start_again();
            until_state(&daemon, "serving");
        }
        stop.store(true, Ordering::Release);
        clients.into_iter().map(|client| client.join().expect("no error")).collect()
    });
    println!("{crashes} crashes, and of each client so many flushes failed: {failed:?}");
    assert!(failed.iter().all(|failed| *failed <= crashes), "{failed:?}");
    let events = daemon.run(&["events"]).expect(0).stdout;
    assert_eq!(events.matches("device back after ").count() as u64, crashes, "{events}");
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn clients_do_not_notice_a_backend_that_is_killed_and_started_again() {
    crash_under_traffic(3);
}

#[test]
#[ignore = "long: fifty crashes of a backend"]
fn clients_do_not_notice_fifty_crashes_of_their_backend() {
    crash_under_traffic(50);
}

#[test]
fn the_one_flush_that_fails_is_the_first_after_writes_that_may_be_lost() {
    let daemon = Daemon::start();
    let mut backend = Backend::qemu(DISK, 1);
    let socket = daemon.serve(&backend.address(), "disk", &["--reconnect=1m"]);
    let (mut client, mut other) = (Client::new(&socket), Client::new(&socket));
    for (is_flushed, expected) in [(true, 0), (false, EIO)] {
        assert_eq!(client.write(0, &[1; 4096]), 0);
        if is_flushed {
            assert_eq!(other.flush(), 0);
        }
        backend.crash();
        // Sent while there is no backend, and answered by the next one.
        client.send_write(4096, &[2; 4096]).expect("sent");
        until_state(&daemon, "recovering");
        backend.start_again();
        assert_eq!(client.reply().expect("an answer").error, 0);
        // Acknowledged behind the loss, so it is not what fails.
        until_state(&daemon, "serving");
        assert_eq!([client.flush(), other.flush()], [expected; 2], "flushed before: {is_flushed}");
        assert_eq!([client.flush(), other.flush()], [0; 2], "once");
        assert_eq!([client.read(0, 4096), client.read(4096, 4096)], [[1; 4096], [2; 4096]]);
    }
    drop((client, other));
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_backend_of_another_size_is_refused_until_the_right_one_is_there() {
    let daemon = Daemon::start();
    let mut backend = Backend::qemu(DISK, 1);
    let socket = daemon.serve(&backend.address(), "disk", &["--reconnect"]);
    let mut client = Client::new(&socket);
    assert_eq!(client.write(0, &[1; 4096]), 0);
    backend.crash();
    backend.change_image(2 * DISK);
    backend.start_again();
    until_state(&daemon, "failed");
    let change = format!("capacity-bytes {DISK} -> {}", 2 * DISK);
    for command in ["why", "inspect"] {
        let told = daemon.run(&[command, "disk"]).expect(0).stdout;
        assert!(told.contains(&change) && told.contains("cofferdam restart disk"), "{command}: {told}");
    }
    assert_eq!(client.write(0, &[2; 4096]), EIO, "at once");
    backend.crash();
    backend.change_image(DISK);
    daemon.run(&["restart", "disk"]).expect(0);
    assert_eq!(state(&daemon), "recovering");
    backend.start_again();
    until_state(&daemon, "serving");
    assert_eq!(client.read(0, 4096), [1; 4096], "on the same connection");
    drop(client);
    daemon.unload("disk", &[]).assert_clean();
}

#[test]
fn a_backend_that_does_not_come_back_in_time_fails_the_binding() {
    let daemon = Daemon::start();
    let mut backend = Backend::qemu(DISK, 1);
    let socket = daemon.serve(&backend.address(), "disk", &["--reconnect=300ms"]);
    let mut client = Client::new(&socket);
    client.send(Command::Read, 0, 4096).expect("sent");
    backend.crash();
    until_state(&daemon, "failed");
    // It may have been answered before.
    assert!([0, EIO].contains(&client.reply().expect("an answer").error));
    let events = daemon.run(&["events"]).expect(0).stdout;
    assert!(events.contains("device given up: it did not come back within 300ms"), "{events}");
    daemon.unload("disk", &[]).assert_clean();
    client.assert_closed();
}

#[test]
fn reconnect_without_restarts_is_refused() {
    let daemon = Daemon::start();
    let backend = Backend::qemu(DISK, 1);
    let driver = cofferdam_process_tests::programs::driver();
    let refused = daemon.load(&driver, &backend.address(), "disk", &["--reconnect", "--restarts", "never"]);
    refused.expect_error(1, &["--reconnect", "--restarts never"]);
}
