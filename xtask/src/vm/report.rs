//! What the test program inside says on the serial line (`tests/vm/src/runner.rs`).

use crate::step;
use std::time::{Duration, Instant};

/// Reads lines as they come, prints what a person wants to see, and adds up.
pub(super) struct Report {
    topology: &'static str,
    begin: Instant,
    /// From the start of QEMU to the first words of the test program.
    pub(super) boot: Option<Duration>,
    /// Scenarios that passed.
    pub(super) passed: usize,
    /// Scenarios that failed.
    pub(super) failed: usize,
    /// What went wrong outside of scenarios.
    pub(super) errors: usize,
    /// Whether the last line has come, and speaks of what was counted here.
    pub(super) is_complete: bool,
}

impl Report {
    /// For a machine that starts now.
    pub(super) fn new(topology: &'static str) -> Report {
        Report { topology, begin: Instant::now(), boot: None, passed: 0, failed: 0, errors: 0, is_complete: false }
    }

    /// Takes a line of the serial log. The kernel may have written its own words before those of the test program.
    pub(super) fn line(&mut self, line: &str) {
        let after = |mark: &str| line.find(mark).map(|at| line[at..].trim_end());
        if let Some(text) = after("vm begins: ") {
            let boot = self.begin.elapsed();
            self.boot.get_or_insert(boot);
            println!("  {}: {text} (booted in {})", self.topology, step::seconds(boot));
        } else if let Some(text) = after("vm error: ") {
            self.errors += 1;
            println!("  {}: {text}", self.topology);
        } else if let Some(text) = after("test ").filter(|text| text.ends_with(" s)")) {
            let passed = text.contains(" ... ok (");
            if passed || text.contains(" ... FAILED (") {
                *(if passed { &mut self.passed } else { &mut self.failed }) += 1;
                println!("  {}: {text}", self.topology);
            }
        } else if let Some(text) = after("vm result: ") {
            let counts = format!(" {} passed; {} failed", self.passed, self.failed);
            self.is_complete = text.ends_with(&counts);
            println!("  {}: {text}", self.topology);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_counted_and_checked_against_the_last_line() {
        let mut report = Report::new("uio");
        for line in [
            "vm begins: uio, Linux 6.12, up for 2.1 s",
            "test a_disk_works ...",
            "      0.10 s  test of a step",
            "[    3.1] kernel words test a_disk_works ... ok (1.2 s)",
            "test another ... FAILED (0.1 s)",
            "vm result: FAILED. 1 passed; 1 failed",
        ] {
            report.line(line);
        }
        assert_eq!((report.passed, report.failed, report.is_complete), (1, 1, true));
        assert!(report.boot.is_some());
        report.line("vm result: ok. 2 passed; 0 failed");
        assert!(!report.is_complete);
    }
}
