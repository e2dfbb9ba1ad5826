//! The host as a library: what the command line and the examples drive.

use std::os::fd::AsFd;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cofferdam_runtime::{Runtime, RuntimeConfig};
use parking_lot::Mutex;

use crate::binding::{Binding, RevokeReport};
use crate::certificate::{Certificate, Outcome};
use crate::departed::Departed;
use crate::device::SharedTransport;
use crate::error::{LoadError, ManagerError, RevokeError, UnloadError, UpgradeError};
use crate::events::{EventLog, EventReader};
use crate::explain::Explanation;
use crate::ladder::{self, Cause, UnloadOptions};
use crate::load::{self, LoadSpec};
use crate::ports::Within;
use crate::registry::Registry;
use crate::status::BindingStatus;
use crate::upgrade::{UpgradeReport, UpgradeSpec};
use crate::watch::{self, Watch};

/// How a manager is set up.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Where compiled components are kept between runs; `None`: nowhere.
    pub cache_dir: Option<PathBuf>,
}

pub(crate) struct Shared {
    pub(crate) runtime: Runtime,
    pub(crate) registry: Registry,
    watch: Arc<Watch>,
    watchers: Mutex<Vec<JoinHandle<()>>>,
    stopping: AtomicBool,
    departed: Departed,
    events: Arc<EventLog>,
}

/// How long the bindings of a manager that nobody holds any more may take to leave.
const LAST_USER: Duration = Duration::from_secs(5);

/// Whether a wait for a teardown on this thread could be a wait for itself (G8): it is inside a crossing, or does a part of a teardown.
fn must_defer() -> bool {
    cofferdam_gate::in_crossing() || Within::is_any()
}

/// Loads drivers, keeps bindings, unloads them. Cheap to clone; every clone is the same manager.
///
/// When the last clone is dropped, what is still bound leaves by the ladder with a bound of five seconds.
#[derive(Clone)]
pub struct Manager {
    /// Counts the clones in users' hands; bindings and threads hold `shared` alone. Before `shared`, so that the last clone's end still finds it.
    _users: Arc<LastUser>,
    shared: Arc<Shared>,
}

struct LastUser(Weak<Shared>);

impl Drop for LastUser {
    fn drop(&mut self) {
        let Some(shared) = self.0.upgrade() else { return };
        if !must_defer() {
            shared.shutdown(LAST_USER);
            return;
        }
        // Dropped by a driver's call or by a teardown: to wait here would be to wait for ourselves.
        shut_down_elsewhere(shared, LAST_USER);
    }
}

fn shut_down_elsewhere(shared: Arc<Shared>, bound: Duration) {
    let ladder = std::thread::Builder::new().name("cofferdam-ladder".into());
    if let Err(error) = ladder.spawn(move || shared.shutdown(bound)) {
        tracing::error!(%error, "no thread to take the bindings down on");
    }
}

impl Manager {
    /// Makes a manager: one compiler, one watching and one reaping thread.
    ///
    /// # Errors
    /// [`ManagerError`] when the host has no memory, thread or descriptor for it.
    pub fn new(config: Config) -> Result<Manager, ManagerError> {
        let (mechanism, reason) = (cofferdam_gate::mechanism(), cofferdam_gate::mechanism_reason());
        tracing::info!(mechanism = mechanism.as_str(), reason, "calls are counted");
        let runtime = Runtime::new(RuntimeConfig { cache_dir: config.cache_dir, ..RuntimeConfig::default() })?;
        let watch = Arc::new(Watch::new()?);
        let shared = Arc::new(Shared {
            runtime,
            registry: Registry::new(),
            watch: Arc::clone(&watch),
            watchers: Mutex::new(Vec::new()),
            stopping: AtomicBool::new(false),
            departed: Departed::default(),
            events: EventLog::new(),
        });
        *shared.watchers.lock() = watch::spawn(&watch, &Arc::downgrade(&shared))?;
        let users = Arc::new(LastUser(Arc::downgrade(&shared)));
        Ok(Manager { shared, _users: users })
    }

    /// The compiler, for `inspect`.
    pub fn runtime(&self) -> &Runtime {
        &self.shared.runtime
    }

    /// Joins a driver and a device. Returns when clients can open handles.
    ///
    /// # Errors
    /// [`LoadError`]; whatever had been taken was given back.
    pub fn load(&self, spec: LoadSpec) -> Result<Arc<Binding>, LoadError> {
        let shared = &self.shared;
        let device = spec.transport.address().to_owned();
        let binding = loop {
            let name = match &spec.name {
                Some(name) => check_name(name)?.to_owned(),
                None => self.free_name(&spec.driver),
            };
            let binding = Arc::new(Binding::new(
                name,
                spec.driver.clone(),
                device.clone(),
                spec.pinned,
                spec.handle_limit,
                Arc::clone(&shared.events),
            ));
            match binding.announce(|| shared.registry.insert(Arc::clone(&binding))) {
                Ok(()) => {
                    // The name is another one's from here on.
                    shared.departed.take_name(binding.name());
                    break binding;
                }
                Err(taken) if spec.name.is_some() => return Err(LoadError::NameTaken(taken.name().to_owned())),
                // Somebody took the made-up name first: make up another.
                Err(_) => {}
            }
        };
        let result = if shared.stopping.load(Ordering::SeqCst) {
            drop(spec);
            Err(LoadError::ShuttingDown)
        } else {
            // A panic of the host in here must not leave a binding behind that loads for ever.
            let build = AssertUnwindSafe(|| load::build(&binding, &shared.runtime, shared, spec));
            std::panic::catch_unwind(build).unwrap_or_else(|_| Err(LoadError::Host("the load panicked".into())))
        };
        match result {
            // A shutdown that took its picture of the bindings before this one was in it leaves it to us. Partner: `shutdown` sets the flag, then takes the picture;
            // this was registered before the flag is looked at again.
            Ok(()) if shared.stopping.load(Ordering::SeqCst) => {
                let options = UnloadOptions { cause: Cause::Shutdown, force: true, ..UnloadOptions::default() };
                let _ = shared.leave(&binding, &options);
                Err(LoadError::ShuttingDown)
            }
            Ok(()) => {
                tracing::info!(
                    binding = binding.name(),
                    driver = %binding.driver(),
                    device = binding.device(),
                    lanes = binding.lanes(),
                    "serving"
                );
                Ok(binding)
            }
            Err(error) => {
                let options = UnloadOptions { cause: Cause::LoadFailed, force: true, ..UnloadOptions::default() };
                if let Err(stuck) = shared.leave(&binding, &options) {
                    tracing::error!(binding = binding.name(), error = %stuck, "a failed load could not be rolled back");
                }
                Err(error)
            }
        }
    }

    /// Takes a binding down the ladder (DESIGN section 7). Of a binding that has left by itself (its device went away, its driver failed) it is the first to ask
    /// who gets the certificate.
    ///
    /// # Errors
    /// [`UnloadError`]; after `StillDraining` the binding admits nothing any more, and another unload goes on from there.
    pub fn unload(&self, name: &str, options: &UnloadOptions) -> Result<Certificate, UnloadError> {
        let Some(binding) = self.get(name) else {
            return self.shared.departed.tell(name).ok_or_else(|| UnloadError::NoSuchBinding(name.to_owned()));
        };
        self.unload_binding(&binding, options)
    }

    /// The same for a binding that is at hand.
    ///
    /// # Errors
    /// As for [`Manager::unload`].
    pub fn unload_binding(&self, binding: &Arc<Binding>, options: &UnloadOptions) -> Result<Certificate, UnloadError> {
        if binding.pinned && options.cause == Cause::Unload {
            return Err(UnloadError::Pinned(binding.name().to_owned()));
        }
        if must_defer() {
            let (shared, binding, options) = (Arc::clone(&self.shared), Arc::clone(binding), options.clone());
            let deferred = std::thread::Builder::new().name("cofferdam-ladder".into());
            return match deferred.spawn(move || shared.leave(&binding, &options)) {
                Ok(_) => Err(UnloadError::Deferred),
                Err(error) => Err(UnloadError::NoThread(error.to_string())),
            };
        }
        self.shared.leave(binding, options)
    }

    /// Puts another component in the place of a binding's driver, under its clients. Nobody notices but by a pause; whatever goes wrong, the driver that was there serves on, or is back.
    ///
    /// # Errors
    /// [`UpgradeError`].
    pub fn upgrade(&self, name: &str, spec: UpgradeSpec) -> Result<UpgradeReport, UpgradeError> {
        let binding = self.get(name).ok_or_else(|| UpgradeError::NoSuchBinding(name.to_owned()))?;
        binding.upgrade(&self.shared.runtime, spec)
    }

    /// Revokes one handle: see [`Binding::revoke_handle`].
    ///
    /// # Errors
    /// [`RevokeError`].
    pub fn revoke(&self, name: &str, handle: u64, deadline: Duration) -> Result<RevokeReport, RevokeError> {
        let binding = self.get(name).ok_or_else(|| RevokeError::NoSuchBinding(name.to_owned()))?;
        // From inside a call, what that call carries cannot be answered before it ends.
        binding.revoke_handle(handle, if must_defer() { Duration::ZERO } else { deadline })
    }

    /// What happened, from record `from` on, or from the oldest that is kept.
    pub fn events(&self, from: Option<u64>) -> EventReader {
        EventReader::new(&self.shared.events, from)
    }

    /// Why a binding is where it is, and what it waits for; of one that has left, how it ended (the last 64 are remembered).
    pub fn why(&self, name: &str) -> Option<Explanation> {
        match self.get(name) {
            Some(binding) => Some(binding.explain()),
            None => self.shared.departed.why(name),
        }
    }

    /// What `ls` shows: every binding, and below them those that are gone and whose memory was retired on purpose.
    pub fn statuses(&self) -> Vec<BindingStatus> {
        let mut all: Vec<_> = self.bindings().iter().map(|binding| binding.status()).collect();
        all.extend(self.shared.departed.retired());
        all
    }

    /// The binding of this name.
    pub fn get(&self, name: &str) -> Option<Arc<Binding>> {
        self.shared.registry.get(name)
    }

    /// All bindings, by name.
    pub fn bindings(&self) -> Vec<Arc<Binding>> {
        self.shared.registry.snapshot().values().cloned().collect()
    }

    /// Takes every binding down, all at once, within `bound`: first politely, then by force. Later loads are refused.
    ///
    /// From inside a call into a driver, or from inside a teardown, it goes on in the background, and the answer is empty (G8).
    pub fn shutdown(&self, bound: Duration) -> Vec<Certificate> {
        if !must_defer() {
            return self.shared.shutdown(bound);
        }
        shut_down_elsewhere(Arc::clone(&self.shared), bound);
        Vec::new()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn free_name(&self, driver: &str) -> String {
        let stem = driver.rsplit('/').next().unwrap_or(driver);
        let stem = stem.strip_suffix(".wasm").unwrap_or(stem);
        let stem: String = stem.chars().filter(|c| is_name_char(*c)).take(48).collect();
        let stem = stem.trim_start_matches(['-', '.']);
        let stem = if stem.is_empty() { "driver" } else { stem };
        let taken = self.shared.registry.snapshot();
        (0..).map(|number| format!("{stem}{number}")).find(|name| !taken.contains_key(name)).unwrap_or_default()
    }
}

impl Shared {
    /// The log that bindings write into.
    pub(crate) fn events(&self) -> Arc<EventLog> {
        Arc::clone(&self.events)
    }

    pub(crate) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// A binding that was made of another process's is one of this manager's.
    pub(crate) fn enter(&self, binding: &Arc<Binding>) -> Result<(), LoadError> {
        let entered = self.registry.insert(Arc::clone(binding));
        entered.map_err(|taken| LoadError::NameTaken(taken.name().to_owned()))
    }

    /// Has the watching thread look after its device.
    pub(crate) fn watch_device(&self, binding: &Arc<Binding>, transport: &SharedTransport) -> std::io::Result<()> {
        let fd = transport.lock().event_fd().map(|fd| fd.try_clone_to_owned()).transpose()?;
        let both = [fd, binding.control.event_fd()];
        both.iter().flatten().try_for_each(|fd| self.watch.add(binding, transport, fd.as_fd()))
    }

    /// What its device said while nobody was to look is found now.
    pub(crate) fn look_again(&self, binding: &Arc<Binding>) {
        self.watch.look_again(binding);
    }

    /// Another process has it.
    pub(crate) fn forget(&self, binding: &Arc<Binding>) {
        self.watch.remove(binding);
        self.registry.remove(binding);
    }

    /// Whether the manager takes everything down.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(crate) fn leave(&self, binding: &Arc<Binding>, options: &UnloadOptions) -> Result<Certificate, UnloadError> {
        let certificate = ladder::run(binding, options, &self.watch)?;
        // Remembered before it is gone, so that at no moment nobody knows of it.
        let by_itself = matches!(certificate.outcome, Outcome::Removed | Outcome::Failed);
        let told = matches!(options.cause, Cause::Unload | Cause::Shutdown);
        self.departed.add(binding, by_itself, told);
        self.registry.remove(binding);
        Ok(certificate)
    }

    fn shutdown(&self, bound: Duration) -> Vec<Certificate> {
        self.stopping.store(true, Ordering::SeqCst);
        let deadline = ladder::after(Instant::now(), bound);
        let bindings: Vec<_> = self.registry.snapshot().values().cloned().collect();
        let certificates = std::thread::scope(|scope| {
            let leaving: Vec<_> =
                bindings.iter().map(|binding| scope.spawn(move || self.leave_at_shutdown(binding, deadline))).collect();
            leaving.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
        });
        self.watch.stop();
        for watcher in std::mem::take(&mut *self.watchers.lock()) {
            if watcher.thread().id() != std::thread::current().id() {
                let _ = watcher.join();
            }
        }
        certificates
    }

    fn leave_at_shutdown(&self, binding: &Arc<Binding>, deadline: Instant) -> Option<Certificate> {
        // After the drain come interruption, silence and ports, each with a bound of its own: they need half of the time.
        let wait = deadline.saturating_duration_since(Instant::now()) * 3 / 10;
        let polite = UnloadOptions { deadline: wait, force: false, cancel: None, cause: Cause::Shutdown };
        if let Ok(certificate) = self.leave(binding, &polite) {
            return Some(certificate);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // The drain itself is cut short by the force; the rest is for whoever else is on the ladder, or still loads.
        let forced = UnloadOptions { deadline: left, force: true, cancel: None, cause: Cause::Shutdown };
        self.leave(binding, &forced).ok()
    }
}

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

pub(crate) fn check_name(name: &str) -> Result<&str, LoadError> {
    let good = (1..=64).contains(&name.len()) && name.chars().all(is_name_char) && !name.starts_with(['-', '.']);
    if good { Ok(name) } else { Err(LoadError::BadName(name.to_owned())) }
}
