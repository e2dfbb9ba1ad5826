//! What happened, in order: every transition of every binding with its cause, and what operators do to ports and handles.
//!
//! One log for the whole manager. A record gets its number under the log's lock, and whoever records a transition of a binding holds that binding's life
//! locked, so the numbers are the order in which things happened. The log is bounded ([`KEPT`] records, [`KEPT_BYTES`] of text): a reader that falls behind
//! is told how many records it missed, by a [`EventKind::Gap`], and goes on with the oldest that is kept.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

/// Records kept for readers that come late or fall behind.
const KEPT: usize = 4096;
/// Bytes of text kept, roughly: backtraces are long.
const KEPT_BYTES: usize = 4 << 20;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Its number; the next record has the next one.
    pub seq: u64,
    /// When, in microseconds since 1970-01-01 UTC, by the system's clock: for people. The order is that of `seq`.
    pub unix_micros: u64,
    /// The binding; empty for a gap.
    pub binding: String,
    /// Which driver of the binding, from 1; 0 for a gap.
    pub generation: u64,
    /// What.
    #[serde(flatten)]
    pub what: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum EventKind {
    /// The binding went from one state of its life to another (`docs/LIFECYCLE.md`).
    State {
        /// The state before; empty for a binding that was just made.
        from: String,
        /// The state now.
        to: String,
        /// What `ls` shows for the state now.
        phase: String,
        /// Why it leaves, once it does.
        cause: Option<String>,
        /// A sentence, where there is more to say.
        detail: Option<String>,
    },
    /// The driver or the device broke the rules.
    Fault {
        /// `trap`, `deadline`, `killed`, `out-of-memory`, `layout` or `device`.
        kind: String,
        /// What happened.
        message: String,
        /// Guest frames, innermost first; at most 32.
        backtrace: Vec<String>,
    },
    /// The device was lost or broke the rules of its rings, and is to be brought back (`--reconnect`).
    DeviceAway {
        /// What happened.
        reason: String,
        /// How long it is waited for, in milliseconds.
        wait_ms: u64,
    },
    /// It is back, and clients go on.
    DeviceBack {
        /// Requests that it had and had not answered, and that were given again.
        again: u64,
        /// How long it was away, in microseconds.
        waited_micros: u64,
    },
    /// It is not waited for any more.
    DeviceGivenUp {
        /// Why.
        reason: String,
    },
    /// A port serves the binding.
    PortAttached {
        /// Its address.
        port: String,
    },
    /// A port has gone.
    PortDetached {
        /// Its address.
        port: String,
        /// Connections that were open when it was told to go.
        connections: u64,
        /// Of those, how many were severed with answers unsent.
        severed: u64,
        /// Whether it ended within its bound. If not, its thread was left behind.
        ended: bool,
    },
    /// One handle was revoked, the binding serves on.
    HandleRevoked {
        /// Its number.
        handle: u64,
        /// The port, or `in-process`.
        port: String,
        /// Who is at the other end.
        peer: String,
    },
    /// The device announced that its configuration changed, and the driver looked at it.
    ConfigChanged {
        /// What the device can do now, and could do before: `capacity-bytes 1024 -> 2048`.
        changes: Vec<String>,
        /// Why the driver does not take it; everything stays as it was known then.
        refused: Option<String>,
    },
    /// Another component took the driver's place.
    Upgraded {
        /// The driver before.
        from: String,
        /// The driver now.
        to: String,
        /// How long clients were held.
        blackout_micros: u64,
    },
    /// This daemon has taken the binding over from another one.
    TakenOver {
        /// Connections of clients that came with it.
        connections: u64,
        /// How long clients were held.
        blackout_micros: u64,
    },
    /// The component before the last upgrade is there again.
    RolledBack {
        /// The driver before.
        from: String,
        /// The driver now.
        to: String,
        /// Why.
        reason: String,
    },
    /// The operator trusts the driver with all of the machine's memory (`--trust-dma`), and it made use of that.
    Trusted {
        /// The driver.
        driver: String,
        /// The device that it may have write anywhere.
        device: String,
    },
    /// Memory was retired on purpose, because the device could not be shown to be silent.
    Retired {
        /// How much.
        bytes: u64,
        /// Why.
        reason: String,
    },
    /// This reader was too slow: records between the last one and the next one are no longer kept.
    Gap {
        /// How many.
        missed: u64,
    },
}

impl EventKind {
    /// Text in it, in bytes, for the log's bound.
    fn weight(&self) -> usize {
        match self {
            EventKind::State { detail, .. } => detail.as_ref().map_or(0, String::len),
            EventKind::Fault { message, backtrace, .. } => {
                message.len() + backtrace.iter().map(String::len).sum::<usize>()
            }
            EventKind::PortAttached { port } | EventKind::PortDetached { port, .. } => port.len(),
            EventKind::HandleRevoked { port, peer, .. } => port.len() + peer.len(),
            EventKind::ConfigChanged { changes, refused } => {
                changes.iter().map(String::len).sum::<usize>() + refused.as_ref().map_or(0, String::len)
            }
            EventKind::Upgraded { from, to, .. } => from.len() + to.len(),
            EventKind::RolledBack { from, to, reason } => from.len() + to.len() + reason.len(),
            EventKind::Trusted { driver, device } => driver.len() + device.len(),
            EventKind::Retired { reason, .. }
            | EventKind::DeviceAway { reason, .. }
            | EventKind::DeviceGivenUp { reason } => reason.len(),
            EventKind::DeviceBack { .. } | EventKind::TakenOver { .. } | EventKind::Gap { .. } => 0,
        }
    }
}

/// The log; shared by the manager and its bindings.
pub(crate) struct EventLog {
    kept: Mutex<Kept>,
    grew: Condvar,
}

struct Kept {
    next: u64,
    bytes: usize,
    records: VecDeque<EventRecord>,
}

impl EventLog {
    pub(crate) fn new() -> Arc<EventLog> {
        let kept = Kept { next: 1, bytes: 0, records: VecDeque::new() };
        Arc::new(EventLog { kept: Mutex::new(kept), grew: Condvar::new() })
    }

    /// Appends; the oldest records go when there is no room.
    pub(crate) fn record(&self, binding: &str, generation: u64, what: EventKind) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let unix_micros = crate::ladder::micros(now);
        let mut kept = self.kept.lock();
        let seq = kept.next;
        kept.next += 1;
        kept.bytes += what.weight();
        kept.records.push_back(EventRecord { seq, unix_micros, binding: binding.to_owned(), generation, what });
        while kept.records.len() > KEPT || kept.bytes > KEPT_BYTES {
            match kept.records.pop_front() {
                Some(oldest) => kept.bytes -= oldest.what.weight(),
                None => break,
            }
        }
        drop(kept);
        self.grew.notify_all();
    }
}

/// Reads the log from some point on, at its own pace.
pub struct EventReader {
    log: Arc<EventLog>,
    next: u64,
}

impl EventReader {
    /// Starts at record `from`, or at the oldest that is kept.
    pub(crate) fn new(log: &Arc<EventLog>, from: Option<u64>) -> EventReader {
        let kept = log.kept.lock();
        let oldest = kept.records.front().map_or(kept.next, |record| record.seq);
        // A number that is not given out yet is one of an earlier run of the host: everything there is has happened since.
        let next = from.filter(|from| *from <= kept.next).unwrap_or(oldest);
        EventReader { log: Arc::clone(log), next }
    }

    /// The next record, in order; waits for it for at most `timeout`. A reader that fell behind gets an [`EventKind::Gap`] first.
    pub fn next(&mut self, timeout: Duration) -> Option<EventRecord> {
        let deadline = crate::ladder::after(Instant::now(), timeout);
        let mut kept = self.log.kept.lock();
        while self.next >= kept.next {
            if self.log.grew.wait_until(&mut kept, deadline).timed_out() && self.next >= kept.next {
                return None;
            }
        }
        let oldest = kept.records.front()?;
        if self.next < oldest.seq {
            let missed = oldest.seq - self.next;
            let gap = EventRecord {
                seq: self.next,
                unix_micros: oldest.unix_micros,
                binding: String::new(),
                generation: 0,
                what: EventKind::Gap { missed },
            };
            self.next = oldest.seq;
            return Some(gap);
        }
        let record = kept.records.get(usize::try_from(self.next - oldest.seq).ok()?)?.clone();
        self.next += 1;
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached(port: &str) -> EventKind {
        EventKind::PortAttached { port: port.to_owned() }
    }

    #[test]
    fn a_slow_reader_is_told_how_many_records_it_missed() {
        let log = EventLog::new();
        let mut reader = EventReader::new(&log, None);
        for number in 0..KEPT as u64 + 10 {
            log.record("disk", 1, attached(&number.to_string()));
        }
        let gap = reader.next(Duration::ZERO).unwrap();
        assert_eq!((gap.seq, gap.what), (1, EventKind::Gap { missed: 10 }));
        for seq in 11..=KEPT as u64 + 10 {
            assert_eq!(reader.next(Duration::ZERO).unwrap().seq, seq);
        }
        assert_eq!(reader.next(Duration::ZERO), None);
    }

    #[test]
    fn readers_on_other_threads_see_the_same_order_without_holes() {
        let log = EventLog::new();
        let seen: Vec<Vec<EventRecord>> = std::thread::scope(|scope| {
            let read = || {
                let mut reader = EventReader::new(&log, Some(1));
                (0..400).map(|_| reader.next(Duration::from_secs(60)).unwrap()).collect()
            };
            let readers: Vec<_> = (0..2).map(|_| scope.spawn(read)).collect();
            for writer in 0..2 {
                let log = &log;
                scope.spawn(move || (0..200).for_each(|n| log.record(&format!("b{writer}"), n, attached(""))));
            }
            readers.into_iter().map(|reader| reader.join().unwrap()).collect()
        });
        assert_eq!(seen[0], seen[1]);
        assert!(seen[0].iter().enumerate().all(|(at, record)| record.seq == at as u64 + 1));
        for writer in ["b0", "b1"] {
            let own: Vec<_> = seen[0].iter().filter(|r| r.binding == writer).map(|r| r.generation).collect();
            assert_eq!(own, (0..200).collect::<Vec<_>>(), "one writer's records keep their order");
        }
    }

    #[test]
    fn long_texts_count_against_the_logs_bound() {
        let log = EventLog::new();
        for _ in 0..64 {
            let message = "x".repeat(KEPT_BYTES / 16);
            log.record("disk", 1, EventKind::Fault { kind: "trap".into(), message, backtrace: Vec::new() });
        }
        assert!(log.kept.lock().bytes <= KEPT_BYTES);
        let mut reader = EventReader::new(&log, Some(1));
        assert_eq!(reader.next(Duration::ZERO).unwrap().what, EventKind::Gap { missed: 48 });
    }

    #[test]
    fn a_number_from_the_future_starts_at_the_oldest() {
        let log = EventLog::new();
        log.record("disk", 1, attached("a"));
        assert_eq!(EventReader::new(&log, Some(99)).next(Duration::ZERO).unwrap().seq, 1);
    }

    #[test]
    fn a_record_is_one_flat_json_object() {
        let log = EventLog::new();
        log.record("disk", 2, attached("nbd:/a"));
        let record = EventReader::new(&log, None).next(Duration::ZERO).unwrap();
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(json["event"], "port-attached");
        assert_eq!(json["port"], "nbd:/a");
        assert_eq!(json["binding"], "disk");
        assert_eq!(serde_json::from_value::<EventRecord>(json).unwrap(), record);
    }
}
