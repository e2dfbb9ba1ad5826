//! Debian's cloud kernel, downloaded and unpacked, never installed.
//!
//! QEMU boots an uncompressed kernel by PVH two thirds faster than a `bzImage`, which would unpack itself under emulation; so `vmlinux` is taken out of it here (Linux,
//! Documentation/arch/x86/boot.rst: `payload_offset`).

use super::programs::Programs;
use crate::apt::{self, Apt};
use crate::{step, workspace};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Long-term and in Debian 12 (from its security archive) as well as in Debian 13.
const PATTERN: &str = r"^linux-image-6\.12\.[0-9.]+.*-cloud-amd64$";
const PREFIX: &str = "linux-image-";

/// A kernel in the target folder.
pub(super) struct Kernel {
    /// `6.12.117+deb12-cloud-amd64`.
    pub(super) release: String,
    /// The uncompressed kernel.
    pub(super) vmlinux: PathBuf,
    modules: PathBuf,
}

/// A module and where it lies in a file system, decompressed.
pub(super) struct Module {
    /// `kernel/drivers/block/nbd.ko`, below `/lib/modules/RELEASE`.
    pub(super) path: String,
    /// Its bytes.
    pub(super) bytes: Vec<u8>,
}

impl Kernel {
    /// Takes the kernel that is there already, or downloads the newest.
    pub(super) fn get(programs: &Programs) -> Result<Kernel> {
        let folder = workspace::target().join("vm").join("kernel");
        let package = match there(&folder) {
            Some(package) => package,
            None => download(&folder)?,
        };
        let root = folder.join(&package);
        let release = package.trim_start_matches(PREFIX).to_owned();
        let vmlinux = root.join("vmlinux");
        if !vmlinux.is_file() {
            let image = fs::read(root.join("boot").join(format!("vmlinuz-{release}")))?;
            let work = root.join("vmlinux.part");
            unpack_image(&image, &work, programs)?;
            fs::rename(work, &vmlinux)?;
        }
        let modules = [root.join("usr/lib/modules"), root.join("lib/modules")].into_iter().find(|path| path.is_dir());
        let modules = modules.context("the package has no modules")?.join(&release);
        Ok(Kernel { release, vmlinux, modules })
    }

    /// These modules and what they need, in the order in which they have to be loaded. What is built in is left out.
    pub(super) fn modules(&self, names: &[&str], programs: &Programs) -> Result<Vec<Module>> {
        let order = fs::read_to_string(self.modules.join("modules.order"))?;
        let built_in = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let mut walk = Walk {
            kernel: self,
            programs,
            order: &order,
            built_in: &built_in,
            seen: BTreeSet::new(),
            found: Vec::new(),
        };
        for name in names {
            walk.visit(name)?;
        }
        Ok(walk.found)
    }
}

/// The newest package that was unpacked earlier.
fn there(folder: &Path) -> Option<String> {
    let names = folder.read_dir().ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(PREFIX)).max_by_key(|name| numbers(name))
}

fn download(folder: &Path) -> Result<String> {
    let codename =
        apt::codename().context("this is no Debian: the kernel of the virtual machines comes from Debian's archive")?;
    for suite in [format!("{codename}-security"), codename.clone()] {
        let apt = Apt::new(&[&suite])?;
        let Some(package) = apt.named(PATTERN)?.into_iter().max_by_key(|name| numbers(name)) else { continue };
        apt.unpack(&[&package], &folder.join(&package))?;
        return Ok(package);
    }
    bail!("{codename} has no kernel 6.12 for clouds")
}

/// The numbers of a version, for comparing.
fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Writes the kernel that is compressed in `image` to `into`.
fn unpack_image(image: &[u8], into: &Path, programs: &Programs) -> Result<()> {
    let payload = payload(image).context("not a kernel image that is understood")?;
    ensure!(payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]), "the kernel is not compressed with zstd");
    let packed = into.with_extension("zst");
    fs::write(&packed, payload)?;
    step::output(Command::new(programs.find("zstd")?).args(["-q", "-d", "-f", "-o"]).arg(into).arg(&packed))?;
    fs::remove_file(packed)?;
    Ok(())
}

/// The compressed kernel in a `bzImage` without the four bytes of length behind it.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let setup_sectors = usize::from(*image.get(0x1f1)?);
    let begin = (setup_sectors + 1) * 512 + word(0x248)?;
    let length = word(0x24c)?.checked_sub(4)?;
    image.get(begin..begin.checked_add(length)?)
}

/// Collects modules, dependencies first.
struct Walk<'a> {
    kernel: &'a Kernel,
    programs: &'a Programs,
    order: &'a str,
    built_in: &'a str,
    seen: BTreeSet<String>,
    found: Vec<Module>,
}

impl Walk<'_> {
    fn visit(&mut self, name: &str) -> Result<()> {
        if !self.seen.insert(canonical(name)) {
            return Ok(());
        }
        let is_it = |path: &&str| {
            path.rsplit('/')
                .next()
                .is_some_and(|file| canonical(file.split('.').next().unwrap_or(file)) == canonical(name))
        };
        if self.built_in.lines().any(|path| is_it(&path)) {
            return Ok(());
        }
        let path = self
            .order
            .lines()
            .find(is_it)
            .with_context(|| format!("Linux {} has no module {name}", self.kernel.release))?;
        let packed = self.kernel.modules.join(format!("{path}.xz"));
        let output = Command::new(self.programs.find("busybox")?).args(["xz", "-d", "-c"]).arg(&packed).output()?;
        ensure!(output.status.success(), "{}: {}", packed.display(), String::from_utf8_lossy(&output.stderr));
        for needed in dependencies(&output.stdout) {
            self.visit(&needed)?;
        }
        self.found.push(Module { path: path.to_owned(), bytes: output.stdout });
        Ok(())
    }
}

/// The kernel takes `-` and `_` in a module's name for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// What the section `.modinfo` says after `depends=`. (`depmod` has not run, so there is no modules.dep.)
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let text = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(numbers("linux-image-6.12.117+deb12-cloud-amd64") > numbers("linux-image-6.12.95+deb12-cloud-amd64"));
    }

    #[test]
    fn dependencies_are_read_from_the_module_itself() {
        assert_eq!(dependencies(b"x\0license=GPL\0depends=vfio,irqbypass\0name=y\0"), ["vfio", "irqbypass"]);
        assert!(dependencies(b"x\0depends=\0name=y\0").is_empty());
    }

    #[test]
    fn a_short_image_is_refused() {
        assert_eq!(payload(&[0; 0x200]), None);
        let mut image = vec![0xff; 0x400];
        image[0x1f1] = 0;
        assert_eq!(payload(&image), None);
    }
}
