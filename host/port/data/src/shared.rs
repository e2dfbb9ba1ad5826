//! What the threads of one port share. Nothing here is on the data path.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::address::DataAddress;
use crate::options::DataOptions;

/// Messages about misbehaving clients in one [`LOG_PERIOD`]; more are counted.
const LOG_LINES: u32 = 10;
const LOG_PERIOD: Duration = Duration::from_secs(1);

/// State of one port.
pub(crate) struct Shared<S> {
    pub(crate) service: S,
    pub(crate) options: DataOptions,
    pub(crate) address: DataAddress,
    /// Clients that have a thread.
    pub(crate) open: AtomicUsize,
    pub(crate) next_lane: AtomicUsize,
    pub(crate) stopping: AtomicBool,
    /// When the grace of the shutdown is over.
    pub(crate) stop_at: OnceLock<Instant>,
    /// Clients that the shutdown cut off with something unanswered.
    pub(crate) severed: AtomicU64,
    throttle: Mutex<Throttle>,
}

#[derive(Default)]
struct Throttle {
    since: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

/// Why a client's thread ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Nobody's fault.
    Done(&'static str),
    /// The client's.
    Garbage(&'static str),
}

impl<S> Shared<S> {
    pub(crate) fn new(service: S, options: DataOptions, address: DataAddress) -> Shared<S> {
        Shared {
            service,
            options,
            address,
            open: AtomicUsize::new(0),
            next_lane: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            stop_at: OnceLock::new(),
            severed: AtomicU64::new(0),
            throttle: Mutex::default(),
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

    /// Books the end of a client.
    pub(crate) fn closed(&self, peer: &str, end: End, unfinished: bool) {
        if self.stopping.load(Ordering::Relaxed) && unfinished {
            self.severed.fetch_add(1, Ordering::Relaxed);
        }
        match end {
            End::Done(why) => tracing::debug!(port = %self.address, peer, why, "client gone"),
            End::Garbage(why) => {
                if let Some(suppressed) = self.may_log() {
                    tracing::warn!(port = %self.address, peer, why, suppressed, "client broke the protocol; it was cut off");
                }
            }
        }
    }
}
