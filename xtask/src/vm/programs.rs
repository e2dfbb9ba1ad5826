//! The programs that go into the virtual machines, and two that prepare them: from the machine, or unpacked from Debian's packages where they are not to be installed.

use crate::apt::{self, Apt};
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Not installed: `busybox-static` would replace `busybox`, and `nbd-client` would change how the machine boots. With the libraries that only these need.
const PACKAGES: &[&str] = &["busybox-static", "nbd-client", "libnl-3-200", "libnl-genl-3-200", "zstd"];

/// Where programs are looked for, below `/` and below the unpacked packages.
const FOLDERS: [&str; 4] = ["usr/bin", "usr/sbin", "bin", "sbin"];

/// Where the unpacked packages have their libraries.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// Programs and what they are linked to.
pub(super) struct Programs {
    unpacked: PathBuf,
}

/// A file of this machine, and where it goes in the virtual one.
pub(super) type Copy = (PathBuf, PathBuf);

impl Programs {
    /// Unpacks what is not there yet.
    pub(super) fn get() -> Result<Programs> {
        let unpacked = workspace::target().join("vm").join("programs");
        if !unpacked.is_dir() {
            let codename = apt::codename()
                .context("this is no Debian: programs of the virtual machines come from Debian's archive")?;
            Apt::new(&[&codename, &format!("{codename}-security")])?.unpack(PACKAGES, &unpacked)?;
        }
        Ok(Programs { unpacked })
    }

    /// A program, the unpacked one first.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf> {
        let roots = [self.unpacked.as_path(), Path::new("/")];
        let mut paths = roots.into_iter().flat_map(|root| FOLDERS.map(|folder| root.join(folder).join(name)));
        paths.find(|path| path.is_file()).with_context(|| format!("there is no program {name}"))
    }

    /// A path on this machine as it is inside: without the folder of the unpacked packages, and in `/usr`.
    pub(super) fn inside(&self, path: &Path) -> PathBuf {
        let path = path.strip_prefix(&self.unpacked).or_else(|_| path.strip_prefix("/")).unwrap_or(path);
        let is_merged = ["bin", "sbin", "lib", "lib64"].iter().any(|folder| path.starts_with(folder));
        if is_merged { Path::new("usr").join(path) } else { path.to_owned() }
    }

    /// The shared libraries that programs need, and the loader.
    pub(super) fn libraries(&self, programs: &[PathBuf]) -> Result<Vec<Copy>> {
        let folders = LIBRARIES.map(|folder| self.unpacked.join(folder).display().to_string());
        let mut found = BTreeSet::new();
        for program in programs {
            let output =
                Command::new("ldd").env("LD_LIBRARY_PATH", folders.join(":")).arg(program).output().context("ldd")?;
            let text = String::from_utf8_lossy(&output.stdout);
            if let Some(line) = text.lines().find(|line| line.contains("not found")) {
                bail!("{}: {}", program.display(), line.trim());
            }
            // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, `/lib64/ld-linux-x86-64.so.2 (0x...)`.
            let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
            found.extend(paths.map(PathBuf::from));
        }
        Ok(found.into_iter().map(|path| (path.clone(), self.inside(&path))).collect())
    }
}
