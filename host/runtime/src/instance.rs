//! One lane's guest: a store of its own, entered by one caller at a time, dead after its first fault.

use std::fmt;
use std::time::Instant;

use cofferdam_device::Function;
use cofferdam_gate::Gate;
use wasmtime::{Store, UpdateDeadline, WasmBacktrace};

use crate::activity::{Activity, Export};
use crate::bindings::VirtioBlockDriver;
use crate::bindings::function::FunctionDriver;
use crate::capability::device::{DeviceCapability, the_device};
use crate::capability::function::{FunctionState, the_function};
use crate::capability::log::{LogSink, Speaker};
use crate::capability::wasi::WasiState;
use crate::error::InstantiateError;
use crate::fault::{CallError, DriverError, FaultKind, GuestFault, frames};
use crate::grants::Grants;
use crate::kill::KillSwitch;
use crate::lifted::{Lifted, Window, Words};
use crate::limits::{GuestLimits, Meter};
use crate::module::{Module, mismatch};
use crate::runtime::Runtime;
use crate::service::{
    Attachment, BlockDriver, BlockProperties, LaneSetup, MAX_ANSWER_WORDS, MAX_BATCH_REQUESTS, MAX_CHAIN_WORDS,
};
use crate::state::LaneState;
use crate::view::CallView;
use crate::watch::Watch;
use crate::world::Service;

/// Bytes that one host call may lift out of a guest; wasmtime counts them before it allocates. Enough for 64 chains of the longest kind (71 KiB) and for the chunks in
/// which WASI writes files; a list or a log message beyond it is a [`FaultKind::Layout`] or [`FaultKind::Trap`] fault.
const LIFT_LIMIT_BYTES: usize = 2 << 20;

/// Words of one request (`wit/block.wit`).
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
    runtime: Runtime,
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Instance").field("lane", &self.lane).field("fault", &self.fault()).finish_non_exhaustive()
    }
}

impl Instance {
    pub(crate) fn new(module: &Module, spec: InstanceSpec) -> Result<Instance, InstantiateError> {
        module.check_grants(&spec.grants)?;
        let runtime = module.runtime().clone();
        let pre = module.link(&spec.grants)?;
        spec.kill.arm(runtime.engine());
        let rate = runtime.log_rate(&spec.binding, spec.generation, spec.limits.log_lines_per_s);
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
        Ok(Instance { store, guest, gate: spec.gate, view, inside: false, lane: spec.lane, runtime })
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
            guest.block()?.exports.cofferdam_driver_driver().call_attach(store, the_device())
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

    /// Control lane: the device's configuration space may have changed. Ask for [`Instance::block_properties`] afterwards.
    ///
    /// # Errors
    /// As [`Instance::attach`].
    pub fn config_changed(&mut self, device: Box<dyn DeviceCapability>) -> Result<(), CallError> {
        let answer = self.with_device(Export::ConfigChanged, device, |store, guest| {
            guest.block()?.exports.cofferdam_driver_driver().call_config_changed(store, the_device())
        })?;
        Ok(answer.map_err(DriverError::from)?)
    }

    /// Control lane: what the device can do, checked against the bounds in `wit/block.wit`.
    ///
    /// # Errors
    /// As [`Instance::attach`]; a breach of the bounds is a fault.
    pub fn block_properties(&mut self) -> Result<BlockProperties, CallError> {
        let words = self.call(Export::GetProperties, |store, guest| {
            guest.block()?.exports.cofferdam_driver_block().call_get_properties(store)
        })?;
        let properties = words.map_err(DriverError::from)?;
        BlockProperties::check(&properties).map_err(|fault| self.fail(fault))
    }

    /// Data lane, once, before any request. Asks for the lane's window too.
    ///
    /// # Errors
    /// As [`Instance::attach`]; a window that is not aligned is a fault.
    pub fn start(&mut self, setup: &LaneSetup) -> Result<(), CallError> {
        let setup = setup.into();
        let answer = self.call(Export::Start, |store, guest| {
            guest.block()?.exports.cofferdam_driver_driver().call_start(store, &setup)
        })?;
        answer.map_err(DriverError::from)?;
        self.window()?;
        Ok(())
    }

    /// Where the guest wants its words; it is asked once.
    fn window(&mut self) -> Result<Window, CallError> {
        if let Guest::Block(BlockGuest { window: Some(window), .. }) = self.guest {
            return Ok(window);
        }
        self.ask_window()
    }

    #[cold]
    fn ask_window(&mut self) -> Result<Window, CallError> {
        let offset = self
            .call(Export::Window, |store, guest| guest.block()?.exports.cofferdam_driver_block().call_window(store))?;
        let Some(window) = Window::at(offset) else {
            return Err(self.fail(GuestFault::layout(format!("window: {offset:#x} is not a multiple of 8"))));
        };
        if let Guest::Block(guest) = &mut self.guest {
            guest.window = Some(window);
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

/// What is called in a guest.
enum Guest {
    Block(BlockGuest),
    Function(FunctionDriver),
}

impl Guest {
    fn new(
        service: Service,
        store: &mut Store<LaneState>,
        made: &wasmtime::component::Instance,
    ) -> wasmtime::Result<Guest> {
        Ok(match service {
            Service::Block => {
                let exports = VirtioBlockDriver::new(&mut *store, made)?;
                let (submit, complete) = data_path(store, made)?;
                Guest::Block(BlockGuest { exports, submit, complete, window: None })
            }
            Service::Function => Guest::Function(FunctionDriver::new(store, made)?),
        })
    }

    #[inline]
    fn block(&self) -> wasmtime::Result<&BlockGuest> {
        match self {
            Guest::Block(guest) => Ok(guest),
            Guest::Function(_) => Err(wasmtime::Error::msg("this driver gives no block service")),
        }
    }

    fn function(&self) -> wasmtime::Result<&FunctionDriver> {
        match self {
            Guest::Function(guest) => Ok(guest),
            Guest::Block(_) => Err(wasmtime::Error::msg("this driver programs no function")),
        }
    }
}

/// A block driver's exports.
struct BlockGuest {
    exports: VirtioBlockDriver,
    /// The data path's two, for which the generated functions would allocate.
    submit: Words<u64>,
    complete: Words<u32>,
    /// Where they find their words; `None` until the guest was asked.
    window: Option<Window>,
}

/// The two functions of the data path.
fn data_path(
    store: &mut Store<LaneState>,
    instance: &wasmtime::component::Instance,
) -> wasmtime::Result<(Words<u64>, Words<u32>)> {
    let mut find = |name: &str| {
        let (_, block) = instance
            .get_export(&mut *store, None, "cofferdam:driver/block@0.1.0")
            .ok_or_else(|| wasmtime::format_err!("no block interface"))?;
        let (_, func) =
            instance.get_export(&mut *store, Some(&block), name).ok_or_else(|| wasmtime::format_err!("no {name}"))?;
        instance.get_func(&mut *store, func).ok_or_else(|| wasmtime::format_err!("no function {name}"))
    };
    let (submit, complete) = (find("submit")?, find("complete")?);
    Ok((Words::new(&*store, submit)?, Words::new(&*store, complete)?))
}

impl BlockDriver for Instance {
    fn submit(&mut self, requests: &[u64], out: &mut Vec<u32>) -> Result<(), CallError> {
        let window = self.window()?;
        let count = requests.len() / REQUEST_WORDS;
        let words =
            self.call(Export::Submit, |store, guest| guest.block()?.submit.call(store, window, requests, count))?;
        let limit = count.min(MAX_BATCH_REQUESTS) * MAX_CHAIN_WORDS;
        self.replace(out, words, limit, "submit")
    }

    fn complete(&mut self, responses: &[u32], out: &mut Vec<u32>) -> Result<(), CallError> {
        let window = self.window()?;
        let count = responses.len();
        let words =
            self.call(Export::Complete, |store, guest| guest.block()?.complete.call(store, window, responses, count))?;
        self.replace(out, words, MAX_BATCH_REQUESTS * MAX_ANSWER_WORDS, "complete")
    }

    fn memory_bytes(&self) -> u64 {
        Instance::memory_bytes(self)
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
