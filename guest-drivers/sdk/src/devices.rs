//! The device table: which devices a driver is for, for a host that looks for a driver by a device's id.
//!
//! It is metadata. A host reads it without running or compiling anything of the driver, and a driver that is named at the load need not list the device: `attach` decides.
//!
//! The export macros put it into the custom section [`SECTION`] of the core module, where it stays when a component is made of that. The section is a sequence of entries of
//! [`ENTRY_BYTES`] bytes, each five little-endian 32-bit words:
//!
//! | | kind | first | second | third | fourth |
//! | --- | --- | --- | --- | --- | --- |
//! | virtio | 1 | device id (virtio 1.2, section 5) | 0 | 0 | 0 |
//! | PCI | 2 | vendor, or [`ANY`] | device, or [`ANY`] | class, 24 bits | which bits of the class count |

/// The custom section that holds the table.
pub const SECTION: &str = "cofferdam:devices";
/// Bytes of one entry.
pub const ENTRY_BYTES: usize = 20;
/// Most entries of one driver.
pub const MAX_ENTRIES: usize = 256;
/// A PCI id that fits every function.
pub const ANY: u32 = u32::MAX;

/// One kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId([u32; 5]);

impl DeviceId {
    /// Virtio devices with this device id (virtio 1.2, section 5), whatever carries them.
    #[must_use]
    pub const fn virtio(id: u32) -> DeviceId {
        DeviceId([1, id, 0, 0, 0])
    }

    /// PCI functions of this vendor and device.
    #[must_use]
    pub const fn pci(vendor: u16, device: u16) -> DeviceId {
        DeviceId([2, vendor as u32, device as u32, 0, 0])
    }

    /// PCI functions of any vendor with this class (base class, subclass, programming interface: 24 bits), as far as the bits that are set in `mask` go: `0xffff00` leaves the
    /// programming interface open.
    #[must_use]
    pub const fn pci_class(class: u32, mask: u32) -> DeviceId {
        DeviceId([2, ANY, ANY, class, mask])
    }

    /// Of those, the ones of this vendor.
    #[must_use]
    pub const fn of_vendor(self, vendor: u16) -> DeviceId {
        let [kind, _, device, class, mask] = self.0;
        DeviceId([kind, vendor as u32, device, class, mask])
    }
}

/// A table as it stands in the section; `BYTES` is [`ENTRY_BYTES`] for each of `ids`. Evaluated when the driver is compiled: what is wrong stops the compiler.
#[doc(hidden)]
#[must_use]
pub const fn encode<const BYTES: usize>(ids: &[DeviceId]) -> [u8; BYTES] {
    assert!(BYTES == ids.len() * ENTRY_BYTES, "20 bytes for each id");
    assert!(!ids.is_empty(), "a driver is for some device");
    assert!(ids.len() <= MAX_ENTRIES, "at most 256 ids");
    let mut table = [0; BYTES];
    let mut at = 0;
    while at < BYTES {
        let word = ids[at / ENTRY_BYTES].0[at % ENTRY_BYTES / 4].to_le_bytes();
        table[at] = word[at % 4];
        at += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_five_little_endian_words_for_each_id() {
        const IDS: &[DeviceId] =
            &[DeviceId::virtio(4), DeviceId::pci(0x1234, 0x11e8), DeviceId::pci_class(0x01_0800, 0xff_ff00)];
        const TABLE: [u8; 60] = encode(IDS);
        let words: Vec<u32> = TABLE.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words[..5], [1, 4, 0, 0, 0]);
        assert_eq!(words[5..10], [2, 0x1234, 0x11e8, 0, 0]);
        assert_eq!(words[10..], [2, ANY, ANY, 0x01_0800, 0xff_ff00]);
        assert_eq!(DeviceId::pci_class(1, 2).of_vendor(3), DeviceId([2, 3, ANY, 1, 2]));
    }

    #[test]
    #[should_panic(expected = "for some device")]
    fn an_empty_table_is_refused() {
        let _: [u8; 0] = encode(&[]);
    }
}
