//! How late this machine lets a thread run: what a pause may owe to the machine and not to the host.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::stats::percentile;

/// How long the sleeper sleeps: a thousand times a second, which costs a core a few per cent of nothing.
const SLEEP: Duration = Duration::from_millis(1);
/// The spinner takes a longer time between two looks at the clock for one in which it did not run.
const GAP_US: u32 = 20;

/// Microseconds, of some number of events.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Of how many.
    pub count: usize,
    /// The middle one.
    pub p50_us: f64,
    /// 99 of 100 are not longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Spread {
    /// Of these, in microseconds.
    #[must_use]
    pub fn of(mut micros: Vec<u32>) -> Spread {
        micros.sort_unstable();
        let max_us = micros.last().copied().map_or(f64::NAN, f64::from);
        Spread { count: micros.len(), p50_us: percentile(&micros, 500), p99_us: percentile(&micros, 990), max_us }
    }
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// How late a thread wakes that sleeps a millisecond at a time, until `stop` is set: beside what is measured.
#[must_use]
pub fn sleep_until(stop: &AtomicBool) -> Vec<u32> {
    let mut late = Vec::new();
    while !stop.load(Ordering::Acquire) {
        let begun = Instant::now();
        std::thread::sleep(SLEEP);
        late.push(micros(begun.elapsed().saturating_sub(SLEEP)));
    }
    late
}

/// For how long a thread does not run that does nothing but look at the clock, each time; alone, because it would take a core from what is measured.
#[must_use]
pub fn spin(length: Duration) -> Vec<u32> {
    let begun = Instant::now();
    let (mut gaps, mut last) = (Vec::new(), begun);
    while last.duration_since(begun) < length {
        let now = Instant::now();
        let gap = micros(now.duration_since(last));
        if gap >= GAP_US {
            gaps.push(gap);
        }
        last = now;
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_the_sorted() {
        let spread = Spread::of((1..=1000).rev().collect());
        assert_eq!((spread.count, spread.p50_us, spread.p99_us, spread.max_us), (1000, 501.0, 991.0, 1000.0));
        assert!(Spread::of(Vec::new()).max_us.is_nan());
    }

    #[test]
    fn what_stops_is_over() {
        let stop = AtomicBool::new(true);
        assert!(sleep_until(&stop).is_empty());
        assert!(spin(Duration::from_millis(2)).iter().all(|gap| *gap >= GAP_US));
    }
}
