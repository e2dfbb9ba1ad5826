//! Leases of DMA memory for payload (DESIGN section 5: a buffer lease ends when the last system call on it has ended, not when the request is answered).
//!
//! Leases are whole pages, so a buffer is 4 KiB aligned for the device. The free list is in private memory. Small sizes are kept in stacks of their own before they go
//! back to the allocator, because nearly all traffic asks for the same few sizes again and again, and what was used last is warm in the cache.

use std::fmt;
use std::sync::Arc;

use offset_allocator::{Allocation, Allocator};
use parking_lot::Mutex;

use crate::buffer::{Buffer, Home, Keeper};
use crate::dma::{DmaRegion, PAGE_BYTES};
use crate::error::{ArenaError, RegionError};

/// Sizes in pages that have a stack: up to 128 KiB.
const STACKS: usize = 32;
/// Most leases that wait in one stack.
const STACK_MAX: usize = 64;

/// Shares one [`DmaRegion`] out in leases. Cloning gives another reference to the same arena.
#[derive(Clone)]
pub struct DmaArena {
    home: Arc<Home>,
    shelves: Arc<Shelves>,
}

/// What is leased, and what is not.
pub(crate) struct Shelves {
    max_bytes: u32,
    state: Mutex<State>,
}

impl Shelves {
    /// A lease of `bytes` bytes has ended.
    pub(crate) fn give_back(&self, bytes: u32, allocation: Allocation<u32>) {
        let pages = pages(bytes);
        let mut state = self.state.lock();
        state.leased_pages -= u64::from(pages);
        state.leased_buffers -= 1;
        state.give_back(pages, allocation);
    }
}

/// Pages of a lease.
fn pages(bytes: u32) -> u32 {
    bytes.div_ceil(PAGE_BYTES as u32)
}

/// Invariant: `pieces` hold what is in no lease and in no stack; `leased_pages` and `leased_buffers` count live [`Buffer`]s.
struct State {
    /// One for the whole region, or one for each of the pages that it is scattered in: no lease crosses the end of one.
    pieces: Vec<Allocator<u32>>,
    /// 4 KiB pages of each piece.
    piece_pages: u32,
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
        if let Some(allocation) = self.cut(pages) {
            return Some(allocation);
        }
        // What waits in the stacks may be just what is missing, once it is joined with its neighbours.
        for number in 0..self.stacks.len() {
            while let Some(allocation) = self.stacks[number].pop() {
                self.join(allocation);
            }
        }
        self.cut(pages)
    }

    /// Takes `pages` out of the first piece that has them in a row.
    fn cut(&mut self, pages: u32) -> Option<Allocation<u32>> {
        self.pieces.iter_mut().zip(0..).find_map(|(piece, number)| {
            let mut allocation = piece.allocate(pages)?;
            allocation.offset += number * self.piece_pages;
            Some(allocation)
        })
    }

    /// The other way round.
    fn join(&mut self, mut allocation: Allocation<u32>) {
        let number = allocation.offset / self.piece_pages;
        allocation.offset -= number * self.piece_pages;
        self.pieces[number as usize].free(allocation);
    }

    fn give_back(&mut self, pages: u32, allocation: Allocation<u32>) {
        match self.stack(pages) {
            Some(stack) if stack.len() < STACK_MAX => stack.push(allocation),
            _ => self.join(allocation),
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
    /// [`RegionError::Shape`] when the region is larger than 2 GiB, or scattered in pages that are: lengths of leases and of descriptors are 32-bit.
    pub fn new(region: Arc<DmaRegion>) -> Result<Self, RegionError> {
        if region.len() > 1 << 31 {
            return Err(RegionError::Shape { bytes: region.len(), iova: region.iova() });
        }
        let piece_pages = (region.run_bytes(0) / PAGE_BYTES) as u32;
        let count = region.len() / region.run_bytes(0);
        // Every node stands for at least a page, and one is on its way while a block is split or joined: the nodes never run out before the pages do.
        let pieces: Vec<_> = (0..count).map(|_| Allocator::with_max_allocs(piece_pages, piece_pages + 4)).collect();
        let largest = pieces.first().map_or(0, |piece| piece.storage_report().largest_free_region);
        let max_pages = largest.min(piece_pages);
        let state = State {
            pieces,
            piece_pages,
            stacks: std::array::from_fn(|_| Vec::with_capacity(STACK_MAX)),
            leased_pages: 0,
            leased_buffers: 0,
            retired: false,
        };
        let max_bytes = max_pages * PAGE_BYTES as u32;
        let shelves = Arc::new(Shelves { max_bytes, state: Mutex::new(state) });
        Ok(Self { home: Arc::new(Home { region, keeper: Keeper::Arena(Arc::clone(&shelves)) }), shelves })
    }

    /// Leases `bytes` bytes. Never blocks for longer than another lease takes. What the memory held before is still there.
    ///
    /// # Errors
    /// [`ArenaError`].
    pub fn lease(&self, bytes: u32) -> Result<Buffer, ArenaError> {
        let shelves = &self.shelves;
        if bytes == 0 || bytes > shelves.max_bytes {
            return Err(ArenaError::Size { bytes, max_bytes: shelves.max_bytes });
        }
        let pages = pages(bytes);
        let mut state = shelves.state.lock();
        if state.retired {
            return Err(ArenaError::Retired);
        }
        let allocation = state.take(pages).ok_or(ArenaError::Exhausted { bytes })?;
        state.leased_pages += u64::from(pages);
        state.leased_buffers += 1;
        drop(state);
        Ok(Buffer::lease(&self.home, allocation, bytes))
    }

    /// Whether `buffer` is a lease of this very arena. Two arenas may use the same I/O addresses, so a buffer of another one must not reach this device.
    #[inline]
    #[must_use]
    pub fn owns(&self, buffer: &Buffer) -> bool {
        buffer.is_of(&self.home)
    }

    /// Largest possible lease in bytes, when nothing else is leased. The allocator sorts free blocks into classes 12.5 % apart, so this may be that much below the
    /// region's length.
    #[must_use]
    pub fn max_lease_bytes(&self) -> u32 {
        self.shelves.max_bytes
    }

    /// Bytes leased now, in whole pages.
    #[must_use]
    pub fn leased_bytes(&self) -> u64 {
        self.shelves.state.lock().leased_pages * PAGE_BYTES
    }

    /// Buffers leased now.
    #[must_use]
    pub fn leased_buffers(&self) -> u64 {
        self.shelves.state.lock().leased_buffers
    }

    /// The region behind it.
    #[must_use]
    pub fn region(&self) -> &Arc<DmaRegion> {
        &self.home.region
    }

    /// Hands nothing out any more and leaks the memory on purpose, because a device may still write to it (DESIGN L1). Buffers that are leased stay
    /// usable and are counted until they drop. Idempotent. Returns the bytes leaked.
    pub fn retire(&self) -> u64 {
        let first = !std::mem::replace(&mut self.shelves.state.lock().retired, true);
        if first { Arc::clone(&self.home.region).retire() } else { self.home.region.len() }
    }

    /// Hands nothing out any more and takes the memory away from every lease that is still held ([`DmaRegion::revoke`]). Idempotent.
    pub fn revoke(&self) {
        self.shelves.state.lock().retired = true;
        self.home.region.revoke();
    }

    /// Buffers whose holders still reach memory: none after [`DmaArena::revoke`].
    #[must_use]
    pub fn live_buffers(&self) -> u64 {
        if self.home.region.is_revoked() { 0 } else { self.leased_buffers() }
    }

    /// Whether [`DmaArena::retire`] or [`DmaArena::revoke`] was called.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.shelves.state.lock().retired
    }
}

impl fmt::Debug for DmaArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.shelves.state.lock();
        f.debug_struct("DmaArena")
            .field("bytes", &self.home.region.len())
            .field("leased_pages", &state.leased_pages)
            .field("leased_buffers", &state.leased_buffers)
            .field("retired", &state.retired)
            .finish()
    }
}
