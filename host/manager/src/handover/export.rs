//! The side that gives away.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cofferdam_device::Exported;
use cofferdam_gate::{Hold, Overdue};
use cofferdam_lifecycle::Phase;
use cofferdam_runtime::{Module, Service};

use super::{BindingManifest, ExportedBinding, Memory, State};
use crate::binding::Binding;
use crate::device::SharedTransport;
use crate::lane::LaneState;
use crate::manager::{Manager, Shared};
use crate::ports::{Port, Within};
use crate::reconnect::Reconnection;
use crate::recovery::Recovery;
use crate::watch;

/// How much longer than the deadline a hold may be: whoever is to commit has bounds of his own, and ports that are parked let nobody in anyway.
const COMMIT: Duration = Duration::from_secs(5);
/// How long it may take to write down how drivers broke down just before.
const WRITTEN: Duration = Duration::from_millis(200);
/// How often the ledgers are looked at.
const LOOK: Duration = Duration::from_micros(200);

/// How often it is asked whether a handover is called off while ports stop.
const CANCEL_LOOK: Duration = Duration::from_millis(5);

/// Whether a handover is to end early, and with it the time for which clients are held.
type CalledOff<'a> = &'a (dyn Fn() -> bool + Sync);

/// Of every binding what has to be known of it, and its component.
pub type Manifests = Vec<(BindingManifest, Arc<[u8]>)>;

/// Why nothing was handed over. Everything serves on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandOverError {
    /// These cannot be: what is in the way, each in a sentence.
    #[error("not everything here can be handed over: {}", .0.join("; "))]
    Obstacles(Vec<String>),
    /// What was under way did not end in time.
    #[error("nothing was handed over within {deadline:?}: {reason}")]
    NotDrained {
        /// How long clients may be held.
        deadline: Duration,
        /// Who did not drain.
        reason: String,
    },
}

/// One binding while it is held.
struct Held {
    binding: Arc<Binding>,
    ports: Vec<Box<dyn Port>>,
    /// Newcomers wait. `None` before every port has stopped.
    hold: Option<Hold>,
    /// Its device, once that is dormant.
    dormant: Option<SharedTransport>,
}

/// Bindings that were exported and are held. Dropping it has them serve on.
#[must_use = "dropping it takes everything back"]
pub struct HandOver {
    shared: Arc<Shared>,
    held: Vec<Held>,
    bindings: Vec<ExportedBinding>,
    since: Instant,
}

impl std::fmt::Debug for HandOver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HandOver").field("bindings", &self.held.len()).finish_non_exhaustive()
    }
}

impl Manager {
    /// What keeps bindings from being handed to another process now, each in a sentence that begins with the binding's name.
    pub fn obstacles(&self) -> Vec<String> {
        let bindings = self.bindings();
        let all = bindings.iter().flat_map(|binding| {
            let found = binding.obstacles();
            found.into_iter().map(|why| format!("'{}': {why}", binding.name())).collect::<Vec<_>>()
        });
        all.collect()
    }

    fn nothing_is_in_the_way(&self) -> Result<(), HandOverError> {
        let obstacles = self.obstacles();
        if obstacles.is_empty() { Ok(()) } else { Err(HandOverError::Obstacles(obstacles)) }
    }

    /// What another process needs to get ready for the bindings that there are, with the component of each.
    ///
    /// # Errors
    /// [`HandOverError::Obstacles`].
    pub fn manifests(&self) -> Result<Manifests, HandOverError> {
        self.nothing_is_in_the_way()?;
        let left = |binding: &Arc<Binding>| vec![format!("'{}': it is leaving", binding.name())];
        let manifest = |binding: &Arc<Binding>| {
            let known = binding.recipe.get().cloned().zip(binding.code());
            let (recipe, module) = known.ok_or_else(|| HandOverError::Obstacles(left(binding)))?;
            let manifest = BindingManifest {
                name: binding.name().to_owned(),
                driver: binding.driver().to_string(),
                device: binding.device().to_owned(),
                digest: module.info().digest.clone(),
                recipe,
            };
            Ok((manifest, Arc::clone(module.bytes())))
        };
        self.bindings().iter().map(manifest).collect()
    }

    /// Stops every port at a message boundary, waits until nothing is in flight, `deadline` at most, and exports every binding. Clients are held until what comes back is
    /// committed or dropped. Whoever calls this sees to it that nobody loads, unloads or changes a binding meanwhile.
    ///
    /// # Errors
    /// [`HandOverError`]; everything serves on.
    pub fn hand_over(&self, deadline: Duration) -> Result<HandOver, HandOverError> {
        self.hand_over_unless(deadline, &|| false)
    }

    /// The same, and gives up soon once `called_off` says so.
    ///
    /// # Errors
    /// As [`Manager::hand_over`].
    pub fn hand_over_unless(&self, deadline: Duration, called_off: CalledOff<'_>) -> Result<HandOver, HandOverError> {
        // Whoever is to go on finds what became of drivers before it: this process may end as it stands.
        let written = Instant::now() + WRITTEN;
        for binding in self.bindings() {
            binding.write_crashes(written);
        }
        let since = Instant::now();
        let until = since + deadline;
        let _within = Within::enter();
        let mut over = HandOver { shared: Arc::clone(self.shared()), held: Vec::new(), bindings: Vec::new(), since };
        let late = |reason: String| HandOverError::NotDrained { deadline, reason };
        self.nothing_is_in_the_way()?;
        for binding in self.bindings() {
            binding.put_off.lock().take();
            // From here on the device's loss is noticed afterwards, by whoever has it then.
            if binding.leaving.swap(true, Ordering::AcqRel) {
                return Err(HandOverError::Obstacles(vec![format!("'{}': it is leaving", binding.name())]));
            }
            let ports = binding.ports_taken_away();
            over.held.push(Held { binding, ports, hold: None, dormant: None });
        }
        // First the ports, with the gates open: what they have taken has to get through.
        let parked = park(&mut over.held, until, called_off).map_err(late)?;
        for held in &mut over.held {
            let hold = held.binding.gate().hold_for(deadline + COMMIT, Overdue::Open);
            held.hold = Some(hold.map_err(|_| late(format!("'{}' is held for something else", held.binding.name())))?);
        }
        for (held, ports) in over.held.iter_mut().zip(parked) {
            let name = held.binding.name().to_owned();
            held.binding.drain_lanes(until, called_off).map_err(|why| late(format!("'{name}': {why}")))?;
            let exported = held.binding.export(until, ports).map_err(|why| late(format!("'{name}': {why}")))?;
            held.dormant = Some(exported.1);
            over.bindings.push(exported.0);
            if held.binding.phase() != Phase::Serving {
                return Err(late(format!("'{name}' is {}", held.binding.phase())));
            }
        }
        Ok(over)
    }
}

/// Stops all ports at once; what each binding's have become.
fn park(held: &mut [Held], until: Instant, called_off: CalledOff<'_>) -> Result<Vec<Vec<Exported>>, String> {
    let cancels: Vec<_> = held.iter().flat_map(|held| &held.ports).filter_map(|port| port.canceller()).collect();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let parking: Vec<Vec<_>> = held
            .iter_mut()
            .map(|held| {
                let name = held.binding.name();
                let park = move |port: &mut Box<dyn Port>| {
                    port.export(until).map_err(|why| format!("'{name}', {}: {why}", port.address()))
                };
                held.ports.iter_mut().map(|port| scope.spawn(move || park(port))).collect()
            })
            .collect();
        let over = &over;
        let watcher = scope.spawn(move || {
            while !over.load(Ordering::Acquire) {
                if called_off() {
                    cancels.iter().for_each(|cancel| cancel());
                    return;
                }
                std::thread::park_timeout(CANCEL_LOOK);
            }
        });
        // All of them are waited for, also when one has failed.
        let joined: Vec<Vec<_>> = parking
            .into_iter()
            .map(|ports| ports.into_iter().map(|port| port.join().unwrap_or(Err("a port panicked".into()))).collect())
            .collect();
        over.store(true, Ordering::Release);
        watcher.thread().unpark();
        joined.into_iter().map(|ports| ports.into_iter().collect()).collect()
    })
}

impl HandOver {
    /// What was exported, to be sent to the other process. Empty the second time.
    pub fn take_exported(&mut self) -> Vec<ExportedBinding> {
        std::mem::take(&mut self.bindings)
    }

    /// Since when clients wait.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// Whether it can still be committed: every binding is where it was, and its clients wait.
    pub fn is_whole(&self) -> bool {
        let stands = |held: &Held| held.hold.as_ref().is_some_and(Hold::stands);
        self.held.iter().all(|held| held.binding.phase() == Phase::Serving && stands(held))
    }

    /// Has what is known of drivers that broke down be written, until `until` at most: also of those that did so while they were exported. For a process that has committed and ends.
    pub fn write_crashes(&self, until: Instant) {
        for held in &self.held {
            held.binding.write_crashes(until);
        }
    }

    /// The other process has them from here on. They are forgotten: nothing of them is taken down, and nothing is said to a device or a client. How many those were.
    pub fn commit(mut self) -> usize {
        let held = std::mem::take(&mut self.held);
        let count = held.len();
        for Held { binding, ports, hold, .. } in held {
            ports.into_iter().for_each(Port::forget);
            self.shared.forget(&binding);
            // Handles of this process have nothing to operate on any more.
            binding.gate().close();
            drop(hold);
            tracing::info!(binding = binding.name(), "handed over");
        }
        count
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        let _within = Within::enter();
        for Held { binding, ports, hold, dormant } in std::mem::take(&mut self.held) {
            if let Some(transport) = &dormant {
                transport.lock().resume();
            }
            binding.keep_queues();
            // Expired, or closed by the ladder: then nobody is to be let in.
            let _ = hold.map(Hold::open);
            binding.give_ports_back(ports);
            let put_off = {
                let mut put_off = binding.put_off.lock();
                binding.leaving.store(false, Ordering::Release);
                put_off.take()
            };
            if let Some(cause) = put_off {
                watch::leave(&self.shared, &binding, cause);
            }
            // A change that the device announced meanwhile was told its driver with a copy of the configuration from before.
            binding.pass_config_change(dormant.is_some());
            self.shared.look_again(&binding);
            tracing::info!(binding = binding.name(), "not handed over, serves on");
        }
    }
}

impl Binding {
    /// What its driver is made of now.
    fn code(&self) -> Option<Module> {
        match self.recovery.get() {
            Some(recovery) => recovery.version().map(|version| version.maker.module().clone()),
            None => self.parts.try_lock()?.module.clone(),
        }
    }

    /// What keeps it from being handed over, each in a sentence.
    fn obstacles(&self) -> Vec<String> {
        if self.phase() != Phase::Serving {
            return vec![format!("it is {}, not serving", self.phase())];
        }
        let mut found = Vec::new();
        if self.pinned {
            found.push("it is pinned: its calls are not counted, so nobody knows when it is empty".to_owned());
        }
        match self.code() {
            Some(module) if module.info().service == Service::Function => {
                // The rest is of drivers whose rings are the host's.
                return vec!["its driver programs the device itself (cofferdam:driver/function)".to_owned()];
            }
            Some(_) => {}
            None => found.push("it is being loaded, or its driver is part of the program".to_owned()),
        }
        if self.recovery.get().is_some_and(Recovery::is_on_probation) {
            found.push("its driver is on probation, and the one before it would not come back by itself".to_owned());
        }
        if self.recipe.get().is_some_and(|recipe| recipe.grants_directory) {
            found.push("its driver was granted a directory (wasi:filesystem)".to_owned());
        }
        let device = self.parts.try_lock().map(|parts| parts.transport.clone());
        match device.flatten() {
            Some(transport) => found.extend(transport.lock().exportable().err().map(|why| why.to_string())),
            None => found.push("it is being loaded or unloaded".to_owned()),
        }
        found.extend(self.port_obstacles());
        found
    }

    /// Waits until nothing is in any lane, looking at the rings itself.
    fn drain_lanes(&self, until: Instant, called_off: CalledOff<'_>) -> Result<(), String> {
        let lanes = self.serving.get().map_or(&[][..], |serving| &serving.lanes);
        for lane in lanes {
            loop {
                let held = lane.try_reap().is_none_or(|left| left > 0);
                let empty = !held && lane.vacant(until).is_some_and(|vacant| vacant.is_empty());
                if empty {
                    break;
                }
                if called_off() {
                    return Err("it was called off".to_owned());
                }
                if Instant::now() >= until {
                    return Err(self.who_is_in());
                }
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    fn who_is_in(&self) -> String {
        let handles = self.handle_statuses();
        let busy = handles.iter().filter(|handle| handle.in_flight > 0);
        let words: Vec<_> =
            busy.map(|handle| format!("{} of {} ({})", handle.in_flight, handle.port, handle.peer)).collect();
        match words.is_empty() {
            true => "requests of clients that are gone are still with the device".to_owned(),
            false => format!("requests are still with the device: {}", words.join(", ")),
        }
    }

    /// Everything of it, with nothing in it.
    fn export(
        self: &Arc<Self>,
        until: Instant,
        ports: Vec<Exported>,
    ) -> Result<(ExportedBinding, SharedTransport), String> {
        let serving = self.serving.get().ok_or("it does not serve")?;
        let mut locked = self.control.lock_until(until).ok_or("a call of its control lane is under way")?;
        let control = locked.as_mut().filter(|control| !control.is_down).ok_or("its control lane is down")?;
        // A hint that cannot be had is none; and one whose making breaks the driver down is not worth it.
        let hint = control.instance.suspend().unwrap_or_default();
        if let Some(fault) = control.instance.fault().cloned()
            && !self.bring_control_up(control, Some(fault))
        {
            return Err("its driver broke down when it was asked what it knows".to_owned());
        }
        let features = control.attachment.features;
        // Under the same lock: what is taken off its queues from here on would be told the driver, and not be in the hint.
        let (control, of_control) = control.export_queues()?.unzip();
        drop(locked);
        let mut lanes: Vec<LaneState> = Vec::new();
        let mut channels = Vec::new();
        for lane in &serving.lanes {
            let mut vacant = lane.vacant(until).ok_or("a call of its driver is under way")?;
            if !vacant.works() || !vacant.is_empty() {
                return Err("its driver broke down, or something is in it again".to_owned());
            }
            let (state, descriptors) = vacant.export(lane)?;
            lanes.push(state);
            channels.extend(descriptors);
        }
        let parts = self.parts.try_lock_until(until).ok_or("somebody takes it apart")?;
        let (rings, arena) = parts.rings.as_ref().zip(parts.arena.as_ref()).ok_or("its memory is gone")?;
        channels.extend(of_control.into_iter().flatten());
        let mut descriptors = Vec::with_capacity(2 + channels.len());
        for region in [rings, arena.region()] {
            descriptors.push(region.duplicate().map_err(|error| error.to_string())?);
        }
        descriptors.extend(channels);
        let memory = |region: &cofferdam_device::DmaRegion| Memory { bytes: region.len(), iova: region.iova() };
        let transport = parts.transport.clone().ok_or("its device is gone")?;
        // Last, because the device is dormant from here on.
        let exported = transport.lock().export().map_err(|why| why.to_string())?;
        let state = State {
            features,
            hint_version: hint.version,
            hint: hint.bytes,
            lanes,
            control,
            memory: parts.marks.memory.clone(),
            rings: memory(rings),
            buffers: memory(arena.region()),
            generation: self.generation(),
            crashes: self.crash_count(),
            digest: self.code().map(|module| module.info().digest.clone()).unwrap_or_default(),
            unflushed: self.reconnection.get().is_some_and(Reconnection::has_unflushed),
            id: self.reconnection.get().and_then(Reconnection::id).map(|id| id.to_vec()),
            untold: self.reconnection.get().is_some_and(Reconnection::is_untold),
            owes_flush_errors: self.open_handles().iter().any(|handle| handle.owes_flush_error()),
        };
        // Plain data; should it fail all the same, the other process refuses what it gets.
        let state = serde_json::to_string(&state).unwrap_or_default();
        let name = self.name().to_owned();
        Ok((ExportedBinding { name, state, descriptors, transport: exported, ports }, transport))
    }
}
