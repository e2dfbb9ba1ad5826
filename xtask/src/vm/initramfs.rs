//! What a virtual machine finds at boot: everything is in memory, and there is no other file system.

use super::cpio::Cpio;
use super::kernel::Kernel;
use super::programs::Programs;
use crate::{step, workspace};
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Loaded at boot, in this order, after what they need.
const MODULES: &[&str] = &[
    "virtio_blk",
    "virtio_rng",
    "virtio_net",
    "uio_pci_generic",
    "vfio_iommu_type1",
    "vfio-pci",
    "nbd",
    "tun",
    "ext4",
    "loop",
    "virtio_console",
];

/// Programs of the machine or of the unpacked packages.
const PROGRAMS: &[&str] = &["fio", "nbd-client", "mkfs.ext4", "fsck.ext4", "ip", "iperf3", "ping"];

/// Programs of this workspace.
const OWN: &[&str] = &["cofferdam", "cofferdam-conformance", "cofferdam-vm-guest"];

/// Process 1. What comes behind `--` on the kernel's command line are its arguments, and go to the test program.
const INIT: &str = r#"#!/bin/sh
export PATH=/usr/bin:/usr/sbin HOME=/root XDG_RUNTIME_DIR=/run XDG_CACHE_HOME=/var/cache RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/hugepages /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t hugetlbfs hugetlbfs /dev/hugepages
while read -r module; do
    insmod "$module" || echo "vm error: insmod $module"
done </modules
ip link set lo up
stty -F /dev/ttyS1 raw -echo 115200
cofferdam-vm-guest "$@"
# It ends the machine itself; this is for when it could not.
echo "vm error: the test program ended with $?"
sync
poweroff -f
"#;

/// Writes the archive and gives its size in bytes.
pub(super) fn write(into: &Path, kernel: &Kernel, programs: &Programs) -> Result<u64> {
    let mut cpio = Cpio::new(BufWriter::new(File::create(into)?));
    for folder in
        ["dev", "proc", "sys", "run", "tmp", "root", "var/cache", "mnt", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"]
    {
        cpio.folder(folder)?;
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        cpio.link(name, &format!("usr/{name}"))?;
    }
    // The kernel opens it for process 1 before anything is mounted.
    cpio.characters("dev/console", 5, 1)?;
    cpio.program("init", INIT.as_bytes())?;
    cpio.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")?;
    cpio.file("etc/group", b"root:x:0:\n")?;
    cpio.link("etc/mtab", "/proc/mounts")?;

    let busybox = programs.find("busybox")?;
    cpio.program("usr/bin/busybox", &read(&busybox)?)?;
    // `ip` of busybox knows no network namespaces, and its `ping` fragments what does not fit.
    let is_own = |applet: &&str| *applet == "busybox" || PROGRAMS.contains(applet);
    for applet in step::output(Command::new(&busybox).arg("--list"))?.lines().filter(|applet| !is_own(applet)) {
        cpio.link(&format!("usr/bin/{applet}"), "busybox")?;
    }

    let mut linked = Vec::new();
    for name in PROGRAMS {
        let path = programs.find(name)?;
        cpio.program(&shown(&programs.inside(&path))?, &read(&path)?)?;
        linked.push(path);
    }
    for name in OWN {
        let path = stripped(name)?;
        cpio.program(&format!("usr/bin/{name}"), &read(&path)?)?;
        linked.push(path);
    }
    for (from, to) in programs.libraries(&linked)? {
        cpio.program(&shown(&to)?, &read(&from)?)?;
    }
    let drivers = workspace::target().join("drivers");
    components(&mut cpio, &drivers, "drivers")?;
    components(&mut cpio, &drivers.join("test"), "drivers/test")?;

    let mut order = String::new();
    for module in kernel.modules(MODULES, programs)? {
        let path = format!("usr/lib/modules/{}/{}", kernel.release, module.path);
        cpio.file(&path, &module.bytes)?;
        order += &format!("/{path}\n");
    }
    cpio.file("modules", order.as_bytes())?;
    Ok(cpio.finish()?.into_inner()?.metadata()?.len())
}

/// Every component of a folder.
fn components(cpio: &mut Cpio<BufWriter<File>>, from: &Path, to: &str) -> Result<()> {
    let entries = from.read_dir().with_context(|| from.display().to_string())?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "wasm"));
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        cpio.file(&format!("{to}/{name}"), &read(&path)?)?;
    }
    Ok(())
}

/// A release program without its line tables, which are most of it.
fn stripped(name: &str) -> Result<PathBuf> {
    let from = workspace::program(name);
    let to = workspace::target().join("vm").join(name);
    step::output(Command::new("strip").arg("-o").arg(&to).arg(&from))?;
    Ok(to)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

fn shown(path: &Path) -> Result<String> {
    Ok(path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?.to_owned())
}
