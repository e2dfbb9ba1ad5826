//! The volatile write cache, as a record of what a power cut may still undo.
//!
//! The medium's file always holds the newest bytes, so reads need no look at the cache. The cache remembers, for each block
//! written since the last flush, what it held before the first of those writes, and the writes in their order. A power cut
//! draws for each write whether it reached the medium whole, not at all, or torn (each of its blocks by itself), puts the
//! old blocks back and lays the surviving ones over them. A block thus ends as any of its versions since the flush, which is
//! what a device may do, and a block that was flushed and not written again never changes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::rng::Rng;

/// Above this the whole cache is written back, as a real one would some time: a device may flush when it likes.
const MAX_BYTES: u64 = 64 << 20;

/// What a power cut did to the writes that were not flushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PowerCut {
    /// Writes that are on the medium whole.
    pub kept: u64,
    /// Writes of which some blocks are on the medium.
    pub torn: u64,
    /// Writes of which nothing is left.
    pub dropped: u64,
}

pub(crate) struct Cache {
    block_bytes: u64,
    /// By block number, what survives for certain.
    durable: BTreeMap<u64, Box<[u8]>>,
    /// First block and bytes of each write since the flush, oldest first.
    writes: Vec<(u64, Box<[u8]>)>,
    bytes: u64,
}

impl Cache {
    pub(crate) fn new(block_bytes: u64) -> Self {
        Self { block_bytes, durable: BTreeMap::new(), writes: Vec::new(), bytes: 0 }
    }

    pub(crate) fn clear(&mut self) {
        self.durable.clear();
        self.writes.clear();
        self.bytes = 0;
    }

    /// Remembers what a write of whole blocks is about to replace.
    pub(crate) fn before(&mut self, file: &File, offset: u64, bytes: u64) -> io::Result<()> {
        if self.bytes + 2 * bytes > MAX_BYTES {
            self.clear();
        }
        for block in offset / self.block_bytes..(offset + bytes) / self.block_bytes {
            if let std::collections::btree_map::Entry::Vacant(entry) = self.durable.entry(block) {
                let mut old = vec![0; self.block_bytes as usize].into_boxed_slice();
                file.read_exact_at(&mut old, block * self.block_bytes)?;
                entry.insert(old);
                self.bytes += self.block_bytes;
            }
        }
        Ok(())
    }

    /// Remembers what a write of whole blocks has just put there. Read back from the medium, because the driver's memory may
    /// have changed since.
    pub(crate) fn after(&mut self, file: &File, offset: u64, bytes: u64) -> io::Result<()> {
        let mut new = vec![0; bytes as usize].into_boxed_slice();
        file.read_exact_at(&mut new, offset)?;
        self.writes.push((offset / self.block_bytes, new));
        self.bytes += bytes;
        Ok(())
    }

    pub(crate) fn power_cut(&mut self, file: &File, rng: &mut Rng) -> io::Result<PowerCut> {
        let mut outcome = PowerCut::default();
        for (first, bytes) in &self.writes {
            let blocks = bytes.chunks(self.block_bytes as usize).count();
            let kept: Vec<bool> = match rng.below(3) {
                0 => vec![true; blocks],
                1 => vec![false; blocks],
                _ => (0..blocks).map(|_| rng.chance(0.5)).collect(),
            };
            match kept.iter().filter(|kept| **kept).count() {
                0 => outcome.dropped += 1,
                n if n == blocks => outcome.kept += 1,
                _ => outcome.torn += 1,
            }
            for ((block, new), _) in
                (*first..).zip(bytes.chunks(self.block_bytes as usize)).zip(&kept).filter(|(_, kept)| **kept)
            {
                self.durable.insert(block, new.into());
            }
        }
        for (block, bytes) in &self.durable {
            file.write_all_at(bytes, block * self.block_bytes)?;
        }
        self.clear();
        Ok(outcome)
    }
}
