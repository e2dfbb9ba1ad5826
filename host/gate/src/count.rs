//! Counting in and out: the hot path. Nothing here locks, blocks or allocates.
//!
//! Two forms, decided when the gate is made and carried in its word, so that one test of a
//! register chooses (a pinned gate is the third, and counts nothing):
//!
//! - **sections** (`rseq.rs`): look and count in one restartable section.
//! - **portable**: count, then look; if the look is bad, count out again. The add, the look and
//!   the closer's store are sequentially consistent. Partner: `Slot::turn` stores the new state,
//!   then the drainer reads the counters. Both interleavings: the look comes after the store,
//!   then it sees the new state and backs out; or before it, then the add came before it too,
//!   and the drainer sees it. The other way about (look, then count) loses an entrant that is
//!   preempted in between.
//!
//! Counting out is the same with the roles swapped: the add is also a release, so that a drainer
//! that sees it sees everything the operation did.

use crate::cells::{Cells, Column};
use crate::cpu::{self, Row};
use crate::gate::Gate;
use crate::handle::{Entry, Live, REVOKED};
use crate::order;
use crate::rseq::{self, Outcome};
use crate::slot::{PINNED, STATE_MASK, Slot, XADD};
use crate::sync::atomic::AtomicU64;
use crate::sync::atomic::Ordering::{Relaxed, SeqCst};
use crate::sync::{Mutant, mutant};

/// How many come in or leave at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    One,
    /// A batch; one or none is a batch as well.
    Many(u32),
}

impl By {
    pub(crate) fn number(self) -> u64 {
        match self {
            By::One => 1,
            By::Many(count) => u64::from(count),
        }
    }
}

impl Gate {
    /// Counts one operation in if the gate is open (G1).
    #[inline(always)]
    pub(crate) fn enter(&self) -> bool {
        let slot = self.slot;
        if self.open & (PINNED | XADD) == 0 {
            match rseq::add_if::<ENTERED, _>(&slot.state, self.open, slot.line, By::One) {
                Outcome::Counted => return true,
                Outcome::Refused => return false,
                Outcome::Homeless => {}
            }
        } else if self.open & PINNED != 0 {
            return slot.state.load(SeqCst) == self.open;
        }
        self.enter_portably(None, By::One)
    }

    /// Counts `by` operations of a handle in if the gate is open and the handle is live: all or
    /// none, by one look and one add. One barrier, by whoever closes the one or revokes the other,
    /// covers both looks.
    ///
    /// A gate is not retired before its handles' words are turned, so with the right word it is
    /// the right gate, and its state bits are all there is to look at.
    #[inline(always)]
    pub(crate) fn enter_by(&self, live: Live, by: By) -> bool {
        let (slot, entry) = (self.slot, live.entry);
        let counted = if mutant(Mutant::BatchCountsOne) { By::One } else { by };
        if mutant(Mutant::HandleLookedAtEarly) && !live.is_live() {
            return false;
        }
        if live.word & (PINNED | XADD) == 0 {
            let outcome = if mutant(Mutant::HandleLookedAtEarly) {
                rseq::add_unless::<TURNED, ENTERED, _>(&slot.state, entry.pair, counted)
            } else {
                let (word, state) = (&entry.word, &slot.state);
                rseq::add_if_unless::<TURNED, ENTERED, _>(word, live.word, state, entry.pair, counted)
            };
            match outcome {
                Outcome::Counted => return true,
                Outcome::Refused => return false,
                Outcome::Homeless => {}
            }
        } else if live.word & PINNED != 0 {
            return live.is_live() && slot.state.load(SeqCst) & STATE_MASK == 0;
        }
        self.enter_portably(Some(live), counted)
    }

    /// Counts one without looking: crossings pass a closed gate (G9), and statistics.
    #[inline(always)]
    pub(crate) fn count<const COLUMN: usize>(&self) {
        if self.open & (PINNED | XADD) == 0 {
            if rseq::add::<COLUMN, _>(self.slot.line, By::One) == Outcome::Counted {
                return;
            }
        } else if self.open & PINNED != 0 {
            return;
        }
        self.slot.line.by_number(self.row(), COLUMN).fetch_add(1, SeqCst);
    }

    /// The row for an atomic add. Where sections run, their rows are theirs alone: a plain
    /// increment there would lose an atomic one from another core.
    fn row(self) -> Row {
        if self.open & XADD == 0 { cpu::homeless() } else { cpu::current() }
    }

    /// Whether admission is in order, after counting.
    fn look(self, live: Option<Live>) -> bool {
        self.slot.state.load(SeqCst) == self.open && live.is_none_or(|live| live.is_live())
    }

    #[inline(never)]
    fn enter_portably(self, live: Option<Live>, by: By) -> bool {
        if mutant(Mutant::LookBeforeCount) && !self.look(live) {
            return false;
        }
        let entered = self.cell(live, Column::Entered);
        entered.fetch_add(by.number(), SeqCst);
        order::light();
        let good = if mutant(Mutant::HandleLookedAtEarly) { self.look(None) } else { self.look(live) };
        if good || mutant(Mutant::LookBeforeCount) {
            return true;
        }
        // Back out. The row is looked up again: this thread may have moved, and the counters do
        // not mind (G2).
        let back = if mutant(Mutant::BatchBacksOutOne) { By::One } else { by };
        self.cell(live, Column::Left).fetch_add(back.number(), SeqCst);
        if !mutant(Mutant::RefuseSilently) {
            // A drainer may have seen the count that was just taken back, and sleeps.
            self.slot.tell_drainers();
        }
        false
    }

    fn cell(self, live: Option<Live>, column: Column) -> &'static AtomicU64 {
        match live {
            None => self.slot.line.at(self.row(), column),
            Some(live) => live.entry.pair.at(self.row(), column),
        }
    }
}

impl Slot {
    /// Counts `by` operations or crossings out at once, and wakes who drains unless all is plainly
    /// open. All of them are inside, and by this handle if there is one.
    ///
    /// What is inside keeps its gate from being retired and its place from being reused, so the
    /// words are those that it entered by, but for the bits that a closer or revoker sets: only
    /// these need a look. (A pinned gate counts nothing and is never retired.)
    #[inline(always)]
    pub(crate) fn leave<const COLUMN: usize>(&self, entry: Option<&'static Entry>, by: By) {
        let form = self.state.load(Relaxed) & (PINNED | XADD);
        if form == 0 {
            let outcome = match entry {
                Some(entry) if !mutant(Mutant::HandleLeaveLooksAtGateOnly) => {
                    let words = [&self.state, &entry.word];
                    rseq::add_unless_either::<TURNED, GONE, LEFT, _>(words, entry.pair, by)
                }
                Some(entry) => rseq::add_unless::<TURNED, LEFT, _>(&self.state, entry.pair, by),
                None => rseq::add_unless::<TURNED, COLUMN, _>(&self.state, self.line, by),
            };
            if outcome == Outcome::Counted {
                return;
            }
        } else if form & PINNED != 0 {
            return;
        }
        match entry {
            None => self.leave_slowly::<COLUMN, _>(self.line, None, by),
            Some(entry) => self.leave_slowly::<LEFT, _>(entry.pair, Some(entry), by),
        }
    }

    /// Counts out with an atomic add, or where the section found something not open.
    #[inline(never)]
    fn leave_slowly<const COLUMN: usize, const N: usize>(
        &self,
        cells: Cells<N>,
        entry: Option<&'static Entry>,
        by: By,
    ) {
        let ordering = if mutant(Mutant::LeaveRelaxed) { Relaxed } else { SeqCst };
        if self.state.load(Relaxed) & XADD != 0 {
            cells.by_number(cpu::current(), COLUMN).fetch_add(by.number(), ordering);
            order::light();
        } else if rseq::add::<COLUMN, _>(cells, by) != Outcome::Counted {
            cells.by_number(cpu::homeless(), COLUMN).fetch_add(by.number(), ordering);
        }
        // From here on this may be the last thing that the drainer waited for: touch only what
        // is never freed (G7).
        let turned = self.state.load(SeqCst) & STATE_MASK != 0;
        let looked = if mutant(Mutant::HandleLeaveLooksAtGateOnly) { None } else { entry };
        let gone = looked.is_some_and(|entry| entry.word.load(SeqCst) & REVOKED != 0);
        if (turned || gone) && !mutant(Mutant::LeaveSilently) {
            self.tell_drainers();
        }
    }
}

/// The counter of admissions, as the section wants it.
const ENTERED: usize = Column::Entered as usize;
/// The counter of answers, likewise.
pub(crate) const LEFT: usize = Column::Left as usize;
/// [`STATE_MASK`] as the section wants it.
const TURNED: u8 = STATE_MASK as u8;
/// [`REVOKED`] as the section wants it.
const GONE: u8 = REVOKED as u8;
