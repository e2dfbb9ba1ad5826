//! What has to hold when the driver leaves while it is used.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use cofferdam_manager::{HandleSpec, HandleState, OpenError, Outcome, SubmitError};

use crate::bed::Wish;
use crate::fixture::clean;
use crate::{Case, Client, Fixture};

pub(crate) const CASES: &[Case] = &[
    Case { name: "an_idle_unload_leaves_nothing", wish: Wish::of, check: idle_unload },
    Case { name: "an_unload_answers_everything_in_flight", wish: Wish::of, check: unload_in_flight },
    Case { name: "an_unload_does_not_wait_for_a_client_that_never_polls", wish: Wish::of, check: never_polls },
    Case { name: "a_revoked_handle_answers_revoked_and_closes", wish: Wish::of, check: revoked_handle },
    Case { name: "a_sleeping_client_is_woken_by_revocation", wish: Wish::of, check: sleeper_wakes },
    Case { name: "a_buffer_kept_over_the_unload_reaches_nothing", wish: Wish::of, check: kept_buffer },
    Case { name: "a_handle_closed_with_requests_in_flight_leaks_nothing", wish: Wish::of, check: closed_in_flight },
    Case { name: "two_unloaders_get_the_same_certificate", wish: Wish::of, check: two_unloaders },
    Case {
        name: "requests_of_a_closed_handle_are_answered_without_any_client",
        wish: Wish::of,
        check: answered_without_a_client,
    },
    Case {
        name: "an_unload_under_many_threads_answers_each_request_once",
        wish: Wish::of,
        check: unload_under_threads,
    },
];

/// A client with so many requests in flight.
fn busy(fixture: &Fixture<'_>, requests: u64) -> anyhow::Result<(Client, Vec<u64>)> {
    let mut client = fixture.client(fixture.lane()?)?;
    let mut started = Vec::new();
    for number in 0..requests {
        started.push(client.ask(&fixture.ordinary(number))?);
    }
    Ok((client, started))
}

fn idle_unload(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let certificate = fixture.unload()?;
    ensure!(certificate.outcome == Outcome::Unloaded);
    ensure!(certificate.requests_at_close == 0 && certificate.handles_revoked == 0);
    ensure!(fixture.manager.get(fixture.binding.name()).is_none(), "still registered");
    clean(&certificate)
}

fn unload_in_flight(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let (mut client, started) = busy(fixture, 200)?;
    let certificate = fixture.unload()?;
    clean(&certificate)?;
    ensure!(certificate.requests_failed == 0, "{} failed", certificate.requests_failed);
    for user in started {
        client.finish(user)?.result?;
    }
    Ok(())
}

fn never_polls(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let _client = busy(fixture, 64)?;
    let before = Instant::now();
    let certificate = fixture.unload()?;
    ensure!(before.elapsed() < Duration::from_secs(2) * fixture.slowness, "took {:?}", before.elapsed());
    clean(&certificate)
}

fn revoked_handle(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(fixture.lane()?)?;
    client.whole(&fixture.ordinary(0))??;
    let mut kept = vec![fixture.ordinary(1).request(client.handle(), 1)?];
    let certificate = fixture.unload()?;
    ensure!(certificate.handles_revoked == 1, "{} handles revoked", certificate.handles_revoked);
    ensure!(client.handle().state() == HandleState::Revoked);
    ensure!(client.handle().lease(4096).is_err());
    ensure!(client.handle().submit(&mut kept) == Err(SubmitError::Revoked) && kept.len() == 1);
    let late = fixture.binding.open(HandleSpec::default());
    ensure!(matches!(late, Err(OpenError::Revoked)), "a handle was opened after the unload");
    clean(&certificate)
}

fn sleeper_wakes(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let (client, slowness) = (fixture.client(fixture.lane()?)?, fixture.slowness);
    let (ready, go) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(move || {
            let _ = ready.send(());
            let before = Instant::now();
            let found = client.handle().wait(Duration::from_secs(30) * slowness, &mut Vec::new());
            (found, before.elapsed(), client.handle().state())
        });
        go.recv()?;
        clean(&fixture.unload()?)?;
        let (found, slept, state) = sleeper.join().map_err(|_| anyhow::anyhow!("the sleeper panicked"))?;
        ensure!(found == 0 && state == HandleState::Revoked, "woke with {found} answers, {state:?}");
        ensure!(slept < Duration::from_secs(5) * fixture.slowness, "slept {slept:?}");
        Ok(())
    })
}

fn kept_buffer(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let client = fixture.client(fixture.lane()?)?;
    let buffer = client.handle().lease(8192)?;
    buffer.write_at(0, b"before")?;
    clean(&fixture.unload()?)?;
    ensure!(buffer.read_at(0, &mut [0; 6]).is_err(), "a revoked buffer still reads");
    ensure!(buffer.write_at(0, b"after").is_err(), "a revoked buffer still writes");
    Ok(())
}

fn closed_in_flight(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    drop(busy(fixture, 100)?);
    fixture.client(fixture.lane()?)?.whole(&fixture.ordinary(0))??;
    clean(&fixture.unload()?)
}

fn two_unloaders(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let _client = busy(fixture, 100)?;
    std::thread::scope(|scope| {
        let unload = || fixture.unload();
        let other = scope.spawn(unload);
        let mine = unload()?;
        let theirs = other.join().map_err(|_| anyhow::anyhow!("an unloader panicked"))??;
        ensure!(mine == theirs, "{mine:?} against {theirs:?}");
        clean(&mine)
    })
}

/// Nobody is left who polls; the buffers come back all the same. (`tests/sharing.rs` holds the device still in between, where it can be held.)
fn answered_without_a_client(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    drop(busy(fixture, 100)?);
    let status = || fixture.binding.status();
    fixture.until("everything is answered", || {
        status().requests_in_flight == 0 && status().leased_bytes == fixture.posted_bytes
    })
}

/// Eight threads hammer one lane through handles of their own until the binding is taken from under them.
fn unload_under_threads(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let fixture: &Fixture<'_> = fixture;
    let (started, wait_for_traffic) = mpsc::channel();
    std::thread::scope(|scope| {
        let mut clients = Vec::new();
        for thread in 0..8_u64 {
            let started = started.clone();
            clients.push(scope.spawn(move || hammer(fixture, thread, &started)));
        }
        // One that gives up drops its end, and the last of them ends the wait.
        drop(started);
        let busy = (0..8).map_while(|_| wait_for_traffic.recv().ok()).count();
        let certificate = fixture.unload()?;
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        ensure!(busy == 8, "{busy} of 8 clients were served");
        ensure!(certificate.requests_failed == 0, "{} failed", certificate.requests_failed);
        clean(&certificate)
    })
}

/// Writes until it is told that the binding leaves, and then wants every answer once. Says on `started` that it is at it.
fn hammer(fixture: &Fixture<'_>, thread: u64, started: &mpsc::Sender<()>) -> anyhow::Result<()> {
    let handle = fixture.binding.open(HandleSpec { lane: fixture.lane()?, ..HandleSpec::default() })?;
    let (mut admitted, mut answered, mut told, mut done) = (0_u64, 0_u64, false, Vec::new());
    while handle.state() == HandleState::Open {
        let number = thread * 64 + admitted % 64;
        let Ok(request) = fixture.ordinary(number).request(&handle, 1) else { break };
        let mut requests = vec![request];
        // Refused, it is full or the end: the state tells which.
        let _ = handle.submit(&mut requests);
        admitted += u64::from(requests.is_empty());
        if admitted >= 100 && !std::mem::replace(&mut told, true) {
            let _ = started.send(());
        }
        handle.poll(admitted.is_multiple_of(3), &mut done);
        answered += done.drain(..).count() as u64;
    }
    let patience = Instant::now() + fixture.patience();
    while answered < admitted && Instant::now() < patience {
        handle.poll(true, &mut done);
        answered += done.drain(..).count() as u64;
    }
    ensure!(answered == admitted, "thread {thread}: {admitted} admitted, {answered} answered");
    Ok(())
}
