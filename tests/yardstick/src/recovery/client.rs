//! A closed loop over NBD that counts what is answered in each second, and notes when nothing was for a while.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};

use crate::clients::nbd::NbdClient;
use crate::engine::{Engine as _, Io, Job};

/// Shorter ones are not noted.
pub const NOTED_US: u64 = 50;
/// Most that are noted: 24 MB.
const MOST: usize = 1_000_000;

/// A while between two answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Microseconds since 1970.
    pub from_us: u64,
    /// Microseconds since 1970.
    pub to_us: u64,
}

impl Gap {
    /// Its length in microseconds.
    #[must_use]
    pub fn length_us(self) -> u64 {
        self.to_us - self.from_us
    }
}

/// What a client has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Answers by second since 1970; the first and the last one are not whole.
    pub answers: BTreeMap<u64, u64>,
    /// In their order.
    pub gaps: Vec<Gap>,
}

impl Seen {
    /// The longest time without an answer that has a part in `from_us..to_us`, in microseconds; shorter than [`NOTED_US`] it is 0.
    #[must_use]
    pub fn longest_us(&self, from_us: u64, to_us: u64) -> u64 {
        let first = self.gaps.partition_point(|gap| gap.to_us < from_us);
        let within = self.gaps[first..].iter().take_while(|gap| gap.from_us <= to_us);
        within.map(|gap| gap.length_us()).max().unwrap_or(0)
    }
}

/// Microseconds since 1970.
#[must_use]
pub fn unix_us() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

/// Keeps `job.depth` requests in flight until `stop` is set; what is in flight then is waited for.
///
/// # Errors
/// When a request fails, or none is answered for long.
pub fn run(client: &mut NbdClient, job: Job, stop: &AtomicBool) -> Result<Seen> {
    client.prepare(job)?;
    let blocks = client.capacity() / u64::from(job.op.bytes());
    let (begun, begun_us) = (Instant::now(), unix_us());
    let now_us = || begun_us + begun.elapsed().as_micros() as u64;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut seen = Seen { gaps: Vec::with_capacity(1 << 16), ..Seen::default() };
    let mut free: Vec<u32> = (0..job.depth).collect();
    let (mut done, mut batch, mut in_flight, mut last) = (Vec::new(), Vec::new(), 0, now_us());
    loop {
        let stops = stop.load(Ordering::Acquire);
        if !stops && !free.is_empty() {
            batch.clear();
            batch.extend(free.drain(..).map(|tag| {
                // xorshift64 (Marsaglia 2003).
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                Io { tag, offset: state % blocks * u64::from(job.op.bytes()) }
            }));
            in_flight += batch.len();
            client.submit(&batch)?;
        }
        if in_flight == 0 {
            return Ok(seen);
        }
        done.clear();
        client.reap(&mut done)?;
        if done.is_empty() {
            continue;
        }
        let now = now_us();
        if now - last >= NOTED_US {
            ensure!(seen.gaps.len() < MOST, "more than {MOST} times without an answer");
            seen.gaps.push(Gap { from_us: last, to_us: now });
        }
        *seen.answers.entry(now / 1_000_000).or_insert(0) += done.len() as u64;
        in_flight -= done.len();
        free.append(&mut done);
        last = now;
    }
}

/// A tenth of a second: how often those who wait for nothing in particular look.
pub const LOOK: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_found_by_any_part_of_it() {
        let gap = |from_us, to_us| Gap { from_us, to_us };
        let seen = Seen { gaps: vec![gap(0, 100), gap(200, 900), gap(1000, 1100)], ..Seen::default() };
        let of = [(0, 50), (150, 199), (150, 200), (500, 600), (900, 1000), (1101, 2000)];
        assert_eq!(of.map(|(from, to)| seen.longest_us(from, to)), [100, 0, 700, 700, 700, 0]);
    }
}
