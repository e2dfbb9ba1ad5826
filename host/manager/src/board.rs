//! The ledger's essentials, where everybody can read them.
//!
//! A ledger is behind its lane's lease, which is held across a crossing: just when the driver is stuck, nobody could say what waits. So the ledger keeps a few words per
//! slot beside itself. Written by whoever has the lease, with plain stores; read by anybody, with a check that what was read belongs together.
//!
//! ```text
//! word   63                 16 15     12 11      8 7      0
//!        | lap                | operation | stage   | live   |     low 16 bits of the lap: the token's generation
//! since  nanoseconds from the board's start to the request's arrival
//! handle the number of its handle
//! ```

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use cofferdam_device::IoOp;

use crate::ledger::Stage;

/// Cells that are allocated at once.
const CHUNK: usize = 256;

const LIVE: u64 = 1;
const STAGE_SHIFT: u32 = 8;
const OP_SHIFT: u32 = 12;
const NIBBLE: u64 = 0xf;
const LAP_SHIFT: u32 = 16;

/// One slot of the ledger.
#[derive(Debug, Default)]
struct Cell {
    word: AtomicU64,
    since: AtomicU64,
    handle: AtomicU64,
}

/// The slots of one ledger. Grows with it, in pieces that never move, to its limit.
#[derive(Debug)]
pub(crate) struct Board {
    start: Duration,
    chunks: Box<[OnceLock<Box<[Cell]>>]>,
}

/// A moment: nanoseconds from the start of the board that gave it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stamp(u64);

/// A request that is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    pub(crate) token: u32,
    pub(crate) op: IoOp,
    pub(crate) stage: Stage,
    pub(crate) age: Duration,
    pub(crate) handle: u64,
}

/// What waits on one lane.
#[derive(Clone, Debug, Default)]
pub(crate) struct Picture {
    /// Requests by stage: given, parked, published.
    pub(crate) stages: [u64; 3],
    /// The oldest of each stage.
    pub(crate) oldest_by_stage: [Option<Waiting>; 3],
    /// The oldest ones, oldest first.
    pub(crate) oldest: Vec<Waiting>,
}

/// The kernel's clock as of its last tick, 1 to 10 ms ago: reading it costs a fifth of reading the exact one, and a batch reads it once.
fn coarse_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
}

impl Board {
    /// A board for a ledger of at most `limit` slots.
    pub(crate) fn new(limit: usize) -> Board {
        Board { start: coarse_now(), chunks: (0..limit.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect() }
    }

    /// Now, by this board's clock.
    #[inline]
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp(coarse_now().saturating_sub(self.start).as_nanos() as u64)
    }

    #[inline]
    fn cell(&self, index: u16) -> &Cell {
        let index = usize::from(index);
        let chunk = self.chunks[index / CHUNK].get_or_init(|| (0..CHUNK).map(|_| Cell::default()).collect());
        &chunk[index % CHUNK]
    }

    /// A request has come in. Of the ledger, which is the one writer.
    #[inline]
    pub(crate) fn put(&self, index: u16, lap: u64, op: IoOp, since: Stamp, handle: u64) {
        let cell = self.cell(index);
        // Partner: `read`. The slot was taken off the board before; a reader that sees anything of what follows sees that, or the new word, in its second look.
        fence(Ordering::Release);
        cell.since.store(since.0, Ordering::Relaxed);
        cell.handle.store(handle, Ordering::Relaxed);
        // Partner: the first look of `read`, which acquires: who sees this word sees the two above.
        cell.word.store(word(lap, op, Stage::Given), Ordering::Release);
    }

    /// It has come further.
    #[inline]
    pub(crate) fn set_stage(&self, index: u16, lap: u64, op: IoOp, stage: Stage) {
        // Release for the same reason: a reader may see this word without ever having seen the first one.
        self.cell(index).word.store(word(lap, op, stage), Ordering::Release);
    }

    /// It is over.
    #[inline]
    pub(crate) fn take(&self, index: u16) {
        self.cell(index).word.store(0, Ordering::Relaxed);
    }

    /// What is on the board, with up to `most` of the oldest. Requests that come and go meanwhile are in it or not; each that is in it is told as it was.
    pub(crate) fn read(&self, most: usize) -> Picture {
        let mut picture = Picture::default();
        // From the start to the last of them, so that the list stays short.
        let mut oldest: Vec<(u64, Waiting)> = Vec::new();
        // By when they came and not by their age: the clock of both stands still for milliseconds.
        let mut first = [u64::MAX; 3];
        let Stamp(now) = self.stamp();
        for (number, chunk) in self.chunks.iter().enumerate() {
            let Some(cells) = chunk.get() else { break };
            for (offset, cell) in cells.iter().enumerate() {
                let Some((word, since, handle)) = cell.read() else { continue };
                let Some((op, stage)) = Option::zip(op_of(word), stage_of(word)) else { continue };
                let generation = (word >> LAP_SHIFT) as u32 & 0xffff;
                let token = generation << 16 | (number * CHUNK + offset) as u32;
                let age = Duration::from_nanos(now.saturating_sub(since));
                let waiting = Waiting { token, op, stage, age, handle };
                picture.stages[stage as usize] += 1;
                let eldest = &mut picture.oldest_by_stage[stage as usize];
                if eldest.is_none() || since < first[stage as usize] {
                    *eldest = Some(waiting);
                    first[stage as usize] = since;
                }
                let place = oldest.partition_point(|(other, _)| *other <= since);
                if place < most {
                    oldest.truncate(most - 1);
                    oldest.insert(place, (since, waiting));
                }
            }
        }
        picture.oldest = oldest.into_iter().map(|(_, waiting)| waiting).collect();
        picture
    }
}

impl Cell {
    /// Word, since and handle of one and the same request. `None` for an empty slot, and for one that changes hands right now: that request is as young as can be.
    fn read(&self) -> Option<(u64, u64, u64)> {
        self.read_with(|| ())
    }

    /// The same, with something that happens just after the first look: where another thread may do anything.
    fn read_with(&self, meanwhile: impl FnOnce()) -> Option<(u64, u64, u64)> {
        let first = self.word.load(Ordering::Acquire);
        if first & LIVE == 0 {
            return None;
        }
        meanwhile();
        let since = self.since.load(Ordering::Relaxed);
        let handle = self.handle.load(Ordering::Relaxed);
        // Partner: the fence in `put`.
        fence(Ordering::Acquire);
        let second = self.word.load(Ordering::Relaxed);
        // The stage may have changed. A lap has 48 bits and does not come round.
        (second & LIVE != 0 && first >> LAP_SHIFT == second >> LAP_SHIFT).then_some((second, since, handle))
    }
}

#[inline]
fn word(lap: u64, op: IoOp, stage: Stage) -> u64 {
    lap << LAP_SHIFT | op_number(op) << OP_SHIFT | (stage as u64) << STAGE_SHIFT | LIVE
}

fn stage_of(word: u64) -> Option<Stage> {
    Stage::ALL.get((word >> STAGE_SHIFT & NIBBLE) as usize).copied()
}

/// By their numbers in [`op_number`].
const OPERATIONS: [IoOp; 9] = [
    IoOp::Read,
    IoOp::Write,
    IoOp::Flush,
    IoOp::Discard,
    IoOp::WriteZeroes,
    IoOp::GetId,
    IoOp::Fill,
    IoOp::Send,
    IoOp::Transmit,
];

#[inline]
fn op_number(op: IoOp) -> u64 {
    op as u64
}

fn op_of(word: u64) -> Option<IoOp> {
    OPERATIONS.get((word >> OP_SHIFT & NIBBLE) as usize).copied()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use super::*;

    #[test]
    fn numbers_and_operations_belong_together() {
        for op in OPERATIONS {
            let word = word(7, op, Stage::Parked);
            assert_eq!((op_of(word), stage_of(word), word >> LAP_SHIFT), (Some(op), Some(Stage::Parked), 7));
        }
    }

    #[test]
    fn the_oldest_come_first_and_no_more_than_asked_for() {
        let board = Board::new(1000);
        for index in (0..300).rev() {
            board.put(index, 0x10001, IoOp::Read, Stamp(1000 - u64::from(index)), 9);
        }
        board.take(299);
        board.set_stage(298, 0x10001, IoOp::Read, Stage::Published);
        let picture = board.read(3);
        assert_eq!(picture.stages, [298, 0, 1]);
        let tokens: Vec<_> = picture.oldest.iter().map(|waiting| waiting.token).collect();
        assert_eq!(tokens, [0x1_012a, 0x1_0129, 0x1_0128]);
        assert_eq!((picture.oldest[0].stage, picture.oldest[0].handle), (Stage::Published, 9));
        let by_stage = picture.oldest_by_stage.map(|oldest| oldest.map(|waiting| waiting.token & 0xffff));
        assert_eq!(by_stage, [Some(297), None, Some(298)]);
        assert!(board.read(0).oldest.is_empty());
    }

    #[test]
    fn a_slot_that_changes_hands_during_a_look_is_not_told() {
        let board = Board::new(1);
        board.put(0, 5, IoOp::Read, Stamp(50), 500);
        let cell = board.cell(0);
        let read = word(5, IoOp::Read, Stage::Parked);
        assert_eq!(cell.read_with(|| board.set_stage(0, 5, IoOp::Read, Stage::Parked)), Some((read, 50, 500)));
        let next = || {
            board.take(0);
            board.put(0, 6, IoOp::Read, Stamp(60), 600);
        };
        assert_eq!(cell.read_with(next), None);
        assert_eq!(cell.read_with(|| board.take(0)), None);
    }

    #[test]
    fn a_reader_never_mixes_two_requests() {
        let board = Arc::new(Board::new(8));
        let stop = Arc::new(AtomicBool::new(false));
        let lease = Arc::new(Mutex::new(0_u64));
        // Two writers in turn, as two clients of a lane are. Every word of a request says which one it is.
        let writers: Vec<_> = (0..2)
            .map(|_| {
                let (board, stop, lease) = (Arc::clone(&board), Arc::clone(&stop), Arc::clone(&lease));
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let mut lap = lease.lock().unwrap();
                        for index in 0..8 {
                            board.take(index);
                            let (op, handle) = (OPERATIONS[(*lap % 6) as usize], *lap & 0xffff);
                            board.put(index, *lap, op, Stamp(*lap & 0xffff), handle);
                            board.set_stage(index, *lap, op, Stage::ALL[(*lap % 3) as usize]);
                        }
                        *lap += 1;
                    }
                })
            })
            .collect();
        let (mut seen, begun) = (0, Instant::now());
        // Many of them, or on a busy machine, where most looks are beside a writer, as many as there are in some seconds.
        let enough = |seen| seen >= if begun.elapsed() < Duration::from_secs(5) { 20_000 } else { 500 };
        while !enough(seen) && begun.elapsed() < Duration::from_secs(120) {
            for cell in &board.cell_list() {
                // Some time for the writers between the two looks.
                let Some((word, since, handle)) = cell.read_with(std::thread::yield_now) else { continue };
                let lap = word >> LAP_SHIFT;
                assert_eq!((since, handle), (lap & 0xffff, lap & 0xffff), "{word:#x}");
                assert_eq!(op_of(word), Some(OPERATIONS[(lap % 6) as usize]));
                seen += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert!(*lease.lock().unwrap() > 1_000 && enough(seen), "{seen} cells seen");
    }

    impl Board {
        fn cell_list(&self) -> Vec<&Cell> {
            (0..8).map(|index| self.cell(index)).collect()
        }
    }
}
