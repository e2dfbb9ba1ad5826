//! Whether uio and vfio can have a function.

use super::{FunctionInfo, Group, Sysfs};
use crate::Via;

/// How far one way of having a function is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Nothing is missing.
    Ready,
    /// The kernel's driver is not loaded; a hand-over loads it.
    Module(&'static str),
    /// Not as things are.
    No {
        /// Why.
        why: String,
    },
}

impl Readiness {
    /// Whether a hand-over may be tried.
    #[must_use]
    pub fn is_possible(&self) -> bool {
        !matches!(self, Readiness::No { .. })
    }

    /// The command that mends it, where one does.
    #[must_use]
    pub fn mend(&self) -> Option<String> {
        match self {
            Readiness::Module(module) => Some(format!("modprobe {module}")),
            Readiness::Ready | Readiness::No { .. } => None,
        }
    }
}

/// Both ways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usability {
    /// By uio_pci_generic.
    pub uio: Readiness,
    /// By vfio-pci.
    pub vfio: Readiness,
}

impl Default for Usability {
    fn default() -> Self {
        Usability { uio: Readiness::Ready, vfio: Readiness::Ready }
    }
}

impl Usability {
    /// One of them.
    #[must_use]
    pub fn of(&self, via: Via) -> &Readiness {
        match via {
            Via::Uio => &self.uio,
            Via::Vfio => &self.vfio,
        }
    }
}

pub(super) fn judge(sysfs: &Sysfs, info: &FunctionInfo) -> Usability {
    let or_module = |obstacle: Option<String>, via: Via| match obstacle {
        Some(why) => Readiness::No { why },
        None if !sysfs.is_loaded(via) => Readiness::Module(via.driver()),
        None => Readiness::Ready,
    };
    if info.is_bridge() {
        let no = Readiness::No { why: "a bridge carries other functions and is not for binding".to_owned() };
        return Usability { uio: no.clone(), vfio: no };
    }
    Usability { uio: or_module(no_uio(info), Via::Uio), vfio: or_module(no_vfio(info), Via::Vfio) }
}

/// uio gives the device physical addresses: an IOMMU that translates would not know them.
fn no_uio(info: &FunctionInfo) -> Option<String> {
    let group = info.group.as_ref()?;
    match group.kind.as_deref() {
        Some("identity") => None,
        kind => Some(format!(
            "IOMMU group {} translates addresses ({}) and uio has none to give it; use vfio",
            group.number,
            kind.unwrap_or("unknown type")
        )),
    }
}

fn no_vfio(info: &FunctionInfo) -> Option<String> {
    let Some(group) = &info.group else {
        return Some("no IOMMU group: no IOMMU, or it is off (intel_iommu=on or amd_iommu=on at boot)".to_owned());
    };
    let blockers = blockers(group);
    if blockers.is_empty() {
        return None;
    }
    let others = blockers.join(", ");
    Some(format!(
        "IOMMU group {} is shared with what other drivers have: {others}; they have to be unbound or go to vfio too",
        group.number
    ))
}

/// Members that keep a group from vfio (Documentation/driver-api/vfio.rst: every one with vfio, with no driver, or a bridge).
fn blockers(group: &Group) -> Vec<String> {
    let others = group.others.iter().filter(|member| !member.is_bridge);
    others
        .filter_map(|member| {
            let driver = member.driver.as_deref()?;
            (!matches!(driver, "vfio-pci" | "pci-stub")).then(|| format!("{} ({driver})", member.name))
        })
        .collect()
}
