//! From the socket into requests: what the connection is in the middle of receiving.

use std::io;
use std::time::Instant;

use crate::proto::{Errno, REQUEST_BYTES};
use crate::reads::Start;
use crate::reply::Head;
use crate::request::{Action, MAX_DRAIN_BYTES, RawRequest};
use crate::service::{Buffer, Disk, IoOp};
use crate::session::{BATCH_REQUESTS, Kind, Session, Slot};
use crate::wire::{BULK_BYTES, Got, READ_AHEAD_BYTES, Wire};

/// System calls that one connection makes for input before another has its turn.
const TURN_READS: usize = 32;

/// Longest write whose payload is read ahead together with other requests and copied. To copy 4 KiB costs a fraction of the system call that it saves, and
/// 16 KiB about as much; longer ones go from the socket into their lease.
const COPIED_BYTES: u32 = 16 * 1024;

/// What comes next on the stream.
#[derive(Debug)]
pub(crate) enum Rx {
    /// A request.
    Header,
    /// A read that waits for leases; nothing is read behind it.
    Read { raw: RawRequest, df: bool },
    /// A write's payload.
    Payload(Incoming),
    /// Payload of a request that is refused.
    Discard { left_bytes: u32, then: Then },
    /// Nothing: the client said goodbye (`NBD_CMD_DISC`), or only closed its side between two requests.
    Closed { goodbye: bool },
}

impl Rx {
    /// Whether a lease waits here for the client.
    pub(crate) fn holds_lease(&self) -> bool {
        matches!(self, Rx::Payload(Incoming { lease: Some(_), .. }))
    }
}

/// A write that is being received, piece by piece.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) slot: u32,
    /// From the start of this piece on.
    pub(crate) left_bytes: u32,
    /// The present piece: where it goes, its length, and how much of it has come.
    pub(crate) lease: Option<(Buffer, u32, u32)>,
}

/// What to do when a discarded payload has passed. Not before: a client may take an early answer for one to another
/// request.
#[derive(Debug)]
pub(crate) enum Then {
    Answer(Head),
    Settle(u32),
}

/// What became of an attempt to get on with a payload.
enum Moved {
    /// The socket was asked.
    Received(Got),
    /// A lease was taken, or what was read ahead went into it; or the payload is given up.
    Within,
}

/// Why the intake stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// The socket is empty, or will say nothing more.
    Drained,
    /// A bound of the connection is reached.
    Full,
    /// The arena is.
    Starved,
    /// Others have their turn; call again.
    Turn,
}

/// Why a connection ends by the peer's doing.
#[derive(Debug)]
pub(crate) enum Ended {
    /// It broke the protocol.
    Garbage(&'static str),
    /// Its socket did.
    Socket(io::Error),
}

impl<D: Disk> Session<D> {
    /// Reads and starts requests until one of the [`Pause`]s.
    ///
    /// # Errors
    /// [`Ended`]: close the connection.
    pub(crate) fn intake(
        &mut self,
        now: Instant,
        wire: &mut Wire,
        may_lease: bool,
        scratch: &mut [u8],
    ) -> Result<Pause, Ended> {
        let mut reads = TURN_READS;
        loop {
            if self.queue.len() >= BATCH_REQUESTS {
                self.submit(now);
            }
            match self.resume_alone(now, may_lease) {
                Start::Done => {}
                Start::Later => return Ok(Pause::Full),
                Start::Starved => return Ok(Pause::Starved),
            }
            let got = match &mut self.rx {
                Rx::Closed { .. } => return Ok(Pause::Drained),
                Rx::Read { raw, df } => {
                    let (raw, df) = (*raw, *df);
                    match self.start_read(now, &raw, df, may_lease) {
                        Start::Done => self.rx = Rx::Header,
                        Start::Later => return Ok(Pause::Full),
                        Start::Starved => return Ok(Pause::Starved),
                    }
                    continue;
                }
                Rx::Header => {
                    if !self.has_room() {
                        return Ok(Pause::Full);
                    }
                    if let Some((header, _)) = crate::request::take::<REQUEST_BYTES>(wire.ahead()) {
                        let raw = RawRequest::parse(&header).ok_or(Ended::Garbage("not a request"))?;
                        wire.take(REQUEST_BYTES);
                        self.begin(now, &raw)?;
                        continue;
                    }
                    // After a write another like it is likely: many small ones are read at once, and of a long one's payload nothing is read ahead, for that is a
                    // copy more.
                    let limit = match self.last_write_bytes {
                        0 => READ_AHEAD_BYTES,
                        1..=COPIED_BYTES => BULK_BYTES,
                        _ => REQUEST_BYTES,
                    };
                    if wire.readable { wire.fill(limit).map_err(Ended::Socket)? } else { Got::Nothing }
                }
                Rx::Payload(_) => match self.payload(now, wire, may_lease)? {
                    Ok(Moved::Received(got)) => got,
                    // No system call was made, so none is counted.
                    Ok(Moved::Within) => continue,
                    Err(pause) => return Ok(pause),
                },
                Rx::Discard { left_bytes, .. } => {
                    let most = scratch.len().min(*left_bytes as usize);
                    let ahead = wire.ahead().len().min(most);
                    let got = if ahead > 0 {
                        wire.take(ahead);
                        Got::Bytes(ahead)
                    } else if wire.readable {
                        wire.drain(&mut scratch[..most]).map_err(Ended::Socket)?
                    } else {
                        Got::Nothing
                    };
                    if let Got::Bytes(bytes) = got {
                        *left_bytes -= bytes as u32;
                        self.discarded(now);
                    }
                    got
                }
            };
            match got {
                Got::Bytes(_) => {}
                Got::Nothing => return Ok(if wire.readable { Pause::Turn } else { Pause::Drained }),
                Got::End if matches!(self.rx, Rx::Header) && wire.ahead().is_empty() => {
                    self.rx = Rx::Closed { goodbye: false };
                    return Ok(Pause::Drained);
                }
                Got::End => return Err(Ended::Garbage("the stream ended in the middle of a request")),
            }
            reads -= 1;
            if reads == 0 {
                return Ok(Pause::Turn);
            }
        }
    }

    /// Starts a request, or refuses it.
    fn begin(&mut self, now: Instant, raw: &RawRequest) -> Result<(), Ended> {
        self.last_write_bytes = raw.payload_bytes();
        let judged = match self.rules.judge(raw) {
            Ok(Action::Disconnect) => Ok(Action::Disconnect),
            _ if self.refused_at.is_some() => Err(Errno::Shutdown),
            judged => judged,
        };
        let read = raw.kind == crate::proto::cmd::READ;
        let (kind, fua) = match judged {
            Err(error) => return self.turn_down(now, raw, error, read),
            Ok(Action::Disconnect) => {
                self.rx = Rx::Closed { goodbye: true };
                return Ok(());
            }
            Ok(Action::Nothing) => {
                self.answer(now, raw.cookie, None, read);
                return Ok(());
            }
            Ok(Action::Read { df }) => {
                self.rx = Rx::Read { raw: *raw, df };
                return Ok(());
            }
            Ok(Action::Write { fua }) => (Kind::Write, fua),
            Ok(Action::Flush) => (Kind::Flush, false),
            Ok(Action::Trim { fua }) => (Kind::Trim, fua),
            Ok(Action::WriteZeroes { fua, may_unmap }) => (Kind::WriteZeroes { may_unmap }, fua),
        };
        let mut slot = Slot::new(raw.cookie, kind, raw.offset, raw.length);
        slot.fua = fua;
        slot.receiving = kind == Kind::Write;
        let index = self.insert(slot);
        match kind {
            Kind::Write => {
                self.payload_moved = now;
                self.rx = Rx::Payload(Incoming { slot: index, left_bytes: raw.length, lease: None });
            }
            Kind::Flush => self.issue(index, 0, IoOp::Flush, (0, 0), None),
            _ => self.issue_range(index),
        }
        Ok(())
    }

    fn turn_down(&mut self, now: Instant, raw: &RawRequest, error: Errno, read: bool) -> Result<(), Ended> {
        let left_bytes = raw.payload_bytes();
        if left_bytes > MAX_DRAIN_BYTES {
            return Err(Ended::Garbage("a write far longer than the advertised maximum"));
        }
        if left_bytes > 0 {
            let answer = Head::answer(raw.cookie, Some(error), self.structured, false);
            self.rx = Rx::Discard { left_bytes, then: Then::Answer(answer) };
        } else {
            self.answer(now, raw.cookie, Some(error), read);
        }
        Ok(())
    }

    /// Receives payload: what was read ahead is copied, the rest goes from the socket into the lease, or is read ahead with what follows it if it is short. A
    /// lease is taken only when there are bytes for it, so that a client that sends a header and stops holds nothing.
    fn payload(&mut self, now: Instant, wire: &mut Wire, may_lease: bool) -> Result<Result<Moved, Pause>, Ended> {
        let Rx::Payload(incoming) = &mut self.rx else { return Ok(Ok(Moved::Within)) };
        if incoming.lease.is_none() {
            let (slot, bytes) = (incoming.slot, incoming.left_bytes.min(self.piece_bytes));
            if !wire.readable && wire.ahead().is_empty() {
                return Ok(Err(Pause::Drained));
            }
            if self.held_bytes > 0 && self.held_bytes + u64::from(bytes) > self.limits.bytes {
                return Ok(Err(Pause::Full));
            }
            if !may_lease {
                return Ok(Err(Pause::Starved));
            }
            match self.lease(bytes) {
                Ok(buffer) => {
                    self.payload_moved = now;
                    if let Rx::Payload(incoming) = &mut self.rx {
                        incoming.lease = Some((buffer, bytes, 0));
                    }
                }
                Err(None) if bytes > self.piece_bytes => return Ok(Err(Pause::Turn)),
                Err(None) => return Ok(Err(Pause::Starved)),
                Err(Some(error)) => self.abandon_payload(slot, error),
            }
            return Ok(Ok(Moved::Within));
        }
        let Incoming { left_bytes, lease: Some((buffer, piece, filled)), .. } = incoming else {
            return Ok(Ok(Moved::Within));
        };
        let wanted = (*piece - *filled) as usize;
        let ahead = wire.ahead().len().min(wanted);
        if ahead == 0 && wire.readable && *left_bytes <= COPIED_BYTES {
            return Ok(Ok(Moved::Received(wire.fill(BULK_BYTES).map_err(Ended::Socket)?)));
        }
        let got = if ahead > 0 {
            buffer
                .write_at(*filled, &wire.ahead()[..ahead])
                .map_err(|_| Ended::Garbage("a payload outgrew its lease"))?;
            wire.take(ahead);
            Got::Bytes(ahead)
        } else if wire.readable {
            wire.fill_lease(buffer, *filled..*piece, *left_bytes == *piece).map_err(Ended::Socket)?
        } else {
            Got::Nothing
        };
        if let Got::Bytes(bytes) = got {
            self.payload_moved = now;
            *filled += bytes as u32;
            if *filled == *piece {
                self.piece_received(now);
            }
        }
        Ok(Ok(if ahead > 0 { Moved::Within } else { Moved::Received(got) }))
    }

    /// Issues the piece that has come in full.
    fn piece_received(&mut self, now: Instant) {
        let Rx::Payload(incoming) = &mut self.rx else { return };
        let Some((buffer, piece, _)) = incoming.lease.take() else { return };
        incoming.left_bytes -= piece;
        let (index, last) = (incoming.slot, incoming.left_bytes == 0);
        if last {
            self.rx = Rx::Header;
        }
        let Some(slot) = self.slot(index) else { return };
        let from = slot.next;
        slot.next += u64::from(piece);
        slot.receiving = !last;
        if slot.error.is_some() {
            // An earlier piece failed: the rest is not written, only received.
            self.give_back(buffer);
            self.settle(now, index);
        } else {
            self.issue(index, 0, IoOp::Write, (from, piece), Some(buffer));
        }
    }

    /// Turns a payload that is being received into one that is thrown away, its request into a failed one.
    fn abandon_payload(&mut self, index: u32, error: Errno) {
        let Rx::Payload(incoming) = std::mem::replace(&mut self.rx, Rx::Header) else { return };
        let mut left_bytes = incoming.left_bytes;
        if let Some((buffer, _, filled)) = incoming.lease {
            left_bytes -= filled;
            self.give_back(buffer);
        }
        if let Some(slot) = self.slot(index) {
            slot.error.get_or_insert(error);
        }
        self.rx = Rx::Discard { left_bytes, then: Then::Settle(index) };
    }

    /// Gives up what is being received, because new requests are refused from now on.
    pub(crate) fn abandon_input(&mut self, now: Instant) {
        match &self.rx {
            Rx::Payload(incoming) => {
                let index = incoming.slot;
                self.abandon_payload(index, Errno::Shutdown);
            }
            Rx::Read { raw, .. } => {
                let cookie = raw.cookie;
                self.rx = Rx::Header;
                self.answer(now, cookie, Some(Errno::Shutdown), true);
            }
            Rx::Header | Rx::Discard { .. } | Rx::Closed { .. } => {}
        }
    }

    /// After some bytes of a discarded payload.
    fn discarded(&mut self, now: Instant) {
        let Rx::Discard { left_bytes: 0, .. } = self.rx else { return };
        let Rx::Discard { then, .. } = std::mem::replace(&mut self.rx, Rx::Header) else { return };
        match then {
            Then::Answer(head) => self.outbox.push(now, head, None),
            Then::Settle(index) => {
                if let Some(slot) = self.slot(index) {
                    slot.receiving = false;
                }
                self.settle(now, index);
            }
        }
    }
}
