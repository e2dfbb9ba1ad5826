//! The device table of a driver: which devices it is for, in a custom section that is read without compiling or running anything.
//!
//! Who can forge it: whoever made the component. It decides which driver is *tried* for a device, never what a driver may do; the driver's `attach` and the grants of the load stand as
//! they are. Its form is documented where it is written, in the SDK (`guest-drivers/sdk/src/devices.rs`).

use std::fmt;

use cofferdam_device::FunctionIds;

use crate::error::LoadError;
use crate::world::check_preamble;

/// The custom section that holds the table.
const SECTION: &str = "cofferdam:devices";
/// Five little-endian words an entry.
const ENTRY_BYTES: usize = 20;
/// Most entries of one driver.
const MAX_ENTRIES: usize = 256;
/// A vendor or device that fits every function.
const ANY: u32 = u32::MAX;
/// A class has 24 bits.
const CLASS: u32 = 0xff_ffff;

/// One entry: a kind of device that the driver is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceId {
    /// Virtio devices with this id (virtio 1.2, section 5).
    Virtio(u32),
    /// PCI functions that are no virtio devices.
    Pci {
        /// Vendor; `None` fits every one.
        vendor: Option<u16>,
        /// Device; `None` fits every one.
        device: Option<u16>,
        /// Base class, subclass and programming interface: 24 bits.
        class: u32,
        /// Which bits of the class count.
        class_mask: u32,
    },
}

/// What a driver is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A virtio device with this id.
    Virtio(u32),
    /// A PCI function that is no virtio device.
    Function(FunctionIds),
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            DeviceId::Virtio(id) => write!(f, "virtio:{id}"),
            DeviceId::Pci { vendor, device, class, class_mask } => {
                let id = |id: Option<u16>| id.map_or_else(|| "*".to_owned(), |id| format!("{id:04x}"));
                write!(f, "pci:{}:{}", id(vendor), id(device))?;
                if class_mask != 0 { write!(f, " class {class:06x}/{class_mask:06x}") } else { Ok(()) }
            }
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::Virtio(id) => write!(f, "virtio:{id}"),
            Wanted::Function(ids) => write!(f, "pci:{:04x}:{:04x} class {:06x}", ids.vendor, ids.device, ids.class),
        }
    }
}

impl DeviceId {
    /// Whether `device` is of this kind.
    #[must_use]
    pub fn fits(&self, device: &Wanted) -> bool {
        match (*self, device) {
            (DeviceId::Virtio(id), Wanted::Virtio(other)) => id == *other,
            (DeviceId::Pci { vendor, device, class, class_mask }, Wanted::Function(ids)) => {
                vendor.is_none_or(|vendor| vendor == ids.vendor)
                    && device.is_none_or(|device| device == ids.device)
                    && (ids.class ^ class) & class_mask == 0
            }
            _ => false,
        }
    }

    fn decode(entry: &[u8]) -> Result<DeviceId, String> {
        let mut words =
            entry.chunks_exact(4).map(|word| word.iter().rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte)));
        let mut word = || words.next().unwrap_or_default();
        let (kind, first, second, class, class_mask) = (word(), word(), word(), word(), word());
        let id = |value: u32| match u16::try_from(value) {
            Ok(id) => Ok(Some(id)),
            Err(_) if value == ANY => Ok(None),
            Err(_) => Err(format!("{value:#x} is no PCI id")),
        };
        match kind {
            1 if (second, class, class_mask) == (0, 0, 0) => Ok(DeviceId::Virtio(first)),
            1 => Err("a virtio entry has a device id and nothing else".to_owned()),
            2 if class | class_mask > CLASS => Err(format!("class {class:#x}/{class_mask:#x} has more than 24 bits")),
            2 => Ok(DeviceId::Pci { vendor: id(first)?, device: id(second)?, class, class_mask }),
            other => Err(format!("{other:#x} is no kind of entry that this host knows")),
        }
    }
}

/// Reads the device table of a component, without compiling it: of its own custom sections and those of its core modules. Empty where there is none.
///
/// # Errors
/// [`LoadError::NotWasm`] and [`LoadError::CoreModule`] for what is no component, [`LoadError::Compile`] when its sections do not add up, [`LoadError::Devices`] when the table is
/// garbage or has more than 256 entries.
pub fn device_table(component: &[u8]) -> Result<Vec<DeviceId>, LoadError> {
    check_preamble(component)?;
    let mut table = Vec::new();
    for section in (Sections { rest: &component[8..] }) {
        let Section { id, contents } = section?;
        match id {
            0 => read(contents, &mut table)?,
            // A core module (component model binary format, section 1), with a preamble of its own. Components in components are not looked into: the SDK makes none.
            1 => {
                for section in (Sections { rest: contents.get(8..).unwrap_or_default() }) {
                    let Section { id, contents } = section?;
                    if id == 0 {
                        read(contents, &mut table)?;
                    }
                }
            }
            _ => {}
        }
    }
    Ok(table)
}

/// Adds what a custom section says, if it is a device table. Its form is that of the core specification, section 5.5.3: a name and the rest.
fn read(custom: &[u8], table: &mut Vec<DeviceId>) -> Result<(), LoadError> {
    let mut rest = custom;
    // A name that does not add up is none of ours; the compiler has its say about it.
    let Some(length) = leb128(&mut rest) else { return Ok(()) };
    let Some((name, entries)) = rest.split_at_checked(length as usize) else { return Ok(()) };
    if name != SECTION.as_bytes() {
        return Ok(());
    }
    let garbage = |why: String| Err(LoadError::Devices(why));
    if entries.is_empty() || !entries.len().is_multiple_of(ENTRY_BYTES) {
        return garbage(format!("{} bytes, which is no number of entries of {ENTRY_BYTES}", entries.len()));
    }
    if table.len() + entries.len() / ENTRY_BYTES > MAX_ENTRIES {
        return garbage(format!("more than {MAX_ENTRIES} entries"));
    }
    for (number, entry) in entries.chunks_exact(ENTRY_BYTES).enumerate() {
        match DeviceId::decode(entry) {
            Ok(id) => table.push(id),
            Err(why) => return garbage(format!("entry {number}: {why}")),
        }
    }
    Ok(())
}

struct Section<'a> {
    id: u8,
    contents: &'a [u8],
}

/// The sections of a module or component behind its preamble: an id, a length, and so many bytes. Ends with the first that does not add up.
struct Sections<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Sections<'a> {
    type Item = Result<Section<'a>, LoadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (&id, mut rest) = self.rest.split_first()?;
        let section = leb128(&mut rest).and_then(|length| rest.split_at_checked(length as usize));
        self.rest = section.map_or(&[], |(_, rest)| rest);
        let cut = || LoadError::Compile(format!("a section with the id {id} goes past the end"));
        Some(section.map(|(contents, _)| Section { id, contents }).ok_or_else(cut))
    }
}

/// An unsigned 32-bit number (core specification, section 5.2.2): at most five bytes.
fn leb128(bytes: &mut &[u8]) -> Option<u32> {
    let mut value = 0_u64;
    for shift in [0, 7, 14, 21, 28] {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return u32::try_from(value).ok();
        }
    }
    None
}
