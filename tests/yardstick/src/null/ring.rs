//! The device's side of one split virtqueue (virtio 1.2, section 2.7), as short as it can be.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::regions::{Place, Regions};
use crate::memory::Memory;

const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`.
const NO_NOTIFY: u16 = 1;
/// Most chains that are answered before the used index is written: a driver that waits gets its first answers while the device is at the rest.
const BATCH: u16 = 16;

/// One live ring.
pub(super) struct DeviceRing {
    pub(super) regions: Arc<Regions>,
    pub(super) table: Place,
    pub(super) available: Place,
    pub(super) used: Place,
    pub(super) size: u16,
    pub(super) event_index: bool,
    /// Next position in the available ring, and in the used ring: this device answers in order and at once.
    pub(super) next: u16,
    pub(super) kick: File,
    pub(super) call: Option<File>,
}

impl DeviceRing {
    /// Answers what is there, at most [`BATCH`] chains; how many. A chain that makes no sense ends the process: the driver under test is broken.
    #[inline]
    pub(super) fn serve(&mut self) -> u16 {
        let available = &*self.available.memory;
        let index = available.word16(self.available.offset + 2).load(Ordering::Acquire);
        let count = index.wrapping_sub(self.next).min(BATCH);
        if count == 0 {
            return 0;
        }
        assert!(index.wrapping_sub(self.next) <= self.size, "avail.idx is ahead of the ring");
        let old = self.next;
        let used = &*self.used.memory;
        for position in (0..count).map(|step| old.wrapping_add(step) & (self.size - 1)) {
            let slot = self.available.offset + 4 + 2 * usize::from(position);
            let head = available.word16(slot).load(Ordering::Relaxed);
            let written = self.answer(head);
            let element = self.used.offset + 4 + 8 * usize::from(position);
            used.word32(element).store(u32::from(head), Ordering::Relaxed);
            used.word32(element + 4).store(written, Ordering::Relaxed);
        }
        self.next = old.wrapping_add(count);
        used.word16(self.used.offset + 2).store(self.next, Ordering::Release);
        // Pairs with the driver's fence between arming and its last look (section 2.7.7.1).
        fence(Ordering::SeqCst);
        if self.wants_call(old) {
            self.call();
        }
        count
    }

    /// Writes the status of one chain, its last byte if the device may write there; how many bytes the chain lets the device write.
    #[inline]
    fn answer(&self, head: u16) -> u32 {
        let first = self.descriptor(&self.table.memory, self.table.offset, usize::from(head), usize::from(self.size));
        if first.1 >> 32 & INDIRECT == 0 {
            return self.walk(&self.table.memory, self.table.offset, first, usize::from(self.size));
        }
        let bytes = first.1 & 0xffff_ffff;
        let (memory, offset) = self.regions.guest(first.0, bytes).expect("an indirect table outside the memory");
        let entries = (bytes / 16) as usize;
        self.walk(memory, offset, self.descriptor(memory, offset, 0, entries), entries)
    }

    #[inline]
    fn walk(&self, memory: &Memory, table: usize, first: (u64, u64), entries: usize) -> u32 {
        let mut descriptor = first;
        let (mut written, mut end) = (0, 0);
        for _ in 0..entries {
            let (address, rest) = descriptor;
            if rest >> 32 & WRITE != 0 {
                written += rest as u32;
                end = address + (rest & 0xffff_ffff);
            }
            if rest >> 32 & NEXT == 0 {
                if written == 0 {
                    return 0;
                }
                let (memory, offset) = self.regions.guest(end - 1, 1).expect("a status outside the memory");
                memory.byte(offset).store(0, Ordering::Relaxed);
                return written;
            }
            descriptor = self.descriptor(memory, table, (rest >> 48) as usize, entries);
        }
        panic!("a chain without an end");
    }

    #[inline]
    fn descriptor(&self, memory: &Memory, table: usize, index: usize, entries: usize) -> (u64, u64) {
        assert!(index < entries, "a descriptor outside its table");
        let place = table + 16 * index;
        (memory.word64(place).load(Ordering::Relaxed), memory.word64(place + 8).load(Ordering::Relaxed))
    }

    #[inline]
    fn wants_call(&self, old: u16) -> bool {
        let available = &*self.available.memory;
        if self.event_index {
            let place = self.available.offset + 4 + 2 * usize::from(self.size);
            let event = available.word16(place).load(Ordering::Relaxed);
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(old)
        } else {
            available.word16(self.available.offset).load(Ordering::Relaxed) & NO_INTERRUPT == 0
        }
    }

    fn call(&self) {
        if let Some(mut call) = self.call.as_ref() {
            // A full counter means that a call is pending already.
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }

    /// Says that no kick is wanted. Has to be said again every 2^15 chains.
    pub(super) fn quiet(&self) {
        if self.event_index {
            self.store_event(self.next.wrapping_sub(1));
        } else {
            self.used.memory.word16(self.used.offset).store(NO_NOTIFY, Ordering::Relaxed);
        }
    }

    /// Asks for a kick. True: there is something already.
    pub(super) fn arm(&self) -> bool {
        if self.event_index {
            self.store_event(self.next);
        } else {
            self.used.memory.word16(self.used.offset).store(0, Ordering::Relaxed);
        }
        // Pairs with the driver's fence between publishing and its look at what was just stored (section 2.7.10.1).
        fence(Ordering::SeqCst);
        self.available.memory.word16(self.available.offset + 2).load(Ordering::Relaxed) != self.next
    }

    fn store_event(&self, event: u16) {
        let place = self.used.offset + 4 + 8 * usize::from(self.size);
        self.used.memory.word16(place).store(event, Ordering::Relaxed);
    }
}
