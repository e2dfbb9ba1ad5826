//! Ours: the manager, the sandboxed virtio-net and an in-process handle, as a program that embeds them would use them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use cofferdam_device::Transport;
use cofferdam_manager::{Arrivals, Buffer, Completion, Handle, HandleSpec, IoFlags, IoOp, IoRequest, LoadSpec, Offer};

use super::job::{Direction, Job, Station, within_patience};
use crate::clients::cofferdam::{Host, Loaded, connect as reach};

/// Entries of the transmit ring: two descriptors for each of 128 frames, and none of them indirect.
const TRANSMIT_ENTRIES: u16 = 512;

/// Loads the driver and opens a handle.
///
/// # Errors
/// When the load fails.
pub fn connect(host: &Host, socket: &Path, job: Job) -> Result<Box<dyn Station>> {
    let (loaded, handle) =
        open(host, socket, if job.direction == Direction::Send { TRANSMIT_ENTRIES } else { job.depth })?;
    Ok(match job.direction {
        Direction::Send => Box::new(Sender::new(loaded, handle, job)?),
        Direction::Receive => Box::new(Receiver { arrivals: Arrivals::new(), handle, loaded }),
    })
}
/// A binding with rings of at most so many entries, and a handle that sends and receives.
///
/// # Errors
/// When the load fails.
pub fn open(host: &Host, socket: &Path, ring_entries: u16) -> Result<(Loaded, Handle)> {
    on(host, Box::new(reach(socket)?), ring_entries)
}

/// The same on a device that was reached in whatever way.
///
/// # Errors
/// As [`open`].
pub fn on(host: &Host, transport: Box<dyn Transport>, ring_entries: u16) -> Result<(Loaded, Handle)> {
    let mut spec = LoadSpec::new("virtio-net.wasm", host.component.clone(), transport);
    spec.ring_entries = ring_entries;
    let binding = host.manager.load(spec)?;
    let loaded = Loaded { manager: host.manager.clone(), binding };
    let offer = loaded.binding.offer().context("no offer")?;
    ensure!(matches!(*offer, Offer::Net(_)), "not a network device");
    let handle =
        loaded.binding.open(HandleSpec { label: "in-process".into(), receives: true, ..HandleSpec::default() })?;
    Ok((loaded, handle))
}

/// What sends.
pub(super) struct Sender {
    bytes: u32,
    depth: usize,
    /// With the buffers that the device does not have.
    requests: Vec<IoRequest>,
    completions: Vec<Completion>,
    handle: Handle,
    /// Last: it takes the device away.
    loaded: Loaded,
}

fn request(length: u32, buffer: Option<Buffer>) -> IoRequest {
    IoRequest { user: 0, op: IoOp::Transmit, offset: 0, length, flags: IoFlags::default(), buffer }
}

impl Sender {
    /// Leases and fills the buffers.
    ///
    /// # Errors
    /// When there are not enough.
    pub(super) fn new(loaded: Loaded, handle: Handle, job: Job) -> Result<Sender> {
        let (bytes, depth) = (job.bytes, usize::from(job.depth));
        let mut requests = Vec::with_capacity(depth);
        for _ in 0..depth {
            let buffer = handle.lease(bytes)?;
            buffer.write_at(0, &super::bare::frame(bytes))?;
            requests.push(request(bytes, Some(buffer)));
        }
        Ok(Sender { bytes, depth, requests, completions: Vec::with_capacity(depth), handle, loaded })
    }

    /// Sends what the device does not have.
    pub(super) fn submit(&mut self) -> Result<()> {
        Ok(self.handle.submit(&mut self.requests)?)
    }

    /// Takes what is answered.
    pub(super) fn look(&mut self) -> Result<u64> {
        self.handle.poll(false, &mut self.completions);
        let count = self.completions.len();
        let (bytes, mut failed) = (self.bytes, None);
        self.requests.extend(self.completions.drain(..).map(|completion| {
            failed = completion.result.err().or(failed);
            request(bytes, completion.buffer)
        }));
        failed.map_or(Ok(count as u64), |error| Err(error.into()))
    }
}

impl Station for Sender {
    fn turn(&mut self) -> Result<u64> {
        if !self.requests.is_empty() {
            self.submit()?;
        }
        self.look()
    }

    fn finish(&mut self) -> Result<u64> {
        let mut count = 0;
        within_patience("the device keeps frames", || {
            count += self.look()?;
            Ok(self.requests.len() == self.depth)
        })?;
        Ok(count)
    }

    fn crossings(&self) -> Option<u64> {
        Some(self.loaded.crossings())
    }
}

struct Receiver {
    arrivals: Arrivals,
    handle: Handle,
    /// Last: it takes the device away.
    loaded: Loaded,
}

impl Station for Receiver {
    fn turn(&mut self) -> Result<u64> {
        self.handle.receive(false, &mut self.arrivals);
        let count = self.arrivals.len() as u64;
        self.arrivals.clear();
        Ok(count)
    }

    fn finish(&mut self) -> Result<u64> {
        Ok(0)
    }

    fn crossings(&self) -> Option<u64> {
        Some(self.loaded.crossings())
    }
}
