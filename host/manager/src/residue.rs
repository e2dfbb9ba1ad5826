//! Looks up what a binding left behind (L7): mappings and descriptors are searched in `/proc/self`, not remembered.
//!
//! While a binding is alive, [`Marks`] collects how its memory and descriptors can be recognised: the name of its memfds, and for each
//! event descriptor and socket the number that the kernel gave it, which no later descriptor shares.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};

/// How a binding's traces in this process are recognised.
#[derive(Clone, Debug, Default)]
pub(crate) struct Marks {
    /// Name of the memfds; unique in this process.
    pub(crate) memory: String,
    /// Kernel names of other descriptors: `eventfd-id:12`, `socket:[3456]`.
    descriptors: Vec<String>,
}

impl Marks {
    pub(crate) fn new(memory: String) -> Marks {
        Marks { memory, descriptors: Vec::new() }
    }

    /// Remembers a descriptor by the kernel's own number for what it refers to. One that has no such number is left out.
    pub(crate) fn note(&mut self, fd: BorrowedFd<'_>) {
        if let Some(mark) = kernel_name(&fd.as_raw_fd().to_string()) {
            self.descriptors.push(mark);
        }
    }

    /// Mappings of the binding's memory in this process, and their bytes.
    pub(crate) fn mappings(&self) -> (u64, u64) {
        if self.memory.is_empty() {
            return (0, 0);
        }
        let needle = format!("/memfd:{}-", self.memory);
        let maps = fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let found = maps.lines().filter(|line| line.contains(&needle)).map(mapped_bytes);
        found.fold((0, 0), |(count, sum), bytes| (count + 1, sum + bytes))
    }

    /// Descriptors of the binding that are open in this process, with or without those of its memory.
    pub(crate) fn open_descriptors(&self, with_memory: bool) -> u64 {
        let needle = format!("/memfd:{}-", self.memory);
        let Ok(entries) = fs::read_dir("/proc/self/fd") else { return 0 };
        entries
            .flatten()
            .filter(|entry| {
                let number = entry.file_name();
                let number = number.to_string_lossy();
                let target = fs::read_link(entry.path()).unwrap_or_default();
                let is_memory = with_memory && !self.memory.is_empty() && target.to_string_lossy().starts_with(&needle);
                is_memory || kernel_name(&number).is_some_and(|name| self.descriptors.contains(&name))
            })
            .count() as u64
    }
}

/// Length of the range at the start of a line of `/proc/PID/maps` (proc(5)).
fn mapped_bytes(line: &str) -> u64 {
    let range = line.split(' ').next().and_then(|range| range.split_once('-'));
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    range.and_then(|(from, to)| hex(to)?.checked_sub(hex(from)?)).unwrap_or(0)
}

fn kernel_name(number: &str) -> Option<String> {
    let target = fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
    let target = target.to_string_lossy();
    if target.starts_with("socket:[") {
        return Some(target.into_owned());
    }
    if !target.contains("[eventfd]") {
        return None;
    }
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix("eventfd-id:"))?;
    Some(format!("eventfd-id:{}", id.trim()))
}
