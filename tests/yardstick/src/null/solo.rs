//! The null device without a process, a socket or a thread: whoever has it serves it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::EVENT_IDX;
use super::regions::Regions;
use super::ring::DeviceRing;

/// One ring that is served by hand.
pub struct Served(DeviceRing);

impl Served {
    /// The ring at `addresses` (descriptors, available, used), all of them I/O addresses in `regions` (I/O address, length, file).
    ///
    /// # Errors
    /// When it is not in there.
    pub fn new(
        regions: &[(u64, u64, File)],
        addresses: (u64, u64, u64),
        size: u16,
        features: u64,
        kick: OwnedFd,
    ) -> io::Result<Served> {
        let mut mapped = Regions::default();
        for (iova, bytes, file) in regions {
            mapped.add(*iova, *iova, *bytes, 0, file)?;
        }
        let entries = u64::from(size);
        let place =
            |address, bytes| mapped.user(address, bytes).ok_or_else(|| io::Error::other("a ring outside the memory"));
        let ring = DeviceRing {
            table: place(addresses.0, 16 * entries)?,
            available: place(addresses.1, 6 + 2 * entries)?,
            used: place(addresses.2, 6 + 8 * entries)?,
            regions: Arc::new(mapped.clone()),
            size,
            event_index: features & EVENT_IDX != 0,
            next: 0,
            kick: File::from(kick),
            call: None,
        };
        ring.quiet();
        Ok(Served(ring))
    }

    /// Answers everything that is there.
    pub fn serve(&mut self) {
        while self.0.serve() > 0 {}
    }
}
