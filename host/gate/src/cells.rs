//! Rows of counters: one page per core, so that no core ever writes a line of another core (G4).
//!
//! A block is one mapping of `rows()` pages. The same 64 bytes of every page make the counters
//! of one gate, the same 16 bytes those of one handle. A page is first touched by its own core,
//! so it comes from that core's memory; pages of cores that never ran are never allocated.
#![allow(unsafe_code)]

use crate::cpu::Row;
use crate::sync::atomic::AtomicU64;

/// A counter in a row. A handle has the first two only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Column {
    /// Operations admitted.
    Entered = 0,
    /// Operations answered.
    Left = 1,
    /// Crossings begun.
    In = 2,
    /// Crossings ended.
    Out = 3,
    /// Admissions refused because the gate was closed or the handle revoked.
    Refused = 4,
    /// Admissions refused because the gate was held.
    Held = 5,
}

/// Counters of a gate: one cache line per core.
pub(crate) type Line = Cells<8>;
/// Counters of a handle: `Entered` and `Left`.
pub(crate) type Pair = Cells<2>;

/// Bytes between the same counter on neighbouring cores (a power of two; the section in
/// `rseq.rs` shifts by its logarithm).
#[cfg(not(loom))]
pub(crate) const STRIDE_BYTES: usize = 4096;

/// `COLUMNS` counters per row.
///
/// Invariant: `base` is 8-byte aligned and points into the first page of a mapping that is
/// never unmapped, `COLUMNS * 8` bytes from `base` lie in that page, and the mapping holds
/// `rows()` pages that can be read and written.
#[cfg(not(loom))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cells<const COLUMNS: usize> {
    base: *const u8,
}

// SAFETY: `Cells` names atomics in memory that lives for ever; nothing in it belongs to a thread.
#[cfg(not(loom))]
unsafe impl<const COLUMNS: usize> Send for Cells<COLUMNS> {}
// SAFETY: as above; all access goes through atomics, or through the section in `rseq.rs`.
#[cfg(not(loom))]
unsafe impl<const COLUMNS: usize> Sync for Cells<COLUMNS> {}

#[cfg(not(loom))]
impl<const COLUMNS: usize> Cells<COLUMNS> {
    /// How many sets of counters one block makes.
    pub(crate) const PER_BLOCK: usize = STRIDE_BYTES / (COLUMNS * size_of::<u64>());

    /// Maps one block and cuts it up. Never unmapped: late entrants may always look (G7).
    ///
    /// # Panics
    /// When the process is out of address space, as every allocation would.
    pub(crate) fn block() -> Vec<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // Miri knows no other flag than the first.
        let flags = if cfg!(miri) { MapFlags::PRIVATE } else { MapFlags::PRIVATE | MapFlags::NORESERVE };
        let bytes = crate::cpu::rows() * STRIDE_BYTES;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice aliases nothing.
        let map = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags) };
        let page = map.expect("address space for gate counters").cast::<u8>().cast_const();
        let pitch_bytes = COLUMNS * size_of::<u64>();
        (0..Self::PER_BLOCK).map(|set| Cells { base: page.wrapping_add(set * pitch_bytes) }).collect()
    }

    /// The counter of `column` in `row`.
    #[inline]
    pub(crate) fn at(self, row: Row, column: Column) -> &'static AtomicU64 {
        self.by_number(row, column as usize)
    }

    /// The same by the number of the column.
    #[inline]
    pub(crate) fn by_number(self, row: Row, column: usize) -> &'static AtomicU64 {
        assert!(column < COLUMNS);
        let offset_bytes = row.index() * STRIDE_BYTES + column * size_of::<u64>();
        // SAFETY: by the invariants of `Cells` and of `Row` (`index() < rows()`) the address lies
        // in the mapping (the column was checked), which lives for ever; it is 8-byte aligned;
        // any bytes are an AtomicU64.
        unsafe { &*self.base.add(offset_bytes).cast::<AtomicU64>() }
    }

    /// The address of the row of core 0, for sections.
    #[inline]
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "there are no sections"))]
    pub(crate) fn first_row(self) -> *const u8 {
        self.base
    }
}

/// The same shape out of loom's atomics.
#[cfg(loom)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cells<const COLUMNS: usize> {
    rows: &'static [Vec<AtomicU64>],
}

#[cfg(loom)]
impl<const COLUMNS: usize> Cells<COLUMNS> {
    pub(crate) const PER_BLOCK: usize = 2;

    pub(crate) fn block() -> Vec<Self> {
        let used = COLUMNS.min(6);
        let row = || (0..used).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let set = || Cells { rows: Row::all().map(|_| row()).collect::<Vec<_>>().leak() };
        (0..Self::PER_BLOCK).map(|_| set()).collect()
    }

    pub(crate) fn at(self, row: Row, column: Column) -> &'static AtomicU64 {
        self.by_number(row, column as usize)
    }

    pub(crate) fn by_number(self, row: Row, column: usize) -> &'static AtomicU64 {
        &self.rows[row.index()][column]
    }
}
