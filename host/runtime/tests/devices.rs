//! Device tables that are right, and everything else that may stand in their place.

use cofferdam_device::FunctionIds;
use cofferdam_runtime::{DeviceId, LoadError, Wanted, device_table};
use proptest::prelude::*;

// The form of a table, as the SDK documents it.
const SECTION: &str = "cofferdam:devices";
const ENTRY_BYTES: usize = 20;
const MAX_ENTRIES: usize = 256;
const ANY: u32 = u32::MAX;

const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
const CORE: &[u8] = b"\0asm\x01\0\0\0";

fn length(bytes: &[u8]) -> Vec<u8> {
    let mut value = bytes.len();
    let mut encoded = Vec::new();
    while value >= 0x80 {
        encoded.push(value as u8 | 0x80);
        value >>= 7;
    }
    encoded.push(value as u8);
    encoded
}

fn section(id: u8, contents: &[u8]) -> Vec<u8> {
    [&[id][..], &length(contents), contents].concat()
}

fn custom(name: &str, contents: &[u8]) -> Vec<u8> {
    section(0, &[&length(name.as_bytes())[..], name.as_bytes(), contents].concat())
}

fn entries(words: &[[u32; 5]]) -> Vec<u8> {
    words.iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
}

fn with_table(table: &[u8]) -> Vec<u8> {
    [COMPONENT, &custom(SECTION, table)].concat()
}

fn garbage(table: &[u8]) -> String {
    match device_table(&with_table(table)) {
        Err(error @ LoadError::Devices(_)) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

const NVME: FunctionIds =
    FunctionIds { vendor: 0x1b36, device: 0x10, subsystem_vendor: 0, subsystem: 0, class: 0x01_0802, revision: 2 };

#[test]
fn a_table_is_found_in_the_component_and_in_its_core_modules() {
    let words = [[1, 4, 0, 0, 0], [2, 0x1234, 0x11e8, 0, 0], [2, ANY, ANY, 0x01_0800, 0xff_ff00]];
    let table = entries(&words);
    let pci = |vendor, device, class, class_mask| DeviceId::Pci { vendor, device, class, class_mask };
    let expected =
        vec![DeviceId::Virtio(4), pci(Some(0x1234), Some(0x11e8), 0, 0), pci(None, None, 0x01_0800, 0xff_ff00)];
    assert_eq!(device_table(&with_table(&table)).unwrap(), expected);
    let core = [CORE, &section(1, &[0; 300]), &custom(SECTION, &table), &custom("name", b"x")].concat();
    let nested = [COMPONENT, &custom("producers", b"x"), &section(1, &core), &section(7, &[1, 2])].concat();
    assert_eq!(device_table(&nested).unwrap(), expected);
    let shown: Vec<String> = expected.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["virtio:4", "pci:1234:11e8", "pci:*:* class 010800/ffff00"]);
}

#[test]
fn a_component_without_a_table_has_an_empty_one() {
    assert_eq!(device_table(COMPONENT), Ok(Vec::new()));
    assert_eq!(device_table(&[COMPONENT, &custom("cofferdam:device", &[1; 20])].concat()), Ok(Vec::new()));
}

#[test]
fn what_is_no_component_is_named_as_at_a_load() {
    assert_eq!(device_table(b"#!/bin/sh\n"), Err(LoadError::NotWasm));
    assert_eq!(device_table(CORE), Err(LoadError::CoreModule));
    let whole = with_table(&entries(&[[1, 4, 0, 0, 0]]));
    for cut in COMPONENT.len() + 1..whole.len() {
        assert!(matches!(device_table(&whole[..cut]), Err(LoadError::Compile(_))), "{cut}");
    }
}

#[test]
fn garbage_in_the_section_is_an_error_that_names_it() {
    for (table, words) in [
        (vec![], "0 bytes"),
        (vec![1; 19], "19 bytes"),
        (entries(&[[1, 4, 0, 0, 0], [3, 0, 0, 0, 0]]), "entry 1: 0x3 is no kind"),
        (entries(&[[1, 4, 1, 0, 0]]), "a device id and nothing else"),
        (entries(&[[2, 0x1_0000, 0, 0, 0]]), "0x10000 is no PCI id"),
        (entries(&[[2, 1, 2, 0x100_0000, 0]]), "more than 24 bits"),
        (entries(&[[1, 4, 0, 0, 0]; MAX_ENTRIES + 1]), "more than 256 entries"),
    ] {
        let message = garbage(&table);
        assert!(message.contains(SECTION) && message.contains(words), "{message}");
    }
    assert_eq!(device_table(&with_table(&entries(&[[1, 4, 0, 0, 0]; MAX_ENTRIES]))).map(|t| t.len()), Ok(MAX_ENTRIES));
    let many = [with_table(&entries(&[[1, 4, 0, 0, 0]; MAX_ENTRIES])), custom(SECTION, &entries(&[[1, 4, 0, 0, 0]]))];
    assert!(device_table(&many.concat()).is_err(), "the bound is that of all sections together");
}

#[test]
fn an_entry_fits_what_it_names_and_nothing_else() {
    let pci = |vendor, device, class, class_mask| DeviceId::Pci { vendor, device, class, class_mask };
    let nvme = Wanted::Function(NVME);
    for fitting in [
        pci(Some(0x1b36), Some(0x10), 0, 0),
        pci(Some(0x1b36), None, 0, 0),
        pci(None, None, 0x01_0800, 0xff_ff00),
        pci(None, None, 0x01_0802, 0xff_ffff),
        pci(None, None, 0, 0),
    ] {
        assert!(fitting.fits(&nvme), "{fitting}");
    }
    for other in [
        pci(Some(0x1b36), Some(0x11), 0, 0),
        pci(Some(0x1234), Some(0x10), 0, 0),
        pci(Some(0x1b36), Some(0x10), 0x01_0801, 0xff_ffff),
        DeviceId::Virtio(0x10),
    ] {
        assert!(!other.fits(&nvme), "{other}");
    }
    assert!(DeviceId::Virtio(4).fits(&Wanted::Virtio(4)));
    assert!(!DeviceId::Virtio(4).fits(&Wanted::Virtio(2)));
    // A virtio device is the host's to program, whatever its PCI ids.
    assert!(!pci(None, None, 0, 0).fits(&Wanted::Virtio(4)));
}

/// Bytes that look like sections now and then.
fn almost() -> impl Strategy<Value = Vec<u8>> {
    let table = prop::collection::vec(prop_oneof![Just(0_u8), Just(1), Just(2), Just(0xff), any::<u8>()], 0..200);
    let piece = prop_oneof![
        table.clone().prop_map(|table| custom(SECTION, &table)),
        table.clone().prop_map(|table| section(1, &[CORE, &custom(SECTION, &table)].concat())),
        (any::<u8>(), table.clone()).prop_map(|(id, contents)| section(id, &contents)),
        table,
    ];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| [COMPONENT, &pieces.concat()].concat())
}

proptest! {
    #[test]
    fn garbage_never_panics_and_never_gives_more_than_the_bound(bytes in prop_oneof![almost(), prop::collection::vec(any::<u8>(), 0..400)]) {
        if let Ok(table) = device_table(&bytes) {
            prop_assert!(table.len() <= MAX_ENTRIES && table.len() * ENTRY_BYTES <= bytes.len());
        }
    }

    #[test]
    fn what_is_read_is_what_stands_there(words in prop::collection::vec((1_u32..=2, any::<u16>(), any::<u16>()), 1..20)) {
        let words: Vec<[u32; 5]> = words.iter().map(|&(kind, first, second)| {
            [kind, u32::from(first), if kind == 1 { 0 } else { u32::from(second) }, 0, 0]
        }).collect();
        let table = device_table(&with_table(&entries(&words))).unwrap();
        let back: Vec<[u32; 5]> = table.iter().map(|id| match *id {
            DeviceId::Virtio(id) => [1, id, 0, 0, 0],
            DeviceId::Pci { vendor, device, class, class_mask } =>
                [2, vendor.map_or(ANY, u32::from), device.map_or(ANY, u32::from), class, class_mask],
        }).collect();
        prop_assert_eq!(back, words);
    }
}
