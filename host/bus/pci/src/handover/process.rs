//! Processes that outlive their numbers: a number and when it was given out.

use serde::{Deserialize, Serialize};

use crate::Sysfs;
use crate::sysfs::attribute;

/// A process of this boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22): numbers are used again. `None` where /proc does not say.
    pub start: Option<u64>,
}

impl ProcessId {
    /// The calling process.
    #[must_use]
    pub fn own(sysfs: &Sysfs) -> ProcessId {
        let pid = std::process::id();
        ProcessId { pid, start: start(sysfs, pid) }
    }

    /// Whether it still runs, as this process's /proc shows it. One whose start is not known counts as alive as long as any process has its number.
    #[must_use]
    pub fn is_alive(&self, sysfs: &Sysfs) -> bool {
        match (self.start, start(sysfs, self.pid)) {
            (Some(then), Some(now)) => then == now,
            (None, None) => sysfs.proc.is_dir(self.pid.to_string()) || self.pid == std::process::id(),
            (None, Some(_)) => true,
            (Some(_), None) => false,
        }
    }
}

fn start(sysfs: &Sysfs, pid: u32) -> Option<u64> {
    let stat = attribute(&sysfs.proc, format!("{pid}/stat"))?;
    // The name in parentheses may hold anything, blanks and parentheses among it: fields are counted from its end.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
