//! A function that was handed over for one binding: with the binding's release it goes back to where it came from.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use cap_std::fs::Dir;
use cofferdam_device::{DmaRegion, FunctionIds, RegionError, Silence, TransportError};

use crate::claimed::{Claimed, Interrupts, Reach};
use crate::registers::Registers;
use crate::{Address, By, Claim, HandoverOptions, PciError, Sysfs, give_back};

/// The right to a function and the duty to give it back.
pub(crate) struct Lease {
    sysfs: Sysfs,
    claim: Claim,
}

impl Lease {
    pub(crate) fn new(sysfs: Sysfs, claim: Claim) -> Self {
        Self { sysfs, claim }
    }

    /// The function's folder in sysfs.
    pub(crate) fn folder(&self) -> Result<Dir, PciError> {
        self.sysfs.function_dir(self.claim.address())
    }
}

impl Drop for Lease {
    /// Bounded by `give_back`. What an operator bound stays with uio or vfio; what cannot be given back keeps its record, and `cofferdam unbind` goes on.
    fn drop(&mut self) {
        let options = HandoverOptions { force: false, by: By::load(&self.sysfs) };
        if let Err(error) = give_back(&self.sysfs, &self.claim, &options) {
            tracing::error!(address = %self.claim.address(), %error, "not given back; 'cofferdam unbind' goes on");
        }
    }
}

/// A claimed function with its lease, which ends when the function is released.
pub(crate) struct Leased {
    // Before the lease: the kernel's driver gets the function when nothing here has it any more.
    function: Box<dyn Claimed>,
    lease: Option<Lease>,
}

impl Leased {
    pub(crate) fn new(function: Box<dyn Claimed>, lease: Lease) -> Self {
        Self { function, lease: Some(lease) }
    }
}

impl Claimed for Leased {
    fn address(&self) -> Address {
        self.function.address()
    }

    fn by(&self) -> &'static str {
        self.function.by()
    }

    fn ids(&self) -> FunctionIds {
        self.function.ids()
    }

    fn read_config(&self, offset: u16, into: &mut [u8]) -> Result<(), TransportError> {
        self.function.read_config(offset, into)
    }

    fn bar(&mut self, index: u8) -> Result<Arc<dyn Registers>, TransportError> {
        self.function.bar(index)
    }

    fn bar_bytes(&self) -> [u64; 6] {
        self.function.bar_bytes()
    }

    fn set_bus_master(&mut self, on: bool) -> Result<(), TransportError> {
        self.function.set_bus_master(on)
    }

    fn msix_vectors(&self) -> u16 {
        self.function.msix_vectors()
    }

    fn has_line(&self) -> bool {
        self.function.has_line()
    }

    fn wire(&mut self, interrupts: Interrupts) -> Result<(), TransportError> {
        self.function.wire(interrupts)
    }

    fn unmask(&mut self) -> Result<(), TransportError> {
        self.function.unmask()
    }

    fn is_isolated(&self) -> bool {
        self.function.is_isolated()
    }

    fn memory(&mut self, name: &str, bytes: u64, iova: u64, reach: Reach) -> Result<Arc<DmaRegion>, RegionError> {
        self.function.memory(name, bytes, iova, reach)
    }

    fn take_back(&mut self) -> Result<u64, TransportError> {
        self.function.take_back()
    }

    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.function.map(region)
    }

    fn unmap(&mut self, iova: u64) -> Silence {
        self.function.unmap(iova)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.function.event_fd()
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut all = self.function.descriptors();
        all.extend(self.lease.iter().map(|lease| lease.claim.descriptor()));
        all
    }

    fn is_lost(&mut self) -> bool {
        self.function.is_lost()
    }

    fn is_absent(&mut self) -> bool {
        self.function.is_absent()
    }

    fn reset(&mut self, deadline: Instant) -> Result<(), TransportError> {
        self.function.reset(deadline)
    }

    fn quiet(&mut self, deadline: Instant) -> Silence {
        self.function.quiet(deadline)
    }

    fn release(&mut self) {
        match self.lease.take() {
            // The kernel's driver gets it when the kernel has let it go here: to ask for that earlier would block until then.
            Some(lease) => self.function.release_then(Box::new(lease)),
            None => self.function.release(),
        }
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        self.release();
    }
}
