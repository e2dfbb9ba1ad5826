//! A small client of the in-process handle.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cofferdam_manager::{
    Binding, BlockGeometry, Completion, Handle, HandleSpec, IoError, IoFlags, IoOp, IoRequest, SubmitError,
};

/// Longest wait for a device that is supposed to answer.
const PATIENCE: Duration = Duration::from_secs(20);

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
    pub fn open(binding: &Arc<Binding>, lane: usize) -> anyhow::Result<Client> {
        let handle = binding.open(HandleSpec {
            label: "in-process".into(),
            peer: "conformance".into(),
            lane,
            ..HandleSpec::default()
        })?;
        Ok(Client { handle, next: 1, early: HashMap::new() })
    }

    /// The handle itself.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// What the device can do.
    #[must_use]
    pub fn geometry(&self) -> BlockGeometry {
        self.handle.geometry().clone()
    }

    /// Submits one request without waiting for it; its name.
    ///
    /// # Errors
    /// When it is not admitted.
    pub fn start(&mut self, op: IoOp, offset: u64, length: u32, data: Option<&[u8]>) -> anyhow::Result<u64> {
        let buffer = match op {
            IoOp::Read | IoOp::Write | IoOp::GetId => Some(self.handle.lease(length.max(1))?),
            _ => None,
        };
        if let (Some(buffer), Some(data)) = (&buffer, data) {
            buffer.write_at(0, data)?;
        }
        let user = self.next;
        self.next += 1;
        let mut one = vec![IoRequest { user, op, offset, length, flags: IoFlags::default(), buffer }];
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.handle.submit(&mut one) {
                Ok(()) => return Ok(user),
                Err(SubmitError::Full) => self.collect(Duration::from_millis(100)),
                Err(error) => bail!(error),
            }
            ensure!(Instant::now() < deadline, "the lane stays full");
        }
    }

    fn collect(&mut self, wait: Duration) {
        let mut done = Vec::new();
        self.handle.wait(wait, &mut done);
        for completion in done {
            let twice = self.early.insert(completion.user, completion);
            assert!(twice.is_none(), "a request was answered twice");
        }
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
            self.collect(Duration::from_millis(500));
        }
    }

    /// One request, start to end.
    ///
    /// # Errors
    /// When it is not admitted or not answered; how the device answered is the inner result.
    pub fn one(
        &mut self,
        op: IoOp,
        offset: u64,
        length: u32,
        data: Option<&[u8]>,
    ) -> anyhow::Result<Result<Completion, IoError>> {
        let user = self.start(op, offset, length, data)?;
        let completion = self.finish(user)?;
        Ok(completion.result.map(|()| completion))
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
