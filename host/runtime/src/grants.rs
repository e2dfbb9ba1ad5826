//! What an operator allows a driver beyond the capabilities: `--allow wasi:...`. Nothing by default (DESIGN section 8).

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::ambient_authority;
use cap_std::fs::Dir;

/// A set of grants. `Default` grants nothing.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    /// `wasi:clocks`: wall and monotonic time, and sleeping within the call's deadline.
    pub wasi_clocks: bool,
    /// `wasi:random`.
    pub wasi_random: bool,
    /// `wasi:cli`: no arguments, no environment, an empty standard input; standard output and error go to the driver's log.
    pub wasi_cli: bool,
    /// `wasi:filesystem`: these directories, readable and writable, and what is below them.
    pub filesystem: Vec<DirGrant>,
}

/// One granted directory: the directory that had this path when the grant was made, even if the path names another one later.
#[derive(Clone, Debug)]
pub struct DirGrant {
    path: PathBuf,
    dir: Arc<Dir>,
}

impl DirGrant {
    /// Opens `path`, which must be a directory.
    ///
    /// # Errors
    /// [`GrantError::Directory`] if it cannot be opened.
    pub fn open(path: &Path) -> Result<DirGrant, GrantError> {
        match Dir::open_ambient_dir(path, ambient_authority()) {
            Ok(dir) => Ok(DirGrant { path: path.to_owned(), dir: Arc::new(dir) }),
            Err(error) => Err(GrantError::Directory { path: path.display().to_string(), reason: error.to_string() }),
        }
    }

    /// The path as the operator wrote it; also the directory's name inside the guest.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn dir(&self) -> &Dir {
        &self.dir
    }
}

/// An `--allow` that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrantError {
    /// No such grant.
    #[error("'{0}' is not a grant; there are wasi:clocks, wasi:random, wasi:cli and wasi:filesystem=DIR")]
    Unknown(String),
    /// The directory of a `wasi:filesystem` grant.
    #[error("cannot grant the directory {path}: {reason}")]
    Directory {
        /// As written.
        path: String,
        /// What the system said.
        reason: String,
    },
}

impl Grants {
    /// One grant as written on the command line: `wasi:clocks`, `wasi:random`, `wasi:cli` or `wasi:filesystem=DIR`.
    ///
    /// # Errors
    /// [`GrantError`] for anything else, and for a directory that cannot be opened.
    ///
    /// ```
    /// use cofferdam_runtime::Grants;
    /// assert!(Grants::parse("wasi:clocks")?.wasi_clocks);
    /// assert!(Grants::parse("wasi:sockets").is_err());
    /// # Ok::<(), cofferdam_runtime::GrantError>(())
    /// ```
    pub fn parse(text: &str) -> Result<Grants, GrantError> {
        let mut grants = Grants::default();
        grants.allow(text)?;
        Ok(grants)
    }

    /// Adds one grant, written as for [`Grants::parse`].
    ///
    /// # Errors
    /// As [`Grants::parse`]; then nothing was added.
    pub fn allow(&mut self, text: &str) -> Result<(), GrantError> {
        match text.split_once('=') {
            None if text == "wasi:clocks" => self.wasi_clocks = true,
            None if text == "wasi:random" => self.wasi_random = true,
            None if text == "wasi:cli" => self.wasi_cli = true,
            Some(("wasi:filesystem", path)) if !path.is_empty() => {
                self.filesystem.push(DirGrant::open(Path::new(path))?);
            }
            _ => return Err(GrantError::Unknown(text.to_owned())),
        }
        Ok(())
    }

    /// Whether nothing is granted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !(self.wasi_clocks || self.wasi_random || self.wasi_cli || self.has_filesystem())
    }

    pub(crate) fn has_filesystem(&self) -> bool {
        !self.filesystem.is_empty()
    }

    /// `wasi:io` holds the streams and pollables of other interfaces and gives nothing by itself, so it comes with those that use it.
    pub(crate) fn has_io(&self) -> bool {
        self.wasi_clocks || self.wasi_cli || self.has_filesystem()
    }
}

impl fmt::Display for Grants {
    /// The grants as they are written for `--allow`, separated by spaces.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        for (granted, word) in
            [(self.wasi_clocks, "wasi:clocks"), (self.wasi_random, "wasi:random"), (self.wasi_cli, "wasi:cli")]
        {
            if granted {
                words.push(word.to_owned());
            }
        }
        words.extend(self.filesystem.iter().map(|dir| format!("wasi:filesystem={}", dir.path.display())));
        f.write_str(&words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_for_a_missing_directory_is_refused_when_it_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let missing = format!("wasi:filesystem={}", dir.path().join("missing").display());
        assert!(matches!(Grants::parse(&missing), Err(GrantError::Directory { .. })));
        let there = format!("wasi:filesystem={}", dir.path().display());
        assert_eq!(Grants::parse(&there).unwrap().to_string(), there);
    }

    #[test]
    fn words_that_are_no_grants_are_refused() {
        for text in ["", "wasi", "wasi:clocks=1", "wasi:filesystem", "wasi:filesystem=", "wasi:sockets", "clocks"] {
            assert_eq!(Grants::parse(text).unwrap_err(), GrantError::Unknown(text.to_owned()), "{text}");
        }
    }
}
