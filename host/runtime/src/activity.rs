//! What one instance is doing, in words that its caller writes and anybody may read.
//!
//! Everything about the call that is running is in **one** atomic word, so a reader can never mix two calls and the caller pays one plain store at each end of a
//! crossing. The word has one writer, whoever holds the lane; no other access to it is anything but a load.
//!
//! ```text
//! bit 63      58 57     54 53               32 31                              0
//!     | import | | export | |   thread id    | | sequence: odd inside a call   |
//! ```
//!
//! When a call began is noted by the ticker (`pulse`), the caller reads no clock.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::fault::GuestFault;
use crate::kill::KillSwitch;

/// A call into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Export {
    /// Start functions.
    Instantiate,
    Attach,
    ConfigChanged,
    Start,
    GetProperties,
    Submit,
    Complete,
    Window,
    AttachFunction,
    Received,
    Live,
    Events,
    SetOpen,
    Suspend,
    Resume,
}

/// By number of [`Export`].
const EXPORTS: [&str; 15] = [
    "instantiate",
    "attach",
    "config-changed",
    "start",
    "get-properties",
    "submit",
    "complete",
    "window",
    "function.attach",
    "received",
    "control.live",
    "control.events",
    "stream-control.set-open",
    "suspend",
    "resume",
];

/// A call out of the guest. Functions of this project's interfaces one by one, those of WASI by interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Import {
    LogWrite = 1,
    DeviceType,
    OfferedFeatures,
    Negotiate,
    ReadConfig,
    MaxQueues,
    MaxQueueSize,
    WasiPoll,
    WasiStreams,
    WasiClocks,
    WasiRandom,
    WasiCli,
    WasiFilesystem,
    MmioRead,
    MmioWrite,
    DmaAllocate,
    InterruptWait,
    Command,
    MaxLanes,
}

/// By number of [`Import`]; 0 is none.
const IMPORTS: [&str; 20] = [
    "",
    "log.write",
    "virtio.device.device-type",
    "virtio.device.offered-features",
    "virtio.device.negotiate",
    "virtio.device.read-config",
    "virtio.device.max-queues",
    "virtio.device.max-queue-size",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:clocks",
    "wasi:random",
    "wasi:cli",
    "wasi:filesystem",
    "mmio.function.read",
    "mmio.function.write",
    "dma.allocate",
    "interrupt.wait",
    "virtio.live-device.command",
    "virtio.device.max-lanes",
];

const THREAD_SHIFT: u32 = 32;
/// Linux gives no thread an id of more than 22 bits (`PID_MAX_LIMIT`).
const THREAD_MASK: u64 = (1 << 22) - 1;
const EXPORT_SHIFT: u32 = 54;
const EXPORT_MASK: u64 = (1 << 4) - 1;
const IMPORT_SHIFT: u32 = 58;
const IMPORT_MASK: u64 = (1 << 6) - 1;

/// One reading of the word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading(u64);

impl Reading {
    /// Changes with every begin and every end of a call.
    pub(crate) fn sequence(self) -> u32 {
        self.0 as u32
    }

    pub(crate) fn is_inside(self) -> bool {
        self.0 % 2 == 1
    }

    pub(crate) fn thread(self) -> u32 {
        (self.0 >> THREAD_SHIFT & THREAD_MASK) as u32
    }

    pub(crate) fn export(self) -> &'static str {
        EXPORTS.get((self.0 >> EXPORT_SHIFT & EXPORT_MASK) as usize).copied().unwrap_or("?")
    }

    pub(crate) fn import(self) -> Option<&'static str> {
        let number = (self.0 >> IMPORT_SHIFT & IMPORT_MASK) as usize;
        IMPORTS.get(number).copied().filter(|name| !name.is_empty())
    }
}

/// The word alone on its cache lines: its writer is on the hot path, and nobody else writes here.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Word(AtomicU64, [AtomicU16; RECENT]);

/// Calls that are remembered: each with its export, and above it the import that it was in last.
const RECENT: usize = 16;

/// What one instance is doing, and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    word: Word,
    /// Written by the ticker alone: the sequence of the call that it saw running, and when it saw it first (milliseconds of [`clock_ms`], upper half). In one word too.
    noted: AtomicU64,
    /// The instance's switch; empty until there is an instance.
    kill: OnceLock<KillSwitch>,
    /// The switch is to be thrown, also if it comes only later.
    doomed: AtomicBool,
    /// Set once: a dead instance stays dead (L5).
    fault: OnceLock<GuestFault>,
    /// Somebody wants to know where the guest is.
    asked: AtomicBool,
    sample: Mutex<Option<Sample>>,
    sampled: Condvar,
}

/// Where a guest was.
#[derive(Debug)]
struct Sample {
    sequence: u32,
    frames: Vec<String>,
}

impl Activity {
    /// Ties the words to the one instance that will write them. `false` if they have one.
    pub(crate) fn claim(&self, kill: &KillSwitch) -> bool {
        let first = self.kill.set(kill.clone()).is_ok();
        // Partner: `kill`. Either it finds the switch, or we find that it was here.
        fence(Ordering::SeqCst);
        if first && self.doomed.load(Ordering::Relaxed) {
            kill.kill();
        }
        first
    }

    /// Throws the instance's switch, now or as soon as it has one.
    pub(crate) fn kill(&self) {
        self.doomed.store(true, Ordering::Relaxed);
        // Partner: `claim`.
        fence(Ordering::SeqCst);
        if let Some(kill) = self.kill.get() {
            kill.kill();
        }
    }

    /// A call begins. Hot path: a load and a store of the caller's own line.
    pub(crate) fn enter(&self, export: Export) {
        let sequence = self.reading().sequence().wrapping_add(1) | 1;
        let thread = u64::from(thread_id()) & THREAD_MASK;
        let word = u64::from(sequence) | thread << THREAD_SHIFT | (export as u64) << EXPORT_SHIFT;
        self.word.0.store(word, Ordering::Relaxed);
        self.slot(sequence).store(export as u16, Ordering::Relaxed);
    }

    /// Where the call of this sequence is remembered.
    fn slot(&self, sequence: u32) -> &AtomicU16 {
        &self.word.1[(sequence / 2) as usize % RECENT]
    }

    /// The last calls, the latest first, by name, each with the import that it was in last. For when no call is running.
    pub(crate) fn recent(&self) -> Vec<(&'static str, Option<&'static str>)> {
        let last = self.reading().sequence().div_ceil(2);
        (0..last.min(RECENT as u32))
            .map(|back| {
                let slot = self.slot(2 * (last - back) - 1).load(Ordering::Relaxed);
                let import = IMPORTS.get(usize::from(slot >> 8)).copied().filter(|name| !name.is_empty());
                (EXPORTS.get(usize::from(slot & 0xff)).copied().unwrap_or("?"), import)
            })
            .collect()
    }

    /// The call has ended, however it did.
    pub(crate) fn leave(&self) {
        let sequence = (self.reading().sequence() | 1).wrapping_add(1);
        self.word.0.store(u64::from(sequence), Ordering::Relaxed);
    }

    /// The guest is in this import from here on, until [`Activity::no_import`] or the end of the call.
    pub(crate) fn import(&self, import: Import) {
        let word = self.word.0.load(Ordering::Relaxed) & !(IMPORT_MASK << IMPORT_SHIFT);
        self.word.0.store(word | (import as u64) << IMPORT_SHIFT, Ordering::Relaxed);
        let slot = self.slot(word as u32);
        slot.store(slot.load(Ordering::Relaxed) & 0xff | (import as u16) << 8, Ordering::Relaxed);
    }

    /// The guest runs its own code.
    pub(crate) fn no_import(&self) {
        let word = self.word.0.load(Ordering::Relaxed);
        self.word.0.store(word & !(IMPORT_MASK << IMPORT_SHIFT), Ordering::Relaxed);
    }

    /// As [`Activity::import`], until the guard is dropped; also when the import panics.
    pub(crate) fn within(&self, import: Import) -> Within<'_> {
        self.import(import);
        Within(self)
    }

    pub(crate) fn reading(&self) -> Reading {
        Reading(self.word.0.load(Ordering::Relaxed))
    }

    /// The ticker's look.
    pub(crate) fn note(&self, now_ms: u32) -> Reading {
        let reading = self.reading();
        if reading.is_inside() && self.noted.load(Ordering::Relaxed) as u32 != reading.sequence() {
            self.noted.store(u64::from(reading.sequence()) | u64::from(now_ms) << 32, Ordering::Relaxed);
        }
        reading
    }

    /// How long the call of this reading has run since the ticker saw it first; nothing if it has not yet.
    pub(crate) fn age(&self, reading: Reading) -> Duration {
        let noted = self.noted.load(Ordering::Relaxed);
        if noted as u32 != reading.sequence() {
            return Duration::ZERO;
        }
        // Wraps after 49 days, as the clock does.
        Duration::from_millis(u64::from(clock_ms().wrapping_sub((noted >> 32) as u32)))
    }

    pub(crate) fn is_killed(&self) -> bool {
        self.kill.get().is_some_and(KillSwitch::is_killed)
    }

    /// The instance's end. The first one counts.
    pub(crate) fn die(&self, fault: GuestFault) -> &GuestFault {
        self.fault.get_or_init(|| fault)
    }

    pub(crate) fn fault(&self) -> Option<&GuestFault> {
        self.fault.get()
    }

    /// Has the guest say where it is, at its next epoch tick.
    pub(crate) fn ask(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked; once.
    pub(crate) fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed) && self.asked.swap(false, Ordering::Relaxed)
    }

    /// Answers [`Activity::ask`], on the guest's thread. The lock is never held for longer than it takes to exchange the text.
    pub(crate) fn tell(&self, frames: Vec<String>) {
        let sample = Sample { sequence: self.reading().sequence(), frames };
        *self.sample.lock() = Some(sample);
        self.sampled.notify_all();
    }

    /// What the guest told in the call with this sequence, waiting until `until` for it.
    pub(crate) fn told(&self, sequence: u32, until: Instant) -> Option<Vec<String>> {
        let mut sample = self.sample.lock();
        loop {
            match &*sample {
                Some(sample) if sample.sequence == sequence => return Some(sample.frames.clone()),
                _ => {}
            }
            if self.reading().sequence() != sequence || self.sampled.wait_until(&mut sample, until).timed_out() {
                return None;
            }
        }
    }
}

/// See [`Activity::within`].
pub(crate) struct Within<'a>(&'a Activity);

impl Drop for Within<'_> {
    fn drop(&mut self) {
        self.0.no_import();
    }
}

/// Milliseconds since this process first asked.
pub(crate) fn clock_ms() -> u32 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    FIRST.get_or_init(Instant::now).elapsed().as_millis() as u32
}

/// The kernel's id of this thread, asked once per thread.
fn thread_id() -> u32 {
    thread_local! {
        static ID: Cell<u32> = const { Cell::new(0) };
    }
    ID.with(|id| {
        if id.get() == 0 {
            id.set(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs());
        }
        id.get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_name() {
        let activity = Activity::default();
        for (export, name) in [(Export::Instantiate, "instantiate"), (Export::Complete, "complete")] {
            activity.enter(export);
            assert_eq!((activity.reading().export(), activity.reading().import()), (name, None));
            activity.leave();
        }
        activity.enter(Export::Submit);
        for (import, name) in [(Import::LogWrite, "log.write"), (Import::WasiFilesystem, "wasi:filesystem")] {
            let within = activity.within(import);
            assert_eq!((activity.reading().export(), activity.reading().import()), ("submit", Some(name)));
            drop(within);
            assert_eq!(activity.reading().import(), None);
        }
    }

    #[test]
    fn the_last_calls_are_remembered_with_where_they_were() {
        let activity = Activity::default();
        assert_eq!(activity.recent(), []);
        activity.enter(Export::Start);
        activity.leave();
        activity.enter(Export::Submit);
        drop(activity.within(Import::LogWrite));
        activity.leave();
        assert_eq!(activity.recent(), [("submit", Some("log.write")), ("start", None)]);
        for _ in 0..40 {
            activity.enter(Export::Complete);
            activity.leave();
        }
        assert_eq!(activity.recent(), [("complete", None); RECENT]);
    }

    #[test]
    fn an_age_is_that_of_the_call_that_was_read() {
        let activity = Activity::default();
        activity.enter(Export::Submit);
        let first = activity.reading();
        activity.note(clock_ms().wrapping_sub(500));
        assert!(activity.age(first) >= Duration::from_millis(500));
        // A second look of the ticker is not a new beginning.
        activity.note(clock_ms());
        assert!(activity.age(first) >= Duration::from_millis(500));
        activity.leave();
        activity.enter(Export::Submit);
        assert_eq!(activity.age(activity.reading()), Duration::ZERO);
    }

    #[test]
    fn a_reader_never_mixes_two_calls() {
        use std::sync::Arc;
        use std::sync::atomic::AtomicBool;
        let (activity, stop) = (Arc::new(Activity::default()), Arc::new(AtomicBool::new(false)));
        // Each export with an import of its own, from two threads in turn, as two clients of a lane are.
        let calls = [(Export::Attach, Import::Negotiate), (Export::Submit, Import::LogWrite)];
        let lease = Arc::new(Mutex::new(()));
        let callers: Vec<_> = calls
            .map(|(export, import)| {
                let (activity, stop, lease) = (Arc::clone(&activity), Arc::clone(&stop), Arc::clone(&lease));
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let _lease = lease.lock();
                        for _ in 0..100 {
                            activity.enter(export);
                            drop(activity.within(import));
                            activity.leave();
                        }
                    }
                    thread_id()
                })
            })
            .into();
        let (mut seen, begun) = (Vec::new(), Instant::now());
        let kinds = |seen: &[(&str, Option<&str>, u32)]| {
            ["attach", "submit"].iter().all(|export| seen.iter().any(|call| call.0 == *export && call.1.is_some()))
        };
        while !kinds(&seen) && begun.elapsed() < Duration::from_secs(20) {
            for _ in 0..10_000 {
                let reading = activity.reading();
                let call = (reading.export(), reading.import(), reading.thread());
                if reading.is_inside() && !seen.contains(&call) {
                    seen.push(call);
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        let threads: Vec<u32> = callers.into_iter().map(|caller| caller.join().unwrap()).collect();
        let possible = [("attach", "virtio.device.negotiate", threads[0]), ("submit", "log.write", threads[1])];
        assert!(kinds(&seen), "{seen:?}");
        for (export, import, thread) in seen {
            let right = |call: &(&str, &str, u32)| {
                (call.0, call.2) == (export, thread) && import.is_none_or(|import| import == call.1)
            };
            assert!(possible.iter().any(right), "{export} {import:?} by {thread}, of {possible:?}");
        }
    }
}
