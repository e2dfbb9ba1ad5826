//! One client's handle is revoked (`cofferdam revoke NAME HANDLE`) while the binding, and every other client of the same
//! worker, goes on.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cofferdam_port_nbd::NbdOptions;

use crate::client::*;
use crate::mock::{Mock, PATIENCE, Served, eventually, geometry, once_within};

/// What DESIGN section 5 gives a client.
const LINGER: Duration = Duration::from_millis(100);
/// What a machine that is not busy may add to it.
const SLACK: Duration = Duration::from_millis(100);

/// The server ends the connection as a stream ends, not by a reset. Nothing is sent meanwhile.
fn assert_ended_in_order(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("an end, not a reset");
}

/// Another client, and that it was served with nothing in between.
struct Bystander {
    client: Client,
    calls: u32,
}

impl Bystander {
    fn new(served: &Served) -> Bystander {
        Bystander { client: Client::new(served, true), calls: 0 }
    }

    fn call(&mut self) {
        assert_eq!(self.client.write(0, 2 << 20, &[self.calls as u8; 4096]), 0);
        assert_eq!(self.client.call(READ, 0, 2 << 20, 4096).data, [self.calls as u8; 4096]);
        self.calls += 1;
    }

    /// Calls until `done`.
    fn call_until(&mut self, what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "waited in vain for: {what}");
            self.call();
        }
    }
}

#[test]
fn the_revoked_client_is_told_and_disconnected_and_the_others_see_nothing() {
    for structured in [false, true] {
        let served = Served::ordinary();
        let mut revoked = Client::new(&served, structured);
        let mut other = Bystander::new(&served);
        assert_eq!(revoked.write(0, 0, &[1; 4096]), 0);
        other.call();
        served.mock.revoke_handle(0);
        assert_eq!(revoked.call(READ, 0, 0, 4096).error, ESHUTDOWN);
        assert_eq!(revoked.write(FUA, 0, &[2; 4096]), ESHUTDOWN);
        assert_eq!(revoked.call(FLUSH, 0, 0, 0).error, ESHUTDOWN);
        assert_ended_in_order(&mut revoked.stream);
        other.call_until("the revoked one is gone", || served.connections() == 1);
        assert_eq!(served.mock.0.medium.lock().expect("not poisoned")[0], 1, "what was refused was not written");
        // The binding serves: the client may come again.
        assert_eq!(Client::new(&served, structured).call(READ, 0, 0, 512).error, 0);
        other.call();
        served.finish();
    }
}

#[test]
fn what_the_device_has_is_answered_truly_or_with_shutdown() {
    for failed in [false, true] {
        let served = Served::ordinary();
        let mut revoked = Client::new(&served, true);
        let mut other = Client::new(&served, true);
        served.mock.set(|s| &s.slow, true);
        let read = revoked.send(READ, 0, 4096, 512);
        let write = revoked.send_write(0, 0, &[1; 4096]);
        eventually("both are with the device", || served.mock.in_flight() == 2);
        other.send(READ, 0, 8192, 4096);
        eventually("so is the other client's", || served.mock.in_flight() == 3);
        served.mock.revoke_handle(0);
        assert_eq!(revoked.call(FLUSH, 0, 0, 0).error, ESHUTDOWN, "new ones are turned away at once");
        if failed {
            served.mock.fail_revoked();
        } else {
            served.mock.release(2);
        }
        let error = if failed { ESHUTDOWN } else { 0 };
        for (cookie, bytes) in [(read, 512), (write, 0)] {
            let reply = revoked.reply(4096, bytes).expect("a reply");
            assert_eq!((reply.cookie, reply.error), (cookie, error));
        }
        assert_ended_in_order(&mut revoked.stream);
        eventually("only the other client is left", || served.connections() == 1);
        served.mock.release(1);
        assert_eq!(other.reply(8192, 4096).expect("the other client's answer").error, 0);
        served.finish();
    }
}

/// The device does not answer, so the client is not cut off from an answer that is its due; nor does that hold up
/// anybody else.
#[test]
fn a_slow_device_is_waited_for_and_the_client_is_told_meanwhile() {
    let served = Served::ordinary();
    let mut revoked = Client::new(&served, false);
    let mut other = Bystander::new(&served);
    served.mock.set(|s| &s.slow, true);
    let admitted = revoked.send_write(0, 0, &[7; 4096]);
    eventually("it is with the device", || served.mock.in_flight() == 1);
    served.mock.set(|s| &s.slow, false);
    served.mock.revoke_handle(0);
    let start = Instant::now();
    while start.elapsed() < LINGER * 3 {
        assert_eq!(revoked.call(READ, 0, 0, 512).error, ESHUTDOWN);
        other.call();
    }
    served.mock.release(1);
    let reply = revoked.reply(0, 0).expect("the answer");
    assert_eq!((reply.cookie, reply.error), (admitted, 0));
    // A client that sends its next request on an answer is told, not cut off.
    assert_eq!(revoked.call(FLUSH, 0, 0, 0).error, ESHUTDOWN);
    assert_ended_in_order(&mut revoked.stream);
    served.finish();
}

#[test]
fn a_client_that_says_goodbye_when_told_is_closed_at_once() {
    once_within(LINGER / 2, || {
        let served = Served::ordinary();
        let mut revoked = Client::new(&served, true);
        served.mock.revoke_handle(0);
        assert_eq!(revoked.call(READ, 0, 0, 512).error, ESHUTDOWN);
        let start = Instant::now();
        revoked.send(DISC, 0, 0, 0);
        assert_ended_in_order(&mut revoked.stream);
        let took = start.elapsed();
        served.finish();
        took
    });
}

/// A WRITE of which only a part ever comes: its lease is back at once, also while it is the arena's last.
#[test]
fn a_write_that_stalls_gives_its_lease_back_at_once() {
    once_within(LINGER / 2, || {
        let served = Served::new(Mock::new(geometry(4 << 20), 1, 128 << 10), NbdOptions::default());
        let mut stalled = Client::new(&served, true);
        let (_, mut bytes) = stalled.header(WRITE, 0, 0, 64 << 10);
        bytes.resize(1000, 1);
        stalled.stream.write_all(&bytes).expect("sent");
        eventually("it holds a lease", || served.mock.0.arena.leased_bytes() == 64 << 10);
        let mut other = Bystander::new(&served);
        other.call();
        let start = Instant::now();
        served.mock.revoke_handle(0);
        other.call_until("its lease is back", || served.mock.0.arena.leased_buffers() == 0);
        // Not only when it is severed.
        let took = start.elapsed();
        assert_ended_in_order(&mut stalled.stream);
        other.call_until("it is gone", || served.connections() == 1);
        served.finish();
        took
    });
}

/// The rest of the payload comes after the revocation: the answer says so, and the stream stays in step.
#[test]
fn a_write_whose_payload_ends_after_the_revocation_is_told() {
    for bytes_before in [0, 1, 40_000, (100 << 10) - 1] {
        let served = Served::ordinary();
        let mut client = Client::new(&served, false);
        let (cookie, mut bytes) = client.header(WRITE, 0, 0, 100 << 10);
        let header = bytes.len();
        bytes.resize(header + (100 << 10), 1);
        let before = served.mock.0.medium.lock().expect("not poisoned")[(64 << 10) + 1];
        client.stream.write_all(&bytes[..header + bytes_before]).expect("sent");
        if bytes_before > 1 {
            eventually("the first part has come", || {
                served.mock.0.arena.leased_buffers() > 0 || !served.mock.asked().is_empty()
            });
        }
        served.mock.revoke_handle(0);
        client.stream.write_all(&bytes[header + bytes_before..]).expect("sent");
        let reply = client.reply(0, 0).expect("a reply");
        assert_eq!((reply.cookie, reply.error), (cookie, ESHUTDOWN));
        assert_eq!(client.call(READ, 0, 0, 512).error, ESHUTDOWN, "in step");
        assert_eq!(served.mock.0.medium.lock().expect("not poisoned")[(64 << 10) + 1], before);
        served.finish();
    }
}

/// A client that stops in the middle of receiving a READ, and one that takes it drop by drop, which is progress: both
/// are severed after the linger, and what they held is back.
#[test]
fn a_read_that_is_not_taken_is_severed_after_the_linger() {
    for drops in [false, true] {
        once_within(LINGER + SLACK, || {
            let served = Served::ordinary();
            let mut deaf = Client::new(&served, true);
            for _ in 0..16 {
                deaf.send(READ, 0, 0, 256 << 10);
            }
            eventually("its answers fill the socket", || served.mock.0.arena.leased_bytes() > 1 << 20);
            let mut other = Bystander::new(&served);
            other.call();
            let start = Instant::now();
            served.mock.revoke_handle(0);
            while served.connections() == 2 {
                assert!(start.elapsed() < PATIENCE, "it is not severed");
                if drops {
                    // Smaller than what the socket holds, so that it never gets all.
                    deaf.stream.read_exact(&mut [0; 512]).expect("a drop");
                }
                other.call();
            }
            let took = start.elapsed();
            eventually("all is back", || served.mock.0.arena.leased_buffers() == 0);
            served.finish();
            took
        });
    }
}

/// Requests without end, their refusals read as fast as they come or not at all: the linger gets no longer.
#[test]
fn a_client_that_goes_on_asking_gets_no_more_time() {
    for reads in [true, false] {
        once_within(LINGER + SLACK, || {
            let served = Served::ordinary();
            let mut client = Client::new(&served, true);
            let mut other = Bystander::new(&served);
            let ended = Arc::new(AtomicBool::new(false));
            let flood: Vec<u8> = (0..256).flat_map(|_| client.header(FLUSH, 0, 0, 0).1).collect();
            let reader = reads.then(|| {
                let mut stream = client.stream.try_clone().expect("cloned");
                std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()))
            });
            let flag = Arc::clone(&ended);
            let writer = std::thread::spawn(move || {
                while client.stream.write_all(&flood).is_ok() {}
                flag.store(true, Ordering::SeqCst);
                drop(client);
            });
            other.call();
            let start = Instant::now();
            served.mock.revoke_handle(0);
            other.call_until("the flood is cut off", || ended.load(Ordering::SeqCst));
            let took = start.elapsed();
            writer.join().expect("it ended");
            if let Some(reader) = reader {
                let _ = reader.join().expect("it ended");
            }
            served.finish();
            took
        });
    }
}

/// Severed with answers unread and requests unsent: what was answered can be read to the cut, and then there is an end,
/// not a reset that would be the first thing to be seen.
#[test]
fn what_was_answered_can_be_read_after_the_end() {
    once_within(LINGER + SLACK, || {
        let served = Served::ordinary();
        let mut client = Client::new(&served, false);
        client.stream.set_nonblocking(true).expect("a flag");
        let flood: Vec<u8> = (0..256).flat_map(|_| client.header(FLUSH, 0, 0, 0).1).collect();
        // Sent until neither side takes more: unread requests are in the server's socket, unread answers in the client's.
        let full = |stream: &mut UnixStream| matches!(stream.write(&flood), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        eventually("the stream is full", || full(&mut client.stream));
        let start = Instant::now();
        served.mock.revoke_handle(0);
        eventually("it is severed", || served.connections() == 0);
        let took = start.elapsed();
        client.stream.set_nonblocking(false).expect("a flag");
        let mut answers = Vec::new();
        client.stream.read_to_end(&mut answers).expect("an end, not a reset");
        assert!(answers.len() > 10_000);
        served.finish();
        took
    });
}

/// A client that waits for leases when its right ends is told, and is not in the way of those behind it.
#[test]
fn a_client_that_waits_for_leases_is_told_and_does_not_keep_its_place() {
    let served = Served::new(Mock::new(geometry(4 << 20), 1, 64 << 10), NbdOptions::default());
    let mut holder = Client::new(&served, true);
    let mut first = Client::new(&served, true);
    let mut second = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    holder.send(READ, 0, 0, 64 << 10);
    eventually("the whole arena is lent", || served.mock.in_flight() == 1);
    first.send_write(0, 0, &[1; 4096]);
    let waiting = first.send(READ, 0, 0, 4096);
    second.send(READ, 0, 4096, 4096);
    served.mock.revoke_handle(1);
    assert_eq!(first.reply(0, 0).expect("the write's answer").error, ESHUTDOWN);
    let reply = first.reply(0, 4096).expect("the read's answer");
    assert_eq!((reply.cookie, reply.error), (waiting, ESHUTDOWN));
    served.mock.set(|s| &s.slow, false);
    served.mock.release(1);
    assert_eq!(holder.reply(0, 64 << 10).expect("an answer").error, 0);
    assert_eq!(second.reply(4096, 4096).expect("an answer").error, 0);
    served.finish();
}

/// A read in segments, revoked between two of them: the structured reply ends with the error, the simple one, whose
/// head has promised success, by the connection's end.
#[test]
fn a_long_read_that_is_revoked_half_way_never_pretends() {
    for structured in [true, false] {
        let served = Served::new(Mock::new(geometry(4 << 20), 1, 128 << 10), NbdOptions::default());
        let mut client = Client::new(&served, structured);
        served.mock.set(|s| &s.slow, true);
        let cookie = client.send(READ, 0, 0, 1 << 20);
        eventually("its first segment is with the device", || served.mock.in_flight() > 0);
        served.mock.revoke_handle(0);
        // Also what was on its way to the device when it was revoked.
        eventually("what the device has is answered", || {
            served.mock.release(usize::MAX);
            served.mock.in_flight() == 0
        });
        if structured {
            let reply = client.reply(0, 1 << 20).expect("a reply");
            assert_eq!((reply.cookie, reply.error), (cookie, ESHUTDOWN));
        } else {
            let mut stream = Vec::new();
            let _ = client.stream.read_to_end(&mut stream);
            assert!(stream.len() < 1 << 20, "{} bytes", stream.len());
        }
        client.assert_closed();
        served.finish();
    }
}
