//! The driver's memory as a device reaches it: raw, shared with whoever else maps it, and addressed by I/O address.
//!
//! Every access is by volatile or atomic operations, or by a system call that the kernel does on raw addresses, because the
//! other side may write the same bytes at the same time. Nothing here ever makes a Rust slice of shared memory.
#![allow(
    unsafe_code,
    reason = "a device reaches its driver's memory through raw mappings; every other file of the crate goes through here"
)]

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// Bytes in the driver's memory: an I/O address and a length. Not checked until [`Memory`] is asked for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// I/O address of the first byte.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u32,
}

/// One contiguous mapping of the driver's memory.
pub struct Region {
    iova: u64,
    bytes: u64,
    base: *mut u8,
    /// What keeps the mapping alive: dropped after the region itself can no longer be asked.
    _keep: Box<dyn Any + Send + Sync>,
}

// SAFETY: the region is only an address range; all access to it goes through volatile or atomic operations and system
// calls, which any thread may do, and the mapping lives as long as `_keep`, which is itself Send and Sync.
unsafe impl Send for Region {}
// SAFETY: as above; no method gives out a reference to plain (non-atomic) memory.
unsafe impl Sync for Region {}

/// A mapping that this crate made and that it unmaps.
struct OwnMapping {
    base: *mut core::ffi::c_void,
    bytes: usize,
}

// SAFETY: the value is only handed around to be dropped once; unmapping may happen on any thread.
unsafe impl Send for OwnMapping {}
// SAFETY: it has no method that takes a shared reference.
unsafe impl Sync for OwnMapping {}

impl Drop for OwnMapping {
    fn drop(&mut self) {
        // SAFETY: `base` and `bytes` are what `mmap` returned in `Region::map`, and this is the only owner; `Region` drops
        // its `_keep` only when no `Memory` (and so no `Area`) holds it any more.
        let _ = unsafe { rustix::mm::munmap(self.base, self.bytes) };
    }
}

impl Region {
    /// Maps `bytes` of `fd` from its start, shared and writable, and places it at I/O address `iova`.
    pub fn map(iova: u64, bytes: u64, fd: BorrowedFd<'_>) -> io::Result<Self> {
        let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing that exists.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                fd,
                0,
            )?
        };
        let keep = OwnMapping { base, bytes: length };
        Ok(Self { iova, bytes, base: base.cast(), _keep: Box::new(keep) })
    }

    /// A mapping that somebody else made.
    ///
    /// # Safety
    /// `base` must be mapped readable and writable for `bytes` bytes for as long as `keep` is not dropped.
    pub(crate) unsafe fn of_mapping(iova: u64, bytes: u64, base: *mut u8, keep: Box<dyn Any + Send + Sync>) -> Self {
        Self { iova, bytes, base, _keep: keep }
    }
}

/// All the memory that the driver lets the device reach.
#[derive(Default)]
pub struct Memory {
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// Memory of these regions. Where two overlap, the first one answers.
    pub fn new(regions: Vec<Arc<Region>>) -> Self {
        Self { regions }
    }

    /// The regions, to make a larger memory of them.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether the segment lies wholly inside one region.
    pub fn holds(&self, segment: Segment) -> bool {
        self.find(segment.address, u64::from(segment.bytes)).is_some()
    }

    /// The same memory without the region at `iova`; `None` when there is none.
    pub fn without(&self, iova: u64) -> Option<Self> {
        let place = self.regions.iter().position(|region| region.iova == iova)?;
        let mut regions = self.regions.clone();
        regions.remove(place);
        Some(Self { regions })
    }

    #[inline]
    fn find(&self, address: u64, bytes: u64) -> Option<*mut u8> {
        self.find_in(address, bytes).map(|(place, _)| place)
    }

    #[inline]
    fn find_in(&self, address: u64, bytes: u64) -> Option<(*mut u8, &Arc<Region>)> {
        for region in &self.regions {
            let offset = address.wrapping_sub(region.iova);
            if offset < region.bytes && bytes <= region.bytes - offset {
                // SAFETY: `offset` is below the region's length, so the pointer stays inside its mapping.
                return Some((unsafe { region.base.add(offset as usize) }, region));
            }
        }
        None
    }

    /// Copies bytes out; `None` when they are not wholly inside one region.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Option<()> {
        let from = self.find(address, into.len() as u64)?;
        let (head, words) = split(from, into.len());
        for (index, byte) in into[..head].iter_mut().enumerate() {
            // SAFETY: `find` checked that `into.len()` bytes from `from` are inside a live mapping, `head` is not more;
            // volatile, because the driver may write them at the same time.
            *byte = unsafe { from.add(index).read_volatile() };
        }
        for index in 0..words {
            let at = head + 8 * index;
            // SAFETY: as above for the eight bytes at `at`, which `split` has aligned.
            let word = unsafe { from.add(at).cast::<u64>().read_volatile() };
            into[at..at + 8].copy_from_slice(&word.to_ne_bytes());
        }
        for (index, byte) in into.iter_mut().enumerate().skip(head + 8 * words) {
            // SAFETY: as for the head.
            *byte = unsafe { from.add(index).read_volatile() };
        }
        Some(())
    }

    /// Copies bytes in; `None` (and nothing written) when they are not wholly inside one region.
    #[inline]
    pub fn write(&self, address: u64, bytes: &[u8]) -> Option<()> {
        let to = self.find(address, bytes.len() as u64)?;
        let (head, words) = split(to, bytes.len());
        for (index, byte) in bytes[..head].iter().enumerate() {
            // SAFETY: as in `read`, for writing; the mapping is writable.
            unsafe { to.add(index).write_volatile(*byte) };
        }
        for (index, word) in bytes[head..head + 8 * words].as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: as in `read`, for writing.
            unsafe { to.add(head + 8 * index).cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
        }
        for (index, byte) in bytes.iter().enumerate().skip(head + 8 * words) {
            // SAFETY: as for the head.
            unsafe { to.add(index).write_volatile(*byte) };
        }
        Some(())
    }

    /// A part of the memory that is accessed word by word, `align` bytes aligned. Holds its region alive.
    pub(crate) fn area(&self, address: u64, bytes: usize, align: usize) -> Option<Area> {
        let (base, region) = self.find_in(address, bytes as u64)?;
        // The host address counts, not the I/O address: it is the one that an unaligned atomic would break on.
        if !base.addr().is_multiple_of(align) {
            return None;
        }
        Some(Area { base, bytes, _region: Arc::clone(region) })
    }

    /// Reads one 16-byte descriptor as two words; `None` when it is not wholly inside one region.
    #[inline]
    pub(crate) fn read_descriptor(&self, address: u64) -> Option<[u64; 2]> {
        let from = self.find(address, 16)?;
        // A torn value is the same as one that the driver wrote so, and is checked like any other.
        if from.addr().is_multiple_of(8) {
            // SAFETY: `find` checked 16 bytes inside a live mapping, and the address is aligned for the word.
            let word = |index| unsafe { AtomicU64::from_ptr(from.cast::<u64>().add(index)) }.load(Ordering::Relaxed);
            return Some([word(0), word(1)]);
        }
        // An indirect table need not be aligned (virtio 1.2, section 2.7.5.3).
        let mut words = [[0; 8]; 2];
        self.read(address, words.as_flattened_mut())?;
        Some(words.map(u64::from_le_bytes))
    }

    /// Moves bytes between `file` at `offset` and the segments, in order and without a copy in between. `to_memory` gives
    /// the direction. Reading beyond the end of the file gives zeroes.
    pub(crate) fn transfer(
        &self,
        segments: &[Segment],
        file: BorrowedFd<'_>,
        offset: u64,
        to_memory: bool,
    ) -> io::Result<()> {
        /// The kernel's own limit is 1,024 (`UIO_MAXIOV`).
        const MAX_VECTORS: usize = 256;
        let mut vectors = Vec::with_capacity(segments.len());
        for segment in segments {
            let base = self.find(segment.address, u64::from(segment.bytes)).ok_or(io::ErrorKind::InvalidInput)?;
            vectors.push(libc::iovec { iov_base: base.cast(), iov_len: segment.bytes as usize });
        }
        let mut at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut rest = vectors.as_mut_slice();
        loop {
            while rest.first().is_some_and(|vector| vector.iov_len == 0) {
                rest = &mut rest[1..];
            }
            if rest.is_empty() {
                return Ok(());
            }
            let count = rest.len().min(MAX_VECTORS) as i32;
            // SAFETY: every vector points into a live mapping (checked by `find`, kept alive by `self`), `count` of them
            // exist, and the kernel copes with concurrent writers.
            let done = unsafe {
                if to_memory {
                    libc::preadv(file.as_raw_fd(), rest.as_ptr(), count, at)
                } else {
                    libc::pwritev(file.as_raw_fd(), rest.as_ptr(), count, at)
                }
            };
            let mut done = match done {
                -1 => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => continue,
                    error => return Err(error),
                },
                0 if to_memory => {
                    for vector in &mut *rest {
                        for index in 0..vector.iov_len {
                            // SAFETY: inside the vector, which is inside a live mapping.
                            unsafe { vector.iov_base.cast::<u8>().add(index).write_volatile(0) };
                        }
                    }
                    return Ok(());
                }
                0 => return Err(io::ErrorKind::WriteZero.into()),
                done => done as usize,
            };
            at += done as i64;
            while done > 0 {
                let step = done.min(rest[0].iov_len);
                // SAFETY: `step` is at most the vector's length, so the pointer stays inside it or one past its end.
                rest[0].iov_base = unsafe { rest[0].iov_base.cast::<u8>().add(step) }.cast();
                rest[0].iov_len -= step;
                done -= step;
                if rest[0].iov_len == 0 {
                    rest = &mut rest[1..];
                }
            }
        }
    }
}

/// Cuts `bytes` bytes at `place` into single ones up to an address of whole words, and whole words after them: how many of
/// each. What is left over is less than a word.
#[inline]
fn split(place: *mut u8, bytes: usize) -> (usize, usize) {
    let head = place.addr().wrapping_neg() % 8;
    if head >= bytes { (bytes, 0) } else { (head, (bytes - head) / 8) }
}

/// The memory table of a vhost-user front end.
pub(crate) fn of_guest_memory(memory: &Arc<GuestMemoryMmap>) -> Memory {
    let region = |region: &GuestRegionMmap| {
        let (start, bytes, base) = (region.start_addr(), region.len(), region.as_ptr());
        // Each region is kept by itself, so that one that the front end takes away is unmapped whoever holds the others.
        let keep: Box<dyn Any + Send + Sync> = match memory.remove_region(start, bytes) {
            Ok((_, alone)) => Box::new(alone),
            Err(_) => Box::new(Arc::clone(memory)),
        };
        // SAFETY: the region is mapped as long as it lives, which `keep` sees to, for `len` bytes, readable and writable (the
        // library maps front ends' regions so).
        Arc::new(unsafe { Region::of_mapping(start.raw_value(), bytes, base, keep) })
    };
    Memory::new(memory.iter().map(region).collect())
}

/// Lends the descriptor of something that only knows raw ones.
pub(crate) fn borrow_fd<T: AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: `owner` has the descriptor open, and the result does not outlive the borrow of it.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// Closes a descriptor that a library took out of its owner and forgot.
pub(crate) fn close_leaked_fd(fd: RawFd) {
    // SAFETY: the caller recorded `fd` before it gave it to the library, the library never closes it (that is the leak), and
    // the worker that waited on it has been joined.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// A part of the driver's memory that holds a ring, accessed as atomic words. Offsets are in bytes.
pub(crate) struct Area {
    base: *mut u8,
    bytes: usize,
    _region: Arc<Region>,
}

// SAFETY: an area is an address range inside a mapping that `_region` keeps alive; all access is atomic.
unsafe impl Send for Area {}

impl Area {
    /// # Panics
    /// When the word is outside the area or unaligned in it: an error of this crate, never of a driver, because offsets
    /// are made of indices reduced by the ring's size.
    #[inline]
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: just checked to be inside the area.
        unsafe { self.base.add(offset).cast() }
    }

    #[inline]
    pub(crate) fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `at` checked the bounds; the area is aligned for its widest word (see `Memory::area`); the mapping
        // outlives `self`; other processes access it by atomic or single-copy instructions.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }
    }

    #[inline]
    pub(crate) fn u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in `u16`.
        unsafe { AtomicU32::from_ptr(self.at(offset)) }
    }

    #[inline]
    pub(crate) fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `u16`; only used on the descriptor table, which is 16 bytes aligned.
        unsafe { AtomicU64::from_ptr(self.at(offset)) }
    }
}
