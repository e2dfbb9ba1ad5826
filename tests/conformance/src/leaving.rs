//! What holds when the driver leaves while it is used.

use std::time::{Duration, Instant};

use anyhow::ensure;
use cofferdam_manager::{HandleSpec, HandleState, IoError, IoOp, OpenError, Outcome, SubmitError, UnloadOptions};

use crate::Case;
use crate::bed::{Fixture, Wish};

pub(crate) const CASES: &[Case] = &[
    Case { name: "an_idle_unload_leaves_nothing", wish: Wish::default, check: idle_unload },
    Case { name: "an_unload_answers_everything_in_flight", wish: Wish::default, check: unload_in_flight },
    Case { name: "an_unload_does_not_wait_for_a_client_that_never_polls", wish: Wish::default, check: never_polls },
    Case { name: "a_revoked_handle_answers_revoked_and_closes", wish: Wish::default, check: revoked_handle },
    Case { name: "a_sleeping_client_is_woken_by_revocation", wish: Wish::default, check: sleeper_wakes },
    Case { name: "a_buffer_kept_over_the_unload_reaches_nothing", wish: Wish::default, check: kept_buffer },
    Case {
        name: "a_handle_closed_with_requests_in_flight_leaks_nothing",
        wish: Wish::default,
        check: closed_in_flight,
    },
    Case { name: "two_unloaders_get_the_same_certificate", wish: Wish::default, check: two_unloaders },
];

fn clean(certificate: &cofferdam_manager::Certificate) -> anyhow::Result<()> {
    ensure!(certificate.residual.is_zero(), "left: {:?}", certificate.residual);
    ensure!(certificate.leaked.bytes == 0, "retired: {:?}", certificate.leaked);
    Ok(())
}

fn idle_unload(fixture: &mut Fixture) -> anyhow::Result<()> {
    let certificate = fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default())?;
    ensure!(certificate.outcome == Outcome::Unloaded);
    ensure!(certificate.requests_at_close == 0 && certificate.handles_revoked == 0);
    ensure!(fixture.manager.get(fixture.binding.name()).is_none(), "still registered");
    clean(&certificate)
}

fn unload_in_flight(fixture: &mut Fixture) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    let mut started = Vec::new();
    for number in 0..200_u64 {
        started.push(client.start(IoOp::Write, number * 4096, 4096, Some(&[3; 4096]))?);
    }
    let certificate = fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default())?;
    clean(&certificate)?;
    ensure!(certificate.requests_failed == 0, "{} failed", certificate.requests_failed);
    for user in started {
        client.finish(user)?.result?;
    }
    Ok(())
}

fn never_polls(fixture: &mut Fixture) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    for number in 0..64_u64 {
        client.start(IoOp::Read, number * 4096, 4096, None)?;
    }
    let before = Instant::now();
    let certificate = fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default())?;
    ensure!(before.elapsed() < Duration::from_secs(2), "took {:?}", before.elapsed());
    clean(&certificate)
}

fn revoked_handle(fixture: &mut Fixture) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    client.write(0, &[1; 4096])?;
    let certificate = fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default())?;
    ensure!(certificate.handles_revoked == 1, "{} handles revoked", certificate.handles_revoked);
    ensure!(client.handle().state() == HandleState::Revoked);
    ensure!(client.handle().lease(4096).is_err());
    let mut flush = vec![cofferdam_manager::IoRequest {
        user: 1,
        op: IoOp::Flush,
        offset: 0,
        length: 0,
        flags: Default::default(),
        buffer: None,
    }];
    ensure!(client.handle().submit(&mut flush) == Err(SubmitError::Revoked) && flush.len() == 1);
    let late = fixture.binding.open(HandleSpec::default());
    ensure!(matches!(late, Err(OpenError::Revoked)), "a handle was opened after the unload");
    clean(&certificate)
}

fn sleeper_wakes(fixture: &mut Fixture) -> anyhow::Result<()> {
    let client = fixture.client(0)?;
    let (ready, go) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let sleeper = scope.spawn(move || {
            let _ = ready.send(());
            let before = Instant::now();
            let found = client.handle().wait(Duration::from_secs(30), &mut Vec::new());
            (found, before.elapsed(), client.handle().state())
        });
        go.recv()?;
        clean(&fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default())?)?;
        let (found, slept, state) = sleeper.join().map_err(|_| anyhow::anyhow!("the sleeper panicked"))?;
        ensure!(found == 0 && state == HandleState::Revoked, "woke with {found} answers, {state:?}");
        ensure!(slept < Duration::from_secs(5), "slept {slept:?}");
        Ok(())
    })
}

fn kept_buffer(fixture: &mut Fixture) -> anyhow::Result<()> {
    let client = fixture.client(0)?;
    let buffer = client.handle().lease(8192)?;
    buffer.write_at(0, b"before")?;
    clean(&fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default())?)?;
    ensure!(buffer.read_at(0, &mut [0; 6]).is_err(), "a revoked buffer still reads");
    ensure!(buffer.write_at(0, b"after").is_err(), "a revoked buffer still writes");
    Ok(())
}

fn closed_in_flight(fixture: &mut Fixture) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    for number in 0..100_u64 {
        client.start(IoOp::Write, number * 4096, 4096, Some(&[4; 4096]))?;
    }
    drop(client);
    let mut other = fixture.client(0)?;
    ensure!(other.one(IoOp::Read, 0, 4096, None)?.err() != Some(IoError::Revoked));
    drop(other);
    clean(&fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default())?)
}

fn two_unloaders(fixture: &mut Fixture) -> anyhow::Result<()> {
    let mut client = fixture.client(0)?;
    for number in 0..100_u64 {
        client.start(IoOp::Read, number * 4096, 4096, None)?;
    }
    std::thread::scope(|scope| {
        let unload = || fixture.manager.unload_binding(&fixture.binding, &UnloadOptions::default());
        let other = scope.spawn(unload);
        let mine = unload()?;
        let theirs = other.join().map_err(|_| anyhow::anyhow!("an unloader panicked"))??;
        ensure!(mine == theirs, "{mine:?} against {theirs:?}");
        clean(&mine)
    })
}
