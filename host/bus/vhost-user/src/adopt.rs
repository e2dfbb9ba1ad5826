//! A device in the hands of another process: the connection, the events and the proof of who the backend is pass over, and the backend hears nothing of it.
//!
//! ```text
//! this process:   runs -> export: dormant ----------------------------------> dropped, or resumed
//! the other one:                  adopt: dormant, memory and queues noted --> resumed, or dropped
//! ```
//!
//! Dormant, neither says anything nor reads anything: the connection is one stream that both have open, and half a question would put the other out of step. What a
//! driver wants to read of the configuration space meanwhile is answered as it was read last before it.
//!
//! | descriptor, in order | |
//! | --- | --- |
//! | connection | the socket, with `SO_PASSCRED` set |
//! | claim | the abstract name that keeps others from the device |
//! | process | the backend's pidfd, where it is known |
//! | backend channel | where there is one |
//!
//! Who can forge what is adopted: a process of the same user, which could as well write into this one's memory. It is checked for sense, so that a mistake is an error.

use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cofferdam_device::{DmaRegion, Doorbell, Exported, NotExportable, Transport, TransportError};
use rustix::net::sockopt::set_socket_passcred;
use serde::{Deserialize, Serialize};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::address::Address;
use crate::backend_channel::BackendChannel;
use crate::claim::Claim;
use crate::device::{MAX_CONFIG_BYTES, MAX_QUEUES, MAX_REGIONS, Open, Ring, RingState, VhostUser};
use crate::events::{Kick, watch};
use crate::peer::Peer;
use crate::slots::Slots;
use crate::wire::Wire;

/// [`Exported::kind`] of these devices.
pub const KIND: &str = "vhost-user";

/// What is known of a device that nobody may speak to.
pub(crate) struct Dormant {
    /// Its configuration space, from byte 0, as it was last.
    config: Vec<u8>,
    /// Memory that it was given and that has not been adopted yet: I/O address and length.
    memory: Vec<(u64, u64)>,
}

impl Dormant {
    /// See [`Transport::read_config`].
    pub(crate) fn read_config(&self, range: Range<usize>, into: &mut [u8]) -> Result<(), TransportError> {
        let had = self.config.len();
        let refused = || {
            TransportError::Refused(format!("while it is handed over only {had} bytes of its configuration are known"))
        };
        into.copy_from_slice(self.config.get(range).ok_or_else(refused)?);
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    address: String,
    offered: u64,
    protocol: u64,
    max_queues: u16,
    memory_slots: usize,
    acks: bool,
    /// Indices of the queues that run.
    queues: Vec<u16>,
    /// I/O address and length of each region.
    memory: Vec<(u64, u64)>,
    config: Vec<u8>,
    /// The backend's process, whose descriptor is there; or why it is not.
    process: Result<i32, String>,
    channel: Option<Channel>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Channel {
    inbox: Vec<u8>,
    changed: bool,
}

fn because(why: impl Into<String>) -> NotExportable {
    NotExportable::because(why)
}

fn invalid(why: impl Into<String>) -> TransportError {
    TransportError::Invalid(why.into())
}

impl VhostUser {
    /// See [`Transport::exportable`].
    pub(crate) fn check_exportable(&self) -> Result<(), NotExportable> {
        let Some(open) = self.open.as_ref().filter(|_| self.started && !self.silent && self.dormant.is_none()) else {
            return Err(because("the device does not run"));
        };
        if !self.slots.is_idle() {
            return Err(because("clients share memory with the device (data ports)"));
        }
        if !open.wire.is_idle() || self.rings.iter().any(|ring| ring.state != RingState::Running) {
            return Err(because("a question to the backend is open"));
        }
        Ok(())
    }

    /// See [`Transport::export`].
    pub(crate) fn export_all(&mut self) -> Result<Exported, NotExportable> {
        self.check_exportable()?;
        // Not asked for now: a backend that is slow to answer would lose its device by it. A change that it has announced since is passed on by whoever has it then.
        let config = self.config.clone();
        if self.is_lost() {
            return Err(because("the device is gone"));
        }
        let copied = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| because(format!("dup: {error}")));
        let Some(open) = &self.open else { return Err(because("the device does not run")) };
        let mut descriptors = vec![copied(open.wire.descriptor())?, copied(open.claim.descriptor())?];
        let peer = open.wire.peer();
        let process = match (peer.pid(), peer.pidfd()) {
            (Some(pid), Some(pidfd)) => {
                descriptors.push(copied(pidfd)?);
                Ok(pid)
            }
            _ => Err(peer.doubt().unwrap_or_default().to_owned()),
        };
        let mut channel = None;
        if let Some((live, socket)) = open.channel.as_ref().and_then(|live| Some((live, live.socket()?))) {
            descriptors.push(copied(socket)?);
            let (inbox, changed) = live.pending();
            channel = Some(Channel { inbox: inbox.to_vec(), changed });
        }
        let memory: Vec<_> = self.regions.iter().map(|region| (region.iova(), region.len())).collect();
        let state = State {
            address: self.address.clone(),
            offered: self.offered,
            protocol: self.protocol.bits(),
            max_queues: self.max_queues,
            memory_slots: self.slots.most(),
            acks: open.wire.has_acks(),
            queues: self.rings.iter().map(|ring| ring.index).collect(),
            memory,
            config: config.clone(),
            process,
            channel,
        };
        let state = serde_json::to_string(&state).map_err(|error| because(error.to_string()))?;
        self.dormant = Some(Dormant { config, memory: Vec::new() });
        tracing::debug!(address = self.address, "vhost-user device exported");
        Ok(Exported { kind: KIND.to_owned(), state, descriptors })
    }

    /// The device that another process exported, as it runs. It is dormant until [`Transport::resume`]: dropping it before that is noticed by nobody.
    ///
    /// # Errors
    /// `Invalid` when the parts do not fit together.
    pub fn adopt(exported: Exported) -> Result<Self, TransportError> {
        let wrong =
            |error: &dyn std::fmt::Display| invalid(format!("a {KIND} device that cannot be taken over: {error}"));
        if exported.kind != KIND {
            return Err(wrong(&format!("it is of kind {:?}", exported.kind)));
        }
        let state: State = serde_json::from_str(&exported.state).map_err(|error| wrong(&error))?;
        state.address.parse::<Address>().map_err(|error| wrong(&error))?;
        let bounded = (1..=MAX_QUEUES).contains(&state.max_queues)
            && state.config.len() <= MAX_CONFIG_BYTES
            && state.memory.len() <= MAX_REGIONS
            && state.queues.iter().all(|index| *index < state.max_queues)
            && state.queues.iter().enumerate().all(|(at, index)| !state.queues[..at].contains(index));
        if !bounded {
            return Err(wrong(&"out of bounds"));
        }
        let mut descriptors = exported.descriptors.into_iter();
        let mut next = |what: &str| descriptors.next().ok_or_else(|| wrong(&format!("its {what} is missing")));
        let (socket, claim) = (next("connection")?, next("claim")?);
        let peer = match state.process {
            Ok(pid) => Peer::adopt(Some((pid, next("process")?)), ""),
            Err(reason) => Peer::adopt(None, &reason),
        };
        let channel = match state.channel {
            Some(Channel { inbox, changed }) => {
                let socket = next("backend channel")?;
                set_socket_passcred(&socket, true).map_err(|error| wrong(&error))?;
                Some(BackendChannel::adopt(socket, state.acks, &inbox, changed).map_err(|error| wrong(&error))?)
            }
            None => None,
        };
        if descriptors.next().is_some() {
            return Err(wrong(&"a descriptor too many"));
        }
        // As it is already; but what is received by depends on it (`credentials`), and this is another process's word.
        set_socket_passcred(&socket, true).map_err(|error| wrong(&error))?;
        let wire = Wire::adopt(socket, peer, state.acks);
        let events = watch(&wire, channel.as_ref()).map_err(|error| wrong(&error))?;
        tracing::info!(address = state.address, pid = wire.peer().pid(), "vhost-user device adopted");
        Ok(VhostUser {
            address: state.address,
            open: Some(Open { wire, events, claim: Claim::adopt(claim), channel }),
            offered: state.offered,
            protocol: VhostUserProtocolFeatures::from_bits_truncate(state.protocol),
            max_queues: state.max_queues,
            negotiated: true,
            started: true,
            rings: state.queues.into_iter().map(|index| Ring { index, state: RingState::Running }).collect(),
            regions: Vec::new(),
            slots: Slots::new(state.memory_slots as u64),
            silent: false,
            config: state.config.clone(),
            dormant: Some(Dormant { config: state.config, memory: state.memory }),
        })
    }

    /// See [`Transport::adopt_memory`].
    pub(crate) fn take_memory(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        let known = (region.iova(), region.len());
        let memory = self.dormant.as_mut().map(|dormant| &mut dormant.memory);
        let place = memory.as_ref().and_then(|memory| memory.iter().position(|other| *other == known));
        match (memory, place) {
            (Some(memory), Some(place)) => drop(memory.swap_remove(place)),
            _ => return Err(invalid(format!("the device was not given the memory at {:#x}", known.0))),
        }
        self.regions.push(region);
        Ok(())
    }

    /// See [`Transport::adopt_queue`].
    pub(crate) fn take_queue(&mut self, index: u16, kick: OwnedFd) -> Result<Box<dyn Doorbell>, TransportError> {
        if !self.rings.iter().any(|ring| ring.index == index) {
            return Err(invalid(format!("queue {index} does not run")));
        }
        if let Some((iova, bytes)) = self.dormant.as_ref().and_then(|dormant| dormant.memory.first()) {
            return Err(invalid(format!("the device was given {bytes} bytes at {iova:#x} that nobody has")));
        }
        Ok(Box::new(Kick(kick)))
    }
}
