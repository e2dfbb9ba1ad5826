//! What is kept of a driver that broke down: a report for every time, and the guest's core dump.
//!
//! ```text
//! fault -> report (in memory, the last 16 of a binding) -> successor serves -> the dead instance is buried:
//!          a thread that exists while there is something to do writes report and core dump into the spool, and drops the store
//! ```
//!
//! Nothing of it is done while clients wait. The spool is bounded (`spool`), and so is what waits to be written: an instance that finds no room is dropped without its dump.

mod spool;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use cofferdam_runtime::{CallView, GuestFault, LaneDriver};
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use crate::ladder::micros;
use crate::ports::Within;
pub(crate) use spool::Spool;

/// Reports of one binding that are kept in memory.
const KEPT: usize = 16;
/// Dead instances that may wait for their burial.
const WAITING: usize = 2;

/// How a driver broke down. Field by field what `cofferdam crashes --json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrashReport {
    /// Counts the crashes of the binding, from 1.
    pub number: u64,
    /// When, in microseconds since 1970-01-01 UTC.
    pub unix_micros: u64,
    /// The binding.
    pub binding: String,
    /// The driver's file or label.
    pub driver: String,
    /// SHA-256 of the component.
    pub digest: String,
    /// The device.
    pub device: String,
    /// Which driver of the binding, from 1.
    pub generation: u64,
    /// `control`, or the number of the data lane.
    pub lane: String,
    /// `trap`, `deadline`, `out-of-memory` or `layout`.
    pub kind: String,
    /// What happened.
    pub message: String,
    /// Guest frames with function names, innermost first; at most 32.
    pub backtrace: Vec<String>,
    /// Calls of the instance, the latest first, at most 16.
    pub calls: Vec<CrashCall>,
    /// How long the lane was without a driver, in microseconds: from when the fault was known until the next one had taken over. `None` until then.
    pub pause_micros: Option<u64>,
    /// The core dump, in the format of the WebAssembly tool conventions, if one was written.
    pub core: Option<PathBuf>,
}

/// A call of an instance that broke down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CrashCall {
    /// The guest's export.
    pub export: String,
    /// The host's function that it called last in it.
    pub import: Option<String>,
}

/// A report that is about to be made.
pub(crate) struct Crash<'a> {
    pub(crate) binding: &'a str,
    pub(crate) driver: Arc<str>,
    pub(crate) device: &'a str,
    pub(crate) digest: Option<String>,
    pub(crate) generation: u64,
    pub(crate) lane: String,
    pub(crate) fault: &'a GuestFault,
    pub(crate) view: Option<&'a CallView>,
}

struct Dead {
    number: u64,
    driver: Box<dyn LaneDriver>,
}

#[derive(Default)]
struct Inside {
    reports: VecDeque<CrashReport>,
    count: u64,
    dead: VecDeque<Dead>,
    /// There is a thread.
    thread: bool,
}

/// The crashes of one binding.
pub(crate) struct Crashes {
    spool: Option<Spool>,
    inside: Mutex<Inside>,
    done: Condvar,
}

impl Crashes {
    pub(crate) fn new(spool: Option<Spool>) -> Arc<Crashes> {
        Arc::new(Crashes { spool, inside: Mutex::default(), done: Condvar::new() })
    }

    /// Notes a crash; its number.
    pub(crate) fn note(&self, crash: &Crash<'_>) -> u64 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let calls = crash.view.map(CallView::recent).unwrap_or_default().into_iter();
        let mut inside = self.inside.lock();
        inside.count += 1;
        let report = CrashReport {
            number: inside.count,
            unix_micros: micros(now),
            binding: crash.binding.to_owned(),
            driver: crash.driver.to_string(),
            digest: crash.digest.clone().unwrap_or_default(),
            device: crash.device.to_owned(),
            generation: crash.generation,
            lane: crash.lane.clone(),
            kind: crash.fault.kind.as_str().to_owned(),
            message: crash.fault.message.clone(),
            backtrace: crash.fault.backtrace.clone(),
            calls: calls
                .map(|(export, import)| CrashCall { export: export.to_owned(), import: import.map(str::to_owned) })
                .collect(),
            pause_micros: None,
            core: None,
        };
        inside.reports.push_back(report);
        if inside.reports.len() > KEPT {
            inside.reports.pop_front();
        }
        inside.count
    }

    /// The lane has a driver again.
    pub(crate) fn note_pause(&self, number: u64, pause: Duration) {
        let micros = micros(pause);
        let mut inside = self.inside.lock();
        if let Some(report) = inside.reports.iter_mut().find(|report| report.number == number) {
            report.pause_micros.get_or_insert(micros);
        }
    }

    /// The reports that are kept, the oldest first.
    pub(crate) fn reports(&self) -> Vec<CrashReport> {
        self.inside.lock().reports.iter().cloned().collect()
    }

    /// How many there were.
    pub(crate) fn count(&self) -> u64 {
        self.inside.lock().count
    }

    /// Takes the instance of a crash, to write down what there is of it and to drop it, neither on this thread.
    pub(crate) fn bury(self: &Arc<Self>, number: u64, driver: Box<dyn LaneDriver>) {
        let mut inside = self.inside.lock();
        if inside.dead.len() >= WAITING {
            drop(inside);
            // It costs this thread what taking a store apart costs.
            drop(driver);
            return;
        }
        inside.dead.push_back(Dead { number, driver });
        if inside.thread {
            return;
        }
        let crashes = Arc::clone(self);
        let bury = move || {
            crashes.bury_all();
        };
        match Within::spawn("cofferdam-crash", bury) {
            Ok(()) => inside.thread = true,
            Err(error) => {
                tracing::error!(%error, "no thread to write a crash down on");
                inside.dead.clear();
            }
        }
    }

    fn bury_all(&self) {
        let mut inside = self.inside.lock();
        while let Some(Dead { number, mut driver }) = inside.dead.pop_front() {
            let report = inside.reports.iter().find(|report| report.number == number).cloned();
            drop(inside);
            let core = match (&self.spool, report) {
                (Some(spool), Some(report)) => spool.keep(report, driver.core_dump().as_deref()),
                _ => None,
            };
            drop(driver);
            inside = self.inside.lock();
            if let Some(report) = inside.reports.iter_mut().find(|report| report.number == number) {
                report.core = core;
            }
        }
        inside.thread = false;
        self.done.notify_all();
    }

    /// Waits until every dead instance is gone, at most until `until`; whether they are.
    pub(crate) fn wait(&self, until: Instant) -> bool {
        let mut inside = self.inside.lock();
        while inside.thread {
            if self.done.wait_until(&mut inside, until).timed_out() {
                return !inside.thread;
            }
        }
        true
    }
}
