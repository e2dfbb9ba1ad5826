//! What a gate really is: a slot that is never freed, used again under another generation (G7).

use std::sync::Arc;

use crate::cells::{Column, Line};
use crate::cpu::Row;
use crate::event::Event;
use crate::gate::Gate;
use crate::handle::{Directory, Live};
use crate::holders::Holders;
use crate::notify::Notify;
use crate::order;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use crate::sync::{Mutant, Mutex, lock, mutant};

/// The state word: bits 0 and 1 the state, bits 2 and 3 the form of counting, bits 8 and up the
/// generation. 2^56 generations do not wrap in the life of a machine.
pub(crate) const OPEN: u64 = 0;
pub(crate) const HELD: u64 = 1;
pub(crate) const CLOSED: u64 = 2;
pub(crate) const STATE_MASK: u64 = 3;
/// Counts nothing.
pub(crate) const PINNED: u64 = 4;
/// Counts with atomic adds instead of sections.
pub(crate) const XADD: u64 = 8;
pub(crate) const GENERATION: u64 = 1 << 8;

/// The never-freed part of a gate. The first line is all that the hot path reads, and it is
/// written by transitions only.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Slot {
    pub(crate) state: AtomicU64,
    pub(crate) line: Line,
    cold: Cold,
}

/// Kept off the first line.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Cold {
    /// Drainers sleep here.
    pub(crate) event: Event,
    /// Whether `Lists::watch` holds anything.
    pub(crate) watched: AtomicBool,
    /// Serialises the transitions. Held across the barrier, so that a second closer returns
    /// after it too. Taken before `directory`, and that before `lists`.
    pub(crate) control: Mutex<Control>,
    pub(crate) directory: Mutex<Directory>,
    pub(crate) lists: Mutex<Lists>,
    pub(crate) holders: Holders,
}

impl std::ops::Deref for Slot {
    type Target = Cold;
    fn deref(&self) -> &Cold {
        &self.cold
    }
}

/// What transitions need.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// The counters when this generation began. They are never set back: a late entrant of the
    /// generation before may be half-counted at that moment, and its other half would then
    /// cancel out somebody who is inside.
    pub(crate) baseline: Vec<[u64; 6]>,
    /// Which hold this is; its bound ends no other.
    pub(crate) hold: u64,
}

/// Who is to be told.
#[derive(Debug, Default)]
pub(crate) struct Lists {
    /// Signalled when the gate opens or closes.
    pub(crate) held: Vec<Arc<Notify>>,
    /// Signalled by leavers that find the gate not open.
    pub(crate) watch: Option<Arc<Notify>>,
    /// Waits made inside admitted calls.
    pub(crate) sleepers: Vec<Sleeping>,
}

/// One wait made inside an admitted call.
#[derive(Debug)]
pub(crate) struct Sleeping {
    /// The handle whose revocation ends it, besides the gate's closing.
    pub(crate) live: Option<Live>,
    pub(crate) notify: Arc<Notify>,
}

/// Slots that nobody uses; their state is closed, under a generation that nobody has.
#[cfg(not(loom))]
static FREE: std::sync::Mutex<Vec<&'static Slot>> = std::sync::Mutex::new(Vec::new());

/// A closed slot that nobody uses.
#[cfg(not(loom))]
pub(crate) fn take() -> &'static Slot {
    let mut free = FREE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if free.is_empty() {
        free.extend(Line::block().into_iter().map(Slot::leak));
    }
    free.pop().expect("a block holds at least one line")
}

/// Gives back a slot that was closed and drained and whose generation was moved on.
#[cfg(not(loom))]
pub(crate) fn give(slot: &'static Slot) {
    FREE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(slot);
}

#[cfg(loom)]
pub(crate) use crate::model::{give, take};

impl Slot {
    pub(crate) fn leak(line: Line) -> &'static Slot {
        Box::leak(Box::new(Slot {
            state: AtomicU64::new(CLOSED),
            line,
            cold: Cold {
                event: Event::new(),
                watched: AtomicBool::new(false),
                control: Mutex::default(),
                directory: Mutex::default(),
                lists: Mutex::default(),
                holders: Holders::default(),
            },
        }))
    }

    /// The gate that the slot is now.
    pub(crate) fn gate(&'static self) -> Gate {
        Gate { slot: self, open: self.state.load(SeqCst) & !STATE_MASK }
    }

    /// Changes the state word. When it returns, whoever was admitted under the old word is
    /// counted visibly, and everybody else will see the new word (G1).
    pub(crate) fn turn(&self, word: u64) {
        self.state.store(word, SeqCst);
        if !mutant(Mutant::NoBarrier) {
            order::heavy(word);
        }
    }

    /// Operations inside, by the gate and by all its handles (G2).
    pub(crate) fn operations(&self) -> u64 {
        let directory = lock(&self.directory);
        if mutant(Mutant::CoreByCore) {
            let at = |row, column| self.line.at(row, column).load(SeqCst);
            return sum(Row::all().map(|row| {
                let left = at(row, Column::Left);
                at(row, Column::Entered).wrapping_sub(left)
            }));
        }
        let sum = |column| {
            let own = sum(Row::all().map(|row| self.line.at(row, column).load(SeqCst)));
            directory.entries().fold(own, |sum, entry| sum.wrapping_add(entry.sum(column)))
        };
        outstanding(sum, Column::Entered, Column::Left)
    }

    /// Crossings inside.
    pub(crate) fn crossings(&self) -> u64 {
        let sum = |column| sum(Row::all().map(|row| self.line.at(row, column).load(SeqCst)));
        outstanding(sum, Column::In, Column::Out)
    }

    /// Tells whoever drains that something left. Touches only what is never freed.
    #[cold]
    pub(crate) fn tell_drainers(&self) {
        self.event.signal();
        if self.watched.load(SeqCst) {
            let watch = lock(&self.lists).watch.clone();
            if let Some(watch) = watch {
                watch.signal();
            }
        }
    }

    /// Wakes the waits made inside admitted calls: all, or those of one handle.
    pub(crate) fn wake_sleepers(&self, of: Option<Live>) {
        // Partner: `Sleeper` registers, then looks at the words that the caller has changed.
        let lists = lock(&self.lists);
        for sleeping in &lists.sleepers {
            if of.is_none() || of == sleeping.live {
                sleeping.notify.signal();
            }
        }
    }
}

/// Adds counters up. They are monotonic; a sum wraps after centuries, and differences of
/// wrapped sums are still right.
pub(crate) fn sum(counters: impl Iterator<Item = u64>) -> u64 {
    counters.fold(0, u64::wrapping_add)
}

/// What went in and did not come out: all `out` first, then all `into` (G2). Whatever changes
/// in between can only make the answer larger: one that has left by the first look had entered
/// before the second.
pub(crate) fn outstanding(sum: impl Fn(Column) -> u64, into: Column, out: Column) -> u64 {
    if mutant(Mutant::EnteredFirst) {
        let entered = sum(into);
        return entered.wrapping_sub(sum(out));
    }
    let left = sum(out);
    sum(into).wrapping_sub(left)
}
