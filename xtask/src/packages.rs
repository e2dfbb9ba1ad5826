//! The Debian packages whose programs the tests talk to.

use crate::apt::{self, Apt};
use crate::step;
use anyhow::{Context, Result, bail};
use std::process::Command;

/// A program that the tests run, and the packages that may hold it, in the order in which they are tried.
struct Need {
    program: &'static str,
    packages: &'static [&'static str],
}

/// Debian 12 and Ubuntu 24.04 keep `qemu-storage-daemon` in `qemu-system-common`, later releases in `qemu-utils`.
const NEEDS: &[Need] = &[
    Need { program: "qemu-img", packages: &["qemu-utils"] },
    Need { program: "qemu-io", packages: &["qemu-utils"] },
    Need { program: "qemu-storage-daemon", packages: &["qemu-utils", "qemu-system-common"] },
    Need { program: "nbdinfo", packages: &["libnbd-bin"] },
    Need { program: "nbdcopy", packages: &["libnbd-bin"] },
    Need { program: "fio", packages: &["fio"] },
    Need { program: "dpdk-testpmd", packages: &["dpdk-dev"] },
    Need { program: "rngtest", packages: &["rng-tools-debian", "rng-tools5"] },
    Need { program: "socat", packages: &["socat"] },
    Need { program: "expect", packages: &["expect"] },
    Need { program: "mkfs.ext4", packages: &["e2fsprogs"] },
    Need { program: "ip", packages: &["iproute2"] },
    Need { program: "setpriv", packages: &["util-linux"] },
    Need { program: "qemu-system-x86_64", packages: &["qemu-system-x86"] },
];

/// Whether a program is on the path.
pub(crate) fn is_installed(program: &str) -> bool {
    let Some(path) = std::env::var_os("PATH") else {
        return false;
    };
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Makes sure that every program is there: installs what is missing when run as root on Debian, and otherwise fails with the command to type.
pub(crate) fn ensure() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|need| need.program).collect();
    let names = names.join(", ");
    if !rustix::process::geteuid().is_root() || !is_installed("apt-get") {
        bail!("missing: {names}\nOn Debian or Ubuntu: sudo apt-get install {}", packages_of(&missing).join(" "));
    }
    step::announce(&format!("installing what holds {names}"));
    apt_get(&["update"]).or_else(|error| {
        // A stale index may still be good enough; the installation tells.
        eprintln!("    {error:#}");
        anyhow::Ok(())
    })?;
    for need in missing {
        for package in need.packages {
            if is_installed(need.program) {
                break;
            }
            install(package)?;
        }
        if !is_installed(need.program) {
            bail!("{} is not in any of: {}", need.program, need.packages.join(", "));
        }
    }
    Ok(())
}

/// Installs a package of the machine's own suites. Where parts of the same source came from the backports, apt refuses what does not fit them; then it is
/// taken from there too.
fn install(package: &str) -> Result<()> {
    let refused = match apt_get(&["install", "--yes", "--no-remove", "--no-install-recommends", package]) {
        Ok(()) => return Ok(()),
        Err(refused) => refused,
    };
    let Some(codename) = apt::codename() else { return Err(refused) };
    let backports = format!("{codename}-backports");
    Apt::new(&[&codename, &format!("{codename}-security"), &backports])?.install(package, &backports).context(refused)
}

fn missing() -> Vec<&'static Need> {
    NEEDS.iter().filter(|need| !is_installed(need.program)).collect()
}

fn packages_of(needs: &[&Need]) -> Vec<&'static str> {
    let mut packages: Vec<_> = needs.iter().flat_map(|need| need.packages.iter().copied()).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let what = format!("apt-get {}", arguments.join(" "));
    let output = step::with_signs_of_life(&what, || {
        Command::new("apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .arg("--quiet")
            .args(arguments)
            .output()
            .context("cannot start apt-get")
    })?;
    if !output.status.success() {
        bail!("{what}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
