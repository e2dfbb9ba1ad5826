//! What is moved, and the one loop in which every client in this process moves it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::counting;
use crate::engine::{PATIENCE, Slice, Times};

/// Which way frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum Direction {
    /// From the client to the device, which drops them.
    Send,
    /// From the device, which makes as many as there is room for, to the client, which drops them.
    Receive,
}

impl Direction {
    /// As in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Direction::Send => "send",
            Direction::Receive => "receive",
        }
    }
}

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job {
    /// Which way.
    pub direction: Direction,
    /// Bytes of every frame, with its link header and without its check sequence.
    pub bytes: u32,
    /// Frames that the device has at the most, sent or room for one: a power of two.
    pub depth: u16,
}

/// A client with a device, ready to work.
pub trait Station {
    /// One look: takes what the device is done with and gives it as much again. Never waits. How many frames.
    ///
    /// # Errors
    /// When a frame failed.
    fn turn(&mut self) -> Result<u64>;

    /// Gives the device nothing more and waits for frames that were sent, at most [`PATIENCE`]. How many were left.
    ///
    /// # Errors
    /// When the device keeps one.
    fn finish(&mut self) -> Result<u64>;

    /// Calls into a sandboxed driver so far, where there is one.
    fn crossings(&self) -> Option<u64> {
        None
    }
}

/// Looks until `done` says so.
///
/// # Errors
/// When that takes longer than [`PATIENCE`], or `done` fails.
pub fn within_patience(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done()? {
        ensure!(Instant::now() < deadline, "{what}");
    }
    Ok(())
}

/// Moves frames for `warm_up`, then for `length`, which is counted; then finishes. Also how many were moved in all.
///
/// # Errors
/// What the station says; a device that does not answer.
pub fn work(
    station: &mut dyn Station,
    warm_up: Duration,
    length: Duration,
    times: &dyn Fn() -> Result<Times>,
) -> Result<(Slice, u64)> {
    // The device may take a while to notice its new client.
    let mut all = 0;
    within_patience("the device takes or gives no frame", || {
        all += station.turn()?;
        Ok(all > 0)
    })?;
    all += turns(station, warm_up)?.0;
    let crossings = station.crossings();
    let before = times()?;
    let allocations = counting::allocations();
    let (requests, elapsed) = turns(station, length)?;
    let allocations = counting::allocations() - allocations;
    let times = times()?.since(before);
    let crossings = station.crossings().zip(crossings).map(|(after, before)| after - before);
    let slice = Slice { requests, elapsed, crossings, allocations, times, ..Slice::default() };
    all += requests + station.finish()?;
    Ok((slice, all))
}

fn turns(station: &mut dyn Station, length: Duration) -> Result<(u64, Duration)> {
    let start = Instant::now();
    let (mut frames, mut heard) = (0, start);
    loop {
        let mut moved = 0;
        // A look at the clock for every so many turns.
        for _ in 0..16 {
            moved += station.turn()?;
        }
        frames += moved;
        let now = Instant::now();
        if moved > 0 {
            heard = now;
        }
        ensure!(now - heard < PATIENCE, "the device does not answer");
        // On a busy machine the device may not have had a turn yet, and a rate of nothing is no figure.
        if now - start >= length && frames > 0 {
            return Ok((frames, now - start));
        }
    }
}
