//! Revocable handles: a client's right to operate, named by index and generation.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::cancel::Cancel;
use crate::cells::{Column, Pair};
use crate::count::By;
use crate::cpu::Row;
use crate::drain::Drain;
use crate::error::{DrainError, HandleError, HandleRefused};
use crate::gate::{Gate, State};
use crate::guard::Guard;
use crate::guards::{Guards, MAX_BATCH};
use crate::notify::Notify;
use crate::order;
use crate::slot::{PINNED, XADD, outstanding, sum};
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};
use crate::sync::{Mutant, Mutex, lock, mutant};

/// Set in the word of a handle that was revoked or closed. The bits above are the generation.
pub(crate) const REVOKED: u64 = 1;

/// The word of a handle: bit 0 [`REVOKED`], bits 2 and 3 the form of counting as in the word of
/// its gate, bits 4 and up the generation.
const GENERATION: u64 = 1 << 4;

/// The never-freed part of a handle.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Entry {
    pub(crate) word: AtomicU64,
    pub(crate) pair: Pair,
    index: u32,
    desk: Mutex<Desk>,
}

/// What the control path keeps about an entry.
#[derive(Debug, Default)]
struct Desk {
    /// What is hung up at revocation.
    bell: Option<Arc<Notify>>,
    /// The entry is in `Directory::closing`.
    offered: bool,
}

impl Entry {
    /// The handle that a call inside came by. (While it is inside, the place is not reused.)
    pub(crate) fn live(&'static self) -> Live {
        Live { entry: self, word: self.word.load(SeqCst) & !REVOKED }
    }

    pub(crate) fn sum(&self, column: Column) -> u64 {
        sum(Row::all().map(|row| self.pair.at(row, column).load(SeqCst)))
    }

    /// Calls inside (G2).
    fn calls(&self) -> u64 {
        outstanding(|column| self.sum(column), Column::Entered, Column::Left)
    }
}

/// An entry and the word that it had when the handle was opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Live {
    pub(crate) entry: &'static Entry,
    pub(crate) word: u64,
}

impl Live {
    #[inline]
    pub(crate) fn is_live(self) -> bool {
        self.entry.word.load(SeqCst) == self.word
    }
}

impl PartialEq for Live {
    fn eq(&self, other: &Live) -> bool {
        std::ptr::eq(self.entry, other.entry) && self.word == other.word
    }
}

impl Eq for Live {}

/// The handles of one gate.
#[derive(Debug)]
pub(crate) struct Directory {
    entries: Vec<&'static Entry>,
    /// Revoked, and behind the barrier of their revocation; calls may still be inside.
    closing: VecDeque<&'static Entry>,
    /// The bound on `entries`.
    capacity: u32,
}

/// Handles per gate unless [`Gate::limit_handles`] says otherwise.
pub const DEFAULT_HANDLES: u32 = 4096;

impl Default for Directory {
    fn default() -> Directory {
        Directory { entries: Vec::new(), closing: VecDeque::new(), capacity: DEFAULT_HANDLES }
    }
}

impl Directory {
    pub(crate) fn entries(&self) -> impl Iterator<Item = &'static Entry> {
        self.entries.iter().copied()
    }

    /// An entry that no call is inside of: one used before, or a new one.
    fn vacant(&mut self) -> Option<&'static Entry> {
        /// Looking at more than this many costs more than a new entry.
        const LOOKS: usize = 8;
        let full = self.entries.len() >= self.capacity as usize;
        let looks = if full { self.closing.len() } else { self.closing.len().min(LOOKS) };
        for _ in 0..looks {
            let entry = self.closing.pop_front()?;
            // Used again while a call is inside, the new handle's drain would wait for a call
            // that is not its own, and the old handle's would not wait at all.
            if entry.calls() == 0 || mutant(Mutant::ReuseEarly) {
                lock(&entry.desk).offered = false;
                return Some(entry);
            }
            self.closing.push_back(entry);
        }
        if full {
            return None;
        }
        let entry = Box::leak(Box::new(Entry {
            word: AtomicU64::new(REVOKED),
            pair: spare_pair(),
            index: self.entries.len() as u32,
            desk: Mutex::default(),
        }));
        self.entries.push(entry);
        Some(entry)
    }

    /// For the next generation of the slot: nothing is inside of any entry. Answers whether
    /// there are any.
    pub(crate) fn reset(&mut self) -> bool {
        for entry in &self.entries {
            let word = entry.word.load(SeqCst);
            entry.word.store(word | REVOKED, SeqCst);
            *lock(&entry.desk) = Desk { bell: None, offered: true };
        }
        self.closing = self.entries.iter().copied().collect();
        self.capacity = DEFAULT_HANDLES;
        !self.entries.is_empty()
    }
}

/// Counters for one more handle; those of all gates come from the same blocks.
#[cfg(not(loom))]
fn spare_pair() -> Pair {
    static SPARE: std::sync::Mutex<Vec<Pair>> = std::sync::Mutex::new(Vec::new());
    let mut spare = SPARE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if spare.is_empty() {
        *spare = Pair::block();
    }
    spare.pop().expect("a block holds at least one pair")
}

#[cfg(loom)]
fn spare_pair() -> Pair {
    Pair::block()[0]
}

/// Names a handle by value, for tables and messages of others. An id that was forged or is out
/// of date finds nothing: see [`Gate::handle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HandleId {
    /// The place in the gate's table.
    pub index: u32,
    /// How often the place was given out before.
    pub generation: u64,
}

/// What a call through a handle would be answered now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleState {
    /// Calls are admitted.
    Open,
    /// The gate is held for a moment.
    Held,
    /// The handle was revoked or closed, or its gate was closed: for good.
    Revoked,
}

/// A client's revocable right to call through a gate.
///
/// Copyable and weak: it may outlive the binding, the gate's generation and its own revocation,
/// and then answers [`HandleRefused::Revoked`] for ever (G7). Nothing is freed when it is
/// dropped; who opened it says [`close`](Handle::close) when the client is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handle {
    gate: Gate,
    live: Live,
}

impl Handle {
    /// Lets one call in, if the handle is live and its gate is open. Never blocks (G6); costs
    /// what [`Gate::admit`] costs and one compare more.
    ///
    /// # Errors
    /// [`HandleRefused::Held`] or [`HandleRefused::Revoked`]; nothing is counted as inside then.
    #[inline]
    #[cfg_attr(feature = "trace-holders", track_caller)]
    pub fn admit(&self) -> Result<Guard, HandleRefused> {
        if self.gate.enter_by(self.live, By::One) {
            Ok(Guard::new(self.gate.slot, Some(self.live.entry)))
        } else {
            Err(self.refusal())
        }
    }

    /// Lets `count` calls in at once, all or none, by one look and one count. Never blocks (G6).
    /// Zero is looked at like any other number, and if it is admitted nothing is inside.
    ///
    /// # Errors
    /// As [`admit`](Handle::admit); the refusal is counted as one in the statistics.
    ///
    /// # Panics
    /// When `count` is above [`MAX_BATCH`], before anything is counted.
    #[inline]
    #[cfg_attr(feature = "trace-holders", track_caller)]
    pub fn admit_many(&self, count: u32) -> Result<Guards, HandleRefused> {
        assert!(count <= MAX_BATCH, "a batch larger than MAX_BATCH");
        if self.gate.enter_by(self.live, By::Many(count)) { Ok(Guards::new(*self, count)) } else { Err(self.refusal()) }
    }

    #[cold]
    fn refusal(self) -> HandleRefused {
        // Opened meanwhile counts as held: the caller tries again, and a registration is
        // answered at once.
        if self.state() == HandleState::Revoked {
            self.gate.note::<{ Column::Refused as usize }>();
            HandleRefused::Revoked
        } else {
            self.gate.note::<{ Column::Held as usize }>();
            HandleRefused::Held
        }
    }

    /// What a call would be answered now.
    #[must_use]
    pub fn state(&self) -> HandleState {
        if !self.live.is_live() {
            return HandleState::Revoked;
        }
        match self.gate.state() {
            State::Open => HandleState::Open,
            State::Held => HandleState::Held,
            State::Closed => HandleState::Revoked,
        }
    }

    /// The gate that it calls through.
    #[inline]
    #[must_use]
    pub fn gate(&self) -> Gate {
        self.gate
    }

    #[inline]
    pub(crate) fn entry(&self) -> &'static Entry {
        self.live.entry
    }

    /// Its name by value.
    #[must_use]
    pub fn id(&self) -> HandleId {
        HandleId { index: self.live.entry.index, generation: self.live.word / GENERATION }
    }

    /// Calls of this handle inside now; zero for ever once its place was given to another.
    #[must_use]
    pub fn calls(&self) -> u64 {
        if self.is_current() { self.live.entry.calls() } else { 0 }
    }

    /// Revokes it, while the gate stays open for the others. When it returns, no call by this
    /// handle is admitted (G1); waits made inside its calls were woken, and what it was opened
    /// with was hung up, for ever. It waits for nothing: see [`drain`](Handle::drain). Whether
    /// this call did it, or an earlier one.
    pub fn revoke(&self) -> bool {
        let did = {
            let _directory = lock(&self.gate.slot.directory);
            let live = self.live.is_live();
            if live {
                self.live.entry.word.store(self.live.word | REVOKED, SeqCst);
            }
            live
        };
        if !mutant(Mutant::NoBarrier) {
            order::heavy(self.gate.open);
        }
        if did {
            self.after_revocation();
        }
        did
    }

    /// Hangs up, wakes, and offers the place for use again: in this order, and only behind the
    /// barrier, because a call that is under way must be counted before the place is looked at.
    fn after_revocation(&self) {
        let bell = lock(&self.live.entry.desk).bell.take();
        if let Some(bell) = bell {
            bell.hang_up();
        }
        self.gate.slot.wake_sleepers(Some(self.live));
        self.gate.slot.event.signal();
        let mut directory = lock(&self.gate.slot.directory);
        let mut desk = lock(&self.live.entry.desk);
        // The gate may have been retired meanwhile, which offers every entry.
        if !desk.offered && self.is_current() {
            desk.offered = true;
            directory.closing.push_back(self.live.entry);
        }
    }

    /// The client is gone. Infallible and final: waits for nothing, and does nothing when the
    /// handle was revoked before. Calls that are inside go on to their end.
    pub fn close(self) {
        self.revoke();
    }

    /// Waits until the calls of this handle are out, and no others (G2): the second step after
    /// [`revoke`](Handle::revoke), or after the gate was held or closed.
    ///
    /// # Errors
    /// As [`Gate::drain`]; [`DrainError::Open`] when neither handle nor gate turns calls away.
    /// The counts in the error are those of the handle.
    pub fn drain(&self, deadline: Option<Instant>, cancel: &Cancel) -> Result<(), DrainError> {
        let inside = || (self.calls(), 0);
        let open = || self.state() == HandleState::Open;
        self.gate.wait_until_out(Drain::Operations, inside, open, deadline, cancel)
    }

    /// Whether the place still belongs to this handle, live or revoked.
    fn is_current(&self) -> bool {
        self.live.entry.word.load(SeqCst) | REVOKED == self.live.word | REVOKED
    }
}

impl Gate {
    /// Opens a handle. `bell`, if given, is hung up when the handle is revoked.
    ///
    /// # Errors
    /// [`HandleError::Closed`] when the gate is closed, [`HandleError::Full`] when the gate has
    /// as many handles as it may, counting revoked ones with calls still inside.
    pub fn open_handle(&self, bell: Option<Arc<Notify>>) -> Result<Handle, HandleError> {
        let mut directory = lock(&self.slot.directory);
        if self.state() == State::Closed {
            return Err(HandleError::Closed);
        }
        let entry = directory.vacant().ok_or(HandleError::Full { capacity: directory.capacity })?;
        lock(&entry.desk).bell = bell;
        let next = entry.word.load(SeqCst) / GENERATION + 1;
        let word = (next * GENERATION) | (self.open & (PINNED | XADD));
        entry.word.store(word, SeqCst);
        Ok(Handle { gate: *self, live: Live { entry, word } })
    }

    /// Bounds the handles of this gate (at first [`DEFAULT_HANDLES`]). Those beyond a smaller
    /// bound stay.
    pub fn limit_handles(&self, capacity: u32) {
        lock(&self.slot.directory).capacity = capacity;
    }

    /// The live handle of this id, which may come from an untrusted place.
    #[must_use]
    pub fn handle(&self, id: HandleId) -> Option<Handle> {
        let directory = lock(&self.slot.directory);
        let entry = *directory.entries.get(usize::try_from(id.index).ok()?)?;
        let word = id.generation.checked_mul(GENERATION)? | (self.open & (PINNED | XADD));
        let handle = Handle { gate: *self, live: Live { entry, word } };
        (handle.state() != HandleState::Revoked).then_some(handle)
    }

    /// Handles that are live now.
    #[must_use]
    pub fn handles(&self) -> usize {
        self.live_handles(&lock(&self.slot.directory)).len()
    }

    /// Revokes every handle at the price of one barrier, and answers how many there were. Close
    /// the gate first, or new ones may be opened meanwhile.
    pub fn revoke_handles(&self) -> usize {
        let revoked = {
            let directory = lock(&self.slot.directory);
            let live = self.live_handles(&directory);
            for handle in &live {
                handle.live.entry.word.store(handle.live.word | REVOKED, SeqCst);
            }
            live
        };
        order::heavy(self.open);
        for handle in &revoked {
            handle.after_revocation();
        }
        revoked.len()
    }

    fn live_handles(&self, directory: &Directory) -> Vec<Handle> {
        if !self.is_current() {
            return Vec::new();
        }
        let handles = directory.entries.iter().map(|entry| {
            let word = entry.word.load(SeqCst);
            Handle { gate: *self, live: Live { entry, word } }
        });
        handles.filter(|handle| handle.live.word & REVOKED == 0).collect()
    }
}
