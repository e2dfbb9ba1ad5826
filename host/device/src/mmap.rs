//! A shared mapping of a descriptor, and the only ways to touch it.
//!
//! What is mapped is also mapped or reached by someone else who is not trusted, so no Rust reference to plain bytes of it ever exists: bulk data is
//! copied with volatile accesses, ring words are atomics.
//!
//! Ring words are reached through [`Entries`]: its place is checked once, when it is made, and an index is cut to the number of entries, so that no access needs a check.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;
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
        // too: other processes, which are outside of this program, and within it only atomics of the same size, or volatile copies that are ordered against this access by
        // `used.idx` (acquire) or `avail.idx` (release). A device of this very process that writes after it has published is a test's, and its own race.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }
}

/// A power of two of equal entries in a mapping, each of `STRIDE` bytes and aligned to `ALIGN`. A single word is one entry of itself.
///
/// Invariant: the bytes `first .. first + STRIDE * (mask + 1)` are inside `mapping`, `first` and `STRIDE` are multiples of `ALIGN`, and `mask + 1` is a power of two.
#[derive(Debug)]
pub(crate) struct Entries<const STRIDE: usize, const ALIGN: usize> {
    /// Keeps the memory where it is.
    mapping: Arc<Mapping>,
    first: NonNull<u8>,
    mask: u16,
}

// SAFETY: `first` points into `mapping`, which is `Send` and `Sync`; every access is atomic.
unsafe impl<const STRIDE: usize, const ALIGN: usize> Send for Entries<STRIDE, ALIGN> {}
// SAFETY: as for `Send`.
unsafe impl<const STRIDE: usize, const ALIGN: usize> Sync for Entries<STRIDE, ALIGN> {}

impl<const STRIDE: usize, const ALIGN: usize> Entries<STRIDE, ALIGN> {
    /// `count` entries, a power of two, from `offset` of `mapping`.
    ///
    /// # Panics
    /// If they are outside, not aligned, or not a power of two: as for `Mapping::at` a defect of the host.
    pub(crate) fn new(mapping: &Arc<Mapping>, offset: usize, count: u16) -> Self {
        const { assert!(ALIGN.is_power_of_two() && ALIGN <= 8 && STRIDE.is_multiple_of(ALIGN)) };
        assert!(count.is_power_of_two(), "no power of two");
        assert!(offset.is_multiple_of(ALIGN), "misaligned entries");
        let first = mapping.at(offset, STRIDE * usize::from(count));
        let first = NonNull::new(first).expect("inside a mapping, which is not at address 0");
        Self { mapping: Arc::clone(mapping), first, mask: count - 1 }
    }

    /// The address of `BYTES` bytes at `AT` of entry `index`, which is cut to the number of entries.
    #[inline(always)]
    fn word<const AT: usize, const BYTES: usize>(&self, index: u16) -> *mut u8 {
        const { assert!(AT + BYTES <= STRIDE && BYTES <= ALIGN && AT.is_multiple_of(BYTES)) };
        // SAFETY: the cut index is at most `mask` and `AT + BYTES` at most `STRIDE` (checked above, when compiled), so by the invariant of the type the
        // bytes are inside the one mapping that `self` keeps.
        unsafe { self.first.as_ptr().add(usize::from(index & self.mask) * STRIDE + AT) }
    }

    /// The 16-bit word at `AT` of entry `index`, which is cut to the number of entries.
    #[inline(always)]
    pub(crate) fn word16<const AT: usize>(&self, index: u16) -> &AtomicU16 {
        // SAFETY: inside the mapping for as long as `self` is borrowed (`word`), and aligned: `first`, `STRIDE` and `AT` are multiples of 2, since 2 divides
        // `ALIGN` (a power of two that is not less). Others access it too, but within this process only as `Mapping::word16` says.
        unsafe { AtomicU16::from_ptr(self.word::<AT, 2>(index).cast()) }
    }

    /// The 32-bit word at `AT` of entry `index`, which is cut to the number of entries.
    #[inline(always)]
    pub(crate) fn word32<const AT: usize>(&self, index: u16) -> &AtomicU32 {
        // SAFETY: as in `word16`, with 4.
        unsafe { AtomicU32::from_ptr(self.word::<AT, 4>(index).cast()) }
    }

    /// The 64-bit word at `AT` of entry `index`, which is cut to the number of entries.
    #[inline(always)]
    pub(crate) fn word64<const AT: usize>(&self, index: u16) -> &AtomicU64 {
        // SAFETY: as in `word16`, with 8.
        unsafe { AtomicU64::from_ptr(self.word::<AT, 8>(index).cast()) }
    }

    /// The mapping that they are in.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
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
        // SAFETY: this value owns the range (`new`), and no reference into it outlives the borrow that gave it; a pointer that does (`Entries`) lies beside a
        // reference count of this value.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, bytes = self.len, "munmap failed, the mapping stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    const BYTES: usize = 4096;

    fn mapping() -> Arc<Mapping> {
        let file = rustix::fs::memfd_create("mmap", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, BYTES as u64).unwrap();
        Arc::new(Mapping::new(file.as_fd(), BYTES).unwrap())
    }

    #[test]
    fn an_index_is_cut_to_the_number_of_entries() {
        let mapping = mapping();
        let entries = Entries::<16, 8>::new(&mapping, BYTES - 64, 4);
        for index in [0, 1, 2, 3, 4, 7, 0x8001, u16::MAX] {
            mapping.fill(0, BYTES, 0);
            entries.word64::<8>(index).store(u64::MAX, Relaxed);
            let mut all = [0; BYTES];
            mapping.copy_out(0, &mut all);
            let place = BYTES - 64 + usize::from(index % 4) * 16 + 8;
            assert!(all.iter().enumerate().all(|(at, &byte)| (byte == 0xff) == (place..place + 8).contains(&at)));
        }
    }

    #[test]
    fn words_of_each_size_lie_where_they_are_asked_for() {
        let mapping = mapping();
        let entries = Entries::<16, 8>::new(&mapping, 32, 2);
        entries.word16::<6>(1).store(u16::from_le(0x1234), Relaxed);
        entries.word32::<12>(0).store(u32::from_le(0x89ab_cdef), Relaxed);
        let mut bytes = [0; 32];
        mapping.copy_out(32, &mut bytes);
        assert_eq!((&bytes[12..16], &bytes[22..24]), (&[0xef, 0xcd, 0xab, 0x89][..], &[0x34, 0x12][..]));
        assert_eq!(bytes.iter().filter(|&&byte| byte != 0).count(), 6);
    }

    #[test]
    fn entries_that_are_not_all_inside_are_a_defect() {
        let made = |offset, count| {
            let mapping = mapping();
            std::panic::catch_unwind(move || drop(Entries::<16, 8>::new(&mapping, offset, count))).is_ok()
        };
        assert!(made(0, 256) && made(BYTES - 16, 1));
        for (offset, count) in [(8, 256), (BYTES - 8, 1), (BYTES, 1), (usize::MAX - 7, 1), (4, 1), (0, 3), (0, 0)] {
            assert!(!made(offset, count), "{count} at {offset}");
        }
    }
}
