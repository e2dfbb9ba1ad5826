//! `cofferdam devices`, `bind` and `unbind`: PCI functions, without a daemon. The one that runs, if any, is only asked which binding has what.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Duration;

use cofferdam_bus_pci::handover::{self, Record};
use cofferdam_bus_pci::{Address, By, Claim, Claimant, FunctionInfo, HandoverOptions, PciError, Sysfs, Via};
use cofferdam_manager::BindingStatus;
use hyper::Method;

use crate::args::{DeviceBindArgs, HandoverArgs, LsArgs, SocketArg, UnbindArgs};
use crate::client::PROGRESS;
use crate::control::{ErrorBody, ErrorCode};
use crate::daemon::socket_path;
use crate::link::Link;
use crate::{log, show, signals};

/// How long a daemon may take to say which bindings it has; they are an addition.
const NAMES: Duration = Duration::from_secs(1);

/// A function and who has it.
pub(crate) struct Device {
    pub(crate) info: FunctionInfo,
    /// A living process has it claimed; who, where that is known.
    pub(crate) claim: Option<Option<Claimant>>,
    /// The binding of the daemon that has it.
    pub(crate) binding: Option<String>,
    /// Where it came from.
    pub(crate) record: Option<Record>,
}

pub(crate) fn devices(args: LsArgs) -> Result<(), ErrorBody> {
    let sysfs = Sysfs::open().map_err(error)?;
    let functions = sysfs.functions().map_err(error)?;
    let mut bindings = bindings(&args.socket);
    let device = |info: FunctionInfo| {
        let address = info.address;
        let is_held = Claim::is_held(&sysfs, address).unwrap_or(false);
        Device {
            claim: is_held.then(|| Claim::holder(&sysfs, address)),
            binding: bindings.remove(&address),
            // A damaged one is told of by the commands that need it.
            record: handover::record(&sysfs, address).ok().flatten(),
            info,
        }
    };
    let devices: Vec<Device> = functions.into_iter().map(device).collect();
    if args.json {
        show::json(&devices.iter().map(show::device_json).collect::<Vec<_>>())
    } else {
        show::devices(&devices)
    }
    Ok(())
}

pub(crate) fn bind(args: DeviceBindArgs) -> Result<(), ErrorBody> {
    let address: Address = args.device.parse().map_err(error)?;
    let sysfs = Sysfs::open().map_err(error)?;
    let info = sysfs.function(address).map_err(error)?;
    let via = match (args.uio, args.vfio) {
        (true, _) => Via::Uio,
        (_, true) => Via::Vfio,
        // Where nothing is possible the refusal says why for vfio, or for uio where there is no IOMMU at all.
        _ => info.preferred().unwrap_or(if info.group.is_some() { Via::Vfio } else { Via::Uio }),
    };
    let options = HandoverOptions { force: args.how.force, by: By::Operator };
    let doing = format!("handing {address} over to {}", via.driver());
    let failed = |problem| refused(problem, address, &args.how);
    if args.how.dry_run {
        unclaimed(&sysfs, address).map_err(failed)?;
        let steps = handover::plan_hand_over(&sysfs, address, via, &options).map_err(failed)?;
        show::steps(address, Some(via), &steps, args.how.json);
        return Ok(());
    }
    let done = patiently(&doing, || {
        let claim = Claim::take(&sysfs, address, "bind")?;
        handover::hand_over(&sysfs, &claim, via, &options)
    });
    show::handed_over(&done.map_err(failed)?, args.how.json);
    Ok(())
}

pub(crate) fn unbind(args: UnbindArgs) -> Result<(), ErrorBody> {
    let address: Address = args.device.parse().map_err(error)?;
    let sysfs = Sysfs::open().map_err(error)?;
    let options = HandoverOptions { force: args.how.force, by: By::Operator };
    let failed = |problem| refused(problem, address, &args.how);
    if args.how.dry_run {
        unclaimed(&sysfs, address).map_err(failed)?;
        let steps = handover::plan_give_back(&sysfs, address, &options).map_err(failed)?;
        show::steps(address, None, &steps, args.how.json);
        return Ok(());
    }
    let done = patiently(&format!("giving {address} back"), || {
        let claim = Claim::take(&sysfs, address, "unbind")?;
        handover::give_back(&sysfs, &claim, &options)
    });
    show::returned(&done.map_err(failed)?, args.how.json);
    Ok(())
}

/// A dry run takes no claim, for that would change something: it looks.
fn unclaimed(sysfs: &Sysfs, address: Address) -> Result<(), PciError> {
    if !Claim::is_held(sysfs, address)? {
        return Ok(());
    }
    Err(match Claim::holder(sysfs, address) {
        Some(Claimant { process, purpose }) => PciError::ClaimedBy { address, pid: process.pid, purpose },
        None => PciError::AlreadyClaimed(address),
    })
}

/// As the control API says it.
pub(crate) fn error(error: PciError) -> ErrorBody {
    let code = match &error {
        PciError::Address { .. } => ErrorCode::Usage,
        PciError::NotFound(_) => ErrorCode::NoSuchThing,
        _ => ErrorCode::Failed,
    };
    ErrorBody::new(code, error.to_string())
}

/// An error; for a function that is claimed with the name of the binding, which the operator can unload.
fn refused(problem: PciError, address: Address, args: &HandoverArgs) -> ErrorBody {
    let is_claimed = matches!(problem, PciError::AlreadyClaimed(_) | PciError::ClaimedBy { .. });
    let mut body = error(problem);
    if is_claimed && let Some(name) = bindings(&args.socket).remove(&address) {
        body.message = format!("{address}: binding '{name}' has it; 'cofferdam unload {name}' gives it back");
    }
    body
}

/// Names of bindings by the function that they have. Empty where no daemon answers soon: it is not needed.
fn bindings(socket: &SocketArg) -> BTreeMap<Address, String> {
    let path = socket.socket.as_deref();
    if !socket_path(path).exists() {
        return BTreeMap::new();
    }
    let ask = || -> Result<Vec<BindingStatus>, ErrorBody> {
        signals::runtime()?.block_on(Link::new(path).call(Method::GET, "/v1/bindings", None::<&()>, NAMES))
    };
    let with_function = |binding: BindingStatus| {
        let address = binding.device.strip_prefix("pci:")?.parse().ok()?;
        (binding.state != "detached").then_some((address, binding.name))
    };
    ask().unwrap_or_default().into_iter().filter_map(with_function).collect()
}

/// Says every two seconds what is being done.
fn patiently<T>(doing: &str, work: impl FnOnce() -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while wait.recv_timeout(PROGRESS) == Err(mpsc::RecvTimeoutError::Timeout) {
                log::say(&format!("{doing}..."));
            }
        });
        let answer = work();
        drop(done);
        answer
    })
}
