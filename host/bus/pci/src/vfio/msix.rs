//! Where the MSI-X table of a function is. It is the kernel's to write: what shares a page with it is reached by asking the kernel.

use cofferdam_device::TransportError;

use crate::config::ConfigSpace;

/// MSI-X capability (PCI 3.0, section 6.8.2).
const MSIX: u8 = 0x11;

/// The MSI-X table (PCI 3.0, section 6.8.2.3 and 6.8.2.4), as the function says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) bar: u8,
    /// Offset and length in bytes.
    pub(super) place: (u64, u64),
}

/// Where the function says that its MSI-X table is.
pub(super) fn table(config: &ConfigSpace) -> Result<Option<Table>, TransportError> {
    let Some(at) = config.capability(MSIX)? else { return Ok(None) };
    let mut words = [0; 8];
    config.read(at, &mut words)?;
    let entries = u64::from(u16::from_le_bytes([words[2], words[3]]) & 0x7ff) + 1;
    let place = u32::from_le_bytes([words[4], words[5], words[6], words[7]]);
    Ok(Some(Table { bar: (place & 7) as u8, place: (u64::from(place & !7), entries * 16) }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn space(content: &[(u64, &[u8])]) -> ConfigSpace {
        let file = rustix::fs::memfd_create("config", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 256).unwrap();
        for (at, bytes) in content {
            rustix::io::pwrite(&file, bytes, *at).unwrap();
        }
        ConfigSpace::new(Arc::new(file), 0, 256)
    }

    #[test]
    fn the_msix_table_is_where_its_capability_says() {
        assert_eq!(table(&space(&[])).unwrap(), None);
        // Three vectors, enabled; BAR 4 from 0x2000 on.
        let said = [MSIX, 0, 2, 0x80, 0x04, 0x20, 0, 0];
        let found = table(&space(&[(0x34, &[0x98]), (0x98, &said)])).unwrap();
        assert_eq!(found, Some(Table { bar: 4, place: (0x2000, 48) }));
        let end = space(&[(0x34, &[0xfc]), (0xfc, &[MSIX, 0, 0, 0])]);
        assert!(matches!(table(&end), Err(TransportError::Invalid(_))), "it would end outside");
    }
}
