//! A function that runs, in the hands of another process (`cofferdam daemon --takeover`): neither it nor the kernel's driver hears of it.
//!
//! ```text
//! this process:   runs -> export: dormant --------------------------------------> dropped, or resumed
//! the other one:                  adopt: dormant; maps BARs and memory, looks --> resumed, or dropped
//! ```
//!
//! Dormant, neither takes an interrupt, writes a register or gives anything back. What is only looked at (configuration space, device status and configuration) has no effect at a
//! function, so both may.
//!
//! What is passed on are the open files and not ways to open them again, because much hangs on the last close of *that* file: uio_pci_generic switches bus mastering off with each open
//! file of `/dev/uioN` that ends, whoever else has another; a vfio group is open once; what the IOMMU was told is the container's; a claim is a socket. So the end of either process does
//! nothing as long as the other one lives, and if both end it is as when one is killed.
//!
//! | descriptor, in order | |
//! | --- | --- |
//! | claim | the abstract name that keeps others from the function |
//! | uio: node, folder, `config`, loss | `/dev/uioN`, which interrupts are counted for by open file; sysfs; the event of a function that is lost |
//! | vfio: function, group, container, `config`, INTx, loss | sysfs's `config`; the two events the kernel signals |
//! | change | the event of a changed configuration: with MSI-X the kernel signals it |
//! | call, for each queue; shared vector | the same |
//!
//! BARs are mapped anew. Memory behind an IOMMU stays where it is as long as the container lives, whoever mapped it; memory in hugepages stays where it is as long as its file is
//! there, which is looked at. The record of where the function came from is on disk; that another process is to give it back is written down after the commit.
//!
//! Who can forge what is adopted: a process of the same user. It is checked for sense, so that a mistake is an error.

use std::os::fd::{BorrowedFd, OwnedFd};

use cofferdam_device::{Exported, NotExportable, Transport};
use serde::{Deserialize, Serialize};

use crate::claimed::Claimed;
use crate::lease::{Lease, Leased};
use crate::uio::UioFunction;
use crate::vfio::{VfioFunction, Wired};
use crate::virtio::{self, VirtioPci};
use crate::{Address, PciError, Sysfs, Via};

/// [`Exported::kind`] of these devices.
pub const KIND: &str = "pci";

/// Of a claimed function, what another process goes on with.
pub(crate) struct Parcel {
    pub(crate) state: FunctionState,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// What cannot be found out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "via", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum FunctionState {
    Uio,
    Vfio {
        /// What signals interrupts.
        wired: Wired,
    },
}

/// Memory in named hugepages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pages {
    /// The file's name in the function's folder.
    pub(crate) name: String,
    /// Bytes of each.
    pub(crate) page_bytes: u64,
    /// The physical address of each.
    pub(crate) addresses: Vec<u64>,
}

/// [`Exported::state`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// As the operator wrote it.
    pub(crate) address: String,
    pub(crate) function: FunctionState,
    pub(crate) device: virtio::State,
}

/// What was received, in order.
pub(crate) struct Descriptors(std::vec::IntoIter<OwnedFd>);

impl Descriptors {
    pub(crate) fn new(all: Vec<OwnedFd>) -> Self {
        Self(all.into_iter())
    }

    /// The next, which is this one.
    ///
    /// # Errors
    /// A sentence when there is none.
    pub(crate) fn next(&mut self, what: &str) -> Result<OwnedFd, String> {
        self.0.next().ok_or_else(|| format!("its {what} is missing"))
    }

    /// # Errors
    /// A sentence when something is left.
    pub(crate) fn end(&mut self) -> Result<(), String> {
        self.0.next().map_or(Ok(()), |_| Err("a descriptor too many".to_owned()))
    }
}

/// Another descriptor of the same.
pub(crate) fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, NotExportable> {
    fd.try_clone_to_owned().map_err(|error| NotExportable::because(format!("dup: {error}")))
}

/// The device that another process exported, as it runs, and through what it is reached. It is dormant until [`Transport::resume`]: dropping it before that is noticed by nobody.
///
/// # Errors
/// [`PciError`]: the parts do not fit together, or the function is another one by now.
pub fn adopt(exported: Exported) -> Result<(Box<dyn Transport>, Via), PciError> {
    let garbage = |why: String| PciError::Io {
        what: format!("take over a device of kind {KIND}"),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, why),
    };
    if exported.kind != KIND {
        return Err(garbage(format!("it is of kind {:?}", exported.kind)));
    }
    let State { address, function, device } =
        serde_json::from_str(&exported.state).map_err(|error| garbage(error.to_string()))?;
    let place: Address = address.parse()?;
    let unusable = |why: String| PciError::Unusable { address: place, why: format!("it cannot be taken over: {why}") };
    let mut descriptors = Descriptors::new(exported.descriptors);
    let lease = Lease::adopt(Sysfs::open()?, place, descriptors.next("claim").map_err(unusable)?);
    let folder = lease.folder()?;
    let (claimed, via): (Box<dyn Claimed>, _) = match function {
        FunctionState::Uio => (Box::new(UioFunction::adopt(place, &folder, &mut descriptors)?), Via::Uio),
        FunctionState::Vfio { wired } => {
            (Box::new(VfioFunction::adopt(place, &folder, wired, &mut descriptors)?), Via::Vfio)
        }
    };
    let leased = Box::new(Leased::new(claimed, lease));
    let device = VirtioPci::adopt(leased, address, device, &mut descriptors).map_err(unusable)?;
    descriptors.end().map_err(unusable)?;
    tracing::info!(%place, %via, "function adopted");
    Ok((Box::new(device), via))
}
