//! The command line of the program that the crate's document describes.

use anyhow::{Result, bail};
use cofferdam_vm::{runner, scenarios, verdict};
use std::process::ExitCode;

fn main() -> ExitCode {
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Lists the scenarios, or runs them and does not come back.
fn work() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let topology = arguments.next().unwrap_or_default();
    if topology == "--list" {
        for scenario in scenarios::all() {
            let length = if scenario.long { "long" } else { "short" };
            println!("{} {} {length}", scenario.topology, scenario.name);
        }
        return Ok(());
    }
    let mut choice = runner::Choice { topology, ..Default::default() };
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--long" => choice.long = true,
            "--only" => choice.only = arguments.next().unwrap_or_default(),
            other => bail!("{other}: not understood; see the head of tests/vm/src/lib.rs"),
        }
    }
    if !verdict::is_test_machine() {
        bail!("this is no machine of `cargo xtask vm-test`");
    }
    let good = runner::run(&choice).unwrap_or_else(|error| {
        println!("vm error: {error:#}");
        false
    });
    verdict::give(good)
}
