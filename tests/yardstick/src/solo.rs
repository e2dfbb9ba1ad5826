//! The host's path by itself: the device is served by the client's own thread, between submitting and reaping, so no other core, no other process and no scheduler has a part in
//! the figures. They are what a profile of the path is taken from (`--solo`), and what a change of it is judged by on a busy machine: medians of some thousand batches.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cofferdam_device::{DmaRegion, Doorbell, QueueEvents, QueueSetup, Silence, Transport, TransportError};
use cofferdam_manager::LoadSpec;
use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;

use crate::backend::CAPACITY_BYTES;
use crate::clients::bare::RING_ENTRIES;
use crate::clients::cofferdam::{Host, InProcess};
use crate::clients::{Client, native};
use crate::engine::{Engine, Io, Job, Mode, Op};
use crate::null::solo::Served;
use crate::null::{NullDisk, Pace};
use crate::stats::median;

/// Nanoseconds per request, each part by itself.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Solo {
    /// `cofferdam`, or `native` for the same without a sandbox.
    pub client: &'static str,
    /// Requests that are submitted together.
    pub batch: u32,
    /// Submitting.
    pub submit_ns: f64,
    /// The null device.
    pub device_ns: f64,
    /// Reaping.
    pub reap_ns: f64,
    /// A look at a ring with nothing new, per look.
    pub empty_look_ns: f64,
}

const DISK: NullDisk = NullDisk { capacity_bytes: CAPACITY_BYTES, queues: 1, pace: Pace::Poll };

/// The queues of a device that were set up, by index.
pub(crate) type Queues = Arc<Mutex<Vec<Option<Served>>>>;

/// The device, as the manager sees it.
pub(crate) struct SoloTransport {
    kind: u32,
    config: Vec<u8>,
    queues: u16,
    regions: Vec<Arc<DmaRegion>>,
    served: Queues,
    offered: u64,
    accepted: u64,
}

impl SoloTransport {
    /// A device of this type (virtio 1.2, section 5) and its queues, for whoever serves them.
    pub(crate) fn new(kind: u32, config: Vec<u8>, queues: u16, offered: u64) -> (SoloTransport, Queues) {
        let served = Queues::default();
        let device = SoloTransport {
            kind,
            config,
            queues,
            regions: Vec::new(),
            served: Arc::clone(&served),
            offered,
            accepted: 0,
        };
        (device, served)
    }
}

/// The queue of this index, once.
pub(crate) fn take(queues: &Queues, index: usize) -> Result<Served> {
    let mut queues = queues.lock().unwrap_or_else(PoisonError::into_inner);
    queues.get_mut(index).and_then(Option::take).context("no queue was set up")
}

struct NoBell;

impl Doorbell for NoBell {
    fn ring(&self) {}
}

fn failed(error: impl Into<std::io::Error>) -> TransportError {
    TransportError::Invalid(error.into().to_string())
}

fn event() -> Result<OwnedFd, TransportError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)
}

impl Transport for SoloTransport {
    fn address(&self) -> &str {
        "solo:"
    }

    fn device_type(&self) -> Option<u32> {
        Some(self.kind)
    }

    fn offered_features(&self) -> u64 {
        self.offered
    }

    fn negotiate(&mut self, features: u64) -> Result<(), TransportError> {
        self.accepted = features;
        Ok(())
    }

    fn read_config(&mut self, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        let bytes = self.config.get(offset as usize..).unwrap_or_default();
        for (at, byte) in into.iter_mut().enumerate() {
            *byte = bytes.get(at).copied().unwrap_or_default();
        }
        Ok(())
    }

    fn max_queues(&self) -> u16 {
        self.queues
    }

    fn max_queue_size(&self, _: u16) -> u16 {
        RING_ENTRIES
    }

    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.regions.push(region);
        Ok(())
    }

    fn setup_queue_with(&mut self, setup: QueueSetup, call: OwnedFd) -> Result<QueueEvents, TransportError> {
        let mut regions = Vec::new();
        for region in &self.regions {
            let file = File::from(region.fd().try_clone_to_owned().map_err(failed)?);
            regions.push((region.iova(), region.len(), file));
        }
        let addresses = (setup.addresses.descriptors, setup.addresses.available, setup.addresses.used);
        let served = Served::new(&regions, addresses, setup.size, self.accepted, event()?).map_err(failed)?;
        let mut queues = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::from(setup.index);
        if queues.len() <= index {
            queues.resize_with(index + 1, || None);
        }
        queues[index] = Some(served);
        Ok(QueueEvents { doorbell: Box::new(NoBell), call })
    }

    fn start(&mut self) -> Result<(), TransportError> {
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_lost(&mut self) -> bool {
        false
    }

    fn quiesce(&mut self, _: usize, _: Instant) -> Silence {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Silence::Confirmed
    }

    fn release(&mut self) {
        self.regions.clear();
    }
}

/// Measures batches of `batch` random reads for `length`.
///
/// # Errors
/// When the load fails or a request is not answered.
pub fn measure(host: &Host, client: Client, batch: u32, length: Duration) -> Result<Solo> {
    let (transport, queues) = SoloTransport::new(2, DISK.config().to_vec(), 1, NullDisk::FEATURES);
    let mut spec = LoadSpec::new("virtio-blk.wasm", host.component.clone(), Box::new(transport));
    spec.ring_entries = RING_ENTRIES;
    let binding =
        if client == Client::Native { native::load(host, spec.transport, 1)? } else { host.manager.load(spec)? };
    let mut engine = InProcess::of(host, binding, Mode::Poll)?;
    engine.prepare(Job { op: Op::RandRead, depth: batch })?;
    let mut device = take(&queues, 0)?;
    let mut done: Vec<u32> = (0..batch).collect();
    let mut requests = Vec::with_capacity(batch as usize);
    let mut parts: [Vec<f64>; 4] = Default::default();
    let (start, mut block) = (Instant::now(), 0_u64);
    while start.elapsed() < length {
        requests.clear();
        for tag in done.drain(..) {
            block = (block + 77_777) % (CAPACITY_BYTES / 4096);
            requests.push(Io { tag, offset: block * 4096 });
        }
        let begun = Instant::now();
        engine.submit(&requests)?;
        let submitted = Instant::now();
        device.serve();
        let answered = Instant::now();
        engine.reap(&mut done)?;
        let reaped = Instant::now();
        anyhow::ensure!(done.len() == batch as usize, "{} of {batch} are answered", done.len());
        engine.reap(&mut done)?;
        let looked = Instant::now();
        let spans = [submitted - begun, answered - submitted, reaped - answered, looked - reaped];
        for (part, span) in parts.iter_mut().zip(spans) {
            part.push(span.as_secs_f64() * 1e9);
        }
    }
    let [submit, device_part, reap, look] = parts.map(|part| median(&part));
    let each = f64::from(batch);
    Ok(Solo {
        client: client.name(),
        batch,
        submit_ns: submit / each,
        device_ns: device_part / each,
        reap_ns: reap / each,
        empty_look_ns: look,
    })
}

/// Measures these batches, or the usual ones if there are none.
///
/// # Errors
/// As [`measure`].
pub fn all(host: &Host, batches: &[u32], length: Duration) -> Result<Vec<Solo>> {
    let batches = if batches.is_empty() { &[1, 4, 16, 32, 64, 128] } else { batches };
    let both = |batch: &u32| [Client::Cofferdam, Client::Native].map(|client| measure(host, client, *batch, length));
    batches.iter().flat_map(both).collect()
}

/// As lines.
#[must_use]
pub fn lines(parts: &[Solo]) -> String {
    let mut text =
        String::from("\nthe host's path by itself, ns per request (each part with one look at the clock per batch)\n");
    text += "  batch client      submit   device     reap  empty look\n";
    for Solo { client, batch, submit_ns, device_ns, reap_ns, empty_look_ns } in parts {
        text += &format!(
            "  {batch:>5} {client:9} {submit_ns:>8.1} {device_ns:>8.1} {reap_ns:>8.1} {empty_look_ns:>11.1}\n"
        );
    }
    text
}
