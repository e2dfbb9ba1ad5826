//! What a function says of itself is checked before anything of it is touched.

use std::sync::Arc;

use cofferdam_device::Transport;
use proptest::prelude::*;

use crate::error::PciError;
use crate::virtio::layout::{Layout, Place};
use crate::virtio::testing::{
    AT, BAR, BAR_BYTES, COMMON, DEVICE, Did, ISR, NOTIFY, NOTIFY_STEP, Sim, capability, config_space, open,
};

const BARS: [u64; 6] = [0, 0x1000, 0, 0, BAR_BYTES, 0];

fn put(config: &mut [u8; 256], at: u8, bytes: &[u8]) {
    config[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
}

/// What the case is, the bytes that are changed, and what the refusal says.
type Case<'a> = (&'a str, &'a [(u8, u8)], &'a str);

#[test]
fn what_qemu_has_is_found() {
    let place = |first: u32| Place { bar: BAR, first: u64::from(first), bytes: 0x1000 };
    let wanted = Layout {
        common: place(COMMON),
        notify: place(NOTIFY),
        notify_step: NOTIFY_STEP,
        isr: place(ISR),
        device: Some(place(DEVICE)),
        vectors: 5,
    };
    assert_eq!(Layout::find(&config_space(), &BARS), Ok(wanted));
}

#[test]
fn each_field_out_of_bounds_makes_its_capability_unusable() {
    let common = AT[2];
    let notify = AT[5];
    let isr = AT[3];
    // Which capability, which of its bytes, and what they are made to say.
    let cases: &[(&str, u8, u8, &[u8])] = &[
        ("cap_len", common, 2, &[15]),
        ("cap_len of nothing", common, 2, &[0]),
        ("cap_len over the end", common, 2, &[255]),
        ("cfg_type reserved", common, 3, &[77]),
        ("bar reserved", common, 4, &[6]),
        ("bar far out", common, 4, &[255]),
        ("bar that is not there", common, 4, &[0]),
        ("bar that is too short", common, 4, &[1, 0, 0, 0, 0, 8]),
        ("offset at the end", common, 8, &[0, 0x40, 0, 0]),
        ("offset just too far", common, 8, &[4, 0x30, 0, 0]),
        ("offset at the top", common, 8, &[0xfc, 0xff, 0xff, 0xff]),
        ("offset misaligned", common, 8, &[2, 0, 0, 0]),
        ("length over the end", common, 12, &[4, 0x40, 0, 0]),
        ("length at the top", common, 12, &[0xff, 0xff, 0xff, 0xff]),
        ("length too short", common, 12, &[55, 0, 0, 0]),
        ("notify without multiplier", notify, 2, &[16]),
        ("notify too short", notify, 12, &[1, 0, 0, 0]),
        ("notify misaligned", notify, 8, &[1, 0, 0, 0]),
        ("multiplier odd", notify, 16, &[1, 0, 0, 0]),
        ("multiplier no power of two", notify, 16, &[6, 0, 0, 0]),
        ("isr empty", isr, 12, &[0, 0, 0, 0]),
    ];
    for (name, capability, field, bytes) in cases {
        let sim = Sim::new(|model| put(&mut model.config_space, capability + field, bytes));
        let why = match open(&sim) {
            Err(PciError::Unusable { why, .. }) => why,
            other => panic!("{name}: {:?}", other.map(|_| "open")),
        };
        assert!(why.contains("it has no capability for"), "{name}: {why}");
        let model = sim.model();
        assert_eq!(model.accesses, 0, "{name}: no register is touched");
        assert_eq!(model.did, [Did::Quiet, Did::Release], "{name}: it is given back");
    }
}

#[test]
fn a_device_configuration_that_is_unusable_is_none() {
    for (field, bytes) in [(8, [2, 0x20, 0, 0]), (12, [0xff, 0xff, 0, 0]), (12, [0, 0, 0, 0])] {
        let mut config = config_space();
        put(&mut config, AT[4] + field, &bytes);
        assert_eq!(Layout::find(&config, &BARS).unwrap().device, None);
    }
}

#[test]
fn the_first_usable_capability_of_a_type_is_taken() {
    // The second place, PCI configuration access, becomes another common configuration in front of QEMU's.
    for (bar, first, found) in [(1, 0x100, (1, 0x100)), (1, 0xfff0, (BAR, 0)), (0, 0, (BAR, 0)), (7, 0, (BAR, 0))] {
        let mut config = config_space();
        put(&mut config, AT[1], &capability(AT[2], 16, 1, bar, first, 0x100));
        let common = Layout::find(&config, &BARS).unwrap().common;
        assert_eq!((common.bar, common.first), found);
    }
}

#[test]
fn longer_capabilities_and_a_multiplier_of_zero_are_taken() {
    let mut config = config_space();
    put(&mut config, AT[2] + 2, &[20]);
    put(&mut config, AT[5] + 16, &[0, 0, 0, 0]);
    assert_eq!(Layout::find(&config, &BARS).unwrap().notify_step, 0);
}

#[test]
fn lists_that_lead_nowhere_or_in_a_circle_are_refused() {
    let cases: &[Case<'_>] = &[
        ("no list", &[(0x06, 0)], "no capabilities"),
        ("empty list", &[(0x34, 0)], "no capability for common"),
        ("into the header", &[(0x34, 0x10)], "into the header"),
        ("into the header later", &[(AT[3] + 1, 0x3c)], "into the header"),
        ("to itself", &[(AT[1] + 1, AT[1])], "circle"),
        ("back", &[(AT[5] + 1, AT[0])], "circle"),
        ("a bridge", &[(0x0e, 1)], "header type"),
        ("cut off", &[(AT[3] + 1, 0xfc), (0xfc, 0x09)], "no capability for notifications"),
    ];
    for (name, bytes, text) in cases {
        let mut config = config_space();
        for (at, byte) in *bytes {
            put(&mut config, *at, &[*byte]);
        }
        let why = Layout::find(&config, &BARS).unwrap_err();
        assert!(why.contains(text), "{name}: {why}");
    }
    assert!(Layout::find(&[0xff; 256], &BARS).is_err());
    // Reserved bits at the bottom of pointers are no part of them.
    let mut config = config_space();
    put(&mut config, 0x34, &[AT[0] | 3]);
    Layout::find(&config, &BARS).unwrap();
}

#[test]
fn what_is_no_modern_virtio_device_is_refused_untouched() {
    for (ids, text) in [
        ((0x1af4, 0x1000), "legacy and transitional devices are refused"),
        ((0x1af4, 0x1001), "disable-legacy=on"),
        ((0x1af4, 0x103f), "4.1.2.1"),
        ((0x1af4, 0x1001), "1af4:1001"),
        ((0x1af4, 0x1040), "no virtio device"),
        ((0x1af4, 0x1110), "no virtio device"),
        ((0x8086, 0x1042), "no virtio device"),
    ] {
        let sim = Sim::new(|model| model.ids = ids);
        let error = open(&sim).err().expect("refused").to_string();
        assert!(error.contains(text) && error.contains("0000:00:04.0"), "{error}");
        assert_eq!(sim.model().accesses, 0);
        assert_eq!(sim.did(), [Did::Quiet, Did::Release]);
    }
    for (id, kind) in [(0x1041, 1), (0x1042, 2), (0x107f, 63)] {
        let sim = Sim::new(|model| model.ids = (0x1af4, id));
        assert_eq!(open(&sim).unwrap().device_type(), Some(kind));
    }
}

/// What QEMU has, with a few of its words made to say something else, mostly near a bound; and noise behind a header that leads into it.
fn config() -> impl Strategy<Value = [u8; 256]> {
    let near = prop_oneof![0..0x40u32, 0xfc0..0x1010u32, 0x3fc0..0x5010u32, Just(u32::MAX - 3), any::<u32>()];
    let word = (AT[0] / 4..(AT[5] + 20) / 4, near);
    let byte = (AT[0]..AT[5] + 20, prop_oneof![0..16u8, AT[0]..AT[5], any::<u8>()]);
    let few = (proptest::collection::vec(word, 0..3), proptest::collection::vec(byte, 0..4));
    let changed = few.prop_map(|(words, bytes)| {
        let mut config = config_space();
        words.iter().for_each(|(at, word)| put(&mut config, at * 4, &word.to_le_bytes()));
        bytes.iter().for_each(|(at, byte)| put(&mut config, *at, &[*byte]));
        config
    });
    let noise = proptest::collection::vec(any::<u8>(), 256).prop_map(|noise| {
        let mut config: [u8; 256] = noise.try_into().unwrap();
        config[0x06] |= 0x10;
        config[0x0e] = 0;
        config[0x34] |= 0x40;
        config
    });
    prop_oneof![4 => changed, 1 => noise]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn no_configuration_space_leads_out_of_a_bar(
        config in config(),
        second in prop_oneof![Just(0u64), Just(0x1000)],
    ) {
        let bars = [0x3000, second, 0x1000, u64::from(u32::MAX), 0x5000, 8];
        if let Ok(layout) = Layout::find(&config, &bars) {
            let all = [Some((layout.common, 56, 4)), Some((layout.notify, 2, 2)), Some((layout.isr, 1, 1)), layout.device.map(|place| (place, 1, 4))];
            for (place, least, align) in all.into_iter().flatten() {
                prop_assert!(place.first + place.bytes <= bars[usize::from(place.bar)]);
                prop_assert!(place.bytes >= least && place.first % align == 0);
            }
            prop_assert!(layout.notify_step == 0 || (layout.notify_step.is_power_of_two() && layout.notify_step > 1));
            prop_assert!(layout.vectors <= 2048);
        }
        let sim = Sim::new(|model| {
            model.config_space = config;
            model.bar_bytes = bars;
        });
        // Registers that all read 0: a device that is gone, if it comes to that.
        prop_assert!(open(&sim).is_err());
        let model = sim.model();
        prop_assert!(model.violations.is_empty(), "{:?}", model.violations);
        prop_assert!(model.accesses < 10);
        prop_assert_eq!(model.did.last(), Some(&Did::Release));
    }
}

#[test]
fn random_layouts_are_whole_and_broken_by_turns() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    // Else the property above would say nothing.
    let mut runner = TestRunner::deterministic();
    let bars = [0x3000, 0x1000, 0x1000, u64::from(u32::MAX), 0x5000, 8];
    let all = 1000;
    let whole =
        (0..all).filter(|_| Layout::find(&config().new_tree(&mut runner).unwrap().current(), &bars).is_ok()).count();
    assert!((all / 10..all * 9 / 10).contains(&whole), "{whole} of {all} layouts were whole");
}

#[test]
fn a_bar_that_is_mapped_shorter_than_it_was_said_to_be_is_refused() {
    use crate::virtio::part::Part;
    struct Short;
    impl crate::registers::Registers for Short {
        fn bytes(&self) -> u64 {
            0x100
        }
        fn read(&self, _: u64, _: cofferdam_device::Width) -> Result<u64, cofferdam_device::TransportError> {
            Ok(0)
        }
        fn write(&self, _: u64, _: cofferdam_device::Width, _: u64) -> Result<(), cofferdam_device::TransportError> {
            Ok(())
        }
    }
    let part = |first, bytes| Part::new(Arc::new(Short), Place { bar: 0, first, bytes });
    assert!(part(0xc0, 0x41).is_err() && part(u64::MAX, 1).is_err());
    let part = part(0xc0, 0x40).unwrap();
    use cofferdam_device::Width::{U8, U32};
    assert!(part.read(0x3c, U32).is_ok() && part.read(0x3d, U32).is_err() && part.write(0x40, U8, 0).is_err());
    assert!(part.read(u64::MAX, U32).is_err());
}
