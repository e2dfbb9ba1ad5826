//! Where the parts of the transport are, from the capabilities in configuration space (virtio 1.2, section 4.1.4; PCI Local Bus 3.0, section 6.7).
//!
//! A pure function of 256 bytes and the lengths of the BARs. The bytes are the device's word: a place counts when it is inside a memory BAR, long enough and aligned as
//! its section demands; the first such of each type is taken (section 4.1.4.2), what is reserved is passed over.

/// Bytes of configuration space that can hold capabilities of this kind.
pub(super) const CONFIG_BYTES: usize = 256;

/// Length of `struct virtio_pci_common_cfg` up to `queue_device` in bytes: what every device has (section 4.1.4.3).
const COMMON_BYTES: u32 = 56;

/// Capabilities that fit: each is a multiple of 4 bytes behind the header of 64.
const MOST_CAPABILITIES: usize = (CONFIG_BYTES - HEADER_BYTES as usize) / 4;
const HEADER_BYTES: u8 = 64;

/// Capability ids (PCI Code and ID Assignment).
const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;

/// `cfg_type` (section 4.1.4). 5, the window for accesses through configuration space, and 8, shared memory, are of no use here.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;
const DEVICE: u8 = 4;

/// A part of a memory BAR, inside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// 0 to 5.
    pub(super) bar: u8,
    /// Offset in the BAR in bytes.
    pub(super) first: u64,
    /// Length in bytes.
    pub(super) bytes: u64,
}

/// What a modern device has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Common configuration.
    pub(super) common: Place,
    /// Notification area.
    pub(super) notify: Place,
    /// Bytes from one notification address to the next; 0 or an even power of two.
    pub(super) notify_step: u32,
    /// ISR status.
    pub(super) isr: Place,
    /// Device configuration, where the type has one.
    pub(super) device: Option<Place>,
    /// Entries of the MSI-X table; 0 without one.
    pub(super) vectors: u16,
}

impl Layout {
    /// Walks the list. The error says what is missing or wrong, for an operator.
    pub(super) fn find(config: &[u8; CONFIG_BYTES], bar_bytes: &[u64; 6]) -> Result<Self, String> {
        if config[0x0e] & 0x7f != 0 {
            return Err("its configuration space is not that of a device (header type)".to_owned());
        }
        if config[0x06] & 0x10 == 0 {
            return Err("it has no capabilities, so it is no modern virtio device (virtio 1.2, section 4.1.4)".into());
        }
        let mut found = Found::default();
        let mut at = config[0x34] & 0xfc;
        let mut steps = 0;
        while at != 0 {
            if at < HEADER_BYTES {
                return Err(format!("its capability list leads into the header, to {at:#x}"));
            }
            // Nothing else than a circle has more.
            steps += 1;
            if steps > MOST_CAPABILITIES {
                return Err("its capability list runs in a circle".to_owned());
            }
            let capability = &config[usize::from(at)..];
            match capability[0] {
                VENDOR_SPECIFIC => found.virtio(capability, bar_bytes),
                MSIX if found.vectors == 0 => found.vectors = (word16(capability, 2) & 0x7ff) + 1,
                _ => {}
            }
            at = capability[1] & 0xfc;
        }
        found.layout()
    }
}

/// What the walk has come by.
#[derive(Default)]
struct Found {
    common: Option<Place>,
    notify: Option<(Place, u32)>,
    isr: Option<Place>,
    device: Option<Place>,
    vectors: u16,
    /// What was wrong with those that do not count.
    unusable: Vec<String>,
}

impl Found {
    /// `struct virtio_pci_cap`: cap_vndr, cap_next, cap_len, cfg_type, bar, id, padding, le32 offset, le32 length; for notifications le32 notify_off_multiplier.
    fn virtio(&mut self, capability: &[u8], bar_bytes: &[u64; 6]) {
        let (len, kind) = (usize::from(capability[2]), capability.get(3).copied().unwrap_or(0));
        let (name, least, align, taken) = match kind {
            COMMON => ("common configuration", COMMON_BYTES, 4, self.common.is_some()),
            NOTIFY => ("notifications", 2, 2, self.notify.is_some()),
            ISR => ("ISR status", 1, 1, self.isr.is_some()),
            DEVICE => ("device configuration", 1, 4, self.device.is_some()),
            _ => return,
        };
        if taken {
            return;
        }
        let needed = if kind == NOTIFY { 20 } else { 16 };
        if len < needed || len > capability.len() {
            self.unusable.push(format!("{name}: a capability of {len} bytes"));
            return;
        }
        let (bar, first, bytes) = (capability[4], word32(capability, 8), word32(capability, 12));
        // Reserved values are to be ignored (section 4.1.4.2).
        let Some(bar_bytes) = bar_bytes.get(usize::from(bar)) else { return };
        let inside = u64::from(first) + u64::from(bytes) <= *bar_bytes;
        if !inside || bytes < least || first % align != 0 {
            let why = format!("{name}: {bytes} bytes at {first:#x} of BAR {bar}, which has {bar_bytes}");
            self.unusable.push(why);
            return;
        }
        let place = Place { bar, first: u64::from(first), bytes: u64::from(bytes) };
        match kind {
            COMMON => self.common = Some(place),
            NOTIFY => {
                // Section 4.1.4.4.1. An odd one would make notification addresses that are not aligned.
                let step = word32(capability, 16);
                if step != 0 && (!step.is_power_of_two() || step == 1) {
                    self.unusable.push(format!("{name}: a multiplier of {step}"));
                } else {
                    self.notify = Some((place, step));
                }
            }
            ISR => self.isr = Some(place),
            _ => self.device = Some(place),
        }
    }

    fn layout(self) -> Result<Layout, String> {
        let missing = |name: &str| {
            let unusable: String = self.unusable.iter().take(4).map(|why| format!("; unusable: {why}")).collect();
            format!(
                "it has no capability for {name}, which a modern virtio device has (virtio 1.2, section 4.1.4){unusable}"
            )
        };
        let common = self.common.ok_or_else(|| missing("common configuration"))?;
        let (notify, notify_step) = self.notify.ok_or_else(|| missing("notifications"))?;
        let isr = self.isr.ok_or_else(|| missing("ISR status"))?;
        Ok(Layout { common, notify, notify_step, isr, device: self.device, vectors: self.vectors })
    }
}

/// Little-endian; zero past the end.
fn word16(from: &[u8], at: usize) -> u16 {
    from.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn word32(from: &[u8], at: usize) -> u32 {
    from.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}
