//! Memory that a device may reach.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::RegionError;
use crate::mmap::Mapping;

/// Size and alignment of what regions and arenas deal in, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// A memfd, mapped and shared with a device.
///
/// The file is sealed against shrinking, growing and further sealing, so no holder of the descriptor can make an access of
/// the host fault. All access is by volatile copies and atomics: the device may change any byte at any time, so nothing here ever
/// hands out a slice. Shared as an `Arc`; the memory goes when the last owner does.
#[derive(Debug)]
pub struct DmaRegion {
    mapping: Arc<Mapping>,
    file: OwnedFd,
    addresses: Addresses,
    /// Where the file is found by name, if it is not a memfd.
    name: Option<FileName>,
    revoked: AtomicBool,
    /// `revoke` has succeeded.
    gone: AtomicBool,
}

/// How offsets in a region become I/O addresses.
#[derive(Debug)]
enum Addresses {
    /// One run from here on: an IOMMU or a backend translates.
    Run(u64),
    /// Pages of `1 << shift` bytes, each where it happens to be in physical memory.
    Pages { shift: u32, pages: Box<[u64]> },
}

/// A file that outlives the process, until its region is revoked (DESIGN section 8).
#[derive(Debug)]
pub struct FileName {
    /// The folder that it is in.
    pub folder: OwnedFd,
    /// Its name there.
    pub name: CString,
}

impl DmaRegion {
    /// Makes a region of `bytes` bytes, zeroed, that a device will see at `iova`. Both are multiples of [`PAGE_BYTES`].
    ///
    /// `name` is what `/proc/PID/maps` calls it (`/memfd:NAME`), by which a certificate can look for leftovers. Pages are taken when they
    /// are first touched.
    ///
    /// # Errors
    /// [`RegionError::Shape`] for the caller's mistakes, [`RegionError::Io`] when the system has no memory or descriptor left.
    pub fn new(name: &str, bytes: u64, iova: u64) -> Result<Self, RegionError> {
        let shape = RegionError::Shape { bytes, iova };
        let (Ok(len), true) =
            (usize::try_from(bytes), bytes > 0 && bytes.is_multiple_of(PAGE_BYTES) && iova.is_multiple_of(PAGE_BYTES))
        else {
            return Err(shape);
        };
        if iova.checked_add(bytes).is_none() || i64::try_from(bytes).is_err() {
            return Err(shape);
        }
        let io = |what: &'static str| move |source: rustix::io::Errno| RegionError::Io { what, source: source.into() };
        let name = CString::new(name.replace('\0', "?")).unwrap_or_default();
        let file = rustix::fs::memfd_create(&name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(io("memfd_create"))?;
        rustix::fs::ftruncate(&file, bytes).map_err(io("ftruncate"))?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(io("fcntl(F_ADD_SEALS)"))?;
        let mapping = Mapping::new(file.as_fd(), len).map_err(|source| RegionError::Io { what: "mmap", source })?;
        let mapping = Arc::new(mapping);
        Ok(Self::of(mapping, file, Addresses::Run(iova), None))
    }

    /// The region of `bytes` bytes behind `file`, which another process made with [`DmaRegion::new`] and handed over. Nothing in it is changed.
    ///
    /// Who can forge this: whoever sent the descriptor. The length and the seals are the file's own, so they are looked at and not believed.
    ///
    /// # Errors
    /// As [`DmaRegion::new`], and [`RegionError::Shape`] for a file of another length; [`RegionError::Unsealed`] for one that its holders could resize.
    pub fn adopt(file: OwnedFd, bytes: u64, iova: u64) -> Result<Self, RegionError> {
        let shape = || RegionError::Shape { bytes, iova };
        let sound = bytes > 0 && bytes.is_multiple_of(PAGE_BYTES) && iova.is_multiple_of(PAGE_BYTES);
        let (Ok(len), true, Some(_)) = (usize::try_from(bytes), sound, iova.checked_add(bytes)) else {
            return Err(shape());
        };
        let io = |what: &'static str| move |source: rustix::io::Errno| RegionError::Io { what, source: source.into() };
        // Of a file that has no seals the kernel says that this makes no sense.
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| RegionError::Unsealed)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL) || seals.contains(SealFlags::WRITE) {
            return Err(RegionError::Unsealed);
        }
        // Sealed, so what is seen now stays so.
        let size = rustix::fs::fstat(&file).map_err(io("fstat"))?.st_size;
        if u64::try_from(size).ok() != Some(bytes) {
            return Err(shape());
        }
        let mapping = Mapping::new(file.as_fd(), len).map_err(|source| RegionError::Io { what: "mmap", source })?;
        Ok(Self::of(Arc::new(mapping), file, Addresses::Run(iova), None))
    }

    /// Makes a region of a file of `bytes` bytes in pages of `page_bytes` (a power of two, at least [`PAGE_BYTES`]) that never move, for a device that is told physical
    /// addresses. The file is filled with zeroes; then `translate` is given where it is mapped in this process and answers the physical address of each page, in
    /// order.
    ///
    /// The file outlives the process under `name`, because a device that runs on would write to pages that are somebody else's by then: it is removed by
    /// [`DmaRegion::revoke`], which comes after the device's silence, and by nothing else. Nobody but this process may shrink it: it is to be in a folder of its own that nobody
    /// else can write.
    ///
    /// # Errors
    /// [`RegionError::Shape`] for the caller's mistakes and for a translation that has not one aligned address for each page, [`RegionError::Io`] when the system refuses.
    pub fn in_pages(
        file: OwnedFd,
        name: FileName,
        bytes: u64,
        page_bytes: u64,
        translate: impl FnOnce(*const u8) -> std::io::Result<Vec<u64>>,
    ) -> Result<Self, RegionError> {
        let shape = || RegionError::Shape { bytes, iova: 0 };
        let sound = page_bytes.is_power_of_two() && page_bytes >= PAGE_BYTES;
        let (Ok(len), true) = (usize::try_from(bytes), sound && bytes > 0 && bytes.is_multiple_of(page_bytes)) else {
            return Err(shape());
        };
        let size =
            rustix::fs::fstat(&file).map_err(|source| RegionError::Io { what: "fstat", source: source.into() })?;
        if u64::try_from(size.st_size).ok() != Some(bytes) {
            return Err(shape());
        }
        let mapping = Mapping::new(file.as_fd(), len).map_err(|source| RegionError::Io { what: "mmap", source })?;
        mapping.fill(0, len, 0);
        let pages = translate(mapping.base())
            .map_err(|source| RegionError::Io { what: "finding physical addresses", source })?;
        let aligned =
            pages.iter().all(|page| page.is_multiple_of(page_bytes) && page.checked_add(page_bytes).is_some());
        if pages.len() as u64 != bytes / page_bytes || !aligned {
            return Err(shape());
        }
        let addresses = Addresses::Pages { shift: page_bytes.trailing_zeros(), pages: pages.into() };
        Ok(Self::of(Arc::new(mapping), file, addresses, Some(name)))
    }

    /// The region behind `file`, which another process made with [`DmaRegion::in_pages`] and handed over. The device was told that its pages of `page_bytes` are at `pages`, so that is where
    /// they have to be: `translate` is as for `in_pages`. Nothing in it is changed.
    ///
    /// Who can forge this: whoever sent the descriptor. It has to be the file `name`, which is removed with the region.
    ///
    /// # Errors
    /// As [`DmaRegion::in_pages`]; [`RegionError::Io`] when the file is not the one of that name, and when a page is somewhere else.
    pub fn adopt_pages(
        file: OwnedFd,
        name: FileName,
        page_bytes: u64,
        pages: &[u64],
        translate: impl FnOnce(*const u8) -> std::io::Result<Vec<u64>>,
    ) -> Result<Self, RegionError> {
        let io = |what: &'static str| move |source: rustix::io::Errno| RegionError::Io { what, source: source.into() };
        let bytes = page_bytes.checked_mul(pages.len() as u64).filter(|bytes| i64::try_from(*bytes).is_ok());
        let shape = RegionError::Shape { bytes: bytes.unwrap_or(u64::MAX), iova: 0 };
        let sound = page_bytes.is_power_of_two() && page_bytes >= PAGE_BYTES;
        let Some((bytes, len)) = bytes.and_then(|bytes| Some((bytes, usize::try_from(bytes).ok()?))) else {
            return Err(shape);
        };
        let stat = rustix::fs::fstat(&file).map_err(io("fstat"))?;
        if !sound || bytes == 0 || u64::try_from(stat.st_size).ok() != Some(bytes) {
            return Err(shape);
        }
        let named = rustix::fs::statat(&name.folder, &name.name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
        let named = named.map_err(io("looking for memory by its name"))?;
        let other = |what, text: &str| Err(RegionError::Io { what, source: std::io::Error::other(text.to_owned()) });
        if (named.st_dev, named.st_ino) != (stat.st_dev, stat.st_ino) {
            return other("looking for memory by its name", "it is another file");
        }
        let mapping = Mapping::new(file.as_fd(), len).map_err(|source| RegionError::Io { what: "mmap", source })?;
        // A page that is only in the file, and not yet in this process, has no address here.
        (0..len).step_by(page_bytes as usize).for_each(|at| mapping.copy_out(at, &mut [0]));
        let what = "finding physical addresses";
        let now = translate(mapping.base()).map_err(|source| RegionError::Io { what, source })?;
        if now != pages {
            return other(what, "the memory is not where the device was told that it is");
        }
        let addresses = Addresses::Pages { shift: page_bytes.trailing_zeros(), pages: now.into() };
        Ok(Self::of(Arc::new(mapping), file, addresses, Some(name)))
    }

    fn of(mapping: Arc<Mapping>, file: OwnedFd, addresses: Addresses, name: Option<FileName>) -> Self {
        Self { mapping, file, addresses, name, revoked: AtomicBool::new(false), gone: AtomicBool::new(false) }
    }

    /// The I/O address of the first byte.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.address_of(0)
    }

    /// The I/O address of the byte at `offset`; that of the first byte when it is outside. The bytes after it follow it for the device too up to [`DmaRegion::run_bytes`].
    #[inline]
    #[must_use]
    pub fn address_of(&self, offset: u64) -> u64 {
        match &self.addresses {
            Addresses::Run(iova) => iova.wrapping_add(offset),
            Addresses::Pages { shift, pages } => {
                let page = pages.get((offset >> shift) as usize).or(pages.first()).copied().unwrap_or(0);
                page + (offset & ((1 << shift) - 1))
            }
        }
    }

    /// Bytes from `offset` on that follow each other for the device as they do here.
    #[must_use]
    pub fn run_bytes(&self, offset: u64) -> u64 {
        let left = self.len().saturating_sub(offset);
        self.page_bytes().map_or(left, |page| left.min(page - offset % page))
    }

    /// Size of the pages that the region is scattered in, if it is: nothing that a device is told may cross the end of one.
    #[must_use]
    pub fn page_bytes(&self) -> Option<u64> {
        match &self.addresses {
            Addresses::Run(_) => None,
            Addresses::Pages { shift, .. } => Some(1 << shift),
        }
    }

    /// Where each of those pages is, in order, and the name of the file that they are of.
    #[must_use]
    pub fn pages(&self) -> Option<(&CStr, &[u64])> {
        match (&self.addresses, &self.name) {
            (Addresses::Pages { pages, .. }, Some(file)) => Some((&file.name, pages)),
            _ => None,
        }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Never: a region has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mapping.len() == 0
    }

    /// The memfd, for a bus that passes it to a backend.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where the region is mapped in this process: for a bus whose protocol carries host addresses (vhost-user's `userspace_addr`). Not to be read through.
    #[must_use]
    pub fn host_address(&self) -> *mut u8 {
        self.mapping.base()
    }

    /// The offset in this region of `bytes` bytes at I/O address `iova`, if all of them are inside.
    #[must_use]
    pub fn offset_of(&self, iova: u64, bytes: u64) -> Option<u64> {
        let inside = |first: u64, len: u64| iova.checked_sub(first).filter(|at| *at <= len && bytes <= len - at);
        match &self.addresses {
            Addresses::Run(first) => inside(*first, self.len()),
            Addresses::Pages { shift, pages } => pages
                .iter()
                .zip(0..)
                .find_map(|(page, number): (_, u64)| inside(*page, 1 << shift).map(|at| (number << shift) + at)),
        }
    }

    /// Copies `from` into the region at `offset`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], and nothing is written.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), RegionError> {
        self.mapping.copy_in(self.place(offset, from.len(), 1)?, from);
        Ok(())
    }

    /// Copies from the region at `offset` into all of `into`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], and nothing is read; [`RegionError::Revoked`], and what `into` holds is nobody's data.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), RegionError> {
        self.mapping.copy_out(self.place(offset, into.len(), 1)?, into);
        // Revoked meanwhile: what was read may be zeroes in place of the data. `revoke` says so before it does it, and the fence keeps the look behind the copy.
        fence(Ordering::Acquire);
        if self.is_revoked() { Err(RegionError::Revoked) } else { Ok(()) }
    }

    /// Sets `bytes` bytes at `offset` to `value`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], and nothing is written.
    pub fn fill(&self, offset: u64, bytes: u64, value: u8) -> Result<(), RegionError> {
        let len = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.mapping.fill(self.place(offset, len, 1)?, len, value);
        Ok(())
    }

    /// Loads a little-endian 16-bit word, atomically.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] when outside or not 2-aligned.
    pub fn load_u16(&self, offset: u64, order: Ordering) -> Result<u16, RegionError> {
        Ok(u16::from_le(self.mapping.word16(self.place(offset, 2, 2)?).load(order)))
    }

    /// Stores a little-endian 16-bit word, atomically.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] when outside or not 2-aligned.
    pub fn store_u16(&self, offset: u64, value: u16, order: Ordering) -> Result<(), RegionError> {
        self.mapping.word16(self.place(offset, 2, 2)?).store(value.to_le(), order);
        Ok(())
    }

    /// Another descriptor of the memfd, to be given to the client whose region this is. The seals are the file's, so its holder can write what is in the region, and
    /// can neither resize it nor unseal it.
    ///
    /// # Errors
    /// [`RegionError::Revoked`], or [`RegionError::Io`] when the process may have no more descriptors.
    pub fn duplicate(&self) -> Result<OwnedFd, RegionError> {
        let duplicate = || rustix::io::fcntl_dupfd_cloexec(&self.file, 0);
        if self.is_revoked() {
            return Err(RegionError::Revoked);
        }
        let fd =
            duplicate().map_err(|source| RegionError::Io { what: "fcntl(F_DUPFD_CLOEXEC)", source: source.into() })?;
        // Revoked meanwhile: it may be the memory or `/dev/null`, and is nobody's in either case.
        if self.is_revoked() { Err(RegionError::Revoked) } else { Ok(fd) }
    }

    /// Takes the memory away from whoever still holds the region: its pages are freed, its descriptor is closed, and every access answers
    /// [`RegionError::Revoked`]. The device must not reach it any more (DESIGN L1). Idempotent; whether the memory is gone. If the system refuses, the memory stays and so
    /// does the mapping, for a certificate to find.
    ///
    /// Another process that has a descriptor or a mapping of the file finds zeroes there, and may fill it again up to its sealed length: with pages of its own account, which
    /// nothing of this process refers to.
    pub fn revoke(&self) -> bool {
        if self.revoked.swap(true, Ordering::SeqCst) {
            return self.gone.load(Ordering::Acquire);
        }
        // Punched first: a backend that kept its mapping holds nothing either.
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let punched = rustix::fs::fallocate(&self.file, flags, 0, self.len()).map_err(std::io::Error::from);
        let unlinked = self.name.as_ref().map_or(Ok(()), |FileName { folder, name }| {
            match rustix::fs::unlinkat(folder, name, rustix::fs::AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
                Err(error) => Err(std::io::Error::from(error)),
            }
        });
        let outcome = punched.and(unlinked).and_then(|()| self.mapping.revoke(self.file.as_fd()));
        if let Err(error) = &outcome {
            tracing::error!(%error, bytes = self.len(), "memory could not be revoked");
        }
        self.gone.store(outcome.is_ok(), Ordering::Release);
        outcome.is_ok()
    }

    /// Whether [`DmaRegion::revoke`] was called.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Whether it came to its end: pages, name and mapping are gone. A little later than [`DmaRegion::is_revoked`].
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Leaks one reference to the region on purpose, for memory that a device may still write: it is never unmapped and its descriptor
    /// never closed (DESIGN L1). Returns the bytes that are leaked.
    pub fn retire(self: Arc<Self>) -> u64 {
        let bytes = self.len();
        std::mem::forget(self);
        bytes
    }

    /// The mapping, for the ring and the transfers of this crate.
    pub(crate) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    fn place(&self, offset: u64, bytes: usize, align: u64) -> Result<usize, RegionError> {
        if self.is_revoked() {
            return Err(RegionError::Revoked);
        }
        match usize::try_from(offset) {
            Ok(place) if self.mapping.contains(place, bytes) && offset.is_multiple_of(align) => Ok(place),
            _ => Err(RegionError::OutOfRange { offset, bytes: bytes as u64, region_bytes: self.len() }),
        }
    }
}
