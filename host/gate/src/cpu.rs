//! Which core this thread runs on, and how many rows of counters that makes.

/// The index of a row of counters, below [`rows`]. Checked once, then carried as a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row(u32);

impl Row {
    #[inline]
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }

    /// Every row, in order.
    pub(crate) fn all() -> impl Iterator<Item = Row> {
        (0..rows() as u32).map(Row)
    }
}

#[cfg(not(loom))]
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_imports, reason = "sections ask for the cores"))]
pub(crate) use real::{cores, current, homeless, rows};

#[cfg(not(loom))]
mod real {
    #![allow(unsafe_code)]

    use std::sync::OnceLock;

    use super::Row;

    /// Cores beyond this bound share the homeless row. Linux itself stops at 8192.
    const MAX_CORES: u32 = 8192;

    /// One more than the largest core number that this machine can ever show.
    pub(crate) fn cores() -> u32 {
        static CORES: OnceLock<u32> = OnceLock::new();
        *CORES.get_or_init(|| possible().unwrap_or_else(mask_bits).clamp(1, MAX_CORES))
    }

    /// Rows per set of counters: one per core, and one for threads whose core is not known.
    pub(crate) fn rows() -> usize {
        cores() as usize + 1
    }

    /// The row that belongs to no core.
    pub(crate) fn homeless() -> Row {
        Row(cores())
    }

    /// The row of the core that this thread runs on. It may run on another one by the time that
    /// the row is used, so what is counted there must be counted atomically.
    pub(crate) fn current() -> Row {
        if cfg!(miri) {
            return homeless();
        }
        // SAFETY: takes no arguments and touches no memory of ours. The C library answers from
        // the rseq area, else by getcpu in the vDSO: no system call.
        let cpu = unsafe { libc::sched_getcpu() };
        u32::try_from(cpu).ok().filter(|cpu| *cpu < cores()).map_or_else(homeless, Row)
    }

    /// One more than the last number in the kernel's list of possible cores ("0-1", "0,2-5").
    fn possible() -> Option<u32> {
        let list = std::fs::read_to_string("/sys/devices/system/cpu/possible").ok()?;
        let last = list.trim().rsplit([',', '-']).next()?.parse::<u32>().ok()?;
        last.checked_add(1)
    }

    /// Without `/sys`: the bits of the kernel's own affinity mask, never fewer than its cores.
    fn mask_bits() -> u32 {
        let mut mask = [0u8; MAX_CORES as usize / 8];
        // SAFETY: the kernel writes at most `mask.len()` bytes to `mask`.
        let bytes = unsafe { libc::syscall(libc::SYS_sched_getaffinity, 0, mask.len(), mask.as_mut_ptr()) };
        u32::try_from(bytes).map_or(MAX_CORES, |bytes| bytes * 8)
    }
}

/// The model has two cores, and a thread moves when it says so.
#[cfg(loom)]
pub(crate) fn rows() -> usize {
    crate::model::CORES
}

#[cfg(loom)]
pub(crate) fn current() -> Row {
    Row(crate::model::current_core())
}

#[cfg(loom)]
pub(crate) fn homeless() -> Row {
    unreachable!("every thread of the model has a core")
}
