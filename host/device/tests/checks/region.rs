//! DMA regions: bounds, seals and copies.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;

use cofferdam_device::{DmaRegion, RegionError};
use proptest::prelude::*;
use rustix::fs::SealFlags;

#[test]
fn a_region_cannot_be_resized_by_whoever_holds_its_descriptor() {
    let region = DmaRegion::new("test-seals", 8192, 0).unwrap();
    for bytes in [0, 4096, 16384] {
        assert!(rustix::fs::ftruncate(region.fd(), bytes).is_err());
    }
    assert!(rustix::fs::fcntl_add_seals(region.fd().as_fd(), SealFlags::WRITE).is_err());
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
