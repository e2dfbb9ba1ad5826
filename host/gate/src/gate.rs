//! The gate: admission, and the transitions between open, held and closed.
//!
//! ```text
//!            hold / hold_for             close
//!   open  ------------------>  held  ------------->  closed  --(drained)-->  retired
//!    ^  \                       |                      ^
//!    |   `----------------------|----------------------'
//!    `-----------open-----------'       close
//! ```
//!
//! Transitions are serialised by a lock and may take the time of a barrier; admission only ever
//! looks at the word.

use std::sync::Arc;

use crate::cells::Column;
use crate::cpu::Row;
use crate::error::{HoldError, Refused};
use crate::guard::{Crossing, Guard};
use crate::hold::Overdue;
use crate::holders::Holder;
use crate::inside;
use crate::mechanism::{Mechanism, mechanism};
use crate::notify::Notify;
use crate::order;
use crate::slot::{self, CLOSED, GENERATION, HELD, OPEN, PINNED, STATE_MASK, Slot, XADD};
use crate::stats::read_rows;
use crate::sync::atomic::Ordering::SeqCst;
use crate::sync::{Mutant, lock, mutant};

/// What a gate answers to newcomers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Operations are admitted.
    Open,
    /// Operations are turned away for a moment.
    Held,
    /// No operation will ever be admitted again.
    Closed,
}

/// A gate in front of something that must be removable while it is in use.
///
/// A copyable reference to a slot that is never freed and the generation it was made under: it
/// may outlive what it guards, and then answers [`Refused::Closed`] for ever (G7). A gate that
/// is not [retired](Gate::retire) keeps its slot, a cache line per core, for the life of the
/// process.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    pub(crate) slot: &'static Slot,
    /// The state word of this generation when the gate is open. Carries the form of counting,
    /// so that the hot path decides by a register and compares all of it in one go.
    pub(crate) open: u64,
}

impl Gate {
    /// A new, open gate.
    #[must_use]
    pub fn new() -> Gate {
        Gate::make(0)
    }

    /// A new, open gate that counts nothing: for what will never be unloaded. It can be held
    /// and closed, but a [`drain`](Gate::drain) is refused and the statistics stay zero.
    #[must_use]
    pub fn pinned() -> Gate {
        Gate::make(PINNED)
    }

    fn make(kind: u64) -> Gate {
        let kind = kind | if mechanism() == Mechanism::Xadd { XADD } else { 0 };
        let slot = slot::take();
        let generation = slot.state.load(SeqCst) & !(GENERATION - 1);
        let open = generation | kind | OPEN;
        lock(&slot.control).baseline = read_rows(slot);
        slot.state.store(open, SeqCst);
        Gate { slot, open }
    }

    pub(crate) fn key(&self) -> usize {
        std::ptr::from_ref(self.slot).addr()
    }

    pub(crate) fn is_pinned(&self) -> bool {
        self.open & PINNED != 0
    }

    /// Lets one operation in, if the gate is open. Never blocks (G6).
    ///
    /// # Errors
    /// [`Refused::Held`] or [`Refused::Closed`]; nothing is counted as inside then.
    #[inline]
    #[cfg_attr(feature = "trace-holders", track_caller)]
    pub fn admit(&self) -> Result<Guard, Refused> {
        if self.enter() { Ok(Guard::new(self.slot, None)) } else { Err(self.refusal()) }
    }

    #[cold]
    fn refusal(self) -> Refused {
        // Opened meanwhile counts as held: the caller tries again, and a registration is
        // answered at once.
        if self.state() == State::Closed {
            self.note::<{ Column::Refused as usize }>();
            Refused::Closed
        } else {
            self.note::<{ Column::Held as usize }>();
            Refused::Held
        }
    }

    /// Counts a refusal, unless the slot has moved on to somebody else.
    pub(crate) fn note<const COLUMN: usize>(&self) {
        if self.is_current() {
            self.count::<COLUMN>();
        }
    }

    /// Whether the slot still belongs to this generation.
    pub(crate) fn is_current(&self) -> bool {
        self.slot.state.load(SeqCst) & !STATE_MASK == self.open
    }

    /// Signals `notify` when the gate opens or closes; at once if it is not held now. One
    /// registration is good for one signal. Keep the refused request and those behind it in
    /// order, and admit them in that order when woken.
    pub fn register_held(&self, notify: &Arc<Notify>) {
        let missed = mutant(Mutant::RegisterBlindly).then_some(false);
        if self.is_current() {
            let mut lists = lock(&self.slot.lists);
            if !lists.held.iter().any(|known| Arc::ptr_eq(known, notify)) {
                lists.held.push(Arc::clone(notify));
            }
        }
        // Partner: `open` and `close` change the state, then take the list.
        if missed.unwrap_or_else(|| self.state() != State::Held) {
            notify.signal();
        }
    }

    /// Begins a call into the guarded module, open gate or not (G9).
    #[inline]
    pub fn cross(&self) -> Crossing {
        Crossing::new(*self)
    }

    /// Whether this thread is inside a crossing of this gate (G8).
    #[must_use]
    pub fn in_crossing(&self) -> bool {
        inside::is_in(self.key())
    }

    /// Turns newcomers away for a moment. When it returns, no admission succeeds until
    /// [`open`](Gate::open) (G1). No effect on a gate that is held or closed. Unbounded: see
    /// [`hold_for`](Gate::hold_for).
    pub fn hold(&self) {
        let _ = self.begin_hold();
    }

    /// Holds; answers the number of the hold.
    pub(crate) fn begin_hold(&self) -> Result<u64, HoldError> {
        let mut control = lock(&self.slot.control);
        match self.state() {
            State::Held => Err(HoldError::Held),
            State::Closed => Err(HoldError::Closed),
            State::Open => {
                control.hold += 1;
                self.slot.turn(self.open | HELD);
                Ok(control.hold)
            }
        }
    }

    /// Whether the gate is in its hold of this number.
    pub(crate) fn is_hold(&self, number: u64) -> bool {
        let control = lock(&self.slot.control);
        self.state() == State::Held && control.hold == number
    }

    /// Ends the hold of this number, and no other.
    pub(crate) fn end_hold(&self, number: u64, how: Overdue) -> Result<(), HoldError> {
        {
            let control = lock(&self.slot.control);
            match self.state() {
                State::Closed => return Err(HoldError::Closed),
                State::Open => return Err(HoldError::Expired),
                State::Held if control.hold != number && !mutant(Mutant::ExpireBlindly) => {
                    return Err(HoldError::Expired);
                }
                State::Held => {}
            }
            match how {
                Overdue::Open => self.slot.state.store(self.open, SeqCst),
                Overdue::Close => self.slot.turn(self.open | CLOSED),
            }
        }
        self.announce(how == Overdue::Close);
        Ok(())
    }

    /// Ends a hold, whoever began it, and wakes who registered. No effect on a closed gate.
    pub fn open(&self) {
        {
            let _control = lock(&self.slot.control);
            if self.state() != State::Held && !mutant(Mutant::OpenBlindly) {
                return;
            }
            // No barrier: whoever looks early is held a moment longer, and finds out by
            // `register_held`.
            self.slot.state.store(self.open, SeqCst);
        }
        self.announce(false);
    }

    /// Ends admission for good. When it returns, no admission succeeds (G1), and who registered
    /// or sleeps inside was woken. Idempotent: every closer returns after the barrier.
    pub fn close(&self) {
        {
            let _control = lock(&self.slot.control);
            // Another generation, or closed before: nothing to do.
            if self.state() == State::Closed {
                return;
            }
            self.slot.turn(self.open | CLOSED);
        }
        self.announce(true);
    }

    /// Tells everybody that the state changed.
    fn announce(&self, closed: bool) {
        let held = std::mem::take(&mut lock(&self.slot.lists).held);
        for notify in held {
            notify.signal();
        }
        if closed {
            self.slot.wake_sleepers(None);
        }
        // A drain of a held gate that was opened again must notice: `DrainError::Open`.
        self.slot.event.signal();
    }

    /// What newcomers are answered now.
    #[must_use]
    pub fn state(&self) -> State {
        let word = self.slot.state.load(SeqCst);
        if word == self.open {
            State::Open
        } else if word == self.open | HELD {
            State::Held
        } else {
            State::Closed
        }
    }

    /// Operations inside now, by the gate and by its handles. While the gate is open the number
    /// is one of a moment that may be past; it never leaves out what was admitted before the
    /// gate was turned.
    #[must_use]
    pub fn operations(&self) -> u64 {
        let inside = self.slot.operations();
        // Retired is drained; what was read then was somebody else's.
        if self.is_current() { inside } else { 0 }
    }

    /// Crossings inside now, with the same reserve.
    #[must_use]
    pub fn crossings(&self) -> u64 {
        let inside = self.slot.crossings();
        if self.is_current() { inside } else { 0 }
    }

    /// Who holds the guards that are out: with the feature `trace-holders`, else empty.
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        self.slot.holders.list()
    }

    /// Has leavers that find the gate not open signal `notify`, for who cannot block in
    /// [`drain`](Gate::drain): look at [`operations`](Gate::operations) and
    /// [`crossings`](Gate::crossings) after each signal. Replaces the one before; signals once
    /// at the beginning.
    pub fn wake_drain_with(&self, notify: &Arc<Notify>) {
        lock(&self.slot.lists).watch = Some(Arc::clone(notify));
        // Partner: a leaver counts out, then looks here. One that comes too early for this is
        // seen by the look that the first signal asks for.
        self.slot.watched.store(true, SeqCst);
        notify.signal();
    }

    /// Gives the slot back for another generation, if this gate is closed and drained. Every
    /// copy of this gate and every handle of it goes on answering that it is closed (G7).
    ///
    /// # Errors
    /// The gate itself, when it is open or held, or something is inside, or it is pinned (then
    /// nobody knows what is inside).
    pub fn retire(self) -> Result<(), Gate> {
        {
            let _control = lock(&self.slot.control);
            let closed = self.slot.state.load(SeqCst) == self.open | CLOSED;
            if !closed || self.is_pinned() || self.operations() > 0 || self.crossings() > 0 {
                return Err(self);
            }
            if mutant(Mutant::RetireResets) {
                for row in Row::all() {
                    self.slot.line.at(row, Column::Left).store(0, SeqCst);
                    self.slot.line.at(row, Column::Entered).store(0, SeqCst);
                }
            }
            let next = (self.open & !(GENERATION - 1)) + GENERATION;
            self.slot.state.store(next | CLOSED, SeqCst);
            if lock(&self.slot.directory).reset() && !mutant(Mutant::RetireBlindly) {
                // A call that saw its handle live may look at the state only when the slot is
                // open again: let it look at its handle once more before that.
                order::heavy(self.open);
            }
            self.slot.watched.store(false, SeqCst);
            *lock(&self.slot.lists) = slot::Lists::default();
        }
        slot::give(self.slot);
        Ok(())
    }
}

impl Default for Gate {
    fn default() -> Gate {
        Gate::new()
    }
}

impl PartialEq for Gate {
    fn eq(&self, other: &Gate) -> bool {
        std::ptr::eq(self.slot, other.slot) && self.open == other.open
    }
}

impl Eq for Gate {}
