//! Unload in the middle of traffic: nothing is left, nobody is shown wrong data, and what was flushed is on the medium.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam_process_tests::backend::{Backend, tool};
use cofferdam_process_tests::host::Daemon;
use cofferdam_process_tests::nbd::{Client, Command};
use cofferdam_process_tests::process::Process;
use cofferdam_process_tests::wait::{PATIENCE, until_true};

const BLOCK: usize = 4096;
const DEPTH: usize = 32;

#[test]
fn unload_during_fio_at_depth_32_leaves_nothing_and_fio_sees_errors_but_never_wrong_data() {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(64 << 20, 1);
    let socket = daemon.serve(&qemu.address(), "disk", &[]);
    assert_eq!(Client::new(&socket).write(0, &[0; BLOCK]), 0);
    daemon.wait_idle("disk");
    let before = daemon.census();
    let arguments = "--name=verify --ioengine=nbd --rw=randrw --bsrange=4k-64k --size=64M --time_based --runtime=60 --iodepth=32 \
                     --verify=crc32c --verify_fatal=1 --verify_backlog=64 --verify_state_save=0";
    let mut fio = tool("fio");
    fio.current_dir(daemon.path("")).args(arguments.split_whitespace());
    let mut fio = Process::start(fio.arg(format!("--uri=nbd+unix:///?socket={}", socket.display())));
    until_true("fio is at depth", || {
        daemon.binding("disk").is_some_and(|binding| {
            let requests = binding["handles"][0]["requests"].as_u64().unwrap_or(0);
            requests > 2000 && binding["requests_in_flight"].as_u64().unwrap_or(0) >= 8
        })
    });
    let certificate = daemon.unload("disk", &[]);
    certificate.assert_clean();
    assert_eq!(certificate.outcome(), "unloaded");
    assert_eq!(certificate.number("handles_revoked"), 1);
    assert_eq!(certificate.number("requests_failed"), 0, "a device that works answers all of it");
    let ended = fio.end(PATIENCE);
    let said = ended.stdout + &ended.stderr;
    assert_ne!(ended.code, Some(0), "{said}");
    for wrong in ["verify failed", "verify: bad", "bad magic", "bad header", "Invalid or incomplete multibyte"] {
        assert!(!said.contains(wrong), "fio was shown wrong data: {said}");
    }
    assert!(said.contains("err=") || said.contains("error"), "{said}");
    assert!(daemon.bindings().is_empty());
    daemon.wait_census(&before);
    daemon.stop(PATIENCE);
}

/// What a block of round `round` holds.
fn content(block: usize, round: u64) -> Vec<u8> {
    let number = round << 32 | block as u64;
    number.to_le_bytes().repeat(BLOCK / 8)
}

/// Writes round after round of blocks at depth, flushing after each, until an error ends it. Answers which round of each block was flushed last.
fn write_and_flush(socket: &Path, blocks: usize) -> HashMap<usize, u64> {
    let mut client = Client::new(socket);
    let mut flushed = HashMap::new();
    for round in 1.. {
        let first = (round as usize - 1) * DEPTH;
        let chosen: Vec<_> = (first..first + DEPTH).map(|block| block % blocks).collect();
        let sent = chosen
            .iter()
            .try_for_each(|block| client.send_write((block * BLOCK) as u64, &content(*block, round)).map(|_| ()));
        let answered = chosen.iter().all(|_| client.reply().is_ok_and(|reply| reply.error == 0));
        if sent.is_err() || !answered || client.call(Command::Flush, 0, 0).ok() != Some(Ok(Vec::new())) {
            break;
        }
        flushed.extend(chosen.into_iter().map(|block| (block, round)));
    }
    flushed
}

#[test]
fn what_was_flushed_before_an_unload_is_on_the_medium() {
    let daemon = Daemon::start();
    let qemu = Backend::qemu(16 << 20, 1);
    let socket = daemon.serve(&qemu.address(), "disk", &[]);
    let writer = {
        let socket = socket.clone();
        std::thread::spawn(move || write_and_flush(&socket, (16 << 20) / BLOCK))
    };
    until_true("some rounds are flushed", || {
        daemon.binding("disk").is_some_and(|binding| binding["handles"][0]["requests"].as_u64() > Some(1000))
    });
    daemon.unload("disk", &[]).assert_clean();
    let flushed = writer.join().expect("the writer");
    assert!(flushed.len() > DEPTH, "{} blocks were flushed", flushed.len());
    let image = std::fs::read(qemu.image()).expect("the image");
    for (block, round) in flushed {
        let found = &image[block * BLOCK..][..BLOCK];
        // A later round may have been written without being flushed.
        let number = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
        assert!(number >> 32 >= round, "block {block} of round {round} was flushed, {} is there", number >> 32);
        assert!(found == content(block, number >> 32), "block {block} is torn");
    }
}

#[test]
fn unload_waits_for_no_client_to_close_poll_or_read() {
    let daemon = Daemon::start();
    let sim = Backend::sim(&["--memory", "32M"]);
    let socket = daemon.serve(&sim.address(), "disk", &[]);
    let idle = Client::new(&socket);
    let half = {
        // Half of a write: its buffer is lent, its payload is not there.
        let mut client = Client::new(&socket);
        let mut bytes = client.header(Command::Write, 0, 1 << 20);
        bytes.extend_from_slice(&[7; 1000]);
        std::io::Write::write_all(&mut client.stream, &bytes).expect("sent");
        client
    };
    let deaf = {
        // Far more answers than a socket takes, and none of them read.
        let mut client = Client::new(&socket);
        for _ in 0..32 {
            client.send(Command::Read, 0, 1 << 20).expect("sent");
        }
        client
    };
    until_true("all three are being served", || {
        let served = daemon.binding("disk").map(|binding| binding["handles"].clone()).unwrap_or_default();
        let handles = served.as_array().map_or(&[][..], Vec::as_slice);
        handles.len() == 3 && handles.iter().any(|handle| handle["requests"].as_u64() > Some(0))
    });
    let begin = Instant::now();
    let certificate = daemon.unload("disk", &["--deadline", "20s"]);
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    certificate.assert_clean();
    assert_eq!(certificate.number("handles_revoked"), 3);
    for client in [idle, half, deaf] {
        client.assert_closed();
    }
}
