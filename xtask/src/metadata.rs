//! What `cargo metadata` tells, as far as it is needed here.

use crate::workspace;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::path::PathBuf;

/// The workspace and everything that it is built from.
#[derive(Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    pub(crate) workspace_members: Vec<String>,
}

/// One package in one version.
#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) license: Option<String>,
    pub(crate) license_file: Option<PathBuf>,
    #[cfg_attr(not(test), expect(dead_code, reason = "read by the rules, which are tests"))]
    pub(crate) dependencies: Vec<Dependency>,
}

/// One line of a package's dependency tables.
#[derive(Deserialize)]
#[cfg_attr(not(test), expect(dead_code, reason = "read by the rules, which are tests"))]
pub(crate) struct Dependency {
    pub(crate) name: String,
    /// None: ordinary; else "dev" or "build".
    pub(crate) kind: Option<String>,
    /// Where it is, if it is a folder of this repository.
    pub(crate) path: Option<PathBuf>,
}

impl Metadata {
    /// Asks cargo, for all targets or for those given.
    pub(crate) fn read(targets: &[String]) -> Result<Metadata> {
        let mut cargo = workspace::cargo();
        cargo.args(["metadata", "--format-version", "1"]);
        for target in targets {
            cargo.args(["--filter-platform", target]);
        }
        let output = cargo.output().context("cannot start cargo")?;
        if !output.status.success() {
            bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("cargo metadata prints something else than expected")
    }

    /// Whether the package belongs to this workspace.
    pub(crate) fn is_member(&self, package: &Package) -> bool {
        self.workspace_members.contains(&package.id)
    }
}
