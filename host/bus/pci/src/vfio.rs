//! A function through `vfio-pci`: behind an IOMMU domain that holds its binding's memory and nothing else.
//!
//! ```text
//! ioctl     the calls, and all that is unsafe about them
//! iommu     container and group: who translates          iommufd   the same without groups
//! device    regions, interrupts, reset        msix      where the MSI-X table is, which is never mapped
//! open      from an address to a function     adopt     one that another process has opened
//! ```
//!
//! How it goes: `device_del`, an unbinding or a `remove` in sysfs signals the request eventfd, and the kernel waits until everything is closed; an error of the bus signals the error
//! eventfd; a function that was pulled out signals nothing, and vfio answers for much of its configuration space, so sysfs is asked.
//!
//! The last close of a function that is gone took the kernel over 70 s (it waits for resets), so that is done on a thread that nobody waits long for, and the function goes
//! back after it. What the function could reach is taken from the IOMMU before.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::dma::PAGE_BYTES;
use cofferdam_device::{DmaRegion, FunctionIds, RegionError, Silence, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio as v;

use self::device::{Device, Region};
use self::iommu::IommuBackend;
use self::msix::Table;
use crate::Address;
use crate::bounded::Bounded;
use crate::claimed::{self, Claimed, Interrupts, Reach};
use crate::config::ConfigSpace;
use crate::hugepages::{self, Hugepages};
use crate::registers::{Bar, Registers};
use crate::watch::{Line, Source, Watch};

mod adopt;
mod close;
mod device;
mod ioctl;
mod iommu;
mod iommufd;
mod msix;
mod open;

/// How long a release waits for the kernel to let the function go.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// What signals interrupts now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Wired {
    Nothing,
    Vectors,
    Line,
}

/// One function that `vfio-pci` is bound to.
pub(crate) struct VfioFunction {
    address: Address,
    ids: FunctionIds,
    /// `None` once it was released.
    held: Option<Held>,
    /// vfio's.
    config: ConfigSpace,
    /// The function's own, by sysfs.
    truth: ConfigSpace,
    msix_vectors: u16,
    has_line: bool,
    /// Of memory BARs.
    regions: [Region; 6],
    table: Option<Table>,
    bars: [Option<Arc<Bar>>; 6],
    wired: Wired,
    watch: Option<Watch>,
    hugepages: Option<Hugepages>,
    /// What the IOMMU has been told.
    mapped: Vec<Arc<DmaRegion>>,
    slow: Bounded,
    /// Another process has it, too, and is to go on with it or does already.
    dormant: bool,
}

/// In the order in which it is closed.
struct Held {
    device: Device,
    iommu: Box<dyn IommuBackend>,
    /// Signalled with INTx.
    line: Arc<OwnedFd>,
}

impl VfioFunction {
    fn held(&self) -> Result<&Held, TransportError> {
        self.held.as_ref().ok_or(TransportError::Lost)
    }

    /// No interrupt of the function signals anybody from now on.
    fn unwire(&mut self) -> Result<(), TransportError> {
        if let Some(watch) = &self.watch {
            watch.line().take();
        }
        let index = match self.wired {
            Wired::Nothing => return Ok(()),
            Wired::Vectors => v::VFIO_PCI_MSIX_IRQ_INDEX,
            Wired::Line => v::VFIO_PCI_INTX_IRQ_INDEX,
        };
        self.held()?.device.signal(index, &[]).map_err(io("VFIO_DEVICE_SET_IRQS"))?;
        self.wired = Wired::Nothing;
        Ok(())
    }

    fn wire_line(&mut self, line: Line) -> Result<(), TransportError> {
        if !self.has_line {
            return Err(TransportError::Refused(format!("{}: it has no interrupt line", self.address)));
        }
        let held = self.held()?;
        let watch = self.watch.as_ref().ok_or(TransportError::Lost)?;
        let eventfd = rustix::io::fcntl_dupfd_cloexec(&*held.line, 0).map_err(|errno| io("dup")(errno.into()))?;
        // What an earlier wiring may have left.
        let _ = rustix::io::read(&*held.line, &mut [0; 8]);
        *watch.line() = Some(line);
        held.device.signal(v::VFIO_PCI_INTX_IRQ_INDEX, &[eventfd]).map_err(io("VFIO_DEVICE_SET_IRQS"))?;
        self.wired = Wired::Line;
        Ok(())
    }

    /// The parts that a region is mapped in: offset, length, and I/O address.
    fn parts(region: &DmaRegion) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        let step = region.page_bytes().unwrap_or(region.len()).max(PAGE_BYTES);
        let offsets = (0..region.len()).step_by(usize::try_from(step).unwrap_or(usize::MAX));
        offsets.map(move |offset| (offset, step.min(region.len() - offset), region.address_of(offset)))
    }

    /// Takes `region` from the IOMMU: an error when it keeps any part.
    fn forget(&self, region: &DmaRegion) -> io::Result<()> {
        let held = self.held.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let mut outcome = Ok(());
        for (_, bytes, iova) in Self::parts(region) {
            let gone = held.iommu.unmap(iova, bytes);
            outcome = outcome.and(gone);
        }
        outcome
    }
}

fn io(what: &'static str) -> impl Fn(io::Error) -> TransportError {
    move |source| match source.raw_os_error() {
        Some(libc::ENODEV | libc::ENXIO) => TransportError::Lost,
        _ => TransportError::Io { what: what.to_owned(), source },
    }
}

impl Claimed for VfioFunction {
    fn address(&self) -> Address {
        self.address
    }

    fn by(&self) -> &'static str {
        "vfio"
    }

    fn ids(&self) -> FunctionIds {
        self.ids
    }

    fn read_config(&self, offset: u16, into: &mut [u8]) -> Result<(), TransportError> {
        self.config.read(offset, into)
    }

    fn bar(&mut self, index: u8) -> Result<Arc<dyn Registers>, TransportError> {
        let at = usize::from(index);
        if let Some(Some(bar)) = self.bars.get(at) {
            return Ok(Arc::clone(bar) as Arc<dyn Registers>);
        }
        let absent = || TransportError::Refused(format!("{}: it has no memory BAR {index}", self.address));
        let region = self.regions.get(at).filter(|region| region.bytes > 0).ok_or_else(absent)?;
        let table = self.table.filter(|table| table.bar == index).map(|table| table.place);
        let bar = self.held()?.device.bar(region, table).map_err(io("mmap a BAR"))?;
        let bar = Arc::new(bar);
        self.bars[at] = Some(Arc::clone(&bar));
        Ok(bar)
    }

    fn bar_bytes(&self) -> [u64; 6] {
        std::array::from_fn(|index| self.regions[index].bytes)
    }

    fn set_bus_master(&mut self, on: bool) -> Result<(), TransportError> {
        self.config.set_master(on)
    }

    fn msix_vectors(&self) -> u16 {
        self.msix_vectors
    }

    fn has_line(&self) -> bool {
        self.has_line
    }

    fn wire(&mut self, interrupts: Interrupts) -> Result<(), TransportError> {
        self.unwire()?;
        match interrupts {
            Interrupts::Vectors(vectors) if vectors.is_empty() => Ok(()),
            Interrupts::Vectors(vectors) if vectors.len() > usize::from(self.msix_vectors) => {
                let text = format!("{} vectors, and the function has {}", vectors.len(), self.msix_vectors);
                Err(TransportError::Refused(text))
            }
            Interrupts::Vectors(vectors) => {
                let device = &self.held()?.device;
                device.signal(v::VFIO_PCI_MSIX_IRQ_INDEX, &vectors).map_err(io("VFIO_DEVICE_SET_IRQS"))?;
                self.wired = Wired::Vectors;
                Ok(())
            }
            line => line.into_line().map_or(Ok(()), |line| self.wire_line(line)),
        }
    }

    fn unmask(&mut self) -> Result<(), TransportError> {
        if self.wired != Wired::Line {
            return Ok(());
        }
        self.held()?.device.unmask_line().map_err(io("unmask INTx"))
    }

    fn is_isolated(&self) -> bool {
        true
    }

    fn memory(&mut self, name: &str, bytes: u64, iova: u64, reach: Reach) -> Result<Arc<DmaRegion>, RegionError> {
        let io = |source| RegionError::Io { what: "making memory that a function can reach through vfio", source };
        if reach == Reach::Physical {
            let address = self.address;
            let pages = hugepages::found(&mut self.hugepages).map_err(io)?;
            return pages.memory(address, name, bytes).map(Arc::new);
        }
        let ranges = self.held.as_ref().map(|held| held.iommu.ranges()).unwrap_or_default();
        if !iommu::takes(ranges, iova, bytes) {
            let text = format!("the IOMMU does not take {bytes} bytes at {iova:#x}: it takes {ranges:x?}");
            return Err(io(io::Error::new(io::ErrorKind::InvalidInput, text)));
        }
        DmaRegion::new(name, bytes, iova).map(Arc::new)
    }

    fn map(&mut self, region: Arc<DmaRegion>) -> Result<(), TransportError> {
        let held = self.held()?;
        let mut done = Vec::new();
        for (offset, bytes, iova) in Self::parts(&region) {
            let takes = iommu::takes(held.iommu.ranges(), iova, bytes);
            let outcome = if takes {
                held.iommu.map(&region, offset, bytes, iova)
            } else {
                Err(io::Error::new(io::ErrorKind::InvalidInput, "the IOMMU does not take this address"))
            };
            let Err(source) = outcome else {
                done.push((iova, bytes));
                continue;
            };
            let stuck = done.iter().any(|(iova, bytes)| held.iommu.unmap(*iova, *bytes).is_err());
            if stuck {
                // The function can still reach a part of it.
                self.mapped.push(Arc::clone(&region));
            }
            let what = format!("{}: map {bytes} bytes at {iova:#x} in the IOMMU", self.address);
            return Err(TransportError::Io { what, source });
        }
        self.mapped.push(region);
        Ok(())
    }

    fn unmap(&mut self, iova: u64) -> Silence {
        let Some(at) = self.mapped.iter().position(|region| region.iova() == iova) else {
            return Silence::Confirmed;
        };
        // Scattered in pages: it was made for a function that goes round the IOMMU.
        if self.mapped[at].page_bytes().is_some() {
            let reason = format!("{}: it reaches memory at {iova:#x} without the IOMMU", self.address);
            return Silence::Unconfirmed { reason };
        }
        match self.forget(&self.mapped[at]) {
            Ok(()) => {
                self.mapped.swap_remove(at);
                Silence::Confirmed
            }
            Err(error) => Silence::Unconfirmed { reason: format!("{}: unmap {iova:#x}: {error}", self.address) },
        }
    }

    fn take_back(&mut self) -> Result<u64, TransportError> {
        if !self.is_absent() && self.config.is_master()? {
            return Err(TransportError::Invalid("the function may still write to that memory".to_owned()));
        }
        let address = self.address;
        let pages = hugepages::found(&mut self.hugepages);
        pages.and_then(|pages| pages.take_back(address)).map_err(io("taking back memory of an earlier process"))
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.watch.as_ref().map(Watch::event)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut fds: Vec<_> = self.truth.fd().into_iter().collect();
        if let Some(held) = &self.held {
            fds.extend([held.device.fd(), (*held.line).as_fd()]);
            fds.extend(held.iommu.descriptors());
        }
        fds.extend(self.watch.iter().flat_map(Watch::descriptors));
        fds
    }

    fn is_lost(&mut self) -> bool {
        let Some(watch) = &self.watch else { return true };
        if watch.is_lost() {
            return true;
        }
        let event = watch.event();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Never read, so that whoever polls it sees it too.
        matches!(poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&now)), Ok(1))
    }

    fn is_absent(&mut self) -> bool {
        let seen = self.watch.as_ref().is_some_and(Watch::is_absent);
        // While the kernel resets it, configuration space answers nobody in time.
        let absent = seen || (!self.slow.is_busy() && self.truth.is_absent());
        if absent {
            self.bars.iter().flatten().for_each(|bar| bar.revoke());
        }
        absent
    }

    fn reset(&mut self, deadline: Instant) -> Result<(), TransportError> {
        if self.is_absent() {
            return Err(TransportError::Lost);
        }
        let device = self.held()?.device.clone();
        match self.slow.run("vfio-reset", deadline, move || device.reset()) {
            Err(_) => Err(TransportError::Timeout),
            Ok(Err(error)) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY | libc::EOPNOTSUPP)) => {
                Err(TransportError::Unsupported(format!("{}: the kernel has no reset for it", self.address)))
            }
            // Seen while `device_del` waits for the function to be closed.
            Ok(Err(error)) if error.raw_os_error() == Some(libc::EAGAIN) => {
                Err(TransportError::Refused(format!("{}: the kernel has it in hand itself", self.address)))
            }
            Ok(outcome) => outcome.map_err(io("VFIO_DEVICE_RESET")),
        }
    }

    fn quiet(&mut self, _: Instant) -> Silence {
        if self.dormant {
            return Silence::Unconfirmed { reason: format!("{}: another process has it", self.address) };
        }
        if self.held.is_none() {
            return Silence::Confirmed;
        }
        let is_resetting = self.slow.is_busy();
        claimed::quiet(self, is_resetting)
    }

    fn release(&mut self) {
        self.release_then(Box::new(()));
    }

    fn release_then(&mut self, then: Box<dyn Send>) {
        if self.held.is_none() {
            return;
        }
        if self.dormant {
            // It is another process's: what the IOMMU has is for that one, and so are the pages.
            self.mapped.clear();
            self.hugepages = None;
        } else if let Silence::Unconfirmed { reason } = self.quiet(Instant::now()) {
            tracing::error!(reason, "a function is released that may still master the bus");
        }
        self.watch = None;
        for bar in self.bars.iter_mut().filter_map(Option::take) {
            bar.revoke();
        }
        for region in std::mem::take(&mut self.mapped) {
            if let Err(error) = self.forget(&region) {
                tracing::error!(%error, iova = region.iova(), "the IOMMU keeps a region: it is never freed");
                region.retire();
            }
        }
        if let Some(pages) = self.hugepages.take() {
            pages.remove_folder(self.address);
        }
        self.config.close();
        self.truth.close();
        if let Some(held) = self.held.take() {
            close::close(self.address, CLOSE_WITHIN, held, then);
        }
    }
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        self.release();
    }
}

/// The eventfd of INTx.
struct VfioSource {
    device: Device,
    line: Arc<OwnedFd>,
    truth: ConfigSpace,
}

impl Source for VfioSource {
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some((*self.line).as_fd())
    }

    fn take(&mut self) -> io::Result<bool> {
        Ok(rustix::io::read(&*self.line, &mut [0; 8]).is_ok())
    }

    fn rearm(&mut self) -> io::Result<()> {
        self.device.unmask_line()
    }

    fn is_absent(&mut self) -> bool {
        self.truth.is_absent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_is_mapped_in_one_part_or_page_by_page() {
        let region = DmaRegion::new("test", 3 * PAGE_BYTES, 0x10_0000).unwrap();
        assert_eq!(VfioFunction::parts(&region).collect::<Vec<_>>(), [(0, 3 * PAGE_BYTES, 0x10_0000)]);
        let folder = tempfile::tempdir().unwrap();
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(folder.path().join("pages"));
        let file = OwnedFd::from(file.unwrap());
        rustix::fs::ftruncate(&file, 2 * PAGE_BYTES).unwrap();
        let name = cofferdam_device::FileName {
            folder: std::fs::File::open(folder.path()).unwrap().into(),
            name: c"pages".to_owned(),
        };
        let addresses = |_| Ok(vec![0x9000, 0x4000]);
        let region = DmaRegion::in_pages(file, name, 2 * PAGE_BYTES, PAGE_BYTES, addresses).unwrap();
        let parts: Vec<_> = VfioFunction::parts(&region).collect();
        assert_eq!(parts, [(0, PAGE_BYTES, 0x9000), (PAGE_BYTES, PAGE_BYTES, 0x4000)]);
    }
}
