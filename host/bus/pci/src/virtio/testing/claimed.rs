//! The function around the registers, as uio or vfio would have it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use cofferdam_device::{DmaRegion, FunctionIds, NotExportable, RegionError, Silence, TransportError};

use super::registers::Bar;
use super::registers::parking::Mutex;
use super::{Did, Model, next_scattered};
use crate::Address;
use crate::adopt::{FunctionState, Pages, Parcel};
use crate::claimed::{Claimed, Exportable, Interrupts, Reach};
use crate::registers::Registers;

/// One device, and what a test sees of it.
pub(crate) struct Sim(Arc<Mutex<Model>>);

impl Sim {
    pub(crate) fn new(change: impl FnOnce(&mut Model)) -> Self {
        let mut model = Model::new();
        change(&mut model);
        Self(Arc::new(Mutex::new(model)))
    }

    pub(crate) fn claim(&self) -> Box<dyn Claimed> {
        Box::new(Function(Arc::clone(&self.0), false))
    }

    /// As another process has received it.
    pub(crate) fn received(&self) -> Box<dyn Claimed> {
        Box::new(Function(Arc::clone(&self.0), true))
    }

    pub(crate) fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock()
    }

    /// What was done to it so far.
    pub(crate) fn did(&self) -> Vec<Did> {
        self.model().did.clone()
    }

    /// The function goes with the next access to its registers.
    pub(crate) fn remove(&self, gone: super::Gone) {
        let mut model = self.model();
        model.faults.gone_at = Some((model.accesses, gone));
    }
}

/// And whether another process has it.
struct Function(Arc<Mutex<Model>>, bool);

impl Function {
    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock()
    }
}

impl Claimed for Function {
    fn address(&self) -> Address {
        "00:04.0".parse().unwrap()
    }

    fn by(&self) -> &'static str {
        "simulation"
    }

    fn ids(&self) -> FunctionIds {
        let (vendor, device) = self.model().ids;
        let (subsystem_vendor, subsystem) = (vendor, 0x1100);
        FunctionIds { vendor, device, subsystem_vendor, subsystem, class: 0x01_0000, revision: 1 }
    }

    fn read_config(&self, offset: u16, into: &mut [u8]) -> Result<(), TransportError> {
        let model = self.model();
        let place = usize::from(offset)..usize::from(offset) + into.len();
        let found = model.config_space.get(place).ok_or_else(|| TransportError::Invalid("outside".to_owned()))?;
        into.copy_from_slice(found);
        Ok(())
    }

    fn bar(&mut self, index: u8) -> Result<Arc<dyn Registers>, TransportError> {
        let bytes = self.model().bar_bytes[usize::from(index)];
        if bytes == 0 {
            return Err(TransportError::Refused("no memory BAR".to_owned()));
        }
        Ok(Arc::new(Bar { model: Arc::clone(&self.0), bytes }))
    }

    fn bar_bytes(&self) -> [u64; 6] {
        self.model().bar_bytes
    }

    fn set_bus_master(&mut self, on: bool) -> Result<(), TransportError> {
        let mut model = self.model();
        model.master = on;
        model.did.push(Did::Master(on));
        Ok(())
    }

    fn msix_vectors(&self) -> u16 {
        self.model().msix
    }

    fn has_line(&self) -> bool {
        self.model().line
    }

    fn wire(&mut self, interrupts: Interrupts) -> Result<(), TransportError> {
        let mut model = self.model();
        match &interrupts {
            Interrupts::Vectors(_) if model.faults.refuses_vectors => {
                let what = "VFIO_DEVICE_SET_IRQS".to_owned();
                return Err(TransportError::Io { what, source: std::io::ErrorKind::OutOfMemory.into() });
            }
            Interrupts::Vectors(events) => {
                assert!(events.len() <= usize::from(model.msix));
                model.did.push(Did::Vectors(events.len()));
            }
            Interrupts::Line { signal, .. } => {
                assert!(model.line);
                model.did.push(Did::Line(signal.len()));
            }
            Interrupts::Masked { .. } => panic!("this transport acknowledges its line itself"),
        }
        model.wired = Some(interrupts);
        Ok(())
    }

    fn is_isolated(&self) -> bool {
        self.model().isolated
    }

    fn memory(&mut self, name: &str, bytes: u64, iova: u64, reach: Reach) -> Result<Arc<DmaRegion>, RegionError> {
        match reach {
            Reach::Iommu => DmaRegion::new(name, bytes, iova).map(Arc::new),
            Reach::Physical => Ok(next_scattered()),
        }
    }

    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        let mut model = self.model();
        model.did.push(Did::Map(region.iova()));
        model.regions.push(region);
        Ok(())
    }

    fn unmap(&mut self, iova: u64) -> Silence {
        let mut model = self.model();
        model.did.push(Did::Unmap(iova));
        model.regions.retain(|region| region.iova() != iova);
        Silence::Confirmed
    }

    fn take_back(&mut self) -> Result<u64, TransportError> {
        let mut model = self.model();
        assert!(model.status & 4 == 0 && model.gone().is_none(), "memory is freed that the device may still have");
        model.did.push(Did::TakeBack);
        Ok(0)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    fn is_lost(&mut self) -> bool {
        self.is_absent()
    }

    fn is_absent(&mut self) -> bool {
        let model = self.model();
        model.gone().is_some() && !model.faults.gone_in_secret
    }

    fn reset(&mut self, _: Instant) -> Result<(), TransportError> {
        let mut model = self.model();
        model.did.push(Did::FunctionReset);
        if model.faults.no_function_reset {
            return Err(TransportError::Unsupported("no reset".to_owned()));
        }
        model.reset();
        Ok(())
    }

    fn quiet(&mut self, _: Instant) -> Silence {
        let mut model = self.model();
        model.did.push(Did::Quiet);
        if model.faults.never_quiet {
            return Silence::Unconfirmed { reason: "bus mastering reads on".to_owned() };
        }
        model.master = false;
        let wired = model.wired.take();
        drop(model);
        drop(wired);
        Silence::Confirmed
    }

    fn release(&mut self) {
        if self.1 {
            return;
        }
        let mut model = self.model();
        model.did.push(Did::Release);
        model.regions.clear();
        // Outside of the lock: the line's closure has registers of the model.
        let wired = model.wired.take();
        drop(model);
        drop(wired);
    }
}

impl Exportable for Function {
    fn exportable(&self) -> Result<(), NotExportable> {
        Ok(())
    }

    fn export(&mut self) -> Result<Parcel, NotExportable> {
        let mut model = self.model();
        model.did.push(Did::Export);
        // Who takes interrupts there ends with it.
        let line = if matches!(model.wired, Some(Interrupts::Line { .. })) { model.wired.take() } else { None };
        drop(model);
        drop(line);
        self.1 = true;
        Ok(Parcel { state: FunctionState::Uio, descriptors: Vec::new() })
    }

    fn resume(&mut self, line: Option<Interrupts>) {
        self.1 = false;
        let mut model = self.model();
        model.did.push(Did::Resume(line.is_some()));
        model.wired = line.or(model.wired.take());
    }

    fn adopt_pages(&mut self, _: OwnedFd, _: &Pages) -> Result<Arc<DmaRegion>, RegionError> {
        panic!("what is in hugepages is shown where there are hugepages")
    }

    fn adopt_memory(&mut self, region: Arc<DmaRegion>) {
        self.model().did.push(Did::AdoptMemory(region.iova()));
    }
}
