//! A function that was handed over for one binding: with the binding's release it goes back to where it came from.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cap_std::fs::Dir;
use cofferdam_device::{DmaRegion, FunctionIds, NotExportable, RegionError, Silence, TransportError};

use crate::adopt::{self, Pages, Parcel};
use crate::claimed::{Claimed, Exportable, Interrupts, Reach};
use crate::registers::Registers;
use crate::{Address, By, Claim, HandoverOptions, PciError, Sysfs, give_back};

/// The right to a function and the duty to give it back.
pub(crate) struct Lease {
    sysfs: Sysfs,
    claim: Claim,
    /// Not while another process has both.
    is_ours: bool,
}

impl Lease {
    pub(crate) fn new(sysfs: Sysfs, claim: Claim) -> Self {
        Self { sysfs, claim, is_ours: true }
    }

    /// The lease of another process, which gives the function back until [`Lease::sign`]. `name` is what holds its claim.
    pub(crate) fn adopt(sysfs: Sysfs, address: Address, name: OwnedFd) -> Self {
        Self { sysfs, claim: Claim::adopt(address, name), is_ours: false }
    }

    /// This process gives the function back from now on, and it is written down so.
    fn sign(&mut self) {
        self.is_ours = true;
        self.claim.sign(&self.sysfs, "load");
        let address = self.claim.address();
        if let Err(error) = crate::handover::inherit(&self.sysfs, address) {
            // What it says of where the function came from holds; only the process in it is one that has ended.
            tracing::warn!(%address, %error, "the record does not say whose the function is now");
        }
    }

    /// Another process gives it back.
    fn leave(&mut self) {
        self.is_ours = false;
        self.claim.leave();
    }

    /// The function's folder in sysfs.
    pub(crate) fn folder(&self) -> Result<Dir, PciError> {
        self.sysfs.function_dir(self.claim.address())
    }
}

impl Drop for Lease {
    /// Bounded by `give_back`. What an operator bound stays with uio or vfio; what cannot be given back keeps its record, and `cofferdam unbind` goes on.
    fn drop(&mut self) {
        if !self.is_ours {
            return;
        }
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

impl Exportable for Leased {
    fn exportable(&self) -> Result<(), NotExportable> {
        self.function.exportable()
    }

    fn export(&mut self) -> Result<Parcel, NotExportable> {
        let lease = self.lease.as_mut().ok_or_else(|| NotExportable::because("the function was released"))?;
        let name = adopt::duplicate(lease.claim.descriptor())?;
        let mut parcel = self.function.export()?;
        parcel.descriptors.insert(0, name);
        lease.leave();
        Ok(parcel)
    }

    fn resume(&mut self, line: Option<Interrupts>) {
        // First what a device may wait for.
        self.function.resume(line);
        if let Some(lease) = &mut self.lease {
            lease.sign();
        }
    }

    fn adopt_pages(&mut self, file: OwnedFd, pages: &Pages) -> Result<Arc<DmaRegion>, RegionError> {
        self.function.adopt_pages(file, pages)
    }

    fn adopt_memory(&mut self, region: Arc<DmaRegion>) {
        self.function.adopt_memory(region);
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::tests::tree::Tree;
    use crate::handover::{ProcessId, record};
    use crate::{Via, hand_over};

    const DISK: &str = "0000:00:04.0";

    /// A function that `by` had handed over to uio, with its lease.
    fn leased(by: By) -> (Tree, Lease) {
        let tree = Tree::new();
        tree.function(DISK, 0x01_00_00, Some("virtio-pci"));
        let claim = Claim::take(&tree.sysfs(), DISK.parse().unwrap(), "load").unwrap();
        hand_over(&tree.sysfs(), &claim, Via::Uio, &HandoverOptions { force: false, by }).unwrap();
        let lease = Lease::new(tree.sysfs(), claim);
        (tree, lease)
    }

    fn adopt(tree: &Tree, from: &Lease) -> Lease {
        let name = from.claim.descriptor().try_clone_to_owned().unwrap();
        Lease::adopt(tree.sysfs(), DISK.parse().unwrap(), name)
    }

    fn by(tree: &Tree) -> Option<By> {
        record(&tree.sysfs(), DISK.parse().unwrap()).unwrap().map(|record| record.by)
    }

    #[test]
    fn of_two_processes_the_one_that_has_signed_gives_the_function_back() {
        let dead = By::Load(ProcessId { pid: 4_000_000, start: Some(7) });
        let (tree, mut first) = leased(dead);
        drop(adopt(&tree, &first));
        let mut second = adopt(&tree, &first);
        first.leave();
        drop(first);
        assert_eq!(tree.driver_of(DISK).as_deref(), Some("uio_pci_generic"), "it is the other one's");
        assert_eq!(by(&tree), Some(dead), "until the other one says that it is");
        second.sign();
        assert_eq!(by(&tree), Some(By::load(&tree.sysfs())));
        assert_eq!(
            record(&tree.sysfs(), DISK.parse().unwrap()).unwrap().unwrap().driver.as_deref(),
            Some("virtio-pci")
        );
        drop(second);
        assert_eq!(tree.driver_of(DISK).as_deref(), Some("virtio-pci"));
        assert!(!tree.has_record(DISK) && !Claim::is_held(&tree.sysfs(), DISK.parse().unwrap()).unwrap());
    }

    #[test]
    fn one_that_gets_it_back_gives_it_back_and_what_an_operator_bound_stays_his() {
        let (tree, mut first) = leased(By::Operator);
        first.leave();
        first.sign();
        assert_eq!(by(&tree), Some(By::Operator));
        drop(first);
        assert_eq!(tree.driver_of(DISK).as_deref(), Some("uio_pci_generic"));
        let (tree, mut first) = leased(By::Load(ProcessId { pid: 4_000_000, start: Some(7) }));
        first.leave();
        first.sign();
        drop(first);
        assert_eq!(tree.driver_of(DISK).as_deref(), Some("virtio-pci"));
    }
}
