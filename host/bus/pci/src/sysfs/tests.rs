//! Discovery on a tree, honest and hostile.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::handover::tests::tree::Tree;

const DISK: &str = "0000:00:04.0";
const NET: &str = "0000:00:05.0";
const STORAGE: u32 = 0x01_00_00;
const ETHERNET: u32 = 0x02_00_00;

fn info(tree: &Tree, address: &str) -> FunctionInfo {
    tree.sysfs().function(address.parse().unwrap()).unwrap()
}

fn told(uses: &[Use]) -> Vec<String> {
    uses.iter().map(ToString::to_string).collect()
}

fn disk() -> Tree {
    let tree = Tree::new();
    tree.function(DISK, STORAGE, Some("virtio-pci"));
    let vda = tree.child(DISK, "virtio1/block/vda", "block");
    fs::write(vda.join("dev"), "254:0\n").unwrap();
    let part = tree.child(DISK, "virtio1/block/vda/vda1", "block");
    fs::write(part.join("dev"), "254:1\n").unwrap();
    fs::write(part.join("partition"), "1\n").unwrap();
    tree
}

#[test]
fn a_function_is_described_as_the_kernel_has_it() {
    let tree = disk();
    tree.function("0000:00:1f.2", 0x01_06_01, None);
    let all = tree.sysfs().functions().unwrap();
    assert_eq!(all.iter().map(|info| info.address.to_string()).collect::<Vec<_>>(), [DISK, "0000:00:1f.2"]);
    let info = &all[0];
    assert_eq!(
        (info.ids.vendor, info.ids.device, info.ids.subsystem, info.ids.class),
        (0x1af4, 0x1042, 0x1100, STORAGE)
    );
    assert_eq!((info.driver.as_deref(), info.driver_override.as_deref()), (Some("virtio-pci"), None));
    assert_eq!(
        info.bars.map(|bar| (bar.bytes, bar.is_io)),
        [(128, true), (0, false), (0, false), (4096, false), (16_384, false), (0, false)]
    );
    assert_eq!((info.class_words(), all[1].class_words()), ("SCSI storage", "SATA storage"));
    assert!(info.group.is_none() && info.has_reset);
    let missing = "0000:00:09.0".parse().unwrap();
    assert!(matches!(tree.sysfs().function(missing), Err(PciError::NotFound(address)) if address == missing));
}

#[test]
fn without_an_iommu_uio_can_have_it_and_vfio_cannot() {
    let tree = disk();
    let info = info(&tree, DISK);
    assert_eq!(info.usable.uio, Readiness::Ready);
    assert!(matches!(&info.usable.vfio, Readiness::No { why } if why.contains("no IOMMU group")));
    assert_eq!(info.preferred(), Some(Via::Uio));
}

#[test]
fn behind_an_iommu_that_translates_vfio_can_have_it_and_uio_cannot() {
    for (kind, uio) in [("DMA", false), ("DMA-FQ", false), ("unheard-of", false), ("identity", true)] {
        let tree = disk();
        tree.group(7, kind, &[DISK]);
        let info = info(&tree, DISK);
        assert_eq!(info.usable.uio.is_possible(), uio, "{kind}");
        assert_eq!(info.usable.vfio, Readiness::Ready);
        assert_eq!(info.preferred(), Some(Via::Vfio));
        assert_eq!(info.group.unwrap().kind.as_deref(), Some(kind));
    }
}

#[test]
fn a_group_that_other_drivers_share_is_refused_and_they_are_named() {
    let tree = disk();
    tree.function("0000:00:04.1", ETHERNET, Some("e1000e"));
    tree.function("0000:00:04.2", ETHERNET, Some("vfio-pci"));
    tree.function("0000:00:04.3", ETHERNET, None);
    tree.function("0000:00:01.0", 0x06_04_00, Some("pcieport"));
    tree.group(7, "DMA", &[DISK, "0000:00:04.1", "0000:00:04.2", "0000:00:04.3", "0000:00:01.0"]);
    let info = info(&tree, DISK);
    assert_eq!(info.group.as_ref().unwrap().others.len(), 4);
    let Readiness::No { why } = &info.usable.vfio else { panic!("{:?}", info.usable) };
    assert!(why.contains("0000:00:04.1 (e1000e)"), "{why}");
    assert!(!["04.2", "04.3", "01.0"].iter().any(|name| why.contains(name)), "{why}");
    assert_eq!(info.preferred(), None);
}

#[test]
fn what_lacks_a_module_says_the_command_and_a_bridge_is_nobodys() {
    let tree = disk();
    tree.module("uio_pci_generic");
    assert_eq!(info(&tree, DISK).usable.uio.mend().as_deref(), Some("modprobe uio_pci_generic"));
    tree.function("0000:00:01.0", 0x06_04_00, Some("pcieport"));
    let bridge = info(&tree, "0000:00:01.0");
    assert!(bridge.is_bridge() && bridge.preferred().is_none());
}

#[test]
fn a_file_system_is_found_by_number_and_by_source_wherever_it_is_mounted() {
    let tree = disk();
    assert_eq!(info(&tree, DISK).uses, []);
    let mounts = "\
30 1 254:1 / /srv/a\\040b rw,relatime shared:1 master:2 - ext4 /dev/root rw
31 1 0:40 /sub /data rw - btrfs /dev/vda rw
32 1 254:2 / /other rw - ext4 /dev/vda2 rw
garbage
";
    fs::write(tree.proc().join("self/mountinfo"), mounts).unwrap();
    assert_eq!(told(&info(&tree, DISK).uses), ["vda is mounted at /data", "vda1 is mounted at /srv/a b"]);
}

#[test]
fn swap_holders_and_loops_are_uses() {
    let tree = disk();
    fs::write(tree.proc().join("swaps"), "Filename Type\n/dev/vda1 partition 1 0 -2\n/dev/vdb file 1 0 -2\n").unwrap();
    let holders = tree.dir(DISK).join("virtio1/block/vda/holders");
    fs::create_dir(&holders).unwrap();
    symlink("../../../../../virtual/block/dm-0", holders.join("dm-0")).unwrap();
    fs::create_dir_all(tree.sys().join("class/block/loop3/loop")).unwrap();
    fs::write(tree.sys().join("class/block/loop3/loop/backing_file"), "/dev/vda1\n").unwrap();
    let told = told(&info(&tree, DISK).uses);
    assert_eq!(told, ["vda1 is swap space", "vda is part of dm-0", "vda1 is behind loop3"]);
}

#[test]
fn a_path_of_a_multi_path_namespace_stands_for_the_namespace() {
    let tree = Tree::new();
    tree.function(DISK, 0x01_08_02, Some("nvme"));
    tree.child(DISK, "nvme/nvme0", "nvme");
    tree.child(DISK, "nvme/nvme0/nvme0c0n1", "block");
    let head = tree.sys().join("devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1");
    fs::create_dir_all(head.join("nvme0n1p1")).unwrap();
    fs::write(head.join("dev"), "259:0\n").unwrap();
    fs::write(head.join("nvme0n1p1/dev"), "259:1\n").unwrap();
    fs::write(head.join("nvme0n1p1/partition"), "1\n").unwrap();
    symlink("../../devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1", tree.sys().join("class/block/nvme0n1"))
        .unwrap();
    fs::write(tree.proc().join("self/mountinfo"), "30 1 259:1 / / rw - xfs /dev/nvme0n1p1 rw\n").unwrap();
    assert_eq!(told(&info(&tree, DISK).uses), ["nvme0n1p1 is mounted at /"]);
}

fn net() -> Tree {
    let tree = Tree::new();
    tree.function(NET, ETHERNET, Some("virtio-pci"));
    tree.child(NET, "virtio2/net/eth0", "net");
    fs::create_dir_all(tree.sys().join("class/net/eth0")).unwrap();
    tree
}

const ROUTES: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";

#[test]
fn the_default_route_is_a_use_and_other_routes_are_none() {
    let tree = net();
    let v4 = tree.proc().join("self/net/route");
    let v6 = tree.proc().join("self/net/ipv6_route");
    let zero = "0".repeat(32);
    // A network, a route that is down, one that refuses, another interface.
    let others = format!(
        "{ROUTES}eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\neth0\t00000000\t010200C0\t0002\t0\t0\t0\t00000000\t0\t0\t0\n\
         eth0\t00000000\t00000000\t0201\t0\t0\t0\t00000000\t0\t0\t0\neth1\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    );
    fs::write(&v4, others).unwrap();
    fs::write(&v6, format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200     eth0\nfe80{} 40 {zero} 00 {zero} 0 0 0 00000001 eth0\n", "0".repeat(28))).unwrap();
    assert_eq!(info(&tree, NET).uses, []);
    fs::write(&v4, format!("{ROUTES}eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n")).unwrap();
    fs::write(&v6, format!("{zero} 00 {zero} 00 fd{} 00000400 00000003 00000000 00000003     eth0\n", "0".repeat(30)))
        .unwrap();
    let expected = ["the default route goes through eth0", "the IPv6 default route goes through eth0"];
    assert_eq!(told(&info(&tree, NET).uses), expected);
}

#[test]
fn a_default_route_through_a_bridge_on_a_bond_counts_for_the_interface_below() {
    let tree = net();
    let class = tree.sys().join("class/net");
    for (below, above) in [("eth0", "bond0"), ("bond0", "br0"), ("br0", "eth0")] {
        fs::create_dir_all(class.join(above)).unwrap();
        symlink(format!("../{above}"), class.join(below).join(format!("upper_{above}"))).unwrap();
    }
    fs::write(
        tree.proc().join("self/net/route"),
        format!("{ROUTES}br0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"),
    )
    .unwrap();
    assert_eq!(told(&info(&tree, NET).uses), ["the default route goes through br0"]);
}

#[test]
fn garbage_in_every_attribute_is_described_as_garbage() {
    let endless = "A".repeat(3 << 20);
    for garbage in [
        "",
        "0x",
        "0x-1",
        "-1",
        "99999999999999999999999",
        "0xfffffffffffffffff",
        "\u{0}\u{1}\n",
        "0x1\n0x2",
        "ü",
        endless.as_str(),
    ] {
        let tree = disk();
        let dir = tree.dir(DISK);
        for name in [
            "vendor",
            "device",
            "subsystem_vendor",
            "subsystem_device",
            "class",
            "revision",
            "resource",
            "driver_override",
        ] {
            fs::write(dir.join(name), garbage).unwrap();
        }
        fs::write(dir.join("virtio1/block/vda/dev"), garbage).unwrap();
        for table in ["swaps", "self/mountinfo", "self/net/route", "self/net/ipv6_route"] {
            fs::write(tree.proc().join(table), garbage).unwrap();
        }
        let info = info(&tree, DISK);
        assert_eq!(
            (info.ids.vendor, info.ids.class, info.bars),
            (0xffff, 0xff_ffff, [Bar::default(); 6]),
            "{garbage:.20}"
        );
        let _ = tree.sysfs().functions().unwrap();
    }
    let tree = disk();
    // Sizes whose sum overflows, ends before beginnings, too many words.
    fs::write(
        tree.dir(DISK).join("resource"),
        "0x0 0xffffffffffffffff 0x200\n0x5 0x4 0x200\n0x0 0x1 0x200 0x3\n0x0 0xf 0x200\n",
    )
    .unwrap();
    assert_eq!(info(&tree, DISK).bars.map(|bar| bar.bytes), [0, 0, 0, 16, 0, 0]);
}

#[test]
fn links_that_lead_out_of_the_tree_are_not_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("vendor"), "0x8086\n").unwrap();
    fs::write(outside.path().join("secret"), "virtio-secret").unwrap();
    let tree = disk();
    // The function itself, by an absolute link and by one that climbs.
    symlink(outside.path(), tree.sys().join("bus/pci/devices/0000:00:06.0")).unwrap();
    let climb = format!("../../../../../../../../..{}", outside.path().display());
    symlink(climb, tree.sys().join("bus/pci/devices/0000:00:07.0")).unwrap();
    for address in ["0000:00:06.0", "0000:00:07.0"] {
        let refused = tree.sysfs().function(address.parse().unwrap());
        assert!(matches!(refused, Err(PciError::Io { .. })), "{refused:?}");
    }
    assert_eq!(tree.sysfs().functions().unwrap().len(), 1);
    // An attribute, a directory below it, a table.
    let dir = tree.dir(DISK);
    fs::remove_file(dir.join("driver_override")).unwrap();
    symlink(outside.path().join("secret"), dir.join("driver_override")).unwrap();
    symlink(outside.path(), dir.join("elsewhere")).unwrap();
    fs::remove_file(tree.proc().join("swaps")).unwrap();
    symlink(outside.path().join("secret"), tree.proc().join("swaps")).unwrap();
    let info = info(&tree, DISK);
    assert_eq!(info.driver_override, None);
    assert!(tree.sysfs().table("swaps").is_empty());
}

#[test]
fn odd_names_are_left_out_and_an_odd_driver_is_not_one_to_go_back_to() {
    let tree = disk();
    let devices = tree.sys().join("bus/pci/devices");
    for name in ["0000:00:4.0", "pci:0000:00:04.0", "..;x", "0000:00:04.0 ", "-rf"] {
        fs::create_dir_all(devices.join(name)).unwrap();
    }
    assert_eq!(tree.sysfs().functions().unwrap().len(), 1);
    for target in ["..", "/", "a\nb"] {
        fs::remove_file(tree.dir(DISK).join("driver")).unwrap();
        symlink(target, tree.dir(DISK).join("driver")).unwrap();
        let info = info(&tree, DISK);
        assert_eq!(info.driver.as_deref(), Some("?"), "{target:?}");
        let options = crate::HandoverOptions { force: true, by: crate::By::Operator };
        let plan = crate::handover::plan_hand_over(&tree.sysfs(), info.address, Via::Uio, &options);
        assert!(matches!(plan, Err(PciError::Unusable { .. })), "{plan:?}");
    }
}

#[test]
fn a_tree_that_is_too_deep_to_look_at_counts_as_used() {
    let tree = disk();
    let mut deep = tree.dir(DISK);
    for _ in 0..40 {
        deep.push("x");
    }
    fs::create_dir_all(&deep).unwrap();
    assert_eq!(info(&tree, DISK).uses, [Use::Unknown]);
}

#[test]
fn a_fifo_in_place_of_an_attribute_holds_nobody_up() {
    let tree = disk();
    let path = tree.dir(DISK).join("vendor");
    fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
    assert_eq!(info(&tree, DISK).ids.vendor, 0xffff);
}
