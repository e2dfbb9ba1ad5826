//! The descriptor of one function behind vfio: its regions, its interrupts, its reset.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio as v;

use super::ioctl::{self, Argument, Plain, Request};
use crate::mmio::{Mmio, page_bytes};
use crate::registers::{Bar, Rest, Window};

/// A range of the descriptor: a BAR, or configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    /// Where it begins in the descriptor.
    pub(super) offset: u64,
    /// Its length in bytes; 0 for one that is not there.
    pub(super) bytes: u64,
    /// What of it can be mapped: offset and length in bytes.
    mappable: Vec<(u64, u64)>,
}

/// The function.
#[derive(Clone, Debug)]
pub(super) struct Device(Arc<OwnedFd>);

impl Device {
    /// Takes over what vfio gave.
    ///
    /// # Errors
    /// When it is no PCI function.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let mut info = Argument::new(size_of::<v::vfio_device_info>());
        info.call(fd.as_fd(), Request::DeviceInfo)?;
        if info.u32(offset_of!(v::vfio_device_info, flags)) & v::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no PCI function"));
        }
        Ok(Self(Arc::new(fd)))
    }

    /// The descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        (*self.0).as_fd()
    }

    /// The descriptor, shared.
    pub(super) fn share(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Region `index` (`VFIO_PCI_BAR0_REGION_INDEX` and so on).
    pub(super) fn region(&self, index: u32) -> io::Result<Region> {
        let mut info = Argument::new(size_of::<v::vfio_region_info>());
        info.set_u32(offset_of!(v::vfio_region_info, index), index);
        Ok(parse_region(&info.call_for_all(self.fd(), Request::RegionInfo)?))
    }

    /// BAR `region`, of which `table` (offset and length in bytes) is never mapped: the MSI-X table is the kernel's to write.
    pub(super) fn bar(&self, region: &Region, table: Option<(u64, u64)>) -> io::Result<Bar> {
        let mut windows = Vec::new();
        for (offset, bytes) in cut(region, table, page_bytes()) {
            let place = region.offset.checked_add(offset).ok_or(io::ErrorKind::InvalidData)?;
            windows.push(Window { offset, registers: Mmio::map(self.fd(), place, 0, bytes)? });
        }
        Ok(Bar::new(region.bytes, windows, Some(Rest { file: self.share(), offset: region.offset })))
    }

    /// How many interrupts of kind `index` (`VFIO_PCI_MSIX_IRQ_INDEX` and so on) it has that can signal eventfds.
    pub(super) fn interrupts(&self, index: u32) -> io::Result<u32> {
        type Info = v::vfio_irq_info;
        let mut info = Argument::new(size_of::<Info>());
        info.set_u32(offset_of!(Info, index), index);
        match info.call(self.fd(), Request::IrqInfo) {
            // Kinds that it has not, as the error interrupt of a function that is not PCI Express.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(0),
            answer => answer?,
        }
        let usable = info.u32(offset_of!(Info, flags)) & v::VFIO_IRQ_INFO_EVENTFD != 0;
        Ok(if usable { info.u32(offset_of!(Info, count)) } else { 0 })
    }

    /// Interrupt `n` of kind `index` signals eventfd `n` from now on; without eventfds, none of them signals any. The kernel keeps what is behind them.
    pub(super) fn signal(&self, index: u32, eventfds: &[OwnedFd]) -> io::Result<()> {
        type Set = v::vfio_irq_set;
        let head = offset_of!(Set, data);
        let mut set = Argument::new(head + 4 * eventfds.len());
        let data = if eventfds.is_empty() { v::VFIO_IRQ_SET_DATA_NONE } else { v::VFIO_IRQ_SET_DATA_EVENTFD };
        set.set_u32(offset_of!(Set, flags), data | v::VFIO_IRQ_SET_ACTION_TRIGGER);
        set.set_u32(offset_of!(Set, index), index);
        set.set_u32(offset_of!(Set, count), eventfds.len() as u32);
        for (eventfd, at) in eventfds.iter().zip((head..).step_by(4)) {
            set.set_u32(at, eventfd.as_raw_fd() as u32);
        }
        set.call(self.fd(), Request::SetIrqs)
    }

    /// Lets INTx assert again, which the kernel masked when it signalled.
    pub(super) fn unmask_line(&self) -> io::Result<()> {
        type Set = v::vfio_irq_set;
        let mut set = Argument::new(offset_of!(Set, data));
        set.set_u32(offset_of!(Set, flags), v::VFIO_IRQ_SET_DATA_NONE | v::VFIO_IRQ_SET_ACTION_UNMASK);
        set.set_u32(offset_of!(Set, index), v::VFIO_PCI_INTX_IRQ_INDEX);
        set.set_u32(offset_of!(Set, count), 1);
        set.call(self.fd(), Request::SetIrqs)
    }

    /// Resets it; may take as long as the kernel likes.
    pub(super) fn reset(&self) -> io::Result<()> {
        ioctl::plain(self.fd(), Plain::Reset).map(drop)
    }
}

fn parse_region(info: &Argument) -> Region {
    type Info = v::vfio_region_info;
    type Sparse = v::vfio_region_info_cap_sparse_mmap;
    let flags = info.u32(offset_of!(Info, flags));
    let has = |flag| flags & flag != 0;
    let mut region = Region { offset: info.u64(offset_of!(Info, offset)), ..Region::default() };
    if !has(v::VFIO_REGION_INFO_FLAG_READ) || !has(v::VFIO_REGION_INFO_FLAG_WRITE) {
        return region;
    }
    region.bytes = info.u64(offset_of!(Info, size));
    if !has(v::VFIO_REGION_INFO_FLAG_MMAP) {
        return region;
    }
    let first = if has(v::VFIO_REGION_INFO_FLAG_CAPS) { info.u32(offset_of!(Info, cap_offset)) } else { 0 };
    match info.capabilities(first, v::VFIO_REGION_INFO_CAP_SPARSE_MMAP).first() {
        None => region.mappable.push((0, region.bytes)),
        Some(at) => {
            let count = info.u32(at + offset_of!(Sparse, nr_areas)) as usize;
            // More than fit read as empty.
            let areas = (0..count.min(64)).map(|index| at + size_of::<Sparse>() + 16 * index);
            region.mappable.extend(areas.map(|at| (info.u64(at), info.u64(at + 8))));
        }
    }
    region
}

/// What is mapped of a region: what can be, in whole pages, without the pages of `table` and nothing outside. What the kernel says wrong is cut off.
fn cut(region: &Region, table: Option<(u64, u64)>, page: u64) -> Vec<(u64, u64)> {
    let hole = table.map(|(start, bytes)| {
        let end = start.saturating_add(bytes);
        (start - start % page, end.checked_next_multiple_of(page).unwrap_or(u64::MAX))
    });
    let mut parts = Vec::new();
    for (start, bytes) in &region.mappable {
        let Some(start) = start.checked_next_multiple_of(page) else { continue };
        let end = start.saturating_add(*bytes).min(region.bytes);
        match hole {
            Some((first, last)) if first < end && last > start => parts.extend([(start, first), (last, end)]),
            _ => parts.push((start, end)),
        }
    }
    // A mapping is of whole pages, so only the end of the region may be within one (it is alone in it: vfio sees to that).
    let whole = |(start, end): (u64, u64)| (start, if end == region.bytes { end } else { end - end % page });
    parts.into_iter().map(whole).filter(|(start, end)| start < end).map(|(start, end)| (start, end - start)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(bytes: u64, mappable: &[(u64, u64)]) -> Region {
        Region { offset: 0, bytes, mappable: mappable.to_vec() }
    }

    #[test]
    fn the_pages_of_the_table_are_never_mapped() {
        let whole = region(0x4000, &[(0, 0x4000)]);
        assert_eq!(cut(&whole, None, 4096), [(0, 0x4000)]);
        assert_eq!(cut(&whole, Some((0x2000, 0x50)), 4096), [(0, 0x2000), (0x3000, 0x1000)]);
        assert_eq!(cut(&whole, Some((0, 0x10)), 4096), [(0x1000, 0x3000)]);
        assert_eq!(cut(&whole, Some((0x1ff0, 0x20)), 4096), [(0, 0x1000), (0x3000, 0x1000)]);
        assert_eq!(cut(&whole, Some((0x3ff0, u64::MAX)), 4096), [(0, 0x3000)]);
        assert_eq!(cut(&region(0x1000, &[(0, 0x1000)]), Some((0, 0x20)), 4096), [(0, 0); 0]);
    }

    #[test]
    fn nothing_is_mapped_that_is_outside_or_in_a_page_with_something_else() {
        assert_eq!(cut(&region(0x20, &[(0, 0x20)]), None, 4096), [(0, 0x20)], "less than a page, alone in it");
        assert_eq!(cut(&region(0x3000, &[(0x800, 0x1800)]), None, 4096), [(0x1000, 0x1000)]);
        let never = [(0x3000, 0x1000), (u64::MAX, 1), (0x1000, 0), (u64::MAX - 4095, u64::MAX)];
        assert_eq!(cut(&region(0x3000, &never), None, 4096), [(0, 0); 0]);
        assert_eq!(cut(&region(0x3000, &[(0x2000, u64::MAX)]), None, 4096), [(0x2000, 0x1000)]);
    }

    #[test]
    fn what_the_kernel_says_of_a_region_is_read() {
        let mut info = Argument::new(32 + 16 + 32);
        let all = v::VFIO_REGION_INFO_FLAG_READ | v::VFIO_REGION_INFO_FLAG_WRITE;
        info.set_u64(16, 0x4000);
        info.set_u64(24, 1 << 40);
        assert_eq!(parse_region(&info).bytes, 0, "neither readable nor writable");
        info.set_u32(4, all);
        assert_eq!(parse_region(&info), Region { offset: 1 << 40, bytes: 0x4000, mappable: Vec::new() });
        info.set_u32(4, all | v::VFIO_REGION_INFO_FLAG_MMAP);
        assert_eq!(parse_region(&info).mappable, [(0, 0x4000)]);
        info.set_u32(4, all | v::VFIO_REGION_INFO_FLAG_MMAP | v::VFIO_REGION_INFO_FLAG_CAPS);
        info.set_u32(12, 32);
        info.set_u32(32, v::VFIO_REGION_INFO_CAP_SPARSE_MMAP);
        info.set_u32(40, 2);
        for (at, value) in [(48, 0), (56, 0x1000), (64, 0x3000), (72, 0x1000)] {
            info.set_u64(at, value);
        }
        assert_eq!(parse_region(&info).mappable, [(0, 0x1000), (0x3000, 0x1000)]);
    }
}
