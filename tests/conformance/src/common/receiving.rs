//! What has to hold where something arrives by itself. The other side gives back what it is sent.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cofferdam_manager::{Arrivals, HandleState};

use crate::bed::{Class, Wish};
use crate::fixture::clean;
use crate::{Case, Client, Fixture};

pub(crate) const CASES: &[Case] = &[
    Case { name: "what_is_sent_comes_back_to_the_receiver", wish: Wish::of, check: comes_back },
    Case { name: "a_client_that_does_not_receive_gets_nothing", wish: Wish::of, check: does_not_receive },
    Case { name: "the_next_receiver_goes_on_where_the_last_one_stopped", wish: Wish::of, check: next_receiver },
    Case { name: "a_sleeping_receiver_is_woken_by_an_arrival", wish: Wish::of, check: woken },
    Case { name: "an_unload_with_arrivals_that_nobody_took_leaves_nothing", wish: Wish::of, check: nobody_took },
    Case { name: "arrivals_kept_over_an_unload_hold_nothing", wish: Wish::of, check: kept_arrivals },
    Case { name: "an_unload_under_traffic_both_ways_loses_no_answer", wish: Wish::of, check: unload_both_ways },
];

/// Sends the ordinary request of this number.
fn send(fixture: &Fixture<'_>, client: &mut Client, number: u64) -> anyhow::Result<()> {
    client.whole(&fixture.ordinary(number))?.context("sent").map(drop)
}

/// The numbers of what arrives, so many at least; all that came with it stays in `kept`.
fn numbers(fixture: &Fixture<'_>, client: &Client, count: usize, kept: &mut Arrivals) -> anyhow::Result<Vec<u64>> {
    let (mut numbers, deadline) = (Vec::new(), Instant::now() + fixture.patience());
    while numbers.len() < count {
        ensure!(Instant::now() < deadline, "{} of {count} came", numbers.len());
        let before = kept.len();
        client.receive(Duration::from_millis(20), kept);
        for arrival in kept.iter().skip(before) {
            numbers.extend(fixture.numbers(arrival)?);
        }
    }
    Ok(numbers)
}

/// As far as what arrives can tell it.
fn told(class: Class, number: u64) -> u64 {
    if class == Class::Stream { number & 0xff } else { number }
}

fn comes_back(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.receiver(fixture.lane()?)?;
    for number in 0..300 {
        send(fixture, &mut client, number)?;
        let came = numbers(fixture, &client, 1, &mut Arrivals::new())?;
        ensure!(came == [told(fixture.wish.class, number)], "{came:?} for {number}");
    }
    let status = fixture.binding.status();
    ensure!(status.arrivals >= 300 && status.leased_bytes == fixture.posted_bytes, "{status:?}");
    Ok(())
}

fn does_not_receive(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lane = fixture.lane()?;
    let mut client = fixture.client(lane)?;
    send(fixture, &mut client, 1)?;
    let receiver = fixture.receiver(lane)?;
    let mut kept = Arrivals::new();
    ensure!(numbers(fixture, &receiver, 1, &mut kept)? == [1]);
    send(fixture, &mut client, 2)?;
    ensure!(client.receive(Duration::ZERO, &mut kept) == 0, "it did not ask for it");
    ensure!(numbers(fixture, &receiver, 1, &mut kept)? == [2]);
    Ok(())
}

fn next_receiver(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lane = fixture.lane()?;
    for number in 0..20 {
        let mut client = fixture.receiver(lane)?;
        send(fixture, &mut client, number)?;
        let came = numbers(fixture, &client, 1, &mut Arrivals::new())?;
        ensure!(came == [number], "{came:?} for {number}");
    }
    Ok(())
}

fn woken(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let lane = fixture.lane()?;
    let (receiver, mut sender) = (fixture.receiver(lane)?, fixture.client(lane)?);
    let patience = fixture.patience();
    for number in 0..20 {
        // Only a look that found nothing makes it safe to sleep.
        while receiver.receive(Duration::ZERO, &mut Arrivals::new()) > 0 {}
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| receiver.sleep(patience));
            send(fixture, &mut sender, number)?;
            let woken = sleeper.join().map_err(|_| anyhow::anyhow!("the sleeper panicked"))?;
            ensure!(woken, "slept on over {number}");
            anyhow::Ok(())
        })?;
        ensure!(numbers(fixture, &receiver, 1, &mut Arrivals::new())? == [number]);
    }
    Ok(())
}

fn nobody_took(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.client(fixture.lane()?)?;
    for number in 0..50 {
        send(fixture, &mut client, number)?;
    }
    let certificate = fixture.unload()?;
    // What is posted is no request: nothing waits for it, and nothing is failed.
    ensure!(certificate.requests_at_close == 0 && certificate.requests_failed == 0, "{certificate:?}");
    clean(&certificate)
}

fn kept_arrivals(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let mut client = fixture.receiver(fixture.lane()?)?;
    let mut kept = Arrivals::new();
    for number in 0..10 {
        send(fixture, &mut client, number)?;
        numbers(fixture, &client, 1, &mut kept)?;
    }
    // With the client's handle still open, too.
    clean(&fixture.unload()?)?;
    for arrival in kept.iter() {
        let mut into = vec![1];
        let error = arrival.read(&mut into).err().map(|error| error.kind());
        ensure!(error == Some(ErrorKind::NotConnected) && into == [1], "{error:?}, {into:?}");
    }
    ensure!(client.receive(Duration::ZERO, &mut Arrivals::new()) == 0);
    client.handle().give_back();
    drop(kept);
    client.handle().give_back();
    Ok(())
}

/// One client sends and receives as fast as it can until the binding is taken from under it.
fn unload_both_ways(fixture: &mut Fixture<'_>) -> anyhow::Result<()> {
    let fixture: &Fixture<'_> = fixture;
    let (busy, wait_for_traffic) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let client = scope.spawn(move || traffic(fixture, &busy));
        let was_busy = wait_for_traffic.recv_timeout(fixture.patience()).is_ok();
        let certificate = fixture.unload()?;
        client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
        ensure!(was_busy, "there was no traffic");
        ensure!(certificate.requests_failed == 0, "{} failed", certificate.requests_failed);
        clean(&certificate)
    })
}

fn traffic(fixture: &Fixture<'_>, busy: &std::sync::mpsc::Sender<()>) -> anyhow::Result<()> {
    let class = fixture.wish.class;
    let client = fixture.receiver(fixture.lane()?)?;
    let (mut admitted, mut answered, mut came, mut told_busy) = (0_u64, 0_u64, 0_u64, false);
    let (mut done, mut arrivals) = (Vec::new(), Arrivals::new());
    while client.handle().state() == HandleState::Open {
        if admitted - came < 64 {
            let Ok(request) = fixture.ordinary(admitted).request(client.handle(), admitted) else { break };
            let mut one = vec![request];
            // Refused, it is full or the end: the state tells which.
            let _ = client.handle().submit(&mut one);
            admitted += u64::from(one.is_empty());
        }
        client.handle().poll(false, &mut done);
        answered += done.drain(..).count() as u64;
        client.receive(Duration::ZERO, &mut arrivals);
        for arrival in arrivals.iter() {
            // An error is the end: the device is silent.
            for number in fixture.numbers(arrival).unwrap_or_default() {
                ensure!(number == told(class, came) && came < admitted, "{number} came for {came} of {admitted}");
                came += 1;
            }
        }
        arrivals.clear();
        if came >= 200 && !std::mem::replace(&mut told_busy, true) {
            let _ = busy.send(());
        }
    }
    let patience = Instant::now() + fixture.patience();
    while answered < admitted && Instant::now() < patience {
        client.handle().poll(true, &mut done);
        answered += done.drain(..).count() as u64;
    }
    ensure!(answered == admitted, "{admitted} admitted, {answered} answered");
    Ok(())
}
