//! The ladder: the one way out of a binding (DESIGN section 7, L1 to L7).
//!
//! What comes after what is not written here but in `cofferdam-lifecycle` (printed in `docs/LIFECYCLE.md`): this module asks the binding's life what to do, does it, and
//! tells the life what came of it, until the binding is detached or a caller's patience is over. Unload, a lost device, a faulty driver, a failed load and the
//! daemon's end are [`Cause`]s of the same run (L4).
//!
//! ```text
//! run        one caller's way down: enter, take turns with other callers, carry effects out, give up at the deadline
//! effects    what each effect does to the binding; every one may be carried out again (L2)
//! progress   the numbers of the certificate, kept from run to run
//! ```

mod effects;
mod progress;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_gate::Cancel;
use cofferdam_lifecycle::{Effect, Event, Refused, State};
use parking_lot::MutexGuard;

use crate::binding::{Binding, Parts};
use crate::certificate::{Certificate, Outcome};
use crate::error::UnloadError;
use crate::ports::Within;
use crate::watch::Watch;

pub use cofferdam_lifecycle::Cause;
pub(crate) use effects::silence;
pub(crate) use progress::Progress;

/// Longest sleep between two looks at what has no descriptor to wait on (cancellation).
const SLICE: Duration = Duration::from_millis(20);

/// How an unload is carried out.
#[derive(Clone, Debug)]
pub struct UnloadOptions {
    /// How long this call may wait for the drain.
    pub deadline: Duration,
    /// Interrupt guests and cut the drain short instead of giving up at the deadline.
    pub force: bool,
    /// Ends the wait from another thread; the binding stays draining.
    pub cancel: Option<Cancel>,
    /// Why.
    pub cause: Cause,
}

impl Default for UnloadOptions {
    fn default() -> UnloadOptions {
        UnloadOptions { deadline: Duration::from_secs(5), force: false, cancel: None, cause: Cause::Unload }
    }
}

/// One caller's wait.
struct Wait<'a> {
    started: Instant,
    deadline: Instant,
    options: &'a UnloadOptions,
}

impl Wait<'_> {
    fn is_over(&self) -> bool {
        Instant::now() >= self.deadline || self.options.cancel.as_ref().is_some_and(Cancel::is_cancelled)
    }
}

/// In microseconds, as reports have it.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// `start` and `wait` later; a wait that no clock can hold is a day.
pub(crate) fn after(start: Instant, wait: Duration) -> Instant {
    start.checked_add(wait).unwrap_or(start + Duration::from_secs(86_400))
}

/// Runs the ladder as far as it goes. On success the binding is detached and its certificate is the answer; a second run answers the same certificate.
pub(crate) fn run(binding: &Arc<Binding>, options: &UnloadOptions, watch: &Watch) -> Result<Certificate, UnloadError> {
    let started = Instant::now();
    let wait = Wait { started, deadline: after(started, options.deadline), options };
    let span =
        tracing::info_span!("ladder", binding = binding.name(), driver = %binding.driver(), device = binding.device());
    let _entered = span.enter();
    // Before anybody's turn is over: a force is heard by a run that is under way, and a load that is still at it will find that it has to roll back.
    enter(binding, options)?;
    if options.force && matches!(options.cause, Cause::Unload | Cause::Shutdown) {
        binding.hurried.store(true, Ordering::Release);
        watch.end_guests_of(binding);
    }
    let Some(mut parts) = lock_parts(binding, &wait) else {
        binding.gate().close();
        let mut waits_for = binding.explain().waits_for;
        waits_for.push("another load or unload of this binding is running".to_owned());
        let so_far = binding.so_far.lock().clone();
        return Err(still_draining(binding, &so_far, &wait, waits_for.join("; ")));
    };
    let _within = Within::enter();
    // Again: a run before this one may have given up meanwhile.
    enter(binding, options)?;
    loop {
        let effect = binding.life().effect();
        if effect == Effect::Nothing {
            break;
        }
        let event = effects::carry_out(effect, binding, &mut parts, &wait, watch);
        // For callers who wait for their turn.
        *binding.so_far.lock() = parts.progress.clone();
        // Asked while it is still true that somebody waits.
        let waiting_for = (event == Event::GaveUp).then(|| binding.explain().waits_for.join("; "));
        if let Err(refused) = binding.step(event) {
            // The table has a row for every result of every effect (its tests), so this is a defect; to stop here loses nothing.
            tracing::error!(%refused, "the ladder stopped");
            return Err(still_draining(binding, &parts.progress, &wait, format!("a defect of the host: {refused}")));
        }
        if let Some(waiting_for) = waiting_for {
            return Err(still_draining(binding, &parts.progress, &wait, waiting_for));
        }
    }
    match binding.certificate.get() {
        Some(certificate) => Ok(certificate.clone()),
        None => Err(still_draining(binding, &parts.progress, &wait, "a defect of the host: no certificate".into())),
    }
}

/// Tells the binding's life that somebody wants it to leave.
fn enter(binding: &Binding, options: &UnloadOptions) -> Result<(), UnloadError> {
    match binding.step(Event::Leave { cause: options.cause, force: options.force }) {
        Ok(_) => Ok(()),
        Err(Refused::Pinned) => Err(UnloadError::Pinned(binding.name().to_owned())),
        // It has left already: the certificate is there.
        Err(Refused::Illegal { state: State::Detached, .. }) => Ok(()),
        Err(refused @ Refused::Illegal { .. }) => {
            tracing::error!(%refused, "an entry to the ladder was refused");
            Ok(())
        }
    }
}

/// A load or another run may be in progress: both are bounded, but this caller waits no longer than it said, and can be called off (L2).
fn lock_parts<'a>(binding: &'a Binding, wait: &Wait<'_>) -> Option<MutexGuard<'a, Parts>> {
    loop {
        if let Some(parts) = binding.parts.try_lock_until(wait.deadline.min(Instant::now() + SLICE)) {
            return Some(parts);
        }
        if wait.is_over() {
            return None;
        }
    }
}

fn still_draining(binding: &Binding, progress: &Progress, wait: &Wait<'_>, waiting_for: String) -> UnloadError {
    UnloadError::StillDraining {
        waited: wait.started.elapsed(),
        waiting_for,
        so_far: Box::new(progress.draft(binding, progress::now(binding), Outcome::Draining)),
    }
}
