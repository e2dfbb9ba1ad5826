//! Looks up what a binding left behind (L7): mappings and descriptors are searched in `/proc/self`, not remembered.
//!
//! While a binding is alive, [`Marks`] collects how its memory and descriptors can be recognised: the name of its memfds, the inode number of each
//! socket, and for each event descriptor the kernel's id of it. That id is given away again as soon as the last descriptor of the event is closed, so a
//! witness (a duplicate) keeps it for as long as it may be looked for. A socket has no witness: that would keep the connection open.

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// How a binding's traces in this process are recognised.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// Name of the memory's files; unique in this process.
    pub(crate) memory: String,
    /// Kernel names of other descriptors: `eventfd-id:12`, `socket:[3456]`, `/dev/uio0`.
    descriptors: Vec<String>,
    witnesses: Vec<OwnedFd>,
}

impl Marks {
    pub(crate) fn new(memory: String) -> Marks {
        Marks { memory, descriptors: Vec::new(), witnesses: Vec::new() }
    }

    /// Remembers a descriptor by the kernel's own number for what it refers to. One that has no such number is left out.
    pub(crate) fn note(&mut self, fd: BorrowedFd<'_>) {
        let Some(mark) = kernel_name(&fd.as_raw_fd().to_string()) else { return };
        if mark.starts_with(EVENT) {
            // Without a witness the id would mean nothing later.
            let Ok(witness) = fd.try_clone_to_owned() else { return };
            self.witnesses.push(witness);
        }
        self.descriptors.push(mark);
    }

    /// Another device is in the place of the one whose descriptors these were.
    pub(crate) fn forget_descriptors(&mut self) {
        self.descriptors.clear();
        self.witnesses.clear();
    }

    /// Whether a file's name in `/proc` is that of the binding's memory: a memfd, or a file of its own in huge pages.
    fn is_memory(&self, text: &str) -> bool {
        let memory = &self.memory;
        let is_there = || text.contains(&format!("/memfd:{memory}-")) || text.contains(&format!("/{memory}-"));
        !memory.is_empty() && is_there()
    }

    /// Mappings of the binding's memory in this process, and their bytes.
    pub(crate) fn mappings(&self) -> (u64, u64) {
        if self.memory.is_empty() {
            return (0, 0);
        }
        let Ok(maps) = fs::read_to_string("/proc/self/maps") else {
            // What cannot be looked up is not known to be gone.
            tracing::error!("/proc/self/maps cannot be read");
            return (1, 0);
        };
        let found = maps.lines().filter(|line| self.is_memory(line)).map(mapped_bytes);
        found.fold((0, 0), |(count, sum), bytes| (count + 1, sum + bytes))
    }

    /// Descriptors of the binding that are open in this process, with or without those of its memory.
    pub(crate) fn open_descriptors(&self, with_memory: bool) -> u64 {
        let is_witness = |number: &str| self.witnesses.iter().any(|witness| witness.as_raw_fd().to_string() == number);
        let Ok(entries) = fs::read_dir("/proc/self/fd") else {
            tracing::error!("/proc/self/fd cannot be read");
            return 1;
        };
        entries
            .flatten()
            .filter(|entry| {
                let number = entry.file_name();
                let number = number.to_string_lossy();
                let target = fs::read_link(entry.path()).unwrap_or_default();
                let is_memory = with_memory && self.is_memory(&target.to_string_lossy());
                let is_known = || kernel_name(&number).is_some_and(|name| self.descriptors.contains(&name));
                is_memory || (!is_witness(&number) && is_known())
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

/// How the name of an event descriptor begins, as in `/proc/PID/fdinfo` (proc(5)).
const EVENT: &str = "eventfd-id:";

fn kernel_name(number: &str) -> Option<String> {
    let target = fs::read_link(format!("/proc/self/fd/{number}")).ok()?;
    let target = target.to_string_lossy();
    if target.starts_with("socket:[") {
        return Some(target.into_owned());
    }
    // A device's own files, which nobody but its binding opens.
    if target.starts_with("/dev/") || target.starts_with("/sys/") {
        return Some(target.into_owned());
    }
    if !target.contains("[eventfd]") {
        return None;
    }
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    let id = info.lines().find_map(|line| line.strip_prefix(EVENT))?;
    Some(format!("{EVENT}{}", id.trim()))
}
