//! What was admitted to a lane and is not answered yet.
//!
//! A token is slot and generation, so an answer to a request that is over can never be taken for an answer to the one that has its slot now.

use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::{BlockOp, Buffer};
use cofferdam_gate::Guard;

use crate::handle::HandleShared;

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Given to the driver, or about to be.
    Given,
    /// Its chain waits for room on the ring.
    Parked,
    /// On the ring: the device may act on it.
    Published,
}

/// One admitted operation. Dropping an entry unanswered is a bug, except for what the ladder abandons on purpose.
pub(crate) struct Entry {
    pub(crate) owner: Arc<HandleShared>,
    pub(crate) user: u64,
    pub(crate) op: BlockOp,
    pub(crate) buffer: Option<Buffer>,
    /// Counts the operation in the gate until it is answered.
    pub(crate) guard: Guard,
    pub(crate) stage: Stage,
    pub(crate) since: Instant,
}

struct Slot {
    generation: u16,
    entry: Option<Entry>,
}

/// The operations of one lane; at most `limit`.
pub(crate) struct Ledger {
    slots: Vec<Slot>,
    free: Vec<u16>,
    limit: usize,
}

impl Ledger {
    /// A ledger of at most `limit` entries, 1 to 65,535.
    pub(crate) fn new(limit: usize) -> Ledger {
        let limit = limit.clamp(1, usize::from(u16::MAX));
        Ledger { slots: Vec::new(), free: Vec::new(), limit }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Enters an operation and names it. The caller has checked [`Ledger::is_full`].
    pub(crate) fn insert(&mut self, entry: Entry) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, entry: None });
            (self.slots.len() - 1) as u16
        });
        let slot = &mut self.slots[usize::from(index)];
        debug_assert!(slot.entry.is_none());
        slot.entry = Some(entry);
        u32::from(slot.generation) << 16 | u32::from(index)
    }

    fn slot(&mut self, token: u32) -> Option<&mut Slot> {
        let slot = self.slots.get_mut((token & 0xffff) as usize)?;
        (u32::from(slot.generation) == token >> 16).then_some(slot)
    }

    pub(crate) fn get_mut(&mut self, token: u32) -> Option<&mut Entry> {
        self.slot(token)?.entry.as_mut()
    }

    /// Takes an operation out, to answer it.
    pub(crate) fn remove(&mut self, token: u32) -> Option<Entry> {
        let slot = self.slot(token)?;
        let entry = slot.entry.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push((token & 0xffff) as u16);
        Some(entry)
    }

    /// Tokens of everything that is in, for the ladder.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        let named = |(index, slot): (usize, &Slot)| {
            slot.entry.as_ref().map(|_| u32::from(slot.generation) << 16 | index as u32)
        };
        self.slots.iter().enumerate().filter_map(named).collect()
    }

    /// The entry that has waited longest: token, age start, stage.
    pub(crate) fn oldest(&self) -> Option<(u32, Instant, Stage)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(index, slot)| {
                let entry = slot.entry.as_ref()?;
                Some((u32::from(slot.generation) << 16 | index as u32, entry.since, entry.stage))
            })
            .min_by_key(|(_, since, _)| *since)
    }
}
