//! What was admitted to a lane and is not answered yet.
//!
//! A token is slot and generation, so an answer to a request that is over can never be taken for an answer to the one that has its slot now.
//!
//! The ledger is the lane's own, under its lease. What everybody may know of it stands on its [`Board`].

use std::sync::Arc;

use cofferdam_device::{BlockOp, Buffer};
use cofferdam_gate::Guard;

use crate::board::{Board, Stamp};
use crate::handle::HandleShared;

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Stage {
    /// Given to the driver, or about to be.
    Given = 0,
    /// Its chain waits for room on the ring.
    Parked = 1,
    /// On the ring: the device may act on it.
    Published = 2,
}

impl Stage {
    /// By number.
    pub(crate) const ALL: [Stage; 3] = [Stage::Given, Stage::Parked, Stage::Published];

    /// In one word, as in JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Stage::Given => "given",
            Stage::Parked => "parked",
            Stage::Published => "published",
        }
    }
}

/// One admitted operation. Dropping an entry unanswered is a bug, except for what the ladder abandons on purpose.
pub(crate) struct Entry {
    pub(crate) owner: Arc<HandleShared>,
    pub(crate) user: u64,
    pub(crate) op: BlockOp,
    pub(crate) buffer: Option<Buffer>,
    /// Counts the operation in the gate until it is answered.
    pub(crate) guard: Guard,
}

struct Slot {
    /// Requests that the slot has had; the low 16 bits are the generation in its token.
    lap: u64,
    entry: Option<(Entry, Stage)>,
}

impl Slot {
    fn token(&self, index: usize) -> u32 {
        u32::from(self.lap as u16) << 16 | index as u32
    }
}

/// The operations of one lane; at most `limit`.
pub(crate) struct Ledger {
    slots: Vec<Slot>,
    free: Vec<u16>,
    limit: usize,
    board: Arc<Board>,
}

impl Ledger {
    /// A ledger of at most `limit` entries, 1 to 65,535.
    pub(crate) fn new(limit: usize) -> Ledger {
        let limit = limit.clamp(1, usize::from(u16::MAX));
        Ledger { slots: Vec::new(), free: Vec::new(), limit, board: Arc::new(Board::new(limit)) }
    }

    /// What everybody may know, without the lease.
    pub(crate) fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Now, for [`Ledger::insert`]; once for a batch.
    pub(crate) fn stamp(&self) -> Stamp {
        self.board.stamp()
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Enters an operation that came in at `since`, and names it. The caller has checked [`Ledger::is_full`].
    pub(crate) fn insert(&mut self, entry: Entry, since: Stamp) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { lap: 0, entry: None });
            (self.slots.len() - 1) as u16
        });
        let slot = &mut self.slots[usize::from(index)];
        debug_assert!(slot.entry.is_none());
        self.board.put(index, slot.lap, entry.op, since, entry.owner.id);
        slot.entry = Some((entry, Stage::Given));
        slot.token(usize::from(index))
    }

    fn slot(&mut self, token: u32) -> Option<&mut Slot> {
        let slot = self.slots.get_mut((token & 0xffff) as usize)?;
        (u32::from(slot.lap as u16) == token >> 16).then_some(slot)
    }

    fn get(&self, token: u32) -> Option<&(Entry, Stage)> {
        let slot = self.slots.get((token & 0xffff) as usize)?;
        slot.entry.as_ref().filter(|_| u32::from(slot.lap as u16) == token >> 16)
    }

    /// What an operation asks for.
    pub(crate) fn op(&self, token: u32) -> Option<BlockOp> {
        self.get(token).map(|(entry, _)| entry.op)
    }

    /// How far an operation has come.
    pub(crate) fn stage(&self, token: u32) -> Option<Stage> {
        self.get(token).map(|(_, stage)| *stage)
    }

    /// It has come further.
    pub(crate) fn set_stage(&mut self, token: u32, stage: Stage) {
        let Some(slot) = self.slot(token) else { return };
        let Some((entry, now)) = &mut slot.entry else { return };
        *now = stage;
        let (lap, op) = (slot.lap, entry.op);
        self.board.set_stage(token as u16, lap, op, stage);
    }

    /// Takes an operation out, to answer it.
    pub(crate) fn remove(&mut self, token: u32) -> Option<Entry> {
        let slot = self.slot(token)?;
        let (entry, _) = slot.entry.take()?;
        slot.lap += 1;
        self.board.take(token as u16);
        self.free.push(token as u16);
        Some(entry)
    }

    /// Tokens of everything that is in, for the ladder.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, slot)| slot.entry.is_some()).map(|(index, slot)| slot.token(index)).collect()
    }
}
