//! What is measured, and the one closed loop in which every client is measured.
//!
//! ```text
//! free tags -> requests -> Engine::submit -> device
//!     ^                                        |
//!     +---- Engine::reap <---------------------+     until the time is over; then what is in flight is waited for, uncounted
//! ```

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::counting;

/// Longest silence of a device.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum Op {
    /// 4 KiB anywhere.
    RandRead,
    /// 4 KiB anywhere.
    RandWrite,
    /// 128 KiB, one after the other.
    SeqRead,
    /// 128 KiB, one after the other.
    SeqWrite,
}

impl Op {
    /// As in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Op::RandRead => "randread",
            Op::RandWrite => "randwrite",
            Op::SeqRead => "seqread",
            Op::SeqWrite => "seqwrite",
        }
    }

    /// Bytes of one request.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Op::RandRead | Op::RandWrite => 4096,
            Op::SeqRead | Op::SeqWrite => 128 << 10,
        }
    }

    /// Whether the device writes the payload.
    #[must_use]
    pub fn reads(self) -> bool {
        matches!(self, Op::RandRead | Op::SeqRead)
    }
}

/// How a client waits for answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum Mode {
    /// It looks all the time.
    Poll,
    /// It sleeps whenever there is nothing.
    Event,
    /// What its user gets who says nothing: it looks for a while and then sleeps.
    Adaptive,
}

impl Mode {
    /// As in the JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Mode::Poll => "poll",
            Mode::Event => "event",
            Mode::Adaptive => "adaptive",
        }
    }
}

/// One kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job {
    /// What requests do.
    pub op: Op,
    /// Requests in flight, over all queues.
    pub depth: u32,
}

/// One request; its tag is below the job's depth and belongs to one request at a time. Of two queues it goes to `tag % 2`.
#[derive(Clone, Copy, Debug)]
pub struct Io {
    /// Names the request, its buffer and its queue.
    pub tag: u32,
    /// First byte on the medium.
    pub offset: u64,
}

/// A client with a device, ready to work.
pub trait Engine {
    /// Size of the medium in bytes.
    fn capacity(&self) -> u64;

    /// Gets ready for a job: buffers are taken here and used again for every request. Nothing is in flight.
    ///
    /// # Errors
    /// When it cannot.
    fn prepare(&mut self, job: Job) -> Result<()>;

    /// Gives requests to the device.
    ///
    /// # Errors
    /// When it refuses them.
    fn submit(&mut self, requests: &[Io]) -> Result<()>;

    /// Adds the tags of answered requests. May wait as its mode says, at most [`PATIENCE`], and may find nothing.
    ///
    /// # Errors
    /// When a request failed.
    fn reap(&mut self, done: &mut Vec<u32>) -> Result<()>;

    /// Calls into a sandboxed driver so far, where there is one.
    fn crossings(&self) -> Option<u64> {
        None
    }
}

/// What happened in a measured while.
#[derive(Clone, Debug, Default)]
pub struct Slice {
    /// Requests answered.
    pub requests: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// From submission to answer of every so-maniest request.
    pub latencies_ns: Vec<u32>,
    /// Crossings.
    pub crossings: Option<u64>,
    /// Allocations of the client's thread, where they are counted.
    pub allocations: u64,
    /// System calls of the client's thread, where they are counted.
    pub system_calls: Option<u64>,
    /// Processor time.
    pub times: Times,
    /// Where the cores were meanwhile; `None` where nobody asked.
    pub apart: Option<Apart>,
}

/// Nanoseconds between the two cores ([`crate::machine::distance_ns`]), just before something and just after it.
#[derive(Clone, Copy, Debug)]
pub struct Apart {
    /// Before.
    pub before: f64,
    /// After.
    pub after: f64,
}

impl Apart {
    /// Whether the cores stayed where they were, here and there alike: within a factor of two, where near and far are a factor of five from each other.
    #[must_use]
    pub fn is_like(self, other: Apart) -> bool {
        let all = [self.before, self.after, other.before, other.after];
        let (near, far) = (all.into_iter().fold(f64::INFINITY, f64::min), all.into_iter().fold(0.0, f64::max));
        far <= 2.0 * near
    }
}

/// Processor time, so far or in between.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Of the calling thread.
    pub client: Duration,
    /// Of all other threads of this process: a port's, if there is one.
    pub port: Duration,
    /// Of the device's process.
    pub device: Duration,
}

impl Times {
    /// What has passed since `before`.
    #[must_use]
    pub fn since(self, before: Times) -> Times {
        Times {
            client: self.client.saturating_sub(before.client),
            port: self.port.saturating_sub(before.port),
            device: self.device.saturating_sub(before.device),
        }
    }
}

/// Latencies that one slice keeps.
const SAMPLES: usize = 4096;

/// The loop and its memory, which is taken once.
pub struct Loop {
    job: Job,
    blocks: u64,
    /// State of the generator of offsets, or the next block.
    state: u64,
    batch: Vec<Io>,
    done: Vec<u32>,
    stamps: Vec<Option<Instant>>,
    submitted: u64,
    every: u64,
    slice: Slice,
}

impl Loop {
    /// Gets ready for `job`.
    ///
    /// # Errors
    /// What the engine says.
    pub fn new(engine: &mut dyn Engine, job: Job) -> Result<Loop> {
        engine.prepare(job)?;
        let depth = job.depth as usize;
        Ok(Loop {
            job,
            blocks: engine.capacity() / u64::from(job.op.bytes()),
            state: 0x9e37_79b9_7f4a_7c15,
            batch: Vec::with_capacity(depth),
            done: Vec::with_capacity(depth),
            stamps: vec![None; depth],
            submitted: 0,
            // Two looks at the clock are some 50 ns; an odd number, so that no tag of a batch is preferred.
            every: if job.depth == 1 { 17 } else { 61 },
            slice: Slice { latencies_ns: Vec::with_capacity(SAMPLES), ..Slice::default() },
        })
    }

    /// Runs for `warm_up`, then for `length`, and counts the latter; `times` is asked before and after.
    ///
    /// # Errors
    /// What the engine says; a device that does not answer.
    pub fn run(
        &mut self,
        engine: &mut dyn Engine,
        warm_up: Duration,
        length: Duration,
        times: &dyn Fn() -> Result<Times>,
    ) -> Result<Slice> {
        self.done.extend(0..self.job.depth);
        self.turns(engine, warm_up)?;
        let latencies_ns = std::mem::take(&mut self.slice.latencies_ns);
        self.slice = Slice { latencies_ns, ..Slice::default() };
        self.slice.latencies_ns.clear();
        self.submitted = 0;
        let crossings = engine.crossings();
        let before = times()?;
        let (allocations, calls) = (counting::allocations(), counting::system_calls());
        self.turns(engine, length)?;
        let system_calls = counting::system_calls().zip(calls).map(|(after, before)| after - before);
        let allocations = counting::allocations() - allocations;
        let crossings = engine.crossings().zip(crossings).map(|(after, before)| after - before);
        let times = times()?.since(before);
        let slice = Slice { crossings, allocations, system_calls, times, ..std::mem::take(&mut self.slice) };
        self.finish(engine)?;
        Ok(slice)
    }

    fn turns(&mut self, engine: &mut dyn Engine, length: Duration) -> Result<()> {
        let start = Instant::now();
        let mut heard = start;
        loop {
            // A look at the clock for every so many turns, and one at the start of each round of them.
            for _ in 0..16 {
                for at in 0..self.done.len() {
                    let io = self.next(self.done[at]);
                    self.batch.push(io);
                }
                self.done.clear();
                if !self.batch.is_empty() {
                    engine.submit(&self.batch)?;
                    self.batch.clear();
                }
                engine.reap(&mut self.done)?;
                self.note();
            }
            let now = Instant::now();
            if !self.done.is_empty() {
                heard = now;
            }
            ensure!(now - heard < PATIENCE, "the device does not answer");
            // On a busy machine the device may not have had a turn yet, and a rate of nothing is no figure.
            if now - start >= length && self.slice.requests > 0 {
                self.slice.elapsed += now - start;
                return Ok(());
            }
        }
    }

    /// Waits for what is in flight.
    fn finish(&mut self, engine: &mut dyn Engine) -> Result<()> {
        let start = Instant::now();
        let mut left = self.job.depth as usize - self.done.len();
        while left > 0 {
            self.done.clear();
            engine.reap(&mut self.done)?;
            left -= self.done.len();
            ensure!(start.elapsed() < PATIENCE, "{left} requests are not answered");
        }
        self.done.clear();
        self.stamps.fill(None);
        Ok(())
    }

    #[inline]
    fn next(&mut self, tag: u32) -> Io {
        let bytes = u64::from(self.job.op.bytes());
        let block = match self.job.op {
            Op::RandRead | Op::RandWrite => {
                // xorshift64, and the upper half of a product instead of a division.
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
                ((u128::from(self.state) * u128::from(self.blocks)) >> 64) as u64
            }
            Op::SeqRead | Op::SeqWrite => {
                self.state = if self.state >= self.blocks { 0 } else { self.state };
                self.state += 1;
                self.state - 1
            }
        };
        self.submitted += 1;
        if self.submitted % self.every == 1 {
            self.stamps[tag as usize] = Some(Instant::now());
        }
        Io { tag, offset: block * bytes }
    }

    #[inline]
    fn note(&mut self) {
        self.slice.requests += self.done.len() as u64;
        for tag in &self.done {
            if let Some(stamp) = self.stamps[*tag as usize].take()
                && self.slice.latencies_ns.len() < SAMPLES
            {
                self.slice.latencies_ns.push(u32::try_from(stamp.elapsed().as_nanos()).unwrap_or(u32::MAX));
            }
        }
    }
}
