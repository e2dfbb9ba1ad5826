//! `cargo xtask bench block`: see the library.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use cofferdam_yardstick::clients::cofferdam::Host;
use cofferdam_yardstick::counting::Counting;
use cofferdam_yardstick::machine::{self, Cores};
use cofferdam_yardstick::plan::{Arguments, Plan};
use cofferdam_yardstick::{aims, budget, plot, report, run, solo};

#[global_allocator]
static COUNTING: Counting = Counting;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let null_program = arguments.null_program.as_deref();
    let null_program = null_program.unwrap_or(Path::new(env!("CARGO_BIN_EXE_cofferdam-null-blk")));
    let cores = Cores::of_this_process()?;
    println!("{}", machine::describe());
    println!(
        "{:.0} ns between core {} (client) and core {} (device)",
        machine::distance_ns(cores)?,
        cores.client,
        cores.device
    );
    let host = Host::start(None)?;
    if arguments.solo {
        print!("{}", solo::lines(&solo::all(&host, &arguments.depth, Duration::from_secs(1))?));
        return Ok(());
    }
    let plan = Plan::new(&arguments);
    let results = run::measure(&plan, &host, null_program, cores)?;
    let budget = if arguments.rates_only { None } else { Some(budget::measure(&host, null_program, arguments.quick)?) };
    let parts = solo::all(&host, &arguments.depth, Duration::from_millis(100))?;
    let rows = report::rows(&results);
    print!("{}", report::table(&rows));
    print!("{}", solo::lines(&parts));
    if let Some(budget) = &budget {
        print!("{}", report::budget_lines(budget));
    }
    print!("{}", results.remarks());
    let aims = aims::aims(&results, budget.as_ref());
    print!("{}", aims::lines(&aims));
    let json = arguments.json.clone().unwrap_or_else(|| PathBuf::from("target/bench/block.json"));
    report::write(&json, &rows, &results, &parts, budget.as_ref(), &aims)?;
    let svg = json.with_extension("svg");
    plot::draw(&svg, &rows)?;
    println!("{}", svg.display());
    Ok(())
}
