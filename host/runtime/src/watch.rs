//! The clock of one guest call.
//!
//! The hot path reads no clock: a call's time starts at the first epoch tick that falls into it (10 ms apart at most while guests run, see
//! `pulse`), so a call may run up to two ticks longer than its deadline and a call that sees no tick costs nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::activity::{Activity, Import};
use crate::fault::Interrupt;
use crate::kill::KillSwitch;
use crate::limits::GuestLimits;

/// Deadline, kill switch and host time of the call that is running, and what it shows to the outside.
#[derive(Debug)]
pub(crate) struct Watch {
    kill: KillSwitch,
    activity: Arc<Activity>,
    deadline: Duration,
    host_budget: Duration,
    /// First tick seen in this call, moved later by what the host spent since.
    started: Option<Instant>,
    /// Time spent in imports during this call.
    host_time: Duration,
}

impl Watch {
    pub(crate) fn new(kill: KillSwitch, activity: Arc<Activity>, limits: &GuestLimits) -> Watch {
        Watch {
            kill,
            activity,
            deadline: Duration::from_millis(limits.call_deadline_ms),
            host_budget: Duration::from_millis(limits.host_budget_ms),
            started: None,
            host_time: Duration::ZERO,
        }
    }

    /// A call begins. Fails if the switch was thrown while nothing ran.
    pub(crate) fn begin(&mut self) -> Result<(), Interrupt> {
        self.started = None;
        self.host_time = Duration::ZERO;
        if self.kill.is_killed() { Err(Interrupt::Killed) } else { Ok(()) }
    }

    /// The words that say what the guest is doing.
    pub(crate) fn activity(&self) -> &Activity {
        &self.activity
    }

    /// The same, for as long as they are wanted.
    pub(crate) fn shared_activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// An epoch tick in code of the guest's own: whatever import it was in last, it is out of it.
    pub(crate) fn epoch(&mut self, now: Instant) -> Result<(), Interrupt> {
        self.activity.no_import();
        self.tick(now)
    }

    /// An epoch's worth of time has passed in the guest or in a wait of its own.
    pub(crate) fn tick(&mut self, now: Instant) -> Result<(), Interrupt> {
        if self.kill.is_killed() {
            return Err(Interrupt::Killed);
        }
        let started = *self.started.get_or_insert(now);
        if now.saturating_duration_since(started) > self.deadline {
            return Err(Interrupt::Deadline { limit_ms: millis(self.deadline) });
        }
        Ok(())
    }

    /// Runs a host call for the guest: its time is not the guest's, but all host calls of one guest call have a budget too.
    pub(crate) fn host_call<R>(&mut self, import: Import, call: impl FnOnce() -> R) -> Result<R, Interrupt> {
        if self.kill.is_killed() {
            return Err(Interrupt::Killed);
        }
        if self.host_time > self.host_budget {
            return Err(Interrupt::HostBudget { limit_ms: millis(self.host_budget) });
        }
        let before = Instant::now();
        let result = {
            let _within = self.activity.within(import);
            call()
        };
        let spent = before.elapsed();
        self.host_time += spent;
        if let Some(started) = &mut self.started {
            *started += spent;
        }
        Ok(result)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(kill: &KillSwitch) -> Watch {
        Watch::new(kill.clone(), Arc::default(), &GuestLimits::default())
    }

    fn watch_import(activity: &Activity) -> Option<&'static str> {
        activity.reading().import()
    }

    #[test]
    fn the_deadline_counts_from_the_first_tick_of_each_call() {
        let mut watch = watch(&KillSwitch::new());
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        watch.begin().unwrap();
        watch.tick(after(0)).unwrap();
        watch.tick(after(100)).unwrap();
        assert_eq!(watch.tick(after(101)), Err(Interrupt::Deadline { limit_ms: 100 }));
        watch.begin().unwrap();
        watch.tick(after(500)).unwrap();
    }

    #[test]
    fn host_time_is_not_the_guests() {
        let mut watch = watch(&KillSwitch::new());
        watch.begin().unwrap();
        let start = Instant::now();
        watch.tick(start).unwrap();
        // What a host call of 250 ms leaves behind, without sleeping for it.
        watch.started = Some(start + Duration::from_millis(250));
        watch.tick(start + Duration::from_millis(340)).unwrap();
        assert!(watch.tick(start + Duration::from_millis(351)).is_err());
    }

    #[test]
    fn host_time_has_a_budget_of_its_own() {
        let mut watch = watch(&KillSwitch::new());
        let activity = Arc::clone(&watch.activity);
        watch.begin().unwrap();
        watch.host_time = Duration::from_millis(10_001);
        assert_eq!(watch.host_call(Import::MaxQueues, || ()), Err(Interrupt::HostBudget { limit_ms: 10_000 }));
        watch.begin().unwrap();
        assert_eq!(
            watch.host_call(Import::MaxQueues, || watch_import(&activity)),
            Ok(Some("virtio.device.max-queues"))
        );
        assert_eq!(watch_import(&activity), None);
    }

    #[test]
    fn a_thrown_switch_stops_the_next_call_tick_and_host_call() {
        let kill = KillSwitch::new();
        let mut watch = watch(&kill);
        watch.begin().unwrap();
        kill.kill();
        assert_eq!(watch.tick(Instant::now()), Err(Interrupt::Killed));
        assert_eq!(watch.host_call(Import::MaxQueues, || ()), Err(Interrupt::Killed));
        assert_eq!(watch.begin(), Err(Interrupt::Killed));
    }
}
