//! Loads that fail half-way: they leave by the same steps, and nothing behind.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use cofferdam_device::transport::{QueueEvents, QueueSetup, Transport};
use cofferdam_device::{DmaRegion, TransportError};
use cofferdam_manager::{Grants, GuestLimits, LoadSpec, Manager, UnloadOptions};
use cofferdam_process_tests::backend::Backend;
use cofferdam_sim::{Hooked, Hooks};

use crate::cell::Round;
use crate::plan::POLITE;
use crate::sleeper;
use crate::stage::{NAME, connect, driver};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailingLoad {
    /// This guest of `behaviours.txt` fails at the step that its name ends with.
    Guest(&'static str),
    /// The device refuses this step.
    Refused(&'static str),
    /// The backend is killed at this step.
    Killed(&'static str),
    /// The driver is not granted what it asks for.
    NotGranted,
    /// The backend is stopped before the first step.
    Frozen,
    /// The device says this of itself.
    Lies(&'static str),
    /// The guest loops in `attach`, beyond all deadlines, until the binding is unloaded by force.
    UnloadedWhileItLoops,
    /// The guest sleeps in `attach`, beyond all deadlines, until the binding is unloaded by force.
    UnloadedWhileItSleeps,
}

/// The steps of a load that a transport takes part in.
const STEPS: [&str; 7] = ["negotiate", "read-config", "map-1", "map-2", "setup-queue-1", "setup-queue-2", "start"];

const GUESTS: [&str; 9] = [
    "trap-attach",
    "loop-attach",
    "eat-attach",
    "not-mine",
    "queue-out-of-range",
    "trap-properties",
    "odd-capacity",
    "trap-start",
    "refuse-start",
];

const LIES: [&str; 3] = ["block-size-odd", "queues-zero", "short"];

/// A guest's call, where it is the guest's end that the cell is about.
const CALL: Duration = Duration::from_millis(100);
/// A message of the control protocol to a backend that does not answer (`cofferdam_bus_vhost_user::ANSWER_LIMIT`).
const ANSWER: Duration = cofferdam_bus_vhost_user::ANSWER_LIMIT;
/// The ladder after it, and the machine; see `plan`.
const REST: Duration = Duration::from_millis(2600);

impl FailingLoad {
    /// All of them.
    #[must_use]
    pub fn all() -> Vec<FailingLoad> {
        use FailingLoad::{Frozen, Guest, Killed, Lies, NotGranted, Refused};
        let mut all: Vec<_> = GUESTS.into_iter().map(Guest).collect();
        all.extend(STEPS.into_iter().map(Refused));
        all.extend(STEPS.into_iter().map(Killed));
        all.extend(LIES.into_iter().map(Lies));
        all.extend([NotGranted, Frozen]);
        all.extend([FailingLoad::UnloadedWhileItLoops, FailingLoad::UnloadedWhileItSleeps]);
        all
    }

    /// As `entry x situation`. No client is there before a load has succeeded, so the situations that are clients' have no row.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            FailingLoad::Guest(name) => format!("load-fails ({name}) x idle"),
            FailingLoad::Refused(step) => format!("load-fails (device refuses {step}) x idle"),
            FailingLoad::Killed(step) => format!("load-fails (backend killed at {step}) x idle"),
            FailingLoad::NotGranted => "load-fails (import not granted) x idle".into(),
            FailingLoad::Frozen => "load-fails (no answer) x backend-hangs".into(),
            FailingLoad::Lies(lie) => format!("load-fails ({lie}) x device-lies"),
            FailingLoad::UnloadedWhileItLoops => "load-fails (unload --force) x driver-loops".into(),
            FailingLoad::UnloadedWhileItSleeps => "load-fails (unload --force) x driver-sleeps".into(),
        }
    }

    fn bound(self) -> Duration {
        match self {
            FailingLoad::Frozen => ANSWER + REST,
            FailingLoad::Guest(_) => CALL + REST,
            _ => REST,
        }
    }
}

/// One round: the load fails, in time, and the name and the device are free again.
pub(crate) fn fails(manager: &Manager, load: FailingLoad) -> anyhow::Result<Round> {
    let lie = match load {
        FailingLoad::Lies(lie) => Some(format!("config:{lie}")),
        _ => None,
    };
    let mut arguments = vec!["--memory", "16M", "--queues", "2"];
    arguments.extend(lie.as_deref().map_or([].as_slice(), |_| &["--fault"]));
    arguments.extend(lie.as_deref());
    let device = Arc::new(Backend::sim(&arguments));
    let inner: Box<dyn Transport> = Box::new(connect(&device)?);
    let transport: Box<dyn Transport> = match load {
        FailingLoad::Refused(step) => Box::new(Hooked::new(inner, Failing { step, steps: Vec::new(), kill: None })),
        FailingLoad::Killed(step) => {
            Box::new(Hooked::new(inner, Failing { step, steps: Vec::new(), kill: Some(Arc::clone(&device)) }))
        }
        _ => inner,
    };
    let component = match load {
        FailingLoad::Guest(name) => driver(&format!("test/{name}.wasm"))?,
        FailingLoad::UnloadedWhileItLoops => driver("test/loop-attach.wasm")?,
        FailingLoad::UnloadedWhileItSleeps => sleeper::component(true),
        FailingLoad::NotGranted => sleeper::component(false),
        _ => driver("virtio-blk.wasm")?,
    };
    let held = matches!(load, FailingLoad::UnloadedWhileItLoops | FailingLoad::UnloadedWhileItSleeps);
    // Only the guest that loops is to meet the deadline.
    let call = if load == FailingLoad::Guest("loop-attach") { CALL } else { Duration::from_secs(60) };
    let spec = LoadSpec {
        name: Some(NAME.into()),
        queues: Some(2),
        grants: if held { Grants::parse(sleeper::GRANT)? } else { Grants::default() },
        limits: GuestLimits { call_deadline_ms: call.as_millis() as u64, ..GuestLimits::default() },
        restarts: None,
        ..LoadSpec::new("guest.wasm", component, transport)
    };
    if load == FailingLoad::Frozen {
        device.freeze();
    }
    let begin = Instant::now();
    let error = if held { unloaded_while_held(manager, spec)? } else { refused(manager.load(spec).map(drop))? };
    let took = begin.elapsed();
    ensure!(manager.get(NAME).is_none(), "the name is still taken");
    if load == FailingLoad::Frozen {
        device.thaw();
    }
    if !matches!(load, FailingLoad::Killed(_) | FailingLoad::Lies(_)) {
        serves(manager, &device).with_context(|| format!("after '{error}' the device does not serve a good driver"))?;
    }
    Ok(Round { took, bound: load.bound(), outcome: "load refused".into(), leaked_bytes: 0, requests: [0; 3] })
}

fn refused<T, E: std::fmt::Display>(loaded: Result<T, E>) -> anyhow::Result<String> {
    match loaded {
        Ok(_) => bail!("the load has succeeded"),
        Err(error) => {
            let error = error.to_string();
            ensure!(!error.is_empty(), "an error without a word");
            Ok(error)
        }
    }
}

/// Loads on a thread, and unloads by force once the guest is in its call.
fn unloaded_while_held(manager: &Manager, spec: LoadSpec) -> anyhow::Result<String> {
    let other = manager.clone();
    let loading = std::thread::Builder::new().name("loading".into()).spawn(move || other.load(spec).map(drop))?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while manager.get(NAME).is_none_or(|binding| binding.status().calls_running == 0) {
        ensure!(Instant::now() < deadline && !loading.is_finished(), "the guest does not stay in its call");
        std::thread::park_timeout(Duration::from_micros(500));
    }
    let forced = UnloadOptions { deadline: 4 * POLITE, force: true, ..UnloadOptions::default() };
    let unloaded = manager.unload(NAME, &forced);
    let deadline = Instant::now() + Duration::from_secs(2);
    while !loading.is_finished() {
        ensure!(Instant::now() < deadline, "the load goes on after an unload by force, which said {unloaded:?}");
        std::thread::park_timeout(Duration::from_micros(500));
    }
    let certificate = unloaded.context("the unload by force")?;
    ensure!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    refused(loading.join().map_err(|_| anyhow::anyhow!("the load panicked"))?)
}

/// The same device, by a good driver.
fn serves(manager: &Manager, device: &Backend) -> anyhow::Result<()> {
    let component = driver("virtio-blk.wasm")?;
    let spec =
        LoadSpec { name: Some(NAME.into()), ..LoadSpec::new("virtio-blk.wasm", component, Box::new(connect(device)?)) };
    manager.load(spec)?;
    let certificate = manager.unload(NAME, &UnloadOptions::default())?;
    ensure!(certificate.residual.is_zero() && certificate.leaked.bytes == 0, "{certificate:?}");
    Ok(())
}

/// A transport that fails at one step.
struct Failing {
    step: &'static str,
    /// The steps that were taken and may be taken more than once.
    steps: Vec<&'static str>,
    kill: Option<Arc<Backend>>,
}

impl Failing {
    /// Fails here if this is the step, or has the backend killed first and lets the device fail by itself.
    fn at(&mut self, step: &'static str) -> Result<(), TransportError> {
        self.steps.push(step);
        let number = self.steps.iter().filter(|taken| **taken == step).count();
        if self.step != step && self.step != format!("{step}-{number}") {
            return Ok(());
        }
        match &self.kill {
            Some(device) => {
                device.kill();
                Ok(())
            }
            None => Err(TransportError::Refused("this step".into())),
        }
    }
}

impl Hooks for Failing {
    fn negotiate(&mut self, device: &mut dyn Transport, features: u64) -> Result<(), TransportError> {
        self.at("negotiate")?;
        device.negotiate(features)
    }
    fn read_config(&mut self, device: &mut dyn Transport, offset: u32, into: &mut [u8]) -> Result<(), TransportError> {
        self.at("read-config")?;
        device.read_config(offset, into)
    }
    fn map(&mut self, device: &mut dyn Transport, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        self.at("map")?;
        device.map(region)
    }
    fn setup_queue(
        &mut self,
        device: &mut dyn Transport,
        setup: QueueSetup,
        call: OwnedFd,
    ) -> Result<QueueEvents, TransportError> {
        self.at("setup-queue")?;
        device.setup_queue_with(setup, call)
    }
    fn start(&mut self, device: &mut dyn Transport) -> Result<(), TransportError> {
        self.at("start")?;
        device.start()
    }
}
