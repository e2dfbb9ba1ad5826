//! What is to be done, from what is: pure decisions. A step that is done already is not in the plan.

use std::fmt;

use super::{By, HandoverOptions, Record, Via};
use crate::sysfs::{FunctionInfo, Readiness};
use crate::{Address, PciError, Sysfs};

/// What is to have the function in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Restored {
    /// This driver.
    Driver(String),
    /// Whatever the kernel finds for it.
    Any,
}

/// One step. Its text is what an operator would type for it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the path that is written, for the text, and the value")]
pub enum Step {
    /// Writes down where the function came from.
    Record { record: Box<Record>, path: String },
    /// Loads a module.
    Module(String),
    /// Says which driver alone may have it, or takes that back.
    Override { value: Option<String>, path: String },
    /// Takes it from the driver that has it.
    Unbind { address: Address, driver: String, path: String },
    /// Has the kernel look for a driver.
    Probe { address: Address, path: String },
    /// Looks which driver has it now, for up to 10 s.
    Settle { driver: Restored, path: String },
    /// Bus mastering off, and seen to be off.
    Silence { address: Address },
    /// Resets the function; bus mastering is looked at again.
    Reset { path: String },
    /// Looks that the function is out of the machine.
    Absent { address: Address },
    /// Frees what a killed host left behind, if the function was seen to be silent.
    Free { address: Address },
    /// Drops the record.
    Forget { path: String },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Record { record, path } => {
                let driver = record.driver.as_deref().unwrap_or("no driver");
                let only = record.driver_override.as_deref().unwrap_or("none");
                write!(f, "# remember in {path}: {driver}, driver_override {only}")
            }
            Step::Module(module) => write!(f, "modprobe {module}"),
            Step::Override { value: Some(value), path } => write!(f, "echo '{value}' > {path}"),
            Step::Override { value: None, path } => write!(f, "echo > {path}"),
            Step::Unbind { address, path, .. } | Step::Probe { address, path } => write!(f, "echo {address} > {path}"),
            Step::Settle { driver: Restored::Driver(driver), path } => write!(f, "readlink {path}   # now {driver}"),
            Step::Settle { driver: Restored::Any, path } => write!(f, "readlink {path}   # whatever the kernel chose"),
            Step::Silence { address } => {
                write!(f, "setpci -s {address} COMMAND=0:4   # bus mastering off, and read back")
            }
            Step::Reset { path } => write!(f, "echo 1 > {path}"),
            Step::Absent { address } => write!(f, "# {address} is out of the machine"),
            Step::Free { address } => write!(f, "# free what a killed host left in hugepages, cofferdam/{address}"),
            Step::Forget { path } => write!(f, "rm {path}"),
        }
    }
}

/// Where things are, as told.
struct Paths<'a> {
    sysfs: &'a Sysfs,
    address: Address,
}

impl Paths<'_> {
    fn of(&self, attribute: &str) -> String {
        self.sysfs.told(&format!("bus/pci/devices/{}/{attribute}", self.address))
    }

    fn record(&self) -> String {
        self.sysfs.told_run(&format!("cofferdam/pci/{}.json", self.address))
    }

    fn only(&self, value: Option<&str>) -> Step {
        Step::Override { value: value.map(str::to_owned), path: self.of("driver_override") }
    }

    fn unbind(&self, driver: &str) -> Step {
        Step::Unbind { address: self.address, driver: driver.to_owned(), path: self.of("driver/unbind") }
    }

    /// What a killed host may have left running.
    fn silence(&self, info: &FunctionInfo) -> Vec<Step> {
        let (address, reset) = (self.address, info.has_reset.then(|| Step::Reset { path: self.of("reset") }));
        [Some(Step::Silence { address }), reset, Some(Step::Free { address })].into_iter().flatten().collect()
    }

    fn probe(&self) -> Step {
        Step::Probe { address: self.address, path: self.sysfs.told("bus/pci/drivers_probe") }
    }

    fn settle(&self, driver: Restored) -> Step {
        Step::Settle { driver, path: self.of("driver") }
    }
}

fn is_ours(name: Option<&str>) -> bool {
    Via::of_driver(name).is_some()
}

/// A record is about a function, not about a place.
fn about<'a>(record: Option<&'a Record>, info: &FunctionInfo) -> Option<&'a Record> {
    record.filter(|record| record.vendor == info.ids.vendor && record.device == info.ids.device)
}

pub(super) fn hand_over(
    sysfs: &Sysfs,
    info: &FunctionInfo,
    record: Option<&Record>,
    via: Via,
    options: &HandoverOptions,
    unix_s: u64,
) -> Result<Vec<Step>, PciError> {
    let address = info.address;
    let record = about(record, info);
    let (driver, target) = (info.driver.as_deref(), via.driver());
    if driver == Some("?") {
        return Err(PciError::Unusable {
            address,
            why: "its driver's name is not one that it could go back to".into(),
        });
    }
    let readiness = info.usable.of(via);
    if let Readiness::No { why } = readiness {
        return Err(PciError::Unusable { address, why: format!("{via}: {why}") });
    }
    let paths = Paths { sysfs, address };
    // Nobody has it (the caller has the claim), but a host that was killed may have left it running: uio does not stop it for certain, vfio does.
    let leftovers = || match options.by {
        By::Load(_) if driver == Some(Via::Uio.driver()) => paths.silence(info),
        By::Load(_) | By::Operator => Vec::new(),
    };
    if driver == Some(target) && record.is_none() {
        return Ok(leftovers());
    }
    if driver.is_some() && !is_ours(driver) && !options.force {
        let uses = sysfs.uses(address, true);
        if !uses.is_empty() {
            let why = uses.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            return Err(PciError::InUse { address, why });
        }
    }
    let mut steps = Vec::new();
    let wanted = new_record(info, record, via, options.by, unix_s);
    if record != Some(&wanted) {
        steps.push(Step::Record { record: Box::new(wanted), path: paths.record() });
    }
    steps.extend(leftovers());
    if let Readiness::Module(module) = readiness {
        steps.push(Step::Module((*module).to_owned()));
    }
    if info.driver_override.as_deref() != Some(target) {
        steps.push(paths.only(Some(target)));
    }
    if driver != Some(target) {
        steps.extend(driver.map(|driver| paths.unbind(driver)));
        steps.push(paths.probe());
        steps.push(paths.settle(Restored::Driver(target.to_owned())));
    }
    Ok(steps)
}

/// Where the function comes from: what the kernel says, unless that is what an earlier hand-over made of it.
fn new_record(info: &FunctionInfo, record: Option<&Record>, via: Via, by: By, unix_s: u64) -> Record {
    let was = |record: &Record| {
        // A kernel driver has it: nothing was done yet, or it went back by another way, and that driver is where it comes from now.
        let driver = match info.driver.as_deref() {
            Some(_) if !is_ours(info.driver.as_deref()) => info.driver.clone(),
            _ => record.driver.clone(),
        };
        let only = if is_ours(info.driver_override.as_deref()) || info.driver.is_none() {
            record.driver_override.clone()
        } else {
            info.driver_override.clone()
        };
        (driver, only)
    };
    let (driver, driver_override) = record.map_or_else(|| (info.driver.clone(), info.driver_override.clone()), was);
    let address = info.address.to_string();
    let (vendor, device) = (info.ids.vendor, info.ids.device);
    // What an operator bound stays an operator's, whoever uses it meanwhile.
    let by = match record {
        Some(Record { by: By::Operator, .. }) => By::Operator,
        _ => by,
    };
    let mut wanted = Record { address, vendor, device, driver, driver_override, via, by, unix_s };
    if let Some(record) = record
        && *record == (Record { unix_s: record.unix_s, ..wanted.clone() })
    {
        wanted.unix_s = record.unix_s;
    }
    wanted
}

/// `has_record`: whether there is a record to drop, be it one that is not about this function or that cannot be read. `is_absent`: the kernel lists the function, but it is out of
/// the machine. Then it is taken from uio or vfio, and nothing is asked of it: a reset would hold the kernel up for over a minute, and no driver takes it.
pub(super) fn give_back(
    sysfs: &Sysfs,
    info: &FunctionInfo,
    record: Option<&Record>,
    has_record: bool,
    is_absent: bool,
    options: &HandoverOptions,
) -> Result<Vec<Step>, PciError> {
    let address = info.address;
    let (driver, only) = (info.driver.as_deref(), info.driver_override.as_deref());
    let paths = Paths { sysfs, address };
    let record = about(record, info);
    let mut steps = Vec::new();
    let (to, to_only) = match (record, options.by) {
        (Some(Record { by: By::Operator, .. }), By::Load(_)) => return Ok(steps),
        (Some(record), _) => (record.driver.clone().map(Restored::Driver), record.driver_override.as_deref()),
        (None, By::Operator) if is_ours(driver) && options.force => (Some(Restored::Any), None),
        (None, By::Operator) if is_ours(driver) => {
            let why = format!(
                "{} has it, and no record tells where it came from: somebody else bound it; --force lets the kernel choose a driver for it",
                driver.unwrap_or_default()
            );
            return Err(PciError::Unusable { address, why });
        }
        (None, _) => {
            if has_record {
                steps.push(Step::Forget { path: paths.record() });
            }
            return Ok(steps);
        }
    };
    let is_there = match &to {
        Some(Restored::Driver(to)) => driver == Some(to),
        Some(Restored::Any) | None => false,
    };
    let is_between = (driver.is_none() || is_ours(driver)) && !is_there;
    if is_between {
        // First, because vfio-pci holds this up while somebody has the device open, and a reset would hit that one.
        steps.extend(driver.map(|driver| paths.unbind(driver)));
        if is_absent {
            steps.extend([Step::Absent { address }, Step::Free { address }]);
        } else {
            steps.extend(paths.silence(info));
        }
    }
    if is_ours(only) && only != to_only {
        steps.push(paths.only(to_only));
    }
    if is_between
        && !is_absent
        && let Some(to) = to
    {
        if let Restored::Driver(to) = &to
            && !sysfs.has_driver(to)
            && let Some(module) = module_of(to)
        {
            steps.push(Step::Module(module));
        }
        steps.push(paths.probe());
        steps.push(paths.settle(to));
    }
    if has_record {
        steps.push(Step::Forget { path: paths.record() });
    }
    Ok(steps)
}

/// A function that is gone goes back to nobody; what it could write to is free.
pub(super) fn forget_absent(sysfs: &Sysfs, address: Address) -> Vec<Step> {
    let paths = Paths { sysfs, address };
    vec![Step::Absent { address }, Step::Free { address }, Step::Forget { path: paths.record() }]
}

/// The module that is likely to have a driver of this name; `None` where the name is none of a module's.
fn module_of(driver: &str) -> Option<String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (driver.bytes().all(fits) && !driver.starts_with('-')).then(|| driver.to_owned())
}
