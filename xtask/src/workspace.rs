//! Where things are: the root of the workspace and what the builds leave in the target folder.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the workspace, whatever the current folder is.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}

/// The target folder: `CARGO_TARGET_DIR` if set, else `target` in the root.
pub(crate) fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) if !folder.is_empty() => root().join(folder),
        _ => root().join("target"),
    }
}

/// A program of the release profile.
pub(crate) fn program(name: &str) -> PathBuf {
    target().join("release").join(name)
}

/// A guest driver made by `cargo xtask build`.
pub(crate) fn driver(name: &str) -> PathBuf {
    target().join("drivers").join(name).with_extension("wasm")
}

/// The cargo that runs this program, in the root of the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}
