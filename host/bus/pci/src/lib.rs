//! PCI functions as devices, over the kernel's `uio_pci_generic` and `vfio-pci`.
//!
//! ```text
//! address     0000:00:04.0
//! sysfs       functions and what the kernel says of them, read through /sys opened as a capability
//! handover    from the kernel's driver to uio or vfio and back, recorded so that an interruption loses nothing
//! connect     from an address to a device; lease: and back
//! claim       one binding per function, over the whole host
//! claimed     what uio and vfio have in common: configuration space, BARs, interrupts, memory, removal, reset
//! registers   mapped BARs: volatile accesses that are checked
//! uio         /dev/uioN, INTx, hugepages with physical addresses
//! vfio        container and group, or iommufd; MSI-X eventfds; an IOMMU domain that holds the binding's memory and nothing else
//! adopt       a function that runs, in the hands of another process
//! virtio      the modern virtio transport over a claimed function (virtio 1.2, section 4.1)
//! raw         a function that its driver programs itself
//! ```
//!
//! Whatever a function, its configuration space or its registers say is an allegation: offsets and lengths are checked against the BAR before anything is mapped, and
//! a function that is gone is removal and not data, whether its registers read all ones (hardware) or zero (QEMU).

mod address;
mod adopt;
mod attributes;
mod bounded;
mod claim;
mod claimed;
mod config;
mod connect;
mod error;
mod hugepages;
mod lease;
mod mmio;
mod raw;
mod registers;
mod uio;
mod vfio;
mod virtio;
mod watch;

pub mod handover;
pub mod sysfs;

pub use address::Address;
pub use adopt::{KIND, adopt};
pub use claim::{Claim, Claimant};
pub use connect::connect;
pub use error::PciError;
pub use handover::{By, HandoverOptions, Via, give_back, hand_over};
pub use sysfs::{FunctionInfo, Roots, Sysfs};
