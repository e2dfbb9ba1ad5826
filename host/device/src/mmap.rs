//! A shared mapping of a descriptor, and the only ways to touch it.
//!
//! What is mapped is also mapped or reached by someone else who is not trusted, so no Rust reference to plain bytes of it ever exists: bulk data is
//! copied with volatile accesses, ring words are atomics.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

use rustix::mm::{MapFlags, ProtFlags};

/// One shared read-write mapping.
///
/// Invariant: `base..base + len` is mapped read-write for as long as this value lives, `base` is page-aligned, and the file
/// behind it cannot shrink (the maker sealed it), so that an access inside never faults.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; every access goes through atomics, volatile copies or the kernel, none of which
// assumes that it is alone.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`: all methods take `&self` and none gives out a reference to plain memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `fd`, which must be sealed against shrinking.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks a range that nothing in this process uses, so no existing object changes.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap answered a null address"))?;
        Ok(Self { base, len })
    }

    /// Bytes mapped.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// First byte, for iovecs and for telling a backend. Valid while the mapping lives.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Whether `bytes` bytes at `offset` are inside.
    #[inline]
    pub(crate) fn contains(&self, offset: usize, bytes: usize) -> bool {
        offset <= self.len && bytes <= self.len - offset
    }

    /// The address of `bytes` bytes at `offset`.
    ///
    /// # Panics
    /// If they are outside: offsets are computed by the host from what it checked before, so this is a defect of the host.
    #[inline]
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(self.contains(offset, bytes), "access outside the mapping");
        // SAFETY: `offset` is at most `len` (checked above), and the whole range is one mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Copies `from` to `offset`. Panics when outside, as `at`.
    pub(crate) fn copy_in(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        let (head, words) = split(to, from.len());
        // SAFETY: `to .. to + from.len()` was checked by `at`; `from` is a valid slice; they cannot overlap, because no slice over the mapping exists.
        // `to + head` is 8-aligned by `split`, and `head + 8 * words <= from.len()`.
        unsafe {
            let source = from.as_ptr();
            for index in 0..head {
                to.add(index).write_volatile(*source.add(index));
            }
            for word in 0..words {
                let place = head + 8 * word;
                to.add(place).cast::<u64>().write_volatile(source.add(place).cast::<u64>().read_unaligned());
            }
            for index in head + 8 * words..from.len() {
                to.add(index).write_volatile(*source.add(index));
            }
        }
    }

    /// Copies from `offset` into all of `into`. Panics when outside, as `at`.
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        let (head, words) = split(from, into.len());
        // SAFETY: as in `copy_in`, with the sides exchanged.
        unsafe {
            let target = into.as_mut_ptr();
            for index in 0..head {
                *target.add(index) = from.add(index).read_volatile();
            }
            for word in 0..words {
                let place = head + 8 * word;
                target.add(place).cast::<u64>().write_unaligned(from.add(place).cast::<u64>().read_volatile());
            }
            for index in head + 8 * words..into.len() {
                *target.add(index) = from.add(index).read_volatile();
            }
        }
    }

    /// Sets `bytes` bytes at `offset` to `value`. Panics when outside, as `at`.
    pub(crate) fn fill(&self, offset: usize, bytes: usize, value: u8) {
        let to = self.at(offset, bytes);
        let (head, words) = split(to, bytes);
        // SAFETY: as in `copy_in`.
        unsafe {
            for index in 0..head {
                to.add(index).write_volatile(value);
            }
            for word in 0..words {
                to.add(head + 8 * word).cast::<u64>().write_volatile(u64::from_ne_bytes([value; 8]));
            }
            for index in head + 8 * words..bytes {
                to.add(index).write_volatile(value);
            }
        }
    }

    /// Takes the pages away: the range stays valid for as long as `self` lives, but holds private zeroes from now on, and `file`'s number refers to
    /// `/dev/null`. An access that runs at the same time sees either memory. Order: `/dev/null` first, so that nobody can map the old file again.
    pub(crate) fn revoke(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        crate::hollow::hollow_out(file)?;
        let flags = MapFlags::FIXED | MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the range is `self`'s own mapping (invariant of the type), so nothing else changes; it is replaced in one step by memory with the same protection,
        // so the invariant of the type holds before and after, and an access in between faults at no moment.
        unsafe {
            rustix::mm::mmap_anonymous(self.base.as_ptr().cast(), self.len, ProtFlags::READ | ProtFlags::WRITE, flags)?
        };
        Ok(())
    }

    /// The 16-bit word at `offset`. Panics when outside or not aligned.
    #[inline]
    pub(crate) fn word16(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2), "misaligned word");
        // SAFETY: inside the mapping (`at`) and aligned, since the base is page-aligned; valid as long as `self` is borrowed. Others access it
        // too, but within this process only by atomics and volatile copies of the very same size or by a caller that is its own race.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// The 32-bit word at `offset`. Panics when outside or not aligned.
    #[inline]
    pub(crate) fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "misaligned word");
        // SAFETY: as in `word16`.
        unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }
    }

    /// The 64-bit word at `offset`. Panics when outside or not aligned.
    #[inline]
    pub(crate) fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "misaligned word");
        // SAFETY: as in `word16`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }
}

/// Bytes before the first 8-aligned address of `bytes` bytes at `start`, and the number of whole words from there.
#[inline]
fn split(start: *mut u8, bytes: usize) -> (usize, usize) {
    let head = (start.addr().wrapping_neg() & 7).min(bytes);
    (head, (bytes - head) / 8)
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the range (`new`), and no pointer or reference into it outlives the borrow that gave it.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, bytes = self.len, "munmap failed, the mapping stays");
        }
    }
}
