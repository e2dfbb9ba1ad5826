//! The host's path by itself, as of the block bench: the device is served by the client's own thread.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cofferdam_manager::Arrivals;
use serde::Serialize;

use super::cofferdam::{Sender, on};
use super::job::{Direction, Job};
use crate::clients::cofferdam::Host;
use crate::counting;
use crate::solo::{SoloTransport, take};
use crate::stats::median;

/// VIRTIO_F_EVENT_IDX and VIRTIO_F_VERSION_1. Without mergeable buffers the device need not say of how many a packet is.
const FEATURES: u64 = 1 << 29 | 1 << 32;
/// Device type of a network device (virtio 1.2, section 5).
const NETWORK: u32 = 1;
/// Bytes of a frame that is sent; one that comes fills its buffer.
const FRAME_BYTES: u32 = 64;

/// Nanoseconds per frame, each part by itself.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Solo {
    /// Which way.
    pub direction: &'static str,
    /// Frames that go together.
    pub batch: u16,
    /// Sending; where frames come, letting go of them, and giving the device their buffers.
    pub give_ns: f64,
    /// The device.
    pub device_ns: f64,
    /// Taking what it is done with.
    pub take_ns: f64,
    /// Allocations per frame, in the second half of the time.
    pub allocations_per_frame: f64,
}

/// Measures batches of `batch` frames for `length`.
///
/// # Errors
/// When the load fails, or the device is not given or does not give a whole batch.
pub fn measure(host: &Host, direction: Direction, batch: u16, length: Duration) -> Result<Solo> {
    let (transport, queues) = SoloTransport::new(NETWORK, vec![2, 0, 0, 0, 0, 1, 1, 0, 1, 0], 2, FEATURES);
    let (loaded, handle) = on(host, Box::new(transport), if direction == Direction::Send { 512 } else { batch })?;
    let mut device = take(&queues, usize::from(direction == Direction::Send))?;
    // Room for all of them: one that grows would count as an allocation.
    let mut parts: [Vec<f64>; 3] = std::array::from_fn(|_| Vec::with_capacity(1 << 20));
    let start = Instant::now();
    // Of the second half: allocations before it, so far, and batches. What taking the binding down allocates comes later.
    let mut counted: Option<(u64, u64, u32)> = None;
    let mut note = |spans: [Duration; 3], found: u64| {
        if start.elapsed() > length / 2 {
            let now = counting::allocations();
            let (_, last, batches) = counted.get_or_insert((now, now, 0));
            (*last, *batches) = (now, *batches + 1);
        }
        ensure!(found == u64::from(batch), "{found} of {batch}");
        for (part, span) in parts.iter_mut().zip(spans) {
            part.push(span.as_secs_f64() * 1e9);
        }
        Ok(())
    };
    match direction {
        Direction::Send => {
            let mut sender = Sender::new(loaded, handle, Job { direction, bytes: FRAME_BYTES, depth: batch })?;
            while start.elapsed() < length {
                let begun = Instant::now();
                sender.submit()?;
                let given = Instant::now();
                device.serve();
                let served = Instant::now();
                let found = sender.look()?;
                note([given - begun, served - given, served.elapsed()], found)?;
            }
        }
        Direction::Receive => {
            let mut arrivals = Arrivals::new();
            while start.elapsed() < length {
                let begun = Instant::now();
                arrivals.clear();
                // What was let go of is given to the device by the next look.
                handle.receive(false, &mut arrivals);
                let given = Instant::now();
                device.serve();
                let served = Instant::now();
                let found = handle.receive(false, &mut arrivals) as u64;
                note([given - begun, served - given, served.elapsed()], found)?;
            }
            drop((arrivals, handle, loaded));
        }
    }
    let allocations_per_frame = counted
        .map_or(f64::NAN, |(first, last, batches)| (last - first) as f64 / f64::from(batches * u32::from(batch)));
    let [give, device, take] = parts.map(|part| median(&part) / f64::from(batch));
    Ok(Solo {
        direction: direction.name(),
        batch,
        give_ns: give,
        device_ns: device,
        take_ns: take,
        allocations_per_frame,
    })
}

/// Measures these batches, or the usual ones if there are none, in the directions that are wanted.
///
/// # Errors
/// As [`measure`].
pub fn all(host: &Host, wanted: impl Fn(Direction) -> bool, batches: &[u16], length: Duration) -> Result<Vec<Solo>> {
    let batches = if batches.is_empty() { &[4, 16, 32, 64] } else { batches };
    let mut parts = Vec::new();
    for direction in [Direction::Send, Direction::Receive].into_iter().filter(|direction| wanted(*direction)) {
        for batch in batches {
            parts.push(measure(host, direction, *batch, length)?);
        }
    }
    Ok(parts)
}

/// As lines.
#[must_use]
pub fn lines(parts: &[Solo]) -> String {
    let mut text =
        String::from("\nthe host's path by itself, ns per frame (each part with one look at the clock per batch)\n");
    text += "  batch direction     give   device     take\n";
    for Solo { direction, batch, give_ns, device_ns, take_ns, .. } in parts {
        text += &format!("  {batch:>5} {direction:9} {give_ns:>8.1} {device_ns:>8.1} {take_ns:>8.1}\n");
    }
    text
}
