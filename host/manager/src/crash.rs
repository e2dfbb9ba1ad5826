//! What is kept of a driver that broke down: a report for every time, and the guest's core dump.
//!
//! ```text
//! fault -> report (in memory, the last 16 of a binding) -> successor serves -> the dead instance is buried:
//!          a thread that exists while there is something to do writes report and core dump into the spool, and drops the store
//! ```
//!
//! Nothing of it is done while clients wait, nor at once when they are served again: what had to wait is answered first, on a machine that may have no core to spare for both. The reaping thread starts that
//! thread after [`GRACE`], for to start one can take a millisecond of whoever does it, and it rests between any two steps (`pace`); neither is so once somebody waits, or another instance. (Less priority for it was
//! tried: on a busy machine an unload then waited for it in vain.)
//!
//! The spool is bounded (`spool`), and so is what waits to be written: an instance that finds no room is dropped without its dump, and its report is written all the same.

mod pace;
mod spool;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use cofferdam_runtime::{CallView, GuestFault, LaneDriver};
use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use crate::ladder::micros;
use crate::ports::Within;
use pace::Pace;
pub(crate) use spool::Spool;

/// Reports of one binding that are kept in memory.
const KEPT: usize = 16;
/// Dead instances that may wait for their burial; of what comes beyond them only the reports wait, and no more than are kept.
const WAITING: usize = 2;
/// How long an instance is left alone at first.
const GRACE: Duration = Duration::from_millis(20);

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
    /// `None`: there was no room for it.
    driver: Option<Box<dyn LaneDriver>>,
    since: Instant,
}

#[derive(Default)]
struct Inside {
    reports: VecDeque<CrashReport>,
    count: u64,
    dead: VecDeque<Dead>,
    /// There is a thread.
    thread: bool,
    /// None was to be had, which was told.
    threadless: bool,
    /// Somebody waits for it: so many.
    waiters: usize,
    /// The code goes: what comes now is dropped at once.
    closed: bool,
}

impl Inside {
    /// Whether the thread is to go on without a rest.
    fn is_hurried(&self) -> bool {
        self.waiters > 0 || !self.dead.is_empty()
    }
}

/// Does something on a thread of its own.
type Spawn = fn(Box<dyn FnOnce() + Send>) -> std::io::Result<()>;

/// The crashes of one binding.
pub(crate) struct Crashes {
    spool: Option<Spool>,
    spawn: Spawn,
    inside: Mutex<Inside>,
    /// The thread has ended.
    done: Condvar,
    /// It is to hurry.
    hurry: Condvar,
}

impl Crashes {
    pub(crate) fn new(spool: Option<Spool>) -> Arc<Crashes> {
        Arc::new(Crashes::spawning(spool, |work| Within::spawn("cofferdam-crash", work)))
    }

    fn spawning(spool: Option<Spool>, spawn: Spawn) -> Crashes {
        Crashes { spool, spawn, inside: Mutex::default(), done: Condvar::new(), hurry: Condvar::new() }
    }

    /// Notes a crash; its number.
    pub(crate) fn note(&self, crash: &Crash<'_>) -> u64 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let calls = crash.view.map(CallView::recent).unwrap_or_default().into_iter();
        let mut inside = self.inside.lock();
        inside.count += 1;
        // Files are named after it.
        let last = inside.reports.back().map_or(0, |report| report.unix_micros);
        let unix_micros = micros(now).max(last + 1);
        let report = CrashReport {
            number: inside.count,
            unix_micros,
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

    /// So many there were in the process before this one.
    pub(crate) fn begin_at(&self, count: u64) {
        self.inside.lock().count = count;
    }

    /// How many there were.
    pub(crate) fn count(&self) -> u64 {
        self.inside.lock().count
    }

    /// Takes the instance of a crash, to write down what there is of it and to drop it, neither on this thread. [`Crashes::begin`] is to be called soon.
    /// Without an instance only the report is written.
    pub(crate) fn bury(&self, number: u64, driver: Option<Box<dyn LaneDriver>>) {
        let mut inside = self.inside.lock();
        let waiting = inside.dead.iter().filter(|dead| dead.driver.is_some()).count();
        // It costs this thread what taking a store apart costs.
        let is_kept = waiting < WAITING && !inside.closed;
        let (kept, dropped) = if is_kept { (driver, None) } else { (None, driver) };
        if inside.dead.len() < KEPT && !inside.closed {
            inside.dead.push_back(Dead { number, driver: kept, since: Instant::now() });
        }
        if inside.thread {
            self.hurry.notify_all();
        }
        drop(inside);
        drop(dropped);
    }

    /// The reaping thread's: has the dead be put away if their time has come; whether it has to look again.
    pub(crate) fn begin(self: &Arc<Self>) -> bool {
        let mut inside = self.inside.lock();
        let Some(first) = inside.dead.front().filter(|_| !inside.thread) else { return false };
        if inside.dead.len() == 1 && first.since.elapsed() < GRACE {
            return true;
        }
        !self.start(&mut inside)
    }

    /// Whether a thread puts the dead away now.
    fn start(self: &Arc<Self>, inside: &mut Inside) -> bool {
        let crashes = Arc::clone(self);
        let bury = Box::new(move || crashes.bury_all());
        let started = (self.spawn)(bury);
        inside.thread = started.is_ok();
        if let Err(error) = started
            && !std::mem::replace(&mut inside.threadless, true)
        {
            tracing::error!(%error, "no thread to write a crash down on; it is tried again");
        }
        inside.thread
    }

    fn bury_all(&self) {
        let pace = Pace::of(self);
        let mut inside = self.inside.lock();
        while let Some(Dead { number, mut driver, .. }) = inside.dead.pop_front() {
            let report = inside.reports.iter().find(|report| report.number == number).cloned();
            drop(inside);
            let core = match (&self.spool, report) {
                (Some(spool), Some(report)) => {
                    let core = driver.as_mut().and_then(|driver| driver.core_dump());
                    spool.keep(report, core.as_deref(), &pace)
                }
                _ => None,
            };
            pace.step();
            drop(driver);
            inside = self.inside.lock();
            if let Some(report) = inside.reports.iter_mut().find(|report| report.number == number) {
                report.core = core;
            }
        }
        inside.thread = false;
        self.done.notify_all();
    }

    /// The code goes: has every dead instance be gone soon, and waits for that, at most until `until`; whether it is so.
    pub(crate) fn close(self: &Arc<Self>, until: Instant) -> bool {
        self.inside.lock().closed = true;
        self.wait(until)
    }

    /// Has what is known be written down soon, and waits for that, at most until `until`; whether it is so.
    pub(crate) fn wait(self: &Arc<Self>, until: Instant) -> bool {
        let mut inside = self.inside.lock();
        inside.waiters += 1;
        if inside.thread {
            self.hurry.notify_all();
        } else if !inside.dead.is_empty() && !self.start(&mut inside) {
            // Nothing bounds it here. But nobody comes after whoever waits, and then there is little: a disk that hangs and a host without threads are two misfortunes at once.
            MutexGuard::unlocked(&mut inside, || self.bury_all());
        }
        while inside.thread && !self.done.wait_until(&mut inside, until).timed_out() {}
        inside.waiters -= 1;
        !inside.thread
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use cofferdam_runtime::CallError;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A driver of which there are so many.
    struct Counted(Arc<AtomicUsize>);

    impl Counted {
        fn new(count: &Arc<AtomicUsize>) -> Box<Counted> {
            count.fetch_add(1, Ordering::Relaxed);
            Box::new(Counted(Arc::clone(count)))
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl LaneDriver for Counted {
        fn submit(&mut self, _: &[u64], _: &mut Vec<u32>) -> Result<(), CallError> {
            Ok(())
        }

        fn complete(&mut self, _: &[u32], _: &mut Vec<u32>) -> Result<(), CallError> {
            Ok(())
        }

        fn core_dump(&mut self) -> Option<Vec<u8>> {
            Some(vec![7; 1 << 20])
        }
    }

    fn note(crashes: &Crashes) -> u64 {
        let fault = GuestFault::layout("words");
        crashes.note(&Crash {
            binding: "disk0",
            driver: "driver".into(),
            device: "sim:0",
            digest: None,
            generation: 1,
            lane: "0".to_owned(),
            fault: &fault,
            view: None,
        })
    }

    fn files(folder: &Path, extension: &str) -> usize {
        let Ok(files) = std::fs::read_dir(folder) else { return 0 };
        files.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|of| of == extension)).count()
    }

    #[test]
    fn a_dead_driver_is_left_alone_for_a_while_and_then_put_away_without_anybody_who_waits() {
        let folder = tempfile::tempdir().unwrap();
        let crashes = Crashes::new(Some(Spool::new(folder.path().to_owned())));
        let count = Arc::default();
        assert!(!crashes.begin(), "there is nothing to begin");
        let begun = Instant::now();
        crashes.bury(note(&crashes), Some(Counted::new(&count)));
        while crashes.begin() {
            assert!(begun.elapsed() < PATIENCE && !crashes.inside.lock().thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(begun.elapsed() >= GRACE);
        while count.load(Ordering::Relaxed) > 0 {
            assert!(begun.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(crashes.wait(begun + PATIENCE));
        assert_eq!((files(folder.path(), "json"), files(folder.path(), "core")), (1, 1));
        assert!(crashes.reports().iter().all(|report| report.core.as_ref().is_some_and(|core| core.exists())));
    }

    #[test]
    fn whoever_waits_does_not_wait_for_rests() {
        let folder = tempfile::tempdir().unwrap();
        let crashes = Crashes::new(Some(Spool::new(folder.path().to_owned())));
        crashes.bury(note(&crashes), Some(Counted::new(&Arc::default())));
        let rested = Arc::clone(&crashes);
        // A rest that nobody outlasts, which the one who waits has to end.
        let rests = std::thread::spawn(move || Pace::of(&rested).rest(PATIENCE));
        let begun = Instant::now();
        assert!(crashes.wait(begun + PATIENCE), "it is begun by whoever waits");
        assert_eq!(files(folder.path(), "json"), 1);
        crashes.inside.lock().waiters += 1;
        crashes.hurry.notify_all();
        rests.join().unwrap();
        assert!(begun.elapsed() < PATIENCE);
    }

    #[test]
    fn where_no_thread_is_to_be_had_what_is_known_is_kept_until_somebody_waits_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let spool = Some(Spool::new(folder.path().to_owned()));
        let crashes = Arc::new(Crashes::spawning(spool, |_| Err(std::io::ErrorKind::WouldBlock.into())));
        let count = Arc::default();
        // Two: the time of the first has come with the second.
        for _ in 0..2 {
            crashes.bury(note(&crashes), Some(Counted::new(&count)));
        }
        assert!(crashes.begin() && crashes.begin(), "it is tried again");
        assert_eq!((files(folder.path(), "json"), count.load(Ordering::Relaxed)), (0, 2));
        assert!(crashes.close(Instant::now() + PATIENCE));
        assert_eq!((files(folder.path(), "json"), files(folder.path(), "core")), (2, 2));
        assert_eq!(count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn every_crash_leaves_its_report_and_few_dead_drivers_wait() {
        let folder = tempfile::tempdir().unwrap();
        let crashes = Crashes::new(Some(Spool::new(folder.path().to_owned())));
        let count = Arc::default();
        for _ in 0..10 {
            crashes.bury(note(&crashes), Some(Counted::new(&count)));
            assert!(count.load(Ordering::Relaxed) <= WAITING);
        }
        assert!(crashes.close(Instant::now() + PATIENCE));
        assert_eq!((files(folder.path(), "json"), files(folder.path(), "core")), (10, WAITING));
        crashes.bury(note(&crashes), Some(Counted::new(&count)));
        assert_eq!(count.load(Ordering::Relaxed), 0, "the code has gone: nothing of it waits");
    }
}
