//! A small client of the in-process handle.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cofferdam_manager::{
    Arrival, Arrivals, Binding, BlockGeometry, Completion, Handle, HandleSpec, IoError, IoFlags, IoOp, IoRequest,
    SubmitError,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Longest wait for a device that is supposed to answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// One request, before it has a buffer.
#[derive(Clone, Debug)]
pub struct Ask {
    /// What to do.
    pub op: IoOp,
    /// Modifiers.
    pub flags: u8,
    /// What its service says.
    pub offset: u64,
    /// Bytes of payload, or of the range.
    pub length: u32,
    /// What the buffer holds at first.
    pub data: Vec<u8>,
}

impl Ask {
    /// One whose buffer, if it has one, is as it comes.
    #[must_use]
    pub fn new(op: IoOp, offset: u64, length: u32) -> Ask {
        Ask { op, flags: 0, offset, length, data: Vec::new() }
    }

    /// One with this payload.
    #[must_use]
    pub fn payload(op: IoOp, offset: u64, data: &[u8]) -> Ask {
        Ask::new(op, offset, data.len() as u32).with(data)
    }

    /// The same with this in its buffer.
    #[must_use]
    pub fn with(self, data: &[u8]) -> Ask {
        Ask { data: data.to_vec(), ..self }
    }

    /// The same with modifiers.
    #[must_use]
    pub fn flags(self, flags: u8) -> Ask {
        Ask { flags, ..self }
    }

    /// With a buffer of `handle`'s and a name.
    ///
    /// # Errors
    /// When no buffer is to be had.
    pub fn request(&self, handle: &Handle, user: u64) -> anyhow::Result<IoRequest> {
        let buffer = match self.op.payload() {
            Some(_) => Some(handle.lease(self.length.max(self.data.len() as u32).max(1))?),
            None => None,
        };
        if let Some(buffer) = &buffer {
            buffer.write_at(0, &self.data)?;
        }
        let Ask { op, offset, length, .. } = *self;
        Ok(IoRequest { user, op, offset, length, flags: IoFlags(self.flags), buffer })
    }
}

/// One handle, and how to use it synchronously or at depth.
pub struct Client {
    handle: Handle,
    next: u64,
    early: HashMap<u64, Completion>,
}

impl Client {
    /// Opens a handle on `lane`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn open(binding: &Arc<Binding>, lane: usize, receives: bool) -> anyhow::Result<Client> {
        let handle = binding.open(HandleSpec {
            label: "in-process".into(),
            peer: "conformance".into(),
            lane,
            receives,
            ..HandleSpec::default()
        })?;
        // No two handles have a name in common: an answer that went to the wrong one is one that nobody waits for.
        let next = 1 + handle.id() * 1_000_000;
        Ok(Client { handle, next, early: HashMap::new() })
    }

    /// The handle itself.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What the disk can do.
    #[must_use]
    pub fn geometry(&self) -> BlockGeometry {
        self.handle.geometry().clone()
    }

    /// Submits one request without waiting for it; its name.
    ///
    /// # Errors
    /// When it is not admitted.
    pub fn ask(&mut self, ask: &Ask) -> anyhow::Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        let user = self.name();
        let mut one = vec![ask.request(&self.handle, user)?];
        loop {
            match self.handle.submit(&mut one) {
                Ok(()) => return Ok(user),
                Err(SubmitError::Full) => self.collect(Duration::from_millis(100))?,
                Err(error) => bail!(error),
            }
            ensure!(Instant::now() < deadline, "the lane stays full");
        }
    }

    /// Submits them in one go.
    ///
    /// # Errors
    /// When not all are admitted.
    pub fn ask_all(&mut self, asks: &[Ask]) -> anyhow::Result<Vec<u64>> {
        let mut requests = Vec::new();
        for ask in asks {
            let user = self.name();
            requests.push(ask.request(&self.handle, user)?);
        }
        let users = requests.iter().map(|request| request.user).collect();
        self.handle.submit(&mut requests)?;
        Ok(users)
    }

    fn name(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    /// The same of parts.
    ///
    /// # Errors
    /// When it is not admitted.
    pub fn start(&mut self, op: IoOp, offset: u64, length: u32, data: Option<&[u8]>) -> anyhow::Result<u64> {
        self.ask(&Ask::new(op, offset, length).with(data.unwrap_or_default()))
    }

    fn collect(&mut self, wait: Duration) -> anyhow::Result<()> {
        let mut done = Vec::new();
        self.handle.wait(wait, &mut done);
        self.keep(done)
    }

    fn keep(&mut self, done: Vec<Completion>) -> anyhow::Result<()> {
        for completion in done {
            let user = completion.user;
            ensure!(self.early.insert(user, completion).is_none(), "request {user} was answered twice");
        }
        Ok(())
    }

    /// Waits for a request that was started.
    ///
    /// # Errors
    /// When the device does not answer in time.
    pub fn finish(&mut self, user: u64) -> anyhow::Result<Completion> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(completion) = self.early.remove(&user) {
                return Ok(completion);
            }
            ensure!(Instant::now() < deadline, "request {user} is not answered");
            self.collect(Duration::from_millis(500))?;
        }
    }

    /// What was answered by now and not asked for, without waiting.
    ///
    /// # Errors
    /// When something was answered twice.
    pub fn answers(&mut self) -> anyhow::Result<Vec<Completion>> {
        let mut done = Vec::new();
        self.handle.poll(true, &mut done);
        self.keep(done)?;
        Ok(self.early.drain().map(|(_, completion)| completion).collect())
    }

    /// Answers that came before somebody asked for them.
    #[must_use]
    pub fn surplus(&self) -> usize {
        self.early.len()
    }

    /// One request, start to end.
    ///
    /// # Errors
    /// When it is not admitted or not answered; how the device answered is the inner result.
    pub fn whole(&mut self, ask: &Ask) -> anyhow::Result<Result<Completion, IoError>> {
        let user = self.ask(ask)?;
        let completion = self.finish(user)?;
        Ok(completion.result.map(|()| completion))
    }

    /// The same of parts.
    ///
    /// # Errors
    /// As there.
    pub fn one(
        &mut self,
        op: IoOp,
        offset: u64,
        length: u32,
        data: Option<&[u8]>,
    ) -> anyhow::Result<Result<Completion, IoError>> {
        self.whole(&Ask::new(op, offset, length).with(data.unwrap_or_default()))
    }

    /// Reads, or says why not.
    ///
    /// # Errors
    /// Also when the device fails the request.
    pub fn read(&mut self, offset: u64, length: u32) -> anyhow::Result<Vec<u8>> {
        let completion = self.one(IoOp::Read, offset, length, None)??;
        contents(&completion, length)
    }

    /// Writes, or says why not.
    ///
    /// # Errors
    /// Also when the device fails the request.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> anyhow::Result<()> {
        self.one(IoOp::Write, offset, u32::try_from(data.len())?, Some(data))??;
        Ok(())
    }

    /// Takes what arrived into `into`, waiting for `limit` at most if that is nothing; how much it was.
    pub fn receive(&self, limit: Duration, into: &mut Arrivals) -> usize {
        let before = into.len();
        if self.handle.receive(true, into) == 0 && !limit.is_zero() && self.sleep(limit) {
            self.handle.receive(true, into);
        }
        into.len() - before
    }

    /// Sleeps until something arrives, for `limit` at most; whether it did.
    #[must_use]
    pub fn sleep(&self, limit: Duration) -> bool {
        let Some(fd) = self.handle.arrival_fd() else { return false };
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        matches!(poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&limit)), Ok(1))
    }
}

/// The payload of a read that succeeded.
///
/// # Errors
/// When there is none.
pub(crate) fn contents(completion: &Completion, length: u32) -> anyhow::Result<Vec<u8>> {
    let buffer = completion.buffer.as_ref().context("a read comes back with its buffer")?;
    let mut bytes = vec![0; length as usize];
    buffer.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// What arrived, as bytes.
///
/// # Errors
/// When the device is silent already.
pub(crate) fn bytes(arrival: Arrival<'_>) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    arrival.read(&mut bytes)?;
    Ok(bytes)
}
