//! What the threads of one port share. Nothing here is on the data path.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::address::NbdAddress;
use crate::connection::End;
use crate::handover::{Door, Order};
use crate::options::NbdOptions;
use crate::service::Notify;

/// Messages about misbehaving clients in one [`LOG_PERIOD`]; more are counted.
const LOG_LINES: u32 = 10;
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// State of one port.
pub(crate) struct Shared<S> {
    pub(crate) service: S,
    pub(crate) options: NbdOptions,
    pub(crate) address: NbdAddress,
    /// One per lane.
    pub(crate) inboxes: Vec<Arc<Inbox>>,
    /// Workers in which a connection waits for leases.
    pub(crate) starving: AtomicUsize,
    pub(crate) open: AtomicUsize,
    pub(crate) stopping: AtomicBool,
    /// An export that is under way is to fail.
    pub(crate) called_off: AtomicBool,
    /// Whether clients are accepted.
    pub(crate) door: Door,
    /// Connections that the shutdown had to cut off with something unanswered or unsent.
    pub(crate) severed: AtomicU64,
    throttle: Mutex<Throttle>,
}

/// Where a worker gets connections and orders from.
pub(crate) struct Inbox {
    pub(crate) wake: Arc<Notify>,
    state: Mutex<Letters>,
    /// Connections that this worker was given and has not closed.
    pub(crate) load: AtomicUsize,
}

#[derive(Default)]
struct Letters {
    arrived: Vec<(OwnedFd, String)>,
    stop_at: Option<Instant>,
    orders: Vec<Order>,
}

impl Inbox {
    pub(crate) fn new() -> std::io::Result<Inbox> {
        Ok(Inbox { wake: Notify::new()?, state: Mutex::default(), load: AtomicUsize::new(0) })
    }

    /// Bounded by the port's limit of connections.
    pub(crate) fn hand_over(&self, socket: OwnedFd, peer: String) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).arrived.push((socket, peer));
        self.load.fetch_add(1, Ordering::Relaxed);
        self.wake.signal();
    }

    pub(crate) fn stop(&self, at: Instant) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stop_at.get_or_insert(at);
        self.wake.signal();
    }

    /// About a handover; obeyed in order.
    pub(crate) fn order(&self, order: Order) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).orders.push(order);
        self.wake.signal();
    }

    pub(crate) fn take(&self) -> (Vec<(OwnedFd, String)>, Option<Instant>, Vec<Order>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut state.arrived), state.stop_at, std::mem::take(&mut state.orders))
    }
}

#[derive(Default)]
struct Throttle {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl<S> Shared<S> {
    pub(crate) fn new(service: S, options: NbdOptions, address: NbdAddress, inboxes: Vec<Arc<Inbox>>) -> Shared<S> {
        Shared {
            service,
            options,
            address,
            inboxes,
            starving: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            called_off: AtomicBool::new(false),
            door: Door::default(),
            severed: AtomicU64::new(0),
            throttle: Mutex::default(),
        }
    }

    pub(crate) fn wake_all(&self) {
        for inbox in &self.inboxes {
            inbox.wake.signal();
        }
    }

    /// Whether a line that a client can cause may be logged now; the number is how many were not since the last one.
    pub(crate) fn may_log(&self) -> Option<u64> {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        if throttle.since.is_none_or(|since| since.elapsed() >= LOG_PERIOD) {
            throttle.since = Some(Instant::now());
            throttle.lines = 0;
        }
        throttle.lines += 1;
        if throttle.lines > LOG_LINES {
            throttle.suppressed += 1;
            return None;
        }
        Some(std::mem::take(&mut throttle.suppressed))
    }

    /// Books the end of a connection of worker `lane`.
    pub(crate) fn closed(&self, lane: usize, peer: &str, end: &End, unfinished: bool) {
        self.open.fetch_sub(1, Ordering::Relaxed);
        if let Some(inbox) = self.inboxes.get(lane) {
            inbox.load.fetch_sub(1, Ordering::Relaxed);
        }
        if self.stopping.load(Ordering::Relaxed) && unfinished {
            self.severed.fetch_add(1, Ordering::Relaxed);
        }
        match end {
            End::Done(why) => tracing::debug!(port = %self.address, peer, why, "connection closed"),
            End::Socket(error) => tracing::debug!(port = %self.address, peer, %error, "connection lost"),
            End::Garbage(why) => {
                if let Some(suppressed) = self.may_log() {
                    tracing::warn!(port = %self.address, peer, why, suppressed, "client broke the protocol; connection closed");
                }
            }
        }
    }
}
