//! The front end's memory.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::memory::Memory;

/// One region as the front end described it.
#[derive(Clone, Debug)]
pub(super) struct Region {
    guest: u64,
    user: u64,
    bytes: u64,
    memory: Arc<Memory>,
    /// Where the region begins in `memory`.
    skip: u64,
}

/// A place in a region.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) memory: Arc<Memory>,
    pub(super) offset: usize,
}

/// All regions; a handful.
#[derive(Clone, Debug, Default)]
pub(super) struct Regions(Vec<Region>);

impl Regions {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    pub(super) fn add(&mut self, guest: u64, user: u64, bytes: u64, skip: u64, file: &File) -> io::Result<()> {
        let len = skip.checked_add(bytes).and_then(|len| usize::try_from(len).ok());
        let len = len.ok_or_else(|| io::Error::other("a region that is too large"))?;
        // A mapping past the file's end would kill this process at the first touch.
        if file.metadata()?.len() < len as u64 {
            return Err(io::Error::other("a region beyond its file"));
        }
        self.0.push(Region { guest, user, bytes, memory: Arc::new(Memory::map(file, 0, len)?), skip });
        Ok(())
    }

    pub(super) fn remove(&mut self, guest: u64, bytes: u64) {
        self.0.retain(|region| (region.guest, region.bytes) != (guest, bytes));
    }

    /// The byte at guest address `address`.
    #[inline]
    pub(super) fn guest(&self, address: u64, bytes: u64) -> Option<(&Memory, usize)> {
        for region in &self.0 {
            if let Some(inside) = inside(region.guest, region.bytes, address, bytes) {
                return Some((&region.memory, (region.skip + inside) as usize));
            }
        }
        None
    }

    /// Where `bytes` bytes at the front end's own address `address` are.
    pub(super) fn user(&self, address: u64, bytes: u64) -> Option<Place> {
        self.0.iter().find_map(|region| {
            let inside = inside(region.user, region.bytes, address, bytes)?;
            Some(Place { memory: Arc::clone(&region.memory), offset: (region.skip + inside) as usize })
        })
    }
}

#[inline]
fn inside(start: u64, len: u64, address: u64, bytes: u64) -> Option<u64> {
    let offset = address.wrapping_sub(start);
    (offset < len && bytes <= len - offset).then_some(offset)
}
