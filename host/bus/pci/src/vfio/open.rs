//! From an address, or from what another process has opened, to a function.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cap_std::fs::Dir;
use vfio_bindings::bindings::vfio as v;

use super::device::{Device, Region};
use super::iommu::{self, IommuBackend};
use super::{Held, VfioFunction, Wired, msix};
use crate::attributes::{self, refused};
use crate::bounded::Bounded;
use crate::config::ConfigSpace;
use crate::watch::{Watch, event};
use crate::{Address, PciError};

/// What is open of a function.
pub(super) struct Parts {
    pub(super) function: OwnedFd,
    pub(super) iommu: Box<dyn IommuBackend>,
    /// `config` of sysfs.
    pub(super) truth: OwnedFd,
    /// Signalled with INTx.
    pub(super) line: OwnedFd,
    /// Signalled when the function is lost or asked for.
    pub(super) lost: OwnedFd,
}

impl VfioFunction {
    /// Opens the function at `address`, whose folder in sysfs is `device`, behind an IOMMU domain that is empty; it masters no bus.
    ///
    /// # Errors
    /// [`PciError::Unusable`] where nothing would translate, or somebody else has the function or its group; [`PciError::Permission`]; [`PciError::Io`].
    pub(crate) fn open(address: Address, device: Dir) -> Result<Self, PciError> {
        let io = |what: &str| refused(address, what.to_owned());
        let truth = attributes::open(&device, "config").map_err(io("open config"))?;
        let (function, iommu) = iommu::open(address, &device)?;
        let eventfd = || event().map_err(io("make an eventfd"));
        let parts = Parts { function, iommu, truth, line: eventfd()?, lost: eventfd()? };
        let mut new = Self::found(address, &device, parts)?;
        let silent = |error| PciError::Unusable { address, why: format!("it cannot be kept from the bus: {error}") };
        new.config.set_master(false).and_then(|()| new.config.enable_memory()).map_err(silent)?;
        if let (Some(held), Some(watch)) = (&new.held, &new.watch) {
            for index in [v::VFIO_PCI_REQ_IRQ_INDEX, v::VFIO_PCI_ERR_IRQ_INDEX] {
                let has = held.device.interrupts(index).map_err(io("VFIO_DEVICE_GET_IRQ_INFO"))? > 0;
                if has {
                    let one = watch.event().try_clone_to_owned().map_err(io("dup"))?;
                    held.device.signal(index, &[one]).map_err(io("VFIO_DEVICE_SET_IRQS"))?;
                }
            }
            let (by, msix_vectors, has_line) = (held.iommu.name(), new.msix_vectors, new.has_line);
            tracing::info!(%address, by, msix_vectors, has_line, "function opened through vfio");
        }
        new.watch().map_err(io("start a thread"))?;
        Ok(new)
    }

    /// The function with what is open, of which nothing is changed; nobody watches it yet.
    pub(super) fn found(address: Address, folder: &Dir, parts: Parts) -> Result<Self, PciError> {
        let io = |what: &str| refused(address, what.to_owned());
        let Parts { function, iommu, truth, line, lost } = parts;
        let ids = attributes::ids(folder).map_err(io("read its ids"))?;
        let places = attributes::places(folder).map_err(io("read resource"))?;
        let stat = rustix::fs::fstat(&truth).map_err(|errno| io("fstat config")(errno.into()))?;
        let truth = ConfigSpace::new(Arc::new(truth), 0, u64::try_from(stat.st_size).unwrap_or(0));
        let function = Device::new(function).map_err(io("VFIO_DEVICE_GET_INFO"))?;
        let region = |index| function.region(index).map_err(io("VFIO_DEVICE_GET_REGION_INFO"));
        let mut regions: [Region; 6] = Default::default();
        for ((index, place), slot) in (0..).zip(&places).zip(&mut regions).filter(|((_, place), _)| place.bytes > 0) {
            *slot = region(index)?;
            slot.bytes = slot.bytes.min(place.bytes);
        }
        let space = region(v::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let config = ConfigSpace::new(function.share(), space.offset, space.bytes);
        let table = msix::table(&config)
            .map_err(|error| PciError::Unusable { address, why: format!("its configuration space: {error}") })?;
        let count = |index| function.interrupts(index).map_err(io("VFIO_DEVICE_GET_IRQ_INFO"));
        let msix_vectors = u16::try_from(count(v::VFIO_PCI_MSIX_IRQ_INDEX)?).unwrap_or(u16::MAX);
        let has_line = count(v::VFIO_PCI_INTX_IRQ_INDEX)? > 0;
        let watch = Watch::asleep(Arc::new(lost)).map_err(io("make an eventfd"))?;
        Ok(Self {
            address,
            ids,
            held: Some(Held { device: function, iommu, line: Arc::new(line) }),
            config,
            truth,
            msix_vectors,
            has_line,
            regions,
            table,
            bars: Default::default(),
            wired: Wired::Nothing,
            watch: Some(watch),
            hugepages: None,
            mapped: Vec::new(),
            slow: Bounded::default(),
            dormant: false,
        })
    }

    /// Starts the thread.
    pub(super) fn watch(&mut self) -> std::io::Result<()> {
        let (Some(held), Some(watch)) = (&self.held, &mut self.watch) else {
            return Err(std::io::ErrorKind::NotConnected.into());
        };
        let (device, line) = (held.device.clone(), Arc::clone(&held.line));
        watch.run("vfio-watch", super::VfioSource { device, line, truth: self.truth.clone() })
    }
}

impl Parts {
    /// Whether sysfs has the function in `folder`.
    pub(super) fn check(&self, folder: &Dir) -> std::io::Result<()> {
        let own = attributes::open(folder, "config")?;
        attributes::check_same(self.truth.as_fd(), &own)
    }
}
