//! How requests come into a lane: admitted, checked, entered in the ledger and written down for the driver.

use std::sync::Arc;

use cofferdam_device::words::{self, MAX_BATCH};
use cofferdam_device::{DmaArena, Expected, Payload};
use cofferdam_gate::{HandleRefused, HandleState};

use super::{Inside, note_owner};
use crate::handle::HandleShared;
use crate::lane::Stop;
use crate::lane::revive::Health;
use crate::request::{Completion, IoError, IoOp, IoRequest};

impl Inside {
    /// Admits up to 64 requests from the front of `requests` and enters them in the ledger; what is invalid is answered at once. Returns how many were taken, and why no more.
    pub(in crate::lane) fn enter(
        &mut self,
        arena: &DmaArena,
        owner: &Arc<HandleShared>,
        requests: &mut [IoRequest],
    ) -> (usize, Option<Stop>) {
        self.scratch.requests.clear();
        self.scratch.expected.clear();
        if let Some(stop) = self.why_not() {
            return (0, Some(stop));
        }
        if self.health == Health::Refuses {
            return self.turn_away(owner, requests);
        }
        let wanted = requests.len().min(MAX_BATCH);
        let count = wanted.min(self.ledger.room());
        if count == 0 || owner.is_choked() {
            return (0, Some(Stop::Full));
        }
        let guards = match owner.admit(count as u32) {
            Ok(guards) => guards,
            Err(refused) => return (0, Some(Stop::Refused(refused))),
        };
        let since = self.ledger.stamp();
        owner.count_in(count as u32);
        let holder = self.ledger.hold(owner, guards);
        for request in &mut requests[..count] {
            let IoRequest { op, offset, length, flags, .. } = *request;
            let buffer = request.buffer.as_ref();
            let foreign = buffer.is_some_and(|buffer| !arena.owns(buffer) && !owner.owns_window(buffer));
            let checked = self.offer.check(self.set, op, flags, offset, length, buffer);
            if let Err(error) = if foreign { Err(IoError::Invalid) } else { checked } {
                owner.deliver(Completion {
                    user: request.user,
                    result: Err(error),
                    bytes: 0,
                    buffer: request.buffer.take(),
                });
                self.ledger.over(holder);
                note_owner(&mut self.scratch.to_wake, owner);
                continue;
            }
            if op == IoOp::Flush
                && let Some(journal) = &self.journal
                && owner.take_flush_error()
            {
                journal.told();
                owner.deliver(Completion { user: request.user, result: Err(IoError::Io), bytes: 0, buffer: None });
                self.ledger.over(holder);
                note_owner(&mut self.scratch.to_wake, owner);
                continue;
            }
            let payload =
                buffer.zip(op.payload()).map(|(buffer, direction)| Payload { iova: buffer.iova(), length, direction });
            let token = self.ledger.insert(request, holder, owner.id, since);
            words::push_request(&mut self.scratch.requests, token, op, flags.0, offset, u64::from(length));
            if let Some(journal) = &mut self.journal {
                journal.note(token, op, &self.scratch.requests);
            }
            self.scratch.expected.push(Expected { token, payload });
        }
        // What was invalid has taken no room, and then there may be some left.
        (count, (count < wanted && self.ledger.room() == 0).then_some(Stop::Full))
    }

    /// The binding has failed: an error at once, for each.
    #[cold]
    fn turn_away(&mut self, owner: &Arc<HandleShared>, requests: &mut [IoRequest]) -> (usize, Option<Stop>) {
        if owner.state() == HandleState::Revoked {
            return (0, Some(Stop::Refused(HandleRefused::Revoked)));
        }
        if owner.is_choked() {
            return (0, Some(Stop::Full));
        }
        let count = requests.len().min(MAX_BATCH);
        for request in &mut requests[..count] {
            let (user, buffer) = (request.user, request.buffer.take());
            owner.deliver(Completion { user, result: Err(IoError::DeviceFault), bytes: 0, buffer });
        }
        note_owner(&mut self.scratch.to_wake, owner);
        (count, None)
    }
}
