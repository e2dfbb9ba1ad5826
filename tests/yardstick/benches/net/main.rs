//! `cargo xtask bench net`: see the library.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use cofferdam_yardstick::aims;
use cofferdam_yardstick::clients::cofferdam::Host;
use cofferdam_yardstick::counting::Counting;
use cofferdam_yardstick::machine::{self, Cores};
use cofferdam_yardstick::net::plan::{Arguments, Plan};
use cofferdam_yardstick::net::{report, run, solo};

#[global_allocator]
static COUNTING: Counting = Counting;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let cores = Cores::of_this_process()?;
    println!("{}", machine::describe());
    let host = Host::of("virtio-net.wasm", None)?;
    if arguments.solo {
        let way = |direction| arguments.direction.is_empty() || arguments.direction.contains(&direction);
        print!("{}", solo::lines(&solo::all(&host, way, &arguments.depth, Duration::from_secs(1))?));
        return Ok(());
    }
    let results = run::measure(&Plan::new(&arguments), &host, cores)?;
    let rows = report::rows(&results);
    print!("{}", report::table(&rows));
    print!("{}", results.remarks());
    let aims = report::aims(&results);
    print!("{}", aims::lines(&aims));
    let json = arguments.json.clone().unwrap_or_else(|| PathBuf::from("target/bench/net.json"));
    report::write(&json, &rows, &results, &aims)
}
