//! Memory that two processes share, as atomic words: what the null device and the bare ring are made of.
//!
//! Every access is checked against the mapping's length; the check is a compare of two registers, which is not to be seen in a request of 70 ns.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use cofferdam_device::DmaRegion;
use rustix::mm::{MapFlags, ProtFlags};

/// A shared mapping.
///
/// Invariant: `base..base + len` is mapped read-write for as long as this value lives.
#[derive(Debug)]
pub struct Memory {
    base: NonNull<u8>,
    len: usize,
    /// Whose mapping it is; `None`: this value's own.
    owner: Option<Arc<DmaRegion>>,
}

// SAFETY: the mapping belongs to the process, and every access goes through atomics.
unsafe impl Send for Memory {}
// SAFETY: as for `Send`: no method gives out a reference to plain memory.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes of `file` from `offset` on.
    ///
    /// # Errors
    /// What mmap says.
    pub fn map(file: &File, offset: u64, len: usize) -> io::Result<Memory> {
        // SAFETY: with a null hint and without MAP_FIXED the kernel picks a range that nothing in this process uses.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, offset)?
        };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap answered a null address"))?;
        Ok(Memory { base, len, owner: None })
    }

    /// The mapping of a region of the host, which lives as long as this value.
    ///
    /// # Errors
    /// When the region has no address.
    pub fn of_region(region: &Arc<DmaRegion>) -> io::Result<Memory> {
        let base =
            NonNull::new(region.host_address()).ok_or_else(|| io::Error::other("a region without an address"))?;
        Ok(Memory { base, len: region.len() as usize, owner: Some(Arc::clone(region)) })
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// # Panics
    /// If `bytes` bytes at `offset` are not inside, or not aligned: offsets are computed by this crate from what it checked.
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> &T {
        let inside = offset < self.len && size_of::<T>() <= self.len - offset;
        assert!(inside && offset.is_multiple_of(align_of::<T>()), "a word outside the mapping");
        // SAFETY: inside the mapping, which lives as long as `self`, and aligned: the base is page-aligned. `T` is an atomic integer (this method is private and has only such
        // callers), for which any bytes are a value and which others may change meanwhile.
        unsafe { &*self.base.as_ptr().add(offset).cast::<T>() }
    }

    /// A byte.
    #[inline(always)]
    #[must_use]
    pub fn byte(&self, offset: usize) -> &AtomicU8 {
        self.at(offset)
    }

    /// 16 bits.
    #[inline(always)]
    #[must_use]
    pub fn word16(&self, offset: usize) -> &AtomicU16 {
        self.at(offset)
    }

    /// 32 bits.
    #[inline(always)]
    #[must_use]
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        self.at(offset)
    }

    /// 64 bits.
    #[inline(always)]
    #[must_use]
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        self.at(offset)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.owner.is_none() {
            // SAFETY: made by `map`, and no reference into it outlives `self`.
            let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        }
    }
}
