//! Declares `cfg(loom)`, which the model-checked build is compiled with.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(loom)");
}
