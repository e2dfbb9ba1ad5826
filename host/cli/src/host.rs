//! From files and addresses to bindings: the one place that knows which buses and ports there are.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cofferdam_bus_pci::Via;
use cofferdam_bus_vhost_user::{ConnectError, VhostUser};
use cofferdam_manager::{
    Binding, BindingStatus, Cause, Certificate, Config, Explanation, Grants, GuestLimits, HandleStatus, LoadSpec,
    Manager, Offer, Phase, Port, PortError, Reconnect, RestartPolicy, RevokeError, RevokeReport, Transport,
    UnloadError, UnloadOptions, UpgradeReport, UpgradeSpec,
};
use cofferdam_port_character::{CharacterAddress, CharacterError, CharacterPort};
use cofferdam_port_data::{DataAddress, DataError, DataOptions, DataPort};
use cofferdam_port_nbd::{NbdAddress, NbdError, NbdOptions, NbdPort};
use cofferdam_port_tap::{TapAddress, TapError, TapPort};

use crate::args::BindArgs;
use crate::client::millis;
use crate::control::{
    ErrorBody, ErrorCode, LONGEST_HOLD, LONGEST_PROBATION, LoadBody, PortChange, RollbackBody, UpgradeBody,
};
use crate::devices;
use crate::drivers::{self, Driver};

/// Largest component file that is read, in bytes.
const COMPONENT_LIMIT_BYTES: u64 = 256 << 20;
/// Ports that one binding may have: each costs a thread per lane and a socket.
const PORTS: usize = 16;
/// How long a load that fails after the binding serves (a port that cannot listen) waits for its way back.
const ROLLBACK: Duration = Duration::from_secs(5);

/// A manager that keeps compiled drivers in the user's cache directory.
pub(crate) fn manager() -> Result<Manager, ErrorBody> {
    Manager::new(Config { cache_dir: cache_dir() }).map_err(ErrorBody::failed)
}

fn cache_dir() -> Option<PathBuf> {
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("cofferdam"))
}

/// A path that means the same in the daemon.
pub(crate) fn absolute_path(path: &Path) -> Result<String, ErrorBody> {
    let absolute =
        std::path::absolute(path).map_err(|error| ErrorBody::usage(format!("{}: {error}", path.display())))?;
    absolute.into_os_string().into_string().map_err(|path| ErrorBody::usage(format!("{path:?} is not UTF-8")))
}

/// Where crashes are written down: the user's directory for state (XDG Base Directory Specification).
fn crash_dir() -> Option<PathBuf> {
    let base = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".local/state")))?;
    Some(base.join("cofferdam/crashes"))
}

/// A directory that the environment names.
fn absolute(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// What the command line asks for, with absolute paths, so that it means the same in the daemon.
pub(crate) fn load_body(args: &BindArgs, pinned: bool) -> Result<LoadBody, ErrorBody> {
    let absolute = |path: &PathBuf| absolute_path(path);
    let driver = args.driver.as_ref().map(absolute).transpose()?;
    // Where a driver is named, none is looked for.
    let drivers = args.drivers.as_ref().filter(|_| driver.is_none()).map(absolute).transpose()?;
    Ok(LoadBody {
        driver,
        drivers,
        device: args.device.clone(),
        ports: args.ports.clone(),
        name: args.name.clone(),
        queues: args.queues,
        allow: args.allow.clone(),
        pinned,
        via: if args.vfio { Some("vfio".to_owned()) } else { args.uio.then(|| "uio".to_owned()) },
        trust_dma: args.trust_dma,
        memory_mib: args.memory_mib,
        call_deadline_ms: args.call_deadline_ms,
        arena_mib: args.arena_mib,
        ring_entries: args.ring_entries,
        requests: args.requests,
        handles: args.handles,
        restarts: args.restarts.0.map(|(count, _)| count),
        restart_within_ms: args.restarts.0.map_or(0, |(_, within)| millis(within)),
        restart_wait_ms: millis(args.restart_wait),
        reconnect_ms: args.reconnect.map(millis),
        mapped_handles: args.mapped_handles,
        mapped_mib: args.mapped_mib,
    })
}

/// Reads a component, not more than it may have.
pub(crate) fn read_component(path: &Path) -> Result<Vec<u8>, ErrorBody> {
    use std::io::Read;
    let fail = |error: std::io::Error| {
        let code =
            if error.kind() == std::io::ErrorKind::NotFound { ErrorCode::NoSuchThing } else { ErrorCode::Failed };
        ErrorBody::new(code, format!("{}: {error}", path.display()))
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(fail)?;
    file.take(COMPONENT_LIMIT_BYTES + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > COMPONENT_LIMIT_BYTES {
        return Err(ErrorBody::failed(format!("{}: over {COMPONENT_LIMIT_BYTES} bytes, not a driver", path.display())));
    }
    Ok(bytes)
}

/// Finds and claims a device.
/// The device once more, after it was lost.
pub(crate) fn reopen(address: &str, via: Option<Via>) -> Result<Box<dyn Transport>, String> {
    connect(address, via).map_err(|error| error.message)
}

fn connect(address: &str, via: Option<Via>) -> Result<Box<dyn Transport>, ErrorBody> {
    match address.split_once(':') {
        Some(("pci", _)) => cofferdam_bus_pci::connect(address, via).map_err(devices::error),
        _ if via.is_some() => {
            Err(ErrorBody::usage(format!("'{address}' is no PCI function; only those go to uio or vfio")))
        }
        Some(("vhost-user", _)) => {
            let device = VhostUser::connect(address).map_err(|error| {
                let code = match &error {
                    ConnectError::Address { .. } => ErrorCode::Usage,
                    ConnectError::NotFound(_) => ErrorCode::NoSuchThing,
                    _ => ErrorCode::Failed,
                };
                ErrorBody::new(code, error.to_string())
            })?;
            Ok(Box::new(device))
        }
        _ => Err(ErrorBody::new(
            ErrorCode::Usage,
            format!("'{address}' is not a device address: vhost-user:/path.sock or pci:0000:00:04.0"),
        )),
    }
}

/// A port's address, checked before anything is claimed.
enum PortAddress {
    Nbd(NbdAddress),
    Data(DataAddress),
    Tap(TapAddress),
    Character(CharacterAddress),
}

impl PortAddress {
    fn parse(address: &str) -> Result<PortAddress, ErrorBody> {
        let usage = |message: String| ErrorBody::new(ErrorCode::Usage, message);
        match address.split_once(':') {
            Some(("nbd", _)) => {
                address.parse().map(PortAddress::Nbd).map_err(|error: NbdError| usage(error.to_string()))
            }
            Some(("data", _)) => {
                address.parse().map(PortAddress::Data).map_err(|error: DataError| usage(error.to_string()))
            }
            Some(("tap", _)) => {
                address.parse().map(PortAddress::Tap).map_err(|error: TapError| usage(error.to_string()))
            }
            _ if CharacterAddress::is_meant(address) => {
                address.parse().map(PortAddress::Character).map_err(|error: CharacterError| usage(error.to_string()))
            }
            _ => Err(usage(format!(
                "'{address}' is not a port: nbd:/path.sock, nbd:127.0.0.1:10809 or data:/path.sock for a disk, fifo:/path or entropy-pool for an entropy device, pty:/link or stdio for a console, tap:NAME for a network device"
            ))),
        }
    }

    /// What the binding has to give for it.
    fn service(&self) -> &'static str {
        match self {
            PortAddress::Nbd(_) | PortAddress::Data(_) => "block",
            PortAddress::Tap(_) => "net",
            PortAddress::Character(address) => address.service(),
        }
    }

    /// Whether it is the terminal of the process that asks.
    fn is_stdio(&self) -> bool {
        matches!(self, PortAddress::Character(CharacterAddress::Stdio { .. }))
    }

    /// The address in the one way that ports say theirs.
    fn canonical(&self) -> String {
        match self {
            PortAddress::Nbd(address) => address.to_string(),
            PortAddress::Data(address) => address.to_string(),
            PortAddress::Tap(address) => address.to_string(),
            PortAddress::Character(address) => address.to_string(),
        }
    }

    /// Makes a port of a binding that serves already; `over` is told when it ends by itself.
    fn open(&self, binding: &Arc<Binding>, over: &Over) -> Result<Box<dyn Port>, ErrorBody> {
        let (needed, offer) = (self.service(), binding.offer());
        match offer.as_deref().map(Offer::service) {
            Some(given) if given == needed => {}
            given => {
                let given = given.map_or_else(|| "no service".to_owned(), |given| format!("'{given}'"));
                return Err(ErrorBody::usage(format!(
                    "port '{}' needs a driver that gives '{needed}'; {} gives {given}",
                    self.canonical(),
                    binding.driver()
                )));
            }
        }
        match self {
            PortAddress::Character(address) => {
                let over = Arc::clone(over);
                let port = CharacterPort::start(binding, address, move || over());
                Ok(Box::new(port.map_err(|error| ErrorBody::caused(&error))?))
            }
            PortAddress::Nbd(address) => {
                let port = NbdPort::start(Arc::clone(binding), address, NbdOptions::default());
                Ok(Box::new(port.map_err(|error| ErrorBody::caused(&error))?))
            }
            PortAddress::Data(address) => {
                let port = DataPort::start(Arc::clone(binding), address, DataOptions::default());
                Ok(Box::new(port.map_err(|error| ErrorBody::caused(&error))?))
            }
            PortAddress::Tap(address) => {
                let port = TapPort::start(Arc::clone(binding), address);
                Ok(Box::new(port.map_err(|error| ErrorBody::caused(&error))?))
            }
        }
    }
}

/// The driver that is named, or the one that is for the device. The device is only looked at.
fn driver(body: &LoadBody) -> Result<Driver, ErrorBody> {
    match &body.driver {
        Some(path) => Ok(Driver { component: read_component(Path::new(path))?, path: PathBuf::from(path) }),
        None => {
            let folder = drivers::folder(body.drivers.as_deref())?;
            let wanted = drivers::identify(&body.device, &folder)?;
            let driver = drivers::find(&folder, &body.device, &wanted)?;
            tracing::info!(device = body.device, %wanted, driver = %driver.path.display(), "driver found");
            Ok(driver)
        }
    }
}

/// Told when a session on the terminal has ended.
pub(crate) type Over = Arc<dyn Fn() + Send + Sync>;

/// Whether one of these ports is the terminal of the process that asks.
pub(crate) fn has_stdio(ports: &[String]) -> bool {
    ports.iter().any(|port| PortAddress::parse(port).is_ok_and(|port| port.is_stdio()))
}

/// Everything of a load: component, device, binding, ports. Bounded; on error nothing is left. The terminal is a port only of a process that has one, which says so with `terminal`.
pub(crate) fn load(manager: &Manager, body: &LoadBody, terminal: Option<Over>) -> Result<Arc<Binding>, ErrorBody> {
    let ports = body.ports.iter().map(|port| PortAddress::parse(port)).collect::<Result<Vec<_>, _>>()?;
    match (ports.iter().filter(|port| port.is_stdio()).count(), &terminal) {
        (0, _) | (1, Some(_)) => {}
        (1, None) => return Err(only_run()),
        _ => return Err(ErrorBody::usage("there is one terminal, and so one port 'stdio'".to_owned())),
    }
    let over = terminal.unwrap_or_else(nobody);
    if ports.len() > PORTS {
        return Err(ErrorBody::usage(format!("a binding has at most {PORTS} ports")));
    }
    let usage = |error: &dyn std::fmt::Display| ErrorBody::new(ErrorCode::Usage, error.to_string());
    let mut grants = Grants::default();
    for allow in &body.allow {
        grants.allow(allow).map_err(|error| usage(&error))?;
    }
    let Driver { path, component } = driver(body)?;
    let via = match body.via.as_deref() {
        None => None,
        Some("uio") => Some(Via::Uio),
        Some("vfio") => Some(Via::Vfio),
        Some(other) => return Err(ErrorBody::usage(format!("'{other}' is neither uio nor vfio"))),
    };
    let transport = connect(&body.device, via)?;
    let label = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let mut spec = LoadSpec::new(label, component, transport);
    spec.name.clone_from(&body.name);
    spec.queues = Some(body.queues);
    spec.pinned = body.pinned;
    spec.trust_dma = body.trust_dma;
    spec.grants = grants;
    spec.limits = GuestLimits {
        memory_bytes: (body.memory_mib as usize) << 20,
        call_deadline_ms: u64::from(body.call_deadline_ms),
        ..GuestLimits::default()
    };
    spec.restarts = body.restarts.map(|limit| RestartPolicy {
        limit,
        within: Duration::from_millis(body.restart_within_ms),
        backoff: Duration::from_millis(body.restart_wait_ms),
        ..RestartPolicy::default()
    });
    spec.reconnect = body.reconnect_ms.map(|wait| {
        let device = body.device.clone();
        Reconnect { wait: Duration::from_millis(wait), open: Box::new(move || reopen(&device, via)) }
    });
    spec.crash_dir = crash_dir();
    spec.arena_bytes = u64::from(body.arena_mib) << 20;
    spec.ring_entries = body.ring_entries;
    spec.requests_per_lane = body.requests as usize;
    spec.handle_limit = body.handles as usize;
    spec.mapped_handles = body.mapped_handles as usize;
    spec.mapped_bytes = u64::from(body.mapped_mib) << 20;
    let binding = manager.load(spec).map_err(|error| ErrorBody::caused(&error))?;
    for port in &ports {
        if let Err(error) = open_port(&binding, port, &over) {
            let back = UnloadOptions { deadline: ROLLBACK, force: true, cancel: None, cause: Cause::LoadFailed };
            let _ = manager.unload_binding(&binding, &back);
            return Err(error);
        }
    }
    Ok(binding)
}

/// Opens a port and gives it to the binding; the answer is its real address.
fn open_port(binding: &Arc<Binding>, address: &PortAddress, over: &Over) -> Result<String, ErrorBody> {
    let port = address.open(binding, over)?;
    let real = port.address();
    // A port that comes back goes by its drop, at once: nobody can have been served.
    binding.attach_port(port).map_err(|_| leaving(binding.name()))?;
    Ok(real)
}

fn only_run() -> ErrorBody {
    ErrorBody::usage("'stdio' is the terminal of 'cofferdam run'; the daemon has none".to_owned())
}

fn nobody() -> Over {
    Arc::new(|| {})
}

fn leaving(name: &str) -> ErrorBody {
    ErrorBody::failed(format!("'{name}' is leaving and takes its ports down itself"))
}

/// The binding of this name, or the error that says there is none.
pub(crate) fn find(manager: &Manager, name: &str) -> Result<Arc<Binding>, ErrorBody> {
    let none = || ErrorBody::no_such_thing(format!("no binding is called '{name}' (see 'cofferdam ls')"));
    manager.get(name).ok_or_else(none)
}

/// Another version of a binding's driver, under its clients.
pub(crate) fn upgrade(manager: &Manager, name: &str, body: &UpgradeBody) -> Result<UpgradeReport, ErrorBody> {
    let path = Path::new(&body.driver);
    // Before the file: a name that is wrong is the likelier mistake.
    find(manager, name)?;
    let component = read_component(path)?;
    let driver = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
    let deadline = Duration::from_millis(body.deadline_ms).min(LONGEST_HOLD);
    let probation = Duration::from_millis(body.probation_ms).min(LONGEST_PROBATION);
    let spec = UpgradeSpec { driver, component, deadline, probation };
    manager.upgrade(name, spec).map_err(ErrorBody::failed)
}

/// The version before.
pub(crate) fn roll_back(manager: &Manager, name: &str, body: &RollbackBody) -> Result<UpgradeReport, ErrorBody> {
    let deadline = Duration::from_millis(body.deadline_ms).min(LONGEST_HOLD);
    find(manager, name)?.roll_back(deadline).map_err(ErrorBody::failed)
}

/// One more try for a binding that failed.
pub(crate) fn restart(manager: &Manager, name: &str) -> Result<BindingStatus, ErrorBody> {
    let binding = find(manager, name)?;
    binding.restart().map_err(ErrorBody::failed)?;
    Ok(binding.status())
}

/// One more port for a binding that serves.
pub(crate) fn attach_port(manager: &Manager, name: &str, port: &str) -> Result<PortChange, ErrorBody> {
    let address = PortAddress::parse(port)?;
    if address.is_stdio() {
        return Err(only_run());
    }
    let binding = find(manager, name)?;
    if !matches!(binding.phase(), Phase::Serving | Phase::Recovering) {
        return Err(leaving(name));
    }
    let ports = binding.ports();
    if ports.contains(&address.canonical()) {
        return Err(ErrorBody::failed(format!("'{name}' is served at '{port}' already")));
    }
    if ports.len() >= PORTS {
        return Err(ErrorBody::failed(format!("'{name}' has {PORTS} ports, more are not possible; detach one")));
    }
    let port = open_port(&binding, &address, &nobody())?;
    Ok(PortChange { binding: name.to_owned(), port, connections: None, severed: None, ports: binding.ports() })
}

/// One port less; the binding serves on.
pub(crate) fn detach_port(manager: &Manager, name: &str, port: &str) -> Result<PortChange, ErrorBody> {
    let port = PortAddress::parse(port)?.canonical();
    let binding = find(manager, name)?;
    let report = binding.detach_port(&port).map_err(|error| match error {
        PortError::NoSuchPort(_) => {
            let ports = binding.ports();
            let there =
                if ports.is_empty() { "it has none".to_owned() } else { format!("it has {}", ports.join(", ")) };
            ErrorBody::no_such_thing(format!("'{name}' has no port '{port}'; {there}"))
        }
        PortError::Leaving => leaving(name),
        PortError::LeftBehind(_) => ErrorBody::failed(error),
    })?;
    let (connections, severed) = (Some(report.connections), Some(report.severed));
    Ok(PortChange { binding: name.to_owned(), port, connections, severed, ports: binding.ports() })
}

/// Who holds a binding.
pub(crate) fn handles(manager: &Manager, name: &str) -> Result<Vec<HandleStatus>, ErrorBody> {
    Ok(find(manager, name)?.status().handles)
}

/// Why a binding is where it is; also of one that has left.
pub(crate) fn why(manager: &Manager, name: &str) -> Result<Explanation, ErrorBody> {
    let none =
        || ErrorBody::no_such_thing(format!("no binding is called '{name}', and none of the last that left was"));
    manager.why(name).ok_or_else(none)
}

/// Takes one handle away; blocks for at most `deadline`.
pub(crate) fn revoke(
    manager: &Manager,
    name: &str,
    handle: u64,
    deadline: Duration,
) -> Result<RevokeReport, ErrorBody> {
    manager.revoke(name, handle, deadline).map_err(|error| match error {
        RevokeError::NoSuchBinding(_) | RevokeError::NoSuchHandle { .. } => ErrorBody::no_such_thing(error),
        RevokeError::StillDraining(report) => {
            let RevokeReport { port, peer, requests_left, .. } = &report;
            let requests = if *requests_left == 1 { "1 request of it is" } else { &format!("{requests_left} requests of it are") };
            let message = format!(
                "handle {handle} of '{name}' ({port}, {peer}) is revoked, but {requests} still with the device (see 'cofferdam why {name}')"
            );
            ErrorBody { revoked: Some(Box::new(report)), ..ErrorBody::new(ErrorCode::StillDraining, message) }
        }
    })
}

/// An unload, with its errors as the control API says them.
pub(crate) fn unload(
    manager: &Manager,
    name: &str,
    options: &UnloadOptions,
    explain: bool,
) -> Result<Certificate, ErrorBody> {
    let explain = || if explain { why(manager, name).ok().map(Box::new) } else { None };
    manager.unload(name, options).map_err(|error| unload_error(name, error, explain))
}

/// An unload's error as the control API says it; `explain` is asked when the binding is still draining.
pub(crate) fn unload_error(
    name: &str,
    error: UnloadError,
    explain: impl FnOnce() -> Option<Box<Explanation>>,
) -> ErrorBody {
    let message = error.to_string();
    match error {
        UnloadError::NoSuchBinding(_) => ErrorBody::new(ErrorCode::NoSuchThing, message),
        UnloadError::StillDraining { waited, waiting_for, so_far } => {
            ErrorBody { so_far: Some(so_far), ..still_draining(name, waited, &waiting_for, explain()) }
        }
        UnloadError::Pinned(_) | UnloadError::Deferred | UnloadError::NoThread(_) => ErrorBody::failed(message),
    }
}

/// The wait for an unload is over, the unload is not.
pub(crate) fn still_draining(
    name: &str,
    waited: Duration,
    waiting_for: &str,
    explanation: Option<Box<Explanation>>,
) -> ErrorBody {
    // The explanation says what is waited for, in more words.
    let what = if explanation.is_some() { String::new() } else { format!(": {waiting_for}") };
    let message =
        format!("'{name}' is still draining after {waited:.1?}{what}; unload again to go on, or with --force");
    ErrorBody { explanation, ..ErrorBody::new(ErrorCode::StillDraining, message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binding_that_is_still_draining_ends_a_command_with_4() {
        let late = || still_draining("disk", Duration::from_secs(5), "1 request on the ring", None);
        assert_eq!(late().code.exit_code(), 4);
        assert!(late().message.contains("after 5.0s: 1 request on the ring"), "{}", late().message);
        let pinned = unload_error("disk", UnloadError::Pinned("disk".into()), || None);
        assert_eq!(pinned.code.exit_code(), 1);
    }
}
