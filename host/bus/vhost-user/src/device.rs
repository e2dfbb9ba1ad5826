//! The transport: the steps of a device's life as vhost-user messages.
//!
//! ```text
//! connect    GET_FEATURES, GET/SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_OWNER, SET_BACKEND_REQ_FD
//! negotiate  SET_FEATURES
//! map        SET_MEM_TABLE with every region so far
//! setup      SET_VRING_NUM, BASE, ADDR, CALL, KICK     (the kick starts the ring, so it comes last)
//! start      SET_VRING_ENABLE, where there are protocol features
//! map        ADD_MEM_REG for a region that comes later, unmap: REM_MEM_REG (see `slots`)
//! quiesce    GET_VRING_BASE, or the end of the process
//! ```
//!
//! Guest, "user" and I/O addresses are one and the same here: the region's I/O address. The protocol would have this process's own addresses as
//! "user addresses", and they are nobody's business.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::{
    DmaRegion, Doorbell, Exported, NotExportable, QueueEvents, QueueSetup, Silence, Transport, TransportError,
};
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserConfigFlags, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserU64, VhostUserVirtioFeatures, VhostUserVringAddr, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vm_memory::ByteValued;

use crate::address::Address;
use crate::adopt::Dormant;
use crate::backend_channel::BackendChannel;
use crate::claim::{Claim, SocketId};
use crate::error::ConnectError;
use crate::events::{Kick, event, watch};
use crate::handshake::{Hello, VERSION_1};
use crate::slots::Slots;
use crate::wire::{Link, MAX_FDS, Wire, limit, number};

/// Queues that can be addressed: SET_VRING_KICK and CALL have 8 bits for the index.
pub const MAX_QUEUES: u16 = 256;

/// Ring size that is allowed, in entries. The protocol cannot ask a backend for its limit; qemu's and rust-vmm's take this many, and one
/// that does not refuses in [`Transport::setup_queue`].
pub const MAX_RING_ENTRIES: u16 = 1024;

/// Regions that one device can be given before it starts (vhost-user, "Memory region description").
pub const MAX_REGIONS: usize = MAX_FDS;

/// Bytes of configuration space that can be read (vhost-user, "Virtio device config space").
pub const MAX_CONFIG_BYTES: usize = 256;

/// VIRTIO_F_ACCESS_PLATFORM (virtio 1.2, section 6): with vhost-user it means IOTLB messages, which are not spoken here.
const ACCESS_PLATFORM: u64 = 1 << 33;

/// Feature bits that are the protocol's own and say nothing about the device.
const TRANSPORT_BITS: u64 = VhostUserVirtioFeatures::all().bits();

/// A device served by another process over vhost-user.
pub struct VhostUser {
    pub(crate) address: String,
    /// `None` after `release`.
    pub(crate) open: Option<Open>,
    pub(crate) offered: u64,
    pub(crate) protocol: VhostUserProtocolFeatures,
    pub(crate) max_queues: u16,
    pub(crate) negotiated: bool,
    pub(crate) started: bool,
    /// Every ring that the backend was or may have been given.
    pub(crate) rings: Vec<Ring>,
    /// In the order they were mapped. Kept until `release`, whatever happens, because the backend may reach them; but for those that it has acknowledged to be removed.
    pub(crate) regions: Vec<Arc<DmaRegion>>,
    pub(crate) slots: Slots,
    /// What `quiesce` has confirmed once stays so: nothing starts a ring again.
    pub(crate) silent: bool,
    /// The configuration space from byte 0, as far as it was ever read, as it was last.
    pub(crate) config: Vec<u8>,
    /// Another process has the device, or may get it: nothing is said to the backend, and nothing of what it says is read.
    pub(crate) dormant: Option<Dormant>,
}

/// What is closed by `release`.
pub(crate) struct Open {
    pub(crate) wire: Wire,
    /// Readable when `wire`'s socket hangs up or has something to read, when the backend's process ends, or when `channel` is to be looked at.
    pub(crate) events: OwnedFd,
    pub(crate) claim: Claim,
    pub(crate) channel: Option<BackendChannel>,
}

pub(crate) struct Ring {
    pub(crate) index: u16,
    pub(crate) state: RingState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RingState {
    /// The backend was or may have been given it.
    Running,
    /// The backend was asked to stop it and has not answered yet.
    Asked,
    /// The backend said that it has stopped it.
    Stopped,
}

impl VhostUser {
    /// Claims the device at `address` (`vhost-user:/path.sock`) and shakes hands with it. Bounded by [`crate::ANSWER_LIMIT`] per message.
    ///
    /// # Errors
    /// [`ConnectError`] says what is wrong with the address, the socket or the peer.
    pub fn connect(address: &str) -> Result<Self, ConnectError> {
        let parsed: Address = address.parse()?;
        let path = parsed.path();
        let id = SocketId::of(path)?;
        let claim = Claim::take(path, id)?;
        let mut wire = Wire::connect(path)?;
        if SocketId::of(path)? != id {
            return Err(ConnectError::Replaced(path.to_owned()));
        }
        let hello = Hello::say(&mut wire).map_err(|error| ConnectError::in_handshake(path, error))?;
        let events =
            watch(&wire, hello.channel.as_ref()).map_err(|errno| ConnectError::from_errno(path, "epoll", errno))?;
        tracing::info!(address, pid = wire.peer().pid(), queues = hello.max_queues, "vhost-user device connected");
        Ok(VhostUser {
            address: address.to_owned(),
            open: Some(Open { wire, events, claim, channel: hello.channel }),
            offered: hello.offered,
            protocol: hello.protocol,
            max_queues: hello.max_queues,
            negotiated: false,
            started: false,
            rings: Vec::new(),
            regions: Vec::new(),
            slots: Slots::new(hello.memory_slots),
            silent: false,
            config: Vec::new(),
            dormant: None,
        })
    }

    /// The process that serves the device, where that is sure.
    pub fn backend_pid(&self) -> Option<i32> {
        self.open.as_ref().and_then(|open| open.wire.peer().pid())
    }

    pub(crate) fn wire(&mut self) -> Result<&mut Wire, TransportError> {
        match &mut self.open {
            // The one way to the backend, so this is the one look that keeps a device that is handed over from being spoken to by two.
            _ if self.dormant.is_some() => {
                Err(TransportError::Invalid("the device is being handed to another process".to_owned()))
            }
            Some(open) => Ok(&mut open.wire),
            None => Err(TransportError::Invalid("the device was released".to_owned())),
        }
    }

    fn tell(&mut self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), TransportError> {
        self.wire()?.tell(request, body, fds, limit())
    }

    /// Stops every ring, or says why that is not known to have happened.
    fn stop_rings(&mut self, deadline: Instant) -> Result<(), String> {
        if self.open.is_none() {
            return Err("the device was released before it was silent".to_owned());
        }
        // An answer that is late is in front of all others. What it says is nothing to the rings.
        if let Err(TransportError::Timeout) = self.settle(deadline.min(limit())) {
            return Err("a change of the memory is not acknowledged".to_owned());
        }
        let Some(open) = &mut self.open else { return Ok(()) };
        for ring in self.rings.iter_mut().filter(|ring| ring.state != RingState::Stopped) {
            // Too late is not wrong: the question stays open, and the next call takes the answer (DESIGN L2).
            let until = deadline.min(limit());
            let answer = match ring.state {
                RingState::Asked => Ok(()),
                _ => {
                    let question = VhostUserVringState::new(u32::from(ring.index), 0);
                    open.wire.begin(FrontendReq::GET_VRING_BASE, question.as_slice(), until)
                }
            };
            let answer = answer.and_then(|()| {
                ring.state = RingState::Asked;
                open.wire.finish(until)
            });
            match answer {
                // Index and next available entry. They are not used: what matters is that the backend has answered.
                Ok(state) if state.len() == size_of::<VhostUserVringState>() => ring.state = RingState::Stopped,
                Ok(state) => {
                    open.wire.shut_down("a malformed answer to GET_VRING_BASE");
                    return Err(format!("stopping ring {}: an answer of {} bytes", ring.index, state.len()));
                }
                Err(TransportError::Lost) => break,
                Err(error) => return Err(format!("stopping ring {}: {error}", ring.index)),
            }
        }
        match open.wire.link() {
            // A backend that closed has nothing left to do: every request was used and no ring can be kicked or found any more.
            Link::Open | Link::ClosedByPeer => Ok(()),
            Link::ShutDown(reason) => Err(format!("the connection was given up: {reason}")),
        }
    }

    fn silence(&mut self, unanswered: usize, deadline: Instant) -> Result<(), String> {
        if self.dormant.is_some() {
            return Err("another process has the device".to_owned());
        }
        if self.silent || self.rings.is_empty() {
            return Ok(());
        }
        if self.open.as_ref().is_some_and(|open| open.wire.peer().is_gone()) {
            return Ok(());
        }
        let reason = if unanswered == 0 {
            match self.stop_rings(deadline) {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            }
        } else {
            format!("requests that the backend has: {unanswered}, and stopping a ring does not wait for them")
        };
        let Some(open) = &self.open else {
            return Err(reason);
        };
        open.wire.peer().wait_gone(deadline).map_err(|process| format!("{reason}; {process}"))
    }
}

impl Transport for VhostUser {
    fn address(&self) -> &str {
        &self.address
    }

    fn device_type(&self) -> Option<u32> {
        None
    }

    fn offered_features(&self) -> u64 {
        self.offered
    }

    /// Bits 26 and 30 (log, protocol features) belong to the protocol: they are decided here, whatever `features` says of them.
    ///
    /// # Errors
    /// `Invalid` for a feature that was not offered, for a set without `VIRTIO_F_VERSION_1`, and for a second call.
    /// `Refused` for `VIRTIO_F_ACCESS_PLATFORM`.
    fn negotiate(&mut self, features: u64) -> Result<(), TransportError> {
        let invalid = |why: String| Err(TransportError::Invalid(why));
        if self.negotiated {
            return invalid("features were negotiated already".to_owned());
        }
        let excess = features & !self.offered & !TRANSPORT_BITS;
        if excess != 0 {
            return invalid(format!("features {excess:#x} were not offered"));
        }
        if features & VERSION_1 == 0 {
            return invalid("VIRTIO_F_VERSION_1 must be accepted".to_owned());
        }
        if features & ACCESS_PLATFORM != 0 {
            return Err(TransportError::Refused(
                "VIRTIO_F_ACCESS_PLATFORM needs IOTLB messages, which this front end does not have".to_owned(),
            ));
        }
        let protocol = self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let accepted = features & !TRANSPORT_BITS | protocol;
        self.tell(FrontendReq::SET_FEATURES, VhostUserU64::new(accepted).as_slice(), &[])?;
        self.negotiated = true;
        Ok(())
    }

    /// The backend is asked for everything from byte 0 on, in one message: qemu's ignores the offset and always answers from 0, and one
    /// message is one consistent state (vhost-user has no configuration generation).
    ///
    /// # Errors
    /// `Invalid` past [`MAX_CONFIG_BYTES`]; `Refused` when the backend has no configuration space or not so much of it.
    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(TransportError::Refused(
                "the backend has no configuration space (VHOST_USER_PROTOCOL_F_CONFIG); not a block device?".to_owned(),
            ));
        }
        if into.is_empty() {
            return Ok(());
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(into.len());
        if let Some(dormant) = &self.dormant {
            return dormant.read_config(start..end, into);
        }
        let Some(size) = u32::try_from(end).ok().filter(|_| end <= MAX_CONFIG_BYTES) else {
            return Err(TransportError::Invalid(format!(
                "bytes {start} to {end} of a configuration space that has at most {MAX_CONFIG_BYTES}"
            )));
        };
        let head = VhostUserConfig::new(0, size, VhostUserConfigFlags::empty());
        let mut question = head.as_slice().to_vec();
        question.resize(question.len() + end, 0);
        self.settle_before_asking()?;
        let answer = self.wire()?.ask(FrontendReq::GET_CONFIG, &question, limit())?;
        let (said, bytes) = answer.split_at_checked(head.as_slice().len()).unwrap_or_default();
        match (VhostUserConfig::from_slice(said), bytes.get(start..end)) {
            (Some(said), Some(found)) if said.offset == 0 && said.size == size && bytes.len() == end => {
                into.copy_from_slice(found);
                if self.config.len() < end {
                    self.config.resize(end, 0);
                }
                self.config[..end].copy_from_slice(bytes);
                Ok(())
            }
            // Refusals: qemu sends no payload at all, rust-vmm a head that says size 0.
            (said, _) if answer.is_empty() || said.is_some_and(|said| said.size == 0) => {
                Err(TransportError::Refused(format!("its configuration space has no {end} bytes")))
            }
            _ => Err(TransportError::Protocol(format!(
                "answer to GET_CONFIG: {} bytes for {end} bytes of configuration space",
                answer.len()
            ))),
        }
    }

    /// What the backend says where it has `VHOST_USER_PROTOCOL_F_MQ`, at most [`MAX_QUEUES`]; else 1.
    fn max_queues(&self) -> u16 {
        self.max_queues
    }

    /// [`MAX_RING_ENTRIES`] for every queue.
    fn max_queue_size(&self, _index: u16) -> u16 {
        MAX_RING_ENTRIES
    }

    /// # Errors
    /// `Invalid` between the first `setup_queue` and `start`, for a region that overlaps another one, and for more than [`MAX_REGIONS`] before `start`. After it `Unsupported`
    /// without memory slots, and `Exhausted` when all are taken.
    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        let invalid = |why: String| Err(TransportError::Invalid(why));
        if !self.rings.is_empty() && !self.started {
            // A backend unmaps what it has before it maps a new table: not under a ring.
            return invalid("memory cannot be mapped between the first queue and start".to_owned());
        }
        if !self.started && self.regions.len() >= MAX_REGIONS {
            return invalid(format!("more than {MAX_REGIONS} regions"));
        }
        let end = region.iova().saturating_add(region.len());
        if let Some(other) = self
            .regions
            .iter()
            .find(|other| region.iova() < other.iova().saturating_add(other.len()) && other.iova() < end)
        {
            return invalid(format!("the region at {:#x} overlaps the one at {:#x}", region.iova(), other.iova()));
        }
        self.wire()?;
        if self.started {
            return self.add_region(region);
        }
        // Kept even if the backend says no: it has had the descriptor.
        self.regions.push(region);
        let regions = self.regions.clone();
        let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
        let mut table = VhostUserMemory::new(count).as_slice().to_vec();
        for region in &regions {
            let entry = VhostUserMemoryRegion::new(region.iova(), region.len(), region.iova(), 0);
            table.extend_from_slice(entry.as_slice());
        }
        let fds: Vec<_> = regions.iter().map(|region| region.fd()).collect();
        self.tell(FrontendReq::SET_MEM_TABLE, &table, &fds)
    }

    /// # Errors
    /// `Invalid` before `negotiate`, twice for one queue, for an index or size out of bounds, and for a ring that is misaligned or not in mapped memory.
    fn setup_queue_with(&mut self, setup: QueueSetup, call: OwnedFd) -> Result<QueueEvents, TransportError> {
        self.check(&setup)?;
        let index = u32::from(setup.index);
        let state = |number: u32| VhostUserVringState::new(index, number);
        self.tell(FrontendReq::SET_VRING_NUM, state(u32::from(setup.size)).as_slice(), &[])?;
        self.tell(FrontendReq::SET_VRING_BASE, state(0).as_slice(), &[])?;
        let at = setup.addresses;
        let flags = VhostUserVringAddrFlags::empty();
        let addresses = VhostUserVringAddr::new(index, flags, at.descriptors, at.used, at.available, 0);
        self.tell(FrontendReq::SET_VRING_ADDR, addresses.as_slice(), &[])?;

        // Both are always given: without a call eventfd qemu's device fails an assertion, without a kick it hangs. Both are
        // non-blocking from the start, because qemu makes them so, and the flag is shared with this side.
        let kick = event("kick eventfd")?;
        let number = VhostUserU64::new(u64::from(setup.index));
        self.tell(FrontendReq::SET_VRING_CALL, number.as_slice(), &[call.as_fd()])?;
        // From here on the backend may have started it, whatever it answers.
        self.rings.push(Ring { index: setup.index, state: RingState::Running });
        self.tell(FrontendReq::SET_VRING_KICK, number.as_slice(), &[kick.as_fd()])?;
        Ok(QueueEvents { doorbell: Box::new(Kick(kick)), call })
    }

    /// # Errors
    /// `Invalid` before `negotiate`; `Lost` when the backend dropped the connection over what it was told before.
    fn start(&mut self) -> Result<(), TransportError> {
        if !self.negotiated || self.started {
            return Err(TransportError::Invalid("start comes once, after negotiate".to_owned()));
        }
        if self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let indices: Vec<u16> = self.rings.iter().map(|ring| ring.index).collect();
            for index in indices {
                let enable = VhostUserVringState::new(u32::from(index), 1);
                self.tell(FrontendReq::SET_VRING_ENABLE, enable.as_slice(), &[])?;
            }
        }
        let wire = self.wire()?;
        if !wire.has_acks() {
            // Without acknowledgements a question shows that everything before it was taken.
            let request = FrontendReq::GET_FEATURES;
            number(request, &wire.ask(request, &[], limit())?)?;
        }
        self.started = true;
        tracing::info!(address = self.address, queues = self.rings.len(), "vhost-user device started");
        Ok(())
    }

    fn unmap(&mut self, iova: u64, deadline: Instant) -> Silence {
        self.remove_region(iova, deadline)
    }

    /// Readable when the backend closes the connection, ends, or sends something, its configuration's change on the backend channel among it.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref().map(|open| open.events.as_fd())
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let Some(open) = &self.open else { return Vec::new() };
        let channel = open.channel.as_ref().and_then(BackendChannel::socket);
        [open.wire.descriptor(), open.claim.descriptor()].into_iter().chain(channel).collect()
    }

    fn is_lost(&mut self) -> bool {
        if self.dormant.is_some() {
            return false;
        }
        let Some(open) = &mut self.open else { return true };
        if let Some(channel) = &mut open.channel {
            channel.look();
        }
        open.wire.is_lost()
    }

    /// Where the backend has `VHOST_USER_PROTOCOL_F_BACKEND_REQ`; else never.
    fn take_config_change(&mut self) -> bool {
        if self.dormant.is_some() {
            return false;
        }
        let channel = self.open.as_mut().and_then(|open| open.channel.as_mut());
        channel.is_some_and(BackendChannel::take_change)
    }

    fn quiesce(&mut self, unanswered: usize, deadline: Instant) -> Silence {
        match self.silence(unanswered, deadline) {
            Ok(()) => {
                if !self.silent {
                    tracing::info!(address = self.address, "vhost-user device is silent");
                }
                self.silent = true;
                Silence::Confirmed
            }
            Err(reason) => {
                tracing::debug!(address = self.address, reason, "vhost-user device may still act");
                Silence::Unconfirmed { reason }
            }
        }
    }

    fn release(&mut self) {
        match self.open.take() {
            // The other process uses the same connection.
            Some(open) if self.dormant.is_some() => drop(open),
            Some(mut open) => {
                open.wire.shut_down("released");
                tracing::info!(address = self.address, "vhost-user device released");
            }
            None => {}
        }
        self.regions.clear();
    }

    fn exportable(&self) -> Result<(), NotExportable> {
        self.check_exportable()
    }

    fn export(&mut self) -> Result<Exported, NotExportable> {
        self.export_all()
    }

    fn adopt_memory(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.take_memory(region)
    }

    fn adopt_queue(&mut self, index: u16, kick: OwnedFd) -> Result<Box<dyn Doorbell>, TransportError> {
        self.take_queue(index, kick)
    }

    fn resume(&mut self) {
        self.dormant = None;
    }
}

impl VhostUser {
    fn check(&self, setup: &QueueSetup) -> Result<(), TransportError> {
        let invalid = |why: String| Err(TransportError::Invalid(why));
        let QueueSetup { index, size, addresses: at } = *setup;
        if !self.negotiated {
            return invalid("a queue is set up after features are negotiated".to_owned());
        }
        if self.started {
            return invalid("a queue is set up before start".to_owned());
        }
        if index >= self.max_queues {
            return invalid(format!("queue {index} of a device with {}", self.max_queues));
        }
        if self.rings.iter().any(|ring| ring.index == index) {
            return invalid(format!("queue {index} was set up already"));
        }
        if !size.is_power_of_two() || size > MAX_RING_ENTRIES {
            return invalid(format!("a ring of {size} entries"));
        }
        // Sizes and alignments: virtio 1.2, section 2.7. Event index fields are counted in.
        let entries = u64::from(size);
        let parts = [
            ("descriptor table", at.descriptors, 16 * entries, 16),
            ("available ring", at.available, 6 + 2 * entries, 2),
            ("used ring", at.used, 6 + 8 * entries, 4),
        ];
        for (name, place, bytes, align) in parts {
            let mapped = self.regions.iter().any(|region| region.offset_of(place, bytes).is_some());
            if !mapped || place % align != 0 {
                return invalid(format!("queue {index}: its {name} at {place:#x} is not mapped or not aligned"));
            }
        }
        Ok(())
    }
}

impl Drop for VhostUser {
    fn drop(&mut self) {
        self.release();
    }
}
