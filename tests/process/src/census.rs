//! What a process holds, looked up from outside.

use std::fmt;
use std::fs;
use std::path::Path;

/// Counts of what a process could leak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    /// Open descriptors.
    pub descriptors: usize,
    /// Mappings of memory files: everything that a device or a client shares is one.
    pub memory_mappings: usize,
    /// Threads, without those that the control API's library keeps for its next blocking call.
    pub threads: usize,
    /// What the descriptors refer to, for a message.
    targets: Vec<String>,
}

impl Census {
    /// Looks at process `pid`.
    pub fn of(pid: u32) -> Census {
        let list = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).into_iter().flatten().flatten();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let link = |entry: fs::DirEntry| fs::read_link(entry.path()).ok();
        let mut targets: Vec<_> = list("fd").filter_map(link).map(|target| target.display().to_string()).collect();
        targets.sort();
        Census {
            descriptors: targets.len(),
            memory_mappings: maps.lines().filter(|line| line.contains("/memfd:cofferdam-")).count(),
            threads: list("task").filter(|task| !is_idle_helper(&task.path())).count(),
            targets,
        }
    }

    /// Whether there is no more of anything than in `before`.
    pub fn fits_in(&self, before: &Census) -> bool {
        self.descriptors <= before.descriptors
            && self.memory_mappings <= before.memory_mappings
            && self.threads <= before.threads
    }
}

fn is_idle_helper(task: &Path) -> bool {
    fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("tokio-rt"))
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Census { descriptors, memory_mappings, threads, targets } = self;
        write!(f, "{descriptors} descriptors, {memory_mappings} mappings, {threads} threads: {}", targets.join(" "))
    }
}
