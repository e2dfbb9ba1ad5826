//! What is made of facts.

use super::facts::PageSize;
use super::*;

/// A machine that lacks nothing.
fn good() -> Facts {
    Facts {
        mechanism: Mechanism::Rseq,
        mechanism_reason: "rseq and membarrier are there",
        is_forced: false,
        has_rseq: true,
        membarrier_private: true,
        membarrier_rseq: true,
        memfd_seals: true,
        is_root: true,
        has_sys_admin: true,
        has_ipc_lock: true,
        memlock_bytes: None,
        hugepages: Hugepages {
            mounts: vec!["/dev/hugepages".into()],
            sizes: vec![PageSize { page_kib: 2048, total: 64, free: 60 }],
        },
        iommus: vec!["dmar0".into()],
        iommu_groups: 12,
        iommu_kinds: vec!["DMA-FQ".into()],
        uio: Driver::Loaded,
        vfio: Driver::Loaded,
        iommufd: Driver::Loaded,
        nbd: Driver::Loaded,
        tap: Driver::Loaded,
    }
}

fn of(change: impl FnOnce(&mut Facts), name: &str) -> (Status, String) {
    let mut facts = good();
    change(&mut facts);
    let found = judge(&facts).into_iter().find(|check| check.name == name).expect("a check of this name");
    (found.status, found.mend.unwrap_or_default())
}

#[test]
fn a_machine_that_lacks_nothing_has_nothing_to_mend() {
    for check in judge(&good()) {
        assert_eq!((check.status, check.mend.as_deref()), (Status::Ok, None), "{}", check.name);
    }
    assert!(is_ready(&judge(&good())));
}

#[test]
fn each_thing_that_is_missing_says_what_mends_it() {
    use Status::{Limited, Missing};
    let none = Hugepages::default;
    let some = |mounts: &[&str], free| Hugepages {
        mounts: mounts.iter().map(|at| (*at).to_owned()).collect(),
        sizes: vec![PageSize { page_kib: 2048, total: 0, free }],
    };
    let cases = [
        (of(|f| f.uio = Driver::Available, "uio"), Limited, "modprobe uio_pci_generic"),
        (of(|f| f.uio = Driver::Unknown, "uio"), Missing, "modules"),
        (of(|f| f.vfio = Driver::Available, "vfio"), Limited, "modprobe vfio-pci"),
        (of(|f| f.iommu_groups = 0, "vfio"), Limited, "intel_iommu=on"),
        (of(|f| f.iommu_groups = 0, "iommu"), Limited, "intel_iommu=on"),
        (of(|f| (f.iommu_groups, f.iommus) = (0, Vec::new()), "iommu"), Missing, "intel_iommu=on"),
        (of(|f| f.iommufd = Driver::Available, "iommufd"), Limited, "modprobe iommufd"),
        (of(|f| f.nbd = Driver::Available, "nbd"), Limited, "modprobe nbd"),
        (of(|f| f.tap = Driver::Available, "tap"), Limited, "modprobe tun"),
        (of(|f| f.hugepages = none(), "hugepages"), Missing, "CONFIG_HUGETLBFS"),
        (of(|f| f.hugepages = some(&[], 8), "hugepages"), Limited, "mount -t hugetlbfs"),
        (of(|f| f.hugepages = some(&["/dev/hugepages"], 0), "hugepages"), Limited, "nr_hugepages"),
        (of(|f| f.is_root = false, "permissions"), Limited, "sudo"),
        (of(|f| f.has_sys_admin = false, "permissions"), Limited, "CAP_SYS_ADMIN"),
        (of(|f| (f.has_ipc_lock, f.memlock_bytes) = (false, Some(8 << 20)), "memlock"), Limited, "ulimit -l"),
        (of(|f| f.membarrier_rseq = false, "membarrier"), Limited, "Linux 5.10"),
        (of(|f| (f.membarrier_rseq, f.membarrier_private) = (false, false), "membarrier"), Missing, "Linux 5.10"),
        (of(|f| (f.mechanism, f.has_rseq) = (Mechanism::Xadd, false), "rseq"), Missing, "glibc"),
        (of(|f| (f.mechanism, f.is_forced) = (Mechanism::Xadd, true), "gate"), Limited, "unset COFFERDAM_GATE"),
        (of(|f| f.memfd_seals = false, "memfd"), Missing, "memfd_create"),
    ];
    for ((status, mend), expected, word) in cases {
        assert_eq!(status, expected, "{word}");
        assert!(mend.contains(word), "{mend:?} does not say {word:?}");
    }
}

#[test]
fn only_what_vhost_user_needs_decides_the_exit_code() {
    let mut poor = good();
    (poor.mechanism, poor.has_rseq, poor.membarrier_rseq, poor.is_root, poor.iommu_groups) =
        (Mechanism::Xadd, false, false, false, 0);
    (poor.uio, poor.vfio, poor.nbd, poor.tap, poor.hugepages) =
        (Driver::Unknown, Driver::Unknown, Driver::Unknown, Driver::Unknown, Hugepages::default());
    assert!(is_ready(&judge(&poor)));
    poor.memfd_seals = false;
    assert!(!is_ready(&judge(&poor)));
}
