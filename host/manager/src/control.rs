//! The control lane while the device runs: configuration changes that the device announces (virtio 1.2, section 4.1.5.4), and queues of the control lane's own.
//!
//! ```text
//! watch: the device said something -> pending -> (no call under way, and the last one began REST ago) -> a thread of its own
//! thread: [crossing: config-changed] -> [crossing: control.events]* -> [crossing: get-properties] -> checked as at load -> lanes -> handles from now on
//! ```
//!
//! A device can announce changes and send control messages as fast as it likes: at most one call is under way and one pending, and calls begin at least [`REST`] apart. The watch itself never calls
//! (L8). The ladder closes this before it drains, and drains what is inside.
//!
//! Requests of every handle, however old, are checked against what the device can do now; a handle goes on telling what it could do when the handle was opened.

mod handover;
mod hint;
mod queues;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cofferdam_device::transport::Transport;
use cofferdam_lifecycle::Phase;
use cofferdam_runtime::{Attachment, CallError, DriverError, ExportedState, GuestFault, Instance, LaneId, Properties};
use parking_lot::{Mutex, MutexGuard};

use crate::binding::Binding;
pub(crate) use crate::control::handover::ControlState;
use crate::control::hint::Hint;
use crate::control::queues::LiveWindow;
pub(crate) use crate::control::queues::{ControlQueues, SharedQueues};
use crate::device::{ConfigCopy, DeviceWindow};
use crate::error::ControlError;
use crate::events::EventKind;
use crate::offer::Offer;
use crate::ports::Within;
use crate::recovery::{CONTROL, Next, cannot_replace};

/// Least time between the beginnings of two calls: a device that does nothing but announce changes costs ten in a second.
const REST: Duration = Duration::from_millis(100);
/// Bytes of a driver's refusal that the log keeps.
const REFUSAL_BYTES: usize = 1024;
/// Instances in a row that may fail to take over.
const FALSE_STARTS: u32 = 3;
/// Calls of `control.events` in one go: what a device sends beyond that waits for the next.
const EVENT_CALLS: usize = 4;

/// The control lane of a driver once it is loaded, and what it needs to be asked again.
pub(crate) struct Control {
    pub(crate) instance: Instance,
    pub(crate) transport: Weak<Mutex<Box<dyn Transport>>>,
    pub(crate) lane_limit: u16,
    pub(crate) ring_limit: u16,
    /// What it negotiated, which it cannot do again.
    pub(crate) negotiated: Arc<Mutex<Option<u64>>>,
    /// What the device runs with, which any driver that takes its place has to plan as well.
    pub(crate) attachment: Attachment,
    /// The driver broke down, and another one is to come.
    pub(crate) is_down: bool,
    /// Number of the crash in which it did; 0 if it works.
    pub(crate) crash: u64,
    /// The number of what its instance is made of.
    pub(crate) made_of: u64,
    /// How often the device's configuration may have changed.
    pub(crate) changes: u64,
    pub(crate) arena_bytes: u64,
    pub(crate) max_lease_bytes: u32,
    /// Queues of its own.
    pub(crate) queues: Option<SharedQueues>,
}

impl Control {
    fn live_window(&self) -> Option<Box<LiveWindow>> {
        let queues = self.queues.as_ref()?;
        Some(Box::new(LiveWindow::new(self.transport.clone(), Arc::clone(queues))))
    }

    /// Tells the driver that the device runs, and asks it what the device can do now.
    pub(crate) fn live(&mut self) -> Result<Offer, CallError> {
        let window = self.live_window();
        live(window, &mut self.instance)?;
        self.offer()
    }

    /// The same for an instance that is to take its place.
    pub(crate) fn live_with(&self, instance: &mut Instance) -> Result<Offer, CallError> {
        live(self.live_window(), instance)?;
        Ok(self.offer_of(instance.properties()?))
    }

    fn offer(&mut self) -> Result<Offer, CallError> {
        let properties = self.instance.properties()?;
        Ok(self.offer_of(properties))
    }

    fn offer_of(&self, properties: Properties) -> Offer {
        Offer::from_properties(properties, self.arena_bytes, self.max_lease_bytes)
    }

    /// The device as it runs, for an instance that takes over. Whoever has it needs the control lane no more.
    pub(crate) fn running(&self) -> Running {
        let Control { transport, lane_limit, ring_limit, attachment, .. } = self;
        Running {
            transport: Weak::clone(transport),
            lane_limit: *lane_limit,
            ring_limit: *ring_limit,
            attachment: attachment.clone(),
            copy: None,
        }
    }

    /// Has an instance attach to the device that came back, which has been negotiated with and nothing else: what it says, and what the device can do.
    pub(crate) fn attach_returned(&mut self, instance: &mut Instance) -> Result<(Attachment, Offer), CallError> {
        self.changes += 1;
        let attachment = self.running().attach(instance)?;
        Ok((attachment, self.offer_of(instance.properties()?)))
    }

    /// Puts it in the place of the one that is there, once the device runs. Also what was there.
    pub(crate) fn replace(&mut self, instance: Instance, made_of: u64) -> Result<(Offer, Instance), CallError> {
        let before = std::mem::replace(&mut self.instance, instance);
        match self.live() {
            Ok(offer) => {
                self.made_of = made_of;
                self.is_down = false;
                Ok((offer, before))
            }
            Err(error) => {
                self.instance = before;
                Err(error)
            }
        }
    }

    /// Tells the driver what the device said, and asks it what the device can do now. `None`: the device is on its way out.
    fn ask(&mut self, changed: bool) -> Result<Option<Offer>, ControlError> {
        self.changes += u64::from(changed);
        let Some(transport) = self.transport.upgrade() else { return Ok(None) };
        let window = DeviceWindow::new(transport, self.lane_limit, self.ring_limit, Arc::clone(&self.negotiated));
        let told = if changed { self.instance.config_changed(Box::new(window)) } else { Ok(()) };
        told.and_then(|()| self.events()).and_then(|()| self.offer()).map(Some).map_err(refused)
    }

    fn set_open(&mut self, port: u32, open: bool) -> Result<Option<Offer>, ControlError> {
        let window = self.live_window().ok_or(ControlError::NoQueues)?;
        self.instance.set_open(window, port, open).and_then(|()| self.offer()).map(Some).map_err(refused)
    }

    /// Has `instance` take over: it attaches to the device as it runs, or resumes with a hint, plans what is set up, and goes live. Also what it takes over from, which stays where it is
    /// if that fails.
    fn adopt(
        &mut self,
        mut instance: Instance,
        hint: Option<&ExportedState>,
        made_of: u64,
    ) -> Result<(Offer, Instance), CallError> {
        let running = self.running();
        match hint {
            Some(hint) => drop(running.resume(&mut instance, hint)?),
            None => drop(running.attach(&mut instance)?),
        }
        self.replace(instance, made_of)
    }

    /// Hands over what the device put into the control lane's posted queue.
    fn events(&mut self) -> Result<(), CallError> {
        for _ in 0..EVENT_CALLS {
            let Some(queues) = &self.queues else { return Ok(()) };
            let words = queues.lock().take_events();
            if words.is_empty() {
                return Ok(());
            }
            let Some(window) = self.live_window() else { return Ok(()) };
            self.instance.events(window, words)?;
        }
        // There may be more: the watch is woken again.
        if let Some(queues) = &self.queues {
            queues.lock().look_again();
        }
        Ok(())
    }
}

/// The device as it runs.
pub(crate) struct Running {
    transport: Weak<Mutex<Box<dyn Transport>>>,
    lane_limit: u16,
    ring_limit: u16,
    attachment: Attachment,
    copy: Option<Arc<ConfigCopy>>,
}

impl Running {
    /// The same, with what is read of its configuration kept in `copy`, and taken from it if it is there.
    pub(crate) fn with(self, copy: Option<Arc<ConfigCopy>>) -> Running {
        Running { copy, ..self }
    }

    /// Has an instance attach to it.
    fn attach(&self, instance: &mut Instance) -> Result<Attachment, CallError> {
        self.check(instance.attach(self.window()?)?)
    }

    /// Has an instance take over from another one, with its hint.
    pub(crate) fn resume(&self, instance: &mut Instance, hint: &ExportedState) -> Result<Attachment, CallError> {
        self.check(instance.resume(self.window()?, hint)?)
    }

    fn window(&self) -> Result<Box<DeviceWindow>, CallError> {
        let gone = || CallError::Driver(DriverError::Host("the device is on its way out".to_owned()));
        let transport = self.transport.upgrade().ok_or_else(gone)?;
        let features = self.attachment.features;
        let window = DeviceWindow::adopting(transport, self.lane_limit, self.ring_limit, features);
        Ok(Box::new(window.with(self.copy.clone())))
    }

    /// What it plans has to be what is set up.
    fn check(&self, attachment: Attachment) -> Result<Attachment, CallError> {
        let Attachment { features, queues, .. } = &self.attachment;
        if attachment.features != *features || attachment.queues != *queues {
            let error = "it plans other queues or features than the device runs with".to_owned();
            return Err(DriverError::Unsupported(error).into());
        }
        Ok(attachment)
    }
}

#[derive(Default)]
struct Turn {
    /// The device has said something that no call has begun for.
    pending: bool,
    /// Among it that its configuration changed.
    changed: bool,
    /// A thread is at it.
    inside: bool,
    /// When the last call began.
    since: Option<Instant>,
    /// The binding leaves: nobody goes in any more.
    closed: bool,
}

/// A binding's part in it.
#[derive(Default)]
pub(crate) struct ControlLane {
    turn: Mutex<Turn>,
    /// Its queues, apart from the driver that a call may hold.
    queues: Mutex<Option<SharedQueues>>,
    /// `None` before it serves, for a driver without a service, and after the code was dropped. Held while the driver is called.
    control: Mutex<Option<Control>>,
    /// What the one that takes its place is told when it breaks down. Locked for a moment, under `control`.
    hint: Mutex<Hint>,
}

/// A thread's stay.
struct Inside<'a>(&'a ControlLane);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.turn.lock().inside = false;
    }
}

impl ControlLane {
    /// The binding serves: `control` can be asked from now on.
    pub(crate) fn open(&self, control: Control) {
        self.queues.lock().clone_from(&control.queues);
        *self.control.lock() = Some(control);
    }

    /// The ladder's: nobody goes in any more. Idempotent.
    pub(crate) fn close(&self) {
        let mut turn = self.turn.lock();
        (turn.closed, turn.pending) = (true, false);
    }

    /// Whether a thread is at it still.
    pub(crate) fn is_inside(&self) -> bool {
        self.turn.lock().inside
    }

    /// Notes what was announced; whether a thread is to be started now. `Err`: not yet, look again soon.
    fn announce(&self, changed: bool) -> Result<bool, ()> {
        let queues = self.queues.lock().clone();
        // Whoever has them waits for the device, and will be asked again.
        let called = match queues.as_ref().map(|queues| queues.try_lock()) {
            None => Some(false),
            Some(None) => None,
            Some(Some(queues)) => Some(queues.was_called()),
        };
        let mut turn = self.turn.lock();
        turn.changed |= changed;
        turn.pending |= (changed || called == Some(true)) && !turn.closed;
        if called.is_none() && !turn.closed && !turn.pending {
            return Err(());
        }
        if !turn.pending {
            return Ok(false);
        }
        if turn.inside || turn.since.is_some_and(|since| since.elapsed() < REST) {
            return Err(());
        }
        (turn.pending, turn.inside, turn.since) = (false, true, Some(Instant::now()));
        Ok(true)
    }

    /// The device is away: its queues are not touched until it is back.
    pub(crate) fn hold_off(&self) {
        // The one that comes back may have other ports.
        self.forget_hint();
        let queues = self.queues.lock().clone();
        if let Some(queues) = queues {
            queues.lock().hold_off();
        }
    }

    /// Another descriptor for the call descriptor of one of its queues.
    pub(crate) fn call(&self, is_posted: bool) -> Option<std::os::fd::OwnedFd> {
        let queues = self.queues.lock().clone()?;
        let queues = queues.lock();
        queues.call(is_posted).and_then(|call| call.try_clone_to_owned().ok())
    }

    /// Lets go of the queues' memory and notification channels.
    pub(crate) fn drop_rings(&self, until: Instant) {
        let Some(queues) = self.queues.lock().take() else { return };
        match queues.try_lock_until(until) {
            Some(mut queues) => queues.end(),
            None => tracing::error!("the control lane still waits for its device"),
        }
    }

    /// A descriptor that is readable when the device used a buffer of the control lane's posted queue.
    pub(crate) fn event_fd(&self) -> Option<std::os::fd::OwnedFd> {
        let queues = self.queues.lock();
        let queues = queues.as_ref()?.lock();
        queues.event_fd().and_then(|fd: BorrowedFd<'_>| fd.as_fd().try_clone_to_owned().ok())
    }

    /// The control lane, as soon as no call is in it; `None` if that was not by `until`.
    pub(crate) fn lock_until(&self, until: Instant) -> Option<MutexGuard<'_, Option<Control>>> {
        self.control.try_lock_until(until)
    }

    /// Takes the control lane out, for the ladder to drop or to keep; `Err` if a call has not left it by `until`.
    pub(crate) fn take_control(&self, until: Instant) -> Result<Option<Instance>, ()> {
        let control: Option<MutexGuard<'_, _>> = self.control.try_lock_until(until);
        Ok(control.ok_or(())?.take().map(|control| control.instance))
    }
}

impl Binding {
    /// The watch's: passes on what the device `announced`, and what is pending. Whether nothing is left to be passed on later.
    pub(crate) fn pass_config_change(self: &Arc<Self>, announced: bool) -> bool {
        match self.control.announce(announced) {
            Ok(false) => true,
            Err(()) => false,
            Ok(true) => {
                let binding = Arc::clone(self);
                let tell = move || {
                    let _inside = Inside(&binding.control);
                    binding.tell_config_change();
                };
                if let Err(error) = Within::spawn("cofferdam-config", tell) {
                    drop(Inside(&self.control));
                    tracing::error!(binding = self.name(), %error, "no thread to tell the driver on");
                }
                true
            }
        }
    }

    fn tell_config_change(self: &Arc<Self>) {
        let changed = std::mem::take(&mut self.control.turn.lock().changed);
        match self.with_control(|control| control.ask(changed)) {
            Ok(()) | Err(ControlError::Revoked | ControlError::NoQueues | ControlError::NoStreams) => {}
            // What the device can do stays as it was known; a device that is gone is noticed elsewhere.
            Err(ControlError::Refused(mut refused)) => {
                refused.truncate(refused.floor_char_boundary(REFUSAL_BYTES));
                tracing::warn!(binding = self.name(), refused, "the driver refuses a configuration change");
                self.record(EventKind::ConfigChanged { changes: Vec::new(), refused: Some(refused) });
            }
        }
    }

    /// A client opened or closed a port of streams on this side, and the device is told. Waits for calls of the control lane that are under way, as long as they may take.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn set_open(self: &Arc<Self>, port: u32, open: bool) -> Result<(), ControlError> {
        if !matches!(self.phase(), Phase::Serving | Phase::Recovering) {
            return Err(ControlError::Revoked);
        }
        // Another driver has nothing to call, and is not to be blamed for that.
        if !matches!(self.offer().as_deref(), Some(Offer::Stream(_))) {
            return Err(ControlError::NoStreams);
        }
        self.with_control(|control| control.set_open(port, open))
    }

    /// Calls the control lane and takes over what the device can do from then on. A driver that breaks down is replaced, and the next one is called once more.
    fn with_control(
        self: &Arc<Self>,
        call: impl Fn(&mut Control) -> Result<Option<Offer>, ControlError>,
    ) -> Result<(), ControlError> {
        // Held until the lanes know: of two calls the later one's offer stands.
        let mut locked = self.control.control.lock();
        let control = locked.as_mut().ok_or(ControlError::Revoked)?;
        let mut called = if control.is_down { Err(ControlError::Revoked) } else { call(control) };
        if let Some(fault) = control.instance.fault().filter(|_| !control.is_down).cloned() {
            called = match self.bring_control_up(control, Some(fault)) {
                true => call(control),
                false => Err(ControlError::Revoked),
            };
            if let Some(fault) = control.instance.fault().filter(|_| !control.is_down).cloned() {
                // It is the call itself that breaks drivers down.
                self.bring_control_up(control, Some(fault));
            }
        }
        if let Ok(Some(offer)) = &called {
            self.take_offer(offer.clone());
            self.keep_hint(control);
        }
        called.map(drop)
    }

    /// After `fault`, or without one, another driver for the control lane; whether it has one that works.
    pub(crate) fn bring_control_up(self: &Arc<Self>, control: &mut Control, mut fault: Option<GuestFault>) -> bool {
        control.is_down = true;
        for attempt in 0..=FALSE_STARTS {
            let next = fault.as_ref().map_or(Next::Revive, |fault| self.broke_down(CONTROL, fault));
            if fault.is_some() && attempt == 0 {
                control.crash = self.last_crash(CONTROL);
            }
            // Of an instance that did not come to be only the report is left. The one that broke down stays until another one has its place, and that may be long.
            if fault.is_some() && (attempt > 0 || next != Next::Revive) {
                self.bury(CONTROL, None);
            }
            match next {
                Next::Revive => {}
                Next::Wait | Next::Refuse => return false,
                Next::Leave => {
                    if let Some(lane) = self.serving.get().and_then(|serving| serving.lanes.first()) {
                        lane.wake_watch();
                    }
                    return false;
                }
            }
            // Once: should it be the hint that breaks drivers down, the next one goes without.
            let hint = self.control.hint.lock().state.take();
            let made = self.remake(LaneId::Control).map_err(CallError::Fault);
            let adopted = made.and_then(|(made, version)| control.adopt(made, hint.as_ref(), version.number));
            match adopted {
                Ok((offer, dead)) => {
                    self.bury_as(std::mem::take(&mut control.crash), Some(Box::new(dead)));
                    self.take_offer(offer);
                    self.revived(CONTROL);
                    // It may break down again before it is called again.
                    self.control.hint.lock().state = hint;
                    return true;
                }
                Err(error) => {
                    fault = Some(match error {
                        CallError::Fault(again) => again,
                        CallError::Driver(error) => cannot_replace(&error),
                    });
                }
            }
        }
        self.cannot_revive();
        false
    }

    /// Replaces a control lane's driver that is made of something else than instances are now.
    pub(crate) fn catch_up_control(self: &Arc<Self>) {
        let number = self.recovery.get().and_then(|recovery| recovery.version()).map(|version| version.number);
        let mut locked = self.control.control.lock();
        if let Some(control) = locked.as_mut().filter(|control| !control.is_down && Some(control.made_of) != number) {
            self.bring_control_up(control, None);
        }
    }

    /// Makes the control lane's driver if it is missing.
    pub(crate) fn revive_control(self: &Arc<Self>) {
        let mut locked = self.control.control.lock();
        match locked.as_mut() {
            Some(control) if control.is_down => drop(self.bring_control_up(control, None)),
            _ => self.revived(CONTROL),
        }
    }

    /// What the device can do from now on, by its driver.
    pub(crate) fn take_offer(&self, offer: Offer) {
        let Some(serving) = self.serving.get() else { return };
        let Some(current) = &serving.offer else { return };
        let offer = Arc::new(offer);
        let before = Arc::clone(&current.lock());
        let changes = before.changes(&offer);
        if changes.is_empty() {
            tracing::debug!(binding = self.name(), "a configuration change that the driver makes nothing of");
            return;
        }
        // Handles that are opened from here on; then what is refused from whomever.
        *current.lock() = Arc::clone(&offer);
        serving.lanes.iter().for_each(|lane| lane.set_offer(&offer));
        self.offer_changed();
        tracing::info!(binding = self.name(), ?changes, "configuration changed");
        self.record(EventKind::ConfigChanged { changes, refused: None });
    }
}

/// Tells an instance that the device runs, if it has queues of its own to speak with it.
fn live(window: Option<Box<LiveWindow>>, instance: &mut Instance) -> Result<(), CallError> {
    window.map_or(Ok(()), |window| instance.live(window))
}

/// A fault is found at the instance; here it only ends the call.
fn refused(error: CallError) -> ControlError {
    match error {
        CallError::Driver(error) => ControlError::Refused(error.to_string()),
        CallError::Fault(_) => ControlError::Revoked,
    }
}
