//! What a process holds, so that two looks can be compared.
//!
//! A leak comes back each time; what is made once (a lazily started thread, an allocator's arena, a cached stack) does not. So a cell that seems to have grown is run again, and
//! only growth in every round counts.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// How much anonymous memory may differ between two looks, in KiB. The allocator gives pages back late and in pieces; it is told to use one arena and to trim early (see
/// `table`), and then idle processes of this test differ by up to some 600 KiB. The least that a binding could leave behind is a store with its instance:
/// its linear memory alone is over a MiB.
const ANONYMOUS_TOLERANCE_KIB: u64 = 1024;

/// Mappings more or less that are the allocator's and the thread library's: a trimmed heap splits one, a cached stack comes with its guard.
const MAPPINGS_TOLERANCE: usize = 4;

/// Regions of one binding that may be retired, each with its descriptor: rings, arena, and what the one client that maps has mapped.
const RETIRED_REGIONS: usize = 3;

/// What a process holds.
#[derive(Clone, Debug)]
pub struct Holdings {
    /// What its descriptors refer to, and how many do. Numbers of sockets and pipes are left out, memory files of bindings are not in here.
    descriptors: BTreeMap<String, usize>,
    /// Without those that the control API's library keeps for its next blocking call.
    threads: BTreeMap<String, usize>,
    /// Without those of bindings' memory.
    mappings: usize,
    /// Bytes of bindings' memory (memfds called `cofferdam-...`) that are mapped.
    binding_bytes: u64,
    /// Descriptors of bindings' memory.
    binding_descriptors: usize,
    anonymous_kib: u64,
}

impl Holdings {
    /// Looks at process `pid`; `self` is this one.
    #[must_use]
    pub fn of(pid: &str) -> Holdings {
        let entries = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).into_iter().flatten().flatten();
        let targets: Vec<String> = entries("fd")
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .map(|target| target.display().to_string())
            // The one that this look is made with.
            .filter(|target| !target.ends_with("/fd"))
            .collect();
        let (bindings, others): (Vec<_>, Vec<_>) =
            targets.into_iter().partition(|target| target.starts_with("/memfd:cofferdam-"));
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        let (memory, rest): (Vec<&str>, Vec<&str>) = maps.lines().partition(|line| line.contains("/memfd:cofferdam-"));
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        Holdings {
            descriptors: counted(others.iter().map(|target| kind(target))),
            threads: counted(
                entries("task").map(|task| thread_name(&task.path())).filter(|name| !name.starts_with("tokio-rt")),
            ),
            mappings: rest.len(),
            binding_bytes: memory.iter().map(|line| mapped_bytes(line)).sum(),
            binding_descriptors: bindings.len(),
            anonymous_kib: anonymous
                .and_then(|text| text.trim().trim_end_matches(" kB").parse().ok())
                .expect("RssAnon in /proc/PID/status"),
        }
    }

    /// What there is more of than in `before`, in words; `retired_bytes` of bindings' memory are there on purpose, and its descriptors may be.
    #[must_use]
    pub fn growth(&self, before: &Holdings, retired_bytes: u64) -> Vec<String> {
        let mut grown = Vec::new();
        let mut compare = |what: &str, now: &BTreeMap<String, usize>, then: &BTreeMap<String, usize>| {
            for (name, count) in now {
                let had = then.get(name).copied().unwrap_or(0);
                if *count > had {
                    grown.push(format!("{what} {name}: {count} instead of {had}"));
                }
            }
        };
        compare("descriptors of", &self.descriptors, &before.descriptors);
        compare("threads called", &self.threads, &before.threads);
        if self.mappings > before.mappings + MAPPINGS_TOLERANCE {
            grown.push(format!("{} mappings instead of {}", self.mappings, before.mappings));
        }
        let more_bytes = self.binding_bytes.saturating_sub(before.binding_bytes);
        if more_bytes != retired_bytes {
            grown.push(format!(
                "{more_bytes} bytes of bindings' memory, of which {retired_bytes} were declared as retired"
            ));
        }
        let may_have = before.binding_descriptors + if retired_bytes > 0 { RETIRED_REGIONS } else { 0 };
        if self.binding_descriptors > may_have {
            grown.push(format!("{} descriptors of bindings' memory instead of {may_have}", self.binding_descriptors));
        }
        if self.anonymous_kib > before.anonymous_kib + ANONYMOUS_TOLERANCE_KIB {
            grown.push(format!("{} KiB of anonymous memory instead of {}", self.anonymous_kib, before.anonymous_kib));
        }
        grown
    }
}

fn counted(names: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    names.for_each(|name| *counts.entry(name).or_default() += 1);
    counts
}

/// A descriptor's target without the number that tells it from others of its kind.
fn kind(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, _)) => kind.to_owned(),
        None => target.to_owned(),
    }
}

fn thread_name(task: &Path) -> String {
    let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
    // A pool's threads differ by a number.
    name.trim().trim_end_matches(|c: char| c.is_ascii_digit()).to_owned()
}

/// Length of the range at the start of a line of `/proc/PID/maps` (proc(5)).
fn mapped_bytes(line: &str) -> u64 {
    let range = line.split(' ').next().and_then(|range| range.split_once('-'));
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    range.and_then(|(from, to)| hex(to)?.checked_sub(hex(from)?)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_behind_is_seen() {
        let before = Holdings::of("self");
        assert_eq!(before.growth(&before, 0), [""; 0]);
        let file = fs::File::open("/proc/self/maps").unwrap();
        let ballast = std::hint::black_box(vec![1_u8; 8 << 20]);
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("left-behind".into()).spawn(move || wait.recv()).unwrap();
        // A thread has its name some moments after it runs.
        let grown = loop {
            let grown = Holdings::of("self").growth(&before, 0).join("; ");
            if grown.contains("left-behind") {
                break grown;
            }
        };
        for word in ["maps: 1 instead of 0", "KiB of anonymous memory"] {
            assert!(grown.contains(word), "{grown}");
        }
        drop((file, ballast, go));
        let _ = thread.join();
        let missing = Holdings::of("self").growth(&before, 4096).join("; ");
        assert!(missing.contains("0 bytes of bindings' memory, of which 4096"), "{missing}");
    }
}
