//! File systems that are unmounted whatever becomes of the scenario.

use std::path::Path;

use anyhow::{Context, Result};

use crate::vm::Vm;

/// A directory where a file system is mounted; dropped, it is not any more.
#[derive(Debug)]
pub struct Mount<'a> {
    vm: &'a Vm,
    at: &'static str,
}

impl<'a> Mount<'a> {
    /// Mounts the ext4 file system on `device` at the directory `at`, which is made.
    ///
    /// # Errors
    /// When it is not mounted.
    pub fn new(vm: &'a Vm, device: &Path, at: &'static str, options: &str) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        let device = device.to_str().context("not UTF-8")?;
        vm.run(["mount", "-t", "ext4", "-o", options, device, at])?.success()?;
        Ok(Mount { vm, at })
    }

    /// Unmounts.
    ///
    /// # Errors
    /// When somebody uses it still.
    pub fn end(self) -> Result<()> {
        self.vm.run(["umount", self.at])?.success()?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = self.vm.run(["umount", "-l", self.at]);
    }
}
