//! `cargo xtask bench NAME`: the benches, each a program of the crate that it measures. Each prints a table and writes `target/bench/NAME.json`.

use crate::{build, guests, packages, step, workspace};
use anyhow::{Result, bail};
use std::process::Command;

struct Bench {
    name: &'static str,
    measures: &'static str,
    scope: Scope,
    /// The profile it is built with; cargo's own for benches, which is that of the tests, unless it says otherwise.
    profile: Option<&'static str>,
}

/// What has to be there for a bench, and how it is selected.
enum Scope {
    /// Its package alone: it needs none of the big dependencies.
    Package(&'static str),
    /// Whole bindings: a driver, devices in other processes, and the features of the whole workspace, for the reason that `build::programs` gives.
    Workspace,
    /// The same with the drivers that only tests load.
    WithTestGuests,
}

/// A bench's name is also that of its target.
const BENCHES: &[Bench] = &[
    Bench {
        name: "block",
        measures: "the block data path beside its peers: libblkio, a bare ring, qemu-storage-daemon's NBD",
        scope: Scope::Workspace,
        profile: Some("dist"),
    },
    Bench {
        name: "gate",
        measures: "what an admitted call costs, on one core and on many",
        scope: Scope::Package("cofferdam-gate"),
        profile: None,
    },
    Bench {
        name: "net",
        measures: "the net data path beside its peers, on DPDK's testpmd: DPDK's net_virtio_user, a bare ring",
        scope: Scope::Workspace,
        profile: Some("dist"),
    },
    Bench {
        name: "recovery",
        measures: "what a driver that breaks down, or is exchanged, costs its clients",
        scope: Scope::WithTestGuests,
        profile: Some("dist"),
    },
    Bench {
        name: "unload",
        measures: "how long an unload takes, stage by stage, idle and under load",
        scope: Scope::Workspace,
        profile: None,
    },
];

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
    if let Scope::Workspace | Scope::WithTestGuests = bench.scope {
        packages::ensure()?;
        build::drivers()?;
        build::programs(&["cofferdam-sim-blk"])?;
        if let Scope::WithTestGuests = bench.scope {
            guests::build_test_guests()?;
        }
    }
    let folder = workspace::root().join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let json = folder.join(format!("{name}.json"));
    step::run(
        &format!("bench {name}: {}", bench.measures),
        command(bench, arguments).arg("--json").arg(&json).args(arguments),
    )?;
    println!("{}", json.display());
    Ok(())
}

/// A look at one's own change, for which nine minutes of building would be too long: built as the tests are.
const QUICK_LOOK: &str = "--solo";

/// Cargo's command for it, up to the program's own arguments.
fn command(bench: &Bench, arguments: &[String]) -> Command {
    let mut cargo = workspace::cargo();
    cargo.arg("bench");
    if let Some(profile) = bench.profile
        && !arguments.iter().any(|argument| argument == QUICK_LOOK)
    {
        cargo.args(["--profile", profile]);
    }
    match bench.scope {
        Scope::Package(package) => cargo.args(["--package", package]),
        Scope::Workspace | Scope::WithTestGuests => cargo.arg("--workspace"),
    };
    cargo.args(["--bench", bench.name, "--"]);
    cargo
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Metadata;

    #[test]
    fn every_bench_is_a_target_of_its_name() {
        let mut declared = Vec::new();
        for package in &Metadata::read(&[]).expect("cargo metadata").packages {
            let Some(folder) = package.id.split_once("path+file://").and_then(|(_, id)| id.split('#').next()) else {
                continue;
            };
            let manifest = std::fs::read_to_string(format!("{folder}/Cargo.toml")).expect("a manifest");
            let name = |text: &str| text.lines().find_map(|line| line.strip_prefix("name = ")).map(str::to_owned);
            declared.extend(manifest.split("[[bench]]").skip(1).filter_map(name));
        }
        for bench in BENCHES {
            let name = format!("{:?}", bench.name);
            assert!(declared.contains(&name), "no [[bench]] of the workspace is called {name}: {declared:?}");
        }
    }

    #[test]
    fn a_bench_of_whole_bindings_is_built_with_the_features_of_the_workspace() {
        let arguments = |name: &str, given: &[&str]| {
            let bench = BENCHES.iter().find(|bench| bench.name == name).expect("it is listed");
            let given: Vec<String> = given.iter().map(|argument| (*argument).to_owned()).collect();
            step::shown(&command(bench, &given))
        };
        let unload = arguments("unload", &[]);
        assert!(unload.ends_with("bench --workspace --bench unload --"), "{unload}");
        let gate = arguments("gate", &[]);
        assert!(gate.ends_with("bench --package cofferdam-gate --bench gate --"), "{gate}");
        let block = arguments("block", &["--quick"]);
        assert!(block.ends_with("bench --profile dist --workspace --bench block --"), "{block}");
        let net = arguments("net", &[]);
        assert!(net.ends_with("bench --profile dist --workspace --bench net --"), "{net}");
        let recovery = arguments("recovery", &[]);
        assert!(recovery.ends_with("bench --profile dist --workspace --bench recovery --"), "{recovery}");
        let solo = arguments("block", &["--solo"]);
        assert!(solo.ends_with("bench --workspace --bench block --"), "{solo}");
    }
}
