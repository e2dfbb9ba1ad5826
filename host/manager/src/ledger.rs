//! What was admitted to a lane and is not answered yet.
//!
//! A token is slot and generation, so an answer to a request that is over can never be taken for an answer to the one that has its slot now.
//!
//! The ledger is the lane's own, under its lease. What everybody may know of it stands on its [`Board`].

use std::sync::Arc;

use cofferdam_device::BlockOp;
use cofferdam_gate::Guard;

use crate::block::Completion;
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
    /// What the client will get, but for its result. Made here at once: putting it together from parts at the end was a third of answering.
    pub(crate) answer: Completion,
    pub(crate) op: BlockOp,
    /// Counts the operation in the gate until it is answered.
    pub(crate) guard: Guard,
}

/// The handle of an entry, by its place in the ledger's list: good until the entry is removed and [`Ledger::release`] was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner(u16);

/// A handle that has entries. It is held once for all of them: a counted reference each was two locked operations per request.
struct Holder {
    handle: Arc<HandleShared>,
    /// Its entries, and one while a batch of it is being entered.
    entries: u32,
}

struct Slot {
    /// Requests that the slot has had; the low 16 bits are the generation in its token.
    lap: u64,
    stage: Stage,
    owner: Owner,
    entry: Option<Entry>,
}

impl Slot {
    #[inline]
    fn token(&self, index: usize) -> u32 {
        u32::from(self.lap as u16) << 16 | index as u32
    }
}

/// The operations of one lane; at most `limit`.
pub(crate) struct Ledger {
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// As many as handles had entries at the same time, at the most.
    holders: Vec<Option<Holder>>,
    limit: usize,
    board: Arc<Board>,
}

impl Ledger {
    /// A ledger of at most `limit` entries, 1 to 65,535.
    pub(crate) fn new(limit: usize) -> Ledger {
        let limit = limit.clamp(1, usize::from(u16::MAX));
        let board = Arc::new(Board::new(limit));
        Ledger { slots: Vec::new(), free: Vec::new(), holders: Vec::new(), limit, board }
    }

    /// What everybody may know, without the lease.
    pub(crate) fn board(&self) -> &Arc<Board> {
        &self.board
    }

    /// Now, for [`Ledger::insert`]; once for a batch.
    pub(crate) fn stamp(&self) -> Stamp {
        self.board.stamp()
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Takes hold of a handle, for a batch of [`Ledger::insert`]; [`Ledger::release`] ends it.
    pub(crate) fn hold(&mut self, handle: &Arc<HandleShared>) -> Owner {
        let mut free = self.holders.len();
        for (index, holder) in self.holders.iter_mut().enumerate() {
            match holder {
                Some(holder) if Arc::ptr_eq(&holder.handle, handle) => {
                    holder.entries += 1;
                    return Owner(index as u16);
                }
                Some(_) => {}
                None => free = index,
            }
        }
        let holder = Some(Holder { handle: Arc::clone(handle), entries: 1 });
        match self.holders.get_mut(free) {
            Some(place) => *place = holder,
            None => self.holders.push(holder),
        }
        // Each holder but this one has an entry, and of those there are at most 65,535.
        Owner(free as u16)
    }

    /// The handle of an entry.
    #[inline]
    pub(crate) fn handle(&self, owner: Owner) -> Option<&Arc<HandleShared>> {
        self.holders.get(usize::from(owner.0))?.as_ref().map(|holder| &holder.handle)
    }

    /// An entry of it was removed and dealt with, or its batch is entered. The handle is let go with the last.
    #[inline]
    pub(crate) fn release(&mut self, owner: Owner) {
        let Some(place) = self.holders.get_mut(usize::from(owner.0)) else { return };
        if let Some(holder) = place {
            holder.entries -= 1;
            if holder.entries == 0 {
                *place = None;
            }
        }
    }

    /// Enters an operation that came in at `since`, and names it. The caller has checked [`Ledger::is_full`] and holds `owner`, whose number is `handle`.
    #[inline]
    pub(crate) fn insert(&mut self, entry: Entry, owner: Owner, handle: u64, since: Stamp) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { lap: 0, stage: Stage::Given, owner, entry: None });
            (self.slots.len() - 1) as u16
        });
        if let Some(Some(holder)) = self.holders.get_mut(usize::from(owner.0)) {
            holder.entries += 1;
        }
        let slot = &mut self.slots[usize::from(index)];
        debug_assert!(slot.entry.is_none());
        self.board.put(index, slot.lap, entry.op, since, handle);
        slot.stage = Stage::Given;
        slot.owner = owner;
        slot.entry = Some(entry);
        slot.token(usize::from(index))
    }

    #[inline]
    fn slot(&mut self, token: u32) -> Option<&mut Slot> {
        let slot = self.slots.get_mut((token & 0xffff) as usize)?;
        (u32::from(slot.lap as u16) == token >> 16).then_some(slot)
    }

    fn get(&self, token: u32) -> Option<(&Entry, Stage)> {
        let slot = self.slots.get((token & 0xffff) as usize)?;
        let entry = slot.entry.as_ref().filter(|_| u32::from(slot.lap as u16) == token >> 16)?;
        Some((entry, slot.stage))
    }

    /// What an operation asks for.
    pub(crate) fn op(&self, token: u32) -> Option<BlockOp> {
        self.get(token).map(|(entry, _)| entry.op)
    }

    /// How far an operation has come.
    pub(crate) fn stage(&self, token: u32) -> Option<Stage> {
        self.get(token).map(|(_, stage)| stage)
    }

    /// It has come further.
    #[inline]
    pub(crate) fn set_stage(&mut self, token: u32, stage: Stage) {
        let Some(slot) = self.slot(token) else { return };
        let Some(entry) = &slot.entry else { return };
        let (lap, op) = (slot.lap, entry.op);
        slot.stage = stage;
        self.board.set_stage(token as u16, lap, op, stage);
    }

    /// Takes an operation out, to answer it. Its handle is held for as long as the caller does not [`Ledger::release`] it.
    #[inline]
    pub(crate) fn remove(&mut self, token: u32) -> Option<(Entry, Owner)> {
        let slot = self.slot(token)?;
        let entry = slot.entry.take()?;
        let owner = slot.owner;
        slot.lap += 1;
        self.board.take(token as u16);
        self.free.push(token as u16);
        Some((entry, owner))
    }

    /// Tokens of everything that is in, for the ladder.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, slot)| slot.entry.is_some()).map(|(index, slot)| slot.token(index)).collect()
    }
}
