//! A region that one client fills and reads by itself, and windows of it for its requests (DESIGN section 7, "Mapped memory for clients").
//!
//! Nothing is allocated here: the client says which bytes a request is about, and only the bounds are checked. Windows may overlap; what two requests
//! over the same bytes make of them is the client's own affair, because nobody else's data is ever in its region.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::buffer::{Buffer, Home, Keeper};
use crate::dma::DmaRegion;
use crate::error::RegionError;

/// A [`DmaRegion`] that is shared out in windows. Cloning gives another reference to the same one.
#[derive(Clone)]
pub struct WindowedRegion {
    home: Arc<Home>,
    live: Arc<AtomicU64>,
}

impl WindowedRegion {
    /// Windows of all of `region`, which must hold nothing else. Of a region over 4 GiB, windows begin in the first 4 GiB.
    #[must_use]
    pub fn new(region: Arc<DmaRegion>) -> Self {
        let live = Arc::new(AtomicU64::new(0));
        Self { home: Arc::new(Home { region, keeper: Keeper::Windows(Arc::clone(&live)) }), live }
    }

    /// The `bytes` bytes at `offset`, as a buffer for one request. Neither needs any alignment.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] when not all of it is inside, not in one run for the device, or it is empty, [`RegionError::Revoked`] after [`DmaRegion::revoke`].
    pub fn window(&self, offset: u64, bytes: u32) -> Result<Buffer, RegionError> {
        let region = &self.home.region;
        if region.is_revoked() {
            return Err(RegionError::Revoked);
        }
        let length = u64::from(bytes);
        let inside = bytes > 0 && offset <= region.len() && length <= region.run_bytes(offset);
        let Some(place) = u32::try_from(offset).ok().filter(|_| inside) else {
            return Err(RegionError::OutOfRange { offset, bytes: length, region_bytes: region.len() });
        };
        self.live.fetch_add(1, Ordering::Relaxed);
        Ok(Buffer::window(&self.home, place, bytes))
    }

    /// Whether `buffer` is a window of this very region. I/O addresses say nothing about that: two devices may use the same ones.
    #[must_use]
    #[inline]
    pub fn owns(&self, buffer: &Buffer) -> bool {
        buffer.is_of(&self.home)
    }

    /// Windows that exist now, with the client or with a request.
    #[must_use]
    pub fn live_windows(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    /// The region behind it.
    #[must_use]
    pub fn region(&self) -> &Arc<DmaRegion> {
        &self.home.region
    }
}

impl fmt::Debug for WindowedRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WindowedRegion")
            .field("iova", &format_args!("{:#x}", self.region().iova()))
            .field("bytes", &self.region().len())
            .field("live_windows", &self.live_windows())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::DmaArena;

    fn region(bytes: u64, iova: u64) -> Arc<DmaRegion> {
        Arc::new(DmaRegion::new("window-test", bytes, iova).unwrap())
    }

    #[test]
    fn a_window_is_the_bytes_that_were_named_wherever_they_begin() {
        let windowed = WindowedRegion::new(region(8192, 0x10_0000));
        let one = windowed.window(0, 8192).unwrap();
        let two = windowed.window(4095, 514).unwrap();
        assert_eq!((one.iova(), one.len()), (0x10_0000, 8192));
        assert_eq!((two.iova(), two.len()), (0x10_0fff, 514));
        two.write_at(1, b"over the page").unwrap();
        let mut seen = [0; 13];
        one.read_at(4096, &mut seen).unwrap();
        assert_eq!(&seen, b"over the page", "windows overlap");
        windowed.region().read_at(4096, &mut seen).unwrap();
        assert_eq!(&seen, b"over the page");
        assert!(two.write_at(502, &[0; 13]).is_err(), "past the window's end, inside the region");
        assert!(two.host_range(&(0..515)).is_none());
        assert_eq!(two.host_range(&(1..514)).unwrap().1, 513);
        assert_eq!(windowed.live_windows(), 2);
        drop(one);
        assert_eq!(windowed.live_windows(), 1);
    }

    #[test]
    fn what_is_not_wholly_inside_is_no_window() {
        let windowed = WindowedRegion::new(region(8192, 0x10_0000));
        for (offset, bytes) in [
            (0, 0),
            (0, 8193),
            (8192, 1),
            (8191, 2),
            (1, 8192),
            (u64::MAX, 1),
            (u64::MAX - 4095, 4096),
            (4096, u32::MAX),
            (u64::MAX, u32::MAX),
            (1 << 63, 4096),
        ] {
            let refused = windowed.window(offset, bytes);
            assert!(
                matches!(refused, Err(RegionError::OutOfRange { region_bytes: 8192, .. })),
                "{bytes} bytes at {offset}: {refused:?}"
            );
        }
        assert_eq!(windowed.live_windows(), 0);
        windowed.window(8191, 1).unwrap();
    }

    #[test]
    fn a_buffer_belongs_to_one_region_or_arena_whatever_its_address() {
        let same = || region(8192, 0x10_0000);
        let (a, b, arena) = (WindowedRegion::new(same()), WindowedRegion::new(same()), DmaArena::new(same()).unwrap());
        let (window, lease) = (a.window(0, 4096).unwrap(), arena.lease(4096).unwrap());
        assert_eq!(window.iova(), lease.iova());
        assert!(a.owns(&window) && a.clone().owns(&window) && !b.owns(&window) && !arena.owns(&window));
        assert!(arena.owns(&lease) && !a.owns(&lease));
    }

    #[test]
    fn a_revoked_region_answers_nothing_and_its_file_is_empty_and_sealed() {
        let windowed = WindowedRegion::new(region(8192, 0x10_0000));
        let window = windowed.window(0, 4096).unwrap();
        window.fill(0, 4096, 0x5a).unwrap();
        let copy = windowed.region().duplicate().unwrap();
        let blocks = || rustix::fs::fstat(&copy).unwrap().st_blocks;
        assert_eq!(blocks(), 8, "one page of 512-byte blocks");
        assert!(windowed.region().revoke());
        assert!(windowed.region().revoke(), "again");
        assert_eq!(blocks(), 0, "the file still holds pages");
        assert!(matches!(window.read_at(0, &mut [0; 8]), Err(RegionError::Revoked)));
        assert!(matches!(windowed.window(0, 1), Err(RegionError::Revoked)));
        assert!(matches!(windowed.region().duplicate(), Err(RegionError::Revoked)));
        assert!(window.host_range(&(0..1)).is_none());
        // Who holds the file can put something in again, up to its length, and can make it neither longer nor shorter.
        assert_eq!(rustix::io::pwrite(&copy, &[1; 8192], 0), Ok(8192));
        assert!(rustix::io::pwrite(&copy, &[1; 1], 8192).is_err());
        assert!(rustix::fs::ftruncate(&copy, 4096).is_err());
        assert!(rustix::fs::fcntl_add_seals(&copy, rustix::fs::SealFlags::WRITE).is_err());
        let mut now = [9; 1];
        windowed.region().mapping().copy_out(0, &mut now);
        assert_eq!(now, [0], "the host sees what the holder writes");
    }
}
