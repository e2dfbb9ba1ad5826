//! Queues of the control lane: one for commands, which are sent one at a time and waited for, and perhaps one that is posted. Bytes cross by value: no user's payload is on them.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cofferdam_device::transport::Transport;
use cofferdam_device::words::{self, SegmentWords};
use cofferdam_device::{Buffer, ChainBatch, Expected, Outcome, QueueEvents, SplitQueue};
use cofferdam_runtime::{DeviceError, LiveCapability};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::lane::{Fresh, clear, signal};

/// How long a device may take for a command (`wit/virtio.wit`).
const COMMAND_LIMIT: Duration = Duration::from_secs(2);
/// How often the device's loss is looked for meanwhile.
const SLICE: Duration = Duration::from_millis(50);
/// Buffers in one call.
const MAX_BUFFERS: usize = 64;

/// Shared between the calls of the control lane, the watch and the ladder.
pub(crate) type SharedQueues = Arc<Mutex<ControlQueues>>;

pub(super) struct Queue {
    pub(super) ring: SplitQueue,
    pub(super) events: QueueEvents,
}

pub(super) struct Posted {
    pub(super) queue: Queue,
    pub(super) buffers: Vec<Buffer>,
}

/// The queues.
pub(crate) struct ControlQueues {
    pub(super) commands: Option<Queue>,
    pub(super) posted: Option<Posted>,
    /// A command was not answered in time, or the ring was broken: nothing is sent any more.
    pub(super) given_up: Option<String>,
    /// The device is away: its rings are not touched.
    pub(super) is_away: bool,
    /// Another process may have them: nobody touches them.
    pub(super) handed_over: bool,
}

impl ControlQueues {
    /// `posted` comes with the buffers that it is kept filled with.
    pub(crate) fn new(
        commands: (SplitQueue, QueueEvents),
        posted: Option<(SplitQueue, QueueEvents, Vec<Buffer>)>,
    ) -> ControlQueues {
        let (ring, events) = commands;
        let commands = Some(Queue { ring, events });
        let posted = posted.map(|(mut ring, events, buffers)| {
            post_all(&mut ring, &buffers);
            Posted { queue: Queue { ring, events }, buffers }
        });
        ControlQueues { commands, posted, given_up: None, is_away: false, handed_over: false }
    }

    /// The device is away, and its rings are not touched until it is back.
    pub(crate) fn hold_off(&mut self) {
        self.is_away = true;
    }

    /// The descriptor by which the device tells of used commands, or of used posted buffers.
    pub(crate) fn call(&self, is_posted: bool) -> Option<BorrowedFd<'_>> {
        if is_posted { self.event_fd() } else { self.commands.as_ref().map(|queue| queue.events.call.as_fd()) }
    }

    /// The device is back, with empty rings: the posted one is filled.
    pub(crate) fn give_back(&mut self, commands: Option<Fresh>, posted: Option<Fresh>) {
        let queue = |(ring, events)| Queue { ring, events };
        self.commands = commands.map(queue);
        if let (Some(old), Some((mut ring, events))) = (&mut self.posted, posted) {
            post_all(&mut ring, &old.buffers);
            old.queue = Queue { ring, events };
        }
        (self.given_up, self.is_away) = (None, false);
        self.kick();
    }

    /// The device runs: it is told that there are buffers.
    pub(crate) fn kick(&self) {
        if let Some(posted) = self.posted.as_ref().filter(|_| !self.handed_over) {
            posted.queue.events.doorbell.ring();
        }
    }

    /// Readable when the device used a posted buffer.
    pub(super) fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.posted.as_ref().map(|posted| posted.queue.events.call.as_fd())
    }

    /// Whether the device used posted buffers since this was asked last, or there are some left.
    pub(super) fn was_called(&self) -> bool {
        !self.handed_over && self.event_fd().is_some_and(clear)
    }

    /// What was not taken is looked for again: the device was not asked to tell of more, so the watch is woken in its stead.
    pub(super) fn look_again(&self) {
        if let Some(called) = self.event_fd() {
            signal(called);
        }
    }

    /// The bytes of up to 64 used buffers, as `control.events` wants them; the buffers are posted again.
    pub(super) fn take_events(&mut self) -> Vec<u32> {
        let mut words = Vec::new();
        let Some(Posted { queue, buffers }) = self.posted.as_mut().filter(|_| !self.is_away && !self.handed_over)
        else {
            return words;
        };
        for _ in 0..MAX_BUFFERS {
            let used = match queue.ring.pop() {
                Ok(Some(used)) => used,
                // Armed and looked at again in one step (virtio 1.2, section 2.7.10).
                Ok(None) if queue.ring.arm() => continue,
                Ok(None) => break,
                Err(fault) => {
                    self.given_up.get_or_insert_with(|| fault.to_string());
                    break;
                }
            };
            let Some(buffer) = buffers.get(used.token as usize) else { continue };
            let mut bytes = vec![0; used.written.min(buffer.len()) as usize];
            if buffer.read_at(0, &mut bytes).is_ok() {
                words.push(bytes.len() as u32);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
                words.extend(bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)));
            }
            let _ = queue.ring.add_buffer(used.token, buffer.iova(), buffer.len());
        }
        if queue.ring.publish() {
            queue.events.doorbell.ring();
        }
        words
    }

    /// Sends one command and waits for its answer.
    fn command(
        &mut self,
        request: &[u8],
        response_bytes: u32,
        is_lost: impl Fn() -> bool,
    ) -> Result<Vec<u8>, DeviceError> {
        if self.is_away {
            return Err(DeviceError::Device("the device is away".to_owned()));
        }
        if self.handed_over {
            return Err(DeviceError::Device("the device is on its way to another process".to_owned()));
        }
        if let Some(why) = &self.given_up {
            return Err(DeviceError::Device(format!("the queue for commands was given up: {why}")));
        }
        let Some(queue) = &mut self.commands else {
            return Err(DeviceError::Device("the device is on its way out".to_owned()));
        };
        let answer = exchange(queue, request, response_bytes, is_lost);
        if let Err(why) = &answer {
            self.given_up = Some(why.clone());
        }
        answer.map_err(DeviceError::Device)
    }

    /// The device is given up: rings and channels are let go of, buffers given back. Those of a device that was not silent are retired with the arena.
    pub(super) fn end(&mut self) {
        self.commands = None;
        self.posted = None;
    }
}

/// Fills a ring that nothing is on yet.
fn post_all(ring: &mut SplitQueue, buffers: &[Buffer]) {
    for (number, buffer) in (0..).zip(buffers) {
        let _ = ring.add_buffer(number, buffer.iova(), buffer.len());
    }
    let _ = ring.arm();
    ring.publish();
}

fn exchange(
    queue: &mut Queue,
    request: &[u8],
    response_bytes: u32,
    is_lost: impl Fn() -> bool,
) -> Result<Vec<u8>, String> {
    let index = queue.ring.config().index;
    let mut words = Vec::new();
    let segments = [SegmentWords::HeaderOut(request), SegmentWords::StatusIn(response_bytes)];
    words::push_chain(&mut words, 0, index, if response_bytes == 0 { &segments[..1] } else { &segments });
    let mut batch = ChainBatch::new();
    batch.parse(&words, &[Expected { token: 0, payload: None }], &[index]).map_err(|error| error.to_string())?;
    let Some(Outcome::Chain(chain)) = batch.get(0) else { return Err("no chain".to_owned()) };
    queue.ring.add(&chain).map_err(|error| error.to_string())?;
    // What is there already is found below.
    let _ = queue.ring.arm();
    if queue.ring.publish() {
        queue.events.doorbell.ring();
    }
    let deadline = Instant::now() + COMMAND_LIMIT;
    loop {
        if let Some(used) = queue.ring.pop().map_err(|fault| fault.to_string())? {
            let mut bytes = used.status().to_vec();
            bytes.truncate(used.written as usize);
            return Ok(bytes);
        }
        if queue.ring.arm() {
            continue;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("no answer to a command within {COMMAND_LIMIT:?}"));
        }
        if is_lost() {
            return Err("the device is gone".to_owned());
        }
        let slice = left.min(SLICE);
        let wait = Timespec { tv_sec: slice.as_secs() as i64, tv_nsec: i64::from(slice.subsec_nanos()) };
        let _ = poll(&mut [PollFd::new(&queue.events.call, PollFlags::IN)], Some(&wait));
        clear(queue.events.call.as_fd());
    }
}

/// What `virtio.live-device` is behind the border.
pub(super) struct LiveWindow {
    transport: Weak<Mutex<Box<dyn Transport>>>,
    queues: SharedQueues,
}

impl LiveWindow {
    pub(super) fn new(transport: Weak<Mutex<Box<dyn Transport>>>, queues: SharedQueues) -> LiveWindow {
        LiveWindow { transport, queues }
    }
}

impl LiveCapability for LiveWindow {
    fn read_config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>, DeviceError> {
        let transport =
            self.transport.upgrade().ok_or_else(|| DeviceError::Device("the device is on its way out".to_owned()))?;
        let mut bytes = vec![0; length as usize];
        transport.lock().read_config(offset, &mut bytes).map_err(|error| DeviceError::Device(error.to_string()))?;
        Ok(bytes)
    }

    fn command(&mut self, request: &[u8], response_bytes: u32) -> Result<Vec<u8>, DeviceError> {
        let transport = self.transport.clone();
        let is_lost = || {
            let Some(transport) = transport.upgrade() else { return true };
            transport.try_lock().is_some_and(|mut transport| transport.is_lost())
        };
        self.queues.lock().command(request, response_bytes, is_lost)
    }
}
