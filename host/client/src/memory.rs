//! The client's region and slots of it.
//!
//! Which bytes a request is about is the client's own business; this allocator is for those who have no better idea. It is first fit over whole pages, in
//! private memory: nothing that the host or the device writes leads it astray.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use std::sync::atomic::{Ordering, fence};

use crate::error::Error;
use crate::mapping::Mapping;
use crate::ring::{LIVE, Rings, Word};
use crate::wire::PAGE_BYTES;

#[derive(Debug)]
pub(crate) struct Memory {
    mapping: Mapping,
    rings: Arc<Rings>,
    /// Free ranges: where, how long. Neighbours are joined.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl Memory {
    pub(crate) fn new(mapping: Mapping, bytes: u64, rings: Arc<Rings>) -> Memory {
        Memory { mapping, rings, free: Mutex::new(BTreeMap::from([(0, bytes)])) }
    }

    pub(crate) fn slot(self: &Arc<Memory>, bytes: u32) -> Result<Slot, Error> {
        let held = u64::from(bytes.max(1)).next_multiple_of(PAGE_BYTES);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, length) = free
            .iter()
            .find(|&(_, &length)| length >= held)
            .map(|(&start, &length)| (start, length))
            .ok_or(Error::NoMemory { bytes })?;
        free.remove(&start);
        if length > held {
            free.insert(start + held, length - held);
        }
        drop(free);
        Ok(Slot { memory: Arc::clone(self), start, bytes, held })
    }

    fn give_back(&self, mut start: u64, mut length: u64) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(behind) = free.remove(&(start + length)) {
            length += behind;
        }
        let before = free.range(..start).next_back().map(|(&at, &bytes)| (at, bytes));
        if let Some((at, bytes)) = before.filter(|(at, bytes)| at + bytes == start) {
            start = at;
            length += bytes;
        }
        free.insert(start, length);
    }
}

/// Some pages of the client's region, that one request at a time uses. Given back when dropped.
#[derive(Debug)]
pub struct Slot {
    memory: Arc<Memory>,
    start: u64,
    bytes: u32,
    held: u64,
}

#[expect(clippy::len_without_is_empty, reason = "nobody asks for an empty slot")]
impl Slot {
    /// Bytes, as they were asked for.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.bytes
    }

    /// Where it begins in the region.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.start
    }

    /// Where it begins in this process's memory, for programs that fill it in place. Valid while the slot lives. The device may write there while a
    /// read is outstanding; use volatile accesses. After revocation there are zeroes.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.place(0, self.bytes as usize).and_then(|place| self.memory.mapping.at(place, 0)).unwrap_or_default()
    }

    /// Copies `from` to `offset` of the slot.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], and nothing is written; [`Error::Revoked`].
    pub fn write_at(&self, offset: u32, from: &[u8]) -> Result<(), Error> {
        self.place(offset, from.len())
            .and_then(|place| self.memory.mapping.copy_in(place, from))
            .ok_or(Error::OutOfRange("not inside the slot"))?;
        self.still_there()
    }

    /// Copies from `offset` of the slot into all of `into`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], and nothing is read; [`Error::Revoked`]: what is in `into` may not be what was there.
    pub fn read_at(&self, offset: u32, into: &mut [u8]) -> Result<(), Error> {
        self.place(offset, into.len())
            .and_then(|place| self.memory.mapping.copy_out(place, into))
            .ok_or(Error::OutOfRange("not inside the slot"))?;
        self.still_there()
    }

    /// The host says that the memory goes before it goes: a copy that saw zeroes in its place is behind that word.
    fn still_there(&self) -> Result<(), Error> {
        fence(Ordering::Acquire);
        if self.memory.rings.load(Word::State) == LIVE { Ok(()) } else { Err(Error::Revoked) }
    }

    fn place(&self, offset: u32, bytes: usize) -> Option<usize> {
        if offset > self.bytes || bytes > (self.bytes - offset) as usize {
            return None;
        }
        usize::try_from(self.start + u64::from(offset)).ok()
    }

    pub(crate) fn is_of(&self, memory: &Arc<Memory>) -> bool {
        Arc::ptr_eq(&self.memory, memory)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.memory.give_back(self.start, self.held);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::{MemfdFlags, SealFlags};

    use super::*;

    fn memory(pages: u64) -> Arc<Memory> {
        let file = rustix::fs::memfd_create("memory-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let bytes = pages * PAGE_BYTES;
        rustix::fs::ftruncate(&file, bytes).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let (rings, file_of_rings) = Rings::create("memory-test", 1).unwrap();
        std::mem::forget(file_of_rings);
        Arc::new(Memory::new(Mapping::new(file.as_fd(), bytes as usize).unwrap(), bytes, Arc::new(rings)))
    }

    #[test]
    fn slots_never_overlap_and_their_pages_come_back_in_one_piece() {
        let memory = memory(16);
        let mut slots: Vec<Slot> = [1, 4096, 4097, 8192].map(|bytes| memory.slot(bytes).unwrap()).into();
        for pair in slots.windows(2) {
            assert!(pair[0].start + pair[0].held <= pair[1].start);
        }
        assert!(matches!(memory.slot(11 * 4096), Err(Error::NoMemory { bytes: 45_056 })));
        drop(slots.remove(1));
        drop(slots.remove(2));
        drop(slots);
        assert_eq!(memory.slot(16 * 4096).unwrap().offset(), 0);
        assert!(memory.slot(16 * 4096 + 1).is_err());
    }

    #[test]
    fn a_slot_reaches_its_own_bytes_only_and_nothing_after_revocation() {
        let memory = memory(4);
        let (one, two) = (memory.slot(5000).unwrap(), memory.slot(10).unwrap());
        one.write_at(4990, &[7; 10]).unwrap();
        assert!(
            matches!(one.write_at(4991, &[7; 10]), Err(Error::OutOfRange(_))),
            "its page has room, the slot has not"
        );
        two.write_at(0, &[9; 10]).unwrap();
        let mut seen = [0; 10];
        one.read_at(4990, &mut seen).unwrap();
        assert_eq!(seen, [7; 10]);
        memory.rings.store(Word::State, crate::ring::REVOKED);
        assert!(matches!(one.read_at(4990, &mut seen), Err(Error::Revoked)));
        assert!(matches!(one.write_at(0, &seen), Err(Error::Revoked)));
    }
}
