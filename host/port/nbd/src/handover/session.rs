//! Where in a request a session is.
//!
//! Nothing of it is with the device, so there are four such places: a read that has no leases yet, a payload that is being received, one that is being thrown away, and a long
//! read between two of its segments.

use std::time::Instant;

use cofferdam_manager::RegionError;
use serde::{Deserialize, Serialize};

use crate::intake::{Incoming, Rx, Then};
use crate::proto::Errno;
use crate::reply::Head;
use crate::request::{Action, MAX_DRAIN_BYTES, RawRequest};
use crate::service::Disk;
use crate::session::{Kind, Session, Slot};

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SessionState {
    pub(crate) structured: bool,
    last_write_bytes: u32,
    next: Next,
    /// The long read.
    alone: Option<SlotState>,
}

/// What comes next on the stream.
#[derive(Debug, Serialize, Deserialize)]
enum Next {
    Header,
    /// Flags, kind, cookie, offset and length of a read that was judged, and whether it is not to be fragmented.
    Read {
        raw: (u16, u16, u64, u64, u32),
        df: bool,
    },
    Payload {
        slot: SlotState,
        left_bytes: u32,
    },
    Discard {
        left_bytes: u32,
        then: After,
    },
    Closed {
        goodbye: bool,
    },
}

#[derive(Debug, Serialize, Deserialize)]
enum After {
    Answer(Vec<u8>),
    Settle(SlotState),
}

/// A request that is not answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SlotState {
    cookie: u64,
    offset: u64,
    next: u64,
    end: u64,
    error: Option<u32>,
    fua: bool,
    headed: bool,
}

impl SlotState {
    fn of(slot: &Slot) -> SlotState {
        let Slot { cookie, offset, next, end, fua, headed, .. } = *slot;
        SlotState { cookie, offset, next, end, error: slot.error.map(|error| error as u32), fua, headed }
    }

    /// Checked against what the export has.
    fn slot<D: Disk>(&self, kind: Kind, session: &Session<D>) -> Result<Slot, &'static str> {
        let SlotState { cookie, offset, next, end, error, fua, headed } = *self;
        let block = u64::from(session.rules.block_bytes);
        let inside = offset <= next && next <= end && end <= session.disk.geometry().capacity_bytes;
        let aligned = [offset, next, end].iter().all(|at| at.is_multiple_of(block));
        let length = end.checked_sub(offset).and_then(|length| u32::try_from(length).ok());
        let (true, true, Some(length)) = (inside, aligned, length) else {
            return Err("a request is not inside the export");
        };
        let error = match error.map(Errno::of) {
            None => None,
            Some(Some(error)) => Some(error),
            Some(None) => return Err("no such error"),
        };
        Ok(Slot { next, error, fua, headed, ..Slot::new(cookie, kind, offset, length) })
    }
}

impl<D: Disk> Session<D> {
    /// Whether nothing of it is with the device or on its way there, and it is not about to be ended.
    pub(crate) fn is_still(&self) -> bool {
        let with_device = self.in_flight > 0 || !self.queue.is_empty();
        let between_segments = self.alone.is_none() || self.resume;
        !with_device && between_segments && self.refused_at.is_none() && self.broken.is_none()
    }

    /// Where it is. What has come of a payload goes to `received`: it is to be in front of what was read ahead.
    pub(crate) fn export(&self, received: &mut Vec<u8>) -> Result<SessionState, RegionError> {
        let slot = |index: u32| self.peek(index).map(SlotState::of);
        let next = match &self.rx {
            Rx::Header => Next::Header,
            Rx::Read { raw, df } => {
                Next::Read { raw: (raw.flags, raw.kind, raw.cookie, raw.offset, raw.length), df: *df }
            }
            Rx::Payload(Incoming { slot: index, left_bytes, lease }) => {
                if let Some((buffer, _, filled)) = lease {
                    received.resize(*filled as usize, 0);
                    buffer.read_at(0, received)?;
                }
                match slot(*index) {
                    Some(slot) => Next::Payload { slot, left_bytes: *left_bytes },
                    None => Next::Header,
                }
            }
            Rx::Discard { left_bytes, then: Then::Answer(head) } => {
                Next::Discard { left_bytes: *left_bytes, then: After::Answer(head.as_bytes().to_vec()) }
            }
            Rx::Discard { left_bytes, then: Then::Settle(index) } => match slot(*index) {
                Some(slot) => Next::Discard { left_bytes: *left_bytes, then: After::Settle(slot) },
                None => Next::Header,
            },
            Rx::Closed { goodbye } => Next::Closed { goodbye: *goodbye },
        };
        let alone = self.alone.and_then(slot);
        Ok(SessionState { structured: self.structured, last_write_bytes: self.last_write_bytes, next, alone })
    }

    /// Goes to where another process was, in a session that has just begun.
    pub(crate) fn adopt(&mut self, state: SessionState, now: Instant) -> Result<(), &'static str> {
        self.last_write_bytes = state.last_write_bytes;
        if let Some(alone) = state.alone {
            let slot = alone.slot(Kind::Read, self)?;
            if slot.offset != slot.next || slot.next == slot.end {
                return Err("a long read is not between two segments");
            }
            self.alone = Some(self.insert(slot));
            self.resume = true;
        }
        let bounded = |left_bytes: u32| left_bytes > 0 && left_bytes <= MAX_DRAIN_BYTES;
        self.rx = match state.next {
            Next::Header => Rx::Header,
            Next::Read { raw: (flags, kind, cookie, offset, length), df } => {
                let raw = RawRequest { flags, kind, cookie, offset, length };
                match self.rules.judge(&raw) {
                    Ok(Action::Read { .. }) => Rx::Read { raw, df },
                    _ => return Err("a read that the export does not have"),
                }
            }
            Next::Payload { slot, left_bytes } => {
                let slot = slot.slot(Kind::Write, self)?;
                if !bounded(left_bytes) || slot.next + u64::from(left_bytes) != slot.end {
                    return Err("a payload of another length than its request");
                }
                let slot = self.insert(Slot { receiving: true, ..slot });
                self.payload_moved = now;
                Rx::Payload(Incoming { slot, left_bytes, lease: None })
            }
            Next::Discard { left_bytes, then } if bounded(left_bytes) => {
                let then = match then {
                    After::Answer(bytes) => Then::Answer(Head::of(&bytes).ok_or("no head of an answer")?),
                    After::Settle(slot) => {
                        let slot = slot.slot(Kind::Write, self)?;
                        Then::Settle(self.insert(Slot { receiving: true, ..slot }))
                    }
                };
                Rx::Discard { left_bytes, then }
            }
            Next::Discard { .. } => return Err("nothing to be thrown away"),
            Next::Closed { goodbye } => Rx::Closed { goodbye },
        };
        Ok(())
    }
}
