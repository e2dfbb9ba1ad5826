//! `cargo xtask bench NAME`: the benches, each a program of the crate that it measures. Each prints a table and writes `target/bench/NAME.json`.

use crate::{step, workspace};
use anyhow::{Result, bail};

struct Bench {
    name: &'static str,
    measures: &'static str,
    package: &'static str,
    target: &'static str,
}

const BENCHES: &[Bench] = &[Bench {
    name: "gate",
    measures: "what an admitted call costs, on one core and on many",
    package: "cofferdam-gate",
    target: "gate",
}];

/// Runs the bench called `name`, or lists what there is.
pub(crate) fn run(name: Option<&str>, arguments: &[String]) -> Result<()> {
    let Some(name) = name else {
        for bench in BENCHES {
            println!("{:<10} {}", bench.name, bench.measures);
        }
        return Ok(());
    };
    let Some(bench) = BENCHES.iter().find(|bench| bench.name == name) else {
        let names: Vec<_> = BENCHES.iter().map(|bench| bench.name).collect();
        bail!("no bench is called {name:?}; there is {}", names.join(", "));
    };
    let folder = workspace::root().join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let json = folder.join(format!("{name}.json"));
    step::run(
        &format!("bench {name}: {}", bench.measures),
        workspace::cargo()
            .args(["bench", "-p", bench.package, "--bench", bench.target, "--", "--json"])
            .arg(&json)
            .args(arguments),
    )?;
    println!("{}", json.display());
    Ok(())
}
