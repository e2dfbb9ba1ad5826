//! One function.

use cap_std::fs::Dir;
use cofferdam_device::FunctionIds;

use super::{Sysfs, Usability, Use, attribute, class, is_name, link_name, list, sysfs_address, usable};
use crate::{Address, PciError, Via};

/// Most members of an IOMMU group that are looked at.
const MAX_MEMBERS: usize = 1024;

/// A function as the kernel describes it.
#[derive(Clone, Debug)]
pub struct FunctionInfo {
    /// Where it is.
    pub address: Address,
    /// What it says that it is; all ones where the kernel does not say.
    pub ids: FunctionIds,
    /// The kernel driver that has it.
    pub driver: Option<String>,
    /// The only driver that may have it, where somebody has said so.
    pub driver_override: Option<String>,
    /// Its IOMMU group; `None` without an IOMMU.
    pub group: Option<Group>,
    /// Its base address registers.
    pub bars: [Bar; 6],
    /// Whether the kernel has a reset for it.
    pub has_reset: bool,
    /// Whether uio and vfio can have it.
    pub usable: Usability,
    /// What the kernel does with it now, as far as the tables of this process's namespaces show it.
    pub uses: Vec<Use>,
}

impl FunctionInfo {
    /// Its class in words.
    #[must_use]
    pub fn class_words(&self) -> &'static str {
        class::words(self.ids.class)
    }

    /// The virtio device id (virtio 1.2, section 4.1.2), if its ids are those of a virtio device; of a transitional one, which is not driven, too.
    #[must_use]
    pub fn virtio_type(&self) -> Option<u32> {
        match (self.ids.vendor, self.ids.device) {
            (0x1af4, modern @ 0x1041..=0x107f) => Some(u32::from(modern - 0x1040)),
            // Section 4.1.2.1.
            (0x1af4, 0x1000..=0x103f) => Some(u32::from(self.ids.subsystem)),
            _ => None,
        }
    }

    /// Whether it is a bridge, which is not for binding.
    #[must_use]
    pub fn is_bridge(&self) -> bool {
        class::is_bridge(self.ids.class)
    }

    /// What takes it when nobody says: vfio where that is possible, else uio.
    #[must_use]
    pub fn preferred(&self) -> Option<Via> {
        [Via::Vfio, Via::Uio].into_iter().find(|via| self.usable.of(*via).is_possible())
    }
}

/// A base address register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bar {
    /// Its length in bytes; 0 where there is none.
    pub bytes: u64,
    /// Whether it is I/O space and not memory.
    pub is_io: bool,
}

/// An IOMMU group: functions that the IOMMU cannot keep apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub number: u32,
    /// How its default domain treats addresses: `DMA`, `DMA-FQ`, `identity`.
    pub kind: Option<String>,
    /// The other members; at most 1,024.
    pub others: Vec<Member>,
}

/// Another member of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name in sysfs: an address, if it is a PCI function.
    pub name: String,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Whether it is a bridge.
    pub is_bridge: bool,
}

pub(super) fn read(sysfs: &Sysfs, address: Address) -> Result<FunctionInfo, PciError> {
    let dir = sysfs.function_dir(address)?;
    let ids = FunctionIds {
        vendor: number(&dir, "vendor").unwrap_or(u16::MAX),
        device: number(&dir, "device").unwrap_or(u16::MAX),
        subsystem_vendor: number(&dir, "subsystem_vendor").unwrap_or(u16::MAX),
        subsystem: number(&dir, "subsystem_device").unwrap_or(u16::MAX),
        class: number(&dir, "class").filter(|class: &u32| *class <= 0xff_ffff).unwrap_or(0xff_ffff),
        revision: number(&dir, "revision").unwrap_or(u8::MAX),
    };
    let group = link_name(&dir, "iommu_group").and_then(|name| name.parse().ok());
    let mut info = FunctionInfo {
        address,
        ids,
        driver: link_name(&dir, "driver"),
        driver_override: attribute(&dir, "driver_override").filter(|name| name != "(null)" && is_name(name)),
        group: group.map(|number| read_group(sysfs, number, address)),
        bars: bars(&attribute(&dir, "resource").unwrap_or_default()),
        has_reset: dir.symlink_metadata("reset").is_ok_and(|found| found.is_file()),
        usable: Usability::default(),
        uses: Vec::new(),
    };
    info.usable = usable::judge(sysfs, &info);
    if !info.is_bridge() {
        info.uses = sysfs.uses(address, false);
    }
    Ok(info)
}

/// A number as sysfs writes it: hexadecimal behind 0x.
fn number<T: TryFrom<u64>>(dir: &Dir, name: &str) -> Option<T> {
    hex(&attribute(dir, name)?)
}

fn hex<T: TryFrom<u64>>(text: &str) -> Option<T> {
    let digits = text.strip_prefix("0x").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    T::try_from(u64::from_str_radix(digits, 16).ok()?).ok()
}

/// The first six lines of `resource`: first byte, last byte, flags (linux/ioport.h: 0x100 I/O).
fn bars(text: &str) -> [Bar; 6] {
    let mut bars = [Bar::default(); 6];
    for (bar, line) in bars.iter_mut().zip(text.lines()) {
        let words: Vec<Option<u64>> = line.split_whitespace().map(hex).collect();
        if let [Some(first), Some(last), Some(flags)] = words[..]
            && flags != 0
            && let Some(bytes) = last.checked_sub(first).and_then(|bytes| bytes.checked_add(1))
        {
            *bar = Bar { bytes, is_io: flags & 0x100 != 0 };
        }
    }
    bars
}

fn read_group(sysfs: &Sysfs, number: u32, but: Address) -> Group {
    let below = format!("kernel/iommu_groups/{number}");
    let names = list(&sysfs.sys, format!("{below}/devices"), MAX_MEMBERS).map(|(names, _)| names).unwrap_or_default();
    let but = but.to_string();
    let member = |name: String| {
        let dir = sysfs.sys.open_dir(format!("{below}/devices/{name}")).ok();
        let class = dir.as_ref().and_then(|dir| self::number::<u32>(dir, "class"));
        Member {
            driver: dir.as_ref().and_then(|dir| link_name(dir, "driver")),
            is_bridge: sysfs_address(&name).is_some() && class.is_some_and(class::is_bridge),
            name,
        }
    };
    Group {
        number,
        kind: attribute(&sysfs.sys, format!("{below}/type")),
        others: names.into_iter().filter(|name| *name != but).map(member).collect(),
    }
}
