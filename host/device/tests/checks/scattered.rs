//! Memory that is scattered in pages: nothing that a device is told crosses the end of one, and its file outlives everything but its revocation.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use cofferdam_device::{
    DmaArena, DmaRegion, FileName, QueueConfig, QueueError, RegionError, SplitQueue, WindowedRegion,
};
use proptest::collection::vec;
use proptest::prelude::*;

const PAGE: u64 = 64 << 10;

/// A region over a file `name` of `folder`, whose page `n` is told to be at `addresses[n]`.
fn region(folder: &Path, name: &str, bytes: u64, addresses: Vec<u64>) -> Result<DmaRegion, RegionError> {
    let file = File::options().read(true).write(true).create(true).truncate(false).open(folder.join(name)).unwrap();
    file.set_len(bytes).unwrap();
    let place = FileName { folder: OwnedFd::from(File::open(folder).unwrap()), name: CString::new(name).unwrap() };
    DmaRegion::in_pages(file.into(), place, bytes, PAGE, |_| Ok(addresses))
}

/// Pages that follow each other neither forwards nor backwards.
fn addresses(pages: u64) -> Vec<u64> {
    (0..pages).map(|page| 0x4000_0000 + (page * 7 % 31) * 3 * PAGE).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_lease_crosses_the_end_of_a_page_and_none_overlap(sizes in vec(1..80_000u32, 1..60), keep in vec(any::<bool>(), 60)) {
        let folder = tempfile::tempdir().unwrap();
        let region = Arc::new(region(folder.path(), "arena", 8 * PAGE, addresses(8)).unwrap());
        let arena = DmaArena::new(Arc::clone(&region)).unwrap();
        prop_assert!(u64::from(arena.max_lease_bytes()) <= PAGE);
        let mut held = Vec::new();
        for (bytes, keep) in sizes.into_iter().zip(keep) {
            let Ok(buffer) = arena.lease(bytes) else { continue };
            let (first, last) = (buffer.iova(), buffer.iova() + u64::from(bytes) - 1);
            prop_assert_eq!(first / PAGE, last / PAGE, "{:#x} to {:#x}", first, last);
            prop_assert!(region.offset_of(first, bytes.into()).is_some());
            // Where the device finds it is where the host has it.
            buffer.write_at(0, &[bytes as u8 | 1]).unwrap();
            let mut there = [0];
            region.read_at(region.offset_of(first, 1).unwrap(), &mut there).unwrap();
            prop_assert_eq!(there[0], bytes as u8 | 1);
            if keep {
                let end = first + u64::from(bytes).next_multiple_of(4096);
                prop_assert!(held.iter().all(|(from, to, _)| end <= *from || *to <= first), "leases overlap");
                held.push((first, end, buffer));
            }
        }
        held.clear();
        prop_assert_eq!(arena.leased_bytes(), 0);
    }

    #[test]
    fn an_address_leads_back_to_its_offset_and_a_range_over_two_pages_to_none(offset in 0..8 * PAGE, bytes in 0..2 * PAGE) {
        let folder = tempfile::tempdir().unwrap();
        let region = region(folder.path(), "there-and-back", 8 * PAGE, addresses(8)).unwrap();
        let run = region.run_bytes(offset);
        prop_assert!(run > 0 && run <= PAGE);
        let back = region.offset_of(region.address_of(offset), bytes);
        prop_assert_eq!(back, (bytes <= run).then_some(offset));
    }
}

#[test]
fn a_ring_lies_in_one_page_or_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let region = Arc::new(region(folder.path(), "rings", 4 * PAGE, addresses(4)).unwrap());
    let config = QueueConfig { index: 0, size: 64, event_idx: true, indirect: false };
    let bytes = SplitQueue::bytes(64, false);
    assert!(bytes < PAGE);
    let queue = SplitQueue::new(config, Arc::clone(&region), 2 * PAGE).unwrap();
    assert_eq!(queue.addresses().descriptors, region.address_of(2 * PAGE));
    let over = SplitQueue::new(config, Arc::clone(&region), PAGE - 4096).err();
    assert_eq!(over, Some(QueueError::Scattered { offset: PAGE - 4096, bytes }));
}

#[test]
fn a_window_lies_in_one_page_or_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let windows = WindowedRegion::new(Arc::new(region(folder.path(), "windows", 2 * PAGE, addresses(2)).unwrap()));
    assert_eq!(windows.window(PAGE - 512, 512).unwrap().iova(), addresses(2)[0] + PAGE - 512);
    assert!(matches!(windows.window(PAGE - 512, 513), Err(RegionError::OutOfRange { .. })));
}

#[test]
fn the_file_goes_with_the_revocation_and_with_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let make = || region(folder.path(), "memory", 2 * PAGE, addresses(2)).unwrap();
    drop(make());
    assert!(path.exists(), "the device was not shown to be silent");
    let kept = Arc::new(make());
    Arc::clone(&kept).retire();
    drop(kept);
    assert!(path.exists(), "the device may still write there");
    let region = make();
    region.write_at(0, b"secret").unwrap();
    assert!(region.revoke());
    assert!(!path.exists());
    assert!(matches!(region.write_at(0, b"x"), Err(RegionError::Revoked)));
}

#[test]
fn a_translation_that_is_not_one_aligned_address_a_page_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for bad in [vec![0], vec![0, PAGE, 2 * PAGE], vec![0, PAGE + 4096], vec![0, 0u64.wrapping_sub(PAGE)]] {
        let made = region(folder.path(), "bad", 2 * PAGE, bad.clone());
        assert!(matches!(made, Err(RegionError::Shape { .. })), "{bad:x?}");
    }
    let name = || FileName { folder: OwnedFd::from(File::open(folder.path()).unwrap()), name: c"bad".into() };
    let file = || File::options().read(true).write(true).open(folder.path().join("bad")).unwrap();
    // A file of another length than it is said to have would fault.
    for (bytes, page) in [(4 * PAGE, PAGE), (2 * PAGE, 3000), (2 * PAGE, 512), (0, PAGE), (2 * PAGE, 4 * PAGE)] {
        let made = DmaRegion::in_pages(file().into(), name(), bytes, page, |_| Ok(vec![0; 64]));
        assert!(matches!(made, Err(RegionError::Shape { .. })), "{bytes} in {page}");
    }
}

#[test]
fn another_process_finds_the_pages_where_they_are_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    let first = region(folder.path(), "arena", 3 * PAGE, addresses(3)).unwrap();
    region(folder.path(), "another", 3 * PAGE, addresses(3)).unwrap();
    region(other.path(), "arena", 3 * PAGE, addresses(3)).unwrap();
    for page in 0..3 {
        first.write_at(page * PAGE + 7, &[page as u8 + 1]).unwrap();
    }
    let adopt = |at: &Path, name: &str, page_bytes: u64, said: &[u64], found: Vec<u64>| {
        let place = FileName { folder: OwnedFd::from(File::open(at).unwrap()), name: CString::new(name).unwrap() };
        DmaRegion::adopt_pages(first.duplicate().unwrap(), place, page_bytes, said, |_| Ok(found))
    };
    let pages = addresses(3);
    let second = adopt(folder.path(), "arena", PAGE, &pages, pages.clone()).unwrap();
    for page in 0..3 {
        let mut found = [0];
        second.read_at(page * PAGE + 7, &mut found).unwrap();
        assert_eq!((found[0], second.address_of(page * PAGE)), (page as u8 + 1, first.address_of(page * PAGE)));
    }
    assert_eq!(second.pages(), first.pages());
    // A page that has moved, one too few, another size, another file of that name or none.
    let moved: Vec<_> = pages.iter().map(|page| page + PAGE).collect();
    assert!(matches!(adopt(folder.path(), "arena", PAGE, &pages, moved), Err(RegionError::Io { .. })));
    let fewer = pages[..2].to_vec();
    assert!(matches!(adopt(folder.path(), "arena", PAGE, &fewer, fewer.clone()), Err(RegionError::Shape { .. })));
    assert!(matches!(adopt(folder.path(), "arena", PAGE / 2, &pages, pages.clone()), Err(RegionError::Shape { .. })));
    assert!(matches!(adopt(folder.path(), "arena", 3, &pages, pages.clone()), Err(RegionError::Shape { .. })));
    for (at, name) in [(folder.path(), "another"), (other.path(), "arena"), (folder.path(), "none")] {
        assert!(matches!(adopt(at, name, PAGE, &pages, pages.clone()), Err(RegionError::Io { .. })), "{name}");
    }
    drop(first);
    assert!(folder.path().join("arena").exists());
    assert!(second.revoke());
    assert!(!folder.path().join("arena").exists(), "the one that has it removes it");
}
