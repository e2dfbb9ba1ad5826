//! The modern virtio transport over a claimed function (virtio 1.2, section 4.1). Legacy and transitional devices are refused.
//!
//! ```text
//! layout      capabilities in configuration space -> which part of which BAR is what, checked
//! part        a part of a BAR: nothing outside of it can be reached
//! common      common configuration: status, features, queues, vectors
//! fields      device configuration: how wide each of its fields is
//! bell        a queue's notification address
//! interrupts  MSI-X vectors or INTx to eventfds
//! memory      regions that the device may reach
//! open        what a function has to be, and its first reset
//! device      the transport: negotiate, map, set up, start
//! adopt       a device that runs, in the hands of another process
//! silence     reset that is waited for, and what is left to do where there is none
//! ```
//!
//! A function that was removed reads all ones (hardware) or zero (QEMU), and so may a register of one that is there. What was read counts only once `device_status`, read
//! after it, still has the bits that were written there; if it has not, the device is lost, whatever was read.
//!
//! Features that belong to the transport are decided here: `VIRTIO_F_ACCESS_PLATFORM` is accepted wherever it is offered (a device that offers it may insist), and only a
//! function behind an IOMMU that offers it is told I/O addresses. One that does not is behind no IOMMU whatever vfio says: QEMU lets it bypass it.

mod adopt;
mod bell;
mod common;
mod device;
mod fields;
mod interrupts;
mod layout;
mod memory;
mod open;
mod part;
mod silence;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub(crate) use adopt::State;
pub(crate) use device::VirtioPci;
