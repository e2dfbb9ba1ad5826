//! `cargo xtask build`: the host binary and the guest drivers.

use crate::{guests, step, workspace};
use anyhow::Result;
use std::path::Path;
use std::time::Instant;

/// Builds everything a user needs and says where it is.
pub(crate) fn run() -> Result<()> {
    let begin = Instant::now();
    drivers()?;
    programs(&["cofferdam"])?;
    eprintln!("==> built in {}", step::seconds(begin.elapsed()));
    say(&workspace::program("cofferdam"));
    for name in guests::shipped() {
        say(&workspace::driver(name));
    }
    Ok(())
}

/// Builds the guest drivers into `target/drivers`.
pub(crate) fn drivers() -> Result<()> {
    step::announce("guest drivers");
    guests::build_all()
}

/// Builds release programs of the host and of the sim.
///
/// Features are resolved over the whole workspace, as `cargo test --workspace` does: with a narrower selection the same dependencies would come out with
/// other features and be compiled twice, wasmtime among them.
pub(crate) fn programs(names: &[&str]) -> Result<()> {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--release", "--workspace"]);
    for name in names {
        cargo.args(["--bin", name]);
    }
    step::run(&format!("{}: release build", names.join(", ")), &mut cargo)
}

fn say(path: &Path) {
    let bytes = path.metadata().map_or(0, |metadata| metadata.len());
    println!("{} ({} KiB)", path.display(), bytes.div_ceil(1024));
}
