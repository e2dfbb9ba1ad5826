//! Revocation and shutdown, in the middle of everything.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use cofferdam_port_nbd::NbdOptions;
use cofferdam_port_nbd::service::PortReport;

use crate::client::*;
use crate::mock::{Mock, PATIENCE, Served, eventually, geometry, once_within};

const GRACE: Duration = Duration::from_millis(100);

#[test]
fn shutdown_with_nobody_there_waits_for_nothing() {
    once_within(Duration::from_millis(1), || {
        let mut served = Served::new(Mock::new(geometry(1 << 20), 2, 1 << 20), NbdOptions::default());
        let start = Instant::now();
        assert_eq!(served.shutdown(GRACE), PortReport { connections: 0, severed: 0 });
        start.elapsed()
    });
}

#[test]
fn after_revocation_what_is_admitted_is_answered_and_what_is_new_is_not() {
    for structured in [false, true] {
        let served = Served::ordinary();
        let mut client = Client::new(&served, structured);
        served.mock.set(|s| &s.slow, true);
        let admitted = client.send(READ, 0, 0, 4096);
        eventually("it is with the device", || served.mock.in_flight() == 1);
        served.mock.revoke();
        for reply in [client.call(READ, 0, 0, 512), client.call(FLUSH, 0, 0, 0)] {
            assert_eq!(reply.error, ESHUTDOWN);
        }
        assert_eq!(client.write(0, 0, &vec![1; 100 << 10]), ESHUTDOWN, "its payload is read all the same");
        served.mock.release(1);
        let reply = client.reply(0, 4096).expect("a reply");
        assert_eq!((reply.cookie, reply.error), (admitted, 0));
        let start = Instant::now();
        client.assert_closed();
        assert!(start.elapsed() < Duration::from_secs(1), "then the connection ends");
        served.finish();
    }
}

#[test]
fn what_the_ladder_fails_is_answered_with_shutdown() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    client.send_write(FUA, 0, &[1; 4096]);
    eventually("it is with the device", || served.mock.in_flight() == 1);
    served.mock.revoke();
    served.mock.fail_late();
    assert_eq!(client.reply(0, 0).expect("a reply").error, ESHUTDOWN);
    client.assert_closed();
    served.finish();
}

#[test]
fn a_fua_write_whose_flush_is_refused_is_not_called_durable() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    client.send_write(FUA, 0, &[1; 4096]);
    eventually("it is with the device", || served.mock.in_flight() == 1);
    served.mock.revoke();
    served.mock.release(1);
    assert_eq!(client.reply(0, 0).expect("a reply").error, ESHUTDOWN);
    served.finish();
}

#[test]
fn requests_that_wait_for_a_hold_are_answered_at_revocation() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, false);
    served.mock.set(|s| &s.held, true);
    client.send_write(0, 0, &[1; 4096]);
    eventually("the payload has come", || served.mock.0.arena.leased_buffers() == 1);
    served.mock.revoke();
    assert_eq!(client.reply(0, 0).expect("a reply").error, ESHUTDOWN);
    eventually("its lease is back", || served.mock.0.arena.leased_buffers() == 0);
    served.finish();
}

/// The one client is in the middle of sending, the other never reads: their leases come back within the linger.
#[test]
fn revocation_takes_leases_back_from_stalled_clients() {
    let served = Served::ordinary();
    let mut sending = Client::new(&served, true);
    let (_, mut bytes) = sending.header(WRITE, 0, 0, 64 << 10);
    bytes.resize(1000, 1);
    sending.stream.write_all(&bytes).expect("sent");
    let mut deaf = Client::new(&served, true);
    for _ in 0..32 {
        deaf.send(READ, 0, 0, 256 << 10);
    }
    eventually("both hold leases", || served.mock.0.arena.leased_bytes() > 2 << 20);
    let start = Instant::now();
    served.mock.revoke();
    eventually("all is given back", || served.mock.0.arena.leased_buffers() == 0);
    assert!(start.elapsed() < Duration::from_millis(600), "{:?}", start.elapsed());
    sending.assert_closed();
    eventually("both are gone", || served.connections() == 0);
    served.finish();
}

#[test]
fn a_new_client_of_a_revoked_binding_is_told() {
    let served = Served::ordinary();
    served.mock.revoke();
    let mut stream = Client::raw(&served);
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend(option(7, &[0, 0, 0, 0, 0, 0]));
    stream.write_all(&hello).expect("sent");
    let mut answer = [0; 38];
    std::io::Read::read_exact(&mut stream, &mut answer).expect("an answer");
    assert_eq!(answer[30..34], (0x8000_0007u32).to_be_bytes(), "NBD_REP_ERR_SHUTDOWN");
    served.finish();
}

#[test]
fn shutdown_waits_for_answers_and_reports() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    client.send(READ, 0, 0, 4096);
    eventually("it is with the device", || served.mock.in_flight() == 1);
    let mock = served.mock.clone();
    let releaser = std::thread::spawn(move || {
        // The port is told to go while this is under way; whichever comes first, the answer must arrive.
        mock.release(1);
    });
    let report = served.shutdown(Duration::from_secs(5));
    releaser.join().expect("released");
    assert_eq!(report, PortReport { connections: 1, severed: 0 });
    assert_eq!(client.reply(0, 4096).expect("the answer").error, 0);
    client.assert_closed();
    assert!(!served.path.exists());
    served.mock.assert_all_returned();
}

#[test]
fn shutdown_is_bounded_whatever_clients_and_device_do() {
    let mut served = Served::new(Mock::new(geometry(4 << 20), 2, 4 << 20), NbdOptions::default());
    let mut sending = Client::new(&served, true);
    let (_, mut bytes) = sending.header(WRITE, 0, 0, 64 << 10);
    bytes.resize(1000, 1);
    sending.stream.write_all(&bytes).expect("sent");
    let mut deaf = Client::new(&served, false);
    for _ in 0..32 {
        deaf.send(READ, 0, 0, 256 << 10);
    }
    let _handshaking = Client::raw(&served);
    eventually("leases are held", || served.mock.0.arena.leased_bytes() > 1 << 20);
    served.mock.set(|s| &s.slow, true);
    let mut waiting = Client::new(&served, true);
    waiting.send(FLUSH, 0, 0, 0);
    eventually("the device has it for ever", || served.mock.in_flight() >= 1);
    let start = Instant::now();
    let report = served.shutdown(GRACE);
    assert!(start.elapsed() < GRACE * 5, "{:?}", start.elapsed());
    assert_eq!(report.connections, 4);
    assert!(report.severed >= 2, "{report:?}");
    assert_eq!(served.mock.0.handles.load(Ordering::SeqCst), 0, "when shutdown returns, every handle is closed");
    served.mock.assert_all_returned();
    waiting.assert_closed();
}

/// Shuts down on a thread of its own and returns when that is well under way: either it waits, or it does not and is
/// over.
fn closing(mut served: Served) -> std::thread::JoinHandle<(Served, PortReport)> {
    let path = served.path.clone();
    let closing = std::thread::spawn(move || {
        let report = served.shutdown(Duration::from_secs(5));
        (served, report)
    });
    eventually("it takes nobody new", || !path.exists());
    let start = Instant::now();
    eventually("it waits or is over", || closing.is_finished() || start.elapsed() > GRACE / 5);
    closing
}

/// More than one turn takes, and all in the socket before the shutdown: the worker is kept busy until then.
#[test]
fn what_was_sent_before_a_shutdown_is_answered() {
    const REQUESTS: usize = 4000;
    let served = Served::ordinary();
    let mut client = Client::new(&served, false);
    let (go, gone) = channel::<()>();
    let (entered, is_in) = channel();
    let mut first = Some(gone);
    served.mock.in_submit(move || {
        if let Some(gone) = first.take() {
            entered.send(()).expect("the test waits");
            gone.recv_timeout(PATIENCE).expect("the test goes on");
        }
    });
    let requests: Vec<u8> = (0..REQUESTS).flat_map(|_| client.header(FLUSH, 0, 0, 0).1).collect();
    client.stream.write_all(&requests).expect("sent");
    is_in.recv().expect("it is in");
    let closing = closing(served);
    go.send(()).expect("it is still in");
    let mut answers = Vec::new();
    client.stream.read_to_end(&mut answers).expect("an end");
    assert_eq!(answers.len(), REQUESTS * 16, "of 16 bytes each");
    let (_served, report) = closing.join().expect("it ended");
    assert_eq!(report, PortReport { connections: 1, severed: 0 });
}

#[test]
fn a_shutdown_lets_a_refused_write_come_to_its_end() {
    // The client has 100 ms from the refusal on; on a busy machine one round may miss them.
    let told = (0..10).any(|_| {
        let served = Served::ordinary();
        let mut client = Client::new(&served, false);
        served.mock.revoke();
        let (_, mut bytes) = client.header(READ, 0, 0, 512);
        let (cookie, write) = client.header(WRITE, 0, 0, 64 << 10);
        bytes.extend(write);
        bytes.resize(bytes.len() + 1000, 1);
        client.stream.write_all(&bytes).expect("sent");
        assert_eq!(client.reply(0, 512).expect("a reply").error, ESHUTDOWN, "and so the write was begun too");
        let closing = closing(served);
        let rest = client.stream.write_all(&vec![1; (64 << 10) - 1000]);
        let reply = rest.and_then(|()| client.reply(0, 0));
        closing.join().expect("it ended");
        reply.is_ok_and(|reply| (reply.cookie, reply.error) == (cookie, ESHUTDOWN))
    });
    assert!(told);
}

#[test]
fn an_idle_port_goes_at_once() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let start = Instant::now();
    assert_eq!(served.shutdown(Duration::from_secs(30)), PortReport { connections: 1, severed: 0 });
    assert!(start.elapsed() < Duration::from_secs(5));
    client.assert_closed();
}

#[test]
fn a_port_that_is_dropped_is_shut_down() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let (mock, path) = (served.mock.clone(), served.path.clone());
    drop(served);
    client.assert_closed();
    assert!(!path.exists());
    mock.assert_all_returned();
}

/// Traffic on several connections and lanes, revoked in the middle: every request is answered with data, success or
/// shutdown, or the connection ends.
#[test]
fn revocation_in_the_middle_of_traffic() {
    for round in 0..10u32 {
        let served = Served::new(Mock::new(geometry(4 << 20), 2, 1 << 20), NbdOptions::default());
        let threads: Vec<_> = (0..4u64)
            .map(|which| {
                let mut client = Client::new(&served, which % 2 == 0);
                std::thread::spawn(move || {
                    let mut served = 0;
                    loop {
                        let offset = which << 20;
                        let (kind, data) =
                            if served % 2 == 0 { (WRITE, vec![which as u8 + 1; 8192]) } else { (READ, Vec::new()) };
                        let (cookie, mut bytes) = client.header(kind, 0, offset, 8192);
                        bytes.extend_from_slice(&data);
                        if client.stream.write_all(&bytes).is_err() {
                            return served;
                        }
                        let Ok(reply) = client.reply(offset, if kind == READ { 8192 } else { 0 }) else {
                            return served;
                        };
                        assert_eq!(reply.cookie, cookie);
                        match reply.error {
                            0 if kind == READ => assert!(reply.data == vec![which as u8 + 1; 8192]),
                            0 => {}
                            error => assert_eq!(error, ESHUTDOWN),
                        }
                        served += 1;
                    }
                })
            })
            .collect();
        let goal = 10 + 7 * round as usize;
        eventually("traffic flows", || served.mock.asked().len() > goal);
        served.mock.revoke();
        for thread in threads {
            assert!(thread.join().expect("no client saw wrong data") > 0);
        }
        served.finish();
    }
}
