//! What this process holds, looked up in `/proc/self` (proc(5)).

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context;

/// How long a cycle's last threads may take to end, and descriptors to close, after everybody was told that the binding has gone: a thread that has signalled its end
/// still has to leave the kernel. Nothing is forgiven by it: what is still there afterwards counts.
const SETTLE: Duration = Duration::from_millis(200);

/// One look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Resident memory: anonymous, shared and of files.
    pub rss_kib: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Mappings.
    pub mappings: u64,
    /// Threads.
    pub threads: u64,
}

impl Census {
    /// Looks now.
    pub fn now() -> anyhow::Result<Census> {
        let status = fs::read_to_string("/proc/self/status")?;
        let field = |name: &str| {
            let text = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| name.to_owned())?;
            text.trim().trim_end_matches(" kB").parse::<u64>().with_context(|| name.to_owned())
        };
        let maps = fs::read("/proc/self/maps")?;
        Ok(Census {
            rss_kib: field("VmRSS:")?,
            // Without the one that this look is made with.
            descriptors: fs::read_dir("/proc/self/fd")?.count() as u64 - 1,
            mappings: maps.iter().filter(|byte| **byte == b'\n').count() as u64,
            threads: field("Threads:")?,
        })
    }

    /// Looks until there are no more descriptors and threads than in `before`, for a moment at most; the last look counts.
    pub fn settled(before: Option<&Census>) -> anyhow::Result<Census> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = Census::now()?;
            let is_calm =
                before.is_none_or(|before| now.descriptors <= before.descriptors && now.threads <= before.threads);
            if is_calm || Instant::now() >= deadline {
                return Ok(now);
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether what is left behind between two looks shows in the second.
    fn shows() -> bool {
        let before = Census::now().unwrap();
        let ballast = std::hint::black_box(vec![1_u8; 16 << 20]);
        let files: Vec<_> = (0..20).map(|_| fs::File::open("/proc/self/maps").unwrap()).collect();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        let after = Census::now().unwrap();
        drop((ballast, files, go));
        let _ = thread.join();
        after.descriptors >= before.descriptors + 15
            && after.rss_kib >= before.rss_kib + 12 * 1024
            // The ballast, and the thread's stack with its guard.
            && after.mappings > before.mappings
            && after.threads > 1
    }

    // Other tests of this program come and go meanwhile, and take with them what they had: so it is looked at more than once.
    #[test]
    fn what_is_left_behind_is_counted() {
        assert!((0..50).any(|_| shows()), "in none of 50 looks");
    }
}
