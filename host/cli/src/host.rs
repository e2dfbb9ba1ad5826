//! From files and addresses to bindings: the one place that knows which buses and ports there are.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cofferdam_bus_vhost_user::{ConnectError, VhostUser};
use cofferdam_manager::{
    Binding, Cause, Certificate, Config, Grants, GuestLimits, LoadSpec, Manager, Port, Transport, UnloadError,
    UnloadOptions,
};
use cofferdam_port_nbd::{NbdAddress, NbdError, NbdOptions, NbdPort};

use crate::args::BindArgs;
use crate::control::{ErrorBody, ErrorCode, LoadBody};

/// Largest component file that is read, in bytes.
const COMPONENT_LIMIT_BYTES: u64 = 256 << 20;
/// How long a load that fails after the binding serves (a port that cannot listen) waits for its way back.
const ROLLBACK: Duration = Duration::from_secs(5);

/// A manager that keeps compiled drivers in the user's cache directory.
pub(crate) fn manager() -> Result<Manager, ErrorBody> {
    Manager::new(Config { cache_dir: cache_dir() }).map_err(ErrorBody::failed)
}

fn cache_dir() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("cofferdam"))
}

/// What the command line asks for, with absolute paths, so that it means the same in the daemon.
pub(crate) fn load_body(args: &BindArgs, pinned: bool) -> Result<LoadBody, ErrorBody> {
    let driver = std::path::absolute(&args.driver)
        .map_err(|error| ErrorBody::new(ErrorCode::Usage, format!("{}: {error}", args.driver.display())))?;
    let driver = driver
        .into_os_string()
        .into_string()
        .map_err(|path| ErrorBody::new(ErrorCode::Usage, format!("{path:?} is not UTF-8")))?;
    Ok(LoadBody {
        driver,
        device: args.device.clone(),
        ports: args.ports.clone(),
        name: args.name.clone(),
        queues: args.queues,
        allow: args.allow.clone(),
        pinned,
        memory_mib: args.memory_mib,
        call_deadline_ms: args.call_deadline_ms,
        arena_mib: args.arena_mib,
        ring_entries: args.ring_entries,
        requests: args.requests,
        handles: args.handles,
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
fn connect(address: &str) -> Result<Box<dyn Transport>, ErrorBody> {
    match address.split_once(':') {
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
        _ => {
            Err(ErrorBody::new(ErrorCode::Usage, format!("'{address}' is not a device address: vhost-user:/path.sock")))
        }
    }
}

/// A port's address, checked before anything is claimed.
enum PortAddress {
    Nbd(NbdAddress),
}

impl PortAddress {
    fn parse(address: &str) -> Result<PortAddress, ErrorBody> {
        let usage = |message: String| ErrorBody::new(ErrorCode::Usage, message);
        match address.split_once(':') {
            Some(("nbd", _)) => {
                address.parse().map(PortAddress::Nbd).map_err(|error: NbdError| usage(error.to_string()))
            }
            _ => Err(usage(format!("'{address}' is not a port: nbd:/path.sock or nbd:127.0.0.1:10809"))),
        }
    }

    /// Makes a port of a binding that serves already.
    fn open(&self, binding: &Arc<Binding>) -> Result<Box<dyn Port>, ErrorBody> {
        match self {
            PortAddress::Nbd(address) => {
                let port = NbdPort::start(Arc::clone(binding), address, NbdOptions::default());
                Ok(Box::new(port.map_err(ErrorBody::failed)?))
            }
        }
    }
}

/// Everything of a load: component, device, binding, ports. Bounded; on error nothing is left.
pub(crate) fn load(manager: &Manager, body: &LoadBody) -> Result<Arc<Binding>, ErrorBody> {
    let ports = body.ports.iter().map(|port| PortAddress::parse(port)).collect::<Result<Vec<_>, _>>()?;
    let usage = |error: &dyn std::fmt::Display| ErrorBody::new(ErrorCode::Usage, error.to_string());
    let mut grants = Grants::default();
    for allow in &body.allow {
        grants.allow(allow).map_err(|error| usage(&error))?;
    }
    let path = Path::new(&body.driver);
    let component = read_component(path)?;
    let transport = connect(&body.device)?;
    let label = path.file_name().map_or_else(|| body.driver.clone(), |name| name.to_string_lossy().into_owned());
    let mut spec = LoadSpec::new(label, component, transport);
    spec.name.clone_from(&body.name);
    spec.queues = Some(body.queues);
    spec.pinned = body.pinned;
    spec.grants = grants;
    spec.limits = GuestLimits {
        memory_bytes: (body.memory_mib as usize) << 20,
        call_deadline_ms: u64::from(body.call_deadline_ms),
        ..GuestLimits::default()
    };
    spec.arena_bytes = u64::from(body.arena_mib) << 20;
    spec.ring_entries = body.ring_entries;
    spec.requests_per_lane = body.requests as usize;
    spec.handle_limit = body.handles as usize;
    let binding = manager.load(spec).map_err(ErrorBody::failed)?;
    for port in &ports {
        let attached = port.open(&binding).and_then(|port| {
            binding.attach_port(port).map_err(|_| ErrorBody::failed("the binding left while it was loaded"))
        });
        if let Err(error) = attached {
            let back = UnloadOptions { deadline: ROLLBACK, force: true, cancel: None, cause: Cause::LoadFailed };
            let _ = manager.unload_binding(&binding, &back);
            return Err(error);
        }
    }
    Ok(binding)
}

/// An unload, with its errors as the control API says them.
pub(crate) fn unload(manager: &Manager, name: &str, options: &UnloadOptions) -> Result<Certificate, ErrorBody> {
    manager.unload(name, options).map_err(|error| {
        let message = error.to_string();
        match error {
            UnloadError::NoSuchBinding(_) => ErrorBody::new(ErrorCode::NoSuchThing, message),
            UnloadError::StillDraining { so_far, .. } => ErrorBody {
                code: ErrorCode::StillDraining,
                message: format!("'{name}': {message}; unload again to go on, or with --force"),
                so_far: Some(so_far),
            },
            UnloadError::Pinned(_) | UnloadError::Deferred | UnloadError::NoThread(_) => ErrorBody::failed(message),
        }
    })
}
