//! What these tests have in common.

use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use cofferdam_device::transport::{QueueEvents, QueueSetup, Silence, Transport};
use cofferdam_device::{DmaRegion, TransportError};
use cofferdam_manager::{
    Binding, Certificate, Completion, Config, EventKind, GuestLimits, Handle, HandleSpec, IoOp, IoRequest, LoadSpec,
    Manager, Port, PortReport, UnloadError, UnloadOptions,
};
use cofferdam_sim::{Drive, Effect, Hooked, Hooks, Options, Rule, Sim, Storage};

/// Longest wait for anything that has to come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// What "at once" may take: no wait, on a busy machine.
pub(crate) const AT_ONCE: Duration = Duration::from_millis(500);
/// The deadline that is asked for where the answer must not take it.
pub(crate) const LONG: Duration = Duration::from_secs(5);

pub(crate) fn driver(name: &str) -> Vec<u8> {
    let path = format!("{}/../../target/drivers/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask build' first"))
}

pub(crate) fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

pub(crate) fn sim(rules: Vec<Rule>) -> Sim {
    Sim::new(Options { storage: Storage::Memory(16 << 20), rules, ..Options::default() }).unwrap()
}

/// A device that answers nothing until the test opens its gate.
pub(crate) fn gated() -> Sim {
    sim(vec![Rule::always(Effect::Gate)])
}

pub(crate) fn spec(sim: &Sim, name: &str, component: &str) -> LoadSpec {
    let transport = Box::new(sim.transport(Drive::Threads).unwrap());
    let mut spec = LoadSpec { name: Some(name.into()), ..LoadSpec::new(component, driver(component), transport) };
    if component == LOGS_IN_SUBMIT {
        // Ten thousand lines on a busy machine are no fault that these tests want.
        spec.limits = GuestLimits { call_deadline_ms: 5000, ..GuestLimits::default() };
    }
    spec
}

/// The ordinary driver.
pub(crate) const BLK: &str = "virtio-blk.wasm";
/// Serves, and writes ten thousand lines inside each `submit`.
pub(crate) const LOGS_IN_SUBMIT: &str = "test/flood-log-submit.wasm";
/// Serves, and writes a line inside `attach`.
pub(crate) const LOGS_IN_ATTACH: &str = "test/rude-log-line.wasm";
/// Serves, and traps in `complete`, which it asks for at every answer.
pub(crate) const TRAPS_IN_COMPLETE: &str = "test/trap-complete.wasm";
/// Serves, and never returns from `complete`.
pub(crate) const LOOPS_IN_COMPLETE: &str = "test/loop-complete.wasm";
/// Serves, and never returns from `submit`.
pub(crate) const LOOPS_IN_SUBMIT: &str = "test/loop-submit.wasm";

pub(crate) fn deadline(deadline: Duration) -> UnloadOptions {
    UnloadOptions { deadline, ..UnloadOptions::default() }
}

/// Starts a write of 4,096 bytes.
pub(crate) fn start(handle: &Handle, offset: u64) {
    let buffer = handle.lease(4096).unwrap();
    let request = IoRequest {
        user: offset,
        op: IoOp::Write,
        offset,
        length: 4096,
        flags: Default::default(),
        buffer: Some(buffer),
    };
    handle.submit(&mut vec![request]).unwrap();
}

/// `count` answers.
pub(crate) fn answers(handle: &Handle, count: usize) -> Vec<Completion> {
    let mut out = Vec::new();
    let begun = Instant::now();
    while out.len() < count && begun.elapsed() < PATIENCE {
        handle.poll(true, &mut out);
        std::thread::yield_now();
    }
    assert_eq!(out.len(), count, "answers that came");
    out
}

pub(crate) fn open(binding: &Arc<Binding>) -> Handle {
    binding.open(HandleSpec::default()).unwrap()
}

pub(crate) fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain for: {what}");
        std::thread::yield_now();
    }
}

/// Runs `body` on a thread of its own and waits for it, so that a deadlock is a failure and not a hang.
pub(crate) fn bounded<T: Send + 'static>(what: &str, limit: Duration, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (answer, answered) = channel();
    let thread = std::thread::spawn(move || {
        let _ = answer.send(body());
    });
    match answered.recv_timeout(limit) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("{what}: not within {limit:?}"),
        Err(RecvTimeoutError::Disconnected) => {
            let panicked = thread.join().expect_err("it sent nothing");
            std::panic::resume_unwind(panicked)
        }
    }
}

/// Waits until the binding has left, and checks that it left nothing.
pub(crate) fn left_clean(binding: &Binding) -> Certificate {
    until("the binding has left", || phase(binding) == "detached");
    let certificate = binding.certificate().expect("it has left").clone();
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    assert_eq!(certificate.leaked.bytes, 0, "{certificate:?}");
    certificate
}

/// `loading`, `serving`, `draining` or `detached`.
pub(crate) fn phase(binding: &Binding) -> String {
    binding.status().state
}

/// How often the binding came to its end, by the record of what happened.
pub(crate) fn ends(manager: &Manager, name: &str) -> usize {
    let mut events = manager.events(None);
    std::iter::from_fn(|| events.next(Duration::ZERO))
        .filter(|record| record.binding == name)
        .filter(|record| matches!(&record.what, EventKind::State { to, .. } if to == "detached"))
        .count()
}

/// What an unload that was asked for from within came to, and how long that took.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) result: Result<Certificate, UnloadError>,
    pub(crate) took: Duration,
}

impl Asked {
    /// Asks with a deadline that the answer must not take.
    pub(crate) fn unload(manager: &Manager, name: &str) -> Asked {
        let begun = Instant::now();
        let result = manager.unload(name, &deadline(LONG));
        Asked { result, took: begun.elapsed() }
    }

    pub(crate) fn assert_deferred(&self) {
        assert!(matches!(self.result, Err(UnloadError::Deferred)), "{self:?}");
        assert!(self.took < AT_ONCE, "{self:?}");
    }
}

/// A callback that is called once.
pub(crate) type Hook = Box<dyn FnOnce() + Send>;

/// A port whose shutdown is the test's.
pub(crate) struct HookedPort {
    pub(crate) address: String,
    pub(crate) shutdown: Hook,
}

impl Port for HookedPort {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn shutdown(self: Box<Self>, _grace: Duration) -> PortReport {
        (self.shutdown)();
        PortReport::default()
    }
}

pub(crate) fn attach(binding: &Binding, shutdown: impl FnOnce() + Send + 'static) {
    let port = HookedPort { address: format!("test:{}", binding.name()), shutdown: Box::new(shutdown) };
    assert!(binding.attach_port(Box::new(port)).is_ok());
}

/// Calls of a transport that can have a callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Call {
    /// On the loading thread, inside the driver's `attach`.
    Negotiate,
    /// On the loading thread.
    Map,
    SetupQueue,
    Start,
    /// On the watching thread.
    IsLost,
    /// On the ladder's thread.
    Quiesce,
    Release,
}

struct Callbacks(HashMap<Call, Hook>);

impl Callbacks {
    fn at(&mut self, call: Call) {
        if let Some(hook) = self.0.remove(&call) {
            hook();
        }
    }
}

/// Puts a callback into the device's transport.
pub(crate) fn hooked(mut spec: LoadSpec, call: Call, hook: impl FnOnce() + Send + 'static) -> LoadSpec {
    let hook: Hook = Box::new(hook);
    spec.transport = Box::new(Hooked::new(spec.transport, Callbacks(HashMap::from([(call, hook)]))));
    spec
}

impl Hooks for Callbacks {
    fn negotiate(&mut self, device: &mut dyn Transport, features: u64) -> Result<(), TransportError> {
        self.at(Call::Negotiate);
        device.negotiate(features)
    }
    fn map(&mut self, device: &mut dyn Transport, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.at(Call::Map);
        device.map(region)
    }
    fn setup_queue(
        &mut self,
        device: &mut dyn Transport,
        setup: QueueSetup,
        call: OwnedFd,
    ) -> Result<QueueEvents, TransportError> {
        self.at(Call::SetupQueue);
        device.setup_queue_with(setup, call)
    }
    fn start(&mut self, device: &mut dyn Transport) -> Result<(), TransportError> {
        self.at(Call::Start);
        device.start()
    }
    fn is_lost(&mut self, device: &mut dyn Transport) -> bool {
        self.at(Call::IsLost);
        device.is_lost()
    }
    fn quiesce(&mut self, device: &mut dyn Transport, unanswered: usize, deadline: Instant) -> Silence {
        self.at(Call::Quiesce);
        device.quiesce(unanswered, deadline)
    }
    fn release(&mut self, device: &mut dyn Transport) {
        self.at(Call::Release);
        device.release();
    }
}

/// Callbacks for the next log line of a binding's driver, by the binding's name.
static LINES: Mutex<Option<HashMap<String, Hook>>> = Mutex::new(None);

thread_local! {
    /// A callback for the next event of the host's own on this thread.
    static HERE: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Calls `hook` on the thread of the binding's driver, inside its next log line. Names are not used twice.
pub(crate) fn at_line(binding: &str, hook: impl FnOnce() + Send + 'static) {
    listen();
    let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines.get_or_insert_default().insert(binding.to_owned(), Box::new(hook));
}

/// Calls `hook` at the next event of the host on this thread.
pub(crate) fn at_event_here(hook: impl FnOnce() + Send + 'static) {
    listen();
    HERE.set(Some(Box::new(hook)));
}

/// Makes this process listen to its own log.
fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Listener).expect("nobody else listens"));
}

struct Listener;

/// The field that a driver's line says its binding in.
#[derive(Default)]
struct BindingField(Option<String>);

impl tracing::field::Visit for BindingField {
    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        if field.name() == "binding" {
            self.0 = Some(value.to_owned());
        }
    }
    fn record_debug(&mut self, _field: &tracing::field::Field, _value: &dyn std::fmt::Debug) {}
}

impl tracing::Subscriber for Listener {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target().starts_with("cofferdam")
    }
    fn new_span(&self, _span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _span: &tracing::span::Id, _values: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _span: &tracing::span::Id, _follows: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let hook = if event.metadata().target() == "cofferdam::driver" {
            let mut binding = BindingField::default();
            event.record(&mut binding);
            let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
            binding.0.and_then(|binding| lines.as_mut()?.remove(&binding))
        } else {
            HERE.take()
        };
        // Outside of every lock of ours: it may come back here.
        if let Some(hook) = hook {
            hook();
        }
    }
    fn enter(&self, _span: &tracing::span::Id) {}
    fn exit(&self, _span: &tracing::span::Id) {}
}
