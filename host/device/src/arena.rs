//! Leases of DMA memory for payload (DESIGN section 5: a buffer lease ends when the last system call on it has ended, not when the request is answered).
//!
//! Leases are whole pages, so a buffer is 4 KiB aligned for the device. The free list is in private memory. Small sizes are kept in stacks of their own before they go
//! back to the allocator, because nearly all traffic asks for the same few sizes again and again, and what was used last is warm in the cache.

use std::fmt;
use std::sync::Arc;

use offset_allocator::{Allocation, Allocator};
use parking_lot::Mutex;

use crate::buffer::{Buffer, Origin};
use crate::dma::{DmaRegion, PAGE_BYTES};
use crate::error::{ArenaError, RegionError};

/// Sizes in pages that have a stack: up to 128 KiB.
const STACKS: usize = 32;
/// Most leases that wait in one stack.
const STACK_MAX: usize = 64;

/// Shares one [`DmaRegion`] out in leases. Cloning gives another reference to the same arena.
#[derive(Clone)]
pub struct DmaArena {
    shared: Arc<Shared>,
}

struct Shared {
    region: Arc<DmaRegion>,
    max_bytes: u32,
    state: Mutex<State>,
}

/// Invariant: `allocator` holds what is in no lease and in no stack; `leased_pages` and `leased_buffers` count live [`Buffer`]s.
struct State {
    allocator: Allocator<u32>,
    stacks: [Vec<Allocation<u32>>; STACKS],
    leased_pages: u64,
    leased_buffers: u64,
    retired: bool,
}

impl State {
    fn take(&mut self, pages: u32) -> Option<Allocation<u32>> {
        if let Some(allocation) = self.stack(pages).and_then(Vec::pop) {
            return Some(allocation);
        }
        if let Some(allocation) = self.allocator.allocate(pages) {
            return Some(allocation);
        }
        // What waits in the stacks may be just what is missing, once it is joined with its neighbours.
        for stack in &mut self.stacks {
            for allocation in stack.drain(..) {
                self.allocator.free(allocation);
            }
        }
        self.allocator.allocate(pages)
    }

    fn give_back(&mut self, pages: u32, allocation: Allocation<u32>) {
        match self.stack(pages) {
            Some(stack) if stack.len() < STACK_MAX => stack.push(allocation),
            _ => self.allocator.free(allocation),
        }
    }

    fn stack(&mut self, pages: u32) -> Option<&mut Vec<Allocation<u32>>> {
        self.stacks.get_mut((pages as usize).wrapping_sub(1))
    }
}

impl DmaArena {
    /// Takes all of `region`, which must hold nothing else.
    ///
    /// # Errors
    /// [`RegionError::Shape`] when the region is larger than 2 GiB: lengths of leases and of descriptors are 32-bit.
    pub fn new(region: Arc<DmaRegion>) -> Result<Self, RegionError> {
        if region.len() > 1 << 31 {
            return Err(RegionError::Shape { bytes: region.len(), iova: region.iova() });
        }
        let pages = (region.len() / PAGE_BYTES) as u32;
        // Every node stands for at least a page, and one is on its way while a block is split or joined: the nodes never run out before the pages do.
        let allocator = Allocator::with_max_allocs(pages, pages + 4);
        let max_pages = allocator.storage_report().largest_free_region.min(pages);
        let state = State {
            allocator,
            stacks: std::array::from_fn(|_| Vec::with_capacity(STACK_MAX)),
            leased_pages: 0,
            leased_buffers: 0,
            retired: false,
        };
        let max_bytes = max_pages * PAGE_BYTES as u32;
        Ok(Self { shared: Arc::new(Shared { region, max_bytes, state: Mutex::new(state) }) })
    }

    /// Leases `bytes` bytes. Never blocks for longer than another lease takes. What the memory held before is still there.
    ///
    /// # Errors
    /// [`ArenaError`].
    pub fn lease(&self, bytes: u32) -> Result<Buffer, ArenaError> {
        let shared = &self.shared;
        if bytes == 0 || bytes > shared.max_bytes {
            return Err(ArenaError::Size { bytes, max_bytes: shared.max_bytes });
        }
        let pages = bytes.div_ceil(PAGE_BYTES as u32);
        let mut state = shared.state.lock();
        if state.retired {
            return Err(ArenaError::Retired);
        }
        let allocation = state.take(pages).ok_or(ArenaError::Exhausted { bytes })?;
        state.leased_pages += u64::from(pages);
        state.leased_buffers += 1;
        drop(state);
        let lease = Lease { arena: Arc::clone(shared), allocation, pages };
        let start = lease.start();
        Ok(Buffer::new(Origin::Lease(lease), start, bytes))
    }

    /// Whether `buffer` is a lease of this very arena. Two arenas may use the same I/O addresses, so a buffer of another one must not reach this device.
    #[must_use]
    pub fn owns(&self, buffer: &Buffer) -> bool {
        matches!(buffer.origin(), Origin::Lease(lease) if Arc::ptr_eq(&self.shared, &lease.arena))
    }

    /// Largest possible lease in bytes, when nothing else is leased. The allocator sorts free blocks into classes 12.5 % apart, so this may be that much below the
    /// region's length.
    #[must_use]
    pub fn max_lease_bytes(&self) -> u32 {
        self.shared.max_bytes
    }

    /// Bytes leased now, in whole pages.
    #[must_use]
    pub fn leased_bytes(&self) -> u64 {
        self.shared.state.lock().leased_pages * PAGE_BYTES
    }

    /// Buffers leased now.
    #[must_use]
    pub fn leased_buffers(&self) -> u64 {
        self.shared.state.lock().leased_buffers
    }

    /// The region behind it.
    #[must_use]
    pub fn region(&self) -> &Arc<DmaRegion> {
        &self.shared.region
    }

    /// Hands nothing out any more and leaks the memory on purpose, because a device may still write to it (DESIGN L1). Buffers that are leased stay
    /// usable and are counted until they drop. Idempotent. Returns the bytes leaked.
    pub fn retire(&self) -> u64 {
        let first = !std::mem::replace(&mut self.shared.state.lock().retired, true);
        if first { Arc::clone(&self.shared.region).retire() } else { self.shared.region.len() }
    }

    /// Hands nothing out any more and takes the memory away from every lease that is still held ([`DmaRegion::revoke`]). Idempotent.
    pub fn revoke(&self) {
        self.shared.state.lock().retired = true;
        self.shared.region.revoke();
    }

    /// Buffers whose holders still reach memory: none after [`DmaArena::revoke`].
    #[must_use]
    pub fn live_buffers(&self) -> u64 {
        if self.shared.region.is_revoked() { 0 } else { self.leased_buffers() }
    }

    /// Whether [`DmaArena::retire`] or [`DmaArena::revoke`] was called.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.shared.state.lock().retired
    }
}

impl fmt::Debug for DmaArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shared.state.lock();
        f.debug_struct("DmaArena")
            .field("bytes", &self.shared.region.len())
            .field("leased_pages", &state.leased_pages)
            .field("leased_buffers", &state.leased_buffers)
            .field("retired", &state.retired)
            .finish()
    }
}

/// The arena's half of a [`Buffer`]: what goes back when it is dropped.
pub(crate) struct Lease {
    arena: Arc<Shared>,
    allocation: Allocation<u32>,
    pages: u32,
}

impl Lease {
    /// The region that the lease is in.
    pub(crate) fn region(&self) -> &Arc<DmaRegion> {
        &self.arena.region
    }

    /// Where the lease begins in its region.
    fn start(&self) -> u64 {
        u64::from(self.allocation.offset) * PAGE_BYTES
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.arena.state.lock();
        state.leased_pages -= u64::from(self.pages);
        state.leased_buffers -= 1;
        state.give_back(self.pages, self.allocation);
    }
}
