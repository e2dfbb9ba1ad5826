//! A device with a say in what becomes of some of its calls, for tests.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::transport::{Doorbell, QueueEvents, QueueSetup, Silence, Transport};
use cofferdam_device::{Confinement, DmaRegion, Exported, Function, NotExportable, RegionError, TransportError};

/// What is done in the place of a call: the call itself, unless a test says otherwise.
pub trait Hooks: Send {
    /// [`Transport::negotiate`].
    ///
    /// # Errors
    /// As there.
    fn negotiate(&mut self, device: &mut dyn Transport, features: u64) -> Result<(), TransportError> {
        device.negotiate(features)
    }

    /// [`Transport::read_config`].
    ///
    /// # Errors
    /// As there.
    fn read_config(&mut self, device: &mut dyn Transport, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        device.read_config(offset, into)
    }

    /// [`Transport::map`].
    ///
    /// # Errors
    /// As there.
    fn map(&mut self, device: &mut dyn Transport, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        device.map(region)
    }

    /// [`Transport::setup_queue_with`].
    ///
    /// # Errors
    /// As there.
    fn setup_queue(
        &mut self,
        device: &mut dyn Transport,
        setup: QueueSetup,
        call: OwnedFd,
    ) -> Result<QueueEvents, TransportError> {
        device.setup_queue_with(setup, call)
    }

    /// [`Transport::start`].
    ///
    /// # Errors
    /// As there.
    fn start(&mut self, device: &mut dyn Transport) -> Result<(), TransportError> {
        device.start()
    }

    /// [`Transport::is_lost`].
    fn is_lost(&mut self, device: &mut dyn Transport) -> bool {
        device.is_lost()
    }

    /// [`Transport::quiesce`].
    fn quiesce(&mut self, device: &mut dyn Transport, unanswered: usize, deadline: Instant) -> Silence {
        device.quiesce(unanswered, deadline)
    }

    /// [`Transport::release`].
    fn release(&mut self, device: &mut dyn Transport) {
        device.release();
    }
}

/// A device with hooks.
pub struct Hooked<H> {
    device: Box<dyn Transport>,
    hooks: H,
}

impl<H: Hooks> Hooked<H> {
    /// `device`, with `hooks` in the place of its calls.
    #[must_use]
    pub fn new(device: Box<dyn Transport>, hooks: H) -> Hooked<H> {
        Hooked { device, hooks }
    }
}

impl<H: Hooks> Transport for Hooked<H> {
    fn address(&self) -> &str {
        self.device.address()
    }
    fn device_type(&self) -> Option<u32> {
        self.device.device_type()
    }
    fn offered_features(&self) -> u64 {
        self.device.offered_features()
    }
    fn negotiate(&mut self, features: u64) -> Result<(), TransportError> {
        self.hooks.negotiate(&mut *self.device, features)
    }
    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        self.hooks.read_config(&mut *self.device, offset, into)
    }
    fn max_queues(&self) -> u16 {
        self.device.max_queues()
    }
    fn max_queue_size(&self, index: u16) -> u16 {
        self.device.max_queue_size(index)
    }
    fn memory(&mut self, name: &str, bytes: u64, iova: u64) -> Result<Arc<DmaRegion>, RegionError> {
        self.device.memory(name, bytes, iova)
    }
    fn confinement(&self) -> Confinement {
        self.device.confinement()
    }
    fn function(&mut self) -> Option<&mut dyn Function> {
        self.device.function()
    }
    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.hooks.map(&mut *self.device, region)
    }
    fn setup_queue_with(&mut self, setup: QueueSetup, call: OwnedFd) -> Result<QueueEvents, TransportError> {
        self.hooks.setup_queue(&mut *self.device, setup, call)
    }
    fn start(&mut self) -> Result<(), TransportError> {
        self.hooks.start(&mut *self.device)
    }
    fn unmap(&mut self, iova: u64, deadline: Instant) -> Silence {
        self.device.unmap(iova, deadline)
    }
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.device.event_fd()
    }
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.device.descriptors()
    }
    fn is_lost(&mut self) -> bool {
        self.hooks.is_lost(&mut *self.device)
    }
    fn take_config_change(&mut self) -> bool {
        self.device.take_config_change()
    }
    fn quiesce(&mut self, unanswered: usize, deadline: Instant) -> Silence {
        self.hooks.quiesce(&mut *self.device, unanswered, deadline)
    }
    fn exportable(&self) -> Result<(), NotExportable> {
        self.device.exportable()
    }
    fn export(&mut self) -> Result<Exported, NotExportable> {
        self.device.export()
    }
    fn adopt_region(&mut self, file: OwnedFd, bytes: u64, iova: u64) -> Result<Arc<DmaRegion>, RegionError> {
        self.device.adopt_region(file, bytes, iova)
    }
    fn adopt_memory(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.device.adopt_memory(region)
    }
    fn adopt_queue(&mut self, index: u16, kick: OwnedFd) -> Result<Box<dyn Doorbell>, TransportError> {
        self.device.adopt_queue(index, kick)
    }
    fn resume(&mut self) {
        self.device.resume();
    }
    fn release(&mut self) {
        self.hooks.release(&mut *self.device);
    }
}
