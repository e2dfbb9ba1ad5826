//! The calls on vfio's and iommufd's descriptors (linux/vfio.h, linux/iommufd.h).
//!
//! Numbers and layouts of vfio are vfio-bindings'. Its companion vfio-ioctls was looked at and left: reading and writing a region, and resetting the function, log a failure
//! and answer nothing, while here all three are how a removal is noticed; and it speaks in vmm-sys-util's eventfds.
//!
//! iommufd's structures are written from the header, and no kernel of the test bed has it: see `iommufd`.
#![allow(unsafe_code)]

use std::ffi::{CString, c_int, c_ulong};
use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use cofferdam_device::DmaRegion;
use vfio_bindings::bindings::vfio as v;

/// `_IO(';', number)`, which is how both headers number all their calls: direction and size are not part of it.
const fn number(number: u32) -> c_ulong {
    ((v::VFIO_TYPE as c_ulong) << 8) | number as c_ulong
}

/// `VFIO_BASE` and `IOMMUFD_CMD_BASE`.
const fn vfio(at: u32) -> c_ulong {
    number(v::VFIO_BASE + at)
}

const fn iommufd(at: u32) -> c_ulong {
    number(0x80 + at)
}

/// Structures that grow with what they tell are asked for again up to this length, in bytes.
const MAX_BYTES: usize = 64 << 10;

/// Calls with one structure that begins with its own length (u32) and holds no address. The kernel reads and writes at most that length.
#[derive(Clone, Copy, Debug)]
pub(super) enum Request {
    /// `vfio_group_status`.
    GroupStatus,
    /// `vfio_device_info`.
    DeviceInfo,
    /// `vfio_region_info` and capabilities.
    RegionInfo,
    /// `vfio_irq_info`.
    IrqInfo,
    /// `vfio_irq_set` and eventfd numbers, which are looked up while the call runs.
    SetIrqs,
    /// `vfio_iommu_type1_info` and capabilities.
    IommuInfo,
    /// `vfio_device_bind_iommufd` (whose address of a token is looked at with a flag alone, and only read).
    BindIommufd,
    /// `vfio_device_attach_iommufd_pt`.
    AttachIommufd,
    /// `iommu_ioas_alloc`.
    IoasAlloc,
}

impl Request {
    fn number(self) -> c_ulong {
        match self {
            Request::GroupStatus => vfio(3),
            Request::DeviceInfo => vfio(7),
            Request::RegionInfo => vfio(8),
            Request::IrqInfo => vfio(9),
            Request::SetIrqs => vfio(10),
            Request::IommuInfo => vfio(12),
            Request::BindIommufd => vfio(18),
            Request::AttachIommufd => vfio(19),
            Request::IoasAlloc => iommufd(1),
        }
    }
}

/// Calls with a number for an argument, or none.
#[derive(Clone, Copy, Debug)]
pub(super) enum Plain {
    /// On a container.
    ApiVersion,
    /// On a container: whether it has this kind of IOMMU.
    CheckExtension(u32),
    /// On a container with a group.
    SetIommu(u32),
    /// On a device.
    Reset,
}

/// A structure that begins with its own length. Fields outside of it read 0 and are not written.
///
/// Invariant: `words` has at least `bytes` bytes, and the first four say `bytes` when a call is made.
#[derive(Clone, Debug)]
pub(super) struct Argument {
    words: Vec<u64>,
    bytes: usize,
}

impl Argument {
    /// Zeroes of `bytes` bytes.
    pub(super) fn new(bytes: usize) -> Self {
        let mut new = Self { words: vec![0; bytes.div_ceil(8).max(1)], bytes };
        new.set_u32(0, bytes as u32);
        new
    }

    /// The field of four bytes at `at`, which is a multiple of 4.
    pub(super) fn u32(&self, at: usize) -> u32 {
        let inside = at.checked_add(4).is_some_and(|end| end <= self.bytes);
        let word = self.words.get(at / 8).filter(|_| inside).map_or([0; 8], |word| word.to_ne_bytes());
        let half = if at.is_multiple_of(8) { &word[..4] } else { &word[4..] };
        u32::from_ne_bytes(half.try_into().unwrap_or_default())
    }

    /// The field of eight bytes at `at`, which is a multiple of 8.
    pub(super) fn u64(&self, at: usize) -> u64 {
        let inside = at.checked_add(8).is_some_and(|end| end <= self.bytes);
        self.words.get(at / 8).filter(|_| inside).copied().unwrap_or(0)
    }

    /// Sets the field of four bytes at `at`, a multiple of 4.
    pub(super) fn set_u32(&mut self, at: usize, value: u32) {
        let inside = at.checked_add(4).is_some_and(|end| end <= self.bytes);
        if let Some(word) = self.words.get_mut(at / 8).filter(|_| inside) {
            let mut bytes = word.to_ne_bytes();
            let half = if at.is_multiple_of(8) { &mut bytes[..4] } else { &mut bytes[4..] };
            half.copy_from_slice(&value.to_ne_bytes());
            *word = u64::from_ne_bytes(bytes);
        }
    }

    /// Sets the field of eight bytes at `at`, a multiple of 8.
    pub(super) fn set_u64(&mut self, at: usize, value: u64) {
        let inside = at.checked_add(8).is_some_and(|end| end <= self.bytes);
        if let Some(word) = self.words.get_mut(at / 8).filter(|_| inside) {
            *word = value;
        }
    }

    /// Makes the call.
    pub(super) fn call(&mut self, fd: BorrowedFd<'_>, request: Request) -> io::Result<()> {
        // SAFETY: `Request` holds only calls that `raw` is for (see there), and none of their structures holds an address that is written through.
        unsafe { self.raw(fd, request.number()) }
    }

    /// Makes the call, and makes it again with as many bytes as the kernel says that it has to tell.
    pub(super) fn call_for_all(mut self, fd: BorrowedFd<'_>, request: Request) -> io::Result<Self> {
        let asked = self.clone();
        self.call(fd, request)?;
        let needed = self.u32(0) as usize;
        if needed <= asked.bytes {
            return Ok(self);
        }
        if needed > MAX_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the kernel has more to tell than can be"));
        }
        let mut more = Argument::new(needed);
        for (to, from) in more.words.iter_mut().zip(&asked.words) {
            *to = *from;
        }
        more.set_u32(0, needed as u32);
        more.call(fd, request)?;
        // It says its length again, and that must not be taken for ours.
        more.set_u32(0, needed as u32);
        Ok(more)
    }

    /// The offsets of the capabilities with this id, from the one at `first` on (`vfio_info_cap_header`).
    pub(super) fn capabilities(&self, first: u32, id: u32) -> Vec<usize> {
        let (mut found, mut at) = (Vec::new(), first as usize);
        // As many as fit: a longer chain goes round in a circle.
        for _ in 0..self.bytes / size_of::<v::vfio_info_cap_header>() {
            if at == 0 || !at.is_multiple_of(8) || at >= self.bytes {
                break;
            }
            if self.u32(at).to_ne_bytes()[..2] == (id as u16).to_ne_bytes() {
                found.push(at);
            }
            at = self.u32(at + offset_of!(v::vfio_info_cap_header, next)) as usize;
        }
        found
    }

    /// # Safety
    /// `request` reads and writes one structure of the length that its first four bytes say, and nothing else of this process; memory that an address in the structure leads to is
    /// the caller's to answer for.
    unsafe fn raw(&mut self, fd: BorrowedFd<'_>, request: c_ulong) -> io::Result<()> {
        let bytes = self.bytes as u32;
        self.set_u32(0, bytes);
        // SAFETY: the structure is `words`, which is writable, 8-aligned and has at least as many bytes as its first four say (invariant, and set above).
        let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, self.words.as_mut_ptr()) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Makes a call without a structure.
pub(super) fn plain(fd: BorrowedFd<'_>, request: Plain) -> io::Result<c_int> {
    let (number, argument) = match request {
        Plain::ApiVersion => (vfio(0), 0),
        Plain::CheckExtension(kind) => (vfio(1), kind),
        Plain::SetIommu(kind) => (vfio(2), kind),
        Plain::Reset => (vfio(11), 0),
    };
    // SAFETY: these four take a number or nothing and touch no memory of ours.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), number as _, c_ulong::from(argument)) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

/// Puts a group into a container.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let container: c_int = container.as_raw_fd();
    // SAFETY: the call reads one `int` at the address, which is `container`'s own.
    let answer = unsafe { libc::ioctl(group.as_raw_fd(), vfio(4) as _, &raw const container) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The descriptor of the function `name` of a group.
pub(super) fn device(group: BorrowedFd<'_>, name: &str) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: the call reads a string that ends with a zero, which `name` is.
    let answer = unsafe { libc::ioctl(group.as_raw_fd(), vfio(6) as _, name.as_ptr()) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has made this descriptor for this call (close-on-exec); nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(answer) })
}

/// Who translates.
#[derive(Clone, Copy, Debug)]
pub(super) enum Translator<'a> {
    /// A container of type 1.
    Container(BorrowedFd<'a>),
    /// An address space of an iommufd.
    Iommufd(BorrowedFd<'a>, u32),
}

/// Lets functions behind `by` read and write `bytes` bytes from `offset` of `region` at `iova`.
///
/// The kernel holds the pages until they are unmapped, whatever becomes of the mapping in this process: what a function writes can only ever end up in the region's own.
pub(super) fn map(by: Translator<'_>, region: &DmaRegion, offset: u64, bytes: u64, iova: u64) -> io::Result<()> {
    if bytes == 0 || offset.checked_add(bytes).is_none_or(|end| end > region.len()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "outside of the region"));
    }
    let address = region.host_address() as u64 + offset;
    let (fd, request, mut argument) = match by {
        Translator::Container(fd) => {
            type Map = v::vfio_iommu_type1_dma_map;
            let mut argument = Argument::new(size_of::<Map>());
            argument.set_u32(offset_of!(Map, flags), v::VFIO_DMA_MAP_FLAG_READ | v::VFIO_DMA_MAP_FLAG_WRITE);
            argument.set_u64(offset_of!(Map, vaddr), address);
            argument.set_u64(offset_of!(Map, iova), iova);
            argument.set_u64(offset_of!(Map, size), bytes);
            (fd, vfio(13), argument)
        }
        Translator::Iommufd(fd, space) => {
            // struct iommu_ioas_map: size, flags, ioas_id, reserved, user_va, length, iova.
            // Flags: FIXED_IOVA 1, WRITEABLE 2, READABLE 4.
            let mut argument = Argument::new(40);
            argument.set_u32(4, 1 | 2 | 4);
            argument.set_u32(8, space);
            argument.set_u64(16, address);
            argument.set_u64(24, bytes);
            argument.set_u64(32, iova);
            (fd, iommufd(5), argument)
        }
    };
    // SAFETY: both calls are of the kind that `raw` is for. The address in the structure leads to `bytes` bytes of the region (checked above), whose memory is shared with devices by
    // its purpose: the program reaches it by volatile copies and atomics alone.
    unsafe { argument.raw(fd, request) }
}

/// Takes away what [`map`] gave, exactly.
pub(super) fn unmap(by: Translator<'_>, iova: u64, bytes: u64) -> io::Result<()> {
    let (fd, request, at, mut argument) = match by {
        Translator::Container(fd) => {
            type Unmap = v::vfio_iommu_type1_dma_unmap;
            // Without the address of a bitmap that may follow.
            let mut argument = Argument::new(24);
            argument.set_u64(offset_of!(Unmap, iova), iova);
            argument.set_u64(offset_of!(Unmap, size), bytes);
            (fd, vfio(14), offset_of!(Unmap, size), argument)
        }
        Translator::Iommufd(fd, space) => {
            // struct iommu_ioas_unmap: size, ioas_id, iova, length.
            let mut argument = Argument::new(24);
            argument.set_u32(4, space);
            argument.set_u64(8, iova);
            argument.set_u64(16, bytes);
            (fd, iommufd(6), 16, argument)
        }
    };
    // SAFETY: both calls are of the kind that `raw` is for; the structures hold no address of this process.
    unsafe { argument.raw(fd, request) }?;
    if argument.u64(at) == bytes { Ok(()) } else { Err(io::Error::other("less was unmapped than was mapped")) }
}

/// The I/O addresses that an address space of an iommufd takes, first and last of each run.
pub(super) fn iova_ranges(fd: BorrowedFd<'_>, space: u32) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = vec![0_u64; 2 * 256];
    // struct iommu_ioas_iova_ranges: size, ioas_id, num_iovas, reserved, allowed_iovas, out_iova_alignment.
    let mut argument = Argument::new(32);
    argument.set_u32(4, space);
    argument.set_u32(8, (ranges.len() / 2) as u32);
    argument.set_u64(16, ranges.as_mut_ptr() as u64);
    // SAFETY: the call is of the kind that `raw` is for, but that it writes at most as many pairs of u64 to the address in the structure as it is told there is room for: `ranges` has that
    // room, and nobody else has it during the call.
    unsafe { argument.raw(fd, iommufd(4)) }?;
    ranges.truncate(2 * argument.u32(8) as usize);
    Ok(ranges.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_headers() {
        // As `strace -e raw=ioctl` shows them.
        assert_eq!(vfio(0), 0x3b64);
        assert_eq!(Request::IommuInfo.number(), 0x3b70);
        assert_eq!(Request::AttachIommufd.number(), 0x3b77);
        assert_eq!(Request::IoasAlloc.number(), 0x3b81);
    }

    #[test]
    fn fields_are_where_they_are_put_and_nothing_is_outside() {
        let mut argument = Argument::new(20);
        argument.set_u32(4, 0x1111_1111);
        argument.set_u64(8, 0x2222_2222_3333_3333);
        argument.set_u32(16, 0x4444_4444);
        argument.set_u64(16, 5);
        argument.set_u32(20, 6);
        argument.set_u32(usize::MAX - 3, 7);
        assert_eq!((argument.u32(0), argument.u32(4), argument.u32(16)), (20, 0x1111_1111, 0x4444_4444));
        assert_eq!((argument.u64(8), argument.u32(12)), (0x2222_2222_3333_3333, 0x2222_2222));
        assert_eq!((argument.u64(16), argument.u32(20), argument.u32(usize::MAX - 3)), (0, 0, 0));
    }

    #[test]
    fn capabilities_are_followed_as_far_as_they_lead_forward_or_not() {
        let mut argument = Argument::new(64);
        for (at, id, next) in [(16, 1, 32), (32, 2, 48), (48, 1, 0)] {
            argument.set_u32(at, id | 1 << 16);
            argument.set_u32(at + 4, next);
        }
        assert_eq!(argument.capabilities(16, 1), [16, 48]);
        assert_eq!(argument.capabilities(0, 1), [0; 0]);
        for next in [16, 52, 64, u32::MAX] {
            argument.set_u32(52, next);
            // A circle, a field that is no capability, and the outside end the search.
            assert!(argument.capabilities(16, 2).contains(&32), "{next}");
        }
    }

    #[test]
    fn a_map_of_more_than_the_region_reaches_no_kernel() {
        let region = DmaRegion::new("test", 4096, 0).unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let by = Translator::Container(std::os::fd::AsFd::as_fd(&null));
        for (offset, bytes) in [(0, 4097), (4096, 1), (0, 0), (u64::MAX, 2)] {
            assert_eq!(map(by, &region, offset, bytes, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert_eq!(map(by, &region, 0, 4096, 0).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
