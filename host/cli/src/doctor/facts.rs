//! What there is, without an opinion on it. Everything that is read is bounded; what cannot be read is not there.

use std::io::Read;
use std::path::Path;

use cofferdam_manager::{MECHANISM_VARIABLE, Mechanism, mechanism, mechanism_reason};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{MembarrierQuery, membarrier_query};

/// Longest file that is read, in bytes: `modules.dep` has about 600 KiB.
const FILE_BYTES: u64 = 8 << 20;
/// Entries of a directory that are looked at.
const ENTRIES: usize = 4096;

/// CAP_IPC_LOCK and CAP_SYS_ADMIN (linux/capability.h).
const IPC_LOCK: u64 = 1 << 14;
const SYS_ADMIN: u64 = 1 << 21;

/// All of them.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) mechanism: Mechanism,
    pub(super) mechanism_reason: &'static str,
    /// The environment asks for the portable mechanism.
    pub(super) is_forced: bool,
    /// The kernel tells programs of rseq (getauxval(3), `AT_RSEQ_FEATURE_SIZE`, Linux 6.3).
    pub(super) has_rseq: bool,
    pub(super) membarrier_private: bool,
    pub(super) membarrier_rseq: bool,
    pub(super) memfd_seals: bool,
    pub(super) is_root: bool,
    pub(super) has_sys_admin: bool,
    pub(super) has_ipc_lock: bool,
    /// `None` without a limit.
    pub(super) memlock_bytes: Option<u64>,
    pub(super) hugepages: Hugepages,
    /// Names of IOMMUs that the kernel drives.
    pub(super) iommus: Vec<String>,
    pub(super) iommu_groups: usize,
    /// Types of the groups' domains, each once.
    pub(super) iommu_kinds: Vec<String>,
    pub(super) uio: Driver,
    pub(super) vfio: Driver,
    pub(super) iommufd: Driver,
    pub(super) nbd: Driver,
    pub(super) tap: Driver,
}

/// A driver of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// Ready.
    Loaded,
    /// There is a module.
    Available,
    /// Neither.
    Unknown,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Hugepages {
    pub(super) mounts: Vec<String>,
    pub(super) sizes: Vec<PageSize>,
}

#[derive(Clone, Debug)]
pub(super) struct PageSize {
    pub(super) page_kib: u64,
    pub(super) total: u64,
    pub(super) free: u64,
}

impl Facts {
    pub(super) fn gather() -> Facts {
        let capabilities = capabilities(&read("/proc/self/status"));
        let barriers = membarrier_query();
        let groups = names("/sys/kernel/iommu_groups");
        let mut iommu_kinds: Vec<String> = groups
            .iter()
            .map(|group| read(&format!("/sys/kernel/iommu_groups/{group}/type")).trim().to_owned())
            .collect();
        iommu_kinds.retain(|kind| !kind.is_empty());
        iommu_kinds.sort();
        iommu_kinds.dedup();
        let modules = Modules::read();
        Facts {
            mechanism: mechanism(),
            mechanism_reason: mechanism_reason(),
            is_forced: std::env::var_os(MECHANISM_VARIABLE).is_some_and(|value| value == "xadd"),
            has_rseq: has_auxiliary(&std::fs::read("/proc/self/auxv").unwrap_or_default(), AT_RSEQ_FEATURE_SIZE),
            membarrier_private: barriers.contains(MembarrierQuery::PRIVATE_EXPEDITED),
            membarrier_rseq: barriers.contains(MembarrierQuery::PRIVATE_EXPEDITED_RSEQ),
            memfd_seals: memfd_seals(),
            is_root: rustix::process::geteuid().is_root(),
            has_sys_admin: capabilities & SYS_ADMIN != 0,
            has_ipc_lock: capabilities & IPC_LOCK != 0,
            memlock_bytes: getrlimit(Resource::Memlock).current,
            hugepages: Hugepages { mounts: hugetlbfs(&read("/proc/self/mountinfo")), sizes: page_sizes() },
            iommus: names("/sys/class/iommu"),
            iommu_groups: groups.len(),
            iommu_kinds,
            uio: modules.driver("uio_pci_generic", Path::new("/sys/bus/pci/drivers/uio_pci_generic")),
            vfio: modules.driver("vfio-pci", Path::new("/sys/bus/pci/drivers/vfio-pci")),
            iommufd: modules.driver("iommufd", Path::new("/dev/iommu")),
            nbd: modules.driver("nbd", Path::new("/sys/block/nbd0")),
            tap: modules.driver("tun", Path::new("/sys/class/misc/tun")),
        }
    }
}

fn read(path: &str) -> String {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path);
    let _ = file.and_then(|file| file.take(FILE_BYTES).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn names(path: &str) -> Vec<String> {
    let entries = std::fs::read_dir(path).into_iter().flatten().take(ENTRIES).flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// proc_pid_status(5), `CapEff`.
fn capabilities(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
}

/// linux/auxvec.h.
const AT_RSEQ_FEATURE_SIZE: u64 = 27;

/// Whether the auxiliary vector, pairs of words, has a type.
fn has_auxiliary(vector: &[u8], kind: u64) -> bool {
    let (pairs, _) = vector.as_chunks::<16>();
    pairs.iter().any(|pair| pair[..8] == kind.to_ne_bytes())
}

fn memfd_seals() -> bool {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::memfd_create("cofferdam-doctor", flags)
        .is_ok_and(|file| rustix::fs::fcntl_add_seals(&file, seals).is_ok())
}

/// proc_pid_mountinfo(5): the type stands behind the dash.
fn hugetlbfs(table: &str) -> Vec<String> {
    let mount = |line: &str| {
        let (front, back) = line.split_once(" - ")?;
        back.starts_with("hugetlbfs ").then(|| front.split(' ').nth(4).map(str::to_owned))?
    };
    table.lines().filter_map(mount).collect()
}

fn page_sizes() -> Vec<PageSize> {
    let folder = "/sys/kernel/mm/hugepages";
    let number = |name: &str, file: &str| read(&format!("{folder}/{name}/{file}")).trim().parse().unwrap_or(0);
    let size = |name: &String| {
        let page_kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        Some(PageSize { page_kib, total: number(name, "nr_hugepages"), free: number(name, "free_hugepages") })
    };
    let mut sizes: Vec<PageSize> = names(folder).iter().filter_map(size).collect();
    sizes.sort_by_key(|size| size.page_kib);
    sizes
}

/// The modules of the running kernel, as depmod(8) lists them.
struct Modules {
    list: String,
}

impl Modules {
    fn read() -> Modules {
        let release = read("/proc/sys/kernel/osrelease");
        Modules { list: read(&format!("/lib/modules/{}/modules.dep", release.trim())) }
    }

    fn driver(&self, module: &str, there: &Path) -> Driver {
        if there.exists() {
            Driver::Loaded
        } else if has_module(&self.list, module) {
            Driver::Available
        } else {
            Driver::Unknown
        }
    }
}

/// `kernel/drivers/uio/uio_pci_generic.ko.xz: ...`, a module a line.
fn has_module(list: &str, module: &str) -> bool {
    list.lines().filter_map(|line| line.split_once(':')).any(|(path, _)| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.strip_prefix(module).is_some_and(|rest| rest == ".ko" || rest.starts_with(".ko."))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_the_kernel_are_read_as_they_are_written() {
        assert_eq!(capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n") & SYS_ADMIN, SYS_ADMIN);
        assert_eq!(capabilities("CapEff:\tgarbage"), 0);
        let mounts = "30 1 0:20 / / rw - ext4 /dev/vda rw\n31 1 0:30 / /dev/huge\\040pages rw shared:3 - hugetlbfs none rw\nx - hugetlbfs";
        assert_eq!(hugetlbfs(mounts), ["/dev/huge\\040pages"]);
        let list =
            "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/x.ko\nkernel/drivers/block/nbd.ko:\nkernel/tunx.ko:\n";
        assert!(has_module(list, "vfio-pci") && has_module(list, "nbd") && !has_module(list, "tun"));
        let vector: Vec<u8> =
            [6_u64, 4096, AT_RSEQ_FEATURE_SIZE, 28, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert!(has_auxiliary(&vector, AT_RSEQ_FEATURE_SIZE) && !has_auxiliary(&vector, 4096));
    }

    #[test]
    fn facts_can_be_gathered_here() {
        let facts = Facts::gather();
        assert_eq!(facts.is_root, rustix::process::geteuid().is_root());
    }
}
