//! Guest crates to components.
//!
//! A guest is compiled to a core module for `wasm32-unknown-unknown` with the profile `driver`, in a target folder of its own
//! (`target/guests`), because its flags and those of the host would throw each other's builds away. `wit-component` then makes a component
//! of it, in process. What a component imports is checked here: a driver that asks for more than `cofferdam:driver` is not shipped.

pub(crate) mod elsewhere;
mod hostile;
mod misfits;

use crate::toolchain::{self, Toolchain};
use crate::{step, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;
use wit_component::{ComponentEncoder, DecodedWasm};

/// The drivers that are shipped: package, and name of the component.
const DRIVERS: &[(&str, &str)] = &[
    ("cofferdam-virtio-blk", "virtio-blk"),
    ("cofferdam-virtio-console", "virtio-console"),
    ("cofferdam-virtio-net", "virtio-net"),
    ("cofferdam-virtio-rng", "virtio-rng"),
];

/// Drivers of QEMU's edu, for tests alone: name of the component, feature of the crate.
const EDU: &[(&str, Option<&str>)] =
    &[("edu", None), ("edu-dma", Some("dma")), ("edu-stray", Some("stray")), ("edu-guess", Some("guess"))];

/// The package of the contract; a driver imports nothing else.
const CONTRACT: &str = "cofferdam:driver/";

/// The names of the drivers that are shipped.
pub(crate) fn shipped() -> impl Iterator<Item = &'static str> {
    DRIVERS.iter().map(|(_, name)| *name)
}

/// Builds all drivers that are shipped into `target/drivers`.
pub(crate) fn build_all() -> Result<()> {
    let toolchain = &Toolchain::find()?;
    for &(package, name) in DRIVERS {
        let begin = Instant::now();
        let core = core_module(toolchain, package, None)?;
        let component = driver(&core).with_context(|| package.to_owned())?;
        let path = workspace::driver(name);
        write(&path, &component)?;
        step::announce(&format!(
            "{}: {} KiB, {}",
            path.file_name().unwrap_or_default().display(),
            component.len().div_ceil(1024),
            step::seconds(begin.elapsed())
        ));
    }
    Ok(())
}

/// Builds the guests that only tests load into `target/drivers/test`: drivers that misbehave, and files that are no drivers.
pub(crate) fn build_test_guests() -> Result<()> {
    let toolchain = &Toolchain::find()?;
    let begin = Instant::now();
    let core = core_module(toolchain, hostile::PACKAGE, None)?;
    let folder = workspace::target().join("drivers").join("test");
    let mut count = 0;
    for (name, module) in hostile::variants(&core)? {
        let component = component(&module).with_context(|| name.clone())?;
        write(&folder.join(name).with_extension("wasm"), &component)?;
        count += 1;
    }
    for (name, feature) in EDU {
        let core = core_module(toolchain, "guest-edu", *feature)?;
        let component = component(&core).with_context(|| (*name).to_owned())?;
        write(&folder.join(name).with_extension("wasm"), &component)?;
        count += 1;
    }
    let stream = core_module(toolchain, "guest-hostile-stream", None)?;
    write(&folder.join("hostile-stream.wasm"), &component(&stream)?)?;
    count += 1;
    let faulty = core_module(toolchain, "guest-faulty-blk", None)?;
    write(&folder.join("faulty-blk.wasm"), &component(&faulty)?)?;
    count += 1;
    for (name, bytes) in misfits::all(&core)? {
        write(&folder.join(name).with_extension("wasm"), &bytes)?;
        count += 1;
    }
    step::announce(&format!("{count} guests for the tests: {}", step::seconds(begin.elapsed())));
    Ok(())
}

/// Compiles `package`, with one feature more than its default, and gives its core module.
fn core_module(toolchain: &Toolchain, package: &str, feature: Option<&str>) -> Result<Vec<u8>> {
    let folder = workspace::target().join("guests");
    let mut cargo = toolchain.cargo("rustc");
    cargo
        .args(["--profile", "driver", "--lib", "--crate-type", "cdylib", "--package", package, "--target-dir"])
        .arg(&folder);
    cargo.arg("--quiet");
    if let Some(feature) = feature {
        cargo.args(["--features", feature]);
    }
    let status =
        step::with_signs_of_life(&format!("compiling {package}"), || cargo.status()).context("cannot start cargo")?;
    if !status.success() {
        bail!("{package} did not compile for {}", toolchain::TARGET);
    }
    let file = format!("{}.wasm", package.replace('-', "_"));
    let path = folder.join(toolchain::TARGET).join("driver").join(file);
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Makes a component of a core module.
fn component(core: &[u8]) -> Result<Vec<u8>> {
    ComponentEncoder::default().validate(true).module(core)?.encode()
}

/// The same of what has to be a driver that could be shipped.
fn driver(core: &[u8]) -> Result<Vec<u8>> {
    let component = component(core)?;
    check_imports(&component)?;
    check_devices(&component)?;
    Ok(component)
}

/// What a component imports and exports.
fn interfaces(component: &[u8]) -> Result<(Vec<String>, Vec<String>)> {
    let DecodedWasm::Component(resolve, world) = wit_component::decode(component)? else {
        bail!("this is no component");
    };
    let world = &resolve.worlds[world];
    let names = |items: Vec<_>| items.into_iter().map(|key| resolve.name_world_key(key)).collect();
    Ok((names(world.imports.keys().collect()), names(world.exports.keys().collect())))
}

/// A driver's world is the contract and no WASI at all.
fn check_imports(component: &[u8]) -> Result<()> {
    let (imports, exports) = interfaces(component)?;
    if let Some(strange) = imports.iter().find(|import| !import.starts_with(CONTRACT)) {
        bail!("it imports {strange}, and a driver imports {CONTRACT}* alone");
    }
    if !exports.iter().any(|export| export.starts_with("cofferdam:driver/driver@")) {
        bail!("it exports no driver, only {}", exports.join(", "));
    }
    Ok(())
}

/// A driver says which devices it is for, so that a host can find it. What the table holds is the host's to read; here it is missed.
fn check_devices(component: &[u8]) -> Result<()> {
    // The name of the custom section, with its length in front (core specification, section 5.5.3).
    const SECTION: &[u8] = b"\x11cofferdam:devices";
    if !component.windows(SECTION.len()).any(|window| window == SECTION) {
        bail!("it has no device table: it was not made with an export macro of the SDK");
    }
    Ok(())
}

/// Writes whole or not at all, and leaves a file that is the same already as it is.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    let folder: PathBuf = path.parent().context("a path with a folder")?.to_path_buf();
    fs::create_dir_all(&folder)?;
    let mut file = tempfile::NamedTempFile::new_in(&folder)?;
    std::io::Write::write_all(&mut file, bytes)?;
    // Other users of this machine may read it, as they may what cargo builds.
    fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shipped_driver_imports_the_contract_and_no_wasi() {
        for (_, name) in DRIVERS {
            let path = workspace::driver(name);
            let component =
                fs::read(&path).unwrap_or_else(|error| panic!("cargo xtask build makes {}: {error}", path.display()));
            check_imports(&component).unwrap();
            check_devices(&component).unwrap();
        }
    }

    #[test]
    fn a_component_without_a_device_table_is_told_apart() {
        let misfits = misfits::all(&[]).unwrap();
        let component = &misfits.iter().find(|(name, _)| name == "wasi-clocks").unwrap().1;
        assert!(check_devices(component).unwrap_err().to_string().contains("device table"));
    }

    #[test]
    fn a_shipped_driver_names_no_folder_of_the_machine_that_built_it() {
        let home = std::env::home_dir().unwrap();
        for (_, name) in DRIVERS {
            let component = fs::read(workspace::driver(name)).unwrap();
            for folder in [workspace::root(), home.join(".cargo")] {
                let folder = folder.into_os_string().into_encoded_bytes();
                assert!(!component.windows(folder.len()).any(|window| window == folder), "{name}");
            }
        }
    }

    #[test]
    #[ignore = "compiles, for half a minute if no standard library is there for it yet"]
    fn every_guest_builds() {
        build_all().unwrap();
        build_test_guests().unwrap();
    }

    #[test]
    fn a_component_that_imports_wasi_is_told_apart() {
        let misfits = misfits::all(&[]).unwrap();
        let wasi = &misfits.iter().find(|(name, _)| name == "wasi-clocks").unwrap().1;
        let error = check_imports(wasi).unwrap_err().to_string();
        assert!(error.contains("wasi:clocks/monotonic-clock"), "{error}");
    }

    #[test]
    fn every_service_has_a_world() {
        let mut resolve = wit_parser::Resolve::default();
        let (package, _) = resolve.push_dir(workspace::root().join("wit")).unwrap();
        let package = &resolve.packages[package];
        for service in ["block", "entropy", "stream", "net"] {
            assert!(package.interfaces.contains_key(service), "{service}");
            assert!(package.worlds.contains_key(&format!("virtio-{service}-driver")), "{service}");
        }
    }
}
