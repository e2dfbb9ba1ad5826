//! What the model-checked build (`--cfg loom`) has in place of cores, the kernel and the
//! barrier, and the switches for mutants. Used by `tests/models.rs`; no part of the API.
//!
//! The asymmetric barrier is one token per thread: the light side is an acquire-release
//! read-modify-write of the thread's own token, the heavy side one of every token. (Fences on
//! both sides would also order light against light, and hide a missing release.) A restartable
//! section holds its thread's token as a lock from the look to the count: the barrier, which
//! takes every lock once, finds it before or after, never in between, as the kernel's restart
//! does.

use std::cell::Cell;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use loom::sync::atomic::AtomicUsize;
use loom::sync::{Condvar, Mutex};

use crate::cells::{Cells, Column, Line};
use crate::count::By;
use crate::slot::{PINNED, Slot, XADD};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::lock;

pub use crate::mechanism::Mechanism;
pub use crate::sync::Mutant;

/// Cores of the model.
pub(crate) const CORES: usize = 2;
/// Threads of the model, the first one included.
const THREADS: usize = 4;

/// Every mutant, with its name on the command line.
pub const MUTANTS: &[Mutant] = &[
    Mutant::NoBarrier,
    Mutant::NoRestart,
    Mutant::LookBeforeCount,
    Mutant::EnteredFirst,
    Mutant::CoreByCore,
    Mutant::LeaveRelaxed,
    Mutant::LeaveSilently,
    Mutant::RefuseSilently,
    Mutant::CountLate,
    Mutant::RegisterBlindly,
    Mutant::OpenBlindly,
    Mutant::HandleLookedAtEarly,
    Mutant::HandleLeaveLooksAtGateOnly,
    Mutant::ReuseEarly,
    Mutant::SleeperLooksEarly,
    Mutant::CancelLate,
    Mutant::ClearEarly,
    Mutant::ClearHangUp,
    Mutant::RetireResets,
    Mutant::RetireBlindly,
    Mutant::ExpireBlindly,
    Mutant::BatchCountsOne,
    Mutant::BatchBacksOutOne,
    Mutant::BatchLeavesWhole,
];

static CHOSEN: AtomicU8 = AtomicU8::new(0);
static PORTABLE: AtomicU8 = AtomicU8::new(0);

/// Runs what follows with this mistake made, and with this mechanism.
pub fn configure(mechanism: Mechanism, mutant: Option<Mutant>) {
    PORTABLE.store(u8::from(mechanism == Mechanism::Xadd), Relaxed);
    CHOSEN.store(mutant.map_or(0, |mutant| mutant as u8), Relaxed);
}

pub(crate) fn mutant(mutant: Mutant) -> bool {
    CHOSEN.load(Relaxed) == mutant as u8
}

pub(crate) fn mechanism() -> Mechanism {
    if PORTABLE.load(Relaxed) == 1 { Mechanism::Xadd } else { Mechanism::Rseq }
}

#[derive(Clone, Copy)]
struct Me {
    thread: usize,
    core: usize,
    wanders: bool,
}

loom::thread_local! {
    static ME: Cell<Me> = Cell::new(Me { thread: 0, core: 0, wanders: false });
}

loom::lazy_static! {
    static ref TOKENS: Vec<AtomicUsize> = (0..THREADS).map(|_| AtomicUsize::new(0)).collect();
    static ref LOCKS: Vec<Mutex<()>> = (0..THREADS).map(|_| Mutex::new(())).collect();
}

/// Says which thread this is (below 4; the first is 0) and which core (0 or 1) it runs on.
/// Every thread of a model but the first says so before anything else.
pub fn thread_on(thread: usize, core: usize) {
    assert!(thread < THREADS && core < CORES);
    ME.with(|me| me.set(Me { thread, core, wanders: false }));
}

/// From now on this thread is on the other core each time that it asks.
pub fn wander() {
    ME.with(|me| me.set(Me { wanders: true, ..me.get() }));
}

pub(crate) fn current_core() -> u32 {
    let me = ME.with(Cell::get);
    if me.wanders {
        ME.with(|cell| cell.set(Me { core: 1 - me.core, ..me }));
    }
    me.core as u32
}

/// [`Gate::hold_for`](crate::Gate::hold_for) without its clock: the number of the hold.
pub fn begin_hold(gate: crate::Gate) -> Option<u64> {
    gate.begin_hold().ok()
}

/// What the clock does when that hold is overdue.
pub fn overdue(gate: crate::Gate, number: u64) {
    let _ = gate.end_hold(number, crate::Overdue::Open);
}

pub(crate) fn light() {
    TOKENS[ME.with(Cell::get).thread].fetch_add(1, Ordering::AcqRel);
}

pub(crate) fn heavy(open: u64) {
    if open & PINNED != 0 {
        return;
    }
    for thread in 0..THREADS {
        if open & XADD != 0 || mutant(Mutant::NoRestart) {
            TOKENS[thread].fetch_add(1, Ordering::AcqRel);
        } else {
            drop(lock(&LOCKS[thread]));
        }
    }
}

/// Restartable sections.
pub(crate) mod rseq {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Outcome {
        Counted,
        Refused,
        #[allow(dead_code, reason = "every thread of the model has a core")]
        Homeless,
    }

    pub(crate) fn prepare() -> Result<(), &'static str> {
        Ok(())
    }

    fn section<const COLUMN: usize, const N: usize>(good: impl Fn() -> bool, cells: Cells<N>, by: By) -> Outcome {
        let me = ME.with(Cell::get).thread;
        let plain = mutant(Mutant::NoRestart);
        let _running = (!plain).then(|| lock(&LOCKS[me]));
        if !good() {
            return Outcome::Refused;
        }
        if plain {
            light();
        }
        let leaving = COLUMN == Column::Left as usize || COLUMN == Column::Out as usize;
        let relaxed = leaving && mutant(Mutant::LeaveRelaxed);
        let ordering = if relaxed { Ordering::Relaxed } else { Ordering::Release };
        // One store on the machine; a read-modify-write here, because the cores of the model
        // do not keep its threads apart.
        cells.by_number(crate::cpu::current(), COLUMN).fetch_add(by.number(), ordering);
        if plain {
            light();
        }
        Outcome::Counted
    }

    pub(crate) fn add<const COLUMN: usize, const N: usize>(cells: Cells<N>, by: By) -> Outcome {
        section::<COLUMN, N>(|| true, cells, by)
    }

    pub(crate) fn add_if<const COLUMN: usize, const N: usize>(
        word: &AtomicU64,
        expected: u64,
        cells: Cells<N>,
        by: By,
    ) -> Outcome {
        section::<COLUMN, N>(|| word.load(Ordering::Acquire) == expected, cells, by)
    }

    pub(crate) fn add_if_unless<const BITS: u8, const COLUMN: usize, const N: usize>(
        word: &AtomicU64,
        expected: u64,
        other: &AtomicU64,
        cells: Cells<N>,
        by: By,
    ) -> Outcome {
        let good = || word.load(Ordering::Acquire) == expected && other.load(Ordering::Acquire) & u64::from(BITS) == 0;
        section::<COLUMN, N>(good, cells, by)
    }

    pub(crate) fn add_unless<const BITS: u8, const COLUMN: usize, const N: usize>(
        word: &AtomicU64,
        cells: Cells<N>,
        by: By,
    ) -> Outcome {
        section::<COLUMN, N>(|| word.load(Ordering::Acquire) & u64::from(BITS) == 0, cells, by)
    }

    pub(crate) fn add_unless_either<const FIRST: u8, const SECOND: u8, const COLUMN: usize, const N: usize>(
        words: [&AtomicU64; 2],
        cells: Cells<N>,
        by: By,
    ) -> Outcome {
        let good = || {
            words[0].load(Ordering::Acquire) & u64::from(FIRST) == 0
                && words[1].load(Ordering::Acquire) & u64::from(SECOND) == 0
        };
        section::<COLUMN, N>(good, cells, by)
    }
}

/// The kernel's side of a futex: looking and falling asleep are one step.
#[derive(Debug, Default)]
pub(crate) struct Kernel {
    bucket: Mutex<()>,
    queue: Condvar,
}

impl Kernel {
    pub(crate) fn wait(&self, unchanged: impl Fn() -> bool) {
        let bucket = lock(&self.bucket);
        if unchanged() {
            drop(self.queue.wait(bucket));
        }
    }

    pub(crate) fn wake(&self) {
        drop(lock(&self.bucket));
        self.queue.notify_all();
    }
}

/// An eventfd.
pub(crate) mod eventfd {
    use super::*;
    use std::time::Duration;

    #[derive(Debug, Default)]
    pub(crate) struct Eventfd {
        readable: Mutex<bool>,
        queue: Condvar,
    }

    impl Eventfd {
        pub(crate) fn new() -> std::io::Result<Eventfd> {
            Ok(Eventfd::default())
        }

        pub(crate) fn raise(&self) {
            *lock(&self.readable) = true;
            self.queue.notify_all();
        }

        pub(crate) fn empty(&self) {
            *lock(&self.readable) = false;
        }

        pub(crate) fn wait(&self, _: Option<Duration>) -> bool {
            let mut readable = lock(&self.readable);
            while !*readable {
                readable = self.queue.wait(readable).expect("loom does not poison");
            }
            true
        }
    }
}

loom::lazy_static! {
    /// The one slot that is free, if any: models use one gate at a time.
    static ref FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());
}

pub(crate) fn take() -> &'static Slot {
    lock(&FREE).pop().unwrap_or_else(|| Slot::leak(Line::block()[0]))
}

pub(crate) fn give(slot: &'static Slot) {
    lock(&FREE).push(slot);
}
