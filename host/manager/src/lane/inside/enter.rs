//! How requests come into a lane: admitted, checked, entered in the ledger and written down for the driver.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cofferdam_device::words;
use cofferdam_device::{BlockOp, Direction, DmaArena, Expected, Payload};

use super::{Inside, note_owner};
use crate::block::{BlockError, BlockGeometry, BlockRequest, Completion, has_payload};
use crate::board::Stamp;
use crate::handle::HandleShared;
use crate::lane::Stop;
use crate::ledger::{Entry, Owner};

impl Inside {
    /// Admits up to 64 requests and enters them in the ledger; what is invalid is answered at once. Returns how many were taken, and why no more.
    pub(in crate::lane) fn enter<'a>(
        &mut self,
        geometry: &BlockGeometry,
        arena: &DmaArena,
        owner: &Arc<HandleShared>,
        requests: impl Iterator<Item = &'a mut BlockRequest>,
    ) -> (usize, Option<Stop>) {
        self.scratch.requests.clear();
        self.scratch.expected.clear();
        let since = self.ledger.stamp();
        let holder = self.ledger.hold(owner);
        let mut taken = 0;
        let stop = self.enter_each(geometry, arena, (owner, holder), since, requests, &mut taken);
        owner.requests.store(owner.requests.load(Ordering::Relaxed) + taken as u64, Ordering::Relaxed);
        self.ledger.release(holder);
        (taken, stop)
    }

    /// [`Inside::enter`] for a handle that the ledger holds.
    fn enter_each<'a>(
        &mut self,
        geometry: &BlockGeometry,
        arena: &DmaArena,
        (owner, holder): (&Arc<HandleShared>, Owner),
        since: Stamp,
        requests: impl Iterator<Item = &'a mut BlockRequest>,
        taken: &mut usize,
    ) -> Option<Stop> {
        for request in requests {
            if self.driver_fault || self.device_fault.is_some() || self.driver.is_none() {
                return Some(Stop::Gone);
            }
            if self.ledger.is_full() || owner.is_choked() {
                return Some(Stop::Full);
            }
            let guard = match owner.admit() {
                Ok(guard) => guard,
                Err(refused) => return Some(Stop::Refused(refused)),
            };
            *taken += 1;
            let buffer = request.buffer.take();
            let foreign = buffer.as_ref().is_some_and(|buffer| !arena.owns(buffer) && !owner.owns_window(buffer));
            let checked = geometry.check(request.op, request.offset, request.length, buffer.as_ref());
            if let Err(error) = if foreign { Err(BlockError::Invalid) } else { checked } {
                owner.deliver(Completion { user: request.user, result: Err(error), buffer });
                note_owner(&mut self.scratch.to_wake, owner);
                continue;
            }
            let payload = match (&buffer, request.op) {
                (Some(buffer), BlockOp::Write) => {
                    Some(Payload { iova: buffer.iova(), length: request.length, direction: Direction::Out })
                }
                (Some(buffer), op) if has_payload(op) => {
                    Some(Payload { iova: buffer.iova(), length: request.length, direction: Direction::In })
                }
                _ => None,
            };
            owner.count_in();
            let answer = Completion { user: request.user, result: Ok(()), buffer };
            let entry = Entry { answer, op: request.op, guard };
            let token = self.ledger.insert(entry, holder, owner.id, since);
            let flags = if request.flags.may_unmap { words::FLAG_UNMAP } else { 0 };
            words::push_request(
                &mut self.scratch.requests,
                token,
                request.op,
                flags,
                request.offset,
                u64::from(request.length),
            );
            self.scratch.expected.push(Expected { token, payload });
        }
        None
    }
}
