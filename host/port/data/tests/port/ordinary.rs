//! What honest clients see.

use std::os::unix::fs::PermissionsExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cofferdam_client::wire::{ID_BYTES, Submit};
use cofferdam_client::{Error, Op, Options, Request, Status};
use cofferdam_port_data::service::{MapError, OpenError};
use cofferdam_port_data::{DataAddress, DataError, DataOptions, DataPort};

use crate::mock::*;
use crate::raw::Guest;

#[test]
fn what_is_written_is_read_back_and_geometry_is_the_devices() {
    let served = Served::ordinary();
    let mut client = served.connect();
    let g = *client.geometry();
    assert_eq!((g.capacity_bytes, g.logical_block_bytes, g.max_transfer_bytes), (MEDIUM_BYTES, 512, 64 << 10));
    assert_eq!((g.max_discard_bytes, g.max_write_zeroes_bytes), (0, 64 << 10), "a limit of what is not served is 0");
    assert!(g.can_flush && g.has_id && !g.read_only && g.write_zeroes_may_unmap);
    round_trip(&mut client, 4096, 0xa5);
    call(&mut client, request(3, Op::Flush, 0, 0, None)).result.unwrap();
    let zeroes = Request { may_unmap: true, ..request(4, Op::WriteZeroes, 4096, 512, None) };
    call(&mut client, zeroes).result.unwrap();
    assert_eq!(served.mock.0.medium.lock().unwrap()[4096..5120], [[0; 512], [0xa5; 512]].concat());
    let slot = client.slot(ID_BYTES).unwrap();
    let answer = call(&mut client, request(5, Op::GetId, 0, ID_BYTES, Some(slot)));
    let mut id = [0; ID_BYTES as usize];
    answer.slot.unwrap().read_at(0, &mut id).unwrap();
    assert_eq!((answer.user, &id), (5, b"twenty bytes of name"));
    let refused = call(&mut client, request(6, Op::Discard, 0, 4096, None));
    assert_eq!(refused.result, Err(Status::Unsupported));
    drop(client);
    eventually("its place is free", || served.clients() == 0);
    served.finish();
}

/// With no busy wait on the host's side and one request at a time, both sides sleep before every step: a single lost wake-up ends this test.
#[test]
fn no_wake_up_is_lost() {
    let served = Served::new(DataOptions { spin: Duration::ZERO, ..DataOptions::default() });
    std::thread::scope(|scope| {
        for number in 0..3u64 {
            let served = &served;
            scope.spawn(move || {
                let mut client = served.try_connect(Options { entries: 4, ..Options::default() }).unwrap();
                let mut done = Vec::new();
                for round in 0..4000 {
                    // From one request at a time to a full ring.
                    let mut requests: Vec<_> =
                        (0..round % 5).map(|user| request(user, Op::Flush, 0, 0, None)).collect();
                    let (mut wanted, mut seen) = (requests.len(), 0);
                    if let Err(error) = client.submit(&mut requests) {
                        panic!("{number}: {error}");
                    }
                    while wanted > 0 {
                        let found = client.wait(PATIENCE, &mut done).unwrap();
                        assert!(found > 0, "client {number} round {round}: a wake-up was lost");
                        seen |= done.drain(..).fold(0, |seen, answer| seen | 1 << answer.user);
                        wanted -= found;
                    }
                    assert_eq!(seen, (1 << (round % 5)) - 1);
                }
            });
        }
    });
    served.finish();
}

#[test]
fn a_ring_of_any_size_takes_more_requests_than_it_has_entries() {
    let served = Served::ordinary();
    for entries in [1, 2, 64, 1024] {
        let mut client = served.try_connect(Options { entries, ..Options::default() }).unwrap();
        let total = u64::from(entries) * 3 + 7;
        let mut requests: Vec<_> = (0..total).map(|user| request(user, Op::Flush, 0, 0, None)).collect();
        let mut done = Vec::new();
        while (done.len() as u64) < total {
            match client.submit(&mut requests) {
                Ok(()) => {}
                Err(Error::Full) => assert!(client.outstanding() > 0),
                Err(error) => panic!("{error}"),
            }
            assert!(client.wait(PATIENCE, &mut done).unwrap() > 0);
        }
        let mut users: Vec<_> = done.iter().map(|answer| answer.user).collect();
        users.sort_unstable();
        assert!(users.iter().copied().eq(0..total), "each is answered once");
        assert_eq!(client.outstanding(), 0);
    }
    served.finish();
}

#[test]
fn what_does_not_fit_medium_or_region_is_invalid_and_nothing_is_moved() {
    let served = Served::ordinary();
    let guest = Guest::new(&served, 64);
    let good = Submit { user: 9, offset: 0, memory_offset: 0, length: 512, op: Op::Write as u16, flags: 0 };
    let region = guest.welcome.region_bytes;
    let (invalid, unsupported) = (Status::Invalid, Status::Unsupported);
    let cases = [
        (Submit { memory_offset: region, ..good }, invalid),
        (Submit { memory_offset: region - 511, ..good }, invalid),
        (Submit { memory_offset: u64::MAX, ..good }, invalid),
        (Submit { memory_offset: u64::MAX - 511, ..good }, invalid),
        (Submit { length: u32::MAX, ..good }, invalid),
        (Submit { length: 0, ..good }, invalid),
        (Submit { length: 511, ..good }, invalid),
        (Submit { offset: 1, ..good }, invalid),
        (Submit { offset: MEDIUM_BYTES, ..good }, invalid),
        (Submit { offset: u64::MAX - 511, ..good }, invalid),
        (Submit { flags: 1, ..good }, invalid),
        (Submit { flags: 2, op: Op::WriteZeroes as u16, ..good }, invalid),
        (Submit { op: 0, ..good }, unsupported),
        (Submit { op: 7, ..good }, unsupported),
        (Submit { op: u16::MAX, flags: u16::MAX, ..good }, unsupported),
        (Submit { memory_offset: region - 512, ..good }, Status::Ok),
    ];
    for (entry, status) in cases {
        guest.put(&[entry]);
        let answer = guest.take();
        assert_eq!((answer.user, Status::from_wire(answer.status)), (9, Some(status)), "{entry:?}");
    }
    drop(guest);
    served.finish();
}

#[test]
fn a_hold_and_a_full_lane_delay_requests_and_lose_none() {
    let served = Served::ordinary();
    let mut client = served.connect();
    served.mock.set(|s| &s.held, true);
    client.submit(&mut (0..8).map(|user| request(user, Op::Flush, 0, 0, None)).collect()).unwrap();
    let mut done = Vec::new();
    assert_eq!(client.wait(Duration::from_millis(20), &mut done).unwrap(), 0, "held");
    served.mock.0.room.store(2, Ordering::SeqCst);
    served.mock.0.slow.store(true, Ordering::SeqCst);
    served.mock.set(|s| &s.held, false);
    while done.len() < 8 {
        assert!(served.mock.in_flight() <= 2);
        served.mock.release(None);
        client.wait(Duration::from_millis(5), &mut done).unwrap();
    }
    assert!(done.iter().all(|answer| answer.result.is_ok()));
    drop(client);
    served.finish();
}

#[test]
fn who_cannot_be_served_is_told_why() {
    let served = Served::new(DataOptions { max_clients: 2, ..DataOptions::default() });
    let open = |error| *served.mock.0.open_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    let map = |error| *served.mock.0.map_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    let connect = || {
        let error = served.try_connect(Options::default()).map(|_| ()).unwrap_err();
        eventually("the refused one has left", || served.clients() == 0 || matches!(error, Error::Busy(_)));
        error
    };
    open(OpenError::TooMany(3));
    assert!(matches!(connect(), Error::Busy(text) if text.contains('3')));
    eventually("the refused are gone", || served.clients() == 0);
    open(OpenError::Revoked);
    assert!(matches!(connect(), Error::Revoked));
    open(OpenError::Host("out of it".into()));
    assert!(matches!(connect(), Error::Host(text) if text.contains("out of it")));
    eventually("the refused are gone", || served.clients() == 0);
    map(MapError::Busy { limit: "16 mapped handles".into() });
    assert!(matches!(connect(), Error::Busy(text) if text.contains("16 mapped handles")));
    eventually("the refused are gone", || served.clients() == 0);
    map(MapError::Unsupported("it is old".into()));
    assert!(matches!(connect(), Error::Unsupported(text) if text.contains("it is old")));
    map(MapError::Revoked);
    assert!(matches!(connect(), Error::Revoked));
    let large = Options { region_bytes: 1 << 40, ..Options::default() };
    assert!(matches!(served.try_connect(large).unwrap_err(), Error::Options(_)));
    eventually("the refused are gone", || served.clients() == 0);
    let (_one, _two) = (served.connect(), served.connect());
    assert!(matches!(connect(), Error::Busy(text) if text.contains("2 clients")));
    drop((_one, _two));
    served.finish();
}

#[test]
fn options_that_no_host_grants_are_refused_before_anything_is_sent() {
    for options in [
        Options { entries: 3, ..Options::default() },
        Options { entries: 0, ..Options::default() },
        Options { entries: 2048, ..Options::default() },
        Options { region_bytes: 0, ..Options::default() },
        Options { region_bytes: 4097, ..Options::default() },
    ] {
        let refused = cofferdam_client::Client::connect("/nowhere/at/all", options).unwrap_err();
        assert!(matches!(refused, Error::Options(_)), "{refused}");
    }
    let missing = cofferdam_client::Client::connect("/nowhere/at/all", Options::default()).unwrap_err();
    assert!(matches!(missing, Error::Connect { .. }), "{missing}");
}

#[test]
fn the_socket_is_its_users_alone_and_one_ports_alone() {
    let served = Served::ordinary();
    assert_eq!(std::fs::metadata(&served.path).unwrap().permissions().mode() & 0o777, 0o600);
    let address: DataAddress = format!("data:{}", served.path.display()).parse().unwrap();
    let second = DataPort::start(Mock::new(), &address, DataOptions::default());
    assert!(matches!(second, Err(DataError::InUse(_))), "{second:?}");
    served.assert_serves();
    served.finish();
}

#[test]
fn a_request_needs_memory_of_its_own_client() {
    let served = Served::ordinary();
    let (mut one, two) = (served.connect(), served.connect());
    for slot in [None, Some(two.slot(4096).unwrap()), Some(one.slot(511).unwrap())] {
        let mut requests = vec![request(1, Op::Write, 0, 512, slot)];
        assert!(matches!(one.submit(&mut requests), Err(Error::OutOfRange(_))));
        assert_eq!((requests.len(), one.outstanding()), (1, 0), "it is left with its owner");
    }
    drop((one, two));
    served.finish();
}
