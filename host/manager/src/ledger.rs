//! What was admitted to a lane and is not answered yet.
//!
//! A token is slot and generation, so an answer to a request that is over can never be taken for an answer to the one that has its slot now.
//!
//! The ledger is the lane's own, under its lease. What everybody may know of it stands on its [`Board`].

use std::sync::Arc;

use cofferdam_device::{Buffer, IoOp};
use cofferdam_gate::Guards;

use crate::board::{Board, Stamp};
use crate::handle::HandleShared;
use crate::request::{Completion, IoRequest};

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

/// The handle of an entry, by its place in the ledger's list: good until the entry is removed, [`Ledger::over`] was told and [`Ledger::settle`] has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner(u16);

/// A handle that has entries. It is held once for all of them: a counted reference each was two locked operations per request.
struct Holder {
    handle: Arc<HandleShared>,
    /// Counts its operations in the gate: all of them together, so that a batch costs one look and one count at each end.
    guards: Guards,
    /// Operations that are answered and not yet counted out, neither of the gate nor of the handle.
    over: u32,
}

struct Slot {
    /// Requests that the slot has had; the low 16 bits are the generation in its token.
    lap: u64,
    stage: Stage,
    op: IoOp,
    owner: Owner,
    /// A request has the slot.
    live: bool,
    /// What the client calls it.
    user: u64,
    /// Goes back with the answer. Dropping it without one is a bug, except for what the ladder abandons on purpose.
    buffer: Option<Buffer>,
}

/// What is left of an operation that was taken out, for its answer.
pub(crate) struct Taken {
    pub(crate) user: u64,
    pub(crate) buffer: Option<Buffer>,
    pub(crate) owner: Owner,
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
    /// A holder has operations that are over.
    unsettled: bool,
    limit: usize,
    board: Arc<Board>,
}

impl Ledger {
    /// A ledger of at most `limit` entries, 1 to 65,535.
    pub(crate) fn new(limit: usize) -> Ledger {
        let limit = limit.clamp(1, usize::from(u16::MAX));
        let board = Arc::new(Board::new(limit));
        Ledger { slots: Vec::new(), free: Vec::new(), holders: Vec::new(), unsettled: false, limit, board }
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

    /// How many more may come in.
    #[inline]
    pub(crate) fn room(&self) -> usize {
        self.limit.saturating_sub(self.len())
    }

    /// Takes over operations that a handle was admitted with. For each of them comes an [`Ledger::insert`] that is removed some day, or none, and then [`Ledger::over`].
    pub(crate) fn hold(&mut self, handle: &Arc<HandleShared>, mut guards: Guards) -> Owner {
        let mut free = self.holders.len();
        for (index, place) in self.holders.iter_mut().enumerate() {
            match place {
                Some(holder) if Arc::ptr_eq(&holder.handle, handle) => match holder.guards.join(guards) {
                    Ok(()) => return Owner(index as u16),
                    // A handle has one right, so this does not happen; a holder of its own would do as well.
                    Err(others) => guards = others,
                },
                Some(_) => {}
                None => free = index,
            }
        }
        let holder = Some(Holder { handle: Arc::clone(handle), guards, over: 0 });
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

    /// The place of a handle that has entries.
    pub(crate) fn owner_of(&self, handle: &Arc<HandleShared>) -> Option<Owner> {
        let is_it = |place: &Option<Holder>| place.as_ref().is_some_and(|holder| Arc::ptr_eq(&holder.handle, handle));
        self.holders.iter().position(is_it).map(|index| Owner(index as u16))
    }

    /// An operation of it is answered.
    #[inline]
    pub(crate) fn over(&mut self, owner: Owner) {
        if let Some(Some(holder)) = self.holders.get_mut(usize::from(owner.0)) {
            holder.over += 1;
            self.unsettled = true;
        }
    }

    /// Counts what is over out of its handles and of the gate, behind the answers: of a revoked handle with nothing in flight, a client that looks once more has them
    /// all. A handle is let go with its last operation. Done before the driver is called, which
    /// takes what it takes, before anybody is woken, and whenever the lease is given back: a drain waits for it.
    #[inline]
    pub(crate) fn settle(&mut self) {
        if !std::mem::take(&mut self.unsettled) {
            return;
        }
        for place in &mut self.holders {
            let Some(holder) = place else { continue };
            if holder.over > 0 {
                let over = std::mem::take(&mut holder.over);
                holder.handle.count_out(over);
                holder.guards.leave(over);
                if holder.guards.count() == 0 {
                    *place = None;
                }
            }
        }
    }

    /// Enters an operation that came in at `since`, takes its buffer, and names it. The caller has checked [`Ledger::room`] and holds `owner`, whose number is `handle`.
    #[inline]
    pub(crate) fn insert(&mut self, request: &mut IoRequest, owner: Owner, handle: u64, since: Stamp) -> u32 {
        let op = request.op;
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { lap: 0, stage: Stage::Given, op, owner, live: false, user: 0, buffer: None });
            (self.slots.len() - 1) as u16
        });
        let slot = &mut self.slots[usize::from(index)];
        debug_assert!(!slot.live && slot.buffer.is_none());
        self.board.put(index, slot.lap, op, since, handle);
        slot.stage = Stage::Given;
        slot.op = op;
        slot.owner = owner;
        slot.live = true;
        slot.user = request.user;
        slot.buffer = request.buffer.take();
        slot.token(usize::from(index))
    }

    #[inline]
    fn slot(&mut self, token: u32) -> Option<&mut Slot> {
        let slot = self.slots.get_mut((token & 0xffff) as usize)?;
        (u32::from(slot.lap as u16) == token >> 16).then_some(slot)
    }

    fn get(&self, token: u32) -> Option<&Slot> {
        let slot = self.slots.get((token & 0xffff) as usize)?;
        (slot.live && u32::from(slot.lap as u16) == token >> 16).then_some(slot)
    }

    /// What an operation asks for.
    pub(crate) fn op(&self, token: u32) -> Option<IoOp> {
        self.get(token).map(|slot| slot.op)
    }

    /// What an operation asked for that [`Ledger::claim`] has just taken out of this place.
    #[inline]
    pub(crate) fn op_at(&self, place: u16) -> IoOp {
        self.slots[usize::from(place)].op
    }

    /// Where the device finds an operation's buffer.
    pub(crate) fn iova(&self, token: u32) -> Option<u64> {
        self.get(token).and_then(|slot| slot.buffer.as_ref()).map(Buffer::iova)
    }

    /// Whose an operation is.
    pub(crate) fn handle_of(&self, token: u32) -> Option<&Arc<HandleShared>> {
        self.get(token).and_then(|slot| self.handle(slot.owner))
    }

    /// How far an operation has come.
    pub(crate) fn stage(&self, token: u32) -> Option<Stage> {
        self.get(token).map(|slot| slot.stage)
    }

    /// It has come further.
    #[inline]
    pub(crate) fn set_stage(&mut self, token: u32, stage: Stage) {
        let Some(slot) = self.slot(token).filter(|slot| slot.live) else { return };
        let (lap, op) = (slot.lap, slot.op);
        slot.stage = stage;
        self.board.set_stage(token as u16, lap, op, stage);
    }

    /// Takes an operation out, to answer it; [`Ledger::over`] comes after.
    #[inline]
    pub(crate) fn remove(&mut self, token: u32) -> Option<Taken> {
        let place = self.end(token, None)?;
        let slot = &mut self.slots[usize::from(place)];
        let taken = Taken { user: slot.user, buffer: slot.buffer.take(), owner: slot.owner };
        self.free.push(place);
        Some(taken)
    }

    /// An operation is over, if it is `whose`; its place, which is not free yet.
    #[inline]
    fn end(&mut self, token: u32, whose: Option<Owner>) -> Option<u16> {
        let slot = self.slot(token).filter(|slot| slot.live && whose.is_none_or(|owner| slot.owner == owner))?;
        slot.live = false;
        slot.lap += 1;
        self.board.take(token as u16);
        Some(token as u16)
    }

    /// Takes out the operations of `mine` that succeeded, all of them `owner`'s, and adds their answers to `out`. For what [`Ledger::claim`] gave, once each.
    ///
    /// Together and by an iterator that knows its length, because then an answer is put together where it stays. A push puts it together beside the vector, which may have to grow
    /// first, and the copy waits for parts that were just written: a third of the whole.
    #[inline]
    pub(crate) fn answer_all(&mut self, owner: Owner, mine: &[u16], out: &mut Vec<Completion>) {
        let Some(Some(holder)) = self.holders.get_mut(usize::from(owner.0)) else {
            debug_assert!(mine.is_empty(), "an owner with operations is held");
            return;
        };
        holder.over += mine.len() as u32;
        self.unsettled = true;
        let slots = &mut self.slots;
        out.extend(mine.iter().map(|index| {
            let slot = &mut slots[usize::from(*index)];
            debug_assert!(!slot.live && slot.owner == owner);
            Completion { user: slot.user, result: Ok(()), bytes: 0, buffer: slot.buffer.take() }
        }));
        self.free.extend_from_slice(mine);
    }

    /// Whether an operation is `owner`'s; then it is over, and its place is what [`Ledger::answer_all`] wants.
    #[inline]
    pub(crate) fn claim(&mut self, token: u32, owner: Owner) -> Option<u16> {
        self.end(token, Some(owner))
    }

    /// Tokens of everything that is in, for the ladder.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        let slots = self.slots.iter().enumerate();
        slots.filter(|(_, slot)| slot.live).map(|(index, slot)| slot.token(index)).collect()
    }
}
