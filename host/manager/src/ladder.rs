//! The ladder: the one way out of a binding (DESIGN section 7, L1 to L7).
//!
//! ```text
//! close-gate -> revoke -> drain -> [interrupt] -> quiesce -> answer -> ports -> unmap -> drop -> release
//!                           |
//!                           +-- deadline or cancellation: still draining, run again to go on (L2)
//! ```
//!
//! Unload, a lost device, a faulty driver, a failed load and the daemon's end are [`Cause`]s of the same run (L4). Every stage is idempotent; [`Progress`] holds
//! what earlier runs found. Only `drain` may give up and come back: each of the others is bounded by itself.
//!
//! If the device cannot be shown to be silent, everything it can reach is retired, its requests are answered to nobody, and the certificate says so (L1).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_device::transport::Silence;
use cofferdam_gate::{Cancel, Notify};
use parking_lot::MutexGuard;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::binding::{Binding, BindingState, Parts};
use crate::certificate::{Certificate, Leaked, Outcome, Residual, Stage, StageTime};
use crate::error::UnloadError;
use crate::lane::LaneEnd;
use crate::residue::Marks;
use crate::watch::Watch;

/// How long a forced run waits for a healthy device before it cuts the drain short.
const FORCED_DRAIN: Duration = Duration::from_millis(100);
/// How long an interrupted guest may take to be out of its crossing: a few epoch ticks.
const INTERRUPT_BOUND: Duration = Duration::from_millis(500);
/// How long a device may take to become silent.
const QUIESCE_BOUND: Duration = Duration::from_millis(1000);
/// Longest sleep in `drain` between two looks at what has no descriptor to wait on (cancellation).
const DRAIN_SLICE: Duration = Duration::from_millis(20);

/// Why a binding leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An operator asked.
    Unload,
    /// The device went away.
    Removed,
    /// Driver or device broke the rules.
    Fault,
    /// The load did not succeed.
    LoadFailed,
    /// The daemon stops.
    Shutdown,
}

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

/// What the runs so far found; part of the binding, so that the next run goes on from it.
#[derive(Default)]
pub(crate) struct Progress {
    cause: Option<Cause>,
    forced: bool,
    counted: bool,
    handles_revoked: u64,
    calls_at_close: u64,
    calls_interrupted: u64,
    requests_at_close: u64,
    failed: u64,
    abandoned: u64,
    /// The device could not be shown to be silent: what it can reach is retired.
    unsilent: bool,
    leaked: Leaked,
    times: Vec<StageTime>,
}

impl Progress {
    fn timed<T>(&mut self, name: Stage, since: Instant, value: T) -> T {
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        match self.times.iter_mut().find(|time| time.name == name) {
            Some(time) => time.micros += micros,
            None => self.times.push(StageTime { name, micros }),
        }
        value
    }

    /// Something worse than what the binding was leaving for has happened to it.
    fn overtaken_by(&mut self, cause: Cause) {
        if matches!(self.cause, Some(Cause::Unload | Cause::Shutdown)) {
            self.cause = Some(cause);
        }
    }

    fn outcome(&self) -> Outcome {
        match self.cause {
            Some(Cause::Removed) => Outcome::Removed,
            Some(Cause::Fault) => Outcome::Failed,
            Some(Cause::LoadFailed) => Outcome::RolledBack,
            Some(Cause::Shutdown) => Outcome::Shutdown,
            _ if self.forced => Outcome::Forced,
            _ => Outcome::Unloaded,
        }
    }
}

/// `start` and `wait` later; a wait that no clock can hold is a day.
pub(crate) fn after(start: Instant, wait: Duration) -> Instant {
    start.checked_add(wait).unwrap_or(start + Duration::from_secs(86_400))
}

/// A load or another run may be in progress: both are bounded, but this caller waits no longer than it said, and can be called off (L2).
fn lock_parts<'a>(binding: &'a Binding, deadline: Instant, options: &UnloadOptions) -> Option<MutexGuard<'a, Parts>> {
    loop {
        if let Some(parts) = binding.parts.try_lock_until(deadline.min(Instant::now() + DRAIN_SLICE)) {
            return Some(parts);
        }
        if Instant::now() >= deadline || options.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
            return None;
        }
    }
}

enum Drained {
    /// Nothing is in flight.
    Empty,
    /// The device is gone: what is in flight cannot be completed.
    Lost,
    /// The device broke its rings' rules: nothing that it says is believed any more.
    Broken,
    /// A forced run's patience is over.
    Cut,
    /// The caller's patience is over.
    GaveUp,
}

/// Runs the ladder as far as it goes. On success the binding is detached and its certificate is the answer; a second run answers the same certificate.
pub(crate) fn run(binding: &Arc<Binding>, options: &UnloadOptions, watch: &Watch) -> Result<Certificate, UnloadError> {
    let started = Instant::now();
    let deadline = after(started, options.deadline);
    if options.force && options.cause == Cause::Unload {
        // Heard by a run that is under way, too.
        binding.force.store(true, Ordering::Release);
    }
    let Some(mut parts) = lock_parts(binding, deadline, options) else {
        // A load that is still at it finds the gate closed and rolls back; nothing is ever admitted.
        binding.gate().close();
        return Err(UnloadError::StillDraining {
            waited: started.elapsed(),
            waiting_for: "another load or unload of this binding is running".into(),
            so_far: Box::new(so_far(binding, &Progress::default())),
        });
    };
    if let Some(certificate) = binding.certificate.get() {
        return Ok(certificate.clone());
    }
    let span =
        tracing::info_span!("ladder", binding = binding.name(), driver = binding.driver(), device = binding.device());
    let _entered = span.enter();
    let first = parts.progress.cause.is_none();
    parts.progress.cause.get_or_insert(options.cause);
    parts.progress.forced |= options.force;
    if first {
        tracing::info!(cause = ?options.cause, "draining");
    }
    binding.set_state(BindingState::Draining);

    close_and_revoke(binding, &mut parts);
    let since = Instant::now();
    let drained = drain(binding, &mut parts, deadline, options);
    parts.progress.timed(Stage::Drain, since, ());
    if matches!(drained, Drained::GaveUp) {
        return Err(UnloadError::StillDraining {
            waited: started.elapsed(),
            waiting_for: waiting_for(binding, &parts),
            so_far: Box::new(so_far(binding, &parts.progress)),
        });
    }
    match drained {
        Drained::Lost => parts.progress.overtaken_by(Cause::Removed),
        Drained::Broken => parts.progress.overtaken_by(Cause::Fault),
        _ => {}
    }
    if !matches!(drained, Drained::Empty) {
        interrupt(binding, &mut parts);
    }
    quiesce_and_answer(&mut parts);
    take_down_ports(binding, &mut parts);
    let memory_retired = unmap(&mut parts);
    drop_code(&mut parts);
    watch.remove(binding);
    let certificate = release(binding, &mut parts, memory_retired);
    // The slot goes back for another binding; every handle keeps hearing that this gate is closed (G7). A gate that something never left is kept.
    if binding.gate().retire().is_err() && !binding.pinned {
        tracing::error!("something is still inside the gate");
    }
    binding.set_state(BindingState::Detached);
    tracing::info!(outcome = ?certificate.outcome, clean = certificate.residual.is_zero(), leaked_bytes = certificate.leaked.bytes, "detached");
    Ok(binding.certificate.get_or_init(|| certificate).clone())
}

/// G1: after the gate's barrier nothing is admitted. The numbers of the certificate are those of the first time.
fn close_and_revoke(binding: &Arc<Binding>, parts: &mut Parts) {
    let since = Instant::now();
    binding.gate().close();
    parts.progress.timed(Stage::CloseGate, since, ());
    let since = Instant::now();
    if !parts.progress.counted {
        parts.progress.counted = true;
        parts.progress.calls_at_close = binding.gate().crossings();
        // A pinned gate counts nothing; the ledgers do.
        let ledgers: usize = parts.lanes.iter().filter_map(|lane| lane.in_ledger()).sum();
        parts.progress.requests_at_close = binding.gate().operations().max(ledgers as u64);
    }
    parts.progress.handles_revoked += binding.revoke_handles();
    parts.progress.timed(Stage::Revoke, since, ());
}

/// Waits for operations and crossings, and reaps every vacant lane meanwhile, so that a client that stopped polling holds up nothing (L3).
fn drain(binding: &Arc<Binding>, parts: &mut Parts, deadline: Instant, options: &UnloadOptions) -> Drained {
    let gate = *binding.gate();
    let wake = Notify::new().ok();
    if let Some(wake) = &wake {
        gate.wake_drain_with(wake);
    }
    // An operator who forces wants an end; a binding that leaves by itself gives a healthy device all the time it has.
    let patience = if options.cause == Cause::Unload { FORCED_DRAIN } else { options.deadline };
    let mut forced_since = None;
    loop {
        if let Some(wake) = &wake {
            wake.clear();
        }
        let (mut pending, mut vacant) = (0, Vec::with_capacity(parts.lanes.len()));
        for lane in &parts.lanes {
            match lane.try_reap() {
                Some(left) => {
                    pending += left;
                    vacant.push(lane.device_fd());
                }
                None => pending += 1,
            }
        }
        let busy = vacant.len() < parts.lanes.len();
        if pending == 0 && gate.operations() == 0 && gate.crossings() == 0 {
            return Drained::Empty;
        }
        if parts.transport.as_ref().is_some_and(|transport| transport.lock().is_lost()) {
            return Drained::Lost;
        }
        if parts.lanes.iter().any(|lane| lane.device_is_broken()) {
            return Drained::Broken;
        }
        let now = Instant::now();
        parts.progress.forced |= binding.force.load(Ordering::Acquire);
        if parts.progress.forced {
            let since = *forced_since.get_or_insert(now);
            if now >= deadline || now.duration_since(since) >= patience {
                return Drained::Cut;
            }
        }
        if now >= deadline || options.cancel.as_ref().is_some_and(Cancel::is_cancelled) {
            return Drained::GaveUp;
        }
        let slice = if busy { Duration::from_millis(1) } else { DRAIN_SLICE };
        sleep_until_something(&vacant, wake.as_deref(), slice.min(deadline - now));
    }
}

/// Sleeps until the last leaver or a device wakes it, at most `slice`.
fn sleep_until_something(devices: &[BorrowedFd<'_>], wake: Option<&Notify>, slice: Duration) {
    let wake = wake.map(|wake| wake.fd());
    let fds = devices.iter().copied().chain(wake);
    let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    let wait = Timespec { tv_sec: slice.as_secs() as i64, tv_nsec: i64::from(slice.subsec_nanos()) };
    // EINTR only makes for an early look.
    let _ = poll(&mut fds, Some(&wait));
}

/// Who holds up the drain, in a sentence.
fn waiting_for(binding: &Binding, parts: &Parts) -> String {
    let requests = binding.gate().operations();
    let calls = binding.gate().crossings();
    let mut text = format!("{requests} requests in flight and {calls} calls in the driver");
    if let Some((token, age, stage)) =
        parts.lanes.iter().filter_map(|lane| lane.oldest()).max_by_key(|(_, age, _)| *age)
    {
        text.push_str(&format!(
            "; the oldest request ({token:#x}, {stage}) has waited {:.1} s for {}",
            age.as_secs_f64(),
            binding.device()
        ));
    }
    text
}

/// Ends guest code that is still running. The flag is this binding's stores' alone.
fn interrupt(binding: &Arc<Binding>, parts: &mut Parts) {
    let since = Instant::now();
    let running = binding.gate().crossings();
    for kill in &parts.kills {
        kill.kill();
    }
    if running > 0 {
        let bound = Instant::now() + INTERRUPT_BOUND;
        let _ = binding.gate().drain(cofferdam_gate::Drain::Crossings, Some(bound), &Cancel::new());
    }
    parts.progress.timed(Stage::Interrupt, since, ());
}

/// L1: nothing is answered as failed, freed or reused before the device is silent.
fn quiesce_and_answer(parts: &mut Parts) {
    let since = Instant::now();
    // What the device was never given needs no silence; and nothing more is given to it.
    let mut taken = true;
    for lane in &parts.lanes {
        match lane.withdraw() {
            Some(withdrawn) => parts.progress.failed += withdrawn as u64,
            None => taken = false,
        }
    }
    let mut silence = silence_device(parts, after(since, QUIESCE_BOUND));
    parts.progress.timed(Stage::Quiesce, since, ());

    let since = Instant::now();
    for lane in &parts.lanes {
        match lane.finish(silence == Silence::Confirmed && taken) {
            Some(LaneEnd { failed, abandoned, interrupted }) => {
                parts.progress.failed += failed as u64;
                parts.progress.abandoned += abandoned as u64;
                parts.progress.calls_interrupted += interrupted as u64;
            }
            None => taken = false,
        }
    }
    if !taken && silence == Silence::Confirmed {
        silence = Silence::Unconfirmed { reason: "a lane did not become vacant".to_owned() };
    }
    if let Silence::Unconfirmed { reason } = silence {
        let abandoned = parts.progress.abandoned;
        tracing::warn!(reason, abandoned, "device not shown to be silent, its memory is retired");
        parts.progress.unsilent = true;
        parts.progress.leaked.reason = match abandoned {
            0 => reason,
            _ => format!("{reason}; {abandoned} requests that the device may still act on were answered to nobody"),
        };
    }
    parts.progress.timed(Stage::Answer, since, ());
}

/// Asks for silence until `bound`, reaping between the attempts: a device that is merely slow ends with nothing unanswered.
fn silence_device(parts: &Parts, bound: Instant) -> Silence {
    let Some(transport) = &parts.transport else { return Silence::Confirmed };
    loop {
        let published: Option<usize> = parts.lanes.iter().map(|lane| lane.still_published()).sum();
        let Some(unanswered) = published else {
            return Silence::Unconfirmed { reason: "a lane did not become vacant".to_owned() };
        };
        // With nothing unanswered one attempt gets all the time there is.
        let until = if unanswered == 0 { bound } else { bound.min(Instant::now() + DRAIN_SLICE) };
        let silence = transport.lock().quiesce(unanswered, until);
        if silence == Silence::Confirmed || Instant::now() >= bound || unanswered == 0 {
            return silence;
        }
    }
}

fn take_down_ports(binding: &Arc<Binding>, parts: &mut Parts) {
    let since = Instant::now();
    binding.take_down_ports();
    parts.progress.timed(Stage::Ports, since, ());
}

/// Frees the DMA memory, or retires it if the device may still write there. Returns whether it was retired.
fn unmap(parts: &mut Parts) -> bool {
    let since = Instant::now();
    let retire = parts.progress.unsilent;
    for lane in &parts.lanes {
        lane.drop_rings();
    }
    if let Some(transport) = &parts.transport {
        transport.lock().release();
    }
    if let Some(rings) = parts.rings.take() {
        if retire {
            parts.progress.leaked.bytes += rings.retire();
        } else {
            rings.revoke();
        }
    }
    if let Some(arena) = parts.arena.take() {
        if retire {
            parts.progress.leaked.bytes += arena.retire();
        } else {
            arena.revoke();
        }
    }
    parts.progress.timed(Stage::Unmap, since, retire)
}

fn drop_code(parts: &mut Parts) {
    let since = Instant::now();
    for lane in &parts.lanes {
        lane.drop_driver();
    }
    parts.control = None;
    parts.module = None;
    parts.kills.clear();
    parts.progress.timed(Stage::Drop, since, ());
}

/// Gives the device up and looks up what is left (L7).
fn release(binding: &Arc<Binding>, parts: &mut MutexGuard<'_, Parts>, memory_retired: bool) -> Certificate {
    let since = Instant::now();
    parts.transport = None;
    let lanes = std::mem::take(&mut parts.lanes);
    let leased: u64 = lanes.iter().map(|lane| lane.arena().live_buffers()).max().unwrap_or(0);
    // A lane that cannot be looked into counts as one. An operation is in a ledger and in the gate: the larger number has them all.
    let ledgers: u64 = lanes.iter().map(|lane| lane.in_ledger().map_or(1, |left| left as u64)).sum();
    let requests = ledgers.max(binding.gate().operations());
    // What was retired on purpose is under `leaked`; its mappings and memfds are not looked for.
    let (mappings, dma_bytes) = if memory_retired { (0, 0) } else { parts.marks.mappings() };
    let fds = parts.marks.open_descriptors(!memory_retired);
    parts.marks = Marks::default();
    let residual = Residual {
        calls: binding.gate().crossings(),
        handles: binding.gate().handles() as u64,
        requests,
        buffers: if memory_retired { 0 } else { leased },
        dma_bytes,
        mappings,
        fds,
    };
    parts.progress.timed(Stage::Release, since, ());
    let outcome = parts.progress.outcome();
    draft(binding, &parts.progress, residual, outcome)
}

/// The certificate of a binding that has not ended, with what is there now.
fn so_far(binding: &Binding, progress: &Progress) -> Certificate {
    let arena = binding.serving.get().and_then(|serving| serving.lanes.first()).map(|lane| lane.arena());
    let residual = Residual {
        calls: binding.gate().crossings(),
        handles: binding.gate().handles() as u64,
        requests: binding.gate().operations(),
        buffers: arena.map_or(0, |arena| arena.live_buffers()),
        dma_bytes: arena.map_or(0, |arena| arena.region().len()),
        ..Residual::default()
    };
    draft(binding, progress, residual, Outcome::Draining)
}

fn draft(binding: &Binding, progress: &Progress, residual: Residual, outcome: Outcome) -> Certificate {
    Certificate {
        name: binding.name().to_owned(),
        driver: binding.driver().to_owned(),
        device: binding.device().to_owned(),
        generation: binding.generation(),
        outcome,
        handles_revoked: progress.handles_revoked,
        calls_at_close: progress.calls_at_close,
        calls_drained: progress.calls_at_close.saturating_sub(progress.calls_interrupted),
        calls_interrupted: progress.calls_interrupted,
        requests_at_close: progress.requests_at_close,
        requests_completed: progress.requests_at_close.saturating_sub(progress.failed + progress.abandoned),
        requests_failed: progress.failed,
        stages: progress.times.clone(),
        residual,
        leaked: progress.leaked.clone(),
    }
}
