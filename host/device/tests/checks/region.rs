//! DMA regions: bounds, seals and copies.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;

use cofferdam_device::{DmaRegion, RegionError};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags};

#[test]
fn a_region_cannot_be_resized_by_whoever_holds_its_descriptor() {
    let region = DmaRegion::new("test-seals", 8192, 0).unwrap();
    for bytes in [0, 4096, 16384] {
        assert!(rustix::fs::ftruncate(region.fd(), bytes).is_err());
    }
    assert!(rustix::fs::fcntl_add_seals(region.fd().as_fd(), SealFlags::WRITE).is_err());
}

#[test]
fn what_is_read_while_a_region_is_revoked_is_the_data_or_an_error() {
    const BYTES: usize = 1 << 20;
    let mut into = vec![0; BYTES];
    for _ in 0..300 {
        let region = DmaRegion::new("test-revoked", BYTES as u64, 0).unwrap();
        region.fill(0, BYTES as u64, 7).unwrap();
        std::thread::scope(|scope| {
            let revoked = scope.spawn(|| region.revoke());
            while region.read_at(0, &mut into).is_ok() {
                // What was taken away in the middle of the copy ends in zeroes.
                assert_eq!(into[BYTES - 1], 7, "zeroes in place of the data");
            }
            assert!(revoked.join().unwrap());
        });
    }
}

#[test]
fn a_region_can_be_adopted_by_its_descriptor_and_is_the_same_memory() {
    let region = DmaRegion::new("test-adopt", 8192, 0x4000).unwrap();
    region.write_at(4000, b"before").unwrap();
    let other = DmaRegion::adopt(region.duplicate().unwrap(), 8192, 0x4000).unwrap();
    assert_eq!((other.iova(), other.len(), other.run_bytes(0)), (0x4000, 8192, 8192));
    let mut seen = [0; 6];
    other.read_at(4000, &mut seen).unwrap();
    assert_eq!(&seen, b"before");
    other.write_at(0, b"after").unwrap();
    drop(other);
    region.read_at(0, &mut seen).unwrap();
    assert_eq!(&seen, b"after\0", "dropping one takes nothing from the other");
}

#[test]
fn what_is_no_regions_file_is_not_adopted() {
    let region = || DmaRegion::new("test-adopt", 8192, 0).unwrap().duplicate().unwrap();
    for (bytes, iova) in [(0, 0), (4096, 0), (16384, 0), (8191, 0), (8192, 1), (8192, u64::MAX - 4095), (1 << 63, 0)] {
        let refused = DmaRegion::adopt(region(), bytes, iova);
        assert!(matches!(refused, Err(RegionError::Shape { .. })), "{bytes} at {iova}: {refused:?}");
    }
    let memfd = |flags| rustix::fs::memfd_create("test-adopt", flags).unwrap();
    let open = memfd(MemfdFlags::ALLOW_SEALING);
    let half = memfd(MemfdFlags::ALLOW_SEALING);
    for file in [&open, &half] {
        rustix::fs::ftruncate(file, 8192).unwrap();
    }
    rustix::fs::fcntl_add_seals(&half, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap().into();
    for file in [open, half, memfd(MemfdFlags::empty()), null] {
        assert!(matches!(DmaRegion::adopt(file, 8192, 0), Err(RegionError::Unsealed)));
    }
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    for (bytes, iova) in [(0, 0), (100, 0), (4096, 1), (8192, u64::MAX - 4095), (1 << 63, 0)] {
        assert!(
            matches!(DmaRegion::new("test-shape", bytes, iova), Err(RegionError::Shape { .. })),
            "{bytes} at {iova}"
        );
    }
}

#[test]
fn addresses_translate_only_inside() {
    let region = DmaRegion::new("test-iova", 8192, 0x10000).unwrap();
    assert_eq!(region.offset_of(0x10000, 8192), Some(0));
    assert_eq!(region.offset_of(0x11fff, 1), Some(0x1fff));
    for (iova, bytes) in [(0xffff, 1), (0x12000, 1), (0x10000, 8193), (0x11fff, u64::MAX), (u64::MAX, 1)] {
        assert_eq!(region.offset_of(iova, bytes), None, "{bytes} at {iova:#x}");
    }
}

#[test]
fn words_are_little_endian_and_aligned() {
    let region = DmaRegion::new("test-words", 4096, 0).unwrap();
    region.store_u16(4094, 0x1234, Relaxed).unwrap();
    let mut bytes = [0; 2];
    region.read_at(4094, &mut bytes).unwrap();
    assert_eq!(bytes, [0x34, 0x12]);
    assert_eq!(region.load_u16(4094, Relaxed).unwrap(), 0x1234);
    for offset in [1, 4095, 4096, u64::MAX] {
        assert!(region.load_u16(offset, Relaxed).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn copies_touch_exactly_their_bytes(offset in 0..4200u64, bytes in proptest::collection::vec(any::<u8>(), 0..100), fill: Option<u8>) {
        let region = DmaRegion::new("test-copy", 4096, 0).unwrap();
        region.fill(0, 4096, 0xaa).unwrap();
        let fits = offset + bytes.len() as u64 <= 4096;
        let result = match fill {
            Some(value) => region.fill(offset, bytes.len() as u64, value),
            None => region.write_at(offset, &bytes),
        };
        prop_assert_eq!(result.is_ok(), fits);
        let mut model = vec![0xaa; 4096];
        if fits {
            let place = offset as usize..offset as usize + bytes.len();
            match fill {
                Some(value) => model[place].fill(value),
                None => model[place].copy_from_slice(&bytes),
            }
        }
        let mut all = vec![0; 4096];
        region.read_at(0, &mut all).unwrap();
        prop_assert_eq!(all, model);
        let mut back = vec![0; bytes.len()];
        prop_assert_eq!(region.read_at(offset, &mut back).is_ok(), fits);
        if fits && fill.is_none() {
            prop_assert_eq!(back, bytes);
        }
    }
}
