//! `cargo xtask bench net`: see the library.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use cofferdam_yardstick::aims;
use cofferdam_yardstick::clients::cofferdam::Host;
use cofferdam_yardstick::counting::Counting;
use cofferdam_yardstick::machine::{self, Cores};
use cofferdam_yardstick::net::plan::{Arguments, Plan};
use cofferdam_yardstick::net::{report, run};

#[global_allocator]
static COUNTING: Counting = Counting;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let cores = Cores::of_this_process()?;
    println!("{}", machine::describe());
    let host = Host::of("virtio-net.wasm", None)?;
    let results = run::measure(&Plan::new(&arguments), &host, cores)?;
    let rows = report::rows(&results);
    print!("{}", report::table(&rows));
    print!("{}", results.remarks());
    let aims = report::aims(&results);
    print!("{}", aims::lines(&aims));
    let json = arguments.json.clone().unwrap_or_else(|| PathBuf::from("target/bench/net.json"));
    report::write(&json, &rows, &results, &aims)
}
