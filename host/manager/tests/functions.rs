//! Drivers that program their device themselves (QEMU's edu, in process): who may have it write to memory, and on whose word (DESIGN section 8, D1 and D2).

use std::sync::Arc;
use std::time::Duration;

use cofferdam_device::Confinement;
use cofferdam_manager::{
    Binding, Config, EventKind, HandleSpec, LoadError, LoadSpec, Manager, OpenError, UnloadOptions,
};
use cofferdam_sim::{Drive, Options, Sim, SimEdu};

/// Where `edu-guess` has the device write (`tests/guests/edu`).
const GUESSED: u64 = 0x9000;

fn manager() -> Manager {
    let cache = format!("{}/../../target/test-cache", env!("CARGO_MANIFEST_DIR"));
    Manager::new(Config { cache_dir: Some(cache.into()) }).unwrap()
}

fn component(name: &str) -> Vec<u8> {
    let path = format!("{}/../../target/drivers/{name}.wasm", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}; run 'cargo xtask test' first"))
}

fn load(manager: &Manager, driver: &str, edu: &SimEdu, trust: bool) -> Result<Arc<Binding>, LoadError> {
    let mut spec = LoadSpec::new(format!("{driver}.wasm"), component(&format!("test/{driver}")), Box::new(edu.clone()));
    spec.trust_dma = trust;
    manager.load(spec)
}

fn unload(manager: &Manager, binding: &Binding, edu: &SimEdu) {
    let certificate = manager.unload(binding.name(), &UnloadOptions::default()).unwrap();
    assert!(certificate.residual.is_zero(), "{certificate:?}");
    assert_eq!(certificate.leaked.bytes, 0);
    assert_eq!((edu.bus_master(), edu.regions()), (None, 0));
}

fn was_trusted(manager: &Manager) -> bool {
    let mut events = manager.events(None);
    std::iter::from_fn(|| events.next(Duration::ZERO)).any(|record| matches!(record.what, EventKind::Trusted { .. }))
}

#[test]
fn a_driver_of_registers_alone_never_masters_the_bus() {
    let (manager, edu) = (manager(), SimEdu::new(false));
    let binding = load(&manager, "edu", &edu, false).unwrap();
    assert_eq!(edu.bus_master(), None);
    assert_eq!(binding.status().dma, "host");
    assert!(edu.accesses() > 3, "the driver looked at its device");
    let opened = binding.open(HandleSpec::default());
    assert!(matches!(opened, Err(OpenError::NoSuchLane { lanes: 0, .. })), "it gives no service to open");
    assert!(binding.geometry().is_none());
    unload(&manager, &binding, &edu);
    assert!(!was_trusted(&manager));
}

#[test]
fn a_driver_that_hands_out_addresses_is_refused_without_an_iommu() {
    let (manager, edu) = (manager(), SimEdu::new(false));
    let error = load(&manager, "edu-dma", &edu, false).unwrap_err();
    assert!(matches!(error, LoadError::NeedsTrust { .. }), "{error}");
    assert!(error.to_string().contains("--trust-dma"), "{error}");
    assert_eq!((edu.accesses(), edu.bus_master()), (0, None), "nothing of it was run");
}

#[test]
fn trust_is_given_by_the_operator_alone_recorded_and_shown() {
    let (manager, edu) = (manager(), SimEdu::new(false));
    let binding = load(&manager, "edu-dma", &edu, true).unwrap();
    assert_eq!(edu.bus_master(), Some(Confinement::Trusted));
    assert_eq!(binding.status().dma, "trusted");
    assert!(was_trusted(&manager));
    unload(&manager, &binding, &edu);
}

#[test]
fn a_guessed_address_leads_nowhere_unless_the_driver_is_trusted() {
    for trust in [false, true] {
        let (manager, edu) = (manager(), SimEdu::new(false));
        let binding = load(&manager, "edu-guess", &edu, trust).unwrap();
        assert_eq!(edu.physical().contains_key(&GUESSED), trust, "trusted: {trust}");
        unload(&manager, &binding, &edu);
    }
}

#[test]
fn behind_an_iommu_addresses_are_served_and_those_beside_them_fault() {
    for driver in ["edu-dma", "edu-stray", "edu-guess"] {
        let (manager, edu) = (manager(), SimEdu::new(true));
        let binding = load(&manager, driver, &edu, false).unwrap();
        assert_eq!(edu.bus_master(), Some(Confinement::Iommu));
        assert_eq!(binding.status().dma, "iommu");
        assert_eq!(edu.faults().is_empty(), driver == "edu-dma", "{driver}");
        assert!(edu.physical().is_empty(), "{driver}");
        unload(&manager, &binding, &edu);
        assert!(!was_trusted(&manager));
    }
}

#[test]
fn a_function_that_is_gone_is_an_error_of_the_device_and_no_data() {
    let (manager, edu) = (manager(), SimEdu::new(true));
    edu.remove();
    let error = load(&manager, "edu-dma", &edu, false).unwrap_err();
    assert!(error.to_string().contains("the function is gone"), "{error}");
    assert_eq!(edu.bus_master(), None, "the ladder has switched it off");
}

#[test]
fn a_driver_and_a_device_of_different_kinds_are_told_apart() {
    let (manager, edu) = (manager(), SimEdu::new(true));
    let spec = LoadSpec::new("virtio-blk.wasm", component("virtio-blk"), Box::new(edu.clone()));
    let error = manager.load(spec).unwrap_err();
    assert!(matches!(error, LoadError::Kind { needs: "a virtio device", .. }), "{error}");
    let disk = Sim::new(Options::default()).unwrap();
    let spec = LoadSpec::new("edu.wasm", component("test/edu"), Box::new(disk.transport(Drive::Threads).unwrap()));
    let error = manager.load(spec).unwrap_err();
    assert!(matches!(error, LoadError::Kind { driver: "a driver that programs its device itself", .. }), "{error}");
}
