//! A shared mapping, and the only ways to touch it.
//!
//! The other side of the memory is another process (and a device), so no Rust reference to plain bytes of it ever exists: bulk data is copied with
//! volatile accesses, words are atomics.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU32;

use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// One shared read-write mapping of a whole memfd.
///
/// Invariant: `base..base + len` is mapped read-write for as long as this value lives, `base` is page-aligned, and the file behind it cannot shrink
/// (looked up in [`Mapping::new`]; a seal is never taken back), so that no access inside faults. Pages that the host punches out read as zeroes.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; every access goes through atomics or volatile copies, none of which assumes that it is alone.
unsafe impl Send for Mapping {}
// SAFETY: as for `Send`: all methods take `&self` and none gives out a reference to plain memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `len` bytes of `fd`.
    ///
    /// # Errors
    /// `InvalidData` unless it is a memfd of at least that length, sealed against shrinking; else the system's.
    pub(crate) fn new(fd: BorrowedFd<'_>, len: usize) -> io::Result<Mapping> {
        let bad = |why| io::Error::new(io::ErrorKind::InvalidData, why);
        // Only memory files have seals: others answer EINVAL.
        let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| bad("the descriptor is no memory file"))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(bad("the memory file is not sealed against shrinking"));
        }
        let size = u64::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(0);
        if len == 0 || size < len as u64 {
            return Err(bad("the memory file is too short"));
        }
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks a range that nothing in this process uses, so no existing object changes.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap answered a null address"))?;
        Ok(Mapping { base, len })
    }

    /// The address of `bytes` bytes at `offset`, if they are inside.
    #[inline]
    pub(crate) fn at(&self, offset: usize, bytes: usize) -> Option<*mut u8> {
        let inside = offset <= self.len && bytes <= self.len - offset;
        // SAFETY: `offset` is at most `len` (checked above), and the whole range is one mapping.
        inside.then(|| unsafe { self.base.as_ptr().add(offset) })
    }

    /// Copies `from` to `offset`; `None`, and nothing is written, when that is not inside.
    #[must_use]
    pub(crate) fn copy_in(&self, offset: usize, from: &[u8]) -> Option<()> {
        let to = self.at(offset, from.len())?;
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
        Some(())
    }

    /// Copies from `offset` into all of `into`; `None`, and nothing is read, when that is not inside.
    #[must_use]
    pub(crate) fn copy_out(&self, offset: usize, into: &mut [u8]) -> Option<()> {
        let from = self.at(offset, into.len())?;
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
        Some(())
    }

    /// The 32-bit word at `offset`, if it is inside and aligned.
    #[inline]
    pub(crate) fn word(&self, offset: usize) -> Option<&AtomicU32> {
        let place = self.at(offset, 4)?;
        // SAFETY: inside the mapping (`at`), aligned since the base is page-aligned and `offset` is a multiple of 4, valid as long as `self` is borrowed. Others
        // access it too, but within this process only by atomics and volatile copies.
        offset.is_multiple_of(4).then(|| unsafe { AtomicU32::from_ptr(place.cast()) })
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
        // SAFETY: this value owns the range (`new`). Pointers from `at` may outlive it, but only in a caller's own unsafe code, which `Slot::address` binds to the
        // slot's life.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::MemfdFlags;

    use super::*;

    #[test]
    fn copies_and_words_stay_inside() {
        let file = rustix::fs::memfd_create(c"mapping-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 4096).unwrap();
        assert!(Mapping::new(file.as_fd(), 4096).is_err(), "not sealed");
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        assert!(Mapping::new(file.as_fd(), 4097).is_err(), "too short");
        let mapping = Mapping::new(file.as_fd(), 4096).unwrap();
        for (offset, bytes) in [(0, 4096), (1, 7), (3, 21), (4095, 1), (4096, 0)] {
            let from: Vec<u8> = (0..bytes).map(|at| at as u8 ^ 0x5a).collect();
            let mut into = vec![0; bytes];
            assert!(mapping.copy_in(offset, &from).is_some() && mapping.copy_out(offset, &mut into).is_some());
            assert_eq!(into, from);
        }
        for (offset, bytes) in [(0, 4097), (4096, 1), (usize::MAX, 1), (1, 4096)] {
            assert!(mapping.copy_in(offset, &vec![0; bytes]).is_none());
            assert!(mapping.copy_out(offset, &mut vec![0; bytes]).is_none());
        }
        assert!(mapping.word(4092).is_some());
        assert!(mapping.word(4093).is_none() && mapping.word(4096).is_none() && mapping.word(2).is_none());
    }

    #[test]
    fn a_file_that_is_no_memory_file_is_not_mapped() {
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(Mapping::new(file.as_fd(), 4096).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
