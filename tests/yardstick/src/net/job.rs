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

/// A slice by its windows. Its rate is that of the best of them: what else runs on a machine makes a window slower and never faster, and here both sides of a ring have to have their core
/// at the same time. For everybody windows are of one length, and nearly as many.
#[derive(Default)]
pub struct Windows {
    best: (u64, Duration),
    frames: u64,
}

/// Length of a window: what a scheduler leaves a thread that polls, more or less.
pub const WINDOW: Duration = Duration::from_millis(2);

impl Windows {
    /// A window of which it is not known when it began or ended: it counts for what was used.
    pub fn pass(&mut self, frames: u64) {
        self.frames += frames;
    }

    /// Another window.
    pub fn note(&mut self, frames: u64, took: Duration) {
        self.frames += frames;
        let rate = |(frames, took): (u64, Duration)| frames as f64 / took.as_secs_f64().max(1e-9);
        if rate((frames, took)) > rate(self.best) {
            self.best = (frames, took);
        }
    }

    /// Whether a rate can be told.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.best.0 == 0
    }

    /// The best window; times and counts are those of all windows, in proportion.
    #[must_use]
    pub fn slice(&self, times: Times, crossings: Option<u64>, allocations: u64) -> Slice {
        let (requests, elapsed) = self.best;
        let share = requests as f64 / self.frames.max(1) as f64;
        let count = |all: u64| (all as f64 * share) as u64;
        let times = Times {
            client: times.client.mul_f64(share),
            port: times.port.mul_f64(share),
            device: times.device.mul_f64(share),
        };
        let (crossings, allocations) = (crossings.map(count), count(allocations));
        Slice { requests, elapsed, crossings, allocations, times, ..Slice::default() }
    }
}

/// Moves frames for `warm_up`, then for `length`, which is counted by windows; then finishes. Also how many were moved in all.
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
    let (mut windows, start) = (Windows::default(), Instant::now());
    while start.elapsed() < length {
        let (frames, took) = turns(station, WINDOW)?;
        windows.note(frames, took);
    }
    let allocations = counting::allocations() - allocations;
    let times = times()?.since(before);
    let crossings = station.crossings().zip(crossings).map(|(after, before)| after - before);
    all += windows.frames + station.finish()?;
    Ok((windows.slice(times, crossings, allocations), all))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_as_fast_as_its_best_window_and_as_dear_as_all_of_them() {
        let mut windows = Windows::default();
        assert!(windows.is_empty());
        for (frames, took_ms) in [(100, 4), (300, 5), (300, 4), (100, 40)] {
            windows.note(frames, Duration::from_millis(took_ms));
        }
        let times = Times { client: Duration::from_millis(80), ..Times::default() };
        let slice = windows.slice(times, Some(8), 800);
        assert_eq!((slice.requests, slice.elapsed), (300, Duration::from_millis(4)));
        assert_eq!((slice.crossings, slice.allocations), (Some(3), 300));
        assert_eq!(slice.times.client, Duration::from_millis(30), "100 us per frame, as over all 800");
    }
}
