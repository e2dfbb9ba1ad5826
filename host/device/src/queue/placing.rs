//! Which descriptors a chain gets, and what is written there.
//!
//! ```text
//!             make_set, when no set is free
//! free list <--------------------------------> sets: three descriptors that stay together
//!   |   ^      break_sets, when others need         |   ^
//!   v   | popped                                    v   | popped
//! any chain                                       whole chains
//! ```
//!
//! **Sets.** What the first and the third descriptor of a whole chain say depends on its head alone (and the length of its status), and so do their links. It is written once, when
//! three descriptors become a set, and holds for every later chain on the same set, which writes the payload's descriptor, the header and the status bytes.
//!
//! A device that writes to the descriptor table, which no honest one does, can so make a later chain's descriptor say something that the host never said, until the set is broken. It gains
//! nothing by it: descriptors are never read back, and the status is read where private memory says it is; the one who acts on a descriptor is the device, which needs none to reach what it
//! can reach. What bounds that is what is mapped for it, or its IOMMU domain, and not the descriptors. Nobody else than the ring's one device can write there, and the next device gets a new ring, which is zeroed.

use super::{STATUS_UNWRITTEN, Slot, SplitQueue};
use crate::chain::{Chain, Kind, PACKET_HEADER_BYTES, Segment, WHOLE_HEADER_BYTES};
use crate::error::AddError;
use crate::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE};

/// The flag of a segment of this kind.
#[inline(always)]
fn write_flag(kind: Kind) -> u16 {
    match kind {
        Kind::Header | Kind::PayloadOut => 0,
        Kind::PayloadIn | Kind::Status => DESC_WRITE,
    }
}

/// I/O address, bytes and flag of a segment; `areas` are the addresses that its kind counts from.
#[inline]
fn place(areas: &[u64; 4], segment: &Segment) -> (u64, u32, u16) {
    (areas[segment.kind as usize] + segment.place, segment.length, write_flag(segment.kind))
}

impl SplitQueue {
    /// Puts a whole chain on the ring, for which there is room to be direct: on a set, or on what becomes one.
    #[inline]
    pub(super) fn add_whole(&mut self, chain: &Chain<'_>, header: &[u8; WHOLE_HEADER_BYTES], payload: &Segment) {
        let status_bytes = chain.status_bytes();
        // Of no set, the place is past the end.
        let last = self.ready_len.wrapping_sub(1);
        let head = match self.ready.get(usize::from(last)) {
            Some(&head) => {
                self.ready_len = last;
                head
            }
            None => self.make_set(),
        };
        let slot = &mut self.slots[usize::from(head)];
        if usize::from(slot.status_len) != status_bytes {
            slot.status_len = status_bytes as u8;
            let status_iova = self.ring.status_iova(slot.area, status_bytes);
            self.ring.write_descriptor(slot.tail, status_iova, status_bytes as u32, DESC_WRITE, 0);
        }
        let flags = DESC_NEXT | write_flag(payload.kind);
        self.ring.write_descriptor(slot.middle, payload.place, payload.length, flags, slot.tail);
        self.ring.write_short_header(slot.area, *header);
        self.ring.fill_status(slot.area, status_bytes, STATUS_UNWRITTEN);
        self.ring.write_available(self.added as u16, head);
        slot.token = chain.token();
        slot.offered = chain.writable_bytes();
        slot.sequence = self.added;
        self.free -= 3;
        self.in_flight += 1;
        self.added += 1;
    }

    /// Puts a packet's chain on the ring, for which there is room to be direct: two descriptors from the free list. Nothing of it is kept for the next one: to
    /// write the first of them costs less than to know that it need not be written.
    #[inline]
    pub(super) fn add_packet(&mut self, chain: &Chain<'_>, header: &[u8; WHOLE_HEADER_BYTES], payload: &Segment) {
        self.break_sets(2);
        let head = self.free_head;
        let tail = self.next[usize::from(head)];
        let slot = &mut self.slots[usize::from(head)];
        let iova = self.ring.header_iova(slot.area, PACKET_HEADER_BYTES);
        self.ring.write_descriptor(head, iova, PACKET_HEADER_BYTES as u32, DESC_NEXT, tail);
        self.ring.write_descriptor(tail, payload.place, payload.length, write_flag(payload.kind), 0);
        self.ring.keep_short_header(slot.area, *header);
        self.ring.write_available(self.added as u16, head);
        *slot = Slot {
            sequence: self.added,
            token: chain.token(),
            offered: chain.writable_bytes(),
            tail,
            descriptors: 2,
            ..Slot::new(slot.area)
        };
        self.free_head = self.next[usize::from(tail)];
        self.free -= 2;
        self.in_flight += 1;
        self.added += 1;
    }

    /// Puts one device-writable descriptor on the ring, for which there is room.
    #[inline]
    pub(super) fn place_buffer(&mut self, token: u32, iova: u64, length: u32) {
        self.break_sets(1);
        let head = self.free_head;
        let slot = &mut self.slots[usize::from(head)];
        self.ring.write_descriptor(head, iova, length, DESC_WRITE, 0);
        self.ring.write_available(self.added as u16, head);
        *slot =
            Slot { sequence: self.added, token, offered: length, tail: head, descriptors: 1, ..Slot::new(slot.area) };
        self.free_head = self.next[usize::from(head)];
        self.free -= 1;
        self.in_flight += 1;
        self.added += 1;
    }

    /// Takes three descriptors from the free list, where they are if there is no free set, and makes a set of them, with a status of no bytes.
    #[cold]
    fn make_set(&mut self) -> u16 {
        let head = self.free_head;
        let middle = self.next[usize::from(head)];
        let tail = self.next[usize::from(middle)];
        self.free_head = self.next[usize::from(tail)];
        let slot = &mut self.slots[usize::from(head)];
        *slot = Slot { middle, tail, descriptors: 3, is_set: true, ..Slot::new(slot.area) };
        let iova = self.ring.header_iova(slot.area, WHOLE_HEADER_BYTES);
        self.ring.write_descriptor(head, iova, WHOLE_HEADER_BYTES as u32, DESC_NEXT, middle);
        head
    }

    /// Gives free sets back to the free list, until that has `needed` descriptors or there is no more.
    #[inline]
    fn break_sets(&mut self, needed: u16) {
        while self.free - 3 * self.ready_len < needed
            && let Some(&head) = self.ready[..usize::from(self.ready_len)].last()
        {
            self.ready_len -= 1;
            // Its own links are as they were in the list.
            self.next[usize::from(self.slots[usize::from(head)].tail)] = self.free_head;
            self.free_head = head;
        }
    }

    /// Puts any chain on the ring.
    #[inline(never)]
    pub(super) fn add_any(&mut self, chain: &Chain<'_>) -> Result<(), AddError> {
        if let Some(fault) = self.fault {
            return Err(AddError::Poisoned(fault));
        }
        if chain.queue() != self.config.index {
            return Err(AddError::WrongQueue { chain: chain.queue(), queue: self.config.index });
        }
        let segments = chain.segment_count();
        if segments > self.config.size {
            return Err(AddError::TooLong { segments, size: self.config.size });
        }
        let direct = self.is_direct(segments, self.free);
        let needed = if direct { segments } else { 1 };
        if needed > self.free {
            return Err(AddError::NoRoom { needed, free: self.free });
        }
        self.break_sets(needed);
        let head = self.free_head;
        let area = self.slots[usize::from(head)].area;
        let header_iova = self.ring.header_iova(area, chain.header().len());
        let areas = [header_iova, 0, 0, self.ring.status_iova(area, chain.status_bytes())];
        let tail =
            if direct { self.write_direct(chain, head, &areas) } else { self.write_indirect(chain, head, &areas) };
        self.ring.write_header(area, chain.header());
        self.ring.fill_status(area, chain.status_bytes(), STATUS_UNWRITTEN);
        self.ring.write_available(self.added as u16, head);
        self.slots[usize::from(head)] = Slot {
            sequence: self.added,
            token: chain.token(),
            offered: chain.writable_bytes(),
            tail,
            middle: 0,
            area,
            descriptors: needed as u8,
            status_len: chain.status_bytes() as u8,
            is_set: false,
        };
        self.free_head = self.next[usize::from(tail)];
        self.free -= needed;
        self.in_flight += 1;
        self.added += 1;
        Ok(())
    }

    /// Whether a chain of `segments` is direct when `free` descriptors are free: it has to be, or leaves enough for others.
    pub(super) fn is_direct(&self, segments: u16, free: u16) -> bool {
        let is_fair = segments <= self.fair_share
            && free.checked_sub(segments).is_some_and(|left| left >= self.config.size.div_ceil(4));
        segments == 1 || !self.config.indirect || is_fair
    }

    /// Writes a chain along the free list and answers its last descriptor.
    #[inline]
    fn write_direct(&self, chain: &Chain<'_>, head: u16, areas: &[u64; 4]) -> u16 {
        let (mut index, mut tail) = (head, head);
        chain.each_segment(|segment, is_last| {
            let (iova, length, write) = place(areas, segment);
            let next = self.next[usize::from(index)];
            let (more, link) = if is_last { (0, 0) } else { (DESC_NEXT, next) };
            self.ring.write_descriptor(index, iova, length, write | more, link);
            tail = index;
            index = next;
        });
        tail
    }

    /// Writes a chain into the table of its head and answers its only descriptor.
    fn write_indirect(&self, chain: &Chain<'_>, head: u16, areas: &[u64; 4]) -> u16 {
        let mut position = 0;
        chain.each_segment(|segment, is_last| {
            let (iova, length, write) = place(areas, segment);
            let (more, next) = if is_last { (0, 0) } else { (DESC_NEXT, position + 1) };
            self.ring.write_table_entry(head, position, iova, length, write | more, next);
            position += 1;
        });
        self.ring.write_descriptor(head, self.ring.table_iova(head), u32::from(position) * 16, DESC_INDIRECT, 0);
        head
    }
}
