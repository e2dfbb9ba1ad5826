//! The machines: which devices, which arguments of the kernel.
//!
//! Where a device sits is fixed, and said a second time in `tests/vm/src/pci.rs`, which is how the scenarios find it. Disks on root ports can be unplugged; the last two ports are
//! free.
//!
//! `net0` and `net1` are the ends of one cable: what one sends, the other gets.

use std::path::Path;

/// One kind of machine.
pub(super) struct Topology {
    /// The name by which scenarios ask for it.
    pub(super) name: &'static str,
    /// Arguments of the kernel beside those of every machine.
    pub(super) kernel: &'static [&'static str],
    /// `-device` of each device that is not a disk.
    devices: &'static [&'static str],
    /// Consoles that are joined in pairs.
    consoles: &'static [(Console, Console)],
    /// Devices of the machine itself that go before all others.
    first: &'static [&'static str],
    disks: &'static [Disk],
}

/// A virtio-blk disk with a raw image of [`DISK_BYTES`].
struct Disk {
    id: &'static str,
    /// `virtio-blk-pci` with this.
    properties: &'static str,
    /// Whether the image is. The device says so.
    is_read_only: bool,
}

impl Disk {
    const fn new(id: &'static str, properties: &'static str) -> Disk {
        Disk { id, properties, is_read_only: false }
    }

    const fn read_only(self) -> Disk {
        Disk { is_read_only: true, ..self }
    }
}

/// A console device (virtio 1.2, section 5.3) with a console and a port that is none.
struct Console {
    id: &'static str,
    /// `virtio-serial-pci` with this.
    properties: &'static str,
}

/// `-device` of each port of a console, in the order of their numbers. QEMU drops what a `virtconsole` writes while nobody reads, and holds a `virtserialport` back.
const CONSOLE_PORTS: [&str; 2] = ["virtconsole", "virtserialport"];

/// Size of a disk.
const DISK_BYTES: u64 = 64 << 20;

/// Memory of a machine, 192 MiB of it hugepages without an IOMMU and 64 MiB with one.
pub(super) const MEMORY_MIB: u32 = 768;

/// The ends of the cable.
const CABLE: [&str; 2] = ["cable0", "cable1"];

/// The far end, which stays with the kernel.
const NET1: &str = "virtio-net-pci,id=net1,netdev=cable1,mac=52:54:00:00:00:11,host_mtu=9000,romfile=,bus=pcie.0,addr=0xc,disable-legacy=on";

/// QEMU's own network without a way out, for a card that is plugged in.
const USER: &str = "user,id=user0,restrict=on";

const PORTS: [&str; 4] = ["0x10", "0x11", "0x12", "0x13"];

/// All of them.
pub(super) const TOPOLOGIES: &[Topology] = &[
    Topology {
        name: "uio",
        kernel: &["hugepages=96"],
        first: &[],
        devices: &[
            "edu,id=edu0,bus=pcie.0,addr=0x5",
            "virtio-rng-pci,id=rng0,bus=pcie.0,addr=0x6",
            "virtio-net-pci,id=net0,netdev=cable0,mac=52:54:00:00:00:10,host_mtu=9000,romfile=,bus=pcie.0,addr=0xb,disable-legacy=on",
            NET1,
            "virtio-rng-pci,id=rng1,bus=pcie.0,addr=0xe,disable-legacy=on",
        ],
        consoles: &[(
            Console { id: "console0", properties: "bus=pcie.0,addr=0xd,disable-legacy=on" },
            Console { id: "console1", properties: "bus=pcie.0,addr=0xf,disable-legacy=on" },
        )],
        disks: &[
            Disk::new("disk0", "bus=port0,disable-legacy=on,num-queues=2"),
            Disk::new("disk1", "bus=port1,disable-legacy=on,num-queues=2"),
            Disk::new("legacy0", "bus=pcie.0,addr=0x4,disable-legacy=off"),
            Disk::new("suite0", "bus=pcie.0,addr=0xa,disable-legacy=on,num-queues=2"),
            Disk::new("plain0", "bus=pcie.0,addr=0x8,disable-legacy=on,indirect_desc=off,event_idx=off"),
            Disk::new("readonly0", "bus=pcie.0,addr=0x9,disable-legacy=on").read_only(),
        ],
    },
    Topology {
        name: "vfio",
        // The device that goes round the IOMMU needs huge pages.
        kernel: &["intel_iommu=on", "hugepages=32"],
        first: &["intel-iommu,intremap=on"],
        devices: &[
            "edu,id=edu0,bus=pcie.0,addr=0x5",
            "virtio-rng-pci,id=rng0,bus=pcie.0,addr=0x6",
            "virtio-net-pci,id=net0,netdev=cable0,mac=52:54:00:00:00:10,host_mtu=9000,romfile=,bus=pcie.0,addr=0xb,disable-legacy=on,iommu_platform=on",
            NET1,
            "virtio-rng-pci,id=rng1,bus=pcie.0,addr=0xe,disable-legacy=on,iommu_platform=on",
        ],
        consoles: &[(
            Console { id: "console0", properties: "bus=pcie.0,addr=0xd,disable-legacy=on,iommu_platform=on" },
            Console { id: "console1", properties: "bus=pcie.0,addr=0xf,disable-legacy=on" },
        )],
        disks: &[
            Disk::new("disk0", "bus=port0,disable-legacy=on,num-queues=2,iommu_platform=on"),
            Disk::new("disk1", "bus=port1,disable-legacy=on,num-queues=2,iommu_platform=on"),
            Disk::new("suite0", "bus=pcie.0,addr=0xa,disable-legacy=on,num-queues=2,iommu_platform=on"),
            Disk::new("bypass0", "bus=pcie.0,addr=0x7,disable-legacy=on"),
            Disk::new(
                "plain0",
                "bus=pcie.0,addr=0x8,disable-legacy=on,iommu_platform=on,indirect_desc=off,event_idx=off",
            ),
            Disk::new("readonly0", "bus=pcie.0,addr=0x9,disable-legacy=on,iommu_platform=on").read_only(),
        ],
    },
];

impl Topology {
    /// The one of this name.
    pub(super) fn named(name: &str) -> Option<&'static Topology> {
        TOPOLOGIES.iter().find(|topology| topology.name == name)
    }

    /// Makes the images in `folder`, empty, and gives QEMU's arguments for every device. Sockets go to `work`, whose path is short.
    pub(super) fn devices(&self, folder: &Path, work: &Path) -> std::io::Result<Vec<String>> {
        let mut arguments = Vec::new();
        let mut say = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        for device in self.first {
            say("-device", (*device).to_owned());
        }
        for (number, slot) in PORTS.iter().enumerate() {
            let chassis = number + 1;
            say(
                "-device",
                format!("pcie-root-port,id=port{number},chassis={chassis},slot={chassis},bus=pcie.0,addr={slot}"),
            );
        }
        std::fs::create_dir_all(folder)?;
        for Disk { id, properties, is_read_only } in self.disks {
            let image = folder.join(id).with_extension("raw");
            std::fs::File::create(&image)?.set_len(DISK_BYTES)?;
            // By `-blockdev`, so that the image outlives the device that is unplugged. QEMU splits values at commas, and takes two for one.
            let path = image.display().to_string().replace(',', ",,");
            let access = if *is_read_only { "on" } else { "off" };
            say(
                "-blockdev",
                format!("driver=raw,node-name={id},read-only={access},file.driver=file,file.filename={path}"),
            );
            say("-device", format!("virtio-blk-pci,id={id},drive={id},serial={id},{properties}"));
        }
        say("-netdev", USER.to_owned());
        // Datagrams, because QEMU 10.0 was seen to hang for good in what joins packets to a stream, when both its ends are its own.
        let [near, far] = CABLE.map(|end| (end, work.join(end).display().to_string()));
        for ((end, local), (_, remote)) in [(&near, &far), (&far, &near)] {
            say(
                "-netdev",
                format!("dgram,id={end},local.type=unix,local.path={local},remote.type=unix,remote.path={remote}"),
            );
        }
        for device in self.devices {
            say("-device", (*device).to_owned());
        }
        for (one, other) in self.consoles {
            // What one writes the other reads. A client connects when it is made, so the server comes first.
            for (Console { id, properties }, role) in [(one, ",server=on,wait=off"), (other, "")] {
                say("-device", format!("virtio-serial-pci,id={id},max_ports={},{properties}", CONSOLE_PORTS.len()));
                for (number, port) in CONSOLE_PORTS.iter().enumerate() {
                    let path = work.join(format!("{}.{number}", one.id));
                    say("-chardev", format!("socket,id={id}.{number},path={}{role}", path.display()));
                    let name = format!("org.cofferdam.{id}.{number}");
                    say("-device", format!("{port},bus={id}.0,nr={number},chardev={id}.{number},name={name}"));
                }
            }
        }
        Ok(arguments)
    }
}
