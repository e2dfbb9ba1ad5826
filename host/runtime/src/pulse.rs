//! The ticker: makes epochs pass, so that guests are looked after while they run.
//!
//! One thread per [`Runtime`](crate::Runtime). It ticks every 10 ms while calls are being made and every 100 ms while none are. A call tells that it runs by
//! one store to a word of its own lane (`activity`, no shared line), and wakes the ticker if it finds it slow, which it reads from a word that changes only
//! with the pace. The ticker also notes since when it sees a call running, so that the calls themselves read no clock.
//!
//! A call that begins at the very moment in which the ticker slows down may miss the pace word (there is no fence on the call's side), and the ticker may miss the
//! call's word. Then the next slow tick, 100 ms later at most, finds the call: a deadline is late once, never lost.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use parking_lot::Mutex;
use wasmtime::Engine;

use crate::activity::{Activity, Export, clock_ms};

/// Time between ticks while guests run.
pub(crate) const TICK: Duration = Duration::from_millis(10);
/// Time between ticks while none does.
const SLOW_TICK: Duration = Duration::from_millis(100);
/// Ticks without a call after which the ticker slows down.
const IDLE_TICKS: u32 = 50;

const FAST: u8 = 0;
const SLOW: u8 = 1;

#[derive(Debug)]
struct Lane {
    activity: Weak<Activity>,
    seen: u32,
}

#[derive(Debug, Default)]
struct Shared {
    pace: AtomicU8,
    stop: AtomicBool,
    lanes: Mutex<Vec<Lane>>,
    /// Ticks so far, for tests.
    ticks: AtomicU64,
}

/// The ticker of one engine. Dropping it ends the thread and waits for that.
#[derive(Debug)]
pub(crate) struct Pulse {
    shared: Arc<Shared>,
    ticker: Thread,
    join: Option<JoinHandle<()>>,
}

impl Pulse {
    pub(crate) fn start(engine: Engine) -> io::Result<Pulse> {
        let shared = Arc::new(Shared::default());
        let join = thread::Builder::new().name("cofferdam-tick".into()).spawn({
            let shared = Arc::clone(&shared);
            move || run(&shared, &engine)
        })?;
        Ok(Pulse { shared, ticker: join.thread().clone(), join: Some(join) })
    }

    /// A lane more to look after, until its words are dropped.
    pub(crate) fn register(&self, activity: &Arc<Activity>) {
        self.shared.lanes.lock().push(Lane { activity: Arc::downgrade(activity), seen: 0 });
    }

    /// A call begins. Hot path: one store to the lane's own line, one load of a line that is written only when the pace changes.
    pub(crate) fn enter(&self, activity: &Activity, export: Export) {
        activity.enter(export);
        if self.shared.pace.load(Ordering::Relaxed) == SLOW {
            self.wake();
        }
    }

    /// A call has ended.
    #[allow(clippy::unused_self)] // The pair of `enter`.
    pub(crate) fn leave(&self, activity: &Activity) {
        activity.leave();
    }

    #[cold]
    fn wake(&self) {
        self.shared.pace.store(FAST, Ordering::Relaxed);
        self.ticker.unpark();
    }

    #[cfg(test)]
    pub(crate) fn is_slow(&self) -> bool {
        self.shared.pace.load(Ordering::Relaxed) == SLOW
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.ticker.unpark();
        if let Some(join) = self.join.take() {
            // The thread runs no code of a guest or a caller; it cannot have panicked on their data.
            let _ = join.join();
        }
    }
}

fn run(shared: &Shared, engine: &Engine) {
    let mut idle_ticks = 0;
    while !shared.stop.load(Ordering::Acquire) {
        engine.increment_epoch();
        shared.ticks.fetch_add(1, Ordering::Relaxed);
        idle_ticks = if shared.any_active() { 0 } else { idle_ticks + 1 };
        if idle_ticks < IDLE_TICKS {
            thread::park_timeout(TICK);
            continue;
        }
        shared.pace.store(SLOW, Ordering::Relaxed);
        // Partner: `enter`, which steps its word and then reads the pace. Either it reads SLOW and wakes us, or (mostly) we see its step here; see the top of the file.
        fence(Ordering::SeqCst);
        if !shared.any_active() {
            thread::park_timeout(SLOW_TICK);
        }
        if shared.pace.load(Ordering::Relaxed) == FAST || shared.any_active() {
            shared.pace.store(FAST, Ordering::Relaxed);
            idle_ticks = 0;
        }
    }
}

impl Shared {
    /// Whether a lane is in a call or was since the last look. Notes the calls that it finds.
    fn any_active(&self) -> bool {
        let mut active = false;
        let now_ms = clock_ms();
        self.lanes.lock().retain_mut(|lane| {
            let Some(activity) = lane.activity.upgrade() else { return false };
            let reading = activity.note(now_ms);
            active |= reading.is_inside() || reading.sequence() != lane.seen;
            lane.seen = reading.sequence();
            true
        });
        active
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn wait_until(what: &str, condition: impl Fn() -> bool) {
        let begun = Instant::now();
        while !condition() {
            assert!(begun.elapsed() < Duration::from_secs(20), "waited too long for: {what}");
            thread::yield_now();
        }
    }

    #[test]
    fn the_ticker_slows_down_without_calls_and_a_call_wakes_it() {
        let pulse = Pulse::start(Engine::default()).unwrap();
        let activity = Arc::new(Activity::default());
        pulse.register(&activity);
        wait_until("the slow pace", || pulse.is_slow());
        pulse.enter(&activity, Export::Submit);
        assert!(!pulse.is_slow());
        let begun = Instant::now();
        let ticks = || pulse.shared.ticks.load(Ordering::Relaxed);
        let before = ticks();
        wait_until("ten ticks", || ticks() >= before + 10);
        assert!(begun.elapsed() < 10 * SLOW_TICK / 2, "ten ticks took {:?}", begun.elapsed());
        // Still inside: it must not slow down, however long the call takes.
        let before = ticks();
        wait_until("more ticks than it takes to become idle", || ticks() > before + u64::from(IDLE_TICKS) + 10);
        assert!(!pulse.is_slow());
        assert!(activity.age(activity.reading()) >= TICK * IDLE_TICKS, "{:?}", activity.age(activity.reading()));
        pulse.leave(&activity);
        wait_until("the slow pace again", || pulse.is_slow());
    }

    #[test]
    fn dropping_the_pulse_ends_its_thread() {
        let pulse = Pulse::start(Engine::default()).unwrap();
        let shared = Arc::downgrade(&pulse.shared);
        drop(pulse);
        assert!(shared.upgrade().is_none(), "the thread still holds its state");
    }
}
