//! How fast what is left of a driver is put away: a little at a time, so that no client waits long for a core that is busy with it, and without a rest once somebody waits.

use std::time::{Duration, Instant};

use super::Crashes;

/// Between two steps, each of some ten microseconds of work: less than a tenth of a core.
const REST: Duration = Duration::from_micros(500);

/// Of the thread that puts things away.
pub(super) struct Pace<'a>(Option<&'a Crashes>);

impl<'a> Pace<'a> {
    pub(super) fn of(crashes: &'a Crashes) -> Pace<'a> {
        Pace(Some(crashes))
    }

    /// Without rests.
    #[cfg(test)]
    pub(super) fn hurried() -> Pace<'static> {
        Pace(None)
    }

    /// A step is done.
    pub(super) fn step(&self) {
        self.rest(REST);
    }

    /// Does nothing for so long, or until somebody waits.
    pub(super) fn rest(&self, long: Duration) {
        let Some(crashes) = self.0 else { return };
        let until = Instant::now() + long;
        let mut inside = crashes.inside.lock();
        while !inside.is_hurried() && !crashes.hurry.wait_until(&mut inside, until).timed_out() {}
    }
}
