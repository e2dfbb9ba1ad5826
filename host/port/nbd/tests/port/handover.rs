//! Clients whose port is exchanged under them, wherever they are in what they say.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_port_nbd::service::Port;
use cofferdam_port_nbd::{NbdOptions, NbdPort};

use crate::client::*;
use crate::mock::{Mock, PATIENCE, Served, eventually, geometry};

/// Sends `bytes`, and has the port exchanged before each of `cuts`.
fn send_cut(served: &mut Served, stream: &mut UnixStream, bytes: &[u8], cuts: impl IntoIterator<Item = usize>) {
    let mut sent = 0;
    for cut in cuts {
        stream.write_all(&bytes[sent..cut]).expect("sent");
        sent = cut;
        served.exchange();
    }
    stream.write_all(&bytes[sent..]).expect("sent");
}

#[test]
fn a_client_may_be_anywhere_in_a_request() {
    for structured in [false, true] {
        let mut served = Served::ordinary();
        let mut client = Client::new(&served, structured);
        let data: Vec<u8> = (0..150_000_u32).map(|at| (at / 3) as u8).collect();
        let data = &data[..143_360];
        let (_, mut bytes) = client.header(WRITE, FUA, 512, data.len() as u32);
        bytes.extend_from_slice(data);
        // In the head, at both ends of the payload, and at both sides of the ends of its pieces of 64 KiB.
        let cuts = [0, 1, 27, 28, 29, 540, 28 + 65_535, 28 + 65_536, 28 + 65_537, 28 + 131_072, bytes.len() - 1];
        let mut stream = client.stream.try_clone().expect("another descriptor");
        send_cut(&mut served, &mut stream, &bytes, cuts);
        assert_eq!(client.reply(0, 0).expect("an answer").error, 0);
        let reply = client.call(READ, 0, 512, data.len() as u32);
        assert!(reply.error == 0 && reply.data == data, "what was written");
        served.finish();
    }
}

#[test]
fn a_client_may_be_anywhere_in_its_handshake() {
    let mut hello = 3u32.to_be_bytes().to_vec();
    for (number, data) in [(8_u32, &[][..]), (99, &[1; 9000]), (7, &[0; 6])] {
        hello.extend_from_slice(b"IHAVEOPT");
        hello.extend_from_slice(&number.to_be_bytes());
        hello.extend_from_slice(&(data.len() as u32).to_be_bytes());
        hello.extend_from_slice(data);
    }
    let mut served = Served::ordinary();
    let mut stream = Client::raw(&served);
    let long = 4 + 16 + 16..4 + 16 + 16 + 9000;
    let cuts = (0..hello.len()).filter(|cut| !long.contains(cut) || cut % 1500 == 0);
    send_cut(&mut served, &mut stream, &hello, cuts);
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    let mut kinds = Vec::new();
    while kinds.last() != Some(&(7, 1)) {
        let mut head = [0; 20];
        stream.read_exact(&mut head).expect("a reply to an option");
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("four bytes"));
        stream.read_exact(&mut vec![0; number(16) as usize]).expect("its data");
        kinds.push((number(8), number(12)));
    }
    assert_eq!(kinds[..2], [(8, 1), (99, 0x8000_0009)], "{kinds:?}");
    served.exchange();
    drop(stream);
    served.finish();
}

#[test]
fn answers_that_a_client_has_not_read_reach_it_whole_and_in_order() {
    for structured in [false, true] {
        let mut served = Served::new(Mock::new(geometry(32 << 20), 1, 64 << 20), NbdOptions::default());
        let mut client = Client::new(&served, structured);
        let reads = 80_u64;
        for number in 0..reads {
            client.send(READ, 0, number * 65_536, 65_536);
        }
        // A long one behind them, which is served in segments.
        client.send(READ, 0, 512, 20 << 20);
        for _ in 0..3 {
            served.exchange();
        }
        for number in 0..reads {
            let reply = client.reply(number * 65_536, 65_536).expect("an answer");
            assert_eq!((reply.cookie, reply.error), (number + 1, 0));
            served.mock.assert_medium(number * 65_536, &reply.data);
            if number % 20 == 0 {
                served.exchange();
            }
        }
        let mut stream = client.stream.try_clone().expect("another descriptor");
        let whole = std::thread::spawn(move || client.reply(512, 20 << 20).map(|reply| (client, reply)));
        for _ in 0..5 {
            served.exchange();
        }
        let (_client, reply) = whole.join().expect("no panic").expect("an answer");
        assert_eq!(reply.error, 0);
        served.mock.assert_medium(512, &reply.data);
        let _ = stream.flush();
        served.finish();
    }
}

#[test]
fn what_is_with_the_device_is_waited_for_and_nothing_is_lost_if_that_takes_too_long() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    client.send(READ, 0, 0, 4096);
    eventually("it is with the device", || served.mock.in_flight() == 1);
    client.send(READ, 0, 4096, 512);
    let started = Instant::now();
    let late = served.port().export(started + Duration::from_secs(1)).expect_err("it is not still");
    assert!(late.to_string().contains("under way"), "{late}");
    served.port().resume();
    eventually("the second, too", || served.mock.in_flight() == 2);
    served.mock.set(|s| &s.slow, false);
    served.mock.release(2);
    assert_eq!(client.reply(0, 4096).expect("an answer").error, 0);
    assert_eq!(client.reply(4096, 512).expect("an answer").error, 0);
    served.exchange();
    assert_eq!(client.call(FLUSH, 0, 0, 0).error, 0);
    served.finish();
}

#[test]
fn a_port_that_was_exported_goes_on_whether_or_not_another_had_adopted_it() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, false);
    for adopts in [false, true, true] {
        client.send(READ, 0, 0, 512);
        let exported = served.port().export(Instant::now() + PATIENCE).expect("exported");
        if adopts {
            let handles = served.mock.0.handles.load(Ordering::SeqCst);
            let other = NbdPort::adopt(served.mock.clone(), exported, NbdOptions::default()).expect("adopted");
            drop(other);
            eventually("its handles are closed", || served.mock.0.handles.load(Ordering::SeqCst) == handles);
        }
        // Whoever comes meanwhile waits.
        let mut newcomer = Client::raw(&served);
        served.port().resume();
        assert_eq!(client.reply(0, 512).expect("an answer").error, 0);
        newcomer.read_exact(&mut [0; 18]).expect("a greeting");
        assert_eq!(client.write(0, 0, &[7; 512]), 0);
    }
    drop(client);
    served.finish();
}

#[test]
fn new_clients_find_the_socket_at_its_place_and_it_goes_with_the_last_port() {
    let mut served = Served::ordinary();
    for _ in 0..3 {
        served.exchange();
        let mut client = Client::new(&served, true);
        assert_eq!(client.call(READ, 0, 0, 512).error, 0);
    }
    assert!(served.path.exists());
    served.shutdown(Duration::from_millis(100));
    assert!(!served.path.exists());
}

#[test]
fn what_was_received_is_checked() {
    let mut served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let (_, mut bytes) = client.header(WRITE, 0, 0, 4096);
    bytes.extend_from_slice(&[1; 1000]);
    client.stream.write_all(&bytes).expect("sent");
    let changes = [
        ("{", "["),
        ("nbd:/", "nbd:/else"),
        ("\"lane\":0", "\"lane\":9"),
        ("\"ahead_bytes\":", "\"ahead_bytes\":9"),
        ("\"left_bytes\":4096", "\"left_bytes\":4097"),
        ("\"left_bytes\":4096", "\"left_bytes\":0"),
        ("\"end\":4096", "\"end\":9223372036854775807"),
        ("\"offset\":0", "\"offset\":7"),
        ("\"error\":null", "\"error\":77"),
    ];
    for (from, to) in changes {
        // Until it has read the head, the state has no payload in it.
        let exported = loop {
            let exported = served.port().export(Instant::now() + PATIENCE).expect("exported");
            if exported.state.contains("Payload") {
                break exported;
            }
            served.port().resume();
        };
        let mut changed = exported;
        assert!(changed.state.contains(from), "{from} in {}", changed.state);
        changed.state = changed.state.replacen(from, to, 1);
        let adopted = NbdPort::adopt(served.mock.clone(), changed, NbdOptions::default());
        assert!(adopted.is_err(), "{to}");
        served.port().resume();
    }
    client.stream.write_all(&[1; 3096]).expect("sent");
    assert_eq!(client.reply(0, 0).expect("an answer").error, 0);
    served.finish();
}
