//! The same clients in another process (see [`cofferdam_manager::Port::export`]).
//!
//! ```text
//! port      shuts the door: clients that come wait in the listening socket
//! worker    parking: nothing is read; what was read is brought to its end; answers go out as the sockets take them
//!           parked:  waits for orders alone; connections stay as they are
//! export    per connection the socket, what was read and not used, what is to be sent, and where in a request it is
//! ```
//!
//! Exporting changes nothing: a worker that is resumed goes on as if it had slept. A connection that is half-way through a request keeps what it has of it. Bytes that
//! came for a payload are handed over as bytes that were read ahead, since they are in memory of a lease, and leases are not handed over; and so are unsent answers, as
//! bytes.
//!
//! Descriptors: the listening socket, a file with all bytes one after the other, then a socket for each connection in the order of the state.

mod session;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::SyncSender;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use cofferdam_manager::{Exported, NotExportable};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use crate::address::NbdAddress;
use crate::connection::{Connection, Phase};
use crate::error::NbdError;
use crate::handshake::Handshake;
use crate::listen::Listener;
use crate::options::{MAX_CONNECTIONS, NbdOptions};
use crate::service::{HandleSpec, Service};
use crate::session::Session;
use crate::wire::Wire;
pub(crate) use session::SessionState;

/// [`Exported::kind`] of these ports.
pub const KIND: &str = "nbd";

/// Bytes of all connections together that are taken over at the most.
const MAX_BYTES: u64 = 1 << 30;
/// Longest name of a peer, in bytes.
const MAX_PEER_BYTES: usize = 256;

/// What a worker is told about a handover.
pub(crate) enum Order {
    /// Bring everything to its end, tell, and wait.
    Park(SyncSender<Result<Vec<Parked>, NotExportable>>),
    /// Go on.
    Resume,
    /// End, and leave the clients alone.
    Forget,
}

/// A connection as it is told.
pub(crate) struct Parked {
    socket: OwnedFd,
    state: ConnectionState,
    bytes: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortState {
    address: String,
    /// Device and inode of the socket's file.
    file: Option<(u64, u64)>,
    connections: Vec<ConnectionState>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConnectionState {
    lane: usize,
    peer: String,
    /// The client sends no more.
    hung_up: bool,
    /// Bytes that were read and not used; the first of its bytes.
    ahead_bytes: u32,
    /// Bytes that are to be sent.
    unsent_bytes: u32,
    phase: PhaseState,
}

#[derive(Serialize, Deserialize)]
enum PhaseState {
    Handshake(HandshakeState),
    Session(SessionState),
}

/// How far a handshake has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Step {
    ClientFlags,
    OptionHeader,
    OptionData,
    Skip,
}

/// A handshake that is not over.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HandshakeState {
    pub(crate) step: Step,
    pub(crate) option: u32,
    /// Bytes of the option's data, or those of it that are still to be skipped.
    pub(crate) length: u32,
    pub(crate) partial: Vec<u8>,
    pub(crate) options: u32,
    pub(crate) no_zeroes: bool,
    pub(crate) structured: bool,
}

/// Whether clients are accepted, agreed on by the port and its accepting thread.
#[derive(Default)]
pub(crate) struct Door {
    state: Mutex<DoorState>,
    changed: Condvar,
}

#[derive(Default)]
struct DoorState {
    /// It is to be shut.
    shut: bool,
    /// The accepting thread knows.
    known: bool,
}

impl Door {
    pub(crate) fn set(&self, shut: bool) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = DoorState { shut, known: false };
    }

    /// The accepting thread's look: whether it accepts nobody now. It has handed over everybody whom it had accepted.
    pub(crate) fn is_shut(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.known = true;
        self.changed.notify_all();
        state.shut
    }

    /// Whether the accepting thread knows by `until`.
    pub(crate) fn wait(&self, until: Instant) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.known {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

fn because(error: impl std::fmt::Display) -> NotExportable {
    NotExportable::because(error.to_string())
}

fn wrong(error: impl std::fmt::Display) -> NbdError {
    NbdError::NotTakenOver(error.to_string())
}

impl<S: Service> Connection<S> {
    /// Whether nothing of it is with the device or on its way there.
    pub(crate) fn is_still(&self) -> bool {
        match &self.phase {
            Phase::Session(session) => session.is_still(),
            Phase::Handshake { .. } => true,
        }
    }

    /// All there is of it. It is still; nothing changes.
    pub(crate) fn export(&self, lane: usize) -> Result<Parked, NotExportable> {
        let mut bytes = Vec::new();
        let mut unsent = self.greeting.clone();
        let phase = match &self.phase {
            Phase::Handshake { machine, .. } => {
                unsent.extend_from_slice(&machine.output);
                PhaseState::Handshake(machine.export())
            }
            Phase::Session(session) => {
                let state = session.export(&mut bytes).map_err(because)?;
                unsent.extend(session.outbox.unsent().map_err(because)?);
                PhaseState::Session(state)
            }
        };
        bytes.extend_from_slice(self.wire.ahead());
        let ahead_bytes = u32::try_from(bytes.len()).map_err(because)?;
        let unsent_bytes = u32::try_from(unsent.len()).map_err(because)?;
        bytes.append(&mut unsent);
        let (peer, hung_up) = (self.peer.clone(), self.wire.hung_up);
        let socket = self.wire.socket().try_clone_to_owned().map_err(because)?;
        Ok(Parked { socket, state: ConnectionState { lane, peer, hung_up, ahead_bytes, unsent_bytes, phase }, bytes })
    }
}

/// Everything of a port whose workers are parked.
pub(crate) fn export(listener: &Listener, parked: Vec<Parked>) -> Result<Exported, NotExportable> {
    let mut descriptors = vec![listener.fd().try_clone_to_owned().map_err(because)?];
    let blob = rustix::fs::memfd_create("cofferdam-nbd-handover", MemfdFlags::CLOEXEC).map_err(because)?;
    let mut blob = File::from(blob);
    let mut sockets = Vec::with_capacity(parked.len());
    let mut connections = Vec::with_capacity(parked.len());
    for Parked { socket, state, bytes } in parked {
        blob.write_all(&bytes).map_err(because)?;
        sockets.push(socket);
        connections.push(state);
    }
    descriptors.push(blob.into());
    descriptors.append(&mut sockets);
    let state = PortState { address: listener.address.to_string(), file: listener.file(), connections };
    let state = serde_json::to_string(&state).map_err(because)?;
    Ok(Exported { kind: KIND.to_owned(), state, descriptors })
}

/// What another process exported, sorted and checked for sense, but for the sessions, which need a handle.
pub(crate) struct Received {
    pub(crate) listener: Listener,
    pub(crate) connections: Vec<Arrived>,
}

/// One connection of it.
pub(crate) struct Arrived {
    pub(crate) lane: usize,
    socket: OwnedFd,
    state: ConnectionState,
    ahead: Vec<u8>,
    unsent: Vec<u8>,
}

impl Received {
    pub(crate) fn sort(exported: Exported) -> Result<Received, NbdError> {
        if exported.kind != KIND {
            return Err(wrong(format!("a port of kind {:?}", exported.kind)));
        }
        let state: PortState = serde_json::from_str(&exported.state).map_err(wrong)?;
        let address: NbdAddress = state.address.parse()?;
        let count = state.connections.len();
        if count > MAX_CONNECTIONS || exported.descriptors.len() != 2 + count {
            return Err(wrong(format!("{} descriptors for {count} connections", exported.descriptors.len())));
        }
        let mut descriptors = exported.descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(|| wrong("a descriptor is missing"));
        let (listening, blob) = (next()?, next()?);
        let file = match (&address, state.file) {
            (NbdAddress::Unix(path), Some((device, inode))) => Some((path.clone(), device, inode)),
            _ => None,
        };
        let listener = Listener::adopt(listening, address, file)?;
        let total: u64 =
            state.connections.iter().map(|one| u64::from(one.ahead_bytes) + u64::from(one.unsent_bytes)).sum();
        let there = rustix::fs::fstat(&blob).map_err(wrong)?.st_size;
        if total > MAX_BYTES || u64::try_from(there).ok() != Some(total) {
            return Err(wrong(format!("{there} bytes in place of {total}")));
        }
        rustix::fs::seek(&blob, rustix::fs::SeekFrom::Start(0)).map_err(wrong)?;
        let mut blob = File::from(blob);
        let mut read = |bytes: u32| {
            let mut into = vec![0; bytes as usize];
            blob.read_exact(&mut into).map_err(wrong)?;
            Ok::<_, NbdError>(into)
        };
        let connections = state.connections.into_iter().map(|state| {
            let (ahead, unsent) = (read(state.ahead_bytes)?, read(state.unsent_bytes)?);
            Ok(Arrived { lane: state.lane, socket: next()?, state, ahead, unsent })
        });
        let connections = connections.collect::<Result<_, NbdError>>()?;
        Ok(Received { listener, connections })
    }
}

impl Arrived {
    /// The connection, with a handle of its own if it is past its handshake. Nothing is read or sent.
    pub(crate) fn into_connection<S: Service>(
        self,
        service: &S,
        spec: &HandleSpec,
        options: &NbdOptions,
        now: Instant,
    ) -> Result<Connection<S>, NbdError> {
        let Arrived { socket, state, ahead, unsent, .. } = self;
        if state.peer.len() > MAX_PEER_BYTES {
            return Err(wrong("the name of a peer is too long"));
        }
        // The flag is the open file's, so it is set already; but nothing here may ever block.
        let flags = rustix::fs::fcntl_getfl(&socket).map_err(wrong)?;
        if !flags.contains(rustix::fs::OFlags::NONBLOCK) || rustix::net::sockopt::socket_type(socket.as_fd()).is_err() {
            return Err(wrong("what should be a client's socket is none"));
        }
        let phase = match state.phase {
            PhaseState::Handshake(handshake) => {
                let machine = Handshake::adopt(handshake).ok_or_else(|| wrong("no such handshake"))?;
                Phase::Handshake { machine, deadline: now + options.handshake_timeout }
            }
            PhaseState::Session(session) => {
                let spec = HandleSpec { peer: state.peer.clone(), ..spec.clone() };
                let disk = service.open(spec).map_err(wrong)?;
                let mut adopted = Session::new(disk, session.structured, options.limits(), now);
                adopted.adopt(session, now).map_err(wrong)?;
                Phase::Session(Box::new(adopted))
            }
        };
        let wire = Wire::adopt(socket, ahead, state.hung_up);
        Ok(Connection {
            wire,
            peer: state.peer,
            phase,
            greeting: unsent,
            queued: false,
            active: false,
            starving: false,
        })
    }
}
