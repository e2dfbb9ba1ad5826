//! What has to hold while a driver serves.

use anyhow::{Context, ensure};
use cofferdam_manager::{ControlError, HandleSpec, HandleState, IoError, IoOp, OpenError};

use crate::bed::{Class, Wish};
use crate::client::Ask;
use crate::fixture::clean;
use crate::{Case, Fixture};

pub(crate) const CASES: &[Case] = &[
    Case { name: "the_service_is_that_of_the_class", wish: Wish::of, check: service },
    Case { name: "each_request_is_answered_once_under_its_name", wish: Wish::of, check: answered_once },
    Case { name: "a_small_ring_serves_more_than_it_holds", wish: Wish::small_ring, check: answered_once },
    Case { name: "a_plain_ring_serves_as_well", wish: Wish::plain_ring, check: answered_once },
    Case { name: "requests_of_another_service_are_refused", wish: Wish::of, check: another_service },
    Case { name: "many_requests_cross_together", wish: Wish::of, check: one_crossing },
    Case { name: "handles_of_a_lane_are_answered_apart", wish: Wish::of, check: handles_apart },
    Case { name: "a_lane_that_is_not_there_is_refused", wish: Wish::of, check: no_such_lane },
    Case { name: "one_client_of_a_lane_receives", wish: Wish::of, check: one_receiver },
    Case { name: "a_port_that_is_not_there_is_not_opened", wish: Wish::of, check: no_such_port },
    Case { name: "one_handle_is_revoked_and_the_others_go_on", wish: Wish::of, check: one_revoked },
    Case { name: "a_driver_that_left_is_loaded_again_on_the_same_device", wish: Wish::of, check: loaded_again },
];

fn service(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let class = fixture.wish.class;
    let offer = fixture.binding.offer().context("no offer")?;
    ensure!(offer.service() == class.service(), "{offer:?}");
    ensure!(fixture.binding.geometry().is_some() == (class == Class::Block), "{:?}", fixture.binding.geometry());
    let status = fixture.binding.status();
    ensure!(status.service == class.service() && status.state == "serving", "{status:?}");
    ensure!(status.requests_in_flight == 0 && status.fault.is_none(), "{status:?}");
    ensure!((status.leased_bytes > 0) == class.receives(), "what is posted: {} bytes", status.leased_bytes);
    Ok(())
}

fn answered_once(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(fixture.lane()?)?;
    let mut started = Vec::new();
    for number in 0..300 {
        started.push(client.ask(&fixture.ordinary(number))?);
    }
    for user in started {
        client.finish(user)?.result?;
    }
    ensure!(client.handle().in_flight() == 0 && client.surplus() == 0, "{} answers too many", client.surplus());
    let status = fixture.binding.status();
    ensure!(status.leased_bytes == fixture.posted_bytes && status.requests_in_flight == 0, "{status:?}");
    Ok(())
}

fn another_service(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(fixture.lane()?)?;
    let ops: [(Class, &[IoOp]); 4] = [
        (Class::Block, &[IoOp::Read, IoOp::Write, IoOp::Flush, IoOp::Discard, IoOp::WriteZeroes, IoOp::GetId]),
        (Class::Net, &[IoOp::Transmit]),
        (Class::Stream, &[IoOp::Send]),
        (Class::Entropy, &[IoOp::Fill]),
    ];
    for op in ops.into_iter().filter(|(class, _)| *class != fixture.wish.class).flat_map(|(_, ops)| ops) {
        let answer = client.one(*op, 0, 512, None)?;
        ensure!(answer.as_ref().err() == Some(&IoError::Unsupported), "{op:?} answered {answer:?}");
    }
    client.whole(&fixture.ordinary(0))??;
    Ok(())
}

fn one_crossing(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(fixture.lane()?)?;
    let crossings = || fixture.binding.status().calls.iter().map(|core| core.crossings).sum::<u64>();
    let asks: Vec<Ask> = (0..64).map(|number| fixture.ordinary(number)).collect();
    let before = crossings();
    let users = client.ask_all(&asks)?;
    let took = crossings() - before;
    ensure!(took < 8, "{took} crossings for 64 requests");
    for user in users {
        client.finish(user)?.result?;
    }
    Ok(())
}

/// Whoever looks first reaps for both; each must still get its own.
fn handles_apart(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lane = fixture.lane()?;
    let (mut first, mut second) = (fixture.client(lane)?, fixture.client(lane)?);
    for number in 0..50 {
        let a = first.ask(&fixture.ordinary(2 * number))?;
        let b = second.ask(&fixture.ordinary(2 * number + 1))?;
        second.finish(b)?.result?;
        first.finish(a)?.result?;
    }
    ensure!(first.surplus() + second.surplus() == 0, "somebody else's answers");
    Ok(())
}

fn no_such_lane(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lanes = fixture.binding.lanes();
    ensure!(lanes >= usize::from(fixture.wish.queues), "{lanes} lanes");
    for lane in [lanes, usize::MAX] {
        let refused = fixture.binding.open(HandleSpec { lane, ..HandleSpec::default() });
        ensure!(matches!(refused, Err(OpenError::NoSuchLane { .. })), "lane {lane} of {lanes}: {refused:?}");
    }
    Ok(())
}

fn one_receiver(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lane = fixture.lane()?;
    let spec = HandleSpec { lane, receives: true, ..HandleSpec::default() };
    if !fixture.wish.class.receives() {
        ensure!(matches!(fixture.binding.open(spec), Err(OpenError::Taken(_))), "nothing arrives here");
        ensure!(fixture.client(lane)?.handle().arrival_fd().is_none());
        return Ok(());
    }
    for _ in 0..3 {
        let first = fixture.receiver(lane)?;
        let second = fixture.binding.open(spec.clone());
        ensure!(matches!(second, Err(OpenError::Taken(taken)) if taken == lane), "{second:?}");
        drop(first);
    }
    Ok(())
}

/// The client's mistake is not the driver's.
fn no_such_port(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let refused = fixture.binding.set_open(77, true);
    let is_stream = fixture.wish.class == Class::Stream;
    ensure!(matches!(refused, Err(ControlError::NoStreams)) != is_stream && refused.is_err(), "{refused:?}");
    fixture.client(fixture.lane()?)?.whole(&fixture.ordinary(0))??;
    ensure!(fixture.binding.status().fault.is_none(), "{:?}", fixture.binding.status());
    Ok(())
}

fn one_revoked(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lane = fixture.lane()?;
    let (mut one, mut other) = (fixture.client(lane)?, fixture.client(lane)?);
    for number in 0..20 {
        one.ask(&fixture.ordinary(number))?;
    }
    let report = fixture.manager.revoke(fixture.binding.name(), one.handle().id(), fixture.patience())?;
    ensure!(report.requests_left == 0, "{report:?}");
    ensure!(one.handle().state() == HandleState::Revoked && one.handle().lease(64).is_err());
    for number in 20..40 {
        other.whole(&fixture.ordinary(number))??;
    }
    Ok(())
}

fn loaded_again(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    for round in 0..3 {
        let mut client = fixture.client(fixture.lane()?)?;
        for number in 0..10 {
            client.whole(&fixture.ordinary(number))?.with_context(|| format!("round {round}"))?;
        }
        drop(client);
        clean(&fixture.unload()?)?;
        ensure!(fixture.manager.bindings().is_empty(), "still registered");
        fixture.load().with_context(|| format!("after round {round}"))?;
    }
    Ok(())
}
