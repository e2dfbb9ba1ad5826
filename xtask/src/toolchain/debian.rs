//! What Debian has for compiling guests: the source of the standard library, and a compiler for the Web.

use crate::apt::{self, Apt};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Suites whose lists are small are asked first.
const SOURCE_ROUNDS: [&[&str]; 2] = [&["trixie-backports"], &["trixie", "forky", "sid"]];

/// Debian's compiler for building browsers, unpacked.
pub(super) struct WebCompiler {
    pub(super) rustc: PathBuf,
    /// For `LD_LIBRARY_PATH`.
    pub(super) libraries: PathBuf,
    /// The source of its standard library.
    pub(super) library: PathBuf,
}

/// The source of the standard library of `release` (`1.95.0`) from the package `rust-src`.
pub(super) fn rust_src(release: &str) -> Result<PathBuf> {
    let unpacked = apt::folder().join(format!("rust-src-{release}"));
    let library = unpacked.join(format!("usr/src/rustc-{release}/library"));
    if library.is_dir() {
        return Ok(library);
    }
    let mut seen = Vec::new();
    for suites in SOURCE_ROUNDS {
        let apt = Apt::new(suites)?;
        let versions = apt.versions("rust-src")?;
        if let Some(version) = versions.iter().find(|version| upstream(version) == release) {
            apt.unpack(&[&format!("rust-src={version}")], &unpacked)?;
            return Ok(library);
        }
        seen.extend(versions);
    }
    seen.sort();
    seen.dedup();
    bail!("Debian has no rust-src of version {release}, only {}", seen.join(", "))
}

/// The newest `rustc-web` of this Debian with its source and every library that this machine does not have, for a machine of the kind `host`.
pub(super) fn compiler(host: &str) -> Result<WebCompiler> {
    let codename = apt::codename().context("this is no Debian release")?;
    let unpacked = apt::folder().join(format!("rustc-web-{codename}"));
    if !unpacked.is_dir() {
        let apt = Apt::new(&[&codename, &format!("{codename}-security")])?;
        apt.unpack_with_dependencies(&["rustc-web", "rust-web-src"], &unpacked)?;
    }
    let architecture = host.split('-').next().unwrap_or_default();
    let libraries = unpacked.join(format!("usr/lib/{architecture}-linux-gnu"));
    let rustc = unpacked.join("usr/bin/rustc");
    for part in [&rustc, &libraries] {
        if !part.exists() {
            bail!("rustc-web has no {}", part.display());
        }
    }
    Ok(WebCompiler { rustc, libraries, library: find_library(&unpacked)? })
}

/// The one folder `usr/src/*/library` of an unpacked package.
fn find_library(unpacked: &Path) -> Result<PathBuf> {
    let sources = unpacked.join("usr").join("src").read_dir()?;
    let found = sources.flatten().map(|entry| entry.path().join("library")).find(|path| path.is_dir());
    found.context("rust-web-src holds no library")
}

/// `1.95.0` of `1.95.0+dfsg1-2~bpo13+1`.
fn upstream(version: &str) -> &str {
    version.split(['+', '-', '~']).next().unwrap_or(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upstream_version_is_what_rustc_prints() {
        assert_eq!(upstream("1.95.0+dfsg1-2~bpo13+1"), "1.95.0");
        assert_eq!(upstream("1.97.0-1"), "1.97.0");
    }
}
