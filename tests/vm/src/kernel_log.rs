//! The kernel's log, and what in it is a fault.

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, read};

/// What the kernel prints when something is broken. Soft lockups and RCU stalls are not among them: on a loaded host an emulated processor stands still for seconds.
const FAULTS: &[&str] = &[
    "BUG: ",
    "Oops: ",
    "WARNING: CPU",
    "Kernel panic",
    "general protection fault",
    "blocked for more than",
    "DMAR: [DMA",
    "I/O error",
    "EXT4-fs error",
];

/// Lines that look like one and are none.
const HARMLESS: &[&str] = &["soft lockup"];

/// Longest record of `/dev/kmsg`, in bytes.
const RECORD_BYTES: usize = 8192;

/// Most records that one reading takes: more than the kernel's buffer holds.
const MAX_RECORDS: usize = 100_000;

/// The messages of the kernel from a moment on.
#[derive(Debug, Default)]
pub struct KernelLog {
    /// The number of the first record that counts.
    from: u64,
}

impl KernelLog {
    /// What the kernel says from now on.
    pub fn from_now() -> Result<KernelLog> {
        let last = records()?.last().map(|(number, _)| *number);
        Ok(KernelLog { from: last.map_or(0, |last| last + 1) })
    }

    /// The messages so far, without time stamps.
    pub fn lines(&self) -> Result<Vec<String>> {
        Ok(records()?.into_iter().filter(|(number, _)| *number >= self.from).map(|(_, text)| text).collect())
    }

    /// Those that mean that something is broken and hold none of `expected`.
    pub fn faults(&self, expected: &[&str]) -> Result<Vec<String>> {
        let mut lines = self.lines()?;
        lines.retain(|line| is_fault(line) && !expected.iter().any(|part| line.contains(part)));
        Ok(lines)
    }
}

fn is_fault(line: &str) -> bool {
    FAULTS.iter().any(|part| line.contains(part)) && !HARMLESS.iter().any(|part| line.contains(part))
}

/// Everything in the kernel's buffer, with the numbers that the kernel gave.
fn records() -> Result<Vec<(u64, String)>> {
    let file =
        open("/dev/kmsg", OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).context("/dev/kmsg")?;
    let mut buffer = vec![0; RECORD_BYTES];
    let mut records = Vec::new();
    while records.len() < MAX_RECORDS {
        match read(&file, &mut buffer[..]) {
            Ok(length) => records.extend(parse(&String::from_utf8_lossy(&buffer[..length]))),
            Err(Errno::AGAIN) => break,
            // A record was overwritten while it was to be read: the next read goes on behind it.
            Err(Errno::PIPE) => {}
            Err(error) => return Err(error).context("/dev/kmsg"),
        }
    }
    Ok(records)
}

/// `6,339,5140900,-;text` of the kernel's document dev-kmsg.
fn parse(record: &str) -> Option<(u64, String)> {
    let (head, text) = record.split_once(';')?;
    let number = head.split(',').nth(1)?.parse().ok()?;
    Some((number, text.lines().next().unwrap_or_default().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_without_its_dictionary() {
        let record = "3,1206,8801324,-;DMAR: [DMA Write] fault\n SUBSYSTEM=pci\n";
        assert_eq!(parse(record), Some((1206, "DMAR: [DMA Write] fault".to_owned())));
        assert_eq!(parse("no record"), None);
    }

    #[test]
    fn a_stall_of_the_emulation_is_no_fault() {
        assert!(is_fault("BUG: unable to handle page fault for address: ffff"));
        assert!(!is_fault("watchdog: BUG: soft lockup - CPU#0 stuck for 26s!"));
        assert!(!is_fault("pci 0000:00:04.0: BAR 0: assigned"));
    }
}
