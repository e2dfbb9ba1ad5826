//! `cofferdam doctor`: what this machine can do, and the one command that mends what it cannot.
//!
//! [`facts`] looks, [`judge`] decides: what is decided is tested with facts that no machine here has. The names of the checks, their three statuses and the keys of the JSON
//! are stable.

mod facts;

use cofferdam_manager::{MECHANISM_VARIABLE, Mechanism};

use crate::args::DoctorArgs;
use crate::control::ErrorBody;
use crate::show;
use facts::{Driver, Facts, Hugepages};

/// How well something works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    /// It works with less, or after the command.
    Limited,
    Missing,
}

impl Status {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Limited => "limited",
            Status::Missing => "missing",
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) status: Status,
    pub(crate) detail: String,
    /// What mends it; `None` where nothing has to be mended or no command does.
    pub(crate) mend: Option<String>,
}

pub(crate) fn doctor(args: DoctorArgs) -> Result<(), ErrorBody> {
    let checks = judge(&Facts::gather());
    let is_ready = is_ready(&checks);
    if args.json {
        show::doctor_json(&checks, is_ready);
    } else {
        show::doctor(&checks);
    }
    if is_ready { Ok(()) } else { Err(ErrorBody::failed("devices over vhost-user do not work here")) }
}

fn is_ready(checks: &[Check]) -> bool {
    checks.iter().any(|check| check.name == "vhost-user" && check.status == Status::Ok)
}

fn check(name: &'static str, status: Status, detail: impl Into<String>, mend: Option<&str>) -> Check {
    let mend = mend.filter(|_| status != Status::Ok).map(str::to_owned);
    Check { name, status, detail: detail.into(), mend }
}

fn judge(facts: &Facts) -> Vec<Check> {
    vec![
        vhost_user(facts),
        memfd(facts),
        gate(facts),
        rseq(facts),
        membarrier(facts),
        permissions(facts),
        memlock(facts),
        hugepages(&facts.hugepages),
        iommu(facts),
        driver("uio", &facts.uio, "uio_pci_generic", "devices without an IOMMU"),
        vfio(facts),
        iommufd(facts),
        driver("nbd", &facts.nbd, "nbd", "the kernel's NBD client"),
        driver("tap", &facts.tap, "tun", "TAP interfaces"),
    ]
}

fn vhost_user(facts: &Facts) -> Check {
    if facts.memfd_seals {
        check("vhost-user", Status::Ok, "devices behind a socket need nothing else of the machine", None)
    } else {
        check("vhost-user", Status::Missing, "memory to share with a device cannot be sealed", MEMFD)
    }
}

/// No command gives an old kernel memfds.
const MEMFD: Option<&str> =
    Some("use a kernel with CONFIG_MEMFD_CREATE (Linux 3.17 or newer), and let seccomp admit memfd_create");

fn memfd(facts: &Facts) -> Check {
    match facts.memfd_seals {
        true => check("memfd", Status::Ok, "memory files can be made and sealed", None),
        false => check("memfd", Status::Missing, "memory files cannot be made or sealed", MEMFD),
    }
}

fn gate(facts: &Facts) -> Check {
    match facts.mechanism {
        Mechanism::Rseq => check("gate", Status::Ok, format!("{}: {}", facts.mechanism, facts.mechanism_reason), None),
        Mechanism::Xadd => {
            let detail = format!(
                "{}, about an atomic operation more for each call: {}",
                facts.mechanism, facts.mechanism_reason
            );
            let forced = format!("unset {MECHANISM_VARIABLE}");
            let mend = if facts.is_forced { Some(forced.as_str()) } else { None };
            check("gate", Status::Limited, detail, mend)
        }
    }
}

fn rseq(facts: &Facts) -> Check {
    let mend = Some("unset GLIBC_TUNABLES; use glibc 2.35 and Linux 4.18 or newer");
    match (facts.mechanism, facts.has_rseq) {
        (Mechanism::Rseq, _) => check("rseq", Status::Ok, "restartable sequences work", None),
        (_, true) => check("rseq", Status::Ok, "the kernel has restartable sequences", None),
        (_, false) => check("rseq", Status::Missing, "the kernel does not tell of restartable sequences", mend),
    }
}

fn membarrier(facts: &Facts) -> Check {
    let mend = Some("use Linux 5.10 or newer, and let seccomp admit membarrier");
    match (facts.membarrier_rseq, facts.membarrier_private) {
        (true, _) => check("membarrier", Status::Ok, "private expedited, in the rseq flavour too", None),
        (false, true) => check("membarrier", Status::Limited, "private expedited, but not in the rseq flavour", mend),
        (false, false) => check("membarrier", Status::Missing, "no private expedited barrier", mend),
    }
}

fn permissions(facts: &Facts) -> Check {
    match (facts.is_root, facts.has_sys_admin) {
        (true, true) => {
            check("permissions", Status::Ok, "root with CAP_SYS_ADMIN: PCI functions can be handed over", None)
        }
        (true, false) => check(
            "permissions",
            Status::Limited,
            "root without CAP_SYS_ADMIN (a container): the physical addresses that uio needs cannot be read",
            Some("run it with CAP_SYS_ADMIN, outside of the container"),
        ),
        (false, _) => check(
            "permissions",
            Status::Limited,
            "not root: enough for vhost-user, not for handing PCI functions over",
            Some("sudo cofferdam doctor"),
        ),
    }
}

/// What one binding locks without further options: its arena, and as much again for rings.
const MEMLOCK_BYTES: u64 = 128 << 20;

fn memlock(facts: &Facts) -> Check {
    match facts.memlock_bytes {
        _ if facts.has_ipc_lock => check("memlock", Status::Ok, "CAP_IPC_LOCK: no limit on locked memory", None),
        None => check("memlock", Status::Ok, "no limit on locked memory", None),
        Some(limit) if limit >= MEMLOCK_BYTES => {
            check("memlock", Status::Ok, format!("{} MiB may be locked", limit >> 20), None)
        }
        Some(limit) => {
            let detail = format!("{} KiB may be locked, too little for memory that vfio maps", limit >> 10);
            check("memlock", Status::Limited, detail, Some("ulimit -l unlimited"))
        }
    }
}

fn hugepages(huge: &Hugepages) -> Check {
    let sizes: Vec<String> =
        huge.sizes.iter().map(|size| format!("{} KiB: {} of {} free", size.page_kib, size.free, size.total)).collect();
    let sizes = if sizes.is_empty() { "the kernel has none".to_owned() } else { sizes.join(", ") };
    let mounts = if huge.mounts.is_empty() {
        "mounted nowhere".to_owned()
    } else {
        format!("mounted at {}", huge.mounts.join(", "))
    };
    let detail = format!("{mounts}; {sizes}");
    if huge.sizes.is_empty() {
        return check("hugepages", Status::Missing, detail, Some("use a kernel with CONFIG_HUGETLBFS"));
    }
    match (huge.mounts.is_empty(), huge.sizes.iter().any(|size| size.free > 0)) {
        (false, true) => check("hugepages", Status::Ok, detail, None),
        (true, _) => check(
            "hugepages",
            Status::Limited,
            detail,
            Some("mkdir -p /dev/hugepages && mount -t hugetlbfs none /dev/hugepages"),
        ),
        (false, false) => check("hugepages", Status::Limited, detail, Some("echo 64 > /proc/sys/vm/nr_hugepages")),
    }
}

fn iommu(facts: &Facts) -> Check {
    let boot = Some("add intel_iommu=on (Intel) or amd_iommu=on (AMD) to the kernel's command line and reboot");
    match (facts.iommus.is_empty(), facts.iommu_groups) {
        (_, groups) if groups > 0 => {
            let kinds = if facts.iommu_kinds.is_empty() { "unknown".to_owned() } else { facts.iommu_kinds.join(", ") };
            let names = if facts.iommus.is_empty() { "on".to_owned() } else { facts.iommus.join(", ") };
            check("iommu", Status::Ok, format!("{names}; {groups} groups ({kinds})"), None)
        }
        (false, _) => check("iommu", Status::Limited, format!("{} is there and off", facts.iommus.join(", ")), boot),
        (true, _) => check("iommu", Status::Missing, "none is in use: PCI functions go by uio", boot),
    }
}

fn driver(name: &'static str, driver: &Driver, module: &str, what: &str) -> Check {
    match driver {
        Driver::Loaded => check(name, Status::Ok, format!("{module} is there ({what})"), None),
        Driver::Available => check(
            name,
            Status::Limited,
            format!("{module} is not loaded ({what})"),
            Some(&format!("modprobe {module}")),
        ),
        Driver::Unknown => {
            let detail = format!("this kernel has no {module} ({what})");
            check(
                name,
                Status::Missing,
                detail,
                Some("install the full set of modules of your kernel (linux-modules-extra, linux-image)"),
            )
        }
    }
}

fn vfio(facts: &Facts) -> Check {
    let found = driver("vfio", &facts.vfio, "vfio-pci", "devices behind an IOMMU");
    if found.status == Status::Ok && facts.iommu_groups == 0 {
        return check(
            "vfio",
            Status::Limited,
            "vfio-pci is there, but there is no IOMMU for it",
            iommu(facts).mend.as_deref(),
        );
    }
    found
}

fn iommufd(facts: &Facts) -> Check {
    let without = "vfio goes by containers and groups";
    match facts.iommufd {
        Driver::Loaded => check("iommufd", Status::Ok, "/dev/iommu is there", None),
        Driver::Available => {
            check("iommufd", Status::Limited, format!("not loaded: {without}"), Some("modprobe iommufd"))
        }
        Driver::Unknown => check("iommufd", Status::Missing, format!("this kernel has none: {without}"), None),
    }
}

#[cfg(test)]
mod tests;
