//! `deny.toml`: what may be depended on.
//!
//! The file is a subset of cargo-deny's format, so that `cargo deny check licenses bans` reads the same rules where that tool is at hand. A key that is not
//! understood here is an error, so that no rule is written that nobody holds.

use anyhow::{Context, Result};
use serde::Deserialize;
use std::path::Path;

/// The whole file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Policy {
    pub(crate) graph: Graph,
    pub(crate) licenses: Licences,
    pub(crate) bans: Bans,
}

/// Which targets count.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Graph {
    pub(crate) targets: Vec<String>,
}

/// Which licences are allowed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Licences {
    pub(crate) allow: Vec<String>,
    #[serde(default)]
    pub(crate) exceptions: Vec<Exception>,
}

/// Licences allowed for one crate only.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Exception {
    #[serde(rename = "crate")]
    pub(crate) name: String,
    pub(crate) allow: Vec<String>,
}

/// Which crates are not wanted, and which may be there in two versions.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Bans {
    pub(crate) multiple_versions: MultipleVersions,
    #[serde(default)]
    pub(crate) deny: Vec<Named>,
    #[serde(default)]
    pub(crate) skip: Vec<Named>,
}

/// What a second version of a crate is.
#[derive(Deserialize, PartialEq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MultipleVersions {
    Deny,
    Warn,
    Allow,
}

/// A crate, or one version of it as `name@version`, and why it is named.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Named {
    #[serde(rename = "crate")]
    pub(crate) spec: String,
    pub(crate) reason: String,
}

impl Named {
    /// Whether it names this crate in this version.
    pub(crate) fn names(&self, name: &str, version: &str) -> bool {
        match self.spec.split_once('@') {
            Some((named, of_version)) => named == name && of_version == version,
            None => self.spec == name,
        }
    }
}

impl Policy {
    /// Reads and checks the file.
    pub(crate) fn read(path: &Path) -> Result<Policy> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not as expected", path.display()))
    }
}
