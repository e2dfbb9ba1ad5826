//! From a component and a device to a binding that serves. Every failure leaves by the ladder (L4), so nothing has to be undone here.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cofferdam_device::DmaArena;
use cofferdam_device::transport::Transport;
use cofferdam_lifecycle::Event;
use cofferdam_runtime::{
    Attachment, BlockProperties, CallError, DeviceCapability, Grants, GuestLimits, LaneDriver, LaneId, LaneSetup,
    Module, Properties, QueueOwner, Runtime, Service,
};
use parking_lot::Mutex;

use crate::binding::{Binding, Parts, Serving};
use crate::control::Control;
use crate::device::DeviceWindow;
use crate::error::LoadError;
use crate::function;
use crate::handover::Recipe;
use crate::lane::{Journal, Lane, LaneParts, Promise};
use crate::maker::Maker;
use crate::manager::Shared;
use crate::mapped::{MapLimits, Site};
use crate::offer::Offer;
use crate::ports::Within;
use crate::queues::{Layout, QueuesError, SetQueues};
use crate::reconnect::{Expected, Reconnect, Reconnection};
use crate::recovery::{Recovery, RestartPolicy, Version};
use crate::residue::Marks;
use crate::watch::Watch;

/// I/O address of the region with rings and headers. Far below the arena's, so that the two never meet.
const RINGS_IOVA: u64 = 0x1000_0000;
/// I/O address of the buffer arena.
const ARENA_IOVA: u64 = 0x1_0000_0000;
/// Most data lanes of one binding: `wit/virtio.wit` knows 64 queues.
pub(crate) const LANE_LIMIT: u16 = 64;

/// What to load. Limits not given here have the defaults of DESIGN section 9.
pub struct LoadSpec {
    /// The binding's name; made from `driver` when `None`.
    pub name: Option<String>,
    /// What `ls` calls the driver: its file name or a label.
    pub driver: String,
    /// The component's bytes.
    pub component: Vec<u8>,
    /// The device, claimed by its bus.
    pub transport: Box<dyn Transport>,
    /// Most data lanes, each with a queue for requests; `None`: as many as driver and device agree on, at most 64.
    pub queues: Option<u16>,
    /// Calls are not counted and the module stays until the daemon stops.
    pub pinned: bool,
    /// What the driver may use beside its device.
    pub grants: Grants,
    /// The driver may have its device reach any memory of this machine, where nothing else stands in the way (DESIGN section 8).
    pub trust_dma: bool,
    /// Bounds of each instance: calls at most a minute, the host's part of them an hour, 4 GiB of memory, 10,000,000 table elements.
    pub limits: GuestLimits,
    /// Bytes of buffer memory for clients: a multiple of 4,096, at least 1 MiB. Taken when touched.
    pub arena_bytes: u64,
    /// Largest ring that is asked for, in entries: a power of two, 2 to 32,768. A vhost-user backend cannot say what it takes, it can only refuse.
    pub ring_entries: u16,
    /// Operations in flight per lane, 1 to 65,535.
    pub requests_per_lane: usize,
    /// When a driver that breaks down is replaced, each time in it at most a day; `None`: never, the binding leaves.
    pub restarts: Option<RestartPolicy>,
    /// How a device that is lost is brought back; `None`: it is not, the binding leaves. Needs [`LoadSpec::restarts`], which counts its returns as well.
    pub reconnect: Option<Reconnect>,
    /// Where crashes of the driver are written down; `None`: nowhere. Made with the first crash.
    pub crash_dir: Option<PathBuf>,
    /// Open handles of the binding.
    pub handle_limit: usize,
    /// Regions that clients may have mapped ([`crate::Handle::map`]), counted until their memory is gone.
    pub mapped_handles: usize,
    /// Bytes of all of them together.
    pub mapped_bytes: u64,
    /// A driver that is part of this program, in place of `component`: see [`NativeDriver`].
    #[doc(hidden)]
    pub native: Option<Box<dyn NativeDriver>>,
}

/// A driver without a sandbox, for the yardstick alone (`tests/yardstick`): what it costs less than the same driver as a component is what the sandbox costs. Nothing interrupts it,
/// nothing bounds its memory, and its calls are no crossings of the gate; whatever it says is checked as a guest's words are.
#[doc(hidden)]
pub trait NativeDriver: Send {
    /// The control lane: decides on the device, negotiates, plans, and says what the device can do.
    ///
    /// # Errors
    /// What the driver says.
    fn attach(&mut self, device: &mut dyn DeviceCapability) -> Result<(Attachment, BlockProperties), CallError>;

    /// A data lane.
    ///
    /// # Errors
    /// What the driver says.
    fn start(&mut self, setup: &LaneSetup) -> Result<Box<dyn LaneDriver>, CallError>;
}

impl LoadSpec {
    /// A load with every default: 64 MiB of buffers, rings of 256 entries, 1,024 requests per lane, 4,096 handles, 16 mapped regions
    /// of 256 MiB together, one queue, no grants.
    pub fn new(driver: impl Into<String>, component: Vec<u8>, transport: Box<dyn Transport>) -> LoadSpec {
        LoadSpec {
            name: None,
            driver: driver.into(),
            component,
            transport,
            queues: Some(1),
            pinned: false,
            grants: Grants::default(),
            trust_dma: false,
            limits: GuestLimits::default(),
            arena_bytes: 64 << 20,
            ring_entries: 256,
            requests_per_lane: 1024,
            restarts: Some(RestartPolicy::default()),
            reconnect: None,
            crash_dir: None,
            handle_limit: 4096,
            mapped_handles: 16,
            mapped_bytes: 256 << 20,
            native: None,
        }
    }
}

/// Builds up `binding`, which is registered and `loading`. On error the caller runs the ladder on it.
pub(crate) fn build(
    binding: &Arc<Binding>,
    runtime: &Runtime,
    manager: &Arc<Shared>,
    spec: LoadSpec,
) -> Result<(), LoadError> {
    let watch = manager.watch();
    let mut parts = binding.parts.lock();
    let _within = Within::enter();
    let recipe = Recipe::of(&spec);
    let bounds = recipe.check();
    if spec.native.is_none() {
        let _ = binding.recipe.set(recipe);
    }
    let mappings = MapLimits { handles: spec.mapped_handles, bytes: spec.mapped_bytes };
    let LoadSpec { component, transport, queues, grants, limits, arena_bytes, requests_per_lane, ring_entries, .. } =
        spec;
    let mut native = spec.native;
    let device = binding.device().to_owned();
    let device_error = |source| LoadError::Device { device: device.clone(), source };
    let plan_error = |reason: String| LoadError::Plan { device: device.clone(), reason };

    // From here on the ladder owns the device, whatever happens.
    let transport = Arc::new(Mutex::new(transport));
    parts.transport = Some(Arc::clone(&transport));
    parts.marks = Marks::new(memory_name(binding.name()));
    for fd in transport.lock().descriptors() {
        parts.marks.note(fd);
    }
    bounds.map_err(LoadError::Bounds)?;

    let module = match native {
        Some(_) => None,
        None => {
            let module = runtime.load(&component)?;
            Some(module)
        }
    };
    drop(component);
    let is_replaced = spec.restarts.is_some() && module.as_ref().is_some_and(|module| !is_function(module));
    if spec.reconnect.is_some() && !is_replaced {
        return Err(LoadError::CannotReconnect);
    }
    parts.module.clone_from(&module);
    let maker = module.as_ref().map(|module| Maker::new(module, grants, limits)).transpose()?;
    if let Some(maker) = maker.as_ref().filter(|maker| is_function(maker.module())) {
        parts.control = Some(function::attach(binding, maker, &transport, spec.trust_dma, &parts.marks.memory)?);
        transport.lock().start().map_err(device_error)?;
        return open_for_business(binding, &mut parts, None, watch, &transport);
    }
    if transport.lock().function().is_some() {
        return Err(LoadError::Kind { device, driver: "a virtio driver", needs: "a virtio device" });
    }
    let _ = binding.confinement.set(transport.lock().confinement());

    // Control lane: attach, plan, properties.
    let lane_limit = queues.unwrap_or(LANE_LIMIT).clamp(1, LANE_LIMIT);
    let negotiated = Arc::new(Mutex::new(None));
    let mut window = DeviceWindow::new(Arc::clone(&transport), lane_limit, ring_entries, Arc::clone(&negotiated));
    let attach_error = |source| LoadError::Attach { device: device.clone(), source };
    let (attachment, properties) = match (&maker, &mut native) {
        (Some(maker), _) => {
            let mut control = maker.make(binding, LaneId::Control)?;
            let attachment = control.attach(Box::new(window)).map_err(attach_error)?;
            let properties = control.properties().map_err(attach_error)?;
            parts.control = Some(control);
            (attachment, properties)
        }
        (None, Some(native)) => {
            let (attachment, block) = native.attach(&mut window).map_err(attach_error)?;
            (attachment, Properties::Block(block))
        }
        (None, None) => return Err(LoadError::Host("neither a component nor a native driver".into())),
    };
    let Some(features) = *negotiated.lock() else {
        return Err(plan_error("the driver attached without negotiating features".into()));
    };
    if features != attachment.features {
        return Err(plan_error("the driver's attachment names other features than it negotiated".into()));
    }
    check_plan(&attachment, transport.lock().as_ref(), lane_limit, ring_entries).map_err(&plan_error)?;
    let is_block = matches!(properties, Properties::Block(_));

    // Memory: rings and headers in a region that no client and no guest ever receives, buffers in the arena.
    let layout = Layout::new(&attachment, transport.lock().offered_features());
    let memory = parts.marks.memory.clone();
    let host = |error: &dyn std::fmt::Display| LoadError::Host(error.to_string());
    let make = |what: &str, bytes, iova| {
        transport.lock().memory(&format!("{memory}-{what}"), bytes, iova).map_err(|e| host(&e))
    };
    let rings = make("rings", layout.bytes, RINGS_IOVA)?;
    parts.rings = Some(Arc::clone(&rings));
    let region = make("arena", arena_bytes, ARENA_IOVA)?;
    let arena = DmaArena::new(Arc::clone(&region)).map_err(|e| host(&e))?;
    parts.arena = Some(arena.clone());
    let max_lease_bytes = arena.max_lease_bytes();
    let mut offer = Arc::new(Offer::from_properties(properties, arena_bytes, max_lease_bytes));
    let queues = {
        let mut transport = transport.lock();
        transport.map(Arc::clone(&rings)).map_err(device_error)?;
        transport.map(region).map_err(device_error)?;
        let made = layout.set_up(&attachment, &rings, &arena, transport.as_mut(), &mut parts.marks);
        made.map_err(|error| match error {
            QueuesError::Plan(reason) => plan_error(reason),
            QueuesError::Device(source) => device_error(source),
        })?
    };

    let promise = spec.reconnect.as_ref().map(|_| Arc::new(Promise::new(queues.sets.len(), false)));

    // Data lanes: one set of queues each.
    for (number, SetQueues { indices, requests, posted }) in queues.sets.into_iter().enumerate() {
        let set = number as u16;
        let setup = LaneSetup { features, state: attachment.state.clone(), queues: indices };
        let driver: Box<dyn LaneDriver> = match (&maker, &mut native) {
            (Some(maker), _) => {
                let mut driver = maker.make(binding, LaneId::Data(set))?;
                driver.start(&setup).map_err(attach_error)?;
                Box::new(driver)
            }
            (None, Some(native)) => native.start(&setup).map_err(attach_error)?,
            (None, None) => break,
        };
        let lane = Lane::new(LaneParts {
            driver,
            queue: requests,
            arena: arena.clone(),
            offer: Arc::clone(&offer),
            set,
            setup,
            posted,
            requests: requests_per_lane,
            journal: promise.as_ref().map(|promise| Journal::new(set, promise)),
            is_adopted: false,
            binding: Arc::downgrade(binding),
            wake: watch.waker(),
            reaper: watch.reaper(),
        });
        parts.lanes.push(Arc::new(lane));
    }
    if let Some((maker, policy)) = maker.zip(spec.restarts) {
        let version = Version { maker, driver: binding.driver(), state: attachment.state.clone(), number: 0 };
        let _ = binding.recovery.set(Recovery::new(version, policy, spec.crash_dir));
    }
    if let Some((reconnect, promise)) = spec.reconnect.zip(promise) {
        let expected = Expected::of(layout, features, transport.lock().as_ref());
        let manager = Arc::downgrade(manager);
        let _ = binding.reconnection.set(Reconnection::new(reconnect, expected, &transport, &manager, promise));
    }
    transport.lock().start().map_err(device_error)?;
    parts.lanes.iter().for_each(|lane| lane.kick_posted());
    if let (Some(reconnection), Some(lane)) = (binding.reconnection.get(), parts.lanes.first())
        && offer.block().is_some_and(|disk| disk.has_id)
    {
        reconnection.learn_id(binding, lane, &rings);
    }
    if is_block {
        let wake = watch.reaper();
        binding.regions().open(Site { transport: Arc::downgrade(&transport), memory, wake, limits: mappings });
    }
    if let Some(instance) = parts.control.take() {
        let control_queues = queues.control.map(|queues| {
            queues.kick();
            Arc::new(Mutex::new(queues))
        });
        let mut control = Control {
            instance,
            transport: Arc::downgrade(&transport),
            lane_limit,
            ring_limit: ring_entries,
            negotiated,
            attachment,
            is_down: false,
            crash: 0,
            changes: 0,
            made_of: 0,
            arena_bytes,
            max_lease_bytes,
            queues: control_queues,
        };
        let live = control.live();
        // Also if that went wrong: the ladder takes it from there.
        binding.control.open(control);
        offer = Arc::new(live.map_err(attach_error)?);
        parts.lanes.iter().for_each(|lane| lane.set_offer(&offer));
    }
    open_for_business(binding, &mut parts, Some(offer), watch, &transport)
}

/// The last step: from here on clients may come, and the device's loss is noticed.
fn open_for_business(
    binding: &Arc<Binding>,
    parts: &mut Parts,
    offer: Option<Arc<Offer>>,
    watch: &Watch,
    transport: &crate::device::SharedTransport,
) -> Result<(), LoadError> {
    let serving = Serving { lanes: parts.lanes.clone(), offer: offer.map(Mutex::new) };
    // Before anybody can reach it: a fault that comes with the first request is looked for in bindings that serve. An unload that came while this went on has
    // called it off, and waits for the parts that are locked here.
    if binding.step(Event::Loaded).is_err() {
        return Err(LoadError::CalledOff);
    }
    if binding.serving.set(serving).is_err() {
        return Err(LoadError::Host("a binding was built twice".into()));
    }
    if let Some(fd) = transport.lock().event_fd() {
        watch.add(binding, transport, fd).map_err(|e| LoadError::Host(e.to_string()))?;
    }
    if let Some(fd) = binding.control.event_fd() {
        watch.add(binding, transport, fd.as_fd()).map_err(|e| LoadError::Host(e.to_string()))?;
    }
    Ok(())
}

/// The driver's words about queues, checked against the device and the contract (who can forge this: the guest).
pub(crate) fn check_plan(
    attachment: &Attachment,
    transport: &dyn Transport,
    lane_limit: u16,
    ring_limit: u16,
) -> Result<(), String> {
    let queues = &attachment.queues;
    let most = transport.max_queues();
    if queues.is_empty() || queues.len() > usize::from(most) {
        return Err(format!("{} queues are planned, 1 to {most} can be had", queues.len()));
    }
    let lanes = queues.iter().filter(|queue| queue.posting.is_none() && queue.owner != QueueOwner::Control).count();
    if lanes == 0 || lanes > usize::from(lane_limit) {
        return Err(format!("{lanes} queues for requests are planned, 1 to {lane_limit} can be had"));
    }
    for (position, queue) in queues.iter().enumerate() {
        if queue.index >= transport.max_queues() {
            return Err(format!("queue {} does not exist", queue.index));
        }
        if queues[..position].iter().any(|other| other.index == queue.index) {
            return Err(format!("queue {} is planned twice", queue.index));
        }
        let largest = transport.max_queue_size(queue.index).min(ring_limit);
        if !queue.size.is_power_of_two() || queue.size > largest {
            return Err(format!(
                "queue {} of {} entries: a power of two up to {largest} can be had",
                queue.index, queue.size
            ));
        }
        if queue.ordinary_response.as_ref().is_some_and(|bytes| bytes.len() > cofferdam_device::MAX_STATUS_BYTES) {
            return Err(format!("queue {}: the ordinary response is over 64 bytes", queue.index));
        }
    }
    if attachment.state.len() > 4096 {
        return Err("the driver's state is over 4,096 bytes".into());
    }
    Ok(())
}

/// Whether the driver programs its device itself.
fn is_function(module: &Module) -> bool {
    module.info().service == Service::Function
}

/// A name for memfds that no other binding of this process has.
fn memory_name(binding: &str) -> String {
    // The number comes first: a binding may be called like the end of another one's memory.
    format!("cofferdam-{}-{binding}", NEXT_MEMORY.fetch_add(1, Ordering::Relaxed))
}

static NEXT_MEMORY: AtomicU64 = AtomicU64::new(1);

/// Another process made memory of this name, and it is this one's now.
pub(crate) fn skip_memory_names(taken: &str) {
    let number = taken.strip_prefix("cofferdam-").and_then(|rest| rest.split('-').next()?.parse::<u64>().ok());
    NEXT_MEMORY.fetch_max(number.unwrap_or(0).saturating_add(1), Ordering::Relaxed);
}
