//! Where the parts of a split virtqueue lie in memory, and the plain reads and writes of them (virtio 1.2, sections 2.7.5 to 2.7.8).
//!
//! Nothing is decided or believed here; [`crate::queue`] does that. Offsets are computed from the ring's size, which is checked once in [`Ring::new`], and from
//! descriptor indices that the queue took from private memory or checked.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::dma::DmaRegion;
use crate::error::QueueError;
use crate::mmap::Mapping;
use crate::queue::QueueConfig;
use crate::transport::QueueAddresses;
use crate::words::{MAX_HEADER_BYTES, MAX_SEGMENTS, MAX_STATUS_BYTES};

/// Alignment of a queue's memory in its region, and of its total size, in bytes: a page, so that two queues never share one.
pub const QUEUE_ALIGN_BYTES: u64 = 4096;

/// What the device writes starts a cache line of its own pair (adjacent lines are fetched together), apart from what it reads.
const PART_ALIGN: usize = 128;

/// Descriptor flags (virtio 1.2, section 2.7.5).
pub(crate) const DESC_NEXT: u16 = 1;
/// The device writes the buffer.
pub(crate) const DESC_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const DESC_INDIRECT: u16 = 4;
/// A status of so many bytes is read and compared as one word.
pub(crate) const SHORT_STATUS_BYTES: usize = 8;
const DESC_BYTES: usize = 16;
const USED_ELEMENT_BYTES: usize = 8;

/// Byte offsets of the parts, from the start of the queue's memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    available: usize,
    used: usize,
    headers: usize,
    statuses: usize,
    tables: usize,
    table_bytes: usize,
    total: usize,
}

impl Layout {
    fn new(size: u16, indirect: bool) -> Self {
        let entries = usize::from(size);
        let available = (entries * DESC_BYTES).next_multiple_of(PART_ALIGN);
        let used = (available + 6 + 2 * entries).next_multiple_of(PART_ALIGN);
        let headers = (used + 6 + USED_ELEMENT_BYTES * entries).next_multiple_of(PART_ALIGN);
        let statuses = headers + entries * MAX_HEADER_BYTES;
        let tables = statuses + entries * MAX_STATUS_BYTES;
        let table_bytes = if indirect { MAX_SEGMENTS.min(entries) * DESC_BYTES } else { 0 };
        let total = (tables + entries * table_bytes).next_multiple_of(QUEUE_ALIGN_BYTES as usize);
        Self { available, used, headers, statuses, tables, table_bytes, total }
    }
}

/// Bytes that a queue takes in a region.
pub(crate) fn bytes(size: u16, indirect: bool) -> u64 {
    Layout::new(size, indirect).total as u64
}

/// One ring in shared memory, with the header and status areas that only the host and the device see.
#[derive(Debug)]
pub(crate) struct Ring {
    region: Arc<DmaRegion>,
    base: usize,
    /// I/O address of `base`.
    iova: u64,
    layout: Layout,
    mask: u16,
}

impl Ring {
    /// Checks the place and zeroes it.
    pub(crate) fn new(config: QueueConfig, region: Arc<DmaRegion>, offset: u64) -> Result<Self, QueueError> {
        if !config.size.is_power_of_two() {
            return Err(QueueError::Size(config.size));
        }
        if !offset.is_multiple_of(QUEUE_ALIGN_BYTES) {
            return Err(QueueError::Alignment(offset));
        }
        let layout = Layout::new(config.size, config.indirect);
        let outside = QueueError::OutOfRegion { offset, bytes: layout.total as u64, region_bytes: region.len() };
        let base = usize::try_from(offset).map_err(|_| outside)?;
        if !region.mapping().contains(base, layout.total) {
            return Err(outside);
        }
        region.mapping().fill(base, layout.total, 0);
        let iova = region.iova() + offset;
        Ok(Self { region, base, iova, layout, mask: config.size - 1 })
    }

    pub(crate) fn addresses(&self) -> QueueAddresses {
        let descriptors = self.iova(0);
        QueueAddresses { descriptors, available: self.iova(self.layout.available), used: self.iova(self.layout.used) }
    }

    #[inline]
    fn iova(&self, place: usize) -> u64 {
        self.iova + place as u64
    }

    #[inline]
    fn memory(&self) -> &Mapping {
        self.region.mapping()
    }

    /// I/O address of the header area of the chain whose head is `head`.
    #[inline]
    pub(crate) fn header_iova(&self, head: u16) -> u64 {
        self.iova(self.layout.headers + usize::from(head) * MAX_HEADER_BYTES)
    }

    /// I/O address of the status area of the chain whose head is `head`.
    #[inline]
    pub(crate) fn status_iova(&self, head: u16) -> u64 {
        self.iova(self.layout.statuses + usize::from(head) * MAX_STATUS_BYTES)
    }

    /// I/O address of the indirect table of the chain whose head is `head`.
    pub(crate) fn table_iova(&self, head: u16) -> u64 {
        self.iova(self.layout.tables + usize::from(head) * self.layout.table_bytes)
    }

    /// Writes the header bytes of the chain whose head is `head`; at most [`MAX_HEADER_BYTES`].
    #[inline]
    pub(crate) fn write_header(&self, head: u16, header: &[u8]) {
        let place = self.base + self.layout.headers + usize::from(head) * MAX_HEADER_BYTES;
        if let Ok(sixteen) = <[u8; 16]>::try_from(header) {
            // The header of virtio-blk. The area is aligned for it.
            let both = u128::from_le_bytes(sixteen);
            self.memory().word64(place).store((both as u64).to_le(), Ordering::Relaxed);
            self.memory().word64(place + 8).store(((both >> 64) as u64).to_le(), Ordering::Relaxed);
        } else {
            self.memory().copy_in(place, header);
        }
    }

    /// Sets the status bytes of the chain whose head is `head`, `bytes` of them, to `value`; of a short status the first eight, which are its own too.
    #[inline]
    pub(crate) fn fill_status(&self, head: u16, bytes: usize, value: u8) {
        if bytes <= SHORT_STATUS_BYTES {
            self.memory().word64(self.status_place(head)).store(u64::from_ne_bytes([value; 8]), Ordering::Relaxed);
        } else {
            self.memory().fill(self.status_place(head), bytes, value);
        }
    }

    /// Reads the status bytes of the chain whose head is `head`, once.
    pub(crate) fn read_status(&self, head: u16, into: &mut [u8]) {
        self.memory().copy_out(self.status_place(head), into);
    }

    /// Reads the first [`SHORT_STATUS_BYTES`] status bytes of the chain whose head is `head`, once, as they lie in memory.
    #[inline]
    pub(crate) fn read_short_status(&self, head: u16) -> [u8; SHORT_STATUS_BYTES] {
        self.memory().word64(self.status_place(head)).load(Ordering::Relaxed).to_ne_bytes()
    }

    #[inline]
    fn status_place(&self, head: u16) -> usize {
        self.base + self.layout.statuses + usize::from(head) * MAX_STATUS_BYTES
    }

    /// Writes descriptor `index` of the ring's own table.
    #[inline]
    pub(crate) fn write_descriptor(&self, index: u16, iova: u64, length: u32, flags: u16, next: u16) {
        self.descriptor_at(usize::from(index) * DESC_BYTES, iova, length, flags, next);
    }

    /// Writes entry `entry` of the indirect table of the chain whose head is `head`.
    #[inline]
    pub(crate) fn write_table_entry(&self, head: u16, entry: u16, iova: u64, length: u32, flags: u16, next: u16) {
        let table = self.layout.tables + usize::from(head) * self.layout.table_bytes;
        self.descriptor_at(table + usize::from(entry) * DESC_BYTES, iova, length, flags, next);
    }

    #[inline]
    fn descriptor_at(&self, place: usize, iova: u64, length: u32, flags: u16, next: u16) {
        let rest = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        // Relaxed: `publish_available` orders them before the index that makes them visible.
        self.memory().word64(self.base + place).store(iova.to_le(), Ordering::Relaxed);
        self.memory().word64(self.base + place + 8).store(rest.to_le(), Ordering::Relaxed);
    }

    /// Writes the entry of the available ring for position `position` (not yet reduced to the ring's size).
    #[inline]
    pub(crate) fn write_available(&self, position: u16, head: u16) {
        let place = self.layout.available + 4 + 2 * usize::from(position & self.mask);
        self.store16(place, head, Ordering::Relaxed);
    }

    /// Writes `avail.idx`; everything written before is visible to who reads it with acquire.
    #[inline]
    pub(crate) fn publish_available(&self, index: u16) {
        self.store16(self.layout.available + 2, index, Ordering::Release);
    }

    /// Writes `avail.flags`.
    pub(crate) fn store_available_flags(&self, flags: u16) {
        self.store16(self.layout.available, flags, Ordering::Relaxed);
    }

    /// Writes `used_event`, at the end of the available ring (section 2.7.7).
    #[inline]
    pub(crate) fn store_used_event(&self, index: u16) {
        self.store16(self.layout.available + 4 + 2 * (usize::from(self.mask) + 1), index, Ordering::Relaxed);
    }

    /// Reads `used.flags`.
    pub(crate) fn used_flags(&self) -> u16 {
        self.load16(self.layout.used, Ordering::Relaxed)
    }

    /// Reads `used.idx`; the used elements before it are visible afterwards.
    #[inline]
    pub(crate) fn used_index(&self) -> u16 {
        self.load16(self.layout.used + 2, Ordering::Acquire)
    }

    /// Reads (id, length) of the used element at `position`, as the device alleges. Once: the device may change it any time.
    #[inline]
    pub(crate) fn used_element(&self, position: u16) -> (u32, u32) {
        let place = self.base + self.layout.used + 4 + USED_ELEMENT_BYTES * usize::from(position & self.mask);
        let id = self.memory().word32(place).load(Ordering::Relaxed);
        let length = self.memory().word32(place + 4).load(Ordering::Relaxed);
        (u32::from_le(id), u32::from_le(length))
    }

    /// Reads `avail_event`, at the end of the used ring (section 2.7.10).
    #[inline]
    pub(crate) fn available_event(&self) -> u16 {
        self.load16(self.layout.used + 4 + USED_ELEMENT_BYTES * (usize::from(self.mask) + 1), Ordering::Relaxed)
    }

    #[inline]
    fn load16(&self, place: usize, order: Ordering) -> u16 {
        u16::from_le(self.memory().word16(self.base + place).load(order))
    }

    #[inline]
    fn store16(&self, place: usize, value: u16, order: Ordering) {
        self.memory().word16(self.base + place).store(value.to_le(), order);
    }
}
