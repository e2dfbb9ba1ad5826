//! The power of a root port's slot: how a device is pulled out with nobody told.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

/// Capabilities pointer, and the capability of PCI Express (PCI Express Base 5.0, sections 7.5.1.1.11 and 7.5.3).
const CAPABILITIES: u64 = 0x34;
const EXPRESS: u8 = 0x10;
/// Most capabilities that 192 bytes hold.
const MOST: usize = 48;
/// Slot Capabilities and Slot Control (sections 7.5.3.9 and 7.5.3.10), from the start of the capability.
const SLOT_CAPABILITIES: u64 = 0x14;
const SLOT_CONTROL: u64 = 0x18;
/// Power Controller Present.
const HAS_POWER_CONTROLLER: u16 = 1 << 1;
/// Power Controller Control: set, the power is off.
const POWER_OFF: u16 = 1 << 10;

/// A slot whose power can be switched.
#[derive(Debug)]
pub struct Slot {
    config: PathBuf,
    /// Where the capability is.
    express: u64,
}

impl Slot {
    /// The slot of the port whose configuration space this file of sysfs is.
    ///
    /// # Errors
    /// When its power cannot be switched.
    pub fn open(config: PathBuf) -> Result<Slot> {
        let mut slot = Slot { config, express: 0 };
        let mut at = slot.read(CAPABILITIES)?.to_le_bytes()[0];
        for _ in 0..MOST {
            ensure!(at != 0, "{} is no port of PCI Express", slot.config.display());
            let [id, next] = slot.read(at.into())?.to_le_bytes();
            if id == EXPRESS {
                slot.express = at.into();
                break;
            }
            at = next;
        }
        ensure!(slot.express != 0, "{}: capabilities without an end", slot.config.display());
        let has = slot.read(slot.express + SLOT_CAPABILITIES)? & HAS_POWER_CONTROLLER;
        ensure!(has != 0, "{}: a slot without a power controller", slot.config.display());
        Ok(slot)
    }

    /// Switches the power.
    ///
    /// # Errors
    /// When the port does not take it.
    pub fn power(&self, on: bool) -> Result<()> {
        let at = self.express + SLOT_CONTROL;
        let now = self.read(at)?;
        let wanted = if on { now & !POWER_OFF } else { now | POWER_OFF };
        let file =
            OpenOptions::new().write(true).open(&self.config).with_context(|| self.config.display().to_string())?;
        file.write_all_at(&wanted.to_le_bytes(), at).context("slot control")?;
        let now = self.read(at)?;
        ensure!(now & POWER_OFF == wanted & POWER_OFF, "slot control reads {now:#x} and not {wanted:#x}");
        Ok(())
    }

    fn read(&self, at: u64) -> Result<u16> {
        let file = std::fs::File::open(&self.config).with_context(|| self.config.display().to_string())?;
        let mut word = [0; 2];
        file.read_exact_at(&mut word, at).with_context(|| format!("{} at {at:#x}", self.config.display()))?;
        Ok(u16::from_le_bytes(word))
    }
}
