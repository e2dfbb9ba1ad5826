//! `cargo xtask bench recovery`: see the library.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Parser;
use cofferdam_yardstick::clients::cofferdam::Host;
use cofferdam_yardstick::recovery::noise::{self, Spread};
use cofferdam_yardstick::recovery::plan::{Arguments, Plan};
use cofferdam_yardstick::recovery::{crashes, report, upgrades};
use cofferdam_yardstick::{aims, machine};

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let null_program = arguments.null_program.as_deref();
    let null_program = null_program.unwrap_or(Path::new(env!("CARGO_BIN_EXE_cofferdam-null-blk")));
    println!("{}", machine::describe());
    let plan = Plan::new(&arguments);
    let spin = Spread::of(noise::spin(plan.noise));
    // Compiled once: of two upgrades the second finds its code.
    let cache = tempfile::tempdir()?;
    let host = Host::start(Some(cache.path()))?;
    let mut measured = Vec::new();
    for cell in &plan.cells {
        measured.push(crashes::measure(&host, null_program, *cell, plan.depth, plan.pairs)?);
    }
    let upgrades = report::Upgrades::of(&upgrades::measure(&host, null_program, &plan)?);
    let rows: Vec<_> = measured.iter().map(report::row).collect();
    print!("{}", report::table(&rows, &upgrades, &spin));
    let aims = report::aims(&measured, &rows, &upgrades);
    print!("{}", aims::lines(&aims));
    let json = arguments.json.clone().unwrap_or_else(|| PathBuf::from("target/bench/recovery.json"));
    report::write(&json, &rows, &upgrades, &spin, &aims)
}
