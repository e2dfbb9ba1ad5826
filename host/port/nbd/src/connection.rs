//! One client from accept to close: handshake, then session.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use crate::handshake::{Exports, Handshake, Verdict};
use crate::intake::{Ended, Pause, Rx};
use crate::options::LINGER;
use crate::service::transfer::{self, Piece};
use crate::service::{BlockGeometry, Disk, HandleSpec, Service};
use crate::session::{Limits, Session};
use crate::wire::{Got, READ_AHEAD_BYTES, Wire};

/// What a worker lends a connection for one step.
pub(crate) struct Turn<'a, S> {
    pub(crate) now: Instant,
    pub(crate) service: &'a S,
    /// Label, lane and notify of the handle to open.
    pub(crate) spec: &'a HandleSpec,
    pub(crate) limits: Limits,
    /// Whether nobody waits for leases ahead of this one.
    pub(crate) may_lease: bool,
    /// The port is on its way to another process: nothing is read, and what was read is brought to its end.
    pub(crate) parking: bool,
    /// Where unwanted payload goes.
    pub(crate) scratch: &'a mut [u8],
}

/// Where a step left a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It waits for its socket or its answers.
    Wait,
    /// It has more to do.
    Again,
    /// It waits for leases.
    Starved,
}

/// Why a connection is over.
#[derive(Debug)]
pub(crate) enum End {
    /// As it should.
    Done(&'static str),
    /// The client broke the protocol.
    Garbage(&'static str),
    /// The socket failed.
    Socket(io::Error),
}

impl From<Ended> for End {
    fn from(ended: Ended) -> End {
        match ended {
            Ended::Garbage(why) => End::Garbage(why),
            Ended::Socket(error) => End::Socket(error),
        }
    }
}

pub(crate) enum Phase<D> {
    Handshake { machine: Handshake, deadline: Instant },
    Session(Box<Session<D>>),
}

/// See the module.
pub(crate) struct Connection<S: Service> {
    pub(crate) wire: Wire,
    pub(crate) peer: String,
    pub(crate) phase: Phase<S::Disk>,
    /// The handshake's last output; the session's replies go behind it.
    pub(crate) greeting: Vec<u8>,
    /// In the worker's list of connections to run.
    pub(crate) queued: bool,
    /// In its list of connections with something in flight.
    pub(crate) active: bool,
    /// In its queue for leases.
    pub(crate) starving: bool,
}

impl<S: Service> Connection<S> {
    pub(crate) fn new(socket: OwnedFd, peer: String, deadline: Instant) -> Connection<S> {
        Connection {
            wire: Wire::new(socket),
            peer,
            phase: Phase::Handshake { machine: Handshake::new(), deadline },
            greeting: Vec::new(),
            queued: false,
            active: false,
            starving: false,
        }
    }

    pub(crate) fn session(&mut self) -> Option<&mut Session<S::Disk>> {
        match &mut self.phase {
            Phase::Session(session) => Some(session),
            Phase::Handshake { .. } => None,
        }
    }

    /// The handle's view of the device's interrupt, once there is a handle.
    pub(crate) fn disk(&self) -> Option<&S::Disk> {
        match &self.phase {
            Phase::Session(session) => Some(&session.disk),
            Phase::Handshake { .. } => None,
        }
    }

    /// Ends it. What is left is its handle and how many answers are to come, if any are.
    pub(crate) fn into_orphan(self) -> Option<(S::Disk, usize)> {
        match self.phase {
            Phase::Session(session) if session.in_flight > 0 => Some((session.disk, session.in_flight)),
            _ => None,
        }
    }

    /// Nothing of it is under way and nothing is unsent. A refused payload that is still coming is under way: its answer
    /// follows it.
    pub(crate) fn is_quiet(&self) -> bool {
        match &self.phase {
            Phase::Session(session) => {
                session.live == 0
                    && session.outbox.is_empty()
                    && self.greeting.is_empty()
                    && !matches!(session.rx, Rx::Discard { .. })
            }
            Phase::Handshake { .. } => true,
        }
    }

    /// When to look at it again if nothing happens, and what that means.
    pub(crate) fn deadline(&self) -> Option<(Instant, End)> {
        match &self.phase {
            Phase::Handshake { deadline, .. } => Some((*deadline, End::Garbage("the handshake took too long"))),
            Phase::Session(session) => {
                let refused = session.refused_at?;
                let unread = !session.outbox.is_empty();
                // What the device still has is waited for: its answers are the client's due. All other time is the
                // client's, and nothing that it sends, leaves unread or reads drop by drop makes that longer.
                let since = match (session.in_flight, unread) {
                    (0, _) => session.idle_at,
                    (_, true) => session.outbox.since,
                    (_, false) => return None,
                };
                let why = if unread { "revoked; the client did not read its answers" } else { "revoked" };
                Some((refused.max(since) + LINGER, End::Done(why)))
            }
        }
    }

    /// Goes as far as socket, bounds and arena let it.
    ///
    /// # Errors
    /// [`End`]: drop it.
    pub(crate) fn step(&mut self, turn: &mut Turn<'_, S>) -> Result<Next, End> {
        if turn.parking {
            return self.bring_to_its_end(turn.now);
        }
        if let Phase::Handshake { .. } = self.phase {
            match self.handshake(turn)? {
                Next::Again => {}
                other => return Ok(other),
            }
        }
        if !self.send_greeting()? {
            return Ok(Next::Wait);
        }
        let Phase::Session(session) = &mut self.phase else { return Ok(Next::Wait) };
        let mut rounds = 0;
        loop {
            let pause = session.intake(turn.now, &mut self.wire, turn.may_lease, turn.scratch);
            // Also what came in whole before the stream ended in the middle of the next.
            session.submit(turn.now);
            let pause = pause?;
            let before = session.outbox.len();
            send(&mut self.wire, session, turn.now)?;
            rounds += 1;
            match pause {
                // What was sent may have made room.
                Pause::Full if session.outbox.len() < before && rounds < 4 => {}
                Pause::Full if session.outbox.len() < before => return Ok(Next::Again),
                Pause::Full | Pause::Drained => return Ok(Next::Wait),
                Pause::Starved => return Ok(Next::Starved),
                Pause::Turn => return Ok(Next::Again),
            }
        }
    }

    /// As [`Connection::step`], without a look at what the client sends.
    fn bring_to_its_end(&mut self, now: Instant) -> Result<Next, End> {
        if self.send_greeting()?
            && let Phase::Session(session) = &mut self.phase
        {
            session.submit(now);
            send(&mut self.wire, session, now)?;
        }
        Ok(Next::Wait)
    }

    /// `Next::Again` when the session has begun.
    fn handshake(&mut self, turn: &mut Turn<'_, S>) -> Result<Next, End> {
        let Phase::Handshake { machine, .. } = &mut self.phase else { return Ok(Next::Again) };
        let mut door = Door {
            service: turn.service,
            spec: turn.spec,
            peer: &self.peer,
            description: turn.service.description(),
            opened: None,
        };
        loop {
            let (taken, verdict) = machine.feed(self.wire.ahead(), &mut door);
            self.wire.take(taken);
            self.greeting.append(&mut machine.output);
            match verdict {
                Verdict::More => {}
                Verdict::Close(why) => {
                    // The last words go out if the socket takes them at once, and nobody waits for it.
                    let _ = self.send_greeting();
                    return Err(if why == "aborted by the client" { End::Done(why) } else { End::Garbage(why) });
                }
                Verdict::Enter { structured } => {
                    let disk = door.opened.take().ok_or(End::Done("the export cannot be opened"))?;
                    self.phase = Phase::Session(Box::new(Session::new(disk, structured, turn.limits, turn.now)));
                    return Ok(Next::Again);
                }
            }
            // One option at a time: nothing is read while an answer is unsent, so the answers stay few.
            if !send_all(&self.wire, &mut self.greeting)? {
                self.wire.writable = false;
                return Ok(Next::Wait);
            }
            match if self.wire.readable { self.wire.fill(READ_AHEAD_BYTES).map_err(End::Socket)? } else { Got::Nothing }
            {
                Got::Bytes(_) => {}
                Got::Nothing => return Ok(if self.wire.readable { Next::Again } else { Next::Wait }),
                Got::End => return Err(End::Done("closed by the client during the handshake")),
            }
        }
    }

    /// Whether all of it is gone.
    fn send_greeting(&mut self) -> Result<bool, End> {
        let gone = send_all(&self.wire, &mut self.greeting)?;
        if gone && self.greeting.capacity() > 0 && matches!(self.phase, Phase::Session(_)) {
            self.greeting = Vec::new();
        }
        self.wire.writable &= gone;
        Ok(gone)
    }
}

/// Sends what was answered, as far as the socket takes it.
///
/// # Errors
/// [`End`]: nothing more is to be said to this client.
fn send<D: Disk>(wire: &mut Wire, session: &mut Session<D>, now: Instant) -> Result<(), End> {
    if wire.writable && !session.outbox.is_empty() && !wire.gone {
        match session.outbox.flush(now, wire.socket()) {
            Ok(flushed) => {
                wire.writable = !flushed.blocked;
                session.sent(flushed.released_bytes);
            }
            // What the client asked for before it went is done all the same ("NBD_CMD_DISC"), only not
            // answered.
            Err(_) => wire.gone = true,
        }
    }
    if wire.gone {
        let released_bytes = session.outbox.clear();
        session.sent(released_bytes);
    }
    if let Some(why) = session.broken {
        return Err(End::Done(why));
    }
    match session.rx {
        Rx::Closed { goodbye: false } if wire.gone => Err(End::Done("the client is gone")),
        Rx::Closed { .. } if session.live == 0 && session.outbox.is_empty() => Err(End::Done("closed by the client")),
        _ => Ok(()),
    }
}

fn send_all(wire: &Wire, bytes: &mut Vec<u8>) -> Result<bool, End> {
    while !bytes.is_empty() {
        if !wire.writable {
            return Ok(false);
        }
        match transfer::send(wire.socket().as_fd(), &[Piece::Bytes(bytes)], 0) {
            Ok(sent) => drop(bytes.drain(..sent)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(End::Socket(error)),
        }
    }
    Ok(true)
}

/// The export as the handshake sees it.
struct Door<'a, S: Service> {
    service: &'a S,
    spec: &'a HandleSpec,
    peer: &'a str,
    description: String,
    opened: Option<S::Disk>,
}

impl<S: Service> Exports for Door<'_, S> {
    fn name(&self) -> &str {
        self.service.name()
    }

    fn description(&self) -> &str {
        &self.description
    }

    fn geometry(&self) -> Option<BlockGeometry> {
        self.service.geometry()
    }

    fn open(&mut self) -> Result<(), String> {
        let spec = HandleSpec { peer: self.peer.to_owned(), ..self.spec.clone() };
        self.opened = Some(self.service.open(spec).map_err(|error| error.to_string())?);
        Ok(())
    }
}
