//! The side that takes over.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cofferdam_device::transport::Transport;
use cofferdam_device::{DmaArena, DmaRegion};
use cofferdam_lifecycle::Event;
use cofferdam_runtime::{Attachment, ExportedState, Instance, LaneDriver, LaneId, LaneSetup, Module, Service};
use parking_lot::Mutex;

use super::{BindingManifest, Memory, State};
use crate::binding::{Binding, Serving};
use crate::control::Control;
use crate::device::{DeviceWindow, SharedTransport};
use crate::error::LoadError;
use crate::events::EventKind;
use crate::ladder::micros;
use crate::lane::{Journal, Lane, LaneParts, Promise};
use crate::load::{LANE_LIMIT, check_plan, skip_memory_names};
use crate::maker::Maker;
use crate::manager::{Manager, Shared, check_name};
use crate::mapped::{MapLimits, Site};
use crate::offer::Offer;
use crate::ports::Port;
use crate::queues::resumed::{Channels, Said};
use crate::queues::{Layout, Queues};
use crate::reconnect::{Expected, Open, Reconnect, Reconnection};
use crate::recovery::{Recovery, Version};
use crate::residue::Marks;

/// A driver that is compiled and linked for a binding of another process.
pub struct Prepared {
    manifest: BindingManifest,
    module: Module,
    maker: Maker,
    reopen: Option<Open>,
}

/// A binding that is made of what another process exported, and that nobody can see or use yet. Dropping it leaves no trace: neither the device nor a client hears of it.
#[must_use = "dropping it leaves the binding to the other process"]
pub struct Adopted {
    binding: Arc<Binding>,
    shared: Arc<Shared>,
    connections: u64,
    owes_flush_errors: bool,
    serves: bool,
}

impl Prepared {
    /// How its device is opened again, should it be lost; without it a binding that asks for that is not taken over.
    #[must_use]
    pub fn reopens(self, open: Open) -> Prepared {
        Prepared { reopen: Some(open), ..self }
    }
}

impl std::fmt::Debug for Adopted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adopted").field("binding", &self.binding).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("manifest", &self.manifest).finish_non_exhaustive()
    }
}

fn host(error: impl std::fmt::Display) -> LoadError {
    LoadError::Host(error.to_string())
}

impl Manager {
    /// Gets ready for a binding of another process: compiles its component, checks it, joins it to its grants. The other one serves meanwhile.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn prepare(&self, manifest: BindingManifest, component: &[u8]) -> Result<Prepared, LoadError> {
        check_name(&manifest.name)?;
        manifest.recipe.check().map_err(LoadError::Bounds)?;
        if self.get(&manifest.name).is_some() {
            return Err(LoadError::NameTaken(manifest.name));
        }
        let module = self.runtime().load(component)?;
        if module.info().digest != manifest.digest {
            return Err(host("the component is not the one that was announced"));
        }
        if module.info().service == Service::Function {
            return Err(host("a driver that programs its device itself cannot be taken over"));
        }
        let maker = Maker::new(&module, manifest.recipe.grants().map_err(host)?, manifest.recipe.limits())?;
        Ok(Prepared { manifest, module, maker, reopen: None })
    }

    /// Makes a binding of what the other process exported. `transport` is its device, adopted and dormant; `descriptors` and `state` are those of the export. Newcomers
    /// are held until [`Adopted::serve`].
    ///
    /// # Errors
    /// [`LoadError`]: the other process can go on.
    pub fn adopt(
        &self,
        prepared: Prepared,
        state: &str,
        descriptors: Vec<OwnedFd>,
        mut transport: Box<dyn Transport>,
    ) -> Result<Adopted, LoadError> {
        let shared = Arc::clone(self.shared());
        let Prepared { manifest, module, maker, reopen } = prepared;
        let mut state: State = serde_json::from_str(state).map_err(host)?;
        state.check(&manifest.name).map_err(LoadError::Bounds)?;
        if transport.address() != manifest.device {
            return Err(host(format!("the device is {}, not {}", transport.address(), manifest.device)));
        }
        if state.digest != manifest.digest {
            return Err(host("its driver is another one by now"));
        }
        let binding = Arc::new(Binding::new(
            manifest.name.clone(),
            manifest.driver.clone(),
            manifest.device.clone(),
            false,
            manifest.recipe.handle_limit,
            shared.events(),
        ));
        binding.gate().hold();
        let memory = Received::sort(&mut state, descriptors, transport.as_mut())?;
        let reconnect = match (manifest.recipe.reconnect, reopen) {
            (None, _) => None,
            (Some(wait), Some(open)) => Some(Reconnect { wait, open }),
            (Some(_), None) => {
                return Err(host("its device is to be brought back when it is lost, and nobody says how"));
            }
        };
        let owes_flush_errors = state.owes_flush_errors;
        build(&binding, &shared, &manifest, module, maker, state, memory, transport, reconnect)?;
        Ok(Adopted { binding, shared, connections: 0, owes_flush_errors, serves: false })
    }
}

/// The descriptors, by what they are.
struct Received {
    rings: Arc<DmaRegion>,
    buffers: Arc<DmaRegion>,
    said: Said,
}

impl Received {
    fn sort(
        state: &mut State,
        descriptors: Vec<OwnedFd>,
        transport: &mut dyn Transport,
    ) -> Result<Received, LoadError> {
        let count = descriptors.len();
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(|| host("a descriptor is missing"));
        let mut region =
            |fd: OwnedFd, memory: &Memory| transport.adopt_region(fd, memory.bytes, memory.iova).map_err(host);
        let rings = region(next()?, &state.rings)?;
        let buffers = region(next()?, &state.buffers)?;
        let mut pair = || Ok::<Channels, LoadError>([next()?, next()?]);
        let mut lanes = Vec::with_capacity(state.lanes.len());
        for lane in std::mem::take(&mut state.lanes) {
            let (own, posted) = (pair()?, lane.posted.is_some().then(&mut pair).transpose()?);
            lanes.push((lane, own, posted));
        }
        let mut control = None;
        if let Some(of_control) = state.control.take() {
            let (own, posted) = (pair()?, of_control.posted.is_some().then(&mut pair).transpose()?);
            control = Some((of_control, own, posted));
        }
        if descriptors.next().is_some() {
            return Err(host(format!("{count} descriptors for {} lanes are too many", lanes.len())));
        }
        Ok(Received { rings, buffers, said: Said { lanes, control } })
    }
}

/// The same as a load, with everything that the device has to do with found and not made.
#[expect(clippy::too_many_arguments, reason = "each is one part of what was received")]
fn build(
    binding: &Arc<Binding>,
    shared: &Arc<Shared>,
    manifest: &BindingManifest,
    module: Module,
    maker: Maker,
    state: State,
    memory: Received,
    mut transport: Box<dyn Transport>,
    reconnect: Option<Reconnect>,
) -> Result<(), LoadError> {
    let recipe = &manifest.recipe;
    let (device, watch) = (binding.device().to_owned(), shared.watch());
    let plan_error = |reason: String| LoadError::Plan { device: device.clone(), reason };
    let device_error = |source| LoadError::Device { device: device.clone(), source };
    binding.announce(|| Ok::<_, LoadError>(()))?;
    let mut parts = binding.parts.lock();
    let _ = binding.recipe.set(recipe.clone());
    let _ = binding.confinement.set(transport.confinement());
    for region in [&memory.rings, &memory.buffers] {
        transport.adopt_memory(Arc::clone(region)).map_err(device_error)?;
    }
    skip_memory_names(&state.memory);
    parts.marks = Marks::new(state.memory.clone());
    for fd in transport.descriptors() {
        parts.marks.note(fd);
    }
    let transport: SharedTransport = Arc::new(Mutex::new(transport));
    parts.transport = Some(Arc::clone(&transport));
    parts.module = Some(module);
    parts.rings = Some(Arc::clone(&memory.rings));
    let arena = DmaArena::new(Arc::clone(&memory.buffers)).map_err(host)?;
    parts.arena = Some(arena.clone());

    let lane_limit = recipe.queues.unwrap_or(LANE_LIMIT).clamp(1, LANE_LIMIT);
    let window = || DeviceWindow::adopting(Arc::clone(&transport), lane_limit, recipe.ring_entries, state.features);
    let hint = ExportedState { version: state.hint_version, bytes: state.hint.clone() };
    let (mut instance, attachment) = attach(binding, &maker, &window, &hint)?;
    if attachment.features != state.features {
        return Err(plan_error("it plans with other features than the device runs with".into()));
    }
    check_plan(&attachment, transport.lock().as_ref(), lane_limit, recipe.ring_entries).map_err(&plan_error)?;
    let layout = Layout::new(&attachment, transport.lock().offered_features());
    let Queues { sets, control: control_queues } = layout
        .resume(&attachment, &memory.rings, &arena, memory.said, transport.lock().as_mut(), &mut parts.marks)
        .map_err(&plan_error)?;

    let attach_error = |source| LoadError::Attach { device: device.clone(), source };
    let properties = instance.properties().map_err(attach_error)?;
    let (arena_bytes, max_lease_bytes) = (memory.buffers.len(), arena.max_lease_bytes());
    let offer = Arc::new(Offer::from_properties(properties, arena_bytes, max_lease_bytes));
    let promise = reconnect.as_ref().map(|_| Arc::new(Promise::new(sets.len(), state.unflushed)));
    for (set, queues) in sets.into_iter().enumerate() {
        let set = set as u16;
        let setup = LaneSetup { features: state.features, state: attachment.state.clone(), queues: queues.indices };
        let mut driver = maker.make(binding, LaneId::Data(set))?;
        driver.start(&setup).map_err(attach_error)?;
        let lane = Lane::new(LaneParts {
            driver: Box::new(driver) as Box<dyn LaneDriver>,
            queue: queues.requests,
            arena: arena.clone(),
            offer: Arc::clone(&offer),
            set,
            setup,
            posted: queues.posted,
            requests: recipe.requests_per_lane,
            journal: promise.as_ref().map(|promise| Journal::new(set, promise)),
            is_adopted: true,
            binding: Arc::downgrade(binding),
            wake: watch.waker(),
            reaper: watch.reaper(),
        });
        parts.lanes.push(Arc::new(lane));
    }
    if let Some(policy) = recipe.restarts() {
        let version = Version { maker, driver: binding.driver(), state: attachment.state.clone(), number: 0 };
        let recovery = Recovery::new(version, policy, recipe.crash_dir.clone());
        recovery.begin_at(state.crashes);
        let _ = binding.recovery.set(recovery);
    }
    if let Some((reconnect, promise)) = reconnect.zip(promise) {
        if state.untold {
            promise.tell_newcomers();
        }
        let expected = Expected::of(layout, state.features, transport.lock().as_ref());
        let manager = Arc::downgrade(shared);
        let reconnection = Reconnection::new(reconnect, expected, &transport, &manager, promise);
        if let Some(id) = state.id {
            reconnection.has_id(id.try_into().map_err(|_| host("an id of another length"))?);
        }
        let _ = binding.reconnection.set(reconnection);
    }
    binding.set_generation(state.generation);
    if matches!(*offer, Offer::Block(_)) {
        let limits = MapLimits { handles: recipe.mapped_handles, bytes: recipe.mapped_bytes };
        let site = Site { transport: Arc::downgrade(&transport), memory: state.memory, wake: watch.reaper(), limits };
        binding.regions().open(site);
    }
    binding.control.open(Control {
        instance,
        transport: Arc::downgrade(&transport),
        lane_limit,
        ring_limit: recipe.ring_entries,
        negotiated: Arc::new(Mutex::new(Some(state.features))),
        attachment,
        is_down: false,
        crash: 0,
        changes: 0,
        made_of: 0,
        arena_bytes,
        max_lease_bytes,
        queues: control_queues.map(|queues| Arc::new(Mutex::new(queues))),
    });
    let serving = Serving { lanes: parts.lanes.clone(), offer: Some(Mutex::new(offer)) };
    binding.step(Event::Loaded).map_err(|_| LoadError::CalledOff)?;
    binding.serving.set(serving).map_err(|_| host("a binding was built twice"))
}

/// A control lane's instance, by the hint or, if it makes nothing of that, without it.
fn attach(
    binding: &Arc<Binding>,
    maker: &Maker,
    window: &dyn Fn() -> DeviceWindow,
    hint: &ExportedState,
) -> Result<(Instance, Attachment), LoadError> {
    let mut instance = maker.make(binding, LaneId::Control)?;
    match instance.resume(Box::new(window()), hint) {
        Ok(attachment) => return Ok((instance, attachment)),
        Err(error) => tracing::warn!(binding = binding.name(), %error, "the driver makes nothing of the hint"),
    }
    let mut instance = maker.make(binding, LaneId::Control)?;
    let attach_error = |source| LoadError::Attach { device: binding.device().to_owned(), source };
    let attachment = instance.attach(Box::new(window())).map_err(attach_error)?;
    Ok((instance, attachment))
}

impl Adopted {
    /// The binding, for ports that adopt their clients: handles can be opened, and everything that they ask is held.
    pub fn binding(&self) -> &Arc<Binding> {
        &self.binding
    }

    /// Gives it a port that was adopted, with so many connections.
    pub fn attach_port(&mut self, port: Box<dyn Port>, connections: usize) {
        self.connections += connections as u64;
        // It is nobody's yet, so it cannot be leaving; a port that comes back goes by its drop, and leaves its clients to the other process.
        let _ = self.binding.attach_port(port);
    }

    /// Connections of the ports that it was given.
    pub fn connections(&self) -> u64 {
        self.connections
    }

    /// The other process has committed: this one serves from here on. `held` is how long clients have waited so far.
    ///
    /// # Errors
    /// [`LoadError`]: the binding serves, but something of it is missing, a name or the look at its device.
    pub fn serve(mut self, held: Duration) -> Result<Arc<Binding>, LoadError> {
        self.serves = true;
        let (binding, shared, connections) = (Arc::clone(&self.binding), Arc::clone(&self.shared), self.connections);
        let transport = binding.serving_transport();
        if let Some(transport) = &transport {
            transport.lock().resume();
        }
        binding.keep_queues();
        if self.owes_flush_errors {
            // Whose it is was not told: rather one too many.
            binding.open_handles().iter().for_each(|handle| handle.owe_flush_error());
        }
        let entered = shared.enter(&binding);
        // Before anybody is let in: how many queues are in use, for one, is known afterwards.
        binding.go_live();
        binding.gate().open();
        binding.resume_ports();
        binding.record(EventKind::TakenOver { connections, blackout_micros: micros(held) });
        tracing::info!(
            binding = binding.name(),
            driver = %binding.driver(),
            device = binding.device(),
            lanes = binding.lanes(),
            connections,
            "taken over"
        );
        let watched = transport.as_ref().map_or(Ok(()), |transport| shared.watch_device(&binding, transport));
        // What the device announced to the other process its driver may not have heard of, and a driver that was told a hint has not looked. Where nothing changed it is one call. What comes
        // from now on is the watch's.
        if !binding.pass_config_change(true) {
            shared.look_again(&binding);
        }
        entered?;
        watched.map_err(host)?;
        Ok(binding)
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        if !self.serves {
            // Each of them has the binding, and leaves its clients to the other process.
            self.binding.ports_taken_away().into_iter().for_each(Port::forget);
        }
    }
}

impl Binding {
    /// Its queues are this process's, whose device was resumed: nothing came of an export, or what was adopted serves. Before that nobody here has touched them.
    pub(super) fn keep_queues(&self) {
        if let Some(serving) = self.serving.get() {
            serving.lanes.iter().for_each(|lane| lane.keep());
        }
        self.control.keep();
    }

    fn serving_transport(&self) -> Option<SharedTransport> {
        self.parts.lock().transport.clone()
    }

    fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }
}
