//! One lane's guest: a store of its own, entered by one caller at a time, dead after its first fault.

use std::fmt;
use std::time::Instant;

use cofferdam_device::Function;
use cofferdam_gate::Gate;
use wasmtime::{Store, UpdateDeadline, WasmBacktrace, WasmCoreDump};

use crate::activity::{Activity, Export};
use crate::capability::device::{DeviceCapability, the_device};
use crate::capability::function::{FunctionState, the_function};
use crate::capability::live::{LiveCapability, the_live_device};
use crate::capability::log::{LogSink, Speaker};
use crate::capability::wasi::WasiState;
use crate::error::InstantiateError;
use crate::fault::{CallError, DriverError, FaultKind, GuestFault, frames};
use crate::grants::Grants;
use crate::guest::{Guest, ServiceExports};
use crate::kill::KillSwitch;
use crate::lifted::{Lifted, Window};
use crate::limits::{GuestLimits, Meter};
use crate::module::{Linked, mismatch};
use crate::runtime::Runtime;
use crate::service::WitProperties;
use crate::service::{
    Attachment, ExportedState, LaneDriver, LaneSetup, MAX_ANSWER_WORDS, MAX_BATCH_REQUESTS, MAX_CHAIN_WORDS, Properties,
};
use crate::state::LaneState;
use crate::view::CallView;
use crate::watch::Watch;

/// Bytes that one host call may lift out of a guest; wasmtime counts them before it allocates. Enough for 64 chains of the longest kind (71 KiB) and for the chunks in
/// which WASI writes files; a list or a log message beyond it is a [`FaultKind::Layout`] or [`FaultKind::Trap`] fault.
const LIFT_LIMIT_BYTES: usize = 2 << 20;

/// Words of one request (`wit/words.wit`).
const REQUEST_WORDS: usize = 3;

/// Which lane of its binding an instance serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LaneId {
    /// Negotiation, configuration and properties.
    Control,
    /// The data lane of this number.
    Data(u16),
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LaneId::Control => f.write_str("control"),
            LaneId::Data(number) => write!(f, "{number}"),
        }
    }
}

/// What an instance is made for.
pub struct InstanceSpec {
    /// Name of the binding, for log lines.
    pub binding: String,
    /// Name of the driver, for log lines.
    pub driver: String,
    /// Address of the device, for log lines.
    pub device: String,
    /// Generation of the driver in its binding, for log lines.
    pub generation: u64,
    /// The lane.
    pub lane: LaneId,
    /// The binding's gate: every call into the guest is a crossing of it.
    pub gate: Gate,
    /// What the operator allowed.
    pub grants: Grants,
    /// Bounds.
    pub limits: GuestLimits,
    /// Ends this instance alone.
    pub kill: KillSwitch,
    /// Shows what this instance alone is doing.
    pub view: CallView,
}

/// One instance of a driver.
///
/// Invariant (L5): once the view has a fault the guest is never entered again; every later call answers a copy of it. A call that unwound through a panic of a
/// capability counts as a fault too.
pub struct Instance {
    // Before `runtime`: the store goes while the ticker that bounds it still runs.
    store: Store<LaneState>,
    guest: Guest,
    gate: Gate,
    view: CallView,
    inside: bool,
    lane: LaneId,
    /// What it was when it trapped.
    core: Option<WasmCoreDump>,
    runtime: Runtime,
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance").field("lane", &self.lane).field("fault", &self.fault()).finish_non_exhaustive()
    }
}

impl Instance {
    pub(crate) fn new(linked: &Linked, spec: InstanceSpec) -> Result<Instance, InstantiateError> {
        let (module, pre) = (linked.module(), linked.pre());
        let runtime = module.runtime().clone();
        spec.kill.arm(runtime.engine());
        let rate = runtime.log_rate(&spec.binding, spec.limits.log_lines_per_s);
        let speaker = Speaker {
            binding: spec.binding,
            driver: spec.driver,
            device: spec.device,
            generation: spec.generation,
            lane: spec.lane.to_string(),
        };
        let log = LogSink::new(speaker, rate);
        let wasi = if spec.grants.is_empty() { None } else { Some(Box::new(WasiState::new(&spec.grants, &log)?)) };
        // One instance, one view: words with two writers would show neither.
        let view = if spec.view.activity().claim(&spec.kill) { spec.view } else { CallView::new() };
        let activity = view.activity();
        let state = LaneState {
            watch: Watch::new(spec.kill, activity.clone(), &spec.limits),
            meter: Meter::new(&spec.limits),
            log,
            device: None,
            live: None,
            function: FunctionState::default(),
            wasi,
        };
        let mut store = Store::new(runtime.engine(), state);
        store.limiter(|state| &mut state.meter);
        store.set_hostcall_fuel(LIFT_LIMIT_BYTES);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|mut store| {
            store.data_mut().watch.epoch(Instant::now())?;
            if store.data().watch.activity().is_asked() {
                let frames = frames(&WasmBacktrace::force_capture(&store));
                store.data().watch.activity().tell(frames);
            }
            Ok(UpdateDeadline::Continue(1))
        });
        runtime.pulse().register(activity);
        // Start functions are guest code: under the gate, the deadline and the switch like any call.
        let made = {
            let _crossing = spec.gate.cross();
            let _busy = Busy::enter(&runtime, activity, Export::Instantiate);
            match store.data_mut().watch.begin() {
                Ok(()) => pre.instantiate(&mut store),
                Err(interrupt) => Err(interrupt.into()),
            }
        };
        let made = made.map_err(|error| activity.die(classify(&mut store, &error)).clone())?;
        let guest = Guest::new(module.info().service, &mut store, &made).map_err(|error| mismatch(&error))?;
        Ok(Instance { store, guest, gate: spec.gate, view, inside: false, lane: spec.lane, core: None, runtime })
    }

    /// The lane that this instance serves.
    #[must_use]
    pub fn lane(&self) -> LaneId {
        self.lane
    }

    /// The fault that ended this instance, if one did.
    #[must_use]
    pub fn fault(&self) -> Option<&GuestFault> {
        self.view.fault()
    }

    /// The core dump of an instance that trapped, once, in the format of the WebAssembly tool conventions (`Coredump.md`): about as long as [`Instance::memory_bytes`]. `None` after
    /// any other end.
    pub fn core_dump(&mut self) -> Option<Vec<u8>> {
        let core = self.core.take()?;
        Some(core.serialize(&mut self.store, &self.lane.to_string()))
    }

    /// Linear memory of the guest, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.store.data().meter.memory_bytes() as u64
    }

    /// Control lane, once: the driver looks at the device, negotiates and plans. The device is dropped when the call ends, however it ends.
    ///
    /// # Errors
    /// [`CallError::Driver`] when the driver refuses the device, [`CallError::Fault`] when it faulted; the latter also for an attachment that is out of the
    /// bounds in `wit/virtio.wit`.
    pub fn attach(&mut self, device: Box<dyn DeviceCapability>) -> Result<Attachment, CallError> {
        let words = self.with_device(Export::Attach, device, |store, guest| {
            guest.virtio()?.driver.cofferdam_driver_driver().call_attach(store, the_device())
        })?;
        let attachment = words.map_err(DriverError::from)?;
        Attachment::check(attachment).map_err(|fault| self.fail(fault))
    }

    /// Control lane: another instance is about to take its place. What it exports is for [`Instance::resume`] of that one, and only a hint.
    ///
    /// # Errors
    /// [`CallError::Fault`] when the driver faulted, also by exporting more than the 4,096 bytes of `wit/virtio.wit`.
    pub fn suspend(&mut self) -> Result<ExportedState, CallError> {
        let words = self.call(Export::Suspend, |store, guest| {
            guest.virtio()?.driver.cofferdam_driver_driver().call_suspend(store)
        })?;
        ExportedState::check(words).map_err(|fault| self.fail(fault))
    }

    /// Control lane, in the place of [`Instance::attach`]: takes over a device that runs.
    ///
    /// # Errors
    /// As [`Instance::attach`].
    pub fn resume(
        &mut self,
        device: Box<dyn DeviceCapability>,
        state: &ExportedState,
    ) -> Result<Attachment, CallError> {
        let state = state.into();
        let words = self.with_device(Export::Resume, device, |store, guest| {
            guest.virtio()?.driver.cofferdam_driver_driver().call_resume(store, the_device(), &state)
        })?;
        let attachment = words.map_err(DriverError::from)?;
        Attachment::check(attachment).map_err(|fault| self.fail(fault))
    }

    /// Control lane of a driver that programs its device itself, once: it decides on the function and sets it up. `function` is dropped when the call ends; memory that
    /// it gave stays with the guest.
    ///
    /// # Errors
    /// [`CallError::Driver`] when the driver refuses the function, [`CallError::Fault`] when it faulted.
    pub fn attach_function(&mut self, function: Box<dyn Function>) -> Result<(), CallError> {
        self.store.data_mut().function.open(function);
        let answer = self.call(Export::AttachFunction, |store, guest| {
            guest.function()?.cofferdam_driver_function().call_attach(store, the_function())
        });
        self.store.data_mut().function.close();
        Ok(answer?.map_err(DriverError::from)?)
    }

    /// Control lane: the device's configuration space may have changed. Ask for [`Instance::properties`] afterwards.
    ///
    /// # Errors
    /// As [`Instance::attach`].
    pub fn config_changed(&mut self, device: Box<dyn DeviceCapability>) -> Result<(), CallError> {
        let answer = self.with_device(Export::ConfigChanged, device, |store, guest| {
            guest.virtio()?.driver.cofferdam_driver_driver().call_config_changed(store, the_device())
        })?;
        Ok(answer.map_err(DriverError::from)?)
    }

    /// Control lane: what the device can do, checked against the bounds in `wit/`.
    ///
    /// # Errors
    /// As [`Instance::attach`]; a breach of the bounds is a fault.
    pub fn properties(&mut self) -> Result<Properties, CallError> {
        let words = self.call(Export::GetProperties, |store, guest| {
            Ok(match &guest.virtio()?.service {
                ServiceExports::Block(block) => {
                    block.cofferdam_driver_block().call_get_properties(store)?.map(WitProperties::Block)
                }
                ServiceExports::Entropy(entropy) => {
                    entropy.cofferdam_driver_entropy().call_get_properties(store)?.map(WitProperties::Entropy)
                }
                ServiceExports::Stream(stream) => {
                    stream.cofferdam_driver_stream().call_get_properties(store)?.map(WitProperties::Stream)
                }
                ServiceExports::Net(net) => {
                    net.cofferdam_driver_net().call_get_properties(store)?.map(WitProperties::Net)
                }
            })
        })?;
        let properties = words.map_err(DriverError::from)?;
        Properties::check(properties).map_err(|fault| self.fail(fault))
    }

    /// Control lane with queues of its own, once the device runs.
    ///
    /// # Errors
    /// As [`Instance::attach`].
    pub fn live(&mut self, device: Box<dyn LiveCapability>) -> Result<(), CallError> {
        let answer = self.with_live(Export::Live, device, |store, guest| {
            guest.virtio()?.control()?.cofferdam_driver_control().call_live(store, the_live_device())
        })?;
        Ok(answer.map_err(DriverError::from)?)
    }

    /// Control lane with queues of its own: buffers that the device used, 1 to 64 (`control.events` in `wit/virtio.wit`).
    ///
    /// # Errors
    /// As [`Instance::attach`].
    pub fn events(&mut self, device: Box<dyn LiveCapability>, buffers: Vec<u32>) -> Result<(), CallError> {
        let answer = self.with_live(Export::Events, device, |store, guest| {
            guest.virtio()?.control()?.cofferdam_driver_control().call_events(store, the_live_device(), &buffers)
        })?;
        Ok(answer.map_err(DriverError::from)?)
    }

    /// Control lane of a driver of streams: a port was opened or closed on this side.
    ///
    /// # Errors
    /// As [`Instance::attach`].
    pub fn set_open(&mut self, device: Box<dyn LiveCapability>, port: u32, open: bool) -> Result<(), CallError> {
        let answer = self.with_live(Export::SetOpen, device, |store, guest| {
            let stream = guest.virtio()?.stream()?;
            stream.cofferdam_driver_stream_control().call_set_open(store, the_live_device(), port, open)
        })?;
        Ok(answer.map_err(DriverError::from)?)
    }

    fn with_live<R>(
        &mut self,
        export: Export,
        device: Box<dyn LiveCapability>,
        call: impl FnOnce(&mut Store<LaneState>, &Guest) -> wasmtime::Result<R>,
    ) -> Result<R, GuestFault> {
        self.store.data_mut().live = Some(device);
        let result = self.call(export, call);
        self.store.data_mut().live = None;
        result
    }

    /// Data lane, once, before any request. Asks for the lane's window too.
    ///
    /// # Errors
    /// As [`Instance::attach`]; a window that is not aligned is a fault.
    pub fn start(&mut self, setup: &LaneSetup) -> Result<(), CallError> {
        let setup = setup.into();
        let answer = self.call(Export::Start, |store, guest| {
            guest.virtio()?.driver.cofferdam_driver_driver().call_start(store, &setup)
        })?;
        answer.map_err(DriverError::from)?;
        self.window()?;
        Ok(())
    }

    /// Where the guest wants its words; it is asked once.
    fn window(&mut self) -> Result<Window, CallError> {
        if let Guest::Virtio(guest) = &self.guest
            && let Some(window) = guest.place
        {
            return Ok(window);
        }
        self.ask_window()
    }

    #[cold]
    fn ask_window(&mut self) -> Result<Window, CallError> {
        let offset = self.call(Export::Window, |store, guest| guest.virtio()?.call_window(store))?;
        let Some(window) = Window::at(offset) else {
            return Err(self.fail(GuestFault::layout(format!("window: {offset:#x} is not a multiple of 8"))));
        };
        if let Guest::Virtio(guest) = &mut self.guest {
            guest.place = Some(window);
        }
        Ok(window)
    }

    fn with_device<R>(
        &mut self,
        export: Export,
        device: Box<dyn DeviceCapability>,
        call: impl FnOnce(&mut Store<LaneState>, &Guest) -> wasmtime::Result<R>,
    ) -> Result<R, GuestFault> {
        self.store.data_mut().device = Some(device);
        let result = self.call(export, call);
        self.store.data_mut().device = None;
        result
    }

    /// The one way into the guest.
    fn call<R>(
        &mut self,
        export: Export,
        call: impl FnOnce(&mut Store<LaneState>, &Guest) -> wasmtime::Result<R>,
    ) -> Result<R, GuestFault> {
        if let Some(fault) = self.fault() {
            return Err(fault.clone());
        }
        if self.inside {
            return Err(self.die(unwound()));
        }
        if let Err(interrupt) = self.store.data_mut().watch.begin() {
            let fault = classify(&mut self.store, &interrupt.into());
            return Err(self.die(fault));
        }
        let result = {
            let _crossing = self.gate.cross();
            let _busy = Busy::enter(&self.runtime, self.view.activity(), export);
            self.inside = true;
            let result = call(&mut self.store, &self.guest);
            self.inside = false;
            result
        };
        match result {
            Ok(value) => {
                self.store.data_mut().meter.forget_denied();
                Ok(value)
            }
            Err(error) => {
                let fault = classify(&mut self.store, &error);
                self.core = error.downcast().ok();
                tracing::debug!(kind = fault.kind.as_str(), lane = %self.lane, message = fault.message, "driver fault");
                Err(self.die(fault))
            }
        }
    }

    /// The end of this instance, which everybody who has its view may know.
    fn die(&mut self, fault: GuestFault) -> GuestFault {
        self.view.activity().die(fault).clone()
    }

    /// The guest answered with words that are out of bounds.
    fn fail(&mut self, fault: GuestFault) -> CallError {
        CallError::Fault(self.die(fault))
    }

    fn replace(&mut self, out: &mut Vec<u32>, words: Lifted, limit: usize, export: &str) -> Result<(), CallError> {
        let count = words.take(out);
        if count > limit {
            out.clear();
            let message = format!("{export}: {count} words where {limit} are the most");
            return Err(self.fail(GuestFault::layout(message)));
        }
        Ok(())
    }
}

impl LaneDriver for Instance {
    fn submit(&mut self, requests: &[u64], out: &mut Vec<u32>) -> Result<(), CallError> {
        let window = self.window()?;
        let count = requests.len() / REQUEST_WORDS;
        let words =
            self.call(Export::Submit, |store, guest| guest.virtio()?.submit.call(store, window, requests, count))?;
        let limit = count.min(MAX_BATCH_REQUESTS) * MAX_CHAIN_WORDS;
        self.replace(out, words, limit, "submit")
    }

    fn complete(&mut self, responses: &[u32], out: &mut Vec<u32>) -> Result<(), CallError> {
        let window = self.window()?;
        let count = responses.len();
        let words =
            self.call(Export::Complete, |store, guest| guest.virtio()?.complete.call(store, window, responses, count))?;
        self.replace(out, words, MAX_BATCH_REQUESTS * MAX_ANSWER_WORDS, "complete")
    }

    fn received(&mut self, buffers: &[u32], out: &mut Vec<u32>) -> Result<(), CallError> {
        let window = self.window()?;
        let count = buffers.len();
        let words = self
            .call(Export::Received, |store, guest| guest.virtio()?.received()?.call(store, window, buffers, count))?;
        self.replace(out, words, MAX_BATCH_REQUESTS * MAX_CHAIN_WORDS, "received")
    }

    fn memory_bytes(&self) -> u64 {
        Instance::memory_bytes(self)
    }

    fn core_dump(&mut self) -> Option<Vec<u8>> {
        Instance::core_dump(self)
    }
}

/// Keeps the ticker at its fast pace; also when a capability's panic unwinds through the call.
struct Busy<'a>(&'a Runtime, &'a Activity);

impl<'a> Busy<'a> {
    fn enter(runtime: &'a Runtime, activity: &'a Activity, export: Export) -> Busy<'a> {
        runtime.pulse().enter(activity, export);
        Busy(runtime, activity)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.pulse().leave(self.1);
    }
}

#[cold]
fn classify(store: &mut Store<LaneState>, error: &wasmtime::Error) -> GuestFault {
    let denied = store.data_mut().meter.take_denied();
    GuestFault::classify(error, denied.as_deref())
}

fn unwound() -> GuestFault {
    let message = "the host panicked in an earlier call of this instance".to_owned();
    GuestFault { kind: FaultKind::Trap, message, backtrace: Vec::new() }
}
