//! One driver joined to one device.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cofferdam_device::{Confinement, DmaArena, DmaRegion};
use cofferdam_gate::Gate;
use cofferdam_lifecycle::{Cause, Event, Life, Phase, Refused};
use cofferdam_runtime::{CallView, Instance, LaneId, Module};
use parking_lot::Mutex;

use crate::block::BlockGeometry;
use crate::certificate::Certificate;
use crate::control::ControlLane;
use crate::device::SharedTransport;
use crate::error::{LaneFault, OpenError, PortError, RevokeError};
use crate::events::{EventKind, EventLog};
use crate::handle::{Handle, HandleShared, HandleSpec};
use crate::handover::Recipe;
use crate::ladder::Progress;
use crate::lane::Lane;
use crate::mapped::Regions;
use crate::offer::Offer;
use crate::ports::{Gone, Port, PortReport, Ports, Within};
use crate::reconnect::Reconnection;
use crate::recovery::Recovery;
use crate::residue::Marks;

/// Longest sleep between two looks for the last answers of a handle that is being revoked.
const REVOKE_SLICE: Duration = Duration::from_millis(5);

/// What came of revoking one handle.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RevokeReport {
    /// The binding.
    pub binding: String,
    /// The handle's number.
    pub handle: u64,
    /// The port, or `in-process`.
    pub port: String,
    /// Who is at the other end.
    pub peer: String,
    /// Its requests in flight when it was revoked.
    pub requests_at_revoke: u64,
    /// Those that are not answered yet.
    pub requests_left: u64,
    /// How long it took, in microseconds.
    pub micros: u64,
}

/// What the ladder takes apart. Filled by `load` step by step, so that a failure half-way leaves by the same steps.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) transport: Option<SharedTransport>,
    pub(crate) rings: Option<Arc<DmaRegion>>,
    pub(crate) arena: Option<DmaArena>,
    pub(crate) lanes: Vec<Arc<Lane>>,
    pub(crate) control: Option<Instance>,
    pub(crate) module: Option<Module>,
    pub(crate) marks: Marks,
    pub(crate) progress: Progress,
}

/// What clients reach once a load has succeeded.
pub(crate) struct Serving {
    pub(crate) lanes: Vec<Arc<Lane>>,
    /// `None` for a driver that gives no service.
    pub(crate) offer: Option<Mutex<Arc<Offer>>>,
}

struct Handles {
    open: BTreeMap<u64, Arc<HandleShared>>,
    next: u64,
    closed: bool,
}

/// A flag that is lowered when this is dropped.
pub(crate) struct Lowered<'a>(pub(crate) &'a AtomicBool);

impl Drop for Lowered<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// One driver joined to one device; made by [`crate::Manager::load`].
pub struct Binding {
    name: String,
    /// Changes with an upgrade.
    driver: Mutex<Arc<str>>,
    device: String,
    pub(crate) pinned: bool,
    pub(crate) generation: AtomicU64,
    created: Instant,
    gate: Gate,
    /// Where it is, and why it leaves. Locked for a step and for the record of it, so that the log has the steps in their order.
    life: Mutex<Life>,
    /// When it entered the ladder.
    leaving_since: OnceLock<Instant>,
    fault: OnceLock<LaneFault>,
    /// How its driver is replaced; unset where it is not.
    pub(crate) recovery: OnceLock<Recovery>,
    /// How its device is brought back; unset where it is not.
    pub(crate) reconnection: OnceLock<Reconnection>,
    /// What its load was told, for another process that is to do the same.
    pub(crate) recipe: OnceLock<Recipe>,
    /// An operator asked for force: the drain of a healthy device is cut short soon, whoever runs it.
    pub(crate) hurried: AtomicBool,
    /// How the device is kept to its memory, once that is decided.
    pub(crate) confinement: OnceLock<Confinement>,
    /// A thread asks the driver about responses.
    judging: AtomicBool,
    /// Its control lane while the device runs.
    pub(crate) control: ControlLane,
    /// How it ended is remembered.
    pub(crate) remembered: AtomicBool,
    /// The watch has a ladder under way for it.
    pub(crate) leaving: AtomicBool,
    /// Why it would have left while that was so, for whoever ends it without the binding having left.
    pub(crate) put_off: Mutex<Option<Cause>>,
    pub(crate) serving: OnceLock<Serving>,
    /// Held by `load` while it builds and by the ladder while it takes apart; never on the data path.
    pub(crate) parts: Mutex<Parts>,
    handles: Mutex<Handles>,
    ports: Ports,
    events: Arc<EventLog>,
    pub(crate) certificate: OnceLock<Certificate>,
    /// What the ladder had found after its last step, for callers who cannot have the parts.
    pub(crate) so_far: Mutex<Progress>,
    /// Looks at its instances, from before each of them is made: one per lane, and the control lane's. Locked to add and to copy, never across a call.
    calls: Mutex<Vec<(LaneId, CallView)>>,
    /// Memory that clients have mapped.
    regions: Regions,
    /// Closed handles with requests in flight, and their lanes. At most as many as there are requests.
    orphans: Mutex<Vec<(Arc<HandleShared>, Arc<Lane>)>>,
}

impl std::fmt::Debug for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Binding").field("name", &self.name).field("phase", &self.phase()).finish()
    }
}

impl Drop for Binding {
    /// Gives the gate's slot back, and with it the drain's waker, which the slot would keep for ever. Handles hold the binding, so none is left to ask; a copy of the
    /// gate goes on answering `closed` (G7).
    fn drop(&mut self) {
        self.gate.close();
        // Refused only while something is inside: then the slot stays taken.
        let _ = self.gate.retire();
    }
}

impl Binding {
    /// `events` is the manager's log, `handle_limit` the most handles that may be open at once.
    pub(crate) fn new(
        name: String,
        driver: String,
        device: String,
        pinned: bool,
        handle_limit: usize,
        events: Arc<EventLog>,
    ) -> Binding {
        let gate = if pinned { Gate::pinned() } else { Gate::new() };
        gate.limit_handles(u32::try_from(handle_limit).unwrap_or(u32::MAX));
        Binding {
            name,
            driver: Mutex::new(driver.into()),
            device,
            pinned,
            generation: AtomicU64::new(1),
            created: Instant::now(),
            gate,
            life: Mutex::new(Life::new(pinned)),
            leaving_since: OnceLock::new(),
            fault: OnceLock::new(),
            recovery: OnceLock::new(),
            reconnection: OnceLock::new(),
            recipe: OnceLock::new(),
            hurried: AtomicBool::new(false),
            confinement: OnceLock::new(),
            judging: AtomicBool::new(false),
            control: ControlLane::default(),
            remembered: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            put_off: Mutex::new(None),
            serving: OnceLock::new(),
            parts: Mutex::new(Parts::default()),
            handles: Mutex::new(Handles { open: BTreeMap::new(), next: 1, closed: false }),
            ports: Ports::default(),
            events,
            certificate: OnceLock::new(),
            so_far: Mutex::new(Progress::default()),
            calls: Mutex::new(Vec::new()),
            regions: Regions::default(),
            orphans: Mutex::new(Vec::new()),
        }
    }

    /// The name it goes by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The driver's file or label, as it is now.
    pub fn driver(&self) -> Arc<str> {
        Arc::clone(&self.driver.lock())
    }

    pub(crate) fn set_driver(&self, driver: &str) {
        *self.driver.lock() = driver.into();
    }

    /// The device's address.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// How many drivers this binding has had, from 1.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Another driver is about to be made.
    pub(crate) fn next_generation(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Since when it exists.
    pub fn age(&self) -> Duration {
        self.created.elapsed()
    }

    /// Where it is in its life, as `ls` shows it.
    pub fn phase(&self) -> Phase {
        self.life.lock().phase()
    }

    /// Where it is, exactly, and why it leaves.
    pub(crate) fn life(&self) -> Life {
        self.life.lock().clone()
    }

    /// Enters it somewhere (`enter` says whether that could be done), and writes into the log that there is a new binding, before anything happens to it.
    pub(crate) fn announce<E>(&self, enter: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let life = self.life.lock();
        enter()?;
        let (to, phase) = (life.state().as_str().to_owned(), life.phase().as_str().to_owned());
        self.record(EventKind::State { from: String::new(), to, phase, cause: None, detail: None });
        Ok(())
    }

    /// Tells its life what has happened. The manager owns no transition: what comes next is in the table of `cofferdam-lifecycle`.
    pub(crate) fn step(&self, event: Event) -> Result<(), Refused> {
        let mut life = self.life.lock();
        let step = life.apply(event)?;
        if step.from == step.to {
            return Ok(());
        }
        let (from, to, phase) = (step.from.as_str(), step.to.as_str(), step.to.phase().as_str());
        let cause = step.cause.map(|cause| cause.as_str());
        if matches!(event, Event::Leave { .. }) {
            let _ = self.leaving_since.set(Instant::now());
        }
        let detail = match event {
            Event::Leave { cause: Cause::Fault, .. } => self.fault().map(ToString::to_string),
            _ => None,
        };
        self.record(EventKind::State {
            from: from.to_owned(),
            to: to.to_owned(),
            phase: phase.to_owned(),
            cause: cause.map(str::to_owned),
            detail,
        });
        // Whoever reads the log of the process may be slow; nobody who asks where the binding is waits for that.
        drop(life);
        // The ladder's steps are many and quick; its beginning and its end are what an operator looks for.
        if step.from.phase() == step.to.phase() {
            tracing::debug!(binding = self.name, from, to, cause, "life");
        } else {
            tracing::info!(binding = self.name, from, to, cause, "life");
        }
        Ok(())
    }

    /// For how long it has been leaving.
    pub(crate) fn leaving_for(&self) -> Option<Duration> {
        self.leaving_since.get().map(Instant::elapsed)
    }

    /// Memory that stays on purpose.
    pub(crate) fn retired_bytes(&self) -> u64 {
        self.certificate.get().map_or_else(|| self.regions.retired_bytes(), |certificate| certificate.leaked.bytes)
    }

    /// Why it leaves by itself, if it does.
    pub(crate) fn fault(&self) -> Option<&LaneFault> {
        self.fault.get()
    }

    /// Driver or device broke the rules. Only the first fault counts: what comes after it may be its consequence.
    pub(crate) fn set_fault(&self, fault: LaneFault) {
        if fault.is_interruption() {
            // The ladder's own doing, and no reason of its own to leave.
            return self.record(fault.to_event());
        }
        if self.fault.set(fault).is_ok()
            && let Some(fault) = self.fault()
        {
            self.record(fault.to_event());
        }
    }

    /// A view for an instance that is about to be made, which the binding keeps.
    pub(crate) fn new_view(&self, lane: LaneId) -> CallView {
        let view = CallView::new();
        let mut calls = self.calls.lock();
        // Of instances that are gone nothing is to be looked at any more.
        calls.retain(|(_, view)| !view.is_last());
        calls.push((lane, view.clone()));
        view
    }

    /// Has every guest end that still runs, or is about to be made. No other binding's.
    pub(crate) fn end_guests(&self) {
        self.calls.lock().iter().for_each(|(_, view)| view.kill());
    }

    /// Looks at every instance that it has or had.
    pub(crate) fn views(&self) -> Vec<(LaneId, CallView)> {
        self.calls.lock().clone()
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// Data lanes; 0 before it serves.
    pub fn lanes(&self) -> usize {
        self.serving.get().map_or(0, |serving| serving.lanes.len())
    }

    /// What the device can do now; `None` before it serves, and for a driver that gives no service.
    pub fn offer(&self) -> Option<Arc<Offer>> {
        let offer = self.serving.get()?.offer.as_ref()?;
        Some(Arc::clone(&offer.lock()))
    }

    /// What its disk can do now; `None` before it serves, and for a device that is no disk.
    pub fn geometry(&self) -> Option<BlockGeometry> {
        self.offer()?.block().cloned()
    }

    /// The certificate, once the ladder has ended.
    pub fn certificate(&self) -> Option<&Certificate> {
        self.certificate.get()
    }

    /// Opens a handle.
    ///
    /// # Errors
    /// [`OpenError`]: the binding is going or gone, has its limit of handles, or has no such lane.
    pub fn open(self: &Arc<Self>, spec: HandleSpec) -> Result<Handle, OpenError> {
        let serving = self.serving.get().ok_or(OpenError::Revoked)?;
        let lane = serving
            .lanes
            .get(spec.lane)
            .ok_or(OpenError::NoSuchLane { asked: spec.lane, lanes: serving.lanes.len() })?;
        let mut handles = self.handles.lock();
        if handles.closed {
            return Err(OpenError::Revoked);
        }
        let id = handles.next;
        let (handle, shared) = Handle::new(Arc::clone(self), Arc::clone(lane), id, spec)?;
        if self.reconnection.get().is_some_and(Reconnection::is_untold) {
            shared.owe_flush_error();
        }
        handles.next += 1;
        handles.open.insert(id, shared);
        Ok(handle)
    }

    pub(crate) fn forget_handle(&self, id: u64) {
        self.handles.lock().open.remove(&id);
    }

    /// Refuses new handles and revokes those that are open; returns how many that was. Idempotent.
    pub(crate) fn revoke_handles(&self) -> u64 {
        let open: Vec<_> = {
            let mut handles = self.handles.lock();
            handles.closed = true;
            handles.open.values().cloned().collect()
        };
        let revoked = self.gate.revoke_handles() as u64;
        open.iter().for_each(|handle| handle.announce_revocation());
        revoked
    }

    /// What the binding gives has changed: whoever has a handle may want to look.
    pub(crate) fn offer_changed(&self) {
        self.open_handles().iter().for_each(|handle| handle.notify.signal());
    }

    /// Asks the driver about responses that were put aside, on a thread of its own: one at a time, and it takes as long as a guest call may.
    pub(crate) fn judge_elsewhere(self: &Arc<Self>) {
        if self.judging.swap(true, Ordering::AcqRel) {
            return;
        }
        let binding = Arc::clone(self);
        let judge = move || {
            // Goes down with the thread, however that ends.
            let _judging = Lowered(&binding.judging);
            if let Some(serving) = binding.serving.get() {
                serving.lanes.iter().for_each(|lane| lane.judge());
            }
        };
        if let Err(error) = Within::spawn("cofferdam-judge", judge) {
            self.judging.store(false, Ordering::Release);
            tracing::error!(binding = self.name, %error, "no thread to ask the driver on");
        }
    }

    /// Looks after what a closed handle has in flight, for the watching thread to reap.
    pub(crate) fn adopt_orphan(&self, handle: &Arc<HandleShared>, lane: &Arc<Lane>) {
        self.orphans.lock().push((Arc::clone(handle), Arc::clone(lane)));
    }

    /// Memory that clients have mapped.
    pub(crate) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Takes away the mapped memory of handles that are over; whether some of it is still there.
    pub(crate) fn revoke_regions(&self) -> bool {
        let found = self.regions.revoke_finished();
        if let Some((bytes, reason)) = found.retired {
            self.record(EventKind::Retired { bytes, reason });
        }
        found.waits
    }

    /// Reaps for closed handles; whether any has something in flight still.
    pub(crate) fn reap_orphans(&self) -> bool {
        // Looked at without the lock: a look may cross into the driver, and whoever closes a handle waits for nothing.
        let lanes: Vec<_> = self.orphans.lock().iter().map(|(_, lane)| Arc::clone(lane)).collect();
        // Of a binding that has ended nothing is left to reap.
        let over = self.phase() == Phase::Detached;
        if !over {
            for lane in lanes {
                lane.try_reap();
            }
        }
        let mut orphans = self.orphans.lock();
        orphans.retain(|(handle, _)| !over && handle.in_flight.load(Ordering::Acquire) > 0);
        !orphans.is_empty()
    }

    pub(crate) fn open_handles(&self) -> Vec<Arc<HandleShared>> {
        self.handles.lock().open.values().cloned().collect()
    }

    /// Gives the binding a port to take down when it leaves.
    ///
    /// # Errors
    /// The port back, if the binding is leaving already; the caller shuts it down.
    pub fn attach_port(&self, port: Box<dyn Port>) -> Result<(), Box<dyn Port>> {
        let address = port.address();
        self.ports.attach(port, || self.record(EventKind::PortAttached { port: address }))
    }

    /// Takes one port down: it stops accepting, what was answered goes out within 100 ms, then its clients are severed. The binding serves on (L6).
    ///
    /// # Errors
    /// [`PortError`]; a port that did not end within its bound of about a second is not attached any more either.
    pub fn detach_port(&self, address: &str) -> Result<PortReport, PortError> {
        let gone = self.ports.detach(address)?;
        self.record_detached(&gone);
        gone.report.ok_or(PortError::LeftBehind(gone.address))
    }

    /// Addresses of the ports that are attached.
    pub fn ports(&self) -> Vec<String> {
        self.ports.addresses()
    }

    /// What keeps its ports from being handed to another process.
    pub(crate) fn port_obstacles(&self) -> Vec<String> {
        self.ports.obstacles()
    }

    /// Its ports, for somebody who gives them back or forgets them.
    pub(crate) fn ports_taken_away(&self) -> Vec<Box<dyn Port>> {
        self.ports.take_away()
    }

    /// Ports that were taken away go on.
    pub(crate) fn give_ports_back(&self, ports: Vec<Box<dyn Port>>) {
        self.ports.give_back(ports);
    }

    /// Ports that were adopted begin.
    pub(crate) fn resume_ports(&self) {
        self.ports.resume();
    }

    /// The ladder's: refuses new ports and takes all down; those that did not end. Bounded, and idempotent.
    pub(crate) fn take_down_ports(&self) -> Vec<String> {
        let gone = self.ports.take_down();
        gone.iter().for_each(|gone| self.record_detached(gone));
        gone.into_iter().filter(|gone| gone.report.is_none()).map(|gone| gone.address).collect()
    }

    fn record_detached(&self, gone: &Gone) {
        let PortReport { connections, severed } = gone.report.clone().unwrap_or_default();
        let port = gone.address.clone();
        tracing::info!(binding = self.name, port, connections, severed, "port detached");
        self.record(EventKind::PortDetached { port, connections, severed, ended: gone.report.is_some() });
    }

    /// Writes into the manager's log.
    pub(crate) fn record(&self, what: EventKind) {
        self.events.record(&self.name, self.generation(), what);
    }

    /// Revokes one handle while the others are served on, and waits until what it had in flight is answered. Waking, refusing and hanging up happen at once; only the
    /// last part waits, for `deadline` at most.
    ///
    /// # Errors
    /// [`RevokeError`]; after `StillDraining` the handle is revoked all the same.
    pub fn revoke_handle(&self, id: u64, deadline: Duration) -> Result<RevokeReport, RevokeError> {
        let started = Instant::now();
        let handle = self.handles.lock().open.get(&id).cloned();
        let handle = handle.ok_or(RevokeError::NoSuchHandle { binding: self.name.clone(), handle: id })?;
        let requests_at_revoke = u64::from(handle.in_flight.load(Ordering::Acquire));
        if handle.revoke() {
            tracing::info!(binding = self.name, handle = id, port = handle.label, peer = handle.peer, "handle revoked");
            let (port, peer) = (handle.label.clone(), handle.peer.clone());
            self.record(EventKind::HandleRevoked { handle: id, port, peer });
        }
        let lane = self.serving.get().and_then(|serving| serving.lanes.get(handle.lane));
        let until = crate::ladder::after(started, deadline);
        loop {
            // Its client may have stopped polling: then nobody else would (L3).
            if let Some(lane) = lane {
                lane.try_reap();
            }
            // The gate knows of what is admitted this moment and not in the ledger yet; of a pinned binding it knows nothing.
            let in_flight = u64::from(handle.in_flight.load(Ordering::Acquire));
            let requests_left = in_flight.max(handle.right().calls());
            let report = RevokeReport {
                binding: self.name.clone(),
                handle: id,
                port: handle.label.clone(),
                peer: handle.peer.clone(),
                requests_at_revoke,
                requests_left,
                micros: crate::ladder::micros(started.elapsed()),
            };
            if requests_left == 0 {
                return Ok(report);
            }
            let now = Instant::now();
            if now >= until {
                return Err(RevokeError::StillDraining(report));
            }
            if !handle.drain(until.min(now + REVOKE_SLICE)) {
                // A pinned gate counts nothing, so there is nothing to be woken by; nor is there from inside a call.
                std::thread::sleep(REVOKE_SLICE.min(until - now));
            }
        }
    }
}
