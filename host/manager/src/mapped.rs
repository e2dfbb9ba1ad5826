//! Memory that a client maps for itself: one region per handle, zero-copy, and its own alone (DESIGN section 7, last paragraph).
//!
//! ```text
//! map -> (the device reaches it; the client fills it, submits windows of it) -> handle revoked or closed
//!     -> nothing of the handle in flight -> unmapped from the device, acknowledged -> pages punched, host mapping and descriptor gone
//!                                        \-> not acknowledged: retired on purpose, until the device is shown to be silent
//! ```
//!
//! The last row is carried out by the watching thread while the binding lives, and by the ladder at its end. Neither waits for the client: one in another process keeps
//! a descriptor of a file whose pages are gone, and what it puts there afterwards is on its own account and reaches nobody. A region is never
//! used for a second handle, and its I/O addresses never for a second region of the binding.

mod regions;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cofferdam_device::{Buffer, DmaRegion, RegionError, WindowedRegion};
use cofferdam_gate::{HandleState, Notify};

use crate::binding::Binding;
use crate::handle::Handle;
pub(crate) use crate::mapped::regions::{MapLimits, Regions, Site};

/// A region was not mapped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The handle is revoked, or the binding is leaving.
    #[error("the handle is revoked")]
    Revoked,
    /// A bound is reached; try again when a region of another handle is gone.
    #[error("busy: the binding has its limit of {limit}")]
    Busy {
        /// Which bound, in words: `16 mapped handles`.
        limit: String,
    },
    /// A handle has one region for its life.
    #[error("the handle has its region already")]
    AlreadyMapped,
    /// No region can have this size.
    #[error("a region of {bytes} bytes is not possible: a multiple of 4,096, up to {max_bytes}")]
    Size {
        /// Bytes asked for.
        bytes: u64,
        /// The binding's bound on all regions together.
        max_bytes: u64,
    },
    /// The device takes no memory while it runs.
    #[error("mapped memory cannot be had with this device: {0}")]
    Unsupported(String),
    /// The host or the device failed; the text says how.
    #[error("the region could not be made: {0}")]
    Host(String),
}

/// A client's own memory for zero-copy I/O, made by [`Handle::map`]. Clones are the same region.
///
/// It ends with its handle: when that is revoked or closed, the pages are taken away as soon as nothing of the handle is in flight, and every method answers
/// `Revoked`. The memory is shared with the device and with whoever was given a descriptor: what is read from it may change between two reads.
#[derive(Clone)]
pub struct Mapped {
    share: Arc<Share>,
}

impl std::fmt::Debug for Mapped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mapped").field("bytes", &self.len()).field("gone", &self.is_gone()).finish_non_exhaustive()
    }
}

#[expect(clippy::len_without_is_empty, reason = "a region has at least one page")]
impl Mapped {
    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.share.windows.region().len()
    }

    /// Another descriptor of the memory, a memfd sealed against resizing and further sealing, to be sent to another process and closed here. It can be mapped
    /// from offset 0, [`Mapped::len`] bytes, shared and writable. While it is open in this process the binding's certificate finds it.
    ///
    /// # Errors
    /// [`MapError::Revoked`], or [`MapError::Host`] when the process may have no more descriptors.
    pub fn descriptor(&self) -> Result<OwnedFd, MapError> {
        if self.is_revoked() {
            return Err(MapError::Revoked);
        }
        self.share.windows.region().duplicate().map_err(|error| match error {
            RegionError::Revoked => MapError::Revoked,
            error => MapError::Host(error.to_string()),
        })
    }

    /// The `bytes` bytes at `offset` as the buffer of a request of this region's handle; any other handle's requests with it are invalid. Windows may overlap: what comes of
    /// that is the client's own affair.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] for what is not inside or empty, [`RegionError::Revoked`].
    pub fn window(&self, offset: u64, bytes: u32) -> Result<Buffer, RegionError> {
        if self.is_revoked() {
            return Err(RegionError::Revoked);
        }
        self.share.windows.window(offset, bytes)
    }

    /// Copies from `offset` into all of `into`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] or [`RegionError::Revoked`], and nothing is read.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), RegionError> {
        self.reachable()?.read_at(offset, into)
    }

    /// Copies `from` to `offset`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] or [`RegionError::Revoked`], and nothing is written.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<(), RegionError> {
        self.reachable()?.write_at(offset, from)
    }

    /// Sets `bytes` bytes at `offset` to `value`.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] or [`RegionError::Revoked`], and nothing is written.
    pub fn fill(&self, offset: u64, bytes: u64, value: u8) -> Result<(), RegionError> {
        self.reachable()?.fill(offset, bytes, value)
    }

    /// Whether its handle has been revoked or closed. The memory is still there for as long as something of the handle is in flight.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.share.right.state() == HandleState::Revoked
    }

    /// Whether the memory has been taken away.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.share.taken.load(Ordering::Acquire) || self.share.windows.region().is_gone()
    }

    fn reachable(&self) -> Result<&DmaRegion, RegionError> {
        let is_taken = self.share.taken.load(Ordering::Acquire);
        if is_taken { Err(RegionError::Revoked) } else { Ok(self.share.windows.region()) }
    }
}

/// What a binding's mapped regions take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappedUse {
    /// Regions that count against the bound: their memory is not gone, or not yet.
    pub regions: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that were retired on purpose, because the device has not let go of them.
    pub retired_bytes: u64,
}

impl Binding {
    /// What clients have mapped of it.
    pub fn mapped_use(&self) -> MappedUse {
        self.regions().used()
    }
}

impl Handle {
    /// Makes this handle's own region of `bytes` bytes, a multiple of 4,096, zeroed, and lets the device reach it. At most once for a handle. Waits
    /// for the device, within its bus's time limit.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map(&self, bytes: u64) -> Result<Mapped, MapError> {
        let (owner, lane, regions) = self.for_mapping();
        if owner.state() == HandleState::Revoked {
            return Err(MapError::Revoked);
        }
        if !owner.claim_mapping() {
            return Err(MapError::AlreadyMapped);
        }
        let mapped = regions.map(owner, lane, bytes);
        if mapped.is_err() {
            owner.unclaim_mapping();
        }
        mapped.map(|share| Mapped { share })
    }
}

/// What a handle, its lane and its client know of its region.
pub(crate) struct Share {
    windows: WindowedRegion,
    right: cofferdam_gate::Handle,
    /// Retired: the memory stays because of the device, and is not the client's any more.
    taken: AtomicBool,
    wake: Arc<Notify>,
}

impl Share {
    /// Whether `buffer` is a window of this region.
    pub(crate) fn owns(&self, buffer: &Buffer) -> bool {
        self.windows.owns(buffer)
    }

    /// Has the watching thread look whether the region can go.
    pub(crate) fn wake(&self) {
        self.wake.signal();
    }

    fn region(&self) -> &Arc<DmaRegion> {
        self.windows.region()
    }
}
