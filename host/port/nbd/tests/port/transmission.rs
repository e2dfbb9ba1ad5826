//! Ordinary traffic.

use std::io::Write;
use std::sync::atomic::Ordering;

use cofferdam_port_nbd::NbdOptions;
use cofferdam_port_nbd::service::{IoError, IoOp};
use proptest::prelude::*;

use crate::client::*;
use crate::mock::{Asked, Mock, Served, eventually, geometry};

#[test]
fn every_command_does_what_it_says() {
    for structured in [false, true] {
        let served = Served::ordinary();
        let mut client = Client::new(&served, structured);
        let before = served.mock.0.medium.lock().expect("not poisoned").clone();
        let read = client.call(READ, 0, 4096, 8192);
        assert_eq!((read.error, &read.data[..]), (0, &before[4096..12288]));
        let data: Vec<u8> = (0..3000u32 * 512).map(|at| (at / 3) as u8).collect();
        assert_eq!(client.write(0, 512, &data), 0);
        let read = client.call(READ, 0, 512, data.len() as u32);
        assert!(read.error == 0 && read.data == data, "1.5 MiB come back as they went");
        assert_eq!(client.call(WRITE_ZEROES, NO_HOLE, 0, 1 << 20).error, 0);
        assert_eq!(client.call(TRIM, 0, 1 << 20, 1 << 20).error, 0);
        assert_eq!(client.call(FLUSH, 0, 0, 0).error, 0);
        assert_eq!(client.call(READ, 0, 0, 0).error, 0);
        assert_eq!(client.call(WRITE_ZEROES, 0, 512, 0).error, 0);
        let medium = served.mock.0.medium.lock().expect("not poisoned").clone();
        assert!(medium[..1 << 20].iter().all(|&b| b == 0) && medium[1 << 20..2 << 20].iter().all(|&b| b == 0xdd));
        client.send(DISC, 0, 0, 0);
        client.assert_closed();
        served.finish();
    }
}

#[test]
fn long_requests_are_split_at_the_devices_limits_and_answered_once() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let read = client.call(READ, DF, 1024, 200 << 10);
    assert_eq!((read.error, read.chunks), (0, 1), "one head for four pieces");
    assert_eq!(client.write(0, 1024, &vec![1; 100 << 10]), 0);
    assert_eq!(client.call(TRIM, 0, 512, 130 << 10).error, 0);
    assert_eq!(client.call(WRITE_ZEROES, 0, 0, 100 << 10).error, 0);
    let asked = |op, offset, length| Asked { op, offset, length, may_unmap: op == IoOp::WriteZeroes };
    let k = 1024;
    assert_eq!(
        served.mock.asked(),
        [
            asked(IoOp::Read, k, 64 << 10),
            asked(IoOp::Read, 65 * k, 64 << 10),
            asked(IoOp::Read, 129 * k, 64 << 10),
            asked(IoOp::Read, 193 * k, 8 << 10),
            asked(IoOp::Write, k, 64 << 10),
            asked(IoOp::Write, 65 * k, 36 << 10),
            // Pieces end on multiples of the discard alignment.
            asked(IoOp::Discard, 512, (64 << 10) - 512),
            asked(IoOp::Discard, 64 * k, 64 << 10),
            asked(IoOp::Discard, 128 * k, (2 << 10) + 512),
            asked(IoOp::WriteZeroes, 0, 64 << 10),
            asked(IoOp::WriteZeroes, 64 * k, 36 << 10),
        ]
    );
    served.finish();
}

#[test]
fn no_hole_is_passed_on() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, false);
    client.call(WRITE_ZEROES, NO_HOLE, 0, 512);
    client.call(WRITE_ZEROES, 0, 0, 512);
    let flags: Vec<bool> = served.mock.asked().iter().map(|asked| asked.may_unmap).collect();
    assert_eq!(flags, [false, true]);
    served.finish();
}

#[test]
fn a_fua_write_is_answered_after_a_flush_that_followed_it() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.slow, true);
    client.send_write(FUA, 0, &vec![7; 100 << 10]);
    eventually("both writes are with the device", || served.mock.in_flight() == 2);
    served.mock.release(1);
    assert_eq!(served.mock.asked().len(), 2, "no flush while a write is under way");
    served.mock.release(1);
    eventually("the flush follows", || served.mock.in_flight() == 1);
    assert_eq!(served.mock.asked()[2].op, IoOp::Flush);
    client.stream.set_nonblocking(true).expect("non-blocking");
    let error = client.reply(0, 0).expect_err("not durable, so not answered");
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    client.stream.set_nonblocking(false).expect("blocking");
    served.mock.release(1);
    assert_eq!(client.reply(0, 0).expect("a reply").error, 0);
    served.mock.set(|s| &s.slow, false);
    for kind in [TRIM, WRITE_ZEROES] {
        assert_eq!(client.call(kind, FUA, 0, 512).error, 0);
        assert_eq!(served.mock.asked().last().map(|asked| asked.op), Some(IoOp::Flush));
    }
    let before = served.mock.asked().len();
    assert_eq!(client.call(READ, FUA, 0, 512).error, 0, "allowed and without effect");
    assert_eq!(served.mock.asked().len(), before + 1);
    served.finish();
}

#[test]
fn a_failed_fua_write_is_not_flushed() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, false);
    served.mock.fail_next([Err(IoError::Io)]);
    assert_eq!(client.write(FUA, 0, &[1; 512]), EIO);
    served.mock.fail_next([Ok(()), Err(IoError::Io)]);
    assert_eq!(client.write(FUA, 0, &[1; 512]), EIO, "the flush failed");
    assert_eq!(served.mock.asked().len(), 3);
    served.finish();
}

#[test]
fn errors_of_the_device_have_their_number() {
    for structured in [false, true] {
        let served = Served::ordinary();
        let mut client = Client::new(&served, structured);
        for (error, number) in [
            (IoError::Io, EIO),
            (IoError::DeviceFault, EIO),
            (IoError::Unsupported, EINVAL),
            (IoError::NoSpace, 28),
            (IoError::ReadOnly, 1),
            (IoError::Revoked, ESHUTDOWN),
        ] {
            served.mock.fail_next([Err(error)]);
            assert_eq!(client.call(READ, 0, 0, 512).error, number);
            served.mock.fail_next([Ok(()), Err(error)]);
            assert_eq!(client.write(0, 0, &vec![0; 128 << 10]), number, "one bad piece fails the request");
        }
        assert_eq!(client.call(READ, 0, 0, 512).error, 0);
        served.finish();
    }
}

#[test]
fn a_read_beyond_the_window_comes_in_segments() {
    let options = NbdOptions { max_bytes_per_connection: 256 << 10, ..NbdOptions::default() };
    for structured in [false, true] {
        let served = Served::new(Mock::ordinary(), options.clone());
        let mut client = Client::new(&served, structured);
        let all = client.call(READ, 0, 0, 4 << 20);
        assert!(all.error == 0 && all.data == *served.mock.0.medium.lock().expect("not poisoned"));
        assert_eq!(all.chunks, if structured { 32 } else { 1 }, "128 KiB each");
        if structured {
            assert_eq!(client.call(READ, DF, 0, 256 << 10).error, EOVERFLOW);
        }
        served.finish();
    }
}

#[test]
fn a_late_error_in_a_segmented_read_is_a_chunk_or_the_end_of_the_connection() {
    let options = NbdOptions { max_bytes_per_connection: 256 << 10, ..NbdOptions::default() };
    for structured in [false, true] {
        let served = Served::new(Mock::ordinary(), options.clone());
        let mut client = Client::new(&served, structured);
        served.mock.fail_next([Ok(()), Ok(()), Ok(()), Err(IoError::Io)]);
        if structured {
            assert_eq!(client.call(READ, 0, 0, 1 << 20).error, EIO);
            assert_eq!(client.call(READ, 0, 0, 512).error, 0);
        } else {
            client.send(READ, 0, 0, 1 << 20);
            assert!(client.reply(0, 1 << 20).is_err(), "the data cannot be completed");
        }
        served.finish();
    }
}

#[test]
fn requests_larger_than_the_arena_are_served() {
    let served = Served::new(Mock::new(geometry(4 << 20), 1, 128 << 10), NbdOptions::default());
    for structured in [false, true] {
        let mut client = Client::new(&served, structured);
        let data: Vec<u8> = (0..2u32 << 20).map(|at| (at / 5) as u8).collect();
        assert_eq!(client.write(0, 0, &data), 0);
        let read = client.call(READ, 0, 0, 2 << 20);
        assert!(read.error == 0 && read.data == data);
    }
    // An arena that cannot give even one piece of the advertised length.
    let served = Served::new(Mock::new(geometry(4 << 20), 1, 16 << 10), NbdOptions::default());
    let mut client = Client::new(&served, true);
    assert_eq!(client.write(0, 0, &vec![9; 300 << 10]), 0);
    assert_eq!(client.call(READ, 0, 0, 300 << 10).data, vec![9; 300 << 10]);
    served.finish();
}

#[test]
fn pipelined_requests_go_to_the_device_in_batches() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    let before = served.mock.0.batches.load(Ordering::SeqCst);
    let mut bytes = Vec::new();
    for at in 0..64 {
        bytes.extend(client.header(READ, 0, at * 4096, 4096).1);
    }
    std::io::Write::write_all(&mut client.stream, &bytes).expect("sent");
    for at in 0..64 {
        assert_eq!(client.reply(at * 4096, 4096).expect("a reply").error, 0);
    }
    let batches = served.mock.0.batches.load(Ordering::SeqCst) - before;
    assert!(batches <= 4, "{batches} hand-overs for 64 requests that came at once");
    served.finish();
}

#[test]
fn a_hold_delays_and_loses_nothing() {
    let served = Served::ordinary();
    let mut client = Client::new(&served, true);
    served.mock.set(|s| &s.held, true);
    client.send_write(0, 0, &[5; 4096]);
    client.send(READ, 0, 8192, 512);
    client.stream.set_nonblocking(true).expect("non-blocking");
    assert!(client.reply(0, 0).is_err());
    assert_eq!(served.mock.asked().len(), 0);
    client.stream.set_nonblocking(false).expect("blocking");
    served.mock.set(|s| &s.held, false);
    assert_eq!(client.reply(0, 0).expect("a reply").error, 0);
    assert_eq!(client.reply(8192, 512).expect("a reply").error, 0);
    served.finish();
}

#[test]
fn a_full_lane_is_tried_again() {
    let served = Served::ordinary();
    served.mock.0.room.store(1, Ordering::SeqCst);
    let mut client = Client::new(&served, false);
    assert_eq!(client.call(READ, 0, 0, 256 << 10).error, 0);
    served.finish();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    /// Two connections, each in its own half of the medium, with a small arena: what is read is what was written.
    #[test]
    fn traffic_agrees_with_a_model(
        structured in any::<bool>(),
        arena_pages in 20u64..80,
        requests in proptest::collection::vec((0usize..2, 0u8..5, 0u64..1000, 1u32..300, any::<u8>()), 1..60),
    ) {
        let served = Served::new(Mock::new(geometry(1 << 20), 2, arena_pages * 4096), NbdOptions { max_bytes_per_connection: 128 << 10, ..NbdOptions::default() });
        let mut clients = [Client::new(&served, structured), Client::new(&served, structured)];
        let mut model = served.mock.0.medium.lock().expect("not poisoned").clone();
        for (which, kind, block, blocks, fill) in requests {
            let block = block + which as u64 * 1024;
            let blocks = blocks.min((which as u32 + 1) * 1024 - block as u32);
            let (offset, length) = (block * 512, blocks * 512);
            let range = offset as usize..(offset + u64::from(length)) as usize;
            let client = &mut clients[which];
            match kind {
                0 | 1 => {
                    let reply = client.call(READ, 0, offset, length);
                    prop_assert!(reply.error == 0 && reply.data == model[range]);
                }
                2 => {
                    let data: Vec<u8> = (0..length).map(|at| (at / 512) as u8 ^ fill).collect();
                    prop_assert_eq!(client.write(u16::from(fill & 1), offset, &data), 0);
                    model[range].copy_from_slice(&data);
                }
                3 => {
                    prop_assert_eq!(client.call(WRITE_ZEROES, 0, offset, length).error, 0);
                    model[range].fill(0);
                }
                _ => prop_assert_eq!(client.call(FLUSH, 0, 0, 0).error, 0),
            }
        }
        prop_assert!(*served.mock.0.medium.lock().expect("not poisoned") == model);
        served.finish();
    }

    /// Writes one behind the other in one stream, which is cut where it likes: each lands whole, also the last before a header that never ends. 33 blocks are the shortest payload
    /// that goes straight into a lease.
    #[test]
    fn writes_land_whole_wherever_their_stream_is_cut(
        blocks in proptest::collection::vec(prop_oneof![1u32..9, Just(32), Just(33), 34u32..200], 1..60),
        cuts in proptest::collection::vec(prop_oneof![1usize..64, 4000usize..5000, Just(128 << 10)], 1..40),
        is_cut_off in any::<bool>(),
    ) {
        let served = Served::ordinary();
        let mut client = Client::new(&served, false);
        let mut model = served.mock.0.medium.lock().expect("not poisoned").clone();
        let (mut stream, mut offset, mut asked) = (Vec::new(), 0_usize, 0);
        for (number, blocks) in blocks.into_iter().enumerate() {
            let data: Vec<u8> = (0..blocks * 512).map(|at| (at / 7) as u8 ^ number as u8).collect();
            if offset + data.len() > model.len() {
                break;
            }
            stream.extend(client.header(WRITE, 0, offset as u64, data.len() as u32).1);
            stream.extend_from_slice(&data);
            model[offset..offset + data.len()].copy_from_slice(&data);
            offset += data.len();
            asked += 1;
        }
        if is_cut_off {
            let (_, header) = client.header(WRITE, 0, 0, 512);
            stream.extend_from_slice(&header[..20]);
        }
        let mut rest = &stream[..];
        for cut in cuts.into_iter().chain(std::iter::repeat(usize::MAX)) {
            let (piece, behind) = rest.split_at(cut.min(rest.len()));
            client.stream.write_all(piece).expect("a piece goes out");
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        if is_cut_off {
            client.stream.shutdown(std::net::Shutdown::Write).expect("half closed");
            eventually("all that came whole is written", || *served.mock.0.medium.lock().expect("not poisoned") == model);
        } else {
            let mut answered: Vec<u64> = (0..asked).map(|_| client.reply(0, 0).expect("an answer").cookie).collect();
            answered.sort_unstable();
            let cookies: Vec<u64> = (1..=asked).collect();
            prop_assert_eq!(answered, cookies);
            prop_assert!(*served.mock.0.medium.lock().expect("not poisoned") == model);
        }
        drop(client);
        served.finish();
    }
}
