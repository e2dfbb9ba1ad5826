//! A queue that a lane keeps filled with buffers of the binding (DESIGN section 3, posted buffers).
//!
//! ```text
//! pool -> ring -> (device) -> used -> [crossing: driver.received] -> checked -> arrivals, which a client holds -> pool
//!                                                                   \-> what no arrival names -> pool
//! ```
//!
//! The buffers are leased once and stay the binding's: a client that holds arrivals holds so many buffers from the device, and nothing else. A client that does not take them leaves the
//! device without buffers, which is the flow control. A drain does not wait for what is posted; once the device is silent the buffers are given back, whoever holds arrivals.

mod handover;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use cofferdam_device::arrivals::{self, Given, Head, MAX_PIECES, Piece};
use cofferdam_device::words::MAX_BATCH;
use cofferdam_device::{AddError, Buffer, DeviceFault, Doorbell, SplitQueue};
use cofferdam_runtime::{GuestFault, LaneDriver};
use parking_lot::RwLock;

use super::inside::{Inside, guest_fault};
use crate::arrival::Arrivals;
use crate::error::LaneFault;
use crate::lane::revive::{Health, POISON};

pub(crate) use handover::ShownState;

/// The buffers of one posted queue, numbered from 0.
pub(crate) struct Pool {
    /// Read while a client looks into one; emptied when the device is silent.
    buffers: RwLock<Vec<Buffer>>,
    /// Pieces of each buffer that clients hold.
    held: Box<[AtomicU32]>,
    /// Buffers that may be posted again, a bit each.
    back: Box<[AtomicU64]>,
}

impl Pool {
    fn new(buffers: Vec<Buffer>) -> Pool {
        let held = buffers.iter().map(|_| AtomicU32::new(0)).collect();
        let back = (0..buffers.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let pool = Pool { held, back, buffers: RwLock::new(Vec::new()) };
        (0..buffers.len() as u16).for_each(|buffer| pool.give_one_back(buffer));
        *pool.buffers.write() = buffers;
        pool
    }

    /// It may be posted again.
    fn give_one_back(&self, buffer: u16) {
        self.give_back(buffer / 64, 1 << (buffer % 64));
    }

    /// Those of the 64 buffers from `64 * number` on may be posted again.
    fn give_back(&self, number: u16, bits: u64) {
        if let Some(back) = self.back.get(usize::from(number)).filter(|_| bits != 0) {
            // Partner: `Posted::post`, which acquires. What was done with the buffers was before this.
            back.fetch_or(bits, Ordering::Release);
        }
    }

    /// Calls with the buffers; there are none any more once the binding's device is silent.
    pub(crate) fn with<R>(&self, call: impl FnOnce(&[Buffer]) -> R) -> R {
        call(&self.buffers.read())
    }

    /// A client has let go of these pieces.
    pub(crate) fn release<'a>(&self, pieces: impl IntoIterator<Item = &'a Piece>) {
        // Neighbours go back together.
        let (mut number, mut bits) = (0, 0);
        for piece in pieces {
            let Some(held) = self.held.get(usize::from(piece.buffer)) else { continue };
            // Nobody but its holders counts a buffer down, and nobody counts it up before it was posted and used again: who finds its own piece to be the only one is alone with it.
            // Acquire: what others did with their pieces was before this.
            let is_last = if held.load(Ordering::Acquire) == 1 {
                held.store(0, Ordering::Relaxed);
                true
            } else {
                held.fetch_sub(1, Ordering::AcqRel) == 1
            };
            if !is_last {
                continue;
            }
            if piece.buffer / 64 != number {
                self.give_back(number, std::mem::take(&mut bits));
                number = piece.buffer / 64;
            }
            bits |= 1 << (piece.buffer % 64);
        }
        self.give_back(number, bits);
    }

    /// Nothing is posted any more: the buffers go back to the arena, or stay where they are for good if the device may still write there.
    pub(crate) fn end(&self, silent: bool) {
        let buffers = std::mem::take(&mut *self.buffers.write());
        if !silent {
            buffers.into_iter().for_each(Buffer::retire);
        }
    }
}

/// What one look found.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Found {
    /// There may be more.
    pub(super) more: bool,
    /// Buffers that the driver made nothing of.
    pub(super) dropped: u64,
}

/// A used buffer as the driver sees it.
#[derive(Clone, Debug)]
struct Shown {
    given: Given,
    words: Vec<u32>,
    /// Drivers that it may have broken down.
    crashes: u8,
}

/// The queue.
pub(crate) struct Posted {
    ring: SplitQueue,
    doorbell: Box<dyn Doorbell>,
    pool: Arc<Pool>,
    /// I/O address and bytes of each buffer.
    places: Vec<(u64, u32)>,
    head_bytes: u8,
    /// The beginning of an arrival that goes on.
    begun: Option<(Head, Vec<Piece>)>,
    /// What the driver was shown of it, which another driver would have to see again.
    begun_of: Vec<Shown>,
    /// What a driver was shown when it broke down, for the next one, in order: one at a time, for any of it may be what broke it.
    again: VecDeque<Shown>,
    /// The device broke the ring's rules, or is away.
    broken: bool,
    /// What was on the ring was taken back.
    is_away: bool,
    given: Vec<Given>,
    words: Vec<u32>,
    /// Drivers that what is given may have broken down.
    crashes: u8,
    answer: Vec<u32>,
    /// The driver's answer, checked.
    arrivals: arrivals::Arrivals,
}

impl Posted {
    /// A queue that is filled with `buffers`, all of them on the ring when this returns. The device is not told ([`Posted::kick`]).
    pub(crate) fn new(ring: SplitQueue, doorbell: Box<dyn Doorbell>, buffers: Vec<Buffer>, head_bytes: u8) -> Posted {
        let mut posted = Posted::unfilled(ring, doorbell, buffers, head_bytes);
        // The device tells of the first buffer that it uses; nothing is on the ring yet.
        let _ = posted.ring.arm();
        posted.post();
        posted.ring.publish();
        posted
    }

    /// A queue that is to be filled with `buffers`: the ring is not touched.
    fn unfilled(ring: SplitQueue, doorbell: Box<dyn Doorbell>, buffers: Vec<Buffer>, head_bytes: u8) -> Posted {
        Posted {
            places: buffers.iter().map(|buffer| (buffer.iova(), buffer.len())).collect(),
            pool: Arc::new(Pool::new(buffers)),
            head_bytes,
            begun: None,
            begun_of: Vec::new(),
            again: VecDeque::new(),
            broken: false,
            is_away: false,
            given: Vec::new(),
            words: Vec::new(),
            crashes: 0,
            answer: Vec::new(),
            arrivals: arrivals::Arrivals::default(),
            doorbell,
            ring,
        }
    }

    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// The device runs: it is told that there are buffers.
    pub(crate) fn kick(&self) {
        self.doorbell.ring();
    }

    /// Puts what came back on the ring; how many.
    fn post(&mut self) -> usize {
        let mut posted = 0;
        for (first, bits) in (0..).step_by(64).zip(&self.pool.back) {
            if bits.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Partner: `Pool::give_back`.
            let mut back = bits.swap(0, Ordering::Acquire);
            while back != 0 {
                let buffer = first + back.trailing_zeros() as u16;
                let place = self.places.get(usize::from(buffer));
                let added = place.map(|(iova, bytes)| self.ring.add_buffer(u32::from(buffer), *iova, *bytes));
                if let Some(Err(AddError::NoRoom { .. } | AddError::Poisoned(_))) = added {
                    bits.fetch_or(back, Ordering::Relaxed);
                    return posted;
                }
                back &= back - 1;
                posted += 1;
            }
        }
        posted
    }

    /// Takes up to 64 used buffers off the ring and writes down for the driver what is in them.
    fn take(&mut self) -> Result<(), DeviceFault> {
        self.given.clear();
        self.words.clear();
        self.crashes = 0;
        if let Some(Shown { given, words, crashes }) = self.again.pop_front() {
            self.given.push(given);
            self.words.extend(words);
            self.crashes = crashes;
            return Ok(());
        }
        self.take_used()
    }

    /// The same, whatever was shown before.
    fn take_used(&mut self) -> Result<(), DeviceFault> {
        self.given.clear();
        self.words.clear();
        self.crashes = 0;
        let head_bytes = usize::from(self.head_bytes);
        let mut head = [0; 64];
        self.pool.with(|buffers| {
            while self.given.len() < MAX_BATCH {
                let Some((token, written)) = self.ring.pop_written()? else { break };
                let number = token as u16;
                self.given.push(Given { buffer: number, written });
                self.words.extend_from_slice(&[token, written]);
                if let Some(buffer) = buffers.get(usize::from(number)) {
                    // In steps of eight bytes, where a shorter rest would be read byte by byte.
                    let there = head_bytes.next_multiple_of(8).min(buffer.len() as usize);
                    let _ = buffer.read_at(0, &mut head[..there]);
                }
                // What the device did not write is nothing of this buffer's.
                head[head_bytes.min(written as usize)..head_bytes.next_multiple_of(8)].fill(0);
                self.words.extend(
                    head[..head_bytes.next_multiple_of(4)].as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)),
                );
            }
            Ok(())
        })
    }

    /// The device is silent, and nothing is posted any more. With `keep`, what it used before is shown to the next driver; else that is dropped, with what has begun to arrive.
    /// How many that was.
    pub(super) fn take_back(&mut self, keep: bool) -> u64 {
        let mut lost = 0;
        if !self.broken {
            loop {
                let is_broken = self.take_used().is_err();
                if keep {
                    let shown: Vec<_> = self.shown(0).collect();
                    self.again.extend(shown);
                } else {
                    self.given.iter().for_each(|given| self.pool.give_one_back(given.buffer));
                    lost += self.given.len() as u64;
                }
                if self.given.is_empty() || is_broken {
                    break;
                }
            }
        }
        if !keep {
            lost += self.forget_aside();
        }
        if let Some((_, pieces)) = self.begun.take() {
            self.begun_of.clear();
            self.pool.release(pieces.iter());
            lost += 1;
        }
        // Neither a client's nor looked at: they were with the device. Nothing is posted on this ring again.
        if !std::mem::replace(&mut self.is_away, true) {
            self.ring.outstanding().for_each(|posted| self.pool.give_one_back(posted.token as u16));
        }
        self.broken = true;
        lost
    }

    /// The device is back, with an empty ring: it is filled.
    pub(super) fn give_back(&mut self, mut ring: SplitQueue, doorbell: Box<dyn Doorbell>) {
        let _ = ring.arm();
        (self.ring, self.doorbell) = (ring, doorbell);
        (self.broken, self.is_away) = (false, false);
        self.post();
        self.ring.publish();
    }

    /// Makes arrivals of what the driver said; takes back what it said nothing of, and counts that.
    fn deliver(&mut self, out: &mut Arrivals) -> u64 {
        let pool = &self.pool;
        let arrivals = std::mem::take(&mut self.arrivals);
        // They were just taken off the ring, and what names them has not been handed out: nobody else counts them.
        let count = |piece: &Piece| {
            let held = &pool.held[usize::from(piece.buffer)];
            held.store(held.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        };
        if let Some(plain) = arrivals.plain().filter(|_| self.begun.is_none()) {
            out.extend(
                pool,
                plain.map(|(head, piece)| {
                    count(piece);
                    (head, piece)
                }),
            );
        } else {
            for (head, pieces) in arrivals.iter() {
                pieces.iter().for_each(count);
                let (head, pieces) = match self.begun.take() {
                    None => (head, pieces.to_vec()),
                    Some((begun, mut before)) => {
                        before.extend_from_slice(pieces);
                        (Head { goes_on: head.goes_on, ..begun }, before)
                    }
                };
                if pieces.len() > MAX_PIECES {
                    pool.release(pieces.iter());
                } else if head.goes_on {
                    self.begun = Some((head, pieces));
                } else {
                    out.push(pool, head, pieces);
                }
            }
        }
        let mut dropped = 0;
        for (index, given) in self.given.iter().enumerate() {
            if !arrivals.is_named(index) {
                pool.give_one_back(given.buffer);
                dropped += 1;
            }
        }
        self.arrivals = arrivals;
        self.note_begun();
        dropped
    }

    /// What was given this time, one by one. Each has as many words.
    fn shown(&self, crashes: u8) -> impl Iterator<Item = Shown> {
        let words = self.words.len() / self.given.len().max(1);
        let each = self.given.iter().zip(self.words.chunks(words.max(1)));
        each.map(move |(given, words)| Shown { given: *given, words: words.to_vec(), crashes })
    }

    /// Keeps what another driver would need for the rest of an arrival that goes on.
    fn note_begun(&mut self) {
        let Some((_, pieces)) = &self.begun else { return self.begun_of.clear() };
        let is_in = |shown: &Shown| pieces.iter().any(|piece| piece.buffer == shown.given.buffer);
        let now: Vec<_> = self.shown(0).filter(is_in).collect();
        self.begun_of.retain(is_in);
        self.begun_of.extend(now);
    }

    /// The driver broke down over what it was given. The next one is shown that again, behind what it needs to understand it; what has broken down two is dropped. How many
    /// those are.
    fn set_aside(&mut self) -> u64 {
        let crashes = self.crashes + 1;
        let mut dropped = 0;
        let mut again: Vec<_> = std::mem::take(&mut self.begun_of);
        if let Some((_, pieces)) = self.begun.take() {
            // Shown again, so no client's and not the device's either.
            for piece in &pieces {
                self.pool.held[usize::from(piece.buffer)].fetch_sub(1, Ordering::Relaxed);
            }
        }
        for shown in self.shown(crashes) {
            if crashes >= POISON {
                self.pool.give_one_back(shown.given.buffer);
                dropped += 1;
            } else {
                again.push(shown);
            }
        }
        for shown in again.into_iter().rev() {
            self.again.push_front(shown);
        }
        dropped
    }

    /// No driver will say what that means.
    fn forget_aside(&mut self) -> u64 {
        let again = std::mem::take(&mut self.again);
        again.iter().for_each(|shown| self.pool.give_one_back(shown.given.buffer));
        again.len() as u64
    }
}

impl Inside {
    /// One look at the posted queue. What clients have let go of goes back to the device first: it fills that while the driver judges what is there.
    pub(super) fn receive(&mut self, out: &mut Arrivals) -> (Found, Option<LaneFault>) {
        self.repost();
        let waits = self.keeps_off() || self.is_waiting();
        let Some(posted) = self.posted.as_mut().filter(|posted| !posted.broken && !waits) else {
            return (Found::default(), None);
        };
        let taken = posted.take();
        let fault = taken.err().map(|fault| {
            posted.broken = true;
            LaneFault::Device(fault)
        });
        let used = posted.given.len();
        if used == 0 {
            return (Found::default(), fault);
        }
        let driver = self.driver.as_mut().filter(|_| self.health == Health::Works);
        // L5: without a driver nobody can say what it means.
        let mut dropped = if driver.is_none() { posted.forget_aside() } else { 0 };
        let called = driver.map_or(Ok(()), |driver: &mut Box<dyn LaneDriver>| {
            driver.received(&posted.words, &mut posted.answer).map_err(|error| guest_fault(error, "received"))
        });
        let checked = called.as_ref().map_err(Clone::clone).and_then(|()| {
            let parsed = posted.arrivals.parse(&posted.answer, &posted.given);
            parsed.map_err(|error| GuestFault::layout(format!("received: {error}")))
        });
        dropped += if checked.is_ok() { posted.deliver(out) } else { posted.set_aside() };
        posted.answer.clear();
        posted.arrivals.clear();
        let more = used == MAX_BATCH || !posted.again.is_empty();
        self.note_interruption(&called);
        let fault = fault.or(checked.err().map(LaneFault::Guest));
        if dropped > 0 {
            self.repost();
        }
        (Found { more, dropped }, fault)
    }

    /// Gives the device back what clients have let go of, and what was dropped.
    pub(super) fn repost(&mut self) {
        let stops = self.keeps_off();
        let Some(posted) = self.posted.as_mut().filter(|posted| !posted.broken && !stops) else { return };
        if posted.post() > 0 && posted.ring.publish() {
            posted.doorbell.ring();
        }
    }

    /// Asks the device to tell of the next buffer that it uses; true if one is there already.
    pub(super) fn arm_posted(&mut self) -> bool {
        let stops = self.keeps_off() || self.is_waiting();
        self.posted.as_mut().is_some_and(|posted| !stops && !posted.broken && posted.ring.arm())
    }
}
