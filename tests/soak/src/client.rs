//! Clients that keep a number of requests in flight until their binding leaves, and account for every one of them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use cofferdam_manager::{
    Binding, Buffer, Completion, Handle, HandleSpec, HandleState, IoError, IoFlags, IoOp, IoRequest, LeaseError,
    SubmitError,
};
use cofferdam_process_tests::nbd;

/// Bytes of each request.
const BLOCK: u32 = 4096;
/// Requests go to the first half of the medium; what the drivers that fail on command listen to is in the other half.
const BLOCKS: u64 = crate::backend::MEDIUM_BYTES / 2 / BLOCK as u64;
/// `NBD_EIO`: how a fault of the device or of its driver is answered.
const EIO: u32 = 5;
/// Longest wait for anything that has to come.
const PATIENCE: Duration = Duration::from_secs(15);

/// What a client is told.
#[derive(Default)]
struct Orders {
    stop: AtomicBool,
    driver_fails: AtomicBool,
}

impl Orders {
    fn stop(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn driver_fails(&self) -> bool {
        self.driver_fails.load(Ordering::Acquire)
    }
}

/// A client on a thread of its own.
pub struct Client {
    answered: Arc<AtomicU64>,
    orders: Arc<Orders>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    name: &'static str,
}

impl Client {
    fn start(
        name: &'static str,
        work: impl FnOnce(&AtomicU64, &Orders) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Client> {
        let (answered, orders) = (Arc::new(AtomicU64::new(0)), Arc::new(Orders::default()));
        let (count, told) = (Arc::clone(&answered), Arc::clone(&orders));
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&count, &told))?;
        Ok(Client { answered, orders, thread: Some(thread), name })
    }

    /// A client in this process, with `depth` requests in flight.
    pub fn in_process(binding: &Arc<Binding>, depth: usize, seed: u64) -> anyhow::Result<(Client, u64)> {
        let handle =
            binding.open(HandleSpec { label: "in-process".into(), peer: "soak".into(), ..HandleSpec::default() })?;
        let id = handle.id();
        let work = move |answered: &AtomicU64, orders: &Orders| {
            InProcess { handle, depth, outstanding: 0, next: 0, random: fastrand::Rng::with_seed(seed) }
                .run(answered, orders)
        };
        Ok((Client::start("soak-client", work)?, id))
    }

    /// An NBD client on the Unix socket `path`.
    pub fn nbd(path: &Path, depth: usize, seed: u64) -> anyhow::Result<Client> {
        let client = nbd::Client::new(path);
        let mut random = fastrand::Rng::with_seed(seed);
        Client::start("soak-nbd", move |answered, orders| over_nbd(client, depth, &mut random, answered, orders))
    }

    /// Waits until it has had some answers: then it has as many requests in flight as it can.
    pub fn wait_busy(&mut self, answers: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.answered.load(Ordering::Relaxed) < answers {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                self.join()?;
                bail!("the {} client has ended already", self.name);
            }
            ensure!(Instant::now() < deadline, "the {} client gets no answers", self.name);
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Waits for its end, which the binding's end brings about; what it has to complain about.
    pub fn end(mut self) -> anyhow::Result<()> {
        self.join()
    }

    /// Says that the driver is about to be told to fail. From here on a request may be answered with an error: [`IoError::DeviceFault`] if the driver failed over the
    /// batch that it came with, [`IoError::Io`] if the device answered and no driver was left to judge that. Before, no error but a revocation is taken.
    pub fn expect_failures(&self) {
        self.orders.driver_fails.store(true, Ordering::Release);
    }

    fn join(&mut self) -> anyhow::Result<()> {
        let thread = self.thread.take().context("it has a thread")?;
        thread.join().map_err(|_| anyhow!("the {} client panicked", self.name))?.with_context(|| self.name)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.orders.stop.store(true, Ordering::Relaxed);
    }
}

struct InProcess {
    handle: Handle,
    depth: usize,
    outstanding: usize,
    next: u64,
    random: fastrand::Rng,
}

impl InProcess {
    fn run(mut self, answered: &AtomicU64, orders: &Orders) -> anyhow::Result<()> {
        let mut done = Vec::with_capacity(self.depth);
        while !orders.stop() && self.fill()? {
            self.handle.wait(Duration::from_millis(50), &mut done);
            self.settle(&mut done, answered, orders)?;
        }
        // What was admitted is answered exactly once, whatever happened.
        let deadline = Instant::now() + PATIENCE;
        while self.outstanding > 0 {
            ensure!(Instant::now() < deadline, "{} requests were admitted and never answered", self.outstanding);
            self.handle.wait(Duration::from_millis(50), &mut done);
            self.settle(&mut done, answered, orders)?;
        }
        Ok(())
    }

    /// Submits up to the depth; false when the handle is over.
    fn fill(&mut self) -> anyhow::Result<bool> {
        let mut batch = Vec::with_capacity(self.depth);
        while self.outstanding + batch.len() < self.depth {
            let buffer = match self.handle.lease(BLOCK) {
                Ok(buffer) => buffer,
                Err(LeaseError::Exhausted) => break,
                Err(LeaseError::Revoked) => return Ok(false),
                Err(error) => bail!(error),
            };
            let op = if self.random.bool() { IoOp::Read } else { IoOp::Write };
            batch.push(request(self.next, op, self.random.u64(..BLOCKS) * u64::from(BLOCK), buffer));
            self.next += 1;
        }
        let asked = batch.len();
        let result = self.handle.submit(&mut batch);
        self.outstanding += asked - batch.len();
        match result {
            Ok(()) | Err(SubmitError::Full | SubmitError::Held | SubmitError::Inside) => {
                Ok(self.handle.state() != HandleState::Revoked)
            }
            Err(SubmitError::Revoked) => Ok(false),
        }
    }

    fn settle(&mut self, done: &mut Vec<Completion>, answered: &AtomicU64, orders: &Orders) -> anyhow::Result<()> {
        for completion in done.drain(..) {
            ensure!(self.outstanding > 0, "request {} was answered twice", completion.user);
            self.outstanding -= 1;
            match completion.result {
                Ok(()) | Err(IoError::Revoked) => {}
                Err(IoError::DeviceFault | IoError::Io) if orders.driver_fails() => {}
                Err(error) => bail!("request {} was answered: {error}", completion.user),
            }
            answered.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Reads and writes at depth until the server says that it is going or hangs up; then takes what is still sent.
fn over_nbd(
    mut client: nbd::Client,
    depth: usize,
    random: &mut fastrand::Rng,
    answered: &AtomicU64,
    orders: &Orders,
) -> anyhow::Result<()> {
    let data = vec![0x5a; BLOCK as usize];
    let (mut outstanding, mut going) = (0, false);
    loop {
        while outstanding < depth && !going {
            let offset = random.u64(..BLOCKS) * u64::from(BLOCK);
            let sent = if random.bool() {
                client.send(nbd::Command::Read, offset, BLOCK)
            } else {
                client.send_write(offset, &data)
            };
            // The server has hung up; there may be answers in the socket still.
            going = sent.is_err();
            outstanding += 1;
        }
        match client.reply() {
            Ok(reply) if reply.error == 0 || reply.error == EIO && orders.driver_fails() => outstanding -= 1,
            Ok(reply) if reply.error == nbd::ESHUTDOWN => {
                outstanding -= 1;
                going = true;
            }
            Ok(reply) => bail!("request {} was answered with error {}", reply.cookie, reply.error),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                bail!("the server neither answers nor hangs up")
            }
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => bail!(error),
            // The end. Requests that were sent while the server hung up have no answer.
            Err(_) => return Ok(()),
        }
        answered.fetch_add(1, Ordering::Relaxed);
    }
}

fn request(user: u64, op: IoOp, offset: u64, buffer: Buffer) -> IoRequest {
    let length = buffer.len();
    IoRequest { user, op, offset, length, flags: IoFlags::default(), buffer: Some(buffer) }
}

/// Submits one request whose answer nobody waits for here. If the driver fails over it at once, the handle is over before this comes back.
pub fn send(handle: &Handle, op: IoOp, offset: u64) -> anyhow::Result<()> {
    let buffer = handle.lease(BLOCK)?;
    submit(handle, request(0, op, offset, buffer))
}

/// The same for a flush.
pub fn send_flush(handle: &Handle) -> anyhow::Result<()> {
    let flags = IoFlags::default();
    submit(handle, IoRequest { user: 0, op: IoOp::Flush, offset: 0, length: 0, flags, buffer: None })
}

fn submit(handle: &Handle, request: IoRequest) -> anyhow::Result<()> {
    match handle.submit(&mut vec![request]) {
        Ok(()) | Err(SubmitError::Revoked) => Ok(()),
        Err(error) => bail!(error),
    }
}

/// Writes a stamp and reads it back, each waited for.
pub fn write_and_read(handle: &Handle, stamp: u64) -> anyhow::Result<()> {
    let offset = stamp % BLOCKS * u64::from(BLOCK);
    let bytes = stamp.to_le_bytes();
    let buffer = handle.lease(BLOCK)?;
    buffer.write_at(0, &bytes)?;
    one(handle, request(1, IoOp::Write, offset, buffer))?;
    let answer = one(handle, request(2, IoOp::Read, offset, handle.lease(BLOCK)?))?;
    let mut read = [0; 8];
    answer.buffer.context("a read comes back with its buffer")?.read_at(0, &mut read)?;
    ensure!(read == bytes, "read {read:?} after writing {bytes:?}");
    Ok(())
}

fn one(handle: &Handle, request: IoRequest) -> anyhow::Result<Completion> {
    let mut done = Vec::new();
    handle.submit(&mut vec![request])?;
    handle.wait(PATIENCE, &mut done);
    let answer = done.pop().context("a request is not answered")?;
    answer.result?;
    Ok(answer)
}
