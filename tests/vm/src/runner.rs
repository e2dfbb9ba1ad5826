//! Runs the scenarios of a topology and prints what xtask reads (`xtask/src/vm/report.rs`):
//!
//! ```text
//! vm begins: uio, Linux 6.12.90, up for 3.20 s
//! test NAME ...
//!       0.12 s  a step
//! test NAME ... ok (1.2 s)
//! vm result: ok. 5 passed; 0 failed
//! ```

use crate::scenarios::{self, Scenario};
use crate::vm::Vm;
use anyhow::{Context, Result, bail};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// How much of the kernel's log a failure shows, in lines.
const LOG_LINES: usize = 60;

/// What is to run.
#[derive(Debug, Default)]
pub struct Choice {
    /// The topology of this machine.
    pub topology: String,
    /// Only scenarios whose names contain this.
    pub only: String,
    /// The long ones too.
    pub long: bool,
}

impl Choice {
    fn takes(&self, scenario: &Scenario) -> bool {
        scenario.topology == self.topology && scenario.name.contains(&self.only) && (self.long || !scenario.long)
    }
}

/// Runs them one after the other and tells whether all is well.
pub fn run(choice: &Choice) -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime = uptime.split(' ').next().unwrap_or_default();
    println!("vm begins: {}, Linux {}, up for {uptime} s", choice.topology, release.trim());

    let mut vm = Vm::new(&choice.topology)?;
    for fault in vm.kernel_log.faults(&[])? {
        println!("vm error: at boot the kernel reports: {fault}");
    }
    let (mut passed, mut failed) = (0_u32, 0_u32);
    let mut spoiled: Option<String> = None;
    for scenario in scenarios::all().iter().filter(|scenario| choice.takes(scenario)) {
        let begin = Instant::now();
        println!("test {} ...", scenario.name);
        let result = match &spoiled {
            None => one(&mut vm, scenario),
            Some(why) => Err(anyhow::anyhow!("not run: {why}")),
        };
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        if let Err(error) = &result {
            println!("    error: {error:#}");
            if spoiled.is_none() {
                show_kernel_log(&vm);
                spoiled = vm.restore().err().map(|error| format!("after {} {error:#}", scenario.name));
            }
        }
        println!("test {} ... {word} ({:.1} s)", scenario.name, begin.elapsed().as_secs_f64());
        *(if result.is_ok() { &mut passed } else { &mut failed }) += 1;
    }
    let good = failed == 0 && passed > 0;
    println!("vm result: {}. {passed} passed; {failed} failed", if good { "ok" } else { "FAILED" });
    Ok(good)
}

/// One scenario, and what it owes to the next.
fn one(vm: &mut Vm, scenario: &Scenario) -> Result<()> {
    vm.begin()?;
    let result = catch_unwind(AssertUnwindSafe(|| (scenario.script)(vm)));
    match result {
        Ok(result) => result?,
        Err(panic) => {
            let text =
                panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            bail!("panic: {}", text.unwrap_or("no message"));
        }
    }
    let faults = vm.kernel_log.faults(scenario.expected)?;
    if let Some(first) = faults.first() {
        bail!("the kernel reports {} faults, first: {first}", faults.len());
    }
    match vm.misplaced() {
        None => Ok(()),
        Some(what) => bail!("left behind: {what}"),
    }
}

fn show_kernel_log(vm: &Vm) {
    match vm.kernel_log.lines().context("the kernel's log") {
        Ok(lines) => {
            lines[lines.len().saturating_sub(LOG_LINES)..].iter().for_each(|line| println!("    kernel: {line}"))
        }
        Err(error) => println!("    {error:#}"),
    }
}
