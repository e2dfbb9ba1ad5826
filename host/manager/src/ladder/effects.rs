//! What each effect of the life does to a binding. Every one is bounded, and may be carried out again after a run that died half-way (L2).

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cofferdam_device::transport::Silence;
use cofferdam_gate::{Cancel, Notify};
use cofferdam_lifecycle::{Effect, Event};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{SLICE, Wait, after};
use crate::binding::{Binding, Parts};
use crate::certificate::{Outcome, Residual, Stage};
use crate::device::SharedTransport;
use crate::events::EventKind;
use crate::lane::{Lane, LaneEnd};
use crate::residue::Marks;
use crate::watch::{SELF_DRAIN, Watch};

/// How long a forced run waits for a healthy device before it cuts the drain short.
const FORCED_DRAIN: Duration = Duration::from_millis(100);
/// How long an interrupted guest may take to be out of its crossing: a few epoch ticks.
const INTERRUPT_BOUND: Duration = Duration::from_millis(500);
/// How long a device may take to become silent.
const QUIESCE_BOUND: Duration = Duration::from_millis(1000);
/// How long the device's lock may be held by somebody else: a client that was just mapping memory waits for the device's answer.
const DEVICE_BUSY: Duration = Duration::from_millis(2500);
/// Longest wait of one effect for the leases of all lanes together. The guest that holds one was interrupted before.
const LEASES: Duration = Duration::from_millis(500);
/// How long crashes may take to be written down: some, each with the memory of a driver.
const BURIAL: Duration = Duration::from_secs(2);
/// Why the memory of a pinned binding stays.
const PINNED: &str = "loaded --pinned: its calls are not counted, so memory and code stay until the daemon stops";

/// Does what the life asks for and says what came of it.
pub(super) fn carry_out(
    effect: Effect,
    binding: &Arc<Binding>,
    parts: &mut Parts,
    wait: &Wait<'_>,
    watch: &Watch,
) -> Event {
    let since = Instant::now();
    let (stage, event) = match effect {
        Effect::CloseGate => (Stage::CloseGate, close_gate(binding)),
        Effect::RevokeHandles => (Stage::Revoke, revoke_handles(binding, parts)),
        Effect::Drain => (Stage::Drain, drain(binding, parts, wait)),
        Effect::Interrupt => (Stage::Interrupt, interrupt(binding)),
        Effect::Quiesce => (Stage::Quiesce, quiesce(parts)),
        Effect::Answer => (Stage::Answer, answer(parts)),
        Effect::Abandon => (Stage::Answer, abandon(parts)),
        Effect::DetachPorts => {
            for port in binding.take_down_ports() {
                parts
                    .progress
                    .leak(0, &format!("the port {port} did not end: its threads and sockets are left behind"));
            }
            (Stage::Ports, Event::PortsDetached)
        }
        Effect::Unmap => (Stage::Unmap, unmap(binding, parts, watch)),
        Effect::Retire => (Stage::Unmap, retire(binding, parts, watch)),
        Effect::DropCode => (Stage::Drop, drop_code(binding, parts)),
        Effect::KeepCode => (Stage::Drop, keep_code(binding, parts)),
        Effect::Release => return release(binding, parts),
        // States in which nobody is on the ladder, or nothing is left to do. `run` enters the ladder before it asks, so these have no result to tell.
        Effect::Build | Effect::Serve | Effect::Recover | Effect::Refuse | Effect::Pause | Effect::Nothing => {
            return Event::GaveUp;
        }
    };
    parts.progress.timed(stage, since);
    event
}

/// G1: after the gate's barrier nothing is admitted.
fn close_gate(binding: &Binding) -> Event {
    binding.gate().close();
    binding.control.close();
    Event::GateClosed
}

/// Handles answer `revoked`, sleepers wake. The numbers of the certificate are those of the first time.
fn revoke_handles(binding: &Binding, parts: &mut Parts) -> Event {
    if !parts.progress.counted {
        parts.progress.counted = true;
        parts.progress.calls_at_close = binding.gate().crossings();
        // A pinned gate counts nothing; the ledgers do.
        let ledgers: u64 = parts.lanes.iter().map(|lane| lane.unanswered()).sum();
        parts.progress.requests_at_close = binding.gate().operations().max(ledgers);
        parts.progress.lost_before = lost(parts);
    }
    parts.progress.handles_revoked += binding.revoke_handles();
    Event::HandlesRevoked
}

/// Requests that were failed before the device had them.
fn lost(parts: &Parts) -> u64 {
    parts.lanes.iter().map(|lane| lane.lost()).sum()
}

/// Waits for operations and crossings, and reaps every vacant lane meanwhile, so that a client that stopped polling holds up nothing (L3).
fn drain(binding: &Binding, parts: &mut Parts, wait: &Wait<'_>) -> Event {
    let gate = *binding.gate();
    let wake = Notify::new().ok();
    if let Some(wake) = &wake {
        gate.wake_drain_with(wake);
    }
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
        let told = !binding.control.is_inside();
        if pending == 0 && told && gate.operations() == 0 && gate.crossings() == 0 {
            return Event::Drained;
        }
        // Whoever has the device's lock for long, a client that maps memory, is waiting for the device: it will be looked at again.
        let is_lost = |transport: &SharedTransport| transport.try_lock().is_some_and(|mut device| device.is_lost());
        if parts.transport.as_ref().is_some_and(is_lost) {
            return Event::DeviceLost;
        }
        if parts.lanes.iter().any(|lane| lane.device_is_broken()) {
            return Event::DeviceBroken;
        }
        let now = Instant::now();
        if binding.life().forced() {
            let since = *forced_since.get_or_insert(now);
            // An operator who forces wants an end; a binding that leaves by itself gives a healthy device all the time it has.
            let patience = if binding.hurried.load(Ordering::Acquire) { FORCED_DRAIN } else { SELF_DRAIN };
            if now.duration_since(since) >= patience || (wait.options.force && wait.is_over()) {
                return Event::CutShort;
            }
        }
        if wait.is_over() {
            return Event::GaveUp;
        }
        let slice = if busy { Duration::from_millis(1) } else { SLICE };
        sleep_until_something(&vacant, wake.as_deref(), slice.min(wait.deadline.saturating_duration_since(now)));
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

/// Ends guest code that is still running. The flag is this binding's stores' alone.
fn interrupt(binding: &Binding) -> Event {
    let running = binding.gate().crossings();
    binding.end_guests();
    if running > 0 {
        let bound = Instant::now() + INTERRUPT_BOUND;
        let _ = binding.gate().drain(cofferdam_gate::Drain::Crossings, Some(bound), &Cancel::new());
    }
    Event::Interrupted
}

/// L1: nothing is answered as failed, freed or reused before the device is silent. What it was never given needs no silence, and nothing more is given to it.
fn quiesce(parts: &mut Parts) -> Event {
    let mut taken = true;
    let until = Instant::now() + LEASES;
    for lane in &parts.lanes {
        match lane.withdraw(until) {
            Some(withdrawn) => parts.progress.failed += withdrawn as u64,
            None => taken = false,
        }
    }
    let silence = match silence_device(parts) {
        Silence::Confirmed if !taken => Silence::Unconfirmed { reason: NOT_VACANT.to_owned() },
        silence => silence,
    };
    match silence {
        Silence::Confirmed => Event::Silent,
        Silence::Unconfirmed { reason } => {
            tracing::warn!(reason, "device not shown to be silent, its memory is retired");
            parts.progress.leak(0, &reason);
            Event::NotSilent
        }
    }
}

const NOT_VACANT: &str = "a lane did not become vacant";

/// Asks for silence for as long as a device may take, reaping between the attempts: one that is merely slow ends with nothing unanswered.
fn silence_device(parts: &Parts) -> Silence {
    let Some(transport) = &parts.transport else { return Silence::Confirmed };
    silence(transport, &parts.lanes, QUIESCE_BOUND)
}

/// The same, for at most `bound` and a little.
pub(crate) fn silence(transport: &SharedTransport, lanes: &[Arc<Lane>], bound: Duration) -> Silence {
    let not_vacant = || Silence::Unconfirmed { reason: NOT_VACANT.to_owned() };
    // The device's time begins when it can be spoken to.
    let Some(mut device) = transport.try_lock_for(DEVICE_BUSY) else {
        return Silence::Unconfirmed { reason: "the device does not answer a client that maps memory".to_owned() };
    };
    let bound = after(Instant::now(), bound);
    let calls: Vec<_> = lanes.iter().map(|lane| lane.device_fd()).collect();
    loop {
        let until = Instant::now() + LEASES;
        let published: Option<usize> = lanes.iter().map(|lane| lane.still_published(until)).sum();
        let Some(unanswered) = published else { return not_vacant() };
        // With nothing unanswered one attempt gets all the time there is.
        let slice = if unanswered == 0 { bound } else { bound.min(Instant::now() + SLICE) };
        let silence = device.quiesce(unanswered, slice);
        if silence == Silence::Confirmed || Instant::now() >= bound || unanswered == 0 {
            return silence;
        }
        // A device that knows its answer at once is not asked in a circle.
        sleep_until_something(&calls, None, slice.saturating_duration_since(Instant::now()));
    }
}

/// The device is silent: what completed is answered, the rest is failed.
fn answer(parts: &mut Parts) -> Event {
    if finish(parts, true) { Event::Answered } else { Event::NotSilent }
}

/// The device may still act on what it was given: that is answered to nobody, and its buffers are never given back.
fn abandon(parts: &mut Parts) -> Event {
    finish(parts, false);
    let abandoned = parts.progress.abandoned;
    if abandoned > 0 {
        parts.progress.leak(0, &format!("{} that the device may still act on answered to nobody", count(abandoned)));
    }
    Event::Abandoned
}

fn count(requests: u64) -> String {
    if requests == 1 { "1 request".to_owned() } else { format!("{requests} requests") }
}

/// Whether every lane could be looked into.
fn finish(parts: &mut Parts, silent: bool) -> bool {
    let mut all = true;
    let until = Instant::now() + LEASES;
    for lane in &parts.lanes {
        match lane.finish(silent, until) {
            Some(LaneEnd { failed, abandoned, interrupted }) => {
                parts.progress.failed += failed as u64;
                parts.progress.abandoned += abandoned as u64;
                parts.progress.calls_interrupted += interrupted as u64;
            }
            None => all = false,
        }
    }
    all
}

/// Frees what the device could reach: it does not any more.
fn unmap(binding: &Arc<Binding>, parts: &mut Parts, watch: &Watch) -> Event {
    give_up_transport(binding, parts, watch);
    binding.regions().end(true);
    if let Some(rings) = parts.rings.take() {
        rings.revoke();
    }
    if let Some(arena) = parts.arena.take() {
        arena.revoke();
    }
    Event::Unmapped
}

/// Keeps what the device may still reach, or what calls that nobody counted may still reach, for as long as the process lives.
fn retire(binding: &Arc<Binding>, parts: &mut Parts, watch: &Watch) -> Event {
    if binding.life().silent() == Some(true) {
        parts.progress.leak(0, PINNED);
    }
    give_up_transport(binding, parts, watch);
    parts.progress.leaked.bytes += binding.regions().end(false);
    if let Some(rings) = parts.rings.take() {
        parts.progress.leaked.bytes += rings.retire();
    }
    if let Some(arena) = parts.arena.take() {
        parts.progress.leaked.bytes += arena.retire();
    }
    Event::Retired
}

fn give_up_transport(binding: &Arc<Binding>, parts: &mut Parts, watch: &Watch) {
    // What hangs up from here on does so because it is given up.
    watch.remove(binding);
    let until = Instant::now() + LEASES;
    for lane in &parts.lanes {
        lane.drop_rings(until);
    }
    binding.control.drop_rings(until);
    if let Some(transport) = &parts.transport {
        // Nobody maps any more behind the handles' revocation, and whoever did was waited for in `silence_device`.
        transport.lock().release();
    }
}

/// Drops stores and code. A lane that a call has not left keeps its store (G9), and that is told.
fn drop_code(binding: &Binding, parts: &mut Parts) -> Event {
    let until = Instant::now() + LEASES;
    let mut kept = parts.lanes.iter().filter(|lane| !lane.drop_driver(until)).count();
    kept += usize::from(binding.control.take_control(until).is_err());
    parts.control = None;
    parts.module = None;
    if let Some(recovery) = binding.recovery.get() {
        // Instances that broke down go when they are written down.
        kept += usize::from(!recovery.end(Instant::now() + BURIAL));
    }
    if kept == 0 {
        return Event::CodeDropped;
    }
    parts.progress.leak(0, NOT_VACANT);
    Event::CodeKept
}

/// Pinned: nobody counted who is inside, so the code stays until the process ends.
fn keep_code(binding: &Binding, parts: &mut Parts) -> Event {
    let until = Instant::now() + LEASES;
    let stores: u64 = parts.lanes.iter().map(|lane| lane.keep_driver(until)).sum();
    parts.progress.leaked.bytes += stores;
    // A call that is in there keeps it as long as it takes, and the binding with it.
    let control = binding.control.take_control(until).ok().flatten();
    for control in parts.control.take().into_iter().chain(control) {
        parts.progress.leaked.bytes += control.memory_bytes();
        std::mem::forget(control);
    }
    std::mem::forget(parts.module.take());
    parts.progress.leak(0, PINNED);
    Event::CodeKept
}

/// Gives the device up, looks up what is left (L7) and writes the certificate.
fn release(binding: &Arc<Binding>, parts: &mut Parts) -> Event {
    let since = Instant::now();
    parts.transport = None;
    parts.progress.failed += lost(parts) - parts.progress.lost_before;
    let lanes = std::mem::take(&mut parts.lanes);
    let leased: u64 = lanes.iter().map(|lane| lane.arena().live_buffers()).max().unwrap_or(0);
    // A lane that cannot be looked into counts as one. An operation is in a ledger and in the gate: the larger number has them all.
    let until = Instant::now() + LEASES;
    let ledgers: u64 = lanes.iter().map(|lane| lane.in_ledger(until).map_or(1, |left| left as u64)).sum();
    let requests = ledgers.max(binding.gate().operations());
    // What was retired on purpose is under `leaked`; its mappings and memfds are not looked for.
    let retired = parts.progress.leaked.bytes > 0;
    let (mappings, dma_bytes) = if retired { (0, 0) } else { parts.marks.mappings() };
    let fds = parts.marks.open_descriptors(!retired);
    parts.marks = Marks::default();
    let residual = Residual {
        calls: binding.gate().crossings(),
        handles: binding.gate().handles() as u64,
        requests,
        buffers: if retired { 0 } else { leased },
        dma_bytes,
        mappings,
        fds,
    };
    parts.progress.timed(Stage::Release, since);
    // The slot goes back for another binding; every handle keeps hearing that this gate is closed (G7). A gate that something never left is kept.
    if binding.gate().retire().is_err() && !binding.pinned {
        tracing::error!("something is still inside the gate");
    }
    let leaked = parts.progress.leaked.clone();
    if leaked.bytes > 0 {
        binding.record(EventKind::Retired { bytes: leaked.bytes, reason: leaked.reason });
    }
    let mut life = binding.life();
    let _ = life.apply(Event::Released);
    let outcome = life.outcome().map_or(Outcome::Draining, Outcome::from);
    let certificate = parts.progress.draft(binding, residual, outcome);
    let clean = certificate.residual.is_zero();
    tracing::info!(?outcome, clean, leaked_bytes = certificate.leaked.bytes, "detached");
    // The first one stays: a run that died between this and the next step comes here again with nothing left to count.
    let _ = binding.certificate.set(certificate);
    Event::Released
}
