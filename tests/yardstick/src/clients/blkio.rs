//! libblkio's vhost-user driver, by its own crate: the native peer.
//!
//! As its documentation has it: one memory region allocated by the library and mapped before the first request, `do_io` with a minimum of one completion. Polling
//! takes its poll queues, sleeping its ordinary ones. Its rings are as large as the other clients' (it needs three descriptors per request and never uses
//! indirect ones).
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use anyhow::{Result, anyhow, ensure};
use blkio::{Blkioq, Completion, ReqFlags};

use super::bare::RING_ENTRIES;
use crate::backend::Backend;
use crate::engine::{Engine, Io, Job, Mode, Op, PATIENCE};

const BUFFERS_BYTES: usize = 64 << 20;

/// The client.
pub struct Blkio {
    queues: Vec<Blkioq>,
    job: Job,
    buffers: *mut u8,
    capacity: u64,
    in_flight: usize,
    completions: Vec<MaybeUninit<Completion>>,
    mode: Mode,
    /// Last: it owns the buffers and the connection.
    _library: blkio::Blkio,
}

fn failed(error: blkio::Error) -> anyhow::Error {
    anyhow!("blkio: {error}")
}

impl Blkio {
    /// Connects and starts.
    ///
    /// # Errors
    /// What the library says.
    pub fn connect(device: &Backend, mode: Mode, queues: u16) -> Result<Blkio> {
        ensure!(mode != Mode::Adaptive, "libblkio has no such mode");
        let socket = device.socket();
        let mut library = blkio::Blkio::new("virtio-blk-vhost-user").map_err(failed)?;
        library.set_str("path", &socket.to_string_lossy()).map_err(failed)?;
        library.connect().map_err(failed)?;
        library.set_i32("queue-size", i32::from(RING_ENTRIES)).map_err(failed)?;
        let (plain, polled) = if mode == Mode::Poll { (0, queues) } else { (queues, 0) };
        library.set_i32("num-queues", plain.into()).map_err(failed)?;
        library.set_i32("num-poll-queues", polled.into()).map_err(failed)?;
        let capacity = library.get_u64("capacity").map_err(failed)?;
        let started = library.start().map_err(failed)?;
        let region = library.alloc_mem_region(BUFFERS_BYTES).map_err(failed)?;
        library.map_mem_region(&region).map_err(failed)?;
        let queues = if mode == Mode::Poll { started.poll_queues } else { started.queues };
        ensure!(!queues.is_empty(), "no queue");
        let completions = std::iter::repeat_with(MaybeUninit::uninit).take(256).collect();
        Ok(Blkio {
            queues,
            job: Job { op: Op::RandRead, depth: 0 },
            buffers: std::ptr::with_exposed_provenance_mut(region.addr),
            capacity,
            in_flight: 0,
            completions,
            mode,
            _library: library,
        })
    }
}

impl Engine for Blkio {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn prepare(&mut self, job: Job) -> Result<()> {
        let bytes = job.depth as usize * job.op.bytes() as usize;
        ensure!(bytes <= BUFFERS_BYTES, "not enough buffers");
        ensure!(self.in_flight == 0, "requests are in flight");
        // SAFETY: the library's region is `BUFFERS_BYTES` long and mapped as long as `_library` lives; no request is in flight, so nobody else touches it.
        unsafe { self.buffers.write_bytes(0x5a, bytes) };
        self.job = job;
        Ok(())
    }

    #[inline]
    fn submit(&mut self, requests: &[Io]) -> Result<()> {
        let (bytes, width) = (self.job.op.bytes() as usize, self.queues.len());
        for io in requests {
            let queue = if width == 1 { &mut self.queues[0] } else { &mut self.queues[io.tag as usize % width] };
            // A tag is below the depth, so its part is inside the region.
            let buffer = self.buffers.wrapping_add(io.tag as usize * bytes);
            if self.job.op.reads() {
                queue.read(io.offset, buffer, bytes, io.tag as usize, ReqFlags::empty());
            } else {
                queue.write(io.offset, buffer, bytes, io.tag as usize, ReqFlags::empty());
            }
        }
        self.in_flight += requests.len();
        Ok(())
    }

    #[inline]
    fn reap(&mut self, done: &mut Vec<u32>) -> Result<()> {
        // `do_io` is also what notifies the device. With several queues it may not wait for one of them.
        let least = usize::from(self.queues.len() == 1 && self.in_flight > 0);
        for queue in &mut self.queues {
            let mut patience = PATIENCE;
            // A look at the clock per call is the library's price of a time-out, so a polling client gives none: the loop around it has one.
            let timeout = if self.mode == Mode::Poll { None } else { Some(&mut patience) };
            let least = if self.mode == Mode::Poll { 0 } else { least };
            let count = queue.do_io(&mut self.completions, least, timeout, None).map_err(failed)?;
            for completion in &self.completions[..count] {
                // SAFETY: `do_io` answers how many it has written, from the front.
                let completion = unsafe { completion.assume_init_ref() };
                ensure!(completion.ret == 0, "blkio: request {} failed", completion.user_data);
                done.push(completion.user_data as u32);
            }
            self.in_flight -= count;
        }
        Ok(())
    }
}
