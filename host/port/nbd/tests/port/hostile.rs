//! Clients that break rules, stop in the middle, or never read.

use std::io::Write;
use std::time::Duration;

use cofferdam_port_nbd::NbdOptions;
use cofferdam_port_nbd::service::IoOp;
use proptest::prelude::*;

use crate::client::*;
use crate::mock::{Mock, Served, eventually, geometry};

/// Another client is served as ever.
fn assert_healthy(served: &Served) {
    let mut client = Client::new(served, true);
    assert_eq!(client.call(READ, 0, 0, 4096).error, 0);
}

#[test]
fn garbage_ends_the_connection_and_nothing_else() {
    let served = Served::ordinary();
    let mut stream = Client::raw(&served);
    stream.write_all(b"\0\0\0\x03GET / HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
    assert_closed(&mut stream);
    let mut client = Client::new(&served, true);
    client.stream.write_all(&[0xa5; 28]).expect("sent");
    client.assert_closed();
    assert_healthy(&served);
    served.finish();
}

#[test]
fn refused_requests_leave_the_stream_in_step() {
    for structured in [false, true] {
        let served = Served::ordinary();
        let mut client = Client::new(&served, structured);
        let end = 4 << 20;
        assert_eq!(client.write(0, end, &[1; 1024]), 28, "beyond the end: no space");
        assert_eq!(client.write(0, 100, &[1; 512]), EINVAL, "not a block");
        assert_eq!(client.write(1 << 9, 0, &[1; 512]), EINVAL, "unknown flag");
        assert_eq!(client.call(READ, 0, end, 512).error, EINVAL);
        assert_eq!(client.call(TRIM, 0, end, 512).error, EINVAL);
        assert_eq!(client.call(99, 0, 0, 512).error, EINVAL);
        let too_long = if structured { EOVERFLOW } else { EINVAL };
        let served = Served::new(Mock::new(geometry(64 << 20), 1, 1 << 20), NbdOptions::default());
        let mut large = Client::new(&served, structured);
        assert_eq!(large.call(READ, 0, 0, 33 << 20).error, too_long);
        assert_eq!(large.write(0, 0, &vec![1; 33 << 20]), EINVAL, "an oversized write is read to its end");
        assert_eq!(large.call(READ, 0, 0, 512).error, 0);
        assert!(served.mock.asked().iter().all(|asked| asked.op == IoOp::Read));
        large.send(WRITE, 0, 0, u32::MAX);
        large.assert_closed();
        assert_eq!(client.call(READ, 0, 0, 512).error, 0);
    }
}

#[test]
fn a_read_only_export_refuses_writes() {
    let mut geometry = geometry(1 << 20);
    geometry.read_only = true;
    let served = Served::new(Mock::new(geometry, 1, 1 << 20), NbdOptions::default());
    let mut client = Client::new(&served, false);
    assert_eq!(client.write(0, 0, &[1; 512]), 1);
    assert_eq!(client.call(TRIM, 0, 0, 512).error, 1);
    assert_eq!(client.call(READ, 0, 0, 512).error, 0);
    served.finish();
}

#[test]
fn a_client_that_dies_in_mid_request_leaves_nothing() {
    for cut in [1, 27, 28, 29, 28 + 4096, 28 + 70_000] {
        let served = Served::ordinary();
        let mut client = Client::new(&served, true);
        let (_, mut bytes) = client.header(WRITE, 0, 0, 100 << 10);
        bytes.resize(28 + (100 << 10), 0xee);
        client.stream.write_all(&bytes[..cut]).expect("sent");
        drop(client);
        eventually("the connection is gone", || served.connections() == 0);
        served.mock.assert_all_returned();
        assert_healthy(&served);
        served.finish();
    }
}

#[test]
fn a_client_that_dies_with_requests_under_way_leaves_nothing() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    for at in 0..40 {
        client.send(READ, 0, at * 4096, 4096);
    }
    eventually("all are with the device", || served.mock.in_flight() == 40);
    drop(client);
    eventually("the connection is gone", || served.connections() == 0);
    // Nobody else is connected: the port itself has to take the answers, or the leases would never end.
    served.mock.release(40);
    served.mock.assert_all_returned();
    served.finish();
}

#[test]
fn what_was_asked_before_a_goodbye_is_done_though_nobody_waits_for_it() {
    let served = Served::ordinary();
    served.mock.set(|s| &s.slow, true);
    let mut client = Client::new(&served, true);
    client.send_write(FUA, 0, &[0x42; 4096]);
    client.send(DISC, 0, 0, 0);
    drop(client);
    for op in [IoOp::Write, IoOp::Flush] {
        eventually("it is with the device", || served.mock.asked().last().is_some_and(|asked| asked.op == op));
        served.mock.release(1);
    }
    eventually("then the connection goes", || served.connections() == 0);
    served.finish();
}

#[test]
fn a_client_that_never_reads_stops_being_read_and_keeps_only_its_share() {
    let options =
        NbdOptions { max_bytes_per_connection: 1 << 20, max_requests_per_connection: 32, ..NbdOptions::default() };
    let served = Served::new(Mock::ordinary(), options);
    let mut client = Client::new(&served, true);
    client.stream.set_write_timeout(Some(Duration::from_millis(300))).expect("a time-out");
    let mut sent = 0u64;
    loop {
        let (_, bytes) = client.header(READ, 0, 0, 64 << 10);
        if sent == 100_000 || client.stream.write_all(&bytes).is_err() {
            break;
        }
        sent += 1;
    }
    assert!(sent < 100_000, "the socket filled up");
    assert!(served.mock.0.arena.leased_bytes() <= 1 << 20);
    assert!(served.mock.asked().len() < 100);
    assert_healthy(&served);
    // Errors, which need no lease, are bounded as well: what is read from the socket is a bounded number of requests.
    let mut client = Client::new(&served, false);
    client.stream.set_write_timeout(Some(Duration::from_millis(300))).expect("a time-out");
    let block: Vec<u8> = (0..512).flat_map(|_| client.header(99, 0, 0, 0).1).collect();
    let blocks = (0..200_000).take_while(|_| client.stream.write_all(&block).is_ok()).count();
    assert!(blocks < 200_000);
    drop(client);
    assert_healthy(&served);
    served.finish();
}

#[test]
fn stalled_clients_that_hold_the_arena_are_cut_off_when_another_starves() {
    let options = NbdOptions { stall: Duration::from_millis(200), ..NbdOptions::default() };
    // Two lanes: who starves and who stalls are on different workers.
    for lanes in [1, 2] {
        let served = Served::new(Mock::new(geometry(4 << 20), lanes, 256 << 10), options.clone());
        let stalled: Vec<Client> = (0..12)
            .map(|_| {
                let mut client = Client::new(&served, true);
                let (_, mut bytes) = client.header(WRITE, 0, 0, 64 << 10);
                bytes.resize(28 + 100, 1);
                client.stream.write_all(&bytes).expect("sent");
                client
            })
            .collect();
        eventually("half-sent writes hold the arena", || served.mock.0.arena.leased_bytes() > 128 << 10);
        let mut client = Client::new(&served, true);
        assert_eq!(client.write(0, 0, &vec![7; 256 << 10]), 0);
        assert_eq!(client.call(READ, 0, 0, 256 << 10).data, vec![7; 256 << 10]);
        drop(stalled);
        served.finish();
    }
}

#[test]
fn a_client_that_sent_only_a_header_holds_no_lease() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    assert_eq!(client.call(READ, 0, 0, 512).error, 0);
    client.send(WRITE, 0, 0, 64 << 10);
    assert_healthy(&served);
    eventually("nobody holds a lease", || served.mock.0.arena.leased_buffers() == 0);
    served.finish();
}

#[test]
fn a_handshake_that_takes_too_long_is_cut_off() {
    let options = NbdOptions { handshake_timeout: Duration::from_millis(50), ..NbdOptions::default() };
    let served = Served::new(Mock::ordinary(), options);
    let mut stream = Client::raw(&served);
    stream.write_all(&3u32.to_be_bytes()).expect("sent");
    assert_closed(&mut stream);
    served.finish();
}

#[test]
fn one_connection_too_many_is_closed_at_once() {
    let options = NbdOptions { max_connections: 2, ..NbdOptions::default() };
    let served = Served::new(Mock::ordinary(), options);
    let clients = [Client::new(&served, true), Client::new(&served, false)];
    assert_closed(&mut Client::raw(&served));
    drop(clients);
    eventually("both are gone", || served.connections() == 0);
    assert_healthy(&served);
    served.finish();
}

/// Bytes that look like requests often enough to get somewhere.
fn requests() -> impl Strategy<Value = Vec<u8>> {
    let one = prop_oneof![
        6 => (0u16..9, 0u16..8, 0u64..12_000, 0u32..400, any::<bool>()).prop_map(|(kind, flags, block, blocks, odd)| {
            let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
            bytes.extend_from_slice(&flags.to_be_bytes());
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&block.to_be_bytes());
            bytes.extend_from_slice(&(block * 512).to_be_bytes());
            let length = blocks * 512 + u32::from(odd);
            bytes.extend_from_slice(&length.to_be_bytes());
            if kind == WRITE {
                bytes.resize(28 + length as usize, flags as u8);
            }
            bytes
        }),
        1 => proptest::collection::vec(any::<u8>(), 0..100),
    ];
    proptest::collection::vec(one, 0..30).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes at any stage, cut off anywhere: the server lives, and holds nothing afterwards.
    #[test]
    fn no_bytes_do_harm(handshake in any::<bool>(), structured in any::<bool>(), bytes in requests(), cut in 0.0f64..1.0, arena_pages in 17u64..64) {
        let served = Served::new(Mock::new(geometry(4 << 20), 1, arena_pages * 4096), NbdOptions::default());
        let mut stream = if handshake { Client::raw(&served) } else { Client::new(&served, structured).stream };
        // Answers are read on another thread, as a client must that sends without waiting.
        let mut reader = stream.try_clone().expect("cloned");
        let reading = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
        let _ = stream.write_all(&bytes[..(bytes.len() as f64 * cut) as usize]);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = reading.join();
        eventually("the connection is gone", || served.connections() == 0);
        served.mock.assert_all_returned();
        assert_healthy(&served);
        served.finish();
    }
}
