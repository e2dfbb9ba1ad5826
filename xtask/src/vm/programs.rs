//! The programs that go into the virtual machines, and two that prepare them: from the machine, or unpacked from Debian's packages where they are not to be installed.

use crate::apt::{self, Apt};
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Not installed: `busybox-static` would replace `busybox`, `nbd-client` would change how the machine boots, `iperf3` may be a service, and `ping` may go into the network.
/// With the libraries that only these need.
const PACKAGES: &[&str] = &[
    "busybox-static",
    "nbd-client",
    "libnl-3-200",
    "libnl-genl-3-200",
    "iperf3",
    "libiperf0",
    "libsctp1",
    "iputils-ping",
    "zstd",
];

/// Where programs are looked for, below `/` and below the unpacked packages.
const FOLDERS: [&str; 4] = ["usr/bin", "usr/sbin", "bin", "sbin"];

/// Where the unpacked packages have their libraries.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];

/// Programs and what they are linked to.
pub(super) struct Programs {
    /// Where each package is unpacked.
    packages: Vec<PathBuf>,
}

/// A file of this machine, and where it goes in the virtual one.
pub(super) type Copy = (PathBuf, PathBuf);

impl Programs {
    /// Unpacks what is not there yet, each package into a folder of its own.
    pub(super) fn get() -> Result<Programs> {
        let folder = workspace::target().join("vm").join("packages");
        let mut apt = None;
        for package in PACKAGES {
            let into = folder.join(package);
            if into.is_dir() {
                continue;
            }
            let apt = match &mut apt {
                Some(apt) => apt,
                None => {
                    let codename = apt::codename()
                        .context("this is no Debian: programs of the virtual machines come from Debian's archive")?;
                    apt.insert(Apt::new(&[&codename, &format!("{codename}-security")])?)
                }
            };
            apt.unpack(&[package], &into)?;
        }
        Ok(Programs { packages: PACKAGES.iter().map(|package| folder.join(package)).collect() })
    }

    /// A program, an unpacked one first.
    pub(super) fn find(&self, name: &str) -> Result<PathBuf> {
        let roots = self.packages.iter().map(PathBuf::as_path).chain([Path::new("/")]);
        let mut paths = roots.flat_map(|root| FOLDERS.map(|folder| root.join(folder).join(name)));
        paths.find(|path| path.is_file()).with_context(|| format!("there is no program {name}"))
    }

    /// A path on this machine as it is inside: without the folder of an unpacked package, and in `/usr`.
    pub(super) fn inside(&self, path: &Path) -> PathBuf {
        let mut unpacked = self.packages.iter().filter_map(|root| path.strip_prefix(root).ok());
        let path = unpacked.next().or_else(|| path.strip_prefix("/").ok()).unwrap_or(path);
        let is_merged = ["bin", "sbin", "lib", "lib64"].iter().any(|folder| path.starts_with(folder));
        if is_merged { Path::new("usr").join(path) } else { path.to_owned() }
    }

    /// The shared libraries that programs need, and the loader.
    pub(super) fn libraries(&self, programs: &[PathBuf]) -> Result<Vec<Copy>> {
        let folders = self.packages.iter().flat_map(|root| LIBRARIES.map(|folder| root.join(folder)));
        let folders: Vec<_> = folders.map(|folder| folder.display().to_string()).collect();
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
