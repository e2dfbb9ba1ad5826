//! Memory that one request moves data from or to: a lease of an arena, or a window of a client's own region.
//!
//! A lane does not care which of the two it is given. The memory is shared with the device, and a window's also with a client that may be another process, so it is
//! only ever copied in and out, or handed to the kernel (see [`crate::transfer`]).

use std::fmt;
use std::ops::Range;

use crate::arena::Lease;
use crate::dma::DmaRegion;
use crate::error::RegionError;
use crate::window::Window;

/// A range of DMA memory. A lease is given back when dropped, and is nobody else's until then; a window ends when dropped, and others may overlap it.
pub struct Buffer {
    origin: Origin,
    /// Offset in the region.
    start: u64,
    len: u32,
}

/// Where a buffer comes from.
pub(crate) enum Origin {
    /// See [`crate::DmaArena::lease`].
    Lease(Lease),
    /// See [`crate::WindowedRegion::window`].
    Window(Window),
}

impl Buffer {
    /// `len` bytes at `start` of the origin's region, which the caller has checked to be inside.
    pub(crate) fn new(origin: Origin, start: u64, len: u32) -> Self {
        Self { origin, start, len }
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    fn region(&self) -> &DmaRegion {
        match &self.origin {
            Origin::Lease(lease) => lease.region(),
            Origin::Window(window) => window.region(),
        }
    }

    /// I/O address of the first byte. A multiple of 4096 for a lease, any address for a window.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.region().iova() + self.start
    }

    /// Bytes, as they were asked for.
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
        let start = usize::try_from(self.start).ok()? + range.start as usize;
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
        Ok(self.start + u64::from(offset))
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("iova", &format_args!("{:#x}", self.iova())).field("len", &self.len).finish()
    }
}
