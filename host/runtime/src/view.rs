//! What an instance is doing, for whoever wants to know while it does it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::activity::{Activity, Reading};
use crate::fault::GuestFault;
use crate::text::clean;

/// Longest thread name that the kernel keeps is 15 bytes; every one may be escaped.
const MAX_THREAD_NAME_BYTES: usize = 32;

/// A look at one instance from outside, given to it at its making. Answers from any thread and at any time, also while the guest is stuck: nothing here waits for a
/// lock that a call holds. Cloning is cheap; the view outlives its instance.
///
/// A view shows the first instance that it was given to.
#[derive(Clone, Debug, Default)]
pub struct CallView {
    activity: Arc<Activity>,
}

/// A call that is running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunningCall {
    /// The guest's export, by its name in `wit/`: `submit`; or `instantiate` for its start functions.
    pub export: &'static str,
    /// The host's function that the guest is in: `log.write`, `virtio.device.read-config`, or the interface for WASI: `wasi:io/poll`. Of WASI functions other than that,
    /// the end is noticed one tick of 10 ms late.
    pub import: Option<&'static str>,
    /// Since the call was noticed: short by a tick of 10 ms at most, or 100 ms for a first call after a pause. Never too long.
    pub age: Duration,
    /// The kernel's id of the thread that makes the call.
    pub thread: u32,
    /// The kill switch was thrown: the guest ends at its next loop head or function entry.
    pub interrupted: bool,
    sequence: u32,
}

/// Which thread a call is on, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    /// The thread's name, control characters escaped.
    pub thread: String,
    /// The core that it is on, or was last on.
    pub core: u32,
}

impl CallView {
    /// A view that shows nothing yet.
    #[must_use]
    pub fn new() -> CallView {
        CallView::default()
    }

    /// Whether nobody else has it any more: neither its instance, nor who is about to make one.
    #[must_use]
    pub fn is_last(&self) -> bool {
        Arc::strong_count(&self.activity) == 1
    }

    /// The instance's last calls, the latest first and at most 16: the export, and the import that it was in last. Meant for an instance that is over.
    #[must_use]
    pub fn recent(&self) -> Vec<(&'static str, Option<&'static str>)> {
        self.activity.recent()
    }

    pub(crate) fn activity(&self) -> &Arc<Activity> {
        &self.activity
    }

    /// The call that is running now. All of the answer is about one and the same call.
    #[must_use]
    pub fn running(&self) -> Option<RunningCall> {
        let reading = self.activity.reading();
        reading.is_inside().then(|| RunningCall {
            export: reading.export(),
            import: reading.import(),
            age: self.activity.age(reading),
            thread: reading.thread(),
            interrupted: self.activity.is_killed(),
            sequence: Reading::sequence(reading),
        })
    }

    /// The thread and core of a call that was found running; `None` once it has ended.
    #[must_use]
    pub fn whereabouts(&self, call: &RunningCall) -> Option<Whereabouts> {
        let task = format!("/proc/self/task/{}", call.thread);
        let name = std::fs::read_to_string(format!("{task}/comm")).ok()?;
        let stat = std::fs::read_to_string(format!("{task}/stat")).ok()?;
        // What was read is about the caller's thread only if the call is still on: a thread may end and its number be given to another.
        let still = self.is_in(call);
        let thread = clean(name.trim_end(), MAX_THREAD_NAME_BYTES);
        still.then_some(Whereabouts { thread, core: core_of(&stat)? })
    }

    /// Whether this very call is still running.
    #[must_use]
    pub fn is_in(&self, call: &RunningCall) -> bool {
        self.activity.reading().sequence() == call.sequence
    }

    /// Has the guest note where it is when the next tick (10 ms) finds it in code of its own. It goes on as before.
    pub fn ask_backtrace(&self) {
        self.activity.ask();
    }

    /// What came of [`CallView::ask_backtrace`] in this call: guest frames, innermost first. Waits until `until` at most; `None` if the call ended or spent that time in an import.
    #[must_use]
    pub fn backtrace(&self, call: &RunningCall, until: Instant) -> Option<Vec<String>> {
        self.activity.told(call.sequence, until)
    }

    /// Throws the kill switch of the instance, also if that is only about to be made: its start functions then end before they begin. See [`KillSwitch`](crate::KillSwitch).
    pub fn kill(&self) {
        self.activity.kill();
    }

    /// The fault that ended the instance, or that kept it from being made.
    #[must_use]
    pub fn fault(&self) -> Option<&GuestFault> {
        self.activity.fault()
    }
}

/// Field 39 of `/proc/PID/stat` (proc_pid_stat(5)). The name in field 2 may hold anything, so the count starts at its end.
fn core_of(stat: &str) -> Option<u32> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(39 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        assert_eq!(core_of(&format!("1 (a) b) S ({})) {}\n", "x".repeat(9), fields.join(" "))), Some(39));
        assert_eq!(core_of("1 (short) S 1"), None);
        assert_eq!(core_of(""), None);
    }

    #[test]
    fn a_view_without_an_instance_shows_nothing() {
        let view = CallView::new();
        assert_eq!((view.running(), view.fault()), (None, None));
    }
}
