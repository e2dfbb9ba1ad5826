//! Where the programs and drivers under test are. Nothing is built here: a test that compiled what it tests would hide how long it takes and
//! would compile the sandbox a second time.

use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the workspace is where it was compiled")
}

/// `COFFERDAM_TARGET_DIR` if set (these tests may be compiled elsewhere than what they test), else `target` in the root.
fn target() -> PathBuf {
    std::env::var_os("COFFERDAM_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

fn existing(path: PathBuf, how: &str) -> PathBuf {
    assert!(path.is_file(), "{} is missing: run `{how}` first", path.display());
    path
}

/// The binary under test.
pub fn cofferdam() -> PathBuf {
    existing(target().join("release/cofferdam"), "cargo xtask build")
}

/// The device that can be told to misbehave.
pub fn sim() -> PathBuf {
    let how = "cargo build --release --workspace --bin cofferdam-sim-blk";
    existing(target().join("release/cofferdam-sim-blk"), how)
}

/// The devices of the other classes: net, console, entropy.
pub fn class_sim() -> PathBuf {
    existing(target().join("release/cofferdam-sim"), "cargo build --release --workspace --bin cofferdam-sim")
}

/// The good driver of another class, `net`.
pub fn driver_of(class: &str) -> PathBuf {
    existing(target().join(format!("drivers/virtio-{class}.wasm")), "cargo xtask build")
}

/// The example of a client that shares memory with the device.
pub fn zero_copy() -> PathBuf {
    let how = "cargo build --release --workspace --bin cofferdam-example-zero-copy";
    existing(target().join("release/cofferdam-example-zero-copy"), how)
}

/// The good driver.
pub fn driver() -> PathBuf {
    shipped_driver("virtio-blk")
}

/// A driver that is shipped, by its name without `.wasm`.
pub fn shipped_driver(name: &str) -> PathBuf {
    existing(target().join("drivers").join(name).with_extension("wasm"), "cargo xtask build")
}

/// A driver or a misfit file of the tests, by its name in `tests/guests/hostile/behaviours.txt` or `xtask/src/guests/misfits.rs`.
pub fn test_driver(name: &str) -> PathBuf {
    existing(target().join("drivers/test").join(name).with_extension("wasm"), "cargo xtask test")
}

/// The names of `tests/guests/hostile/behaviours.txt`, in its order.
pub fn behaviours() -> Vec<String> {
    let path = root().join("tests/guests/hostile/behaviours.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let names = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).collect()
}

/// Where the processes under test keep compiled drivers: shared by all tests, so that each driver is compiled once.
pub fn cache() -> PathBuf {
    let path = target().join("tmp/process-tests-cache");
    std::fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}
