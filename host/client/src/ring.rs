//! The two rings in shared memory, for both sides.
//!
//! A memfd of one page of words and then the entries. Every word is 32 bits and has 128 bytes for itself, so that neither line nor prefetched
//! neighbour is shared by two writers.
//!
//! | byte | word | written by | |
//! | --- | --- | --- | --- |
//! | 0 | [`Word::State`] | host | [`LIVE`] while requests are taken and the memory is there; anything else: not |
//! | 128 | [`Word::SubmitTail`] | client | entries put in |
//! | 256 | [`Word::SubmitHead`] | host | entries taken |
//! | 384 | [`Word::CompleteTail`] | host | answers put in |
//! | 512 | [`Word::CompleteHead`] | client | answers taken |
//! | 640 | [`Word::HostSleeps`] | both | what the host wants to be woken for: [`WAKE_ON_SUBMIT`], [`WAKE_ON_ROOM`] |
//! | 768 | [`Word::ClientSleeps`] | both | not 0: the client wants to be woken for an answer |
//! | 4096 | submit entries | client | [`SUBMIT_BYTES`] each |
//! | behind them | complete entries | host | [`COMPLETE_BYTES`] each |
//!
//! Heads and tails count from 0 and wrap at 2³²; an entry's place is its number modulo the ring's size, as in virtio's rings and io_uring's. The host
//! never takes more requests than the complete ring has room for answers, so it never waits for a client with an answer in hand. A client must not have more than a
//! ring's size of requests unanswered.
//!
//! # Sleeping
//! ```text
//! sleeper: sleeps = what for; fence; look at the tail once more; poll(2) on the socket; sleeps = 0
//! waker:   tail += n;         fence; sleeps wants this? sleeps = 0, send WAKE (never waiting: a full socket has wakes in it already)
//! ```
//! Of the two looks behind the fences at least one sees the other side's store, so no wake-up is lost (virtio 1.2 section 2.7.7.1 has the same argument). A waker may
//! clear an arming that is newer than the one it saw; its packet is behind that, so the sleeper looks again all the same.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use crate::mapping::Mapping;
use crate::wire::{COMPLETE_BYTES, Complete, ENTRIES_MAX, SUBMIT_BYTES, Submit};

/// [`Word::State`] of rings in use. Not 0, so that memory which was taken away does not look alive.
pub const LIVE: u32 = u32::from_le_bytes(*b"LIVE");
/// [`Word::State`] after revocation.
pub const REVOKED: u32 = u32::from_le_bytes(*b"GONE");
/// The host sleeps until there are submit entries.
pub const WAKE_ON_SUBMIT: u32 = 1;
/// The host sleeps until answers are taken.
pub const WAKE_ON_ROOM: u32 = 2;

const HEADER_BYTES: usize = 4096;

/// See the module's table. The value is the word's place in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
#[expect(missing_docs, reason = "the module's table")]
pub enum Word {
    State = 0,
    SubmitTail = 128,
    SubmitHead = 256,
    CompleteTail = 384,
    CompleteHead = 512,
    HostSleeps = 640,
    ClientSleeps = 768,
}

/// The rings, mapped. Nothing in them is trusted: whoever reads a word decides what it may be.
#[derive(Debug)]
pub struct Rings {
    mapping: Mapping,
    entries: u32,
}

/// The memfd of [`Rings::create`]. Dropping it takes the pages away from everyone: a client that keeps its descriptor keeps an empty file.
#[derive(Debug)]
pub struct RingsFile {
    file: OwnedFd,
}

impl AsFd for RingsFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for RingsFile {
    fn drop(&mut self) {
        let bytes = rustix::fs::fstat(&self.file).map_or(0, |stat| stat.st_size.cast_unsigned());
        // Refused only for a file of no length.
        let _ = rustix::fs::fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, bytes);
    }
}

/// Bytes of the rings' memfd, in whole pages.
#[must_use]
pub fn rings_bytes(entries: u32) -> usize {
    (HEADER_BYTES + entries as usize * (SUBMIT_BYTES + COMPLETE_BYTES)).next_multiple_of(4096)
}

/// Whether a ring may have this many entries.
#[must_use]
pub fn is_ring_size(entries: u32) -> bool {
    entries.is_power_of_two() && entries <= ENTRIES_MAX
}

impl Rings {
    /// For the host: new rings, live, in a memfd that is sealed against resizing and further sealing.
    ///
    /// # Errors
    /// The system's; `InvalidInput` for a size that a ring cannot have.
    pub fn create(name: &str, entries: u32) -> io::Result<(Rings, RingsFile)> {
        if !is_ring_size(entries) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let bytes = rings_bytes(entries);
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let rings = Rings { mapping: Mapping::new(file.as_fd(), bytes)?, entries };
        rings.store(Word::State, LIVE);
        Ok((rings, RingsFile { file }))
    }

    /// For a client: the rings behind a descriptor that came with a welcome.
    ///
    /// # Errors
    /// `InvalidData` for a descriptor that cannot be such rings; else the system's.
    pub fn open(file: BorrowedFd<'_>, entries: u32) -> io::Result<Rings> {
        if !is_ring_size(entries) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Rings { mapping: Mapping::new(file, rings_bytes(entries))?, entries })
    }

    /// Entries of each ring.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Loads a word; what the other side wrote before it is seen behind it.
    #[inline]
    #[must_use]
    pub fn load(&self, word: Word) -> u32 {
        // Every word is inside the first page.
        self.mapping.word(word as usize).map_or(0, |word| u32::from_le(word.load(Ordering::Acquire)))
    }

    /// Stores a word, behind everything that was written before.
    #[inline]
    pub fn store(&self, word: Word, value: u32) {
        if let Some(word) = self.mapping.word(word as usize) {
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// Says what this side wants to be woken for. Look at the ring once more afterwards, then sleep.
    pub fn arm(&self, sleeps: Word, what: u32) {
        self.store(sleeps, what);
        fence(Ordering::SeqCst);
    }

    /// After a tail or head was stored: whether the other side sleeps and wants to be woken for one of `what`. Then it has to be sent a wake.
    #[inline]
    #[must_use]
    pub fn must_wake(&self, sleeps: Word, what: u32) -> bool {
        fence(Ordering::SeqCst);
        if self.load(sleeps) & what == 0 {
            return false;
        }
        self.store(sleeps, 0);
        true
    }

    /// One copy of submit entry number `position`.
    #[inline]
    #[must_use]
    pub fn submit_at(&self, position: u32) -> Submit {
        let mut bytes = [0; SUBMIT_BYTES];
        let read = self.mapping.copy_out(self.submit_place(position), &mut bytes);
        debug_assert!(read.is_some(), "a masked place is inside");
        Submit::decode(&bytes)
    }

    /// Writes submit entry number `position`.
    #[inline]
    pub fn put_submit(&self, position: u32, entry: &Submit) {
        let written = self.mapping.copy_in(self.submit_place(position), &entry.encode());
        debug_assert!(written.is_some(), "a masked place is inside");
    }

    /// One copy of complete entry number `position`.
    #[inline]
    #[must_use]
    pub fn complete_at(&self, position: u32) -> Complete {
        let mut bytes = [0; COMPLETE_BYTES];
        let read = self.mapping.copy_out(self.complete_place(position), &mut bytes);
        debug_assert!(read.is_some(), "a masked place is inside");
        Complete::decode(&bytes)
    }

    /// Writes complete entry number `position`.
    #[inline]
    pub fn put_complete(&self, position: u32, entry: &Complete) {
        let written = self.mapping.copy_in(self.complete_place(position), &entry.encode());
        debug_assert!(written.is_some(), "a masked place is inside");
    }

    fn submit_place(&self, position: u32) -> usize {
        HEADER_BYTES + (position & (self.entries - 1)) as usize * SUBMIT_BYTES
    }

    fn complete_place(&self, position: u32) -> usize {
        let behind = HEADER_BYTES + self.entries as usize * SUBMIT_BYTES;
        behind + (position & (self.entries - 1)) as usize * COMPLETE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_see_the_same_rings_and_a_dropped_file_is_empty() {
        for entries in [1, 2, 128, ENTRIES_MAX] {
            let (host, file) = Rings::create("ring-test", entries).unwrap();
            let client = Rings::open(file.as_fd(), entries).unwrap();
            let kept = rustix::io::dup(&file).unwrap();
            for position in [0, entries - 1, entries, u32::MAX] {
                let entry =
                    Submit { user: u64::from(position), offset: 2, memory_offset: 3, length: 4, op: 5, flags: 6 };
                client.put_submit(position, &entry);
                assert_eq!(host.submit_at(position), entry);
                let answer = Complete { user: 7, status: -7 };
                host.put_complete(position, &answer);
                assert_eq!(client.complete_at(position), answer);
            }
            assert_eq!(client.load(Word::State), LIVE, "no entry lies over a word");
            client.arm(Word::ClientSleeps, 1);
            assert!(host.must_wake(Word::ClientSleeps, u32::MAX) && !host.must_wake(Word::ClientSleeps, u32::MAX));
            client.store(Word::HostSleeps, WAKE_ON_ROOM);
            assert!(!client.must_wake(Word::HostSleeps, WAKE_ON_SUBMIT), "not for this");
            drop((host, file));
            assert_eq!(rustix::fs::fstat(&kept).unwrap().st_blocks, 0, "no page is left");
            assert_eq!(client.load(Word::State), 0);
        }
        assert!(Rings::create("ring-test", 3).is_err() && Rings::create("ring-test", 2 * ENTRIES_MAX).is_err());
    }
}
