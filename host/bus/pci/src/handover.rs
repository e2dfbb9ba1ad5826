//! From the kernel's driver to uio or vfio, and back.
//!
//! Both directions are a *plan*, made from what the kernel says now and from the record, and then carried out step by step. A plan leaves out what is done already, so
//! whatever was interrupted (SIGKILL between any two steps) is finished by running either command again; a dry run shows the plan and does nothing.
//!
//! ```text
//! hand over:  record -> load the module -> driver_override -> unbind -> drivers_probe -> look at the driver link
//! give back:  unbind -> bus mastering off, read back -> reset -> free what a killed host left -> driver_override -> drivers_probe -> look -> drop the record
//! ```
//!
//! The record is written before anything is changed and dropped after everything is as it was: a function that is not as it was always has one. It says where the function
//! came from, and for whom it was handed over: what an operator bound stays bound when a load that used it ends.
//!
//! Failure: a step that fails after the record was written is followed by an attempt to give back; where that fails too, the record stays and `unbind` goes on from there. The
//! kernel may sit in a write to `unbind` or `drivers_probe` while a driver probes or shuts down; the write has a thread of its own and 10 s, then its caller is told. The
//! kernel goes on with it, and the next plan starts from what came of it.
//!
//! A function that is gone goes back to nobody, and its record goes: at whatever step it went, and also while the kernel still lists it. Nothing is asked of such a one.
//!
//! Whoever calls has the [`Claim`], so that nobody else changes the function meanwhile.

mod effects;
mod plan;
mod process;
mod silence;
pub(crate) mod store;

use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::claim::Claim;
use crate::{Address, PciError, Sysfs};

pub(crate) use effects::{Effects, Kernel};
pub use plan::Step;
pub use process::ProcessId;
pub use silence::Silenced;
pub use store::Record;

use plan::Restored;
use store::Store;

/// How long the driver link may take to show what a write was answered for: drivers that probe asynchronously.
const SETTLE: Duration = Duration::from_secs(10);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Which kernel driver makes a function usable from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// uio_pci_generic: no IOMMU.
    Uio,
    /// vfio-pci: an IOMMU stands behind it.
    Vfio,
}

impl Via {
    /// The kernel driver's name, which is also its module's.
    #[must_use]
    pub fn driver(self) -> &'static str {
        match self {
            Via::Uio => "uio_pci_generic",
            Via::Vfio => "vfio-pci",
        }
    }

    /// `uio` or `vfio`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Via::Uio => "uio",
            Via::Vfio => "vfio",
        }
    }

    /// Which one has a function whose kernel driver this is.
    #[must_use]
    pub fn of_driver(driver: Option<&str>) -> Option<Via> {
        [Via::Uio, Via::Vfio].into_iter().find(|via| Some(via.driver()) == driver)
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// For whom a function was handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// An operator's `bind`: stays until an `unbind`.
    Operator,
    /// A load of this process: goes back when it ends.
    Load(ProcessId),
}

impl By {
    /// A load of the calling process.
    #[must_use]
    pub fn load(sysfs: &Sysfs) -> By {
        By::Load(ProcessId::own(sysfs))
    }
}

/// How to hand over or give back.
#[derive(Clone, Copy, Debug)]
pub struct HandoverOptions {
    /// Hand over: take away what is in use. Give back: also what no record tells of, to the driver of the kernel's choice.
    pub force: bool,
    /// For whom.
    pub by: By,
}

/// What a hand-over did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The function.
    pub address: Address,
    /// What has it now.
    pub via: Via,
    /// What was done; nothing where all was as it should be.
    pub steps: Vec<Step>,
    /// It was with this driver before and no record tells of it: somebody else's doing, which `give_back` leaves alone.
    pub was_there: bool,
    /// Whether bus mastering was seen to be off after what a killed host may have left (or the function is out of the machine); `None` where there was no need.
    pub is_silent: Option<bool>,
    /// Bytes that were freed of that.
    pub freed_bytes: u64,
}

/// What a return did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The function.
    pub address: Address,
    /// The driver that has it now.
    pub driver: Option<String>,
    /// What was done.
    pub steps: Vec<Step>,
    /// Whether bus mastering was seen to be off before it went back (or the function is out of the machine); `None` where there was no need.
    pub is_silent: Option<bool>,
    /// Bytes that were freed of what a killed host had left behind.
    pub freed_bytes: u64,
    /// It stays as it is: an operator has bound it, and a load does not undo that.
    pub is_kept: bool,
}

/// What `hand_over` would do. Refuses what it refuses, and changes nothing.
///
/// # Errors
/// As [`hand_over`], as far as they can be known before.
pub fn plan_hand_over(
    sysfs: &Sysfs,
    address: Address,
    via: Via,
    options: &HandoverOptions,
) -> Result<Vec<Step>, PciError> {
    let info = sysfs.function(address)?;
    let record = Store::open(sysfs)?.map_or(Ok(None), |store| store.record(sysfs, address, options.force))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    plan::hand_over(sysfs, &info, record.as_ref(), via, options, now)
}

/// Hands a function over to uio or vfio. What is so already stays so; but a load that finds a function with uio makes it silent first (bus mastering off, reset), for a host
/// that was killed may have left it running.
///
/// # Errors
/// `InUse`, unless forced; `Unusable` with the reason and what mends it; `NotFound`; `Permission`; `Stuck`; `Io`. Where it failed half-way it was given back, or the record
/// is still there and [`give_back`] goes on.
pub fn hand_over(sysfs: &Sysfs, claim: &Claim, via: Via, options: &HandoverOptions) -> Result<Handover, PciError> {
    let address = claim.address();
    let steps = plan_hand_over(sysfs, address, via, options)?;
    let is_recorded = |steps: &[Step]| steps.iter().any(|step| matches!(step, Step::Record { .. }));
    let was_there = !is_recorded(&steps) && Store::open(sysfs)?.is_none_or(|store| !store.has_record(address));
    let mut done = Done::default();
    let Err(error) = carry_out(sysfs, address, &steps, &mut done) else {
        if !steps.is_empty() {
            tracing::info!(%address, driver = via.driver(), "handed over");
        }
        let Done { is_silent, freed_bytes, .. } = done;
        return Ok(Handover { address, via, steps, was_there, is_silent, freed_bytes });
    };
    // A kernel that is still busy with a write is not asked for the opposite, and a load does not undo what an operator bound.
    let is_operators = matches!(record(sysfs, address), Ok(Some(Record { by: By::Operator, .. })));
    if matches!(error, PciError::Stuck { .. }) || (is_operators && options.by != By::Operator) {
        return Err(error);
    }
    let back = HandoverOptions { force: false, by: By::Operator };
    if let Err(second) = give_back(sysfs, claim, &back) {
        tracing::warn!(%address, error = %second, "not given back after a hand-over that failed; 'cofferdam unbind' goes on");
    }
    Err(error)
}

/// What `give_back` would do.
///
/// # Errors
/// As [`give_back`], as far as they can be known before.
pub fn plan_give_back(sysfs: &Sysfs, address: Address, options: &HandoverOptions) -> Result<Vec<Step>, PciError> {
    let store = Store::open(sysfs)?;
    let record = store.as_ref().map_or(Ok(None), |store| store.record(sysfs, address, options.force))?;
    let has_record = store.is_some_and(|store| store.has_record(address));
    match sysfs.function(address) {
        Ok(info) => {
            let is_absent = silence::is_absent(sysfs, address);
            plan::give_back(sysfs, &info, record.as_ref(), has_record, is_absent, options)
        }
        Err(PciError::NotFound(_)) if has_record => Ok(plan::forget_absent(sysfs, address)),
        Err(error) => Err(error),
    }
}

/// Gives a function back to where it came from. Works after the process that had it was killed. What is so already stays so.
///
/// # Errors
/// `Unusable` where no record tells where it came from, unless forced, and where its old driver does not take it; `NotFound` (a function that is gone and has a record loses
/// the record, without an error, and so does one that is out of the machine and still listed); `Permission`; `Stuck`; `Io`. The record is then still there, and a second call goes on.
pub fn give_back(sysfs: &Sysfs, claim: &Claim, options: &HandoverOptions) -> Result<Report, PciError> {
    let address = claim.address();
    let mut steps = plan_give_back(sysfs, address, options)?;
    let mut done = Done::default();
    if let Err(error) = carry_out(sysfs, address, &steps, &mut done) {
        // The kernel took it out of sysfs meanwhile, as it does with what is unplugged: then it goes back to nobody.
        let is_gone = matches!(sysfs.function(address), Err(PciError::NotFound(_)));
        if !is_gone || matches!(error, PciError::Stuck { .. } | PciError::Permission { .. }) {
            return Err(error);
        }
        steps = plan_give_back(sysfs, address, options)?;
        carry_out(sysfs, address, &steps, &mut done)?;
    }
    let driver = match sysfs.driver(address) {
        Ok(driver) => driver,
        Err(PciError::NotFound(_)) => None,
        Err(error) => return Err(error),
    };
    let is_kept = steps.is_empty() && Via::of_driver(driver.as_deref()).is_some();
    if !steps.is_empty() {
        tracing::info!(%address, driver = driver.as_deref().unwrap_or("none"), "given back");
    }
    Ok(Report { address, driver, steps, is_silent: done.is_silent, freed_bytes: done.freed_bytes, is_kept })
}

/// The record of a function that was handed over.
///
/// # Errors
/// `Permission`, `Io`; `Unusable` where it is damaged.
pub fn record(sysfs: &Sysfs, address: Address) -> Result<Option<Record>, PciError> {
    Store::open(sysfs)?.map_or(Ok(None), |store| store.record(sysfs, address, false))
}

/// A load of this process goes on with what one of another process was handed over: that is written down.
///
/// # Errors
/// As [`record`], and when it cannot be written.
pub(crate) fn inherit(sysfs: &Sysfs, address: Address) -> Result<(), PciError> {
    let by = By::load(sysfs);
    match record(sysfs, address)? {
        Some(record @ Record { by: By::Load(_), .. }) if record.by != by => {
            Store::make(sysfs)?.put_record(sysfs, &Record { by, ..record })
        }
        // What an operator bound stays an operator's.
        _ => Ok(()),
    }
}

#[derive(Default)]
struct Done {
    is_silent: Option<bool>,
    freed_bytes: u64,
    silenced: Option<Silenced>,
}

fn carry_out(sysfs: &Sysfs, address: Address, steps: &[Step], done: &mut Done) -> Result<(), PciError> {
    for step in steps {
        tracing::debug!(%address, %step, "hand-over");
        match step {
            Step::Record { record, .. } => Store::make(sysfs)?.put_record(sysfs, record)?,
            Step::Module(module) => sysfs.effects.load_module(module).map_err(|error| PciError::Unusable {
                address,
                why: format!(
                    "'modprobe {module}' failed ({error}); run it to see why, or choose the other of --uio and --vfio"
                ),
            })?,
            Step::Override { value, .. } => {
                let text = value.as_deref().unwrap_or("");
                write(sysfs, address, &format!("bus/pci/devices/{address}/driver_override"), &format!("{text}\n"))?;
            }
            Step::Unbind { driver, .. } => unbind(sysfs, address, driver)?,
            Step::Probe { .. } => write(sysfs, address, "bus/pci/drivers_probe", &address.to_string())?,
            Step::Settle { driver, .. } => settle(sysfs, address, driver)?,
            Step::Silence { .. } => {
                done.silenced = silence::silence(sysfs, address);
                done.is_silent = Some(done.silenced.is_some());
            }
            Step::Reset { .. } => {
                if let Err(error) = write(sysfs, address, &format!("bus/pci/devices/{address}/reset"), "1") {
                    // Bus mastering is what had to go off; the driver that gets it resets it in its own way.
                    tracing::warn!(%address, %error, "no reset");
                }
                // A reset keeps the command register (the kernel saves and restores it); believe it when it is read.
                done.silenced = done.silenced.take().and_then(|_| silence::confirm(sysfs, address));
                done.is_silent = Some(done.silenced.is_some());
            }
            Step::Absent { .. } => {
                done.silenced = silence::confirm(sysfs, address);
                done.is_silent = Some(done.silenced.is_some());
            }
            Step::Free { .. } => {
                if let Some(silenced) = &done.silenced {
                    done.freed_bytes += silence::after_reset(sysfs, silenced)?;
                }
            }
            Step::Forget { .. } => Store::make(sysfs)?.remove_record(sysfs, address)?,
        }
    }
    Ok(())
}

/// Writes to sysfs, bounded.
fn write(sysfs: &Sysfs, address: Address, below: &str, value: &str) -> Result<(), PciError> {
    let what = || format!("write '{}' to {}", value.trim_end(), sysfs.told(below));
    sysfs.effects.write(&sysfs.sys, below, value).map_err(|source| PciError::of_write(address, what(), source))
}

fn unbind(sysfs: &Sysfs, address: Address, driver: &str) -> Result<(), PciError> {
    let written = write(sysfs, address, &format!("bus/pci/devices/{address}/driver/unbind"), &address.to_string());
    match written {
        // It may have let go by itself between the look and the write.
        Err(PciError::Io { .. }) if sysfs.driver(address)?.as_deref() != Some(driver) => Ok(()),
        Err(error) => Err(error),
        Ok(()) if wait_for(sysfs, address, |now| now != Some(driver))? => Ok(()),
        Ok(()) => {
            Err(PciError::Unusable { address, why: format!("{driver} does not let go of it (dmesg may say why)") })
        }
    }
}

/// Waits until the function has the driver that it is to have.
fn settle(sysfs: &Sysfs, address: Address, driver: &Restored) -> Result<(), PciError> {
    match driver {
        Restored::Any => Ok(()),
        Restored::Driver(wanted) => {
            // The kernel answers a probe that matched nothing as it answers one that worked, and is done with it either way but for drivers that probe asynchronously.
            if sysfs.driver(address)?.is_none() && Via::of_driver(Some(wanted)).is_none() && sysfs.has_driver(wanted) {
                // Matched by an id that was given by hand (new_id), or not at all: ask that driver by name. It says no where it has been asked already.
                let asked = write(sysfs, address, &format!("bus/pci/drivers/{wanted}/bind"), &address.to_string());
                if let Err(stuck @ PciError::Stuck { .. }) = asked {
                    return Err(stuck);
                }
            }
            if wait_for(sysfs, address, |now| now == Some(wanted))? {
                return Ok(());
            }
            let now =
                sysfs.driver(address)?.map_or_else(|| "no driver has it".to_owned(), |now| format!("{now} has it"));
            Err(PciError::Unusable { address, why: format!("{wanted} has not taken it, {now} (dmesg may say why)") })
        }
    }
}

fn wait_for(sysfs: &Sysfs, address: Address, is_so: impl Fn(Option<&str>) -> bool) -> Result<bool, PciError> {
    let deadline = Instant::now() + sysfs.effects.patience(SETTLE);
    loop {
        if is_so(sysfs.driver(address)?.as_deref()) {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
pub(crate) mod tests;
