//! One client: a connection, the part of the disk that it alone writes, and what it knows of every block there.
//!
//! A block (here: a range that is read and written as one) has at most one request in flight. Its versions count up from 1, so what it may hold is a range:
//!
//! ```text
//! flushed <= acknowledged <= sent
//!    |            |            `- newest version that can be anywhere
//!    |            `- a read through the driver returns this or a later one
//!    `- the medium holds this or a later one
//! ```
//!
//! The three are equal for a block at rest that was flushed; they stay apart for a write whose answer never came.

use super::nbd::{Connection, Operation, Reply, State};
use super::pattern;
use crate::interrupt;
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests that a client keeps in flight.
pub(crate) const DEPTH: usize = 32;
/// Length of an ordinary block, and of every seventeenth.
const BLOCK_BYTES: u32 = 4096;
const LARGE_BLOCK_BYTES: u32 = 65_536;
const BLOCKS_PER_LARGE_ONE: u64 = 16;
/// A flush comes after so many other requests.
const FLUSH_EVERY: u64 = 1024;
/// How long one wait on the socket lasts before the flags are looked at.
const LOOK: Duration = Duration::from_millis(50);
/// A server that answers nothing for so long has lost a request.
const PATIENCE: Duration = Duration::from_secs(10);

/// Errors with which a request may honestly be turned away while the driver leaves: EIO and ESHUTDOWN.
const HONEST_ERRORS: [u32; 2] = [5, 108];

/// What all clients together have seen so far.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

/// How the clients and the story signal each other.
#[derive(Default)]
pub(crate) struct Signals {
    /// The driver is being unloaded: from now on errors and hang-ups are expected.
    pub(crate) leaving: AtomicBool,
    /// Something failed elsewhere: stop at once.
    pub(crate) abandon: AtomicBool,
}

/// How a client's traffic ended.
#[derive(Default)]
pub(crate) struct Ending {
    /// By error number: how many requests were refused with it.
    pub(crate) refused: BTreeMap<u32, u64>,
    /// Requests that were never answered, because the server hung up.
    pub(crate) cut_off: u64,
    /// From sending to answer, of the requests that succeeded.
    pub(crate) latencies_us: Vec<u32>,
}

/// A range of the disk with its versions.
pub(crate) struct Block {
    pub(crate) offset: u64,
    pub(crate) length: u32,
    flushed: u32,
    acknowledged: u32,
    sent: u32,
    busy: bool,
}

enum InFlight {
    Read {
        block: usize,
    },
    Write {
        block: usize,
        version: u32,
    },
    /// With the versions that were acknowledged when the flush was sent: those it promises.
    Flush {
        acknowledged: Vec<u32>,
    },
}

/// A client.
pub(crate) struct Client {
    blocks: Vec<Block>,
    in_flight: Vec<Option<(Instant, InFlight)>>,
    free: Vec<usize>,
    random: u64,
    scratch: Vec<u8>,
}

impl Client {
    /// A client for the `bytes` bytes from `offset` on; both are multiples of the length of 16 ordinary blocks and a large one.
    pub(crate) fn new(offset: u64, bytes: u64) -> Client {
        let group_bytes = BLOCKS_PER_LARGE_ONE * u64::from(BLOCK_BYTES) + u64::from(LARGE_BLOCK_BYTES);
        let blocks = (0..bytes / group_bytes).flat_map(|group| {
            let begin = offset + group * group_bytes;
            let small =
                (0..BLOCKS_PER_LARGE_ONE).map(move |index| (begin + index * u64::from(BLOCK_BYTES), BLOCK_BYTES));
            small.chain([(begin + BLOCKS_PER_LARGE_ONE * u64::from(BLOCK_BYTES), LARGE_BLOCK_BYTES)])
        });
        Client {
            blocks: blocks
                .map(|(offset, length)| Block { offset, length, flushed: 0, acknowledged: 0, sent: 0, busy: false })
                .collect(),
            in_flight: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).collect(),
            random: pattern::mix(offset + 1),
            scratch: vec![0; LARGE_BLOCK_BYTES as usize],
        }
    }

    /// Writes every block, flushes, and reads every block back.
    pub(crate) fn fill(&mut self, connection: &mut Connection, tally: &Tally) -> Result<()> {
        self.pass(connection, tally, |client, connection, block| client.write(connection, block))?;
        self.flush(connection)?;
        self.settle(connection, tally)?;
        self.read_all(connection, tally)
    }

    /// Reads every block and checks it.
    pub(crate) fn read_all(&mut self, connection: &mut Connection, tally: &Tally) -> Result<()> {
        self.pass(connection, tally, |client, connection, block| client.read(connection, block))
    }

    /// Reads and writes blocks at random until the server refuses or hangs up, which it may do only once `signals.leaving` is set.
    pub(crate) fn run(&mut self, connection: &mut Connection, tally: &Tally, signals: &Signals) -> Result<Ending> {
        let mut ending = Ending::default();
        let mut last_answer = Instant::now();
        let mut since_flush = 0;
        loop {
            while ending.refused.is_empty() && !self.free.is_empty() {
                if since_flush >= FLUSH_EVERY {
                    self.flush(connection)?;
                    since_flush = 0;
                } else {
                    self.one_at_random(connection)?;
                    since_flush += 1;
                }
            }
            let before = connection.in_flight();
            let state = self.turn(connection, tally, &mut ending)?;
            if connection.in_flight() < before {
                last_answer = Instant::now();
            }
            let ended = state == State::Closed || !ending.refused.is_empty();
            if ended && !signals.leaving.load(Ordering::Relaxed) {
                bail!("the server refused or hung up although nobody had asked it to: {:?}", ending.refused);
            }
            if state == State::Closed {
                ending.cut_off = connection.in_flight() as u64;
                return Ok(ending);
            }
            if ended && connection.in_flight() == 0 {
                return Ok(ending);
            }
            ensure!(
                last_answer.elapsed() < PATIENCE,
                "{} requests got no answer for {PATIENCE:?}",
                connection.in_flight()
            );
            ensure!(!signals.abandon.load(Ordering::Relaxed), "abandoned");
            interrupt::check()?;
        }
    }

    /// Forgets what a connection that is gone still had in flight. What was sent stays in doubt.
    pub(crate) fn reconnect(&mut self) {
        self.in_flight = (0..DEPTH).map(|_| None).collect();
        self.free = (0..DEPTH).collect();
        for block in &mut self.blocks {
            block.busy = false;
        }
    }

    /// Blocks with at least one write that was never acknowledged.
    pub(crate) fn in_doubt(&self) -> usize {
        self.blocks.iter().filter(|block| block.sent > block.acknowledged).count()
    }

    /// Checks the medium itself; `read` fills the buffer with what is at the offset.
    pub(crate) fn check_medium(&self, mut read: impl FnMut(u64, &mut [u8]) -> std::io::Result<()>) -> Result<()> {
        let mut bytes = vec![0; LARGE_BLOCK_BYTES as usize];
        for block in self.blocks.iter().filter(|block| block.flushed > 0) {
            let bytes = &mut bytes[..block.length as usize];
            read(block.offset, bytes)?;
            pattern::check(bytes, block.offset, block.flushed, block.sent)
                .map_err(|wrong| anyhow!("the medium is wrong: {wrong}"))?;
        }
        Ok(())
    }

    /// Starts one request for each block, in order, and waits for all of them. Every answer must be a success.
    fn pass(
        &mut self,
        connection: &mut Connection,
        tally: &Tally,
        mut start: impl FnMut(&mut Client, &mut Connection, usize) -> Result<()>,
    ) -> Result<()> {
        for block in 0..self.blocks.len() {
            while self.free.is_empty() {
                self.turn_without_refusal(connection, tally)?;
            }
            start(self, connection, block)?;
        }
        self.settle(connection, tally)
    }

    fn settle(&mut self, connection: &mut Connection, tally: &Tally) -> Result<()> {
        while connection.in_flight() > 0 {
            self.turn_without_refusal(connection, tally)?;
        }
        Ok(())
    }

    fn turn_without_refusal(&mut self, connection: &mut Connection, tally: &Tally) -> Result<()> {
        let begin = Instant::now();
        let before = connection.in_flight();
        while connection.in_flight() == before {
            let mut ending = Ending::default();
            let state = self.turn(connection, tally, &mut ending)?;
            ensure!(ending.refused.is_empty(), "refused with NBD error {:?}", ending.refused);
            ensure!(state == State::Open, "the server hung up");
            ensure!(begin.elapsed() < PATIENCE, "{before} requests got no answer for {PATIENCE:?}");
            interrupt::check()?;
        }
        Ok(())
    }

    fn one_at_random(&mut self, connection: &mut Connection) -> Result<()> {
        // There are far more blocks than requests in flight, so a free one is found soon.
        let (block, write) = loop {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let value = pattern::mix(self.random);
            let block = (value >> 1) as usize % self.blocks.len();
            if !self.blocks[block].busy {
                break (block, value & 1 == 1);
            }
        };
        if write { self.write(connection, block) } else { self.read(connection, block) }
    }

    fn read(&mut self, connection: &mut Connection, block: usize) -> Result<()> {
        let cookie = self.begin(InFlight::Read { block })?;
        let block = &mut self.blocks[block];
        block.busy = true;
        connection.push(Operation::Read, cookie, block.offset, block.length, &[]);
        Ok(())
    }

    fn write(&mut self, connection: &mut Connection, block: usize) -> Result<()> {
        let version = self.blocks[block].sent + 1;
        let cookie = self.begin(InFlight::Write { block, version })?;
        let block = &mut self.blocks[block];
        block.busy = true;
        block.sent = version;
        let bytes = &mut self.scratch[..block.length as usize];
        pattern::stamp(bytes, block.offset, version);
        connection.push(Operation::Write, cookie, block.offset, block.length, bytes);
        Ok(())
    }

    fn flush(&mut self, connection: &mut Connection) -> Result<()> {
        let acknowledged = self.blocks.iter().map(|block| block.acknowledged).collect();
        let cookie = self.begin(InFlight::Flush { acknowledged })?;
        connection.push(Operation::Flush, cookie, 0, 0, &[]);
        Ok(())
    }

    fn begin(&mut self, what: InFlight) -> Result<usize> {
        let cookie = self.free.pop().context("no cookie is free")?;
        self.in_flight[cookie] = Some((Instant::now(), what));
        Ok(cookie)
    }

    fn turn(&mut self, connection: &mut Connection, tally: &Tally, ending: &mut Ending) -> Result<State> {
        connection.turn(LOOK, |reply| self.answered(&reply, tally, ending))
    }

    fn answered(&mut self, reply: &Reply<'_>, tally: &Tally, ending: &mut Ending) -> Result<()> {
        let (begin, request) = self.in_flight[reply.cookie].take().context("an answer to nothing")?;
        self.free.push(reply.cookie);
        if let InFlight::Read { block } | InFlight::Write { block, .. } = request {
            self.blocks[block].busy = false;
        }
        if reply.error != 0 {
            ensure!(HONEST_ERRORS.contains(&reply.error), "refused with NBD error {}", reply.error);
            *ending.refused.entry(reply.error).or_default() += 1;
            return Ok(());
        }
        ending.latencies_us.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
        match request {
            InFlight::Read { block } => {
                let block = &self.blocks[block];
                pattern::check(reply.data, block.offset, block.acknowledged, block.sent)
                    .map_err(|wrong| anyhow!("wrong data: {wrong}"))?;
                tally.reads.fetch_add(1, Ordering::Relaxed);
                tally.bytes.fetch_add(u64::from(block.length), Ordering::Relaxed);
            }
            InFlight::Write { block, version } => {
                let block = &mut self.blocks[block];
                block.acknowledged = version;
                tally.writes.fetch_add(1, Ordering::Relaxed);
                tally.bytes.fetch_add(u64::from(block.length), Ordering::Relaxed);
            }
            InFlight::Flush { acknowledged } => {
                for (block, acknowledged) in self.blocks.iter_mut().zip(acknowledged) {
                    block.flushed = block.flushed.max(acknowledged);
                }
                tally.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
