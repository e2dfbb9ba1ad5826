//! A function on vfio in the hands of another process: see [`crate::adopt`].
//!
//! The kernel goes on signalling the same eventfds, so what nobody takes meanwhile stays in them; INTx stays masked then. What the IOMMU was told was told by the first process, whose
//! account the pages stay on; it is taken back by whoever has the container.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cap_std::fs::Dir;
use cofferdam_device::{DmaRegion, NotExportable, RegionError};

use super::open::Parts;
use super::{VfioFunction, Wired, iommu};
use crate::adopt::{Descriptors, FunctionState, Pages, Parcel, duplicate};
use crate::attributes::refused;
use crate::claimed::{Exportable, Interrupts};
use crate::hugepages;
use crate::{Address, PciError};

fn because(why: &str) -> NotExportable {
    NotExportable::because(why)
}

impl VfioFunction {
    /// The function that another process exported, at `address`, whose folder in sysfs is `folder` now. Dormant until [`Exportable::resume`].
    ///
    /// # Errors
    /// [`PciError::Io`] and [`PciError::Unusable`] when these are not the function's.
    pub(crate) fn adopt(
        address: Address,
        folder: &Dir,
        wired: Wired,
        received: &mut Descriptors,
    ) -> Result<Self, PciError> {
        let mut next = |what| received.next(what).map_err(|why| PciError::Unusable { address, why });
        let (function, group, container) = (next("function")?, next("group")?, next("container")?);
        let (truth, line, lost) = (next("config")?, next("event of INTx")?, next("event")?);
        let io = |what: &str| refused(address, what.to_owned());
        let iommu = iommu::adopt(group, container).map_err(io("look at its group"))?;
        let parts = Parts { function, iommu, truth, line, lost };
        parts.check(folder).map_err(io("look at the function that was handed over"))?;
        let mut new = Self::found(address, folder, parts)?;
        (new.dormant, new.wired) = (true, wired);
        Ok(new)
    }
}

impl Exportable for VfioFunction {
    fn exportable(&self) -> Result<(), NotExportable> {
        match (&self.held, &self.watch) {
            _ if self.dormant => Err(because("another process has it")),
            _ if self.slow.is_busy() => Err(because("the kernel resets it")),
            (Some(held), _) if held.iommu.to_hand_over().is_none() => {
                Err(because("it is behind iommufd, which has not been tried; groups are handed over"))
            }
            (Some(_), Some(watch)) if !watch.is_lost() => Ok(()),
            _ => Err(because("the function is gone")),
        }
    }

    fn export(&mut self) -> Result<Parcel, NotExportable> {
        self.exportable()?;
        let (Some(held), Some(watch), Some(truth)) = (&self.held, &self.watch, self.truth.fd()) else {
            return Err(because("the function is gone"));
        };
        let Some([group, container]) = held.iommu.to_hand_over() else {
            return Err(because("there is no group"));
        };
        if !watch.stop() {
            return Err(because("the kernel does not answer about it"));
        }
        let all = [held.device.fd(), group, container, truth, (*held.line).as_fd(), watch.event()];
        let descriptors = all.into_iter().map(duplicate).collect::<Result<_, _>>()?;
        self.dormant = true;
        Ok(Parcel { state: FunctionState::Vfio { wired: self.wired }, descriptors })
    }

    fn resume(&mut self, line: Option<Interrupts>) {
        self.dormant = false;
        let Some(watch) = &self.watch else { return };
        *watch.line() = line.and_then(Interrupts::into_line);
        if let Err(error) = self.watch() {
            tracing::error!(address = %self.address, %error, "nobody can watch the function");
            if let Some(watch) = &self.watch {
                watch.give_up();
            }
        }
        // Whoever had it may have taken an interrupt and not let the line go again. If its reason is still there, it comes once more.
        let unmasked = match (&self.held, self.wired) {
            (Some(held), Wired::Line) => held.device.unmask_line(),
            _ => Ok(()),
        };
        if let Err(error) = unmasked {
            tracing::warn!(address = %self.address, %error, "INTx was not let go");
        }
    }

    fn adopt_pages(&mut self, file: OwnedFd, pages: &Pages) -> Result<Arc<DmaRegion>, RegionError> {
        hugepages::adopt(&mut self.hugepages, self.address, file, pages)
    }

    fn adopt_memory(&mut self, region: Arc<DmaRegion>) {
        self.mapped.push(region);
    }
}
