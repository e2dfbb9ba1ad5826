//! Memory that one request moves data from or to: a lease of an arena, or a window of a client's own region.
//!
//! A lane does not care which of the two it is given. The memory is shared with the device, and a window's also with a client that may be another process, so it is
//! only ever copied in and out, or handed to the kernel (see [`crate::transfer`]).

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use offset_allocator::Allocation;

use crate::arena::Shelves;
use crate::dma::{DmaRegion, PAGE_BYTES};
use crate::error::RegionError;

/// A range of DMA memory. A lease is given back when dropped, and is nobody else's until then; a window ends when dropped, and others may overlap it.
///
/// Three words: it is moved several times on the way of a request.
pub struct Buffer {
    home: Arc<Home>,
    /// Of a lease, what goes back to the arena.
    allocation: Option<Allocation<u32>>,
    /// Of a window, its offset in the region.
    offset: u32,
    len: u32,
}

/// Where buffers come from: one per arena and per windowed region.
pub(crate) struct Home {
    pub(crate) region: Arc<DmaRegion>,
    pub(crate) keeper: Keeper,
}

/// Who is told that a buffer is gone.
pub(crate) enum Keeper {
    /// See [`crate::DmaArena::lease`].
    Arena(Arc<Shelves>),
    /// See [`crate::WindowedRegion::window`]: the number of windows.
    Windows(Arc<AtomicU64>),
}

impl Buffer {
    /// A lease of `len` bytes at `allocation`, which is of `home`.
    pub(crate) fn lease(home: &Arc<Home>, allocation: Allocation<u32>, len: u32) -> Self {
        Self { home: Arc::clone(home), allocation: Some(allocation), offset: 0, len }
    }

    /// The window of `len` bytes at `offset`, which the caller has checked to be inside.
    pub(crate) fn window(home: &Arc<Home>, offset: u32, len: u32) -> Self {
        Self { home: Arc::clone(home), allocation: None, offset, len }
    }

    #[inline]
    pub(crate) fn is_of(&self, home: &Arc<Home>) -> bool {
        Arc::ptr_eq(&self.home, home)
    }

    #[inline]
    fn region(&self) -> &DmaRegion {
        &self.home.region
    }

    /// Offset of the first byte in the region.
    #[inline]
    fn start(&self) -> u64 {
        match self.allocation {
            Some(allocation) => u64::from(allocation.offset) * PAGE_BYTES,
            None => u64::from(self.offset),
        }
    }

    /// I/O address of the first byte. A multiple of 4096 for a lease, any address for a window.
    #[inline]
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.region().address_of(self.start())
    }

    /// Bytes, as they were asked for.
    #[inline]
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a buffer has at least one byte")]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Copies `from` to `offset`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], and nothing is written.
    pub fn write_at(&self, offset: u32, from: &[u8]) -> Result<(), RegionError> {
        let place = self.place(offset, from.len())?;
        self.region().write_at(place, from)
    }

    /// Copies from `offset` into all of `into`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], and nothing is read.
    pub fn read_at(&self, offset: u32, into: &mut [u8]) -> Result<(), RegionError> {
        let place = self.place(offset, into.len())?;
        self.region().read_at(place, into)
    }

    /// Sets `bytes` bytes at `offset` to `value`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], and nothing is written.
    pub fn fill(&self, offset: u32, bytes: u32, value: u8) -> Result<(), RegionError> {
        let place = self.place(offset, bytes as usize)?;
        self.region().fill(place, u64::from(bytes), value)
    }

    /// Never gives the memory back, because the device may still write there (DESIGN L1). It stays counted.
    pub fn retire(self) {
        std::mem::forget(self);
    }

    /// Where `range` of the buffer is mapped, and its length, if it is inside.
    pub(crate) fn host_range(&self, range: &Range<u32>) -> Option<(*mut u8, usize)> {
        if range.start > range.end || range.end > self.len || self.region().is_revoked() {
            return None;
        }
        let start = usize::try_from(self.start()).ok()? + range.start as usize;
        // Inside the mapping, since the buffer is; `wrapping_add` only spares an unsafe block.
        Some((self.region().host_address().wrapping_add(start), (range.end - range.start) as usize))
    }

    /// The offset in the region of `bytes` bytes at `offset`, if they are inside this buffer.
    fn place(&self, offset: u32, bytes: usize) -> Result<u64, RegionError> {
        if offset > self.len || bytes > (self.len - offset) as usize {
            return Err(RegionError::OutOfRange {
                offset: u64::from(offset),
                bytes: bytes as u64,
                region_bytes: u64::from(self.len),
            });
        }
        Ok(self.start() + u64::from(offset))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match (&self.home.keeper, self.allocation) {
            (Keeper::Arena(shelves), Some(allocation)) => shelves.give_back(self.len, allocation),
            (Keeper::Windows(live), None) => {
                live.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
            }
            // Neither is ever made.
            (Keeper::Arena(_), None) | (Keeper::Windows(_), Some(_)) => {}
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("iova", &format_args!("{:#x}", self.iova())).field("len", &self.len).finish()
    }
}
