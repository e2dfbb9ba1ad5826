//! The transport: the steps of device initialisation (virtio 1.2, sections 3.1.1 and 4.1.5.1) as register accesses.
//!
//! ```text
//! open        capabilities, BARs, reset, ACKNOWLEDGE, DRIVER, what the device offers
//! negotiate   driver_feature, FEATURES_OK
//! map         the function's memory
//! setup       bus mastering; queue_size, the ring's addresses, where it is notified
//! start       interrupts, vectors, queue_enable, DRIVER_OK
//! quiesce     see `silence`
//! export      see `adopt`
//! ```
//!
//! Vectors and queue_enable wait for `start` because only then it is known how many queues share how many vectors.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::{
    Confinement, DmaRegion, Doorbell, Exported, NotExportable, QueueEvents, QueueSetup, RegionError, Silence,
    Transport, TransportError,
};

use super::adopt::Dormant;
use super::bell::Bell;
use super::common::status;
use super::memory::{MAX_REGIONS, Memory};
use super::open::{self, Offer, Open};
use super::part::Part;
use super::silence::Stopping;
use super::{fields, interrupts};
use crate::claimed::{Claimed, Reach};
use crate::error::PciError;

/// Times that device configuration is read in the hope that it does not change meanwhile.
const CONFIG_TRIES: usize = 16;

/// Feature bits (section 6) that are about the transport.
pub(super) mod feature {
    pub(in crate::virtio) const VERSION_1: u64 = 1 << 32;
    pub(in crate::virtio) const ACCESS_PLATFORM: u64 = 1 << 33;
    pub(in crate::virtio) const RING_PACKED: u64 = 1 << 34;
    pub(in crate::virtio) const ORDER_PLATFORM: u64 = 1 << 36;
    pub(in crate::virtio) const NOTIFICATION_DATA: u64 = 1 << 38;
    pub(in crate::virtio) const NOTIF_CONFIG_DATA: u64 = 1 << 39;
}

/// Decided here, whatever the caller says. A device that offers `ACCESS_PLATFORM` may refuse whoever does not accept it, and what its addresses are is known here alone. Hardware offers
/// `ORDER_PLATFORM` and may fail without it: it asks for the barriers of a real device. On x86 those between processors, with volatile writes to uncached registers, are such;
/// elsewhere they are not, and the promise is not made.
const OWN: u64 = feature::ACCESS_PLATFORM | feature::ORDER_PLATFORM;
const KEPT: u64 = if cfg!(any(target_arch = "x86", target_arch = "x86_64")) { OWN } else { feature::ACCESS_PLATFORM };

/// They change what a ring or a notification is, and neither is written so here.
const FOREIGN: u64 = feature::RING_PACKED | feature::NOTIFICATION_DATA | feature::NOTIF_CONFIG_DATA;

/// A virtio device that is a PCI function.
pub(crate) struct VirtioPci {
    pub(super) address: String,
    /// `None` after `release`.
    pub(super) open: Option<Open>,
    pub(super) offer: Offer,
    pub(super) reach: Reach,
    pub(super) negotiated: bool,
    pub(super) started: bool,
    /// Every queue that the device was or may have been told of.
    pub(super) queues: Vec<Queue>,
    pub(super) memory: Memory,
    pub(super) stopping: Stopping,
    /// Found out once, so for good.
    pub(super) lost: bool,
    /// The device has said that its configuration changed, and nobody has asked since.
    pub(super) config_changed: bool,
    /// Another process has the device, too, and is to go on with it or does already.
    pub(super) dormant: Option<Dormant>,
}

pub(super) struct Queue {
    pub(super) index: u16,
    pub(super) bell: Arc<Bell>,
    pub(super) call: OwnedFd,
}

/// Without the feature nothing translates for the device, whatever group it is in.
pub(super) fn reach(claimed: &dyn Claimed, offered: u64) -> Reach {
    let translated = claimed.is_isolated() && offered & feature::ACCESS_PLATFORM != 0;
    if translated { Reach::Iommu } else { Reach::Physical }
}

impl VirtioPci {
    /// Takes the function over: the device is reset, whatever it was doing, and asked what it has. Takes 2 s at most, and 5 s more for a device that only its function's reset stops.
    ///
    /// # Errors
    /// `Unusable` for what is no modern virtio device, and for one that does not behave like it. The function was given back then.
    pub(crate) fn open(claimed: Box<dyn Claimed>, address: String) -> Result<Self, PciError> {
        let at = claimed.address();
        let (open, offer) = open::open(claimed).map_err(|why| PciError::Unusable { address: at, why })?;
        let reach = reach(open.claimed.as_ref(), offer.features);
        let (kind, queues) = (offer.kind, offer.sizes.len());
        tracing::info!(address, by = open.claimed.by(), kind, queues, ?reach, "virtio function opened");
        Ok(VirtioPci {
            address,
            open: Some(open),
            offer,
            reach,
            negotiated: false,
            started: false,
            queues: Vec::new(),
            memory: Memory::default(),
            stopping: Stopping::No,
            lost: false,
            config_changed: false,
            dormant: None,
        })
    }

    /// Does one step of initialisation. A device that fails it is given up (section 2.1, FAILED).
    fn step<T>(
        &mut self,
        step: impl FnOnce(&mut Self, &mut Open) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        let outcome = self.look(step);
        if let (Err(_), false, Some(open)) = (&outcome, self.lost, &mut self.open) {
            // Nobody waits for an answer.
            let _ = open.common.set_status(status::FAILED);
        }
        outcome
    }

    /// Does something with the registers and looks at the status afterwards: what was read, and a failure too, may be what a removed function reads.
    fn look<T>(
        &mut self,
        look: impl FnOnce(&mut Self, &mut Open) -> Result<T, TransportError>,
    ) -> Result<T, TransportError> {
        if self.lost {
            return Err(TransportError::Lost);
        }
        let Some(mut open) = self.open.take() else {
            return Err(TransportError::Invalid("the function was released".to_owned()));
        };
        let outcome = look(self, &mut open);
        let alive = if open.claimed.is_lost() { Err(TransportError::Lost) } else { open.common.alive() };
        self.open = Some(open);
        match (outcome, alive) {
            (_, Err(TransportError::Lost)) => {
                self.note_lost("its status says so");
                Err(TransportError::Lost)
            }
            (Ok(done), Ok(())) => Ok(done),
            (Ok(_), Err(error)) | (Err(error), _) => Err(error),
        }
    }

    pub(super) fn note_lost(&mut self, why: &str) {
        if !self.lost {
            tracing::info!(address = self.address, why, "virtio function lost");
        }
        self.lost = true;
        for queue in &self.queues {
            queue.bell.silence();
        }
    }

    /// As `vhost-user`'s, and against what the device said.
    fn check(&self, setup: &QueueSetup) -> Result<(), TransportError> {
        let invalid = |why: String| Err(TransportError::Invalid(why));
        let QueueSetup { index, size, addresses: at } = *setup;
        if !self.negotiated {
            return invalid("a queue is set up after features are negotiated".to_owned());
        }
        if self.started || self.stopping != Stopping::No {
            return invalid("a queue is set up before start".to_owned());
        }
        if index >= self.max_queues() {
            return invalid(format!("queue {index} of a device with {}", self.max_queues()));
        }
        if self.queues.iter().any(|queue| queue.index == index) {
            return invalid(format!("queue {index} was set up already"));
        }
        let most = self.max_queue_size(index);
        if !size.is_power_of_two() || size > most {
            return invalid(format!("a ring of {size} entries, the device takes {most}"));
        }
        // Sizes and alignments: virtio 1.2, section 2.7. Event index fields are counted in.
        let entries = u64::from(size);
        let parts = [
            ("descriptor table", at.descriptors, 16 * entries, 16),
            ("available ring", at.available, 6 + 2 * entries, 2),
            ("used ring", at.used, 6 + 8 * entries, 4),
        ];
        for (name, place, bytes, align) in parts {
            if !self.memory.holds(place, bytes) || place % align != 0 {
                return invalid(format!(
                    "queue {index}: its {name} at {place:#x} is not mapped in one run or not aligned"
                ));
            }
        }
        Ok(())
    }
}

impl Transport for VirtioPci {
    fn address(&self) -> &str {
        &self.address
    }

    fn device_type(&self) -> Option<u32> {
        Some(self.offer.kind)
    }

    fn offered_features(&self) -> u64 {
        self.offer.features
    }

    /// Bits 33 and 36 (access and order of the platform) are decided here, whatever `features` says of them.
    ///
    /// # Errors
    /// `Invalid` for a feature that was not offered, for a set without `VIRTIO_F_VERSION_1`, and for a second call. `Refused` for packed rings and for notifications that carry
    /// more than a queue's index, and when the device does not take the set.
    fn negotiate(&mut self, features: u64) -> Result<(), TransportError> {
        let invalid = |why: String| Err(TransportError::Invalid(why));
        if self.negotiated || self.stopping != Stopping::No {
            return invalid("features were negotiated already".to_owned());
        }
        let offered = self.offer.features;
        let excess = features & !offered & !OWN;
        if excess != 0 {
            return invalid(format!("features {excess:#x} were not offered"));
        }
        if features & feature::VERSION_1 == 0 {
            return invalid("VIRTIO_F_VERSION_1 must be accepted".to_owned());
        }
        if features & FOREIGN != 0 {
            return Err(TransportError::Refused(format!("features {:#x} are not spoken here", features & FOREIGN)));
        }
        let accepted = features & !OWN | offered & KEPT;
        self.step(|_, open| {
            open.common.accept(accepted)?;
            open.common.set_status(status::FEATURES_OK)?;
            if open.common.status() & status::FEATURES_OK == 0 {
                open.common.forget_status(status::FEATURES_OK);
                return Err(TransportError::Refused(format!("features {accepted:#x} (FEATURES_OK)")));
            }
            Ok(())
        })?;
        self.negotiated = true;
        Ok(())
    }

    /// One consistent state, or none (section 4.1.4.3.1, `config_generation`).
    ///
    /// # Errors
    /// `Refused` when the device has no configuration or not so much of it; `Protocol` when it changes all the time.
    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        let kind = self.offer.kind;
        let bytes = self.open.as_ref().map_or(0, |open| open.device.as_ref().map_or(0, Part::bytes));
        let start = u64::from(offset);
        if self.open.is_some() && start.saturating_add(into.len() as u64) > bytes {
            let why = format!("{} bytes at {offset} of {bytes} bytes of configuration", into.len());
            return Err(TransportError::Refused(why));
        }
        let found = self.look(|_, open| {
            let mut found = vec![0; into.len()];
            let Some(part) = open.device.as_ref().filter(|_| !found.is_empty()) else { return Ok(found) };
            for _ in 0..CONFIG_TRIES {
                let before = open.common.generation()?;
                fields::read(part, kind, start, &mut found)?;
                if open.common.generation()? == before {
                    return Ok(found);
                }
            }
            Err(TransportError::Protocol(format!("its configuration changed while it was read, {CONFIG_TRIES} times")))
        })?;
        into.copy_from_slice(&found);
        Ok(())
    }

    /// What the device says, at most 256.
    fn max_queues(&self) -> u16 {
        self.offer.sizes.len() as u16
    }

    /// What the device says; 0 where it has no such queue.
    fn max_queue_size(&self, index: u16) -> u16 {
        self.offer.sizes.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn memory(&mut self, name: &str, bytes: u64, iova: u64) -> Result<Arc<DmaRegion>, RegionError> {
        match &mut self.open {
            Some(open) => open.claimed.memory(name, bytes, iova, self.reach),
            None => Err(RegionError::Revoked),
        }
    }

    /// By an IOMMU only where one translates for this device.
    fn confinement(&self) -> Confinement {
        match self.reach {
            Reach::Iommu => Confinement::Iommu,
            Reach::Physical => Confinement::Host,
        }
    }

    /// # Errors
    /// `Invalid` between the first `setup_queue` and `start`, for a region that overlaps another one, and for one whose addresses are not of the kind that `memory` makes. After `start`
    /// `Unsupported` where nothing translates. `Exhausted` for more than 64 regions.
    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        if self.dormant.is_some() {
            return Err(TransportError::Invalid("another process has the device".to_owned()));
        }
        if self.stopping != Stopping::No || (!self.queues.is_empty() && !self.started) {
            let why = "memory cannot be mapped between the first queue and start, nor after the end";
            return Err(TransportError::Invalid(why.to_owned()));
        }
        if self.started && self.reach == Reach::Physical {
            let why = "without an IOMMU that translates for it, what a device was told once cannot be taken back";
            return Err(TransportError::Unsupported(why.to_owned()));
        }
        self.memory.check(&region, self.reach)?;
        if self.memory.len() >= MAX_REGIONS {
            return Err(TransportError::Exhausted(format!("{MAX_REGIONS} memory regions")));
        }
        if self.lost {
            return Err(TransportError::Lost);
        }
        let Some(open) = &mut self.open else {
            return Err(TransportError::Invalid("the function was released".to_owned()));
        };
        let outcome = open.claimed.map(Arc::clone(&region));
        use TransportError::{Exhausted, Invalid, Refused, Unsupported};
        // Whoever did not do it says so; after anything else it may have been done.
        if !matches!(outcome, Err(Exhausted(_) | Invalid(_) | Refused(_) | Unsupported(_))) {
            self.memory.keep(region, self.started);
        }
        outcome
    }

    /// # Errors
    /// `Invalid` before `negotiate`, twice for one queue, for an index or size out of bounds, and for a ring that is misaligned or not in mapped memory. `Refused` and
    /// `Protocol` when the device does not take it.
    fn setup_queue_with(&mut self, setup: QueueSetup, call: OwnedFd) -> Result<QueueEvents, TransportError> {
        self.check(&setup)?;
        let kept = interrupts::duplicate(&call)?;
        let doorbell = self.step(|me, open| {
            if me.queues.is_empty() {
                // Not before: until now it has no address, and from now on only such as the host has checked.
                open.claimed.set_bus_master(true)?;
            }
            let QueueSetup { index, size, addresses } = setup;
            open.common.select(index)?;
            let place = u64::from(open.common.notify_off()?) * u64::from(open.notify_step);
            if place + 2 > open.notify.bytes() {
                let why = format!("queue {index} is notified at {place:#x} of {:#x} bytes", open.notify.bytes());
                return Err(TransportError::Protocol(why));
            }
            let bell = Bell::new(open.notify.clone(), place, index);
            let doorbell = bell.handle();
            // From here on the device may know of it, whatever it answers.
            me.queues.push(Queue { index, bell, call: kept });
            if !open.common.set_queue_size(size)? {
                return Err(TransportError::Refused(format!("queue {index} with {size} entries")));
            }
            open.common.set_queue_addresses(addresses)?;
            Ok(doorbell)
        })?;
        Ok(QueueEvents { doorbell, call })
    }

    /// # Errors
    /// `Invalid` before `negotiate` and for a second call; `Refused` when there is no way to interrupt or a queue is not enabled.
    fn start(&mut self) -> Result<(), TransportError> {
        if !self.negotiated || self.started || self.stopping != Stopping::No {
            return Err(TransportError::Invalid("start comes once, after negotiate".to_owned()));
        }
        self.step(|me, open| {
            let queues: Vec<_> = me.queues.iter().map(|queue| (queue.index, &queue.call)).collect();
            let Open { claimed, common, isr, notices, vectors, .. } = open;
            open.wired = Some(interrupts::wire(claimed.as_mut(), common, isr, notices, &queues, *vectors)?);
            for (index, _) in queues {
                common.select(index)?;
                if !common.enable_queue()? {
                    return Err(TransportError::Refused(format!("to enable queue {index}")));
                }
            }
            common.set_status(status::DRIVER_OK)
        })?;
        self.started = true;
        for queue in &self.queues {
            queue.bell.start();
        }
        let wired = self.open.as_ref().and_then(|open| open.wired.as_ref()).map(interrupts::Wired::name);
        tracing::info!(address = self.address, queues = self.queues.len(), wired, "virtio function started");
        Ok(())
    }

    /// The IOMMU is told by this process, so nothing is waited for.
    fn unmap(&mut self, iova: u64, _deadline: Instant) -> Silence {
        let unconfirmed = |reason: &str| Silence::Unconfirmed { reason: reason.to_owned() };
        let silent = self.stopping == Stopping::Silent;
        let silence = match (self.memory.is_added(iova), &mut self.open) {
            (None, _) => return Silence::Confirmed,
            (Some(false), _) if !silent => return unconfirmed("the region is one that the device started with"),
            (Some(_), None) => return unconfirmed("the function was released"),
            (Some(_), Some(open)) => open.claimed.unmap(iova),
        };
        // Nothing reaches anything after silence, and then it does not matter what the IOMMU has.
        if silence == Silence::Confirmed || silent {
            self.memory.forget(iova);
            return Silence::Confirmed;
        }
        silence
    }

    /// Readable when the configuration changed or the function may be on its way out.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref().map(|open| open.notices.fd())
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let Some(open) = &self.open else { return Vec::new() };
        let mut all = open.claimed.descriptors();
        all.extend(open.notices.descriptors());
        all.extend(open.wired.iter().flat_map(interrupts::Wired::descriptors));
        all
    }

    /// Gone, asked for, or in need of a reset, which nothing but its end leads to here.
    fn is_lost(&mut self) -> bool {
        if self.dormant.is_some() {
            // What is told belongs to whoever has it afterwards.
            return self.lost;
        }
        let Some(open) = &mut self.open else { return true };
        // Also what was signalled only to have somebody look whether the function is there: of a device that is, it costs one look at its configuration.
        self.config_changed |= open.notices.take_change();
        let why = if open.claimed.is_lost() {
            Some("the function is gone or was asked for".to_owned())
        } else {
            open.common.alive().err().map(|error| error.to_string())
        };
        if let Some(why) = why {
            self.note_lost(&why);
        }
        self.lost
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    /// Requests that are unanswered do not matter: a device that was reset has done with them (section 2.4).
    fn quiesce(&mut self, _unanswered: usize, deadline: Instant) -> Silence {
        self.silence(deadline)
    }

    fn exportable(&self) -> Result<(), NotExportable> {
        self.check_exportable()
    }

    fn export(&mut self) -> Result<Exported, NotExportable> {
        self.export_all()
    }

    fn adopt_region(&mut self, file: OwnedFd, bytes: u64, iova: u64) -> Result<Arc<DmaRegion>, RegionError> {
        self.find_region(file, bytes, iova)
    }

    fn adopt_memory(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.take_memory(region)
    }

    /// The doorbell is a register: what stands for its descriptor says nothing.
    fn adopt_queue(&mut self, index: u16, _kick: OwnedFd) -> Result<Box<dyn Doorbell>, TransportError> {
        self.take_queue(index)
    }

    fn resume(&mut self) {
        self.go_on();
    }

    fn release(&mut self) {
        self.give_back();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.release();
    }
}
