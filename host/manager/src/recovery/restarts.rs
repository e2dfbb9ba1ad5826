//! How often a driver that breaks down is replaced, and how soon. No clock of its own.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most restarts within a policy's time.
pub const MAX_RESTARTS: u32 = 10_000;

/// When a driver that broke down is replaced. The first time at once; with each further time within [`RestartPolicy::within`] the wait doubles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Restarts within [`RestartPolicy::within`], at most [`MAX_RESTARTS`]; with one more the binding is `failed`.
    pub limit: u32,
    /// The time that is looked back.
    pub within: Duration,
    /// The wait before the second restart. Zero: there is never a wait.
    pub backoff: Duration,
    /// The longest wait.
    pub longest: Duration,
}

impl Default for RestartPolicy {
    /// 5 in 30 minutes: at once, after 100 ms, 200 ms, 400 ms and 800 ms.
    fn default() -> RestartPolicy {
        RestartPolicy {
            limit: 5,
            within: Duration::from_secs(30 * 60),
            backoff: Duration::from_millis(100),
            longest: Duration::from_secs(10),
        }
    }
}

/// The restarts of one binding.
#[derive(Debug)]
pub(crate) struct Restarts {
    policy: RestartPolicy,
    /// When those within the policy's time were begun. At most [`MAX_RESTARTS`].
    begun: VecDeque<Instant>,
}

impl Restarts {
    pub(crate) fn new(policy: RestartPolicy) -> Restarts {
        Restarts { policy, begun: VecDeque::new() }
    }

    /// One more is wanted at `now`: how long to wait for it, or `None` if there were too many.
    pub(crate) fn next(&mut self, now: Instant) -> Option<Duration> {
        let RestartPolicy { limit, within, backoff, longest } = self.policy;
        while self.begun.front().is_some_and(|begun| now.saturating_duration_since(*begun) >= within) {
            self.begun.pop_front();
        }
        let before = u32::try_from(self.begun.len()).unwrap_or(u32::MAX);
        if before >= limit.min(MAX_RESTARTS) {
            return None;
        }
        self.begun.push_back(now);
        // After the first: once, twice, four times the wait.
        let Some(doublings) = before.checked_sub(1) else { return Some(Duration::ZERO) };
        Some(backoff.saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX)).min(longest))
    }

    /// An operator says that they do not count.
    pub(crate) fn forget(&mut self) {
        self.begun.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_first_restart_is_at_once_and_each_further_wait_is_double() {
        let mut restarts = Restarts::new(RestartPolicy::default());
        let now = Instant::now();
        let waits: Vec<_> = (0..6).map(|nth| restarts.next(now + nth * MS)).collect();
        let expected = [0, 100, 200, 400, 800].map(|wait| Some(wait * MS));
        assert_eq!(waits[..5], expected);
        assert_eq!(waits[5], None, "a sixth within 30 minutes");
    }

    #[test]
    fn what_is_long_past_does_not_count_and_what_was_refused_neither() {
        let policy = RestartPolicy { limit: 2, within: 1000 * MS, ..RestartPolicy::default() };
        let mut restarts = Restarts::new(policy);
        let now = Instant::now();
        assert_eq!((restarts.next(now), restarts.next(now + 500 * MS)), (Some(Duration::ZERO), Some(100 * MS)));
        assert_eq!(restarts.next(now + 999 * MS), None);
        assert_eq!(restarts.next(now + 1000 * MS), Some(100 * MS), "the first is long past");
        assert_eq!(restarts.next(now + 1001 * MS), None, "the second is not");
        restarts.forget();
        assert_eq!(restarts.next(now + 1001 * MS), Some(Duration::ZERO));
    }

    #[test]
    fn no_wait_is_longer_than_the_longest_and_none_overflows() {
        let policy = RestartPolicy { limit: 100, ..RestartPolicy::default() };
        let mut restarts = Restarts::new(policy);
        let now = Instant::now();
        let last = (0..100).map(|_| restarts.next(now)).last().flatten();
        assert_eq!(last, Some(policy.longest));
        let none = RestartPolicy { backoff: Duration::ZERO, ..policy };
        let mut restarts = Restarts::new(none);
        assert!((0..100).all(|_| restarts.next(now) == Some(Duration::ZERO)));
    }

    #[test]
    fn a_policy_without_restarts_has_none_and_no_policy_has_more_than_the_bound() {
        let now = Instant::now();
        assert_eq!(Restarts::new(RestartPolicy { limit: 0, ..RestartPolicy::default() }).next(now), None);
        let mut restarts = Restarts::new(RestartPolicy { limit: u32::MAX, ..RestartPolicy::default() });
        assert_eq!((0..MAX_RESTARTS + 5).filter_map(|_| restarts.next(now)).count(), MAX_RESTARTS as usize);
    }
}
