//! A device that runs, in the hands of another process: see [`crate::adopt`].
//!
//! The device is told nothing: its rings, vectors and status are as the first process left them. Where the parts of the transport are is looked up again; what it said before it was
//! started, and what was written and cannot be read back, is passed on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use cofferdam_device::{DmaRegion, Doorbell, Exported, NotExportable, RegionError, TransportError};
use serde::{Deserialize, Serialize};

use super::bell::Bell;
use super::common::{Common, status};
use super::device::{Queue, VirtioPci, reach};
use super::interrupts::{Notices, Wired, Wiring};
use super::memory::{MAX_REGIONS, Memory};
use super::open::{self, Found, MAX_QUEUES, Offer, Open};
use super::silence::Stopping;
use crate::adopt::{self, Descriptors, KIND, Pages, duplicate};
use crate::claimed::{Claimed, Reach};

/// A device that another process has, too.
#[derive(Default)]
pub(super) struct Dormant {
    /// Memory that it was given and that has not been adopted yet.
    memory: Vec<Region>,
}

/// What another process has to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    /// Feature bits that it offered, and the largest ring of each queue.
    offered: u64,
    sizes: Vec<u16>,
    /// Status bits that were set.
    status: u8,
    queues: Vec<QueueState>,
    wiring: Wiring,
    memory: Vec<Region>,
    /// It has announced a change of its configuration that nobody has heard of.
    changed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    index: u16,
    /// Where it is rung, in bytes from the start of the notification area.
    notified_at: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Region {
    iova: u64,
    bytes: u64,
    /// Where it is, if nothing translates.
    pages: Option<Pages>,
}

impl Region {
    fn of(region: &DmaRegion) -> Result<Region, NotExportable> {
        let pages = match (region.page_bytes(), region.pages()) {
            (Some(page_bytes), Some((name, addresses))) => {
                let name = name.to_str().map_err(|error| NotExportable::because(error.to_string()))?.to_owned();
                Some(Pages { name, page_bytes, addresses: addresses.to_vec() })
            }
            _ => None,
        };
        Ok(Region { iova: region.iova(), bytes: region.len(), pages })
    }
}

fn because(why: impl Into<String>) -> NotExportable {
    NotExportable::because(why)
}

impl VirtioPci {
    /// See [`cofferdam_device::Transport::exportable`].
    pub(super) fn check_exportable(&self) -> Result<(), NotExportable> {
        let runs = self.started && !self.lost && self.stopping == Stopping::No && self.dormant.is_none();
        let Some(open) = self.open.as_ref().filter(|_| runs) else {
            return Err(because("the device does not run"));
        };
        if self.memory.as_started().is_none() {
            return Err(because("clients share memory with the device (data ports)"));
        }
        open.claimed.exportable()
    }

    /// See [`cofferdam_device::Transport::export`].
    pub(super) fn export_all(&mut self) -> Result<Exported, NotExportable> {
        use cofferdam_device::Transport;
        self.check_exportable()?;
        if self.is_lost() {
            return Err(because("the device is gone"));
        }
        let memory = self.memory.as_started().map(|all| all.map(Region::of).collect::<Result<_, _>>()).transpose()?;
        let Some((open, memory)) = self.open.as_mut().zip(memory) else {
            return Err(because("the device does not run"));
        };
        let wired = open.wired.as_mut().ok_or_else(|| because("the device does not run"))?;
        let mut own: Vec<BorrowedFd<'_>> = vec![open.notices.change()];
        own.extend(self.queues.iter().map(|queue| queue.call.as_fd()));
        if let Wired::Shared(event, _) = &*wired {
            own.push(event.as_fd());
        }
        let own = own.into_iter().map(duplicate).collect::<Result<Vec<_>, _>>()?;
        let state = |queue: &Queue| QueueState { index: queue.index, notified_at: queue.bell.offset() };
        let device = State {
            offered: self.offer.features,
            sizes: self.offer.sizes.clone(),
            status: open.common.set(),
            queues: self.queues.iter().map(state).collect(),
            wiring: wired.wiring(),
            memory,
            changed: self.config_changed,
        };
        wired.pause();
        let parcel = open.claimed.export();
        // From here on it is not this process's, until it is resumed.
        self.dormant = Some(Dormant::default());
        let state = parcel.and_then(|parcel| {
            let state = adopt::State { address: self.address.clone(), function: parcel.state, device };
            let state = serde_json::to_string(&state).map_err(|error| because(error.to_string()))?;
            Ok((state, parcel.descriptors))
        });
        match state {
            Ok((state, mut descriptors)) => {
                descriptors.extend(own);
                tracing::debug!(address = self.address, "virtio function exported");
                Ok(Exported { kind: KIND.to_owned(), state, descriptors })
            }
            Err(why) => {
                self.go_on();
                Err(why)
            }
        }
    }

    /// The device that another process exported, as it runs, on a function that was adopted. Dormant until it is resumed.
    ///
    /// # Errors
    /// A sentence: it is not such a device, or the parts do not fit together.
    pub(crate) fn adopt(
        mut claimed: Box<dyn Claimed>,
        address: String,
        state: State,
        received: &mut Descriptors,
    ) -> Result<Self, String> {
        let Found { kind, layout, common, notify, isr, device } = open::find(claimed.as_mut())?;
        let State { offered, sizes, status, queues, wiring, memory, changed } = state;
        let step = u64::from(layout.notify_step);
        let is_place = |at: u64| at.checked_add(2).is_some_and(|end| end <= notify.bytes()) && at.is_multiple_of(2);
        let is_queue = |(place, queue): (usize, &QueueState)| {
            sizes.get(usize::from(queue.index)).is_some_and(|size| *size > 0)
                && is_place(queue.notified_at)
                && (step == 0 || queue.notified_at.is_multiple_of(step))
                && !queues[..place].iter().any(|other| other.index == queue.index)
        };
        let bounded = (1..=usize::from(MAX_QUEUES)).contains(&sizes.len())
            && sizes.iter().all(|size| open::is_size(*size))
            && status & status::DRIVER_OK != 0
            && queues.iter().enumerate().all(is_queue)
            && memory.len() <= MAX_REGIONS;
        if !bounded {
            return Err("what it says of the device is out of bounds".to_owned());
        }
        let common = Common::found(common, status);
        // One that was reset, by whomever, is not what was exported.
        common.alive().map_err(|error| error.to_string())?;
        let change = received.next("event of a changed configuration")?;
        let notices = Notices::on(change, claimed.event_fd()).map_err(|error| error.to_string())?;
        let reach = reach(claimed.as_ref(), offered);
        let queue = |QueueState { index, notified_at }| {
            let call = received.next("event of a queue")?;
            Ok(Queue { index, bell: Bell::new(notify.clone(), notified_at, index), call })
        };
        let queues = queues.into_iter().map(queue).collect::<Result<Vec<_>, String>>()?;
        let wired = Some(match wiring {
            Wiring::Vectors => Wired::Vectors,
            Wiring::Shared => Wired::Shared(received.next("shared event")?, None),
            Wiring::Line => Wired::Line,
        });
        let (notify_step, vectors) = (layout.notify_step, layout.vectors);
        let open = Open { claimed, common, notify, notify_step, isr, device, vectors, notices, wired };
        Ok(VirtioPci {
            address,
            open: Some(open),
            offer: Offer { kind, features: offered, sizes },
            reach,
            negotiated: true,
            started: true,
            queues,
            memory: Memory::default(),
            stopping: Stopping::No,
            lost: false,
            config_changed: changed,
            dormant: Some(Dormant { memory }),
        })
    }

    fn known(&self, iova: u64, bytes: u64) -> Option<usize> {
        let memory = &self.dormant.as_ref()?.memory;
        memory.iter().position(|region| (region.iova, region.bytes) == (iova, bytes))
    }

    /// See [`cofferdam_device::Transport::adopt_region`].
    pub(super) fn find_region(&mut self, file: OwnedFd, bytes: u64, iova: u64) -> Result<Arc<DmaRegion>, RegionError> {
        let known = self.known(iova, bytes).zip(self.dormant.as_ref());
        let pages = known.ok_or(RegionError::Shape { bytes, iova }).map(|(at, dormant)| &dormant.memory[at].pages)?;
        match (pages, self.reach, &mut self.open) {
            (None, Reach::Iommu, _) => DmaRegion::adopt(file, bytes, iova).map(Arc::new),
            (Some(pages), Reach::Physical, Some(open)) => open.claimed.adopt_pages(file, pages),
            _ => Err(RegionError::Shape { bytes, iova }),
        }
    }

    /// See [`cofferdam_device::Transport::adopt_memory`].
    pub(super) fn take_memory(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        let place = self.known(region.iova(), region.len());
        let (Some(place), Some(dormant), Some(open)) = (place, &mut self.dormant, &mut self.open) else {
            return Err(TransportError::Invalid(format!(
                "the device was not given the memory at {:#x}",
                region.iova()
            )));
        };
        self.memory.check(&region, self.reach)?;
        dormant.memory.swap_remove(place);
        open.claimed.adopt_memory(Arc::clone(&region));
        self.memory.keep(region, false);
        Ok(())
    }

    /// See [`cofferdam_device::Transport::adopt_queue`].
    pub(super) fn take_queue(&mut self, index: u16) -> Result<Box<dyn Doorbell>, TransportError> {
        let queue = self.queues.iter().find(|queue| queue.index == index).filter(|_| self.dormant.is_some());
        if let Some(region) = self.dormant.as_ref().and_then(|dormant| dormant.memory.first()) {
            let Region { iova, bytes, .. } = region;
            return Err(TransportError::Invalid(format!(
                "the device was given {bytes} bytes at {iova:#x} that nobody has"
            )));
        }
        let bell = queue.map(|queue| queue.bell.handle());
        bell.ok_or_else(|| TransportError::Invalid(format!("queue {index} does not run")))
    }

    /// See [`cofferdam_device::Transport::resume`].
    pub(super) fn go_on(&mut self) {
        if self.dormant.take().is_none() {
            return;
        }
        let Some(open) = &mut self.open else { return };
        let Open { claimed, isr, notices, wired, .. } = open;
        let calls: Vec<_> = self.queues.iter().map(|queue| &queue.call).collect();
        let line = wired.as_mut().map_or(Ok(None), |wired| wired.resume(isr, notices, &calls));
        let (line, failed) = line.map_or_else(|error| (None, Some(error)), |line| (line, None));
        claimed.resume(line);
        if let Some(error) = failed {
            // Nobody passes its interrupts on: it is as good as gone, and whoever looks next is told so.
            notices.wake();
            self.note_lost(&format!("its interrupts cannot be taken: {error}"));
            return;
        }
        if !self.lost {
            self.queues.iter().for_each(|queue| queue.bell.start());
        }
    }
}
