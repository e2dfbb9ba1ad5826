//! The device in this process, behind [`cofferdam_device::transport::Transport`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use cofferdam_device::transport::{Doorbell, QueueEvents, QueueSetup, Silence, Transport};
use cofferdam_device::{DmaRegion, TransportError};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::{Quiescence, SimDevice};
use crate::machine::Machine;
use crate::memory::{Memory, Region};
use crate::ring::RingSetup;
use crate::session::{Event, Session, sleep};

/// Who turns the device's crank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drive {
    /// A thread per queue, woken by its doorbell.
    Threads,
    /// [`SimDevice::step`] alone; doorbells are counted and otherwise not heard. For tests that must run the same each time.
    Stepped,
}

/// The two descriptors of a queue, and where its ring is.
struct Line {
    setup: QueueSetup,
    kick: Arc<Event>,
    call: Arc<Event>,
}

/// A claim on a [`SimDevice`]. Dropped without [`Transport::release`], it releases.
pub struct SimTransport {
    device: SimDevice,
    address: String,
    session: Arc<Session>,
    /// The host's regions, given back by `release`; the device has its own mappings of them.
    regions: Vec<Arc<DmaRegion>>,
    memory: Arc<Memory>,
    lines: Vec<Line>,
    threads: Vec<JoinHandle<()>>,
    started: bool,
    released: bool,
}

/// Rings a queue's thread.
struct Bell {
    kick: Arc<Event>,
    machine: Arc<Machine>,
}

impl Doorbell for Bell {
    fn ring(&self) {
        self.machine.counters.doorbells.fetch_add(1, Ordering::Relaxed);
        self.kick.signal();
    }
}

fn io_error(what: &str) -> impl FnOnce(std::io::Error) -> TransportError {
    let what = what.to_owned();
    |source| TransportError::Io { what, source }
}

impl SimTransport {
    pub(crate) fn new(device: SimDevice, session: Arc<Session>) -> Self {
        Self {
            address: format!("sim:{:#x}", device.seed()),
            device,
            session,
            regions: Vec::new(),
            memory: Arc::default(),
            lines: Vec::new(),
            threads: Vec::new(),
            started: false,
            released: false,
        }
    }

    /// The device behind it.
    pub fn device(&self) -> &SimDevice {
        &self.device
    }

    fn machine(&self) -> &Arc<Machine> {
        self.session.machine()
    }

    /// Control messages of a lost device fail, those of a frozen one are never answered.
    fn reachable(&self) -> Result<(), TransportError> {
        if self.released || self.session.is_over() {
            return Err(TransportError::Lost);
        }
        // No wait: the time limit that a real transport would apply has no meaning for a device that says it hangs.
        if self.machine().is_frozen() { Err(TransportError::Timeout) } else { Ok(()) }
    }

    fn spawn(&mut self, line: usize) -> Result<(), TransportError> {
        let Line { setup, kick, call } = &self.lines[line];
        let (index, kick, call, session) = (setup.index, Arc::clone(kick), Arc::clone(call), Arc::clone(&self.session));
        let thread = std::thread::Builder::new()
            .name(format!("sim-queue-{index}"))
            .spawn(move || {
                loop {
                    session.run(index, || call.signal());
                    if session.is_over() {
                        break;
                    }
                    sleep(&[&kick, session.wake_event(index)], None);
                }
            })
            .map_err(io_error("start a device thread"))?;
        self.threads.push(thread);
        Ok(())
    }

    fn end(&mut self) {
        self.session.end();
        for thread in self.threads.drain(..) {
            // A thread that panicked has no effect any more either.
            let _ = thread.join();
        }
    }
}

impl Transport for SimTransport {
    fn address(&self) -> &str {
        &self.address
    }

    fn device_type(&self) -> Option<u32> {
        Some(self.machine().model.device_type())
    }

    fn offered_features(&self) -> u64 {
        self.machine().offered_features()
    }

    fn negotiate(&mut self, features: u64) -> Result<(), TransportError> {
        self.reachable()?;
        if features & !self.offered_features() != 0 {
            return Err(TransportError::Refused(format!("features {features:#x} were not all offered")));
        }
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(TransportError::Refused("VIRTIO_F_VERSION_1 was not accepted".to_owned()));
        }
        self.session.set_features(features);
        Ok(())
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        self.reachable()?;
        let bytes = into.len();
        self.machine()
            .read_config(offset, into)
            .ok_or_else(|| TransportError::Refused(format!("no configuration of {bytes} bytes at {offset}")))
    }

    fn max_queues(&self) -> u16 {
        self.machine().queues
    }

    fn max_queue_size(&self, _index: u16) -> u16 {
        self.machine().model.queue_size()
    }

    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.reachable()?;
        let mapped =
            Region::map(region.iova(), region.len(), region.fd()).map_err(io_error("map a region for the device"))?;
        let mut all = self.memory.regions().to_vec();
        all.push(Arc::new(mapped));
        self.memory = Arc::new(Memory::new(all));
        self.regions.push(region);
        if self.started {
            self.session.set_memory(&self.memory);
        }
        Ok(())
    }

    fn unmap(&mut self, iova: u64, deadline: Instant) -> Silence {
        let machine = Arc::clone(self.machine());
        if !self.session.is_over() {
            if self.released {
                return Silence::Unconfirmed { reason: "the device was released before it was silent".to_owned() };
            }
            // A frozen device answers nothing; one whose queues stand still does.
            if !machine.wait_for(deadline, || !machine.is_frozen()) {
                return Silence::Unconfirmed { reason: "the device hangs".to_owned() };
            }
        }
        if let Some(rest) = self.memory.without(iova) {
            self.memory = Arc::new(rest);
            self.session.set_memory(&self.memory);
        }
        self.regions.retain(|region| region.iova() != iova);
        Silence::Confirmed
    }

    fn setup_queue_with(&mut self, setup: QueueSetup, call: OwnedFd) -> Result<QueueEvents, TransportError> {
        self.reachable()?;
        if self.started
            || setup.index >= self.max_queues()
            || self.lines.iter().any(|line| line.setup.index == setup.index)
        {
            return Err(TransportError::Invalid(format!("queue {} cannot be set up now", setup.index)));
        }
        if !setup.size.is_power_of_two() || setup.size > self.max_queue_size(setup.index) {
            return Err(TransportError::Invalid(format!("queue {} of {} entries", setup.index, setup.size)));
        }
        let kick = Event::new().map(Arc::new).map_err(io_error("make an event descriptor"))?;
        let own = call.try_clone().map_err(io_error("duplicate an event descriptor"))?;
        let doorbell = Box::new(Bell { kick: Arc::clone(&kick), machine: Arc::clone(self.machine()) });
        self.lines.push(Line { setup, kick, call: Arc::new(Event::of(own)) });
        let events = QueueEvents { doorbell, call };
        Ok(events)
    }

    fn start(&mut self) -> Result<(), TransportError> {
        self.reachable()?;
        if self.started {
            return Err(TransportError::Invalid("started twice".to_owned()));
        }
        let has = |bit: u32| self.session.features() & 1 << bit != 0;
        for Line { setup, call, .. } in &self.lines {
            let ring = RingSetup {
                size: setup.size,
                descriptors: setup.addresses.descriptors,
                available: setup.addresses.available,
                used: setup.addresses.used,
                event_idx: has(VIRTIO_RING_F_EVENT_IDX),
                indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
                next_available: 0,
                next_used: 0,
            };
            self.session
                .start(setup.index, &self.memory, ring)
                .map_err(|error| TransportError::Refused(error.to_string()))?;
            self.session.set_call(setup.index, Arc::clone(call));
        }
        self.started = true;
        if !self.session.is_stepped() {
            for line in 0..self.lines.len() {
                self.spawn(line)?;
            }
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.session.event().as_fd())
    }

    fn is_lost(&mut self) -> bool {
        let lost = self.session.is_lost();
        if !lost {
            self.session.event().clear();
            // It may have been lost between the two: the descriptor must not be left quiet then.
            if self.session.is_lost() {
                self.session.raise_event();
                return true;
            }
        }
        lost
    }

    fn take_config_change(&mut self) -> bool {
        self.session.take_config_change()
    }

    fn quiesce(&mut self, unanswered: usize, deadline: Instant) -> Silence {
        let machine = Arc::clone(self.machine());
        if !self.session.is_over() {
            if !machine.wait_for(deadline, || !machine.is_hung()) {
                return Silence::Unconfirmed { reason: "the device hangs".to_owned() };
            }
            if machine.quiescence == Quiescence::Drains && unanswered > 0 {
                // What is on the ring was published before; the threads take it by themselves, a stepped device by `step`.
                let drained = machine.wait_for(deadline, || self.session.is_drained());
                if !drained {
                    return Silence::Unconfirmed { reason: "requests are in flight in the device".to_owned() };
                }
                if self.session.forgotten() > 0 {
                    return Silence::Unconfirmed { reason: "the device has not answered every request".to_owned() };
                }
            }
        }
        self.end();
        Silence::Confirmed
    }

    fn release(&mut self) {
        if std::mem::replace(&mut self.released, true) {
            return;
        }
        if self.machine().is_hung() && self.started && !self.session.is_over() {
            // A device that hangs cannot be made to let go. It keeps its own mapping of the memory, and its threads act on it
            // when it is released: whoever did not retire the memory will see that.
            self.session.abandon();
            self.threads.clear();
        } else {
            self.end();
            self.session.forget_calls();
        }
        self.regions.clear();
        self.lines.clear();
        self.memory = Arc::default();
    }
}

impl Drop for SimTransport {
    fn drop(&mut self) {
        self.release();
    }
}
