//! One mapped run of a function's registers, and the only ways to touch it.
//!
//! Registers are no memory: each access has the width that was asked for, happens once and in order (volatile), and no reference to them ever exists. A range is taken away by
//! [`Mmio::revoke`] while others may still hold it: it stays valid, and holds private zeroes from then on.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use cofferdam_device::Width;
use rustix::mm::{MapFlags, ProtFlags};

/// Registers, mapped read-write and shared.
///
/// Invariant: `base .. base + mapped` is mapped read-write for as long as this value lives, `base` is page-aligned, `lead` is a multiple of 8, and `lead + bytes <= mapped`.
#[derive(Debug)]
pub(crate) struct Mmio {
    base: NonNull<u8>,
    mapped: usize,
    lead: usize,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; every access is volatile, and what races on registers races in the function, not in this program.
unsafe impl Send for Mmio {}
// SAFETY: as for `Send`: no method gives out a reference to what is mapped.
unsafe impl Sync for Mmio {}

/// Bytes in a page of this machine.
pub(crate) fn page_bytes() -> u64 {
    // SAFETY: `sysconf` takes a number and touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).ok().filter(|bytes| bytes.is_power_of_two()).unwrap_or(4096)
}

impl Mmio {
    /// Maps `bytes` bytes that begin `lead` bytes after `offset` of `fd`; `offset` is a multiple of the page size, `lead` one of 8 that is less than a page. The pages that hold
    /// them are mapped whole, because nothing less can be; only the `bytes` can be reached.
    ///
    /// # Errors
    /// `InvalidInput` for a shape that cannot be; else what mmap says.
    pub(crate) fn map(fd: BorrowedFd<'_>, offset: u64, lead: u64, bytes: u64) -> io::Result<Self> {
        let page = page_bytes();
        let shape = || io::Error::new(io::ErrorKind::InvalidInput, "registers that are empty, not aligned or too long");
        if bytes == 0 || !offset.is_multiple_of(page) || !lead.is_multiple_of(8) || lead >= page {
            return Err(shape());
        }
        let whole = lead.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(page)).ok_or_else(shape)?;
        if offset.checked_add(whole).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(shape());
        }
        let of = |value: u64| usize::try_from(value).map_err(|_| shape());
        let (mapped, lead, bytes) = (of(whole)?, of(lead)?, of(bytes)?);
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks a range that nothing in this process uses, so no existing object changes.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, offset)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap answered a null address"))?;
        Ok(Self { base, mapped, lead, bytes })
    }

    /// Bytes that can be reached.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// The address of `width` at `offset`, if that is inside and aligned.
    #[inline]
    fn at(&self, offset: u64, width: Width) -> Option<*mut u8> {
        let size = width.bytes() as usize;
        let offset = usize::try_from(offset).ok()?;
        if !offset.is_multiple_of(size) || size > self.bytes || offset > self.bytes - size {
            return None;
        }
        // SAFETY: `offset + size <= bytes` (checked above) and `lead + bytes <= mapped` (invariant), so the result is inside the one mapping.
        Some(unsafe { self.base.as_ptr().add(self.lead + offset) })
    }

    /// Reads `width` at `offset`, little-endian; `None` when that is outside or not aligned.
    #[inline]
    pub(crate) fn read(&self, offset: u64, width: Width) -> Option<u64> {
        let from = self.at(offset, width)?;
        // SAFETY: `at` has checked that the bytes are inside the mapping, which lives as long as `self`. The address is aligned to the width: the base is page-aligned, `lead` a
        // multiple of 8 (invariant), `offset` one of the width (`at`). Any bit pattern is an integer.
        unsafe {
            Some(match width {
                Width::U8 => u64::from(from.read_volatile()),
                Width::U16 => u64::from(u16::from_le(from.cast::<u16>().read_volatile())),
                Width::U32 => u64::from(u32::from_le(from.cast::<u32>().read_volatile())),
                Width::U64 => u64::from_le(from.cast::<u64>().read_volatile()),
            })
        }
    }

    /// Writes the low bits of `value` at `offset`, little-endian; `None`, and nothing is written, when that is outside or not aligned.
    #[inline]
    pub(crate) fn write(&self, offset: u64, width: Width, value: u64) -> Option<()> {
        let to = self.at(offset, width)?;
        // SAFETY: as in `read`. Nothing of this program lies there, so nothing of it changes.
        unsafe {
            match width {
                Width::U8 => to.write_volatile(value as u8),
                Width::U16 => to.cast::<u16>().write_volatile((value as u16).to_le()),
                Width::U32 => to.cast::<u32>().write_volatile((value as u32).to_le()),
                Width::U64 => to.cast::<u64>().write_volatile(value.to_le()),
            }
        }
        Some(())
    }

    /// Takes the registers away: the range stays valid for as long as `self` lives, but holds private zeroes. An access that runs at the same time meets either.
    pub(crate) fn revoke(&self) -> io::Result<()> {
        let flags = MapFlags::FIXED | MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the range is `self`'s own mapping (invariant), so nothing else changes; it is replaced in one step by memory of the same protection, so the invariant holds
        // before and after and no access in between faults.
        unsafe {
            rustix::mm::mmap_anonymous(
                self.base.as_ptr().cast(),
                self.mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )?
        };
        Ok(())
    }
}

impl Drop for Mmio {
    fn drop(&mut self) {
        // SAFETY: the range is `self`'s own mapping (invariant), nobody borrows `self` any more, and no pointer into it leaves this file. An error would mean that it was no
        // mapping, and leaves it as it is.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.mapped) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;

    fn file(bytes: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("registers", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes).unwrap();
        file
    }

    fn at(file: &OwnedFd, offset: u64, bytes: usize) -> Vec<u8> {
        let mut found = vec![0; bytes];
        assert_eq!(rustix::io::pread(file, &mut found, offset).unwrap(), bytes);
        found
    }

    #[test]
    fn each_width_touches_its_own_bytes_and_no_more() {
        let file = file(4096);
        let registers = Mmio::map(file.as_fd(), 0, 0, 4096).unwrap();
        for (width, bytes) in [(Width::U8, 1), (Width::U16, 2), (Width::U32, 4), (Width::U64, 8)] {
            rustix::io::pwrite(&file, &[0xaa; 24], 0).unwrap();
            registers.write(8, width, 0x1122_3344_5566_7788).unwrap();
            let mut expected = [0xaa; 24];
            expected[8..8 + bytes].copy_from_slice(&0x1122_3344_5566_7788_u64.to_le_bytes()[..bytes]);
            assert_eq!(at(&file, 0, 24), expected, "{width:?}");
            let mask = u64::MAX >> (64 - 8 * bytes);
            assert_eq!(registers.read(8, width), Some(0x1122_3344_5566_7788 & mask), "{width:?}");
        }
    }

    #[test]
    fn nothing_outside_or_misaligned_is_touched() {
        let file = file(8192);
        rustix::io::pwrite(&file, &[0xaa; 8192], 0).unwrap();
        let registers = Mmio::map(file.as_fd(), 0, 0, 20).unwrap();
        let never = [
            (20, Width::U8),
            (18, Width::U32),
            (20, Width::U32),
            (16, Width::U64),
            (1, Width::U16),
            (2, Width::U32),
            (4, Width::U64),
            (u64::MAX, Width::U8),
            (u64::MAX - 7, Width::U64),
        ];
        for (offset, width) in never {
            assert_eq!(registers.read(offset, width), None, "{offset} {width:?}");
            assert_eq!(registers.write(offset, width, 0), None, "{offset} {width:?}");
        }
        assert_eq!(at(&file, 0, 8192), [0xaa; 8192]);
        assert_eq!(registers.read(19, Width::U8), Some(0xaa));
        assert_eq!(registers.read(16, Width::U32), Some(0xaaaa_aaaa));
    }

    #[test]
    fn registers_of_less_than_a_page_are_reached_where_they_are_in_it() {
        let file = file(8192);
        rustix::io::pwrite(&file, &0x1234_5678_u32.to_le_bytes(), 4096 + 0x840).unwrap();
        let registers = Mmio::map(file.as_fd(), 4096, 0x840, 32).unwrap();
        assert_eq!(registers.bytes(), 32);
        assert_eq!(registers.read(0, Width::U32), Some(0x1234_5678));
        assert_eq!(registers.read(32, Width::U8), None, "the next function's");
    }

    #[test]
    fn shapes_that_cannot_be_are_refused() {
        let file = file(8192);
        for (offset, lead, bytes) in
            [(0, 0, 0), (1, 0, 8), (0, 4, 8), (0, 4096, 8), (0, 8, u64::MAX), (u64::MAX - 4095, 0, 8), (1 << 63, 0, 8)]
        {
            let error = Mmio::map(file.as_fd(), offset, lead, bytes).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{offset} {lead} {bytes}");
        }
    }

    #[test]
    fn what_is_revoked_reaches_nothing_and_faults_nobody() {
        let file = file(4096);
        let registers = Mmio::map(file.as_fd(), 0, 0, 4096).unwrap();
        registers.write(0, Width::U32, 7).unwrap();
        registers.revoke().unwrap();
        assert_eq!(registers.read(0, Width::U32), Some(0));
        registers.write(0, Width::U32, 9).unwrap();
        assert_eq!(at(&file, 0, 4), 7_u32.to_le_bytes());
    }
}
