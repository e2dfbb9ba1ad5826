//! The dependency arrows.
//!
//! ```text
//! cli -> {port, bus, manager}    port -> manager    manager -> {runtime, lifecycle, gate, device}    runtime -> {device, gate}    bus -> device
//! port/data -> client: the wire of the data socket is written once, with the clients' crate
//! ```
//!
//! Nothing under `host/` or `guest-drivers/` may need what is under `tests/` to be built; tests and examples may use what they like.

use crate::metadata::{Metadata, Package};
use std::collections::BTreeSet;

/// For each crate under `host/` and `guest-drivers/` the crates of this workspace that it may depend on.
const ARROWS: &[(&str, &[&str])] = &[
    ("cofferdam-gate", &[]),
    ("cofferdam-device", &[]),
    ("cofferdam-bus-vhost-user", &["cofferdam-device"]),
    ("cofferdam-bus-pci", &["cofferdam-device"]),
    ("cofferdam-runtime", &["cofferdam-device", "cofferdam-gate"]),
    ("cofferdam-lifecycle", &[]),
    ("cofferdam-manager", &["cofferdam-runtime", "cofferdam-lifecycle", "cofferdam-gate", "cofferdam-device"]),
    ("cofferdam-client", &[]),
    ("cofferdam-port-nbd", &["cofferdam-manager"]),
    ("cofferdam-port-character", &["cofferdam-manager"]),
    ("cofferdam-port-data", &["cofferdam-manager", "cofferdam-client"]),
    ("cofferdam-port-tap", &["cofferdam-manager"]),
    (
        "cofferdam",
        &[
            "cofferdam-port-nbd",
            "cofferdam-port-data",
            "cofferdam-port-tap",
            "cofferdam-port-character",
            "cofferdam-bus-vhost-user",
            "cofferdam-bus-pci",
            "cofferdam-manager",
        ],
    ),
    ("cofferdam-sdk", &[]),
    ("cofferdam-virtio-blk", &["cofferdam-sdk"]),
    ("cofferdam-virtio-console", &["cofferdam-sdk"]),
    ("cofferdam-virtio-rng", &["cofferdam-sdk"]),
    ("cofferdam-virtio-net", &["cofferdam-sdk"]),
    // Outside both, but it has to build before them and while they do not.
    ("xtask", &[]),
];

/// The sandbox and what belongs to it.
const ONLY_IN_RUNTIME: &[&str] = &["wasmtime", "wasmtime-wasi", "wiggle"];

fn is_free(package: &Package) -> bool {
    !ARROWS.iter().any(|(name, _)| *name == package.name)
}

fn metadata() -> Metadata {
    Metadata::read(&[]).expect("cargo metadata")
}

#[test]
fn crates_depend_only_along_the_arrows() {
    let metadata = metadata();
    let mut breaches = Vec::new();
    for (name, allowed) in ARROWS {
        let package = metadata.packages.iter().find(|package| package.name == *name);
        let package = package.unwrap_or_else(|| panic!("{name} is in the table of arrows and not in the workspace"));
        for dependency in &package.dependencies {
            // A test may look at a crate from wherever it likes.
            if dependency.path.is_some()
                && dependency.kind.as_deref() != Some("dev")
                && !allowed.contains(&&*dependency.name)
            {
                breaches.push(format!("{name} -> {}", dependency.name));
            }
        }
    }
    assert!(breaches.is_empty(), "arrows that DESIGN does not have: {breaches:#?}");
}

#[test]
fn every_crate_of_the_host_is_in_the_table() {
    let metadata = metadata();
    let root = crate::workspace::root();
    let strays: Vec<_> = metadata
        .packages
        .iter()
        .filter(|package| metadata.is_member(package) && is_free(package))
        .filter(|package| {
            let id = &package.id;
            ["host", "guest-drivers"].iter().any(|folder| id.contains(&format!("{}/{folder}/", root.display())))
        })
        .map(|package| package.name.clone())
        .collect();
    assert!(strays.is_empty(), "say in ARROWS what these may depend on: {strays:?}");
}

#[test]
fn only_the_runtime_imports_wasmtime() {
    let metadata = metadata();
    let mut importers = BTreeSet::new();
    for package in metadata.packages.iter().filter(|package| metadata.is_member(package)) {
        for dependency in &package.dependencies {
            if ONLY_IN_RUNTIME.contains(&&*dependency.name) {
                importers.insert(package.name.as_str());
            }
        }
    }
    assert_eq!(importers.into_iter().collect::<Vec<_>>(), ["cofferdam-runtime"]);
}
