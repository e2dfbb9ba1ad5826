//! A standard library for guests, compiled once per compiler and kept in the target folder.

use super::{Compiler, TARGET, has_std};
use crate::{step, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Part of the key: raise it when the flags below change.
const RECIPE: u32 = 1;

/// The crate for whose sake cargo compiles the standard library.
const MANIFEST: &str = "[package]\nname = \"sysroot-stub\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[lib]\npath = \"lib.rs\"\n\n\
    [profile.release]\npanic = \"abort\"\n\n[workspace]\n";

fn folder() -> PathBuf {
    workspace::target().join("wasm-sysroot")
}

/// Where the sysroot of this compiler belongs.
fn place(compiler: &Compiler) -> PathBuf {
    let commit = compiler.commit.get(..12).unwrap_or(&compiler.commit);
    folder().join(format!("{}-{commit}-{RECIPE}", compiler.release))
}

fn libraries(sysroot: &Path) -> PathBuf {
    sysroot.join("lib").join("rustlib").join(TARGET).join("lib")
}

/// A sysroot that was built earlier for exactly this compiler.
pub(super) fn cached(compiler: &Compiler) -> Option<PathBuf> {
    Some(place(compiler)).filter(|sysroot| has_std(&libraries(sysroot)))
}

/// Compiles `library` (a folder that holds `std` and `core`) for guests, as `-Zbuild-std` does, and keeps the result.
///
/// It is made in a folder of its own and renamed, so that an interrupted build leaves nothing that looks complete.
pub(super) fn build(compiler: &Compiler, library: &Path) -> Result<PathBuf> {
    if !library.join("std").join("Cargo.toml").is_file() {
        bail!("no source in {}", library.display());
    }
    let library = library.canonicalize()?;
    fs::create_dir_all(folder())?;
    let work = tempfile::Builder::new().prefix("build-").tempdir_in(folder())?;
    fs::write(work.path().join("Cargo.toml"), MANIFEST)?;
    fs::write(work.path().join("lib.rs"), "")?;

    let mut flags = compiler.flags.clone();
    // Fat LTO of a guest reaches into the standard library only if that carries bitcode.
    flags.push("-Cembed-bitcode=yes".to_owned());
    flags.push(format!("--remap-path-prefix={}=/rustc/library", library.display()));
    let mut cargo = compiler.cargo(&flags);
    // The one use of unstable features: to compile the standard library itself, which is made of them.
    cargo
        .current_dir(work.path())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("__CARGO_TESTS_ONLY_SRC_ROOT", &library)
        .args(["build", "--release", "--quiet", "--target", TARGET])
        .args(["-Zbuild-std=std,panic_abort", "--target-dir"])
        .arg(work.path().join("target"));
    let what = format!("compiling the standard library for {TARGET}, once (half a minute)");
    step::announce(&what);
    step::with_signs_of_life("the standard library", || step::output(&mut cargo))?;

    let sysroot = work.path().join("sysroot");
    let into = libraries(&sysroot);
    fs::create_dir_all(&into)?;
    let built = work.path().join("target").join(TARGET).join("release").join("deps");
    for entry in built.read_dir().with_context(|| format!("nothing was built in {}", built.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text.ends_with(".rlib") && !text.starts_with("libsysroot_stub") {
            fs::rename(entry.path(), into.join(&name))?;
        }
    }
    if !has_std(&into) {
        bail!("cargo built no standard library");
    }
    keep(&sysroot, &place(compiler))
}

/// Moves a complete sysroot to its place. Another build may have come first; then that one is as good.
fn keep(sysroot: &Path, place: &Path) -> Result<PathBuf> {
    if place.exists() && !has_std(&libraries(place)) {
        fs::remove_dir_all(place)?;
    }
    match fs::rename(sysroot, place) {
        Ok(()) => Ok(place.to_path_buf()),
        Err(_) if has_std(&libraries(place)) => Ok(place.to_path_buf()),
        Err(error) => Err(error).with_context(|| format!("cannot keep {}", place.display())),
    }
}
