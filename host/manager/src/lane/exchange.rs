//! A lane whose driver is exchanged while it works, and how long its calls take meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_runtime::{Instance, LaneDriver, LaneSetup};

use super::inside::{Inside, Sink};
use super::revive::Health;
use super::{Lane, Lease};
use crate::binding::Binding;

/// Calls that are remembered.
const REMEMBERED: usize = 256;

/// How long the last calls took, in nanoseconds.
#[derive(Default)]
pub(crate) struct Timing {
    last: Vec<u32>,
    count: u32,
}

impl Timing {
    fn note(&mut self, took: Duration) {
        let took = u32::try_from(took.as_nanos()).unwrap_or(u32::MAX);
        let place = self.count as usize % REMEMBERED;
        match self.last.get_mut(place) {
            Some(old) => *old = took,
            None => self.last.push(took),
        }
        self.count = self.count.saturating_add(1);
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn last(&self) -> &[u32] {
        &self.last
    }
}

impl Inside {
    /// When a call of the driver begins, if calls are measured. Otherwise no clock is read.
    #[inline]
    pub(super) fn begun(&self) -> Option<Instant> {
        self.timing.as_ref().map(|_| Instant::now())
    }

    /// It has ended.
    #[inline]
    pub(super) fn ended(&mut self, begun: Option<Instant>) {
        if let (Some(begun), Some(timing)) = (begun, &mut self.timing) {
            timing.note(begun.elapsed());
        }
    }
}

/// A lane that nobody's call is in, for as long as this is held.
pub(crate) struct Vacant<'a>(pub(super) Lease<'a>);

impl Vacant<'_> {
    /// Whether it has a driver that can be called.
    pub(crate) fn works(&self) -> bool {
        self.0.health == Health::Works && self.0.driver.is_some()
    }

    /// How long a median call of its driver took; measured anew from here on.
    pub(crate) fn median(&mut self) -> Option<Duration> {
        self.0.timing.replace(Box::default()).and_then(|timing| timing.median())
    }

    /// Puts a driver in the place of the one that is there.
    pub(crate) fn exchange(&mut self, driver: Instance, made_of: u64) -> Option<Box<dyn LaneDriver>> {
        // What the device has used is answered with the driver that is there; nothing is asked of it that way.
        self.0.made_of = made_of;
        self.0.driver.replace(Box::new(driver))
    }
}

impl Lane {
    /// The lane without anybody in it; `None` if that was not so by `until`.
    pub(crate) fn vacant(&self, until: Instant) -> Option<Vacant<'_>> {
        self.inside.try_lock_until(until).map(|inside| Vacant(Lease(inside)))
    }

    /// What a driver is started with whose control lane says `state`.
    pub(crate) fn setup(&self, state: &[u8]) -> LaneSetup {
        LaneSetup { state: state.to_vec(), ..self.setup.clone() }
    }

    /// Whether calls of the driver are measured from now on.
    pub(crate) fn time_calls(&self, on: bool) {
        self.lease().timing = on.then(Box::default);
    }

    /// How long the median of its driver's last calls took; `None` while somebody has the lease, and as long as there were few.
    pub(crate) fn median(&self) -> Option<Duration> {
        self.try_lease()?.timing.as_ref()?.median()
    }

    /// Whether its driver has been called since calls are measured, or is being called.
    pub(crate) fn is_called(&self) -> bool {
        self.try_lease().is_none_or(|lease| lease.timing.as_ref().is_some_and(|timing| timing.count() > 0))
    }

    /// Replaces a driver that is made of something else than instances are now.
    pub(crate) fn catch_up(&self, binding: &Arc<Binding>) {
        let number = binding.recovery.get().and_then(|recovery| recovery.version()).map(|version| version.number);
        let mut lease = self.lease();
        let inside = &mut *lease;
        if inside.health == Health::Works && inside.driver.is_some() && Some(inside.made_of) != number {
            self.bring_up(inside, binding, None);
            self.reap(inside, true, true, &mut Sink { me: None, out: &mut Vec::new() });
        }
        lease.wake_all();
    }
}
