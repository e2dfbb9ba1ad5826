//! The way of one device that is away, from its loss to its return.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::TransportError;
use cofferdam_device::transport::{Silence, Transport};
use cofferdam_lifecycle::Phase;
use cofferdam_runtime::{CallError, GuestFault, LaneDriver, LaneId, QueueOwner};
use parking_lot::Mutex;

use super::{Progress, Reconnection, Why};
use crate::binding::{Binding, Serving};
use crate::error::LaneFault;
use crate::events::EventKind;
use crate::ladder::{Cause, silence};
use crate::lane::{Fresh, NotTold, Place, ask_id, shown_id};
use crate::manager::Shared;
use crate::offer::Offer;
use crate::ports::Within;
use crate::queues::QueuesError;
use crate::recovery::CONTROL;
use crate::watch;

/// How long a device that is away may take to be silent: a process that was killed gives its memory back first.
const SILENCE: Duration = Duration::from_secs(2);
/// The first pause between two attempts to open it; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// Longest sleep between two looks whether the binding leaves.
const SLICE: Duration = Duration::from_millis(10);
/// How long the control lane may be in a call.
const CONTROL_BOUND: Duration = Duration::from_secs(10);

/// Why it was not brought back.
enum End {
    /// The binding leaves: the ladder has it.
    Leaves,
    /// It may still act on what it has (L1): the binding has to leave.
    NotSilent(String),
    /// It is not waited for any more.
    GaveUp(String),
}

/// Why a device that was found was not taken.
enum Refusal {
    /// It was lost again: the next one may be better.
    Again(String),
    /// A driver that was made for it broke down: the next one may not.
    Broke(GuestFault, u16),
    End(End),
}

impl From<TransportError> for Refusal {
    fn from(error: TransportError) -> Refusal {
        use TransportError::{Exhausted, Invalid, Refused, Unsupported};
        match &error {
            Exhausted(_) | Invalid(_) | Refused(_) | Unsupported(_) => {
                differs(format!("what came back refuses: {error}"))
            }
            _ => Refusal::Again(error.to_string()),
        }
    }
}

fn differs(why: String) -> Refusal {
    Refusal::End(End::GaveUp(why))
}

impl Binding {
    /// The thread's work. Without `why` the device was given up before, and there is nothing left to do for it.
    pub(super) fn bring_back(self: &Arc<Self>, mut why: Option<Why>) {
        let (Some(reconnection), Some(serving)) = (self.reconnection.get(), self.serving.get()) else { return };
        let Some(shared) = reconnection.manager.upgrade() else { return };
        loop {
            let begun = Instant::now();
            let end = match self.bring_back_once(reconnection, serving, &shared, why) {
                Ok(again) => {
                    let waited_micros = crate::ladder::micros(begun.elapsed());
                    tracing::info!(binding = self.name(), device = self.device(), again, waited_micros, "device back");
                    self.record(EventKind::DeviceBack { again: again as u64, waited_micros });
                    if self.device_returned(|| is_here(reconnection, serving)) {
                        return;
                    }
                    // Lost once more while it was set up, or it broke a rule at once.
                    let wait = reconnection.reconnect.wait;
                    reconnection.waits(Instant::now() + wait, None);
                    self.hold_again(wait);
                    let reason = "it was lost once more, or broke a rule, as it came back".to_owned();
                    self.record(EventKind::DeviceAway { reason, wait_ms: wait.as_millis() as u64 });
                    why = Some(Why::Lost);
                    continue;
                }
                Err(end) => end,
            };
            match end {
                End::Leaves => {}
                End::NotSilent(reason) => {
                    tracing::warn!(binding = self.name(), reason, "the device may still act, so it is not replaced");
                    self.record(EventKind::DeviceGivenUp { reason });
                    let cause = match why {
                        Some(Why::Broken(fault)) => {
                            self.set_fault(LaneFault::Device(fault));
                            Cause::Fault
                        }
                        _ => Cause::Removed,
                    };
                    watch::leave(&shared, self, cause);
                }
                End::GaveUp(reason) => {
                    tracing::error!(
                        binding = self.name(),
                        device = self.device(),
                        reason,
                        "the device did not come back"
                    );
                    self.record(EventKind::DeviceGivenUp { reason: reason.clone() });
                    reconnection.is(Progress::GaveUp(reason));
                    self.device_gave_up();
                }
            }
            return;
        }
    }

    /// How many requests were given again.
    fn bring_back_once(
        self: &Arc<Self>,
        reconnection: &Reconnection,
        serving: &Serving,
        shared: &Arc<Shared>,
        why: Option<Why>,
    ) -> Result<usize, End> {
        let begun = Instant::now();
        serving.lanes.iter().for_each(|lane| lane.hold_off());
        self.control.hold_off();
        self.regions().hold_off();
        shared.watch().remove(self);
        let mut again = 0;
        let mut pause = Duration::ZERO;
        let until = begun + reconnection.reconnect.wait;
        let transport = reconnection.transport.upgrade().ok_or(End::Leaves)?;
        if why.is_some() {
            if let Silence::Unconfirmed { reason } = silence(&transport, &serving.lanes, SILENCE) {
                return Err(if self.is_away() || self.has_failed() { End::NotSilent(reason) } else { End::Leaves });
            }
            let has_failed = self.has_failed();
            if !has_failed && !self.is_away() {
                return Err(End::Leaves);
            }
            again = serving.lanes.iter().map(|lane| lane.take_back().again).sum();
            if reconnection.promise.take_broken() {
                self.open_handles().iter().for_each(|handle| handle.owe_flush_error());
                serving.lanes.iter().for_each(|lane| lane.fail_flushes());
            }
            transport.lock().release();
            if has_failed {
                return Err(self.left());
            }
            let restart = self.recovery.get().and_then(|recovery| recovery.next_restart());
            let too_often = || End::GaveUp("it was lost too often".to_owned());
            pause = restart.ok_or_else(too_often)?.min(reconnection.reconnect.wait / 2);
        }
        self.regions().silent();
        let (mut next, mut last) = (begun + pause, None);
        pause = FIRST_PAUSE;
        loop {
            if !self.is_away() {
                return Err(self.left());
            }
            let now = Instant::now();
            self.keep_held(until.saturating_duration_since(now));
            if now < next {
                std::thread::sleep((next - now).min(SLICE));
                continue;
            }
            if let Some(last) = last.take().filter(|_| now >= until) {
                return Err(End::GaveUp(format!(
                    "it did not come back within {:?}: {last}",
                    reconnection.reconnect.wait
                )));
            }
            let refused = match (reconnection.reconnect.open)() {
                Ok(fresh) => match self.set_up_again(reconnection, serving, shared, &transport, fresh) {
                    Ok(()) => return Ok(again),
                    Err(Refusal::End(end)) => return Err(end),
                    Err(Refusal::Again(why)) => why,
                    Err(Refusal::Broke(..)) if !self.is_away() => return Err(self.left()),
                    Err(Refusal::Broke(fault, lane)) => {
                        let too_often = || End::GaveUp(format!("the driver broke down too often over it: {fault}"));
                        pause = pause.max(self.broke_down_over_return(lane, &fault).ok_or_else(too_often)?);
                        format!("the driver broke down over it: {fault}")
                    }
                },
                Err(why) => why,
            };
            tracing::debug!(binding = self.name(), device = self.device(), refused, "device not back yet");
            reconnection.waits(until, Some(refused.clone()));
            last = Some(refused);
            // The last attempt is made when the time is over.
            next = (Instant::now() + pause).min(until.max(Instant::now()));
            // What the policy for restarts has made of it is for once.
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn is_away(&self) -> bool {
        self.phase() == Phase::Recovering
    }

    /// Its driver broke down too often meanwhile.
    fn has_failed(&self) -> bool {
        self.phase() == Phase::Failed
    }

    /// Why a binding's device is not waited for that is not recovering any more.
    fn left(&self) -> End {
        match self.has_failed() {
            true => End::GaveUp("the driver broke down too often meanwhile".to_owned()),
            false => End::Leaves,
        }
    }

    /// Puts `fresh` in the place of the device that was lost. What does not succeed leaves it released and the lanes as they were.
    fn set_up_again(
        self: &Arc<Self>,
        reconnection: &Reconnection,
        serving: &Serving,
        shared: &Arc<Shared>,
        transport: &Arc<Mutex<Box<dyn Transport>>>,
        fresh: Box<dyn Transport>,
    ) -> Result<(), Refusal> {
        // As a load: a ladder waits for it.
        let mut parts = self.parts.lock();
        let _within = Within::enter();
        if !self.is_away() {
            return Err(Refusal::End(self.left()));
        }
        is_the_same(reconnection, fresh.as_ref())?;
        {
            let mut device = transport.lock();
            *device = fresh;
            self.next_device();
        }
        reconnection.is(Progress::Returning);
        let outcome = self.set_up(reconnection, serving, transport, &mut parts);
        if let Err(refusal) = outcome {
            self.control.hold_off();
            self.regions().hold_off();
            let mut device = transport.lock();
            let is_lost = device.is_lost();
            // No request was given to it.
            let silence = device.quiesce(0, Instant::now() + SILENCE);
            if let Silence::Unconfirmed { reason } = silence {
                return Err(Refusal::End(End::NotSilent(reason)));
            }
            device.release();
            drop(device);
            self.regions().silent();
            return Err(match refusal {
                Refusal::End(End::GaveUp(why)) if is_lost => Refusal::Again(why),
                refusal => refusal,
            });
        }
        let device = transport.lock();
        if let Some(fd) = device.event_fd()
            && let Err(error) = shared.watch().add(self, transport, fd)
        {
            tracing::error!(binding = self.name(), %error, "the loss of the device will not be noticed");
        }
        drop(device);
        if let Some(fd) = self.control.event_fd() {
            let _ = shared.watch().add(self, transport, std::os::fd::AsFd::as_fd(&fd));
        }
        reconnection.is(Progress::Here);
        Ok(())
    }

    fn set_up(
        self: &Arc<Self>,
        reconnection: &Reconnection,
        serving: &Serving,
        transport: &Arc<Mutex<Box<dyn Transport>>>,
        parts: &mut crate::binding::Parts,
    ) -> Result<(), Refusal> {
        let expected = &reconnection.expected;
        let (Some(rings), Some(arena)) = (parts.rings.clone(), parts.arena.clone()) else {
            return Err(Refusal::End(End::Leaves));
        };
        transport.lock().negotiate(expected.features)?;
        let busy = || Refusal::End(End::GaveUp("the control lane is busy".to_owned()));
        let mut locked = self.control.lock_until(Instant::now() + CONTROL_BOUND).ok_or_else(busy)?;
        let control = locked.as_mut().ok_or(Refusal::End(End::Leaves))?;

        // Another driver for the control lane says what the device is.
        let broke = |lane: u16| move |fault: GuestFault| Refusal::Broke(fault, lane);
        let (mut instance, version) = self.remake(LaneId::Control).map_err(broke(CONTROL))?;
        let (attachment, offer) = control.attach_returned(&mut instance).map_err(said)?;
        let before = self.offer().ok_or(Refusal::End(End::Leaves))?;
        if matches!(*before, Offer::Block(_) | Offer::Entropy(_)) {
            is_as_before(&before, &offer)?;
        }
        if let Some(recovery) = self.recovery.get() {
            recovery.set_state(&attachment.state);
        }
        let mut drivers: Vec<(Box<dyn LaneDriver>, u64)> = Vec::with_capacity(serving.lanes.len());
        for lane in &serving.lanes {
            drivers.push(self.remake_lane(lane).map_err(broke(lane.number()))?);
        }

        // Rings where they were, told by the descriptors that clients sleep on.
        parts.marks.forget_descriptors();
        let mut made = {
            let mut device = transport.lock();
            for fd in device.descriptors() {
                parts.marks.note(fd);
            }
            device.map(rings.clone())?;
            device.map(arena.region().clone())?;
            let call = |plan: &cofferdam_runtime::QueuePlan| {
                let is_posted = plan.posting.is_some();
                match plan.owner {
                    QueueOwner::Control => self.control.call(is_posted),
                    QueueOwner::Set(set) => serving.lanes.get(usize::from(set))?.duplicate_call(is_posted),
                }
            };
            let made = expected.layout.make(&attachment, &rings, device.as_mut(), &mut parts.marks, &call);
            let made = made.map_err(|error| match error {
                QueuesError::Plan(why) => differs(why),
                QueuesError::Device(error) => error.into(),
            })?;
            device.start()?;
            self.regions().give_back(device.as_mut())?;
            made
        };
        let mut take = |owner, is_posted| -> Option<Fresh> { made.take(owner, is_posted).map(|(_, fresh)| fresh) };
        if let Some(queues) = &control.queues {
            let (commands, posted) = (take(QueueOwner::Control, false), take(QueueOwner::Control, true));
            queues.lock().give_back(commands, posted);
        }
        // A call that began before the loss may have kept one.
        self.control.forget_hint();
        let (offer, dead) = control.replace(instance, version.number).map_err(said)?;
        drop(dead);
        is_as_before(&before, &offer)?;
        self.take_offer(offer);
        self.revived(CONTROL);
        drop(locked);

        let mut ready = Vec::with_capacity(serving.lanes.len());
        for (lane, driver) in serving.lanes.iter().zip(drivers) {
            let set = QueueOwner::Set(lane.number());
            let (Some(requests), posted) = (take(set, false), take(set, true)) else {
                return Err(differs("a lane has no queue".to_owned()));
            };
            ready.push((lane, driver, requests, posted));
        }
        // Before anything is given to it: a write to another disk could not be taken back.
        if let (Some(was), Some((_, (driver, _), (ring, events), _))) = (reconnection.id(), ready.first_mut()) {
            let place = Place { region: &rings, offset: expected.layout.identity };
            let is = ask_id(driver.as_mut(), ring, events.doorbell.as_ref(), &place);
            let is = is.map_err(|why| {
                let reason = format!("the id of what came back is not known: {why}");
                if matches!(why, NotTold::Late) { Refusal::Again(reason) } else { differs(reason) }
            })?;
            if is != *was {
                return Err(differs(format!(
                    "another device came back: id {:?} -> {:?}",
                    shown_id(was),
                    shown_id(&is)
                )));
            }
        }
        for (lane, driver, requests, posted) in ready {
            lane.give_back(self, driver, requests, posted);
        }
        Ok(())
    }
}

/// Whether the device is still there, and every lane has it.
fn is_here(reconnection: &Reconnection, serving: &Serving) -> bool {
    let Some(transport) = reconnection.transport.upgrade() else { return true };
    let is_lost = transport.try_lock_for(SILENCE).is_some_and(|mut device| device.is_lost());
    !is_lost && !serving.lanes.iter().any(|lane| lane.is_held_off())
}

/// What the bus says of it.
fn is_the_same(reconnection: &Reconnection, fresh: &dyn Transport) -> Result<(), Refusal> {
    let expected = &reconnection.expected;
    let another = |what: String| Err(differs(format!("another device came back: {what}")));
    let (was, is) = (expected.device_type, fresh.device_type());
    if was != is {
        let name = |kind: Option<u32>| kind.map_or_else(|| "unknown".to_owned(), |kind| kind.to_string());
        return another(format!("virtio id {} -> {}", name(was), name(is)));
    }
    let missing = expected.features & !fresh.offered_features();
    if missing != 0 {
        return another(format!("features {:#x} -> without {missing:#x}", expected.features));
    }
    if fresh.confinement() != expected.confinement {
        return another(format!("dma {} -> {}", expected.confinement.as_str(), fresh.confinement().as_str()));
    }
    Ok(())
}

/// What its driver says of it. A link may be down, and the ports of a console are named when it runs.
fn is_as_before(before: &Offer, now: &Offer) -> Result<(), Refusal> {
    let mut now = now.clone();
    match (before, &mut now) {
        (Offer::Net(before), Offer::Net(now)) => now.link_up = before.link_up,
        (Offer::Stream(before), Offer::Stream(now)) => now.ports.clone_from(&before.ports),
        _ => {}
    }
    let changes = before.changes(&now);
    if changes.is_empty() {
        return Ok(());
    }
    Err(differs(format!("another device came back: {}", changes.join(", "))))
}

fn said(error: CallError) -> Refusal {
    match error {
        CallError::Fault(fault) => Refusal::Broke(fault, CONTROL),
        CallError::Driver(error) => differs(format!("the driver does not take what came back: {error}")),
    }
}
