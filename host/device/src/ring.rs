//! Where the parts of a split virtqueue lie in memory, and the plain reads and writes of them (virtio 1.2, sections 2.7.5 to 2.7.8).
//!
//! Nothing is decided or believed here; [`crate::queue`] does that. Offsets are computed from the ring's size, which is checked once in [`Ring::new`], and from
//! descriptor indices that the queue took from private memory or checked.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::dma::DmaRegion;
use crate::error::QueueError;
use crate::mmap::{Entries, Mapping};
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

/// Header bytes that fit the packed areas.
pub(crate) const SHORT_HEADER_BYTES: usize = 16;

/// Byte offsets of the parts, from the start of the queue's memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    available: usize,
    used: usize,
    short_headers: usize,
    short_statuses: usize,
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
        let short_headers = (used + 6 + USED_ELEMENT_BYTES * entries).next_multiple_of(PART_ALIGN);
        let short_statuses = (short_headers + entries * SHORT_HEADER_BYTES).next_multiple_of(PART_ALIGN);
        let headers = (short_statuses + entries * SHORT_STATUS_BYTES).next_multiple_of(PART_ALIGN);
        let statuses = headers + entries * MAX_HEADER_BYTES;
        let tables = statuses + entries * MAX_STATUS_BYTES;
        let table_bytes = if indirect { MAX_SEGMENTS.min(entries) * DESC_BYTES } else { 0 };
        let total = (tables + entries * table_bytes).next_multiple_of(QUEUE_ALIGN_BYTES as usize);
        Self { available, used, short_headers, short_statuses, headers, statuses, tables, table_bytes, total }
    }
}

/// Bytes that a queue takes in a region.
pub(crate) fn bytes(size: u16, indirect: bool) -> u64 {
    Layout::new(size, indirect).total as u64
}

/// The area of the chain whose head is `head`, of a ring of `size`: another one for each, such that heads that are three apart, as those of the commonest chains are, have
/// neighbouring areas, and a cache line serves several requests.
pub(crate) fn area(head: u16, size: u16) -> u16 {
    // How many heads leave a smaller rest; no sum is more than `size`.
    let before = match head % 3 {
        0 => 0,
        1 => size.div_ceil(3),
        _ => size.div_ceil(3) + (size - 1).div_ceil(3),
    };
    before + head / 3
}

/// One ring in shared memory, with the header and status areas that only the host and the device see.
#[derive(Debug)]
pub(crate) struct Ring {
    descriptors: Entries<DESC_BYTES, 8>,
    available: Entries<2, 2>,
    available_flags: Entries<2, 2>,
    available_index: Entries<2, 2>,
    used_event: Entries<2, 2>,
    used: Entries<USED_ELEMENT_BYTES, 4>,
    used_flags: Entries<2, 2>,
    used_index: Entries<2, 2>,
    available_event: Entries<2, 2>,
    headers: Entries<SHORT_HEADER_BYTES, 8>,
    statuses: Entries<SHORT_STATUS_BYTES, 8>,
    base: usize,
    /// I/O address of `base`.
    iova: u64,
    layout: Layout,
    /// Keeps the region's descriptor too.
    _region: Arc<DmaRegion>,
}

impl Ring {
    /// Lays out and zeroes the ring at `offset` of `region`.
    pub(crate) fn new(config: QueueConfig, region: Arc<DmaRegion>, offset: u64) -> Result<Self, QueueError> {
        let ring = Self::there(config, region, offset)?;
        ring.descriptors.mapping().fill(ring.base, ring.layout.total, 0);
        Ok(ring)
    }

    /// The ring that is at `offset` of `region`, as it is.
    pub(crate) fn there(config: QueueConfig, region: Arc<DmaRegion>, offset: u64) -> Result<Self, QueueError> {
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
        if region.run_bytes(offset) < layout.total as u64 {
            return Err(QueueError::Scattered { offset, bytes: layout.total as u64 });
        }
        let mapping = region.mapping();
        let count = config.size;
        let word = |place: usize| Entries::new(mapping, base + place, 1);
        Ok(Self {
            descriptors: Entries::new(mapping, base, count),
            available: Entries::new(mapping, base + layout.available + 4, count),
            available_flags: word(layout.available),
            available_index: word(layout.available + 2),
            used_event: word(layout.available + 4 + 2 * usize::from(count)),
            used: Entries::new(mapping, base + layout.used + 4, count),
            used_flags: word(layout.used),
            used_index: word(layout.used + 2),
            available_event: word(layout.used + 4 + USED_ELEMENT_BYTES * usize::from(count)),
            headers: Entries::new(mapping, base + layout.short_headers, count),
            statuses: Entries::new(mapping, base + layout.short_statuses, count),
            base,
            iova: region.address_of(offset),
            layout,
            _region: region,
        })
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
        self.descriptors.mapping()
    }

    /// I/O address of the `length` header bytes of the chain with this area.
    #[inline]
    pub(crate) fn header_iova(&self, area: u16, length: usize) -> u64 {
        if length <= SHORT_HEADER_BYTES {
            self.iova(self.layout.short_headers + usize::from(area) * SHORT_HEADER_BYTES)
        } else {
            self.iova(self.layout.headers + usize::from(area) * MAX_HEADER_BYTES)
        }
    }

    /// I/O address of the `length` status bytes of the chain with this area.
    #[inline]
    pub(crate) fn status_iova(&self, area: u16, length: usize) -> u64 {
        if length <= SHORT_STATUS_BYTES {
            self.iova(self.layout.short_statuses + usize::from(area) * SHORT_STATUS_BYTES)
        } else {
            self.iova(self.status_place(area) - self.base)
        }
    }

    /// I/O address of the indirect table of the chain whose head is `head`.
    pub(crate) fn table_iova(&self, head: u16) -> u64 {
        self.iova(self.layout.tables + usize::from(head) * self.layout.table_bytes)
    }

    /// Writes the header bytes of the chain with this area; at most [`MAX_HEADER_BYTES`].
    pub(crate) fn write_header(&self, area: u16, header: &[u8]) {
        if header.len() <= SHORT_HEADER_BYTES {
            let mut short = [0; SHORT_HEADER_BYTES];
            short[..header.len()].copy_from_slice(header);
            self.write_short_header(area, short);
        } else {
            self.memory().copy_in(self.base + self.layout.headers + usize::from(area) * MAX_HEADER_BYTES, header);
        }
    }

    /// Writes the header bytes of the chain with this area, which are at most [`SHORT_HEADER_BYTES`], and zeroes to the area's end.
    #[inline(always)]
    pub(crate) fn write_short_header(&self, area: u16, header: [u8; SHORT_HEADER_BYTES]) {
        let both = u128::from_le_bytes(header);
        self.headers.word64::<0>(area).store((both as u64).to_le(), Ordering::Relaxed);
        self.headers.word64::<8>(area).store(((both >> 64) as u64).to_le(), Ordering::Relaxed);
    }

    /// The same, where the area most often says so already: then its cache line stays with the device, which reads it. What a device writes there in between it alone reads.
    #[inline(always)]
    pub(crate) fn keep_short_header(&self, area: u16, header: [u8; SHORT_HEADER_BYTES]) {
        let both = u128::from_le_bytes(header);
        let low = self.headers.word64::<0>(area).load(Ordering::Relaxed);
        let high = self.headers.word64::<8>(area).load(Ordering::Relaxed);
        if u64::from_le(low) != both as u64 || u64::from_le(high) != (both >> 64) as u64 {
            self.write_short_header(area, header);
        }
    }

    /// Sets the status bytes of the chain with this area, `bytes` of them, to `value`; of a short status all that the area has.
    #[inline(always)]
    pub(crate) fn fill_status(&self, area: u16, bytes: usize, value: u8) {
        if bytes <= SHORT_STATUS_BYTES {
            self.statuses.word64::<0>(area).store(u64::from_ne_bytes([value; 8]), Ordering::Relaxed);
        } else {
            self.memory().fill(self.status_place(area), bytes, value);
        }
    }

    /// Reads the status bytes of the chain with this area, more than [`SHORT_STATUS_BYTES`], once.
    pub(crate) fn read_long_status(&self, area: u16, into: &mut [u8]) {
        self.memory().copy_out(self.status_place(area), into);
    }

    /// Reads the short status of the chain with this area, once, as it lies in memory.
    #[inline(always)]
    pub(crate) fn read_short_status(&self, area: u16) -> [u8; SHORT_STATUS_BYTES] {
        self.statuses.word64::<0>(area).load(Ordering::Relaxed).to_ne_bytes()
    }

    #[inline]
    fn status_place(&self, area: u16) -> usize {
        self.base + self.layout.statuses + usize::from(area) * MAX_STATUS_BYTES
    }

    /// Writes descriptor `index` of the ring's own table.
    #[inline(always)]
    pub(crate) fn write_descriptor(&self, index: u16, iova: u64, length: u32, flags: u16, next: u16) {
        // Relaxed: `publish_available` orders them before the index that makes them visible.
        self.descriptors.word64::<0>(index).store(iova.to_le(), Ordering::Relaxed);
        self.descriptors.word64::<8>(index).store(rest(length, flags, next), Ordering::Relaxed);
    }

    /// Writes entry `entry` of the indirect table of the chain whose head is `head`.
    pub(crate) fn write_table_entry(&self, head: u16, entry: u16, iova: u64, length: u32, flags: u16, next: u16) {
        let table = self.layout.tables + usize::from(head) * self.layout.table_bytes;
        let mut bytes = [0; DESC_BYTES];
        bytes[..8].copy_from_slice(&iova.to_le_bytes());
        bytes[8..].copy_from_slice(&rest(length, flags, next).to_ne_bytes());
        // Two whole words, since tables are aligned.
        self.memory().copy_in(self.base + table + usize::from(entry) * DESC_BYTES, &bytes);
    }

    /// Writes the entry of the available ring for position `position` (not yet reduced to the ring's size).
    #[inline(always)]
    pub(crate) fn write_available(&self, position: u16, head: u16) {
        self.available.word16::<0>(position).store(head.to_le(), Ordering::Relaxed);
    }

    /// Writes `avail.idx`; everything written before is visible to who reads it with acquire.
    #[inline]
    pub(crate) fn publish_available(&self, index: u16) {
        self.available_index.word16::<0>(0).store(index.to_le(), Ordering::Release);
    }

    /// Reads `avail.idx`, which this side alone writes: only of a ring that another process wrote until now is there something to be learnt.
    pub(crate) fn available_index(&self) -> u16 {
        u16::from_le(self.available_index.word16::<0>(0).load(Ordering::Acquire))
    }

    /// Writes `avail.flags`.
    pub(crate) fn store_available_flags(&self, flags: u16) {
        self.available_flags.word16::<0>(0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Writes `used_event`, at the end of the available ring (section 2.7.7).
    #[inline]
    pub(crate) fn store_used_event(&self, index: u16) {
        self.used_event.word16::<0>(0).store(index.to_le(), Ordering::Relaxed);
    }

    /// Reads `used.flags`.
    pub(crate) fn used_flags(&self) -> u16 {
        u16::from_le(self.used_flags.word16::<0>(0).load(Ordering::Relaxed))
    }

    /// Reads `used.idx`; the used elements before it are visible afterwards.
    #[inline(always)]
    pub(crate) fn used_index(&self) -> u16 {
        u16::from_le(self.used_index.word16::<0>(0).load(Ordering::Acquire))
    }

    /// Reads (id, length) of the used element at `position`, as the device alleges. Once: the device may change it any time.
    #[inline(always)]
    pub(crate) fn used_element(&self, position: u16) -> (u32, u32) {
        let id = self.used.word32::<0>(position).load(Ordering::Relaxed);
        let length = self.used.word32::<4>(position).load(Ordering::Relaxed);
        (u32::from_le(id), u32::from_le(length))
    }

    /// Reads `avail_event`, at the end of the used ring (section 2.7.10).
    #[inline]
    pub(crate) fn available_event(&self) -> u16 {
        u16::from_le(self.available_event.word16::<0>(0).load(Ordering::Relaxed))
    }
}

/// The second word of a descriptor, as it lies in memory.
#[inline(always)]
fn rest(length: u32, flags: u16, next: u16) -> u64 {
    (u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48).to_le()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_head_has_an_area_of_its_own_and_every_third_the_next_one() {
        for size in (0..=15).map(|order| 1_u16 << order) {
            let mut areas: Vec<u16> = (0..size).map(|head| area(head, size)).collect();
            assert!(areas.iter().zip(areas.iter().skip(3)).all(|(area, third)| area + 1 == *third), "{size}");
            areas.sort_unstable();
            assert!(areas.into_iter().eq(0..size), "{size}");
        }
    }

    #[test]
    fn no_part_runs_into_the_next_one() {
        for (order, indirect) in (0..=15).flat_map(|order| [(order, false), (order, true)]) {
            let entries = 1_usize << order;
            let layout = Layout::new(entries as u16, indirect);
            let parts = [
                (0, 16 * entries),
                (layout.available, 6 + 2 * entries),
                (layout.used, 6 + 8 * entries),
                (layout.short_headers, 16 * entries),
                (layout.short_statuses, 8 * entries),
                (layout.headers, 64 * entries),
                (layout.statuses, 64 * entries),
                (layout.tables, layout.table_bytes * entries),
                (layout.total, 0),
            ];
            assert!(parts.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{layout:?}");
            let apart = [layout.available, layout.used, layout.short_headers, layout.short_statuses, layout.headers];
            assert!(apart.iter().all(|place| place.is_multiple_of(PART_ALIGN)), "{layout:?}");
        }
    }
}
