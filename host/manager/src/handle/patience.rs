//! How long a thread that waits for a device looks before it sleeps.
//!
//! To sleep and be woken costs some ten microseconds and two system calls on either side of the ring; to look costs a core. So a thread looks first, for as
//! long as that has paid lately:
//!
//! | | the next look |
//! | --- | --- |
//! | at first | as long as allowed |
//! | it found something | twice as long, from [`LEAST`] |
//! | it did not | half as long; below [`LEAST`] none |
//! | it did not, and the sleep after it was short too | twice as long as it was, from [`LEAST`] |
//! | [`REST`] waits without a look | as long as allowed, once: the device may be faster while nobody lets it sleep |
//!
//! "Short" is what the longest look would have caught: that long, and [`WAKING`] more, which is the sleep's own cost. "As long as allowed" is at most a
//! millisecond; [`Patience::DEFAULT`] is 50 us. A device that never answers in that time costs one look in [`REST`] waits. While nothing is in flight there is
//! nothing to look for: the caller does not begin.
//!
//! A port's thread does not tell of its sleeps. It stands between its client and the device, and where they have to share its core, short sleeps are when they
//! run: with 50 us of looking against them, two cores, qemu-storage-daemon and one NBD client, reads fell from 643 to 527 thousand a second at depth 128 and
//! from 43 to 28 at depth 1.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Shorter looks are not worth the clock.
const LEAST: Duration = Duration::from_micros(4);
/// What going to sleep and being woken takes by itself, roughly.
const WAKING: Duration = Duration::from_micros(25);
/// Waits that sleep at once after looking did not pay, before one looks again.
const REST: u32 = 64;
/// Looks between two readings of the clock, which cost about as much as half a look.
const LOOKS: u32 = 16;
/// Longest look that can be allowed.
const MOST: Duration = Duration::from_millis(1);

/// What one waiting thread has learnt; see the module's table. Its words have one user at a time, and they are atomics because that user may be another
/// thread next time.
#[derive(Debug)]
pub struct Patience {
    most_ns: u32,
    spin_ns: AtomicU32,
    /// How long the last look was to be.
    last_ns: AtomicU32,
    /// Waits since the last look.
    rested: AtomicU32,
}

impl Patience {
    /// Longest look where nobody says otherwise.
    pub const DEFAULT: Duration = Duration::from_micros(50);

    /// Looks for at most `most`, which is cut to a millisecond; with zero it never looks.
    #[must_use]
    pub fn new(most: Duration) -> Patience {
        let most_ns = nanos(most.min(MOST));
        Patience { most_ns, spin_ns: AtomicU32::new(most_ns), last_ns: AtomicU32::new(0), rested: AtomicU32::new(0) }
    }

    /// Calls `look` until it finds something, for as long as has paid lately and for no longer than `limit`. Whether it found something; if not, the caller
    /// asks for notifications, looks once more and sleeps, and may tell [`Patience::slept`].
    ///
    /// `look` is called without a pause and must not block. It is not called at all where looking has not paid.
    pub fn spin(&self, limit: Duration, mut look: impl FnMut() -> bool) -> bool {
        let whole = Duration::from_nanos(u64::from(self.length_ns()));
        let spin = whole.min(limit);
        self.last_ns.store(nanos(spin), Ordering::Relaxed);
        if spin.is_zero() {
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if look() {
                    self.grow(self.spin_ns.load(Ordering::Relaxed));
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= spin {
                if spin < whole {
                    // Cut short by the caller, it says nothing.
                    return false;
                }
                let half = self.spin_ns.load(Ordering::Relaxed) / 2;
                self.spin_ns.store(if half < nanos(LEAST) { 0 } else { half }, Ordering::Relaxed);
                return false;
            }
        }
    }

    /// The wait that [`Patience::spin`] began went on for that long in a sleep, until there was something or for as long as it was allowed to last.
    pub fn slept(&self, sleep: Duration) {
        let last_ns = self.last_ns.load(Ordering::Relaxed);
        let caught = Duration::from_nanos(u64::from(self.most_ns)) + WAKING;
        if sleep + Duration::from_nanos(u64::from(last_ns)) <= caught {
            self.grow(last_ns);
        }
    }

    /// How long to look this time.
    fn length_ns(&self) -> u32 {
        let spin_ns = self.spin_ns.load(Ordering::Relaxed);
        if spin_ns > 0 {
            return spin_ns;
        }
        let rested = self.rested.load(Ordering::Relaxed) + 1;
        let again = rested >= REST;
        self.rested.store(if again { 0 } else { rested }, Ordering::Relaxed);
        if again { self.most_ns } else { 0 }
    }

    /// Looks twice as long as `spin_ns` from now on.
    fn grow(&self, spin_ns: u32) {
        let twice = spin_ns.saturating_mul(2).max(nanos(LEAST)).min(self.most_ns);
        if self.spin_ns.load(Ordering::Relaxed) != twice {
            self.spin_ns.store(twice, Ordering::Relaxed);
        }
    }
}

/// Whole nanoseconds, as many as a word holds (four seconds).
fn nanos(time: Duration) -> u32 {
    u32::try_from(time.as_nanos()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a wait looks; the look is in vain and the sleep takes `sleep`.
    fn looks(patience: &Patience, sleep: Duration) -> bool {
        let mut looked = false;
        assert!(!patience.spin(Duration::MAX, || {
            looked = true;
            false
        }));
        patience.slept(sleep);
        looked
    }

    #[test]
    fn looking_that_does_not_pay_gives_the_core_back_and_is_tried_again_now_and_then() {
        let patience = Patience::new(Patience::DEFAULT);
        let long = Duration::from_millis(2);
        let first = (0..10).filter(|_| looks(&patience, long)).count();
        assert_eq!(first, 4, "50, 25, 12 and 6 us");
        let later = (0..10 * REST).filter(|_| looks(&patience, long)).count();
        assert_eq!(later, 10);
    }

    #[test]
    fn a_device_that_answers_soon_after_the_sleep_began_is_looked_for_again() {
        let patience = Patience::new(Patience::DEFAULT);
        while looks(&patience, Duration::from_secs(1)) {}
        let short = Duration::from_micros(40);
        assert!(!looks(&patience, short));
        assert_eq!(patience.length_ns(), nanos(LEAST));
        // Looks grow although each is in vain, until one would have caught it, and shrink when it gets too late for that.
        for microseconds in [8, 16, 32] {
            assert!(looks(&patience, short));
            assert_eq!(patience.length_ns(), microseconds * 1000);
        }
        assert!(looks(&patience, Duration::from_micros(60)));
        assert_eq!(patience.length_ns(), 16_000);
    }

    #[test]
    fn who_does_not_tell_of_sleeps_looks_for_as_long_as_it_finds_something() {
        let patience = Patience::new(Patience::DEFAULT);
        let in_vain = (0..REST).filter(|_| !patience.spin(Duration::MAX, || false)).count();
        assert_eq!((in_vain as u32, patience.spin_ns.load(Ordering::Relaxed)), (REST, 0));
        let mut waits = 1;
        while !patience.spin(Duration::MAX, || true) {
            waits += 1;
        }
        assert!(waits <= REST, "looked again after {waits} waits");
        assert_eq!(patience.length_ns(), nanos(LEAST));
        for _ in 0..4 {
            assert!(patience.spin(Duration::MAX, || true));
        }
        assert_eq!(patience.length_ns(), nanos(Patience::DEFAULT));
    }

    #[test]
    fn a_look_ends_with_the_caller_s_time_and_with_what_it_finds() {
        let patience = Patience::new(Duration::from_secs(100));
        assert_eq!(patience.length_ns(), nanos(MOST));
        assert!(!patience.spin(Duration::ZERO, || unreachable!("there is no time")));
        let mut calls = 0;
        assert!(patience.spin(Duration::MAX, || {
            calls += 1;
            calls == 3
        }));
        assert_eq!(calls, 3);
        let start = Instant::now();
        assert!(!patience.spin(Duration::from_micros(10), || false));
        assert!(start.elapsed() >= Duration::from_micros(10));
    }

    #[test]
    fn without_an_allowance_nobody_looks() {
        let patience = Patience::new(Duration::ZERO);
        for _ in 0..10 * REST {
            assert!(!looks(&patience, Duration::ZERO));
        }
    }
}
