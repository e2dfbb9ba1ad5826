//! Waiting for conditions, with a bound.

use std::time::{Duration, Instant};

use rustix::event::Timespec;

/// How long anything may take that does not wait for a deadline of the program under test. Far above what it takes, because the test machine is
/// shared; a test that fails by it hangs, it is not slow.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Time between two looks at a condition that nothing announces.
const LOOK: Duration = Duration::from_millis(3);

/// Looks until `condition` has a value, for at most [`PATIENCE`].
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(begin.elapsed() < PATIENCE, "waited {PATIENCE:?} for this: {what}");
        std::thread::park_timeout(LOOK);
    }
}

/// The same for a condition that is only true or false.
#[track_caller]
pub fn until_true(what: &str, mut condition: impl FnMut() -> bool) {
    until(what, || condition().then_some(()));
}

/// What is left until `deadline`, for `poll(2)`.
pub(crate) fn left(deadline: Instant) -> Timespec {
    let left = deadline.saturating_duration_since(Instant::now());
    Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(left.subsec_nanos()) }
}
