//! Class codes in words (PCI Code and ID Assignment Specification, section 1).

/// Base class of bridges.
const BRIDGE: u32 = 0x06;

/// Whether a class is a bridge's. Bridges carry other functions and are not for binding.
pub(super) fn is_bridge(class: u32) -> bool {
    class >> 16 == BRIDGE
}

/// The class in words; for one that is not known, its base class.
pub(super) fn words(class: u32) -> &'static str {
    match (class >> 8) & 0xffff {
        0x0100 => "SCSI storage",
        0x0101 => "IDE storage",
        0x0104 => "RAID storage",
        0x0106 => "SATA storage",
        0x0107 => "SAS storage",
        0x0108 => "NVM Express storage",
        0x0200 => "Ethernet",
        0x0207 => "InfiniBand",
        0x0300 => "VGA display",
        0x0302 => "3D display",
        0x0401 | 0x0403 => "audio",
        0x0500 => "RAM",
        0x0600 => "host bridge",
        0x0601 => "ISA bridge",
        0x0604 | 0x0609 => "PCI bridge",
        0x0700 => "serial port",
        0x0780 => "communication",
        0x0805 => "SD host",
        0x0806 => "IOMMU",
        0x0c03 => "USB host",
        0x0c05 => "SMBus",
        other => match other >> 8 {
            0x00 => "unclassified",
            0x01 => "storage",
            0x02 => "network",
            0x03 => "display",
            0x04 => "multimedia",
            0x05 => "memory",
            0x06 => "bridge",
            0x07 => "communication",
            0x08 => "system",
            0x09 => "input",
            0x0b => "processor",
            0x0c => "serial bus",
            0x0d => "wireless",
            0x10 => "encryption",
            0x11 => "signal processing",
            0x12 => "accelerator",
            _ => "other",
        },
    }
}
