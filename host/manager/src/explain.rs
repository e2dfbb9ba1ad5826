//! Who holds what: the answer of `why`, in every state of a binding.
//!
//! Nothing here waits for a lane's lease, for the lock that a load or the ladder holds, or for any other that is held across a call into the driver: the answer is wanted
//! most when one of those is stuck. What the parts say was read one after the other, so a request may be told in one and be over in the next.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use cofferdam_lifecycle::{Life, Phase, State};
use cofferdam_runtime::{CallView, GuestFault, LaneId, RunningCall, clean};
use serde::{Deserialize, Serialize};

use crate::binding::Binding;
use crate::board::Waiting;
use crate::certificate::Certificate;
use crate::error::LaneFault;
use crate::ledger::Stage;
use crate::request::IoOp;
use crate::status::HandleStatus;

/// Requests that are told one by one.
const MOST_REQUESTS: usize = 16;
/// A call that has run for so long is asked where it is.
const LONG_CALL: Duration = Duration::from_millis(50);
/// How long all answers to that may take together: the guest gives them at its next tick, 10 ms later. The longest that an explanation waits for anything.
const BACKTRACE_PATIENCE: Duration = Duration::from_millis(30);
/// Longest address that is shown in a sentence, in bytes.
const MAX_ADDRESS_BYTES: usize = 256;

/// Why a binding is where it is, and what it waits for. Field by field what `cofferdam why --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The binding's name.
    pub name: String,
    /// `loading`, `serving`, `recovering`, `failed`, `draining` or `detached`.
    pub phase: String,
    /// The exact state in its life.
    pub state: String,
    /// Why it is leaving, if it is.
    pub cause: Option<String>,
    /// Somebody wants it to leave by force.
    pub forced: bool,
    /// Whether it was loaded `--pinned`.
    pub pinned: bool,
    /// Since when it has been leaving, in milliseconds.
    pub draining_ms: Option<u64>,
    /// Sentences for an operator, the most important first; empty when nothing is waited for.
    pub waits_for: Vec<String>,
    /// Open handles.
    pub handles: Vec<HandleStatus>,
    /// The 16 oldest requests that are not answered, over all lanes, oldest first.
    pub requests: Vec<RequestStatus>,
    /// Calls into the driver that are running.
    pub calls: Vec<CallStatus>,
    /// What ended the driver, if something did.
    pub fault: Option<FaultStatus>,
    /// Bytes of memory that were put aside on purpose, because the device may still write there.
    pub retired_bytes: u64,
    /// The certificate, once the binding has left.
    pub certificate: Option<Certificate>,
}

/// A request that is not answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestStatus {
    /// Its lane.
    pub lane: usize,
    /// Its name between host and driver, in hexadecimal: generation and slot.
    pub token: String,
    /// The handle that it came through; which may be closed by now.
    pub handle: u64,
    /// `read`, `write`, `flush`, `discard`, `write-zeroes` or `get-id`.
    pub operation: String,
    /// Milliseconds since it was admitted.
    pub age_ms: u64,
    /// `given`: the driver has it. `parked`: its chain waits for room on the ring. `published`: the device may act on it.
    pub stage: String,
}

/// A call into the driver that is running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallStatus {
    /// `control`, or the data lane's number.
    pub lane: String,
    /// The driver's function: `submit`.
    pub export: String,
    /// The host's function that the driver is in: `log.write`.
    pub import: Option<String>,
    /// Milliseconds since the call was noticed, which is at most one tick (10 ms) after it began; 100 ms for the first call after a pause.
    pub age_ms: u64,
    /// The name of the thread that makes the call; its number if the name cannot be had.
    pub thread: String,
    /// The core that the thread is on, or was last on.
    pub core: Option<u32>,
    /// The driver was told to stop, and is not out yet.
    pub interrupted: bool,
    /// Where in its own code the driver is, innermost frame first: of calls that have run for 50 ms and are not in a host function. The driver goes on undisturbed.
    pub backtrace: Vec<String>,
}

/// What ended a driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultStatus {
    /// `trap`, `deadline`, `killed`, `out-of-memory` or `layout` of the driver; `device` when the device broke the queue's rules.
    pub kind: String,
    /// What happened, in a sentence; text of the guest's is bounded and escaped.
    pub message: String,
    /// Where the driver was when it was stopped, innermost frame first, at most 32.
    pub backtrace: Vec<String>,
}

impl Binding {
    /// Who holds what, now. Takes milliseconds whatever the driver, the device and the clients do.
    pub fn explain(&self) -> Explanation {
        let life = self.life();
        let handles = self.handle_statuses();
        let calls = calls(&self.views());
        let waiting = Waitings::of(self);
        let waits_for = sentences(self, &life, &handles, &calls, &waiting);
        Explanation {
            name: self.name().to_owned(),
            phase: life.phase().as_str().to_owned(),
            state: life.state().as_str().to_owned(),
            cause: life.cause().map(|cause| cause.as_str().to_owned()),
            forced: life.forced(),
            pinned: self.pinned,
            draining_ms: self.leaving_for().map(millis),
            waits_for,
            handles,
            requests: waiting.oldest.iter().map(request_status).collect(),
            calls,
            fault: self.fault_status(),
            retired_bytes: self.retired_bytes(),
            certificate: self.certificate().cloned(),
        }
    }

    /// What the binding leaves for; or what ended one of its instances, which for a failed load or an interrupted guest is all there is.
    fn fault_status(&self) -> Option<FaultStatus> {
        match self.fault() {
            Some(LaneFault::Guest(fault)) => Some(guest_fault(fault)),
            Some(LaneFault::Device(fault)) => {
                Some(FaultStatus { kind: "device".to_owned(), message: fault.to_string(), backtrace: Vec::new() })
            }
            None => self.views().iter().find_map(|(_, view)| view.fault().map(guest_fault)),
        }
    }
}

fn guest_fault(fault: &GuestFault) -> FaultStatus {
    FaultStatus {
        kind: fault.kind.as_str().to_owned(),
        message: fault.message.clone(),
        backtrace: fault.backtrace.clone(),
    }
}

/// The calls that are running, the longest first.
fn calls(views: &[(LaneId, CallView)]) -> Vec<CallStatus> {
    let running: Vec<(LaneId, &CallView, RunningCall)> =
        views.iter().filter_map(|(lane, view)| Some((*lane, view, view.running()?))).collect();
    let is_asked = |call: &RunningCall| call.import.is_none() && call.age >= LONG_CALL;
    // All are asked before the first is waited for.
    running.iter().filter(|(_, _, call)| is_asked(call)).for_each(|(_, view, _)| view.ask_backtrace());
    let until = Instant::now() + BACKTRACE_PATIENCE;
    let mut calls: Vec<CallStatus> = running
        .iter()
        .filter_map(|(lane, view, call)| {
            let backtrace = if is_asked(call) { view.backtrace(call, until) } else { None };
            let place = view.whereabouts(call);
            // Without a place it is over, or the kernel would not say.
            if place.is_none() && !view.is_in(call) {
                return None;
            }
            let (thread, core) = match place {
                Some(place) => (place.thread, Some(place.core)),
                None => (call.thread.to_string(), None),
            };
            Some(CallStatus {
                lane: lane.to_string(),
                export: call.export.to_owned(),
                import: call.import.map(str::to_owned),
                age_ms: millis(call.age),
                thread,
                core,
                interrupted: call.interrupted,
                backtrace: backtrace.unwrap_or_default(),
            })
        })
        .collect();
    calls.sort_by_key(|call| std::cmp::Reverse(call.age_ms));
    calls
}

/// What stands on the boards of all lanes.
#[derive(Default)]
struct Waitings {
    counts: [u64; 3],
    oldest_by_stage: [Option<Waiting>; 3],
    oldest: Vec<(usize, Waiting)>,
}

impl Waitings {
    fn of(binding: &Binding) -> Waitings {
        let mut all = Waitings::default();
        // Before a binding serves it has no requests.
        let lanes = binding.serving.get().map_or(&[][..], |serving| &serving.lanes);
        for (lane, picture) in lanes.iter().map(|lane| lane.waiting(MOST_REQUESTS)).enumerate() {
            for stage in Stage::ALL.map(|stage| stage as usize) {
                all.counts[stage] += picture.stages[stage];
                let eldest = &mut all.oldest_by_stage[stage];
                *eldest =
                    [*eldest, picture.oldest_by_stage[stage]].into_iter().flatten().max_by_key(|waiting| waiting.age);
            }
            all.oldest.extend(picture.oldest.into_iter().map(|waiting| (lane, waiting)));
        }
        all.oldest.sort_by_key(|(_, waiting)| std::cmp::Reverse(waiting.age));
        all.oldest.truncate(MOST_REQUESTS);
        all
    }
}

fn request_status((lane, waiting): &(usize, Waiting)) -> RequestStatus {
    RequestStatus {
        lane: *lane,
        token: format!("{:#x}", waiting.token),
        handle: waiting.handle,
        operation: operation(waiting.op).to_owned(),
        age_ms: millis(waiting.age),
        stage: waiting.stage.as_str().to_owned(),
    }
}

fn operation(op: IoOp) -> &'static str {
    match op {
        IoOp::Read => "read",
        IoOp::Write => "write",
        IoOp::Flush => "flush",
        IoOp::Discard => "discard",
        IoOp::WriteZeroes => "write-zeroes",
        IoOp::GetId => "get-id",
        IoOp::Fill => "fill",
        IoOp::Send => "send",
        IoOp::Transmit => "transmit",
    }
}

/// What is waited for: first who is stuck in the driver, then what waits for the driver, the ring and the device, then the ladder's own steps.
fn sentences(
    binding: &Binding,
    life: &Life,
    handles: &[HandleStatus],
    calls: &[CallStatus],
    waiting: &Waitings,
) -> Vec<String> {
    let device = clean(binding.device(), MAX_ADDRESS_BYTES);
    let by_number: HashMap<u64, &HandleStatus> = handles.iter().map(|handle| (handle.id, handle)).collect();
    let mut sentences = Vec::new();
    // A ladder that finds a load at work has to wait for it before its first step.
    let unbuilt = binding.serving.get().is_none();
    if life.phase() == Phase::Loading || (life.state() == State::Closing && unbuilt) {
        let where_to = calls.first().map_or_else(|| format!("at {device} or in the compiler"), in_call);
        sentences.push(format!("a load of this binding is still running: {where_to}"));
        sentences.extend(calls.iter().skip(1).map(in_call));
    } else {
        sentences.extend(calls.iter().map(in_call));
    }
    for stage in Stage::ALL {
        let count = waiting.counts[stage as usize];
        let Some(oldest) = &waiting.oldest_by_stage[stage as usize] else { continue };
        let place = match stage {
            Stage::Published => format!("on the ring of {device}"),
            Stage::Parked => format!("waiting for room on the ring of {device}"),
            Stage::Given => "with the driver".to_owned(),
        };
        let whose = whose(oldest.handle, &by_number);
        let (token, operation, age) = (oldest.token, operation(oldest.op), seconds(oldest.age));
        let what = format!("({operation}, token {token:#x}, {whose})");
        sentences.push(match count {
            1 => format!("1 request {place} {what} has waited {age}"),
            _ => format!("{count} requests {place}; the oldest {what} has waited {age}"),
        });
    }
    if life.phase() == Phase::Draining && sentences.is_empty() && binding.gate().operations() > 0 {
        sentences.push(format!("{} requests that are just being admitted or answered", binding.gate().operations()));
    }
    sentences.extend(step(life.state(), &device, binding));
    sentences
}

/// What the ladder itself does or waits for.
fn step(state: State, device: &str, binding: &Binding) -> Option<String> {
    Some(match state {
        State::Waiting => {
            "nobody is waiting for the drain any more: another 'cofferdam unload' goes on from here, with --force it ends in a few seconds"
                .to_owned()
        }
        State::Recovering | State::Failed if binding.away_sentence().is_some() => binding.away_sentence()?,
        State::Recovering => "another driver is to take the place of the one that broke down; clients wait".to_owned(),
        State::Failed => format!(
            "the driver broke down too often and has failed: 'cofferdam restart {0}' tries again, 'cofferdam crashes {0}' says how",
            binding.name()
        ),
        State::Interrupting => "the driver was told to stop and has half a second to be out".to_owned(),
        State::Quiescing => format!("{device} has a second to become silent"),
        State::DetachingPorts => format!("ports are going away: {}", clean(&binding.ports().join(", "), MAX_ADDRESS_BYTES)),
        _ => return None,
    })
}

/// "the driver has been in `submit` on lane 0 for 1.2 s (thread nbd-lane-0, core 1)"
fn in_call(call: &CallStatus) -> String {
    let CallStatus { lane, export, import, age_ms, thread, core, interrupted, .. } = call;
    let lane = if lane == "control" { "the control lane".to_owned() } else { format!("lane {lane}") };
    let import = import.as_ref().map(|import| format!(", there in the host's `{import}`,")).unwrap_or_default();
    let core = core.map(|core| format!(", core {core}")).unwrap_or_default();
    let interrupted = if *interrupted { "; it was told to stop" } else { "" };
    let age = seconds(Duration::from_millis(*age_ms));
    format!("the driver has been in `{export}` on {lane}{import} for {age} (thread {thread}{core}){interrupted}")
}

/// "of handle 4 nbd:/run/d.sock pid 812"
fn whose(handle: u64, handles: &HashMap<u64, &HandleStatus>) -> String {
    match handles.get(&handle) {
        Some(HandleStatus { port, peer, .. }) => {
            let said = [port, peer].into_iter().filter(|said| !said.is_empty());
            said.fold(format!("of handle {handle}"), |text, said| format!("{text} {said}"))
        }
        None => format!("of handle {handle}, which is closed"),
    }
}

fn seconds(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", duration.as_millis())
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
