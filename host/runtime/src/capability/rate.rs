//! How much one driver may say: lines per second over all its lanes, the rest counted.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

const SECOND: Duration = Duration::from_secs(1);

/// Shared by all instances of one driver of one binding and generation.
#[derive(Debug)]
pub(crate) struct LogRate {
    lines_per_s: u32,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    lines: u32,
    dropped: u64,
}

/// What to do with one line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Admission {
    /// Write it, or it was counted as dropped.
    pub(crate) write: bool,
    /// Lines dropped in the second before; to be told now, if not 0.
    pub(crate) dropped_before: u64,
}

impl LogRate {
    pub(crate) fn new(lines_per_s: u32, now: Instant) -> LogRate {
        LogRate { lines_per_s, window: Mutex::new(Window { began: now, lines: 0, dropped: 0 }) }
    }

    /// One line more.
    pub(crate) fn admit(&self, now: Instant) -> Admission {
        let mut window = self.window.lock();
        let dropped_before = window.roll(now);
        let write = window.lines < self.lines_per_s;
        if write {
            window.lines += 1;
        } else {
            window.dropped += 1;
        }
        Admission { write, dropped_before }
    }

    /// Lines dropped and not told yet; for the last words of a driver.
    pub(crate) fn take_dropped(&self) -> u64 {
        std::mem::take(&mut self.window.lock().dropped)
    }
}

impl Window {
    fn roll(&mut self, now: Instant) -> u64 {
        if now.saturating_duration_since(self.began) < SECOND {
            return 0;
        }
        self.began = now;
        self.lines = 0;
        std::mem::take(&mut self.dropped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_what_was_dropped_is_told_once_in_the_next_second() {
        let start = Instant::now();
        let rate = LogRate::new(1_000, start);
        let written = (0..5_000).filter(|_| rate.admit(start).write).count();
        assert_eq!(written, 1_000);
        let later = start + SECOND;
        assert_eq!(rate.admit(later), Admission { write: true, dropped_before: 4_000 });
        assert_eq!(rate.admit(later), Admission { write: true, dropped_before: 0 });
        assert_eq!(rate.take_dropped(), 0);
    }

    #[test]
    fn what_was_dropped_last_can_still_be_told() {
        let start = Instant::now();
        let rate = LogRate::new(0, start);
        assert!(!rate.admit(start).write);
        assert_eq!(rate.take_dropped(), 1);
    }
}
