//! Memory that comes and goes while the rings run: one message for each region, acknowledged (vhost-user, `ADD_MEM_REG` and `REM_MEM_REG`).
//!
//! The table of all regions (`SET_MEM_TABLE`) is never sent again once there are rings: a backend unmaps what it has before it maps a new one. Where the
//! backend has no memory slots, or does not acknowledge, memory cannot be added to a running device.
//!
//! A backend that is late does not lose its device by it: the question stays open, nothing else is asked meanwhile, and whoever comes next takes the answer first.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::{DmaRegion, Silence, TransportError};
use vhost::vhost_user::message::{FrontendReq, VhostUserSingleMemoryRegion};
use vm_memory::ByteValued;

use crate::device::VhostUser;
use crate::wire::{limit, number};

/// What is known of the backend's memory slots.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// Regions that the backend takes, those of its first table counted; 0: none while it runs.
    most: usize,
    /// I/O addresses of the regions that were added to the running device, and may be removed.
    added: Vec<u64>,
    /// The question that is open.
    open: Option<Change>,
}

impl Slots {
    pub(crate) fn new(most: u64) -> Self {
        Self { most: usize::try_from(most).unwrap_or(usize::MAX), ..Self::default() }
    }

    /// Regions that the backend takes.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// Nothing was added to the running device, and no question is open.
    pub(crate) fn is_idle(&self) -> bool {
        self.added.is_empty() && self.open.is_none()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Add(u64),
    Remove(u64),
}

impl Change {
    fn request(self) -> FrontendReq {
        match self {
            Self::Add(_) => FrontendReq::ADD_MEM_REG,
            Self::Remove(_) => FrontendReq::REM_MEM_REG,
        }
    }
}

impl VhostUser {
    /// Adds `region`, which overlaps no other, to the running device.
    pub(crate) fn add_region(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        if self.slots.most == 0 {
            let why =
                "the backend has no VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS: it takes memory before it runs only";
            return Err(TransportError::Unsupported(why.to_owned()));
        }
        self.settle_before_asking()?;
        let until = limit();
        if self.regions.len() >= self.slots.most {
            return Err(TransportError::Exhausted(format!("{} memory regions", self.slots.most)));
        }
        self.wire()?;
        let iova = region.iova();
        // Kept from here on, whatever is answered: the backend may have had the descriptor.
        self.regions.push(Arc::clone(&region));
        self.slots.added.push(iova);
        self.ask_for(Change::Add(iova), &region, &[region.fd()], until)?;
        self.settle(until)
    }

    /// Removes the region at `iova`, if it was added to the running device.
    pub(crate) fn remove_region(&mut self, iova: u64, deadline: Instant) -> Silence {
        match self.remove(iova, deadline.min(limit())) {
            Ok(()) => Silence::Confirmed,
            Err(reason) => Silence::Unconfirmed { reason },
        }
    }

    fn remove(&mut self, iova: u64, until: Instant) -> Result<(), String> {
        // Silence is for good, and a process that is gone has no mapping.
        let gone = self.open.as_ref().is_some_and(|open| open.wire.peer().is_gone());
        if self.silent || gone {
            self.forget(iova);
            return Ok(());
        }
        if self.open.is_none() {
            return Err("the device was released before it was silent".to_owned());
        }
        let asked = self.slots.open == Some(Change::Remove(iova));
        let outcome = self.settle(until);
        if !self.slots.added.contains(&iova) {
            let known = self.regions.iter().any(|region| region.iova() == iova);
            // Removed by the answer just now, or by an earlier one, or refused when it was added: the backend does not have it.
            return if known { Err("the region is part of the device's first table".to_owned()) } else { Ok(()) };
        }
        let failed = |error: TransportError| format!("removing the region at {iova:#x}: {error}");
        match outcome {
            // The late answer to this very question: there is no other.
            Err(error) if asked => return Err(failed(error)),
            // A refusal of something else says nothing about this region.
            Ok(()) | Err(TransportError::Refused(_)) => {}
            Err(error) => return Err(failed(error)),
        }
        let region = self.regions.iter().find(|region| region.iova() == iova).cloned();
        let region = region.ok_or_else(|| "no such region".to_owned())?;
        self.ask_for(Change::Remove(iova), &region, &[], until).map_err(failed)?;
        self.settle(until).map_err(failed)
    }

    fn ask_for(
        &mut self,
        change: Change,
        region: &DmaRegion,
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), TransportError> {
        let body = VhostUserSingleMemoryRegion::new(region.iova(), region.len(), region.iova(), 0);
        self.wire()?.begin_acknowledged(change.request(), body.as_slice(), fds, until)?;
        self.slots.open = Some(change);
        Ok(())
    }

    /// Takes the answer to the question that is open, if one is.
    ///
    /// # Errors
    /// `Timeout`, and only then, leaves it open. `Refused` is the backend's answer to that question.
    pub(crate) fn settle(&mut self, until: Instant) -> Result<(), TransportError> {
        let Some(change) = self.slots.open else { return Ok(()) };
        let answer = self.wire()?.finish(until);
        if matches!(answer, Err(TransportError::Timeout)) {
            return Err(TransportError::Timeout);
        }
        self.slots.open = None;
        let request = change.request();
        let status = number(request, &answer?)?;
        match (change, status) {
            (Change::Add(_), 0) => Ok(()),
            (Change::Remove(iova), 0) => {
                self.forget(iova);
                Ok(())
            }
            (change, status) => {
                if let Change::Add(iova) = change {
                    self.forget(iova);
                }
                Err(TransportError::Refused(format!("{request:?} failed in the backend (status {status})")))
            }
        }
    }

    /// As [`VhostUser::settle`], for a question about something else: only an answer that does not come is in its way.
    pub(crate) fn settle_before_asking(&mut self) -> Result<(), TransportError> {
        match self.settle(limit()) {
            Err(TransportError::Timeout) => Err(TransportError::Timeout),
            _ => Ok(()),
        }
    }

    fn forget(&mut self, iova: u64) {
        if let Some(place) = self.slots.added.iter().position(|added| *added == iova) {
            self.slots.added.swap_remove(place);
            self.regions.retain(|region| region.iova() != iova);
        }
    }
}
