//! What uio and vfio have in common: one function that this process has, and nobody else.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::{DmaRegion, FunctionIds, NotExportable, RegionError, Silence, TransportError};

use crate::Address;
use crate::adopt::{Pages, Parcel};
use crate::registers::Registers;
use crate::watch::Line;

/// Where the addresses that a function is told lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Through the IOMMU: any address that was mapped.
    Iommu,
    /// Physical memory as it is: uio, and a virtio device behind vfio that does not offer `VIRTIO_F_ACCESS_PLATFORM`.
    Physical,
}

/// How interrupts reach eventfds.
pub(crate) enum Interrupts {
    /// MSI-X: vector `n` signals eventfd `n` (non-blocking, owned by the kernel's table from then on; these are duplicates). At most [`Claimed::msix_vectors`].
    Vectors(Vec<OwnedFd>),
    /// INTx, level-triggered and perhaps shared: `acknowledge` is asked whenever the line was asserted, takes the function's reason away (virtio: reads the ISR status, virtio
    /// 1.2 section 4.1.4.5) and answers whether there was one; then every eventfd is signalled. It must not block.
    Line {
        /// Asks the function.
        acknowledge: Box<dyn FnMut() -> bool + Send>,
        /// Non-blocking eventfds.
        signal: Vec<OwnedFd>,
    },
    /// INTx of a function that only its driver can acknowledge: `signal` is signalled once, and the line stays masked until [`Claimed::unmask`].
    Masked {
        /// A non-blocking eventfd.
        signal: OwnedFd,
    },
}

impl Interrupts {
    /// What the thread of a function is told, where it is the one that takes them.
    pub(crate) fn into_line(self) -> Option<Line> {
        match self {
            Interrupts::Vectors(_) => None,
            Interrupts::Line { acknowledge, signal } => Some(Line { acknowledge: Some(acknowledge), signal }),
            Interrupts::Masked { signal } => Some(Line { acknowledge: None, signal: vec![signal] }),
        }
    }
}

/// What another process needs to go on with a function as it runs: see [`crate::adopt`].
pub(crate) trait Exportable {
    /// Whether another process could go on with the function as it runs.
    ///
    /// # Errors
    /// [`NotExportable`]: what is in the way.
    fn exportable(&self) -> Result<(), NotExportable>;

    /// Duplicates of all that is open, for another process to go on with. From here on until `resume` nobody here takes an interrupt or notices anything, and `release` closes
    /// descriptors and does nothing that the function, the kernel's driver or the other process could notice.
    ///
    /// # Errors
    /// [`NotExportable`]; then `resume` has to follow.
    fn export(&mut self) -> Result<Parcel, NotExportable>;

    /// After `export`, or of a function that was adopted: this process has it. Interrupts are taken, and what came meanwhile is found; `line` is what `wire` is given for INTx, where it
    /// was wired so.
    fn resume(&mut self, line: Option<Interrupts>);

    /// Of a function that was adopted: its region in named hugepages behind `file`.
    ///
    /// # Errors
    /// `RegionError`, also when the pages are not where the function was told that they are.
    fn adopt_pages(&mut self, file: OwnedFd, pages: &Pages) -> Result<Arc<DmaRegion>, RegionError>;

    /// Of the same: keeps a region that the function reaches already.
    fn adopt_memory(&mut self, region: Arc<DmaRegion>);
}

/// One function, claimed. Everything is bounded in time; `quiet` and `release` are always legal and idempotent.
pub(crate) trait Claimed: Exportable + Send {
    /// Where it is.
    fn address(&self) -> Address;

    /// `"uio"` or `"vfio"`.
    fn by(&self) -> &'static str;

    /// Vendor, device and so on, as sysfs has them.
    fn ids(&self) -> FunctionIds;

    /// Reads configuration space (little-endian) at `offset` into all of `into`.
    ///
    /// # Errors
    /// `Lost` when the function is gone, `Invalid` outside of its configuration space.
    fn read_config(&self, offset: u16, into: &mut [u8]) -> Result<(), TransportError>;

    /// Maps memory BAR `index`, or gives it again.
    ///
    /// # Errors
    /// `Refused` for one that is not there, is I/O, or cannot be mapped.
    fn bar(&mut self, index: u8) -> Result<Arc<dyn Registers>, TransportError>;

    /// Lengths in bytes of the memory BARs: 0 for one that is not there or is I/O.
    fn bar_bytes(&self) -> [u64; 6];

    /// Bus mastering (PCI 3.0, section 6.2.2, command register bit 2).
    ///
    /// # Errors
    /// `TransportError`.
    fn set_bus_master(&mut self, on: bool) -> Result<(), TransportError>;

    /// MSI-X vectors that it may use; 0 where only INTx is to be had.
    fn msix_vectors(&self) -> u16;

    /// Whether the function has an INTx pin (PCI 3.0, section 6.2.4, Interrupt Pin) that can be used.
    fn has_line(&self) -> bool;

    /// Wires interrupts. Called again, it replaces what was wired before.
    ///
    /// # Errors
    /// `Refused` for what the function does not have.
    fn wire(&mut self, interrupts: Interrupts) -> Result<(), TransportError>;

    /// Lets the line of [`Interrupts::Masked`] assert again, after the driver has taken the function's reason away. Does nothing for the others.
    ///
    /// # Errors
    /// `TransportError`.
    fn unmask(&mut self) -> Result<(), TransportError> {
        Ok(())
    }

    /// Whether an IOMMU keeps the function to what was mapped: vfio with a domain of its own, never uio.
    fn is_isolated(&self) -> bool;

    /// Memory that the function can reach once it is mapped: at `iova` with [`Reach::Iommu`] (`Refused` where there is none), else in named hugepages.
    ///
    /// # Errors
    /// `RegionError`; without enough hugepages its text says how many are needed and the command.
    fn memory(&mut self, name: &str, bytes: u64, iova: u64, reach: Reach) -> Result<Arc<DmaRegion>, RegionError>;

    /// Maps a region that `memory` made (vfio: in the IOMMU, at its address or, for [`Reach::Physical`], page by page at its physical addresses), and keeps it alive.
    ///
    /// # Errors
    /// `TransportError`.
    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError>;

    /// Takes a region back while the function runs: confirmed where an IOMMU was told, unconfirmed elsewhere.
    fn unmap(&mut self, iova: u64) -> Silence;

    /// Removes the memory in hugepages that an earlier process left for this function, and answers how many bytes that were. The caller has reset the function and has confirmed
    /// it (virtio: status 0 read back, which nobody here can see); that it masters no bus is looked at again here. Before the first [`Claimed::memory`].
    ///
    /// # Errors
    /// `Invalid` while it masters the bus or this process has such memory, `Io` where no hugetlbfs can be looked at.
    fn take_back(&mut self) -> Result<u64, TransportError> {
        Ok(0)
    }

    /// Readable or hung up when the function may be on its way out.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// What it holds open and nobody else in this process does, beside what `wire` was given. A certificate looks for them by the names that the kernel shows in /proc, and those of
    /// what every binding opens for itself (vfio's container, /dev/iommu, the mount of hugetlbfs) would be found for as long as there is another binding.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>>;

    /// Whether the function is gone or has been asked for (vfio's request eventfd), whatever its registers read. Never blocks.
    fn is_lost(&mut self) -> bool;

    /// Whether it is known to be out of the machine: its configuration space answers nobody. Such a function masters no bus.
    fn is_absent(&mut self) -> bool;

    /// Resets the function (FLR or whatever the kernel has for it) and waits for it until `deadline`.
    ///
    /// # Errors
    /// `Unsupported` where it has no reset, `Timeout`.
    fn reset(&mut self, deadline: Instant) -> Result<(), TransportError>;

    /// Interrupts off, bus mastering off and confirmed by reading it back; an absent function is quiet.
    fn quiet(&mut self, deadline: Instant) -> Silence;

    /// Closes everything. Holds no region afterwards.
    fn release(&mut self);

    /// As [`Claimed::release`], and drops `then` when the kernel has let the function go: at once, or later where the kernel takes longer than anybody can wait.
    fn release_then(&mut self, then: Box<dyn Send>) {
        self.release();
        drop(then);
    }
}

/// [`Claimed::quiet`] of a function that is open. `is_resetting`: the kernel still resets it, and its configuration space answers nobody in time.
pub(crate) fn quiet(function: &mut dyn Claimed, is_resetting: bool) -> Silence {
    if function.is_absent() {
        return Silence::Confirmed;
    }
    let address = function.address();
    if is_resetting {
        return Silence::Unconfirmed { reason: format!("{address}: the kernel is still resetting it") };
    }
    let unwired = function.wire(Interrupts::Vectors(Vec::new()));
    match unwired.and_then(|()| function.set_bus_master(false)) {
        Ok(()) => Silence::Confirmed,
        Err(_) if function.is_absent() => Silence::Confirmed,
        Err(error) => Silence::Unconfirmed { reason: format!("{address}: {error}") },
    }
}
