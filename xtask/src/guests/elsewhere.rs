//! `cargo xtask component`: a driver whose crate is not in this workspace, made as those in it are.

use super::{driver, toolchain, write};
use crate::step;
use crate::toolchain::Toolchain;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};

/// What may be said on the command line.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// The folder of the driver's crate, which is compiled, or a core module that was
    #[arg(value_name = "CRATE|CORE.wasm")]
    what: PathBuf,
    /// Where the component goes
    #[arg(short, long, value_name = "OUT.wasm")]
    out: PathBuf,
}

/// Makes the component and says where it is.
pub(crate) fn run(options: &Options) -> Result<()> {
    let core = if options.what.is_dir() { &compile(&options.what)? } else { &options.what };
    from_core(core, &options.out)?;
    println!("{}", options.out.display());
    Ok(())
}

/// Checks what it made before it writes: a driver imports the contract and nothing else, and says which devices it is for.
fn from_core(core: &Path, out: &Path) -> Result<()> {
    let bytes = fs::read(core).with_context(|| format!("cannot read {}", core.display()))?;
    let component = driver(&bytes).with_context(|| core.display().to_string())?;
    // A bare name has the empty path as its folder.
    write(&std::path::absolute(out)?, &component).with_context(|| format!("cannot write {}", out.display()))
}

/// What `cargo metadata` says of a crate that stands alone.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    target_directory: PathBuf,
}

#[derive(Deserialize)]
struct Package {
    manifest_path: PathBuf,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    crate_types: Vec<String>,
}

/// Compiles the crate with its profile `release`, in a folder of its own below its target folder; the path of the core module.
fn compile(folder: &Path) -> Result<PathBuf> {
    let manifest = folder.join("Cargo.toml");
    let manifest = manifest.canonicalize().with_context(|| format!("no crate: {}", manifest.display()))?;
    let Metadata { packages, target_directory } = metadata(&manifest)?;
    let targets = packages.into_iter().filter(|package| package.manifest_path == manifest);
    let mut targets = targets.flat_map(|package| package.targets);
    let Some(target) = targets.find(|target| target.crate_types.iter().any(|kind| kind == "cdylib")) else {
        bail!("{} has no library of the crate type cdylib", manifest.display());
    };
    let guests = target_directory.join("guests");
    let toolchain = Toolchain::find()?;
    let mut cargo = toolchain.cargo("build");
    cargo.args(["--release", "--lib", "--quiet", "--manifest-path"]).arg(&manifest);
    cargo.arg("--target-dir").arg(&guests);
    let status = step::with_signs_of_life(&format!("compiling {}", target.name), || cargo.status())
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("{} did not compile for {}", target.name, toolchain::TARGET);
    }
    let file = format!("{}.wasm", target.name.replace('-', "_"));
    Ok(guests.join(toolchain::TARGET).join("release").join(file))
}

fn metadata(manifest: &Path) -> Result<Metadata> {
    let mut cargo = crate::workspace::cargo();
    cargo.args(["metadata", "--format-version", "1", "--no-deps", "--manifest-path"]).arg(manifest);
    Ok(serde_json::from_str(&step::output(&mut cargo)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_driver_becomes_no_component() {
        let folder = tempfile::tempdir().unwrap();
        let (core, out) = (folder.path().join("core.wasm"), folder.path().join("out.wasm"));
        // The second becomes a component, which exports no driver.
        for (bytes, words) in [(&b"#!/bin/sh\n"[..], "core.wasm"), (b"\0asm\x01\0\0\0", "exports no driver")] {
            fs::write(&core, bytes).unwrap();
            let error = format!("{:#}", from_core(&core, &out).unwrap_err());
            assert!(error.contains(words), "{error}");
            assert!(!out.exists());
        }
        assert!(compile(folder.path()).unwrap_err().to_string().contains("no crate"));
    }
}
