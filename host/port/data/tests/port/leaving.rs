//! Revocation, shutdown and hang-ups, in the middle of everything.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cofferdam_client::ring::{LIVE, Word};
use cofferdam_client::wire::{ENTRIES_MAX, Op, Status, Submit, TAG_REVOKED};
use cofferdam_client::{Client, Error};
use cofferdam_port_data::service::{IoError, PortReport};

use crate::mock::*;
use crate::raw::Guest;

fn flush(user: u64) -> Submit {
    Submit { user, offset: 0, memory_offset: 0, length: 0, op: Op::Flush as u16, flags: 0 }
}

fn assert_over(client: &mut Client) {
    let mut done = Vec::new();
    assert!(matches!(client.wait(PATIENCE, &mut done), Err(Error::Revoked)));
    assert!(matches!(client.poll(&mut done), Err(Error::Revoked)));
    assert!(client.is_revoked() && client.outstanding() == 0 && done.is_empty());
    assert!(matches!(client.submit(&mut vec![request(1, Op::Flush, 0, 0, None)]), Err(Error::Revoked)));
}

#[test]
fn after_revocation_what_was_admitted_is_answered_and_what_is_new_is_not() {
    let served = Served::ordinary();
    let guest = Guest::new(&served, 8);
    served.mock.set(|s| &s.slow, true);
    guest.put(&[flush(1), flush(2)]);
    eventually("they are with the device", || served.mock.in_flight() == 2);
    served.mock.set(|s| &s.revoked, true);
    eventually("the client can see it", || guest.rings.load(Word::State) != LIVE);
    guest.put(&[flush(3)]);
    let answer = guest.take();
    assert_eq!((answer.user, answer.status), (3, Status::Shutdown as i32));
    assert_eq!(served.clients(), 1, "it is not cut off while something of it is with the device");
    served.mock.release(None);
    for user in [1, 2] {
        let answer = guest.take();
        assert_eq!((answer.user, answer.status), (user, Status::Ok as i32));
    }
    assert_eq!(guest.raw.receive_news(), [TAG_REVOKED]);
    assert!(guest.raw.receive_news().is_empty(), "then it hangs up");
    eventually("it is gone", || served.clients() == 0);
    for file in [&guest.region, &guest.rings_file] {
        assert_eq!(rustix::fs::fstat(file).unwrap().st_blocks, 0, "the memory is taken away");
    }
    served.finish();
}

#[test]
fn the_library_answers_everything_once_and_then_says_revoked() {
    for answer in [None, Some(IoError::Revoked)] {
        let served = Served::ordinary();
        let mut client = served.connect();
        let kept = client.slot(4096).unwrap();
        kept.write_at(0, &[7; 4096]).unwrap();
        served.mock.set(|s| &s.slow, true);
        client.submit(&mut vec![request(5, Op::Write, 0, 4096, Some(client.slot(4096).unwrap()))]).unwrap();
        eventually("it is with the device", || served.mock.in_flight() == 1);
        served.mock.set(|s| &s.revoked, true);
        eventually("the client can see it", || client.is_revoked());
        assert!(matches!(client.submit(&mut vec![request(6, Op::Flush, 0, 0, None)]), Err(Error::Revoked)));
        assert!(matches!(kept.read_at(0, &mut [0; 8]), Err(Error::Revoked)), "before the memory goes, not after");
        served.mock.release(answer);
        let last = next(&mut client);
        assert_eq!((last.user, last.result), (5, answer.map_or(Ok(()), |_| Err(Status::Shutdown))));
        assert_over(&mut client);
        // Its own account: there is nothing of anyone's in it, and it reaches nobody.
        assert!(matches!(kept.write_at(0, &[1; 4096]), Err(Error::Revoked)));
        served.finish();
    }
}

#[test]
fn a_sleeper_without_requests_wakes_at_revocation() {
    let served = Served::ordinary();
    let mut client = served.connect();
    let waiter = std::thread::spawn(move || {
        let start = Instant::now();
        let result = client.wait(PATIENCE, &mut Vec::new());
        (result, start.elapsed())
    });
    served.mock.set(|s| &s.revoked, true);
    let (result, after) = waiter.join().unwrap();
    assert!(matches!(result, Err(Error::Revoked)) && after < PATIENCE, "{result:?}");
    served.finish();
}

#[test]
fn requests_that_wait_for_a_hold_are_answered_at_revocation() {
    let served = Served::ordinary();
    let mut client = served.connect();
    served.mock.set(|s| &s.held, true);
    client.submit(&mut vec![request(1, Op::Flush, 0, 0, None)]).unwrap();
    served.mock.set(|s| &s.revoked, true);
    assert_eq!(next(&mut client).result, Err(Status::Shutdown));
    assert_over(&mut client);
    served.finish();
}

#[test]
fn a_client_that_does_not_take_its_last_answers_has_a_tenth_of_a_second() {
    let served = Served::ordinary();
    let guest = Guest::new(&served, 4);
    guest.put(&[flush(1), flush(2)]);
    eventually("answered", || guest.rings.load(Word::CompleteTail) == 2);
    let start = Instant::now();
    served.mock.set(|s| &s.revoked, true);
    eventually("it is cut off", || served.clients() == 0);
    assert!(start.elapsed() >= Duration::from_millis(90), "not before");
    assert!(start.elapsed() < Duration::from_secs(2));
    served.finish();
}

/// As long as it gets a processor, its rings do not come to rest and there is always something to do for it.
#[test]
fn a_client_that_keeps_its_rings_moving_is_cut_off() {
    let served = Served::ordinary();
    let guest = Guest::new(&served, ENTRIES_MAX);
    (0..ENTRIES_MAX).for_each(|place| guest.rings.put_submit(place, &flush(place.into())));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                guest.rings.store(Word::CompleteHead, guest.rings.load(Word::CompleteTail));
                guest.rings.store(Word::SubmitTail, guest.rings.load(Word::SubmitHead).wrapping_add(ENTRIES_MAX));
                if guest.rings.load(Word::HostSleeps) != 0 {
                    guest.wake();
                }
            }
        });
        eventually("it moves", || guest.rings.load(Word::SubmitHead) > 10 * ENTRIES_MAX);
        let start = Instant::now();
        served.mock.set(|s| &s.revoked, true);
        let cut_off = || served.clients() == 0;
        while !cut_off() && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        over.store(true, Ordering::Relaxed);
        assert!(cut_off(), "it is served for ever");
    });
    served.finish();
}

#[test]
fn shutdown_with_nobody_there_waits_for_nothing() {
    once_within(Duration::from_millis(1), || {
        let mut served = Served::ordinary();
        let start = Instant::now();
        assert_eq!(served.shutdown(GRACE), PortReport { connections: 0, severed: 0 });
        start.elapsed()
    });
}

#[test]
fn shutdown_waits_for_the_device_within_its_grace_and_severs_what_is_left() {
    let mut served = Served::ordinary();
    let (mut busy, mut idle, stalled) = (served.connect(), served.connect(), Guest::new(&served, 1));
    stalled.put(&[flush(1)]);
    eventually("its only place is taken", || stalled.rings.load(Word::CompleteTail) == 1);
    served.mock.set(|s| &s.slow, true);
    busy.submit(&mut vec![request(1, Op::Flush, 0, 0, None)]).unwrap();
    eventually("it is with the device", || served.mock.in_flight() == 1);
    let start = Instant::now();
    let report = served.shutdown(GRACE);
    assert!(start.elapsed() < GRACE + Duration::from_millis(300), "{:?}", start.elapsed());
    assert_eq!(report, PortReport { connections: 3, severed: 2 });
    assert_eq!(next(&mut busy).result, Err(Status::Shutdown));
    assert_over(&mut busy);
    assert_over(&mut idle);
    assert_eq!(stalled.raw.receive_news(), [TAG_REVOKED]);
    assert!(!served.path.exists());
    served.mock.assert_all_returned();
}

#[test]
fn shutdown_with_nobody_busy_is_quick_and_severs_nobody() {
    let mut served = Served::ordinary();
    let clients: Vec<_> = (0..8).map(|_| served.connect()).collect();
    let start = Instant::now();
    let report = served.shutdown(Duration::from_secs(5));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(report, PortReport { connections: 8, severed: 0 });
    drop(clients);
    served.mock.assert_all_returned();
}

#[test]
fn a_client_that_dies_at_any_moment_leaves_nothing_and_disturbs_nobody() {
    let served = Served::ordinary();
    let mut other = served.connect();
    for round in 0..200u64 {
        served.mock.0.slow.store(round % 3 == 0, Ordering::SeqCst);
        let guest = Guest::new(&served, 16);
        guest.put(&(0..round % 17).map(flush).collect::<Vec<_>>());
        if round % 2 == 0 {
            eventually("taken", || guest.rings.load(Word::SubmitHead) == (round % 17) as u32);
        }
        drop(guest);
        if round % 20 == 1 {
            served.mock.0.slow.store(false, Ordering::SeqCst);
            round_trip(&mut other, 0, round as u8);
        }
    }
    eventually("only the other is left", || served.clients() == 1 && served.mock.0.handles.load(Ordering::SeqCst) == 1);
    drop(other);
    served.finish();
}

#[test]
fn a_port_that_is_dropped_is_shut_down() {
    let served = Served::ordinary();
    let mut client = served.connect();
    let mock = served.mock.clone();
    drop(served);
    assert_over(&mut client);
    mock.assert_all_returned();
}
