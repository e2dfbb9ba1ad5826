//! Files that are no drivers for this host: what `load` has to tell apart. Made of WIT text, without a compiler.

use crate::workspace;
use anyhow::Result;
use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
use wit_parser::{ManglingAndAbi, Resolve};

/// A component of a world that has nothing to do with drivers.
const OTHER_WORLD: &str = "package test:other@1.0.0;
world greeter { export greet: func(name: string) -> string; }";

/// A driver of a contract that does not exist yet.
const OTHER_VERSION: &str = "package cofferdam:driver@0.9.0;
interface driver { attach: func(device: u32) -> result<list<u8>, string>; }
interface block { submit: func(requests: u32) -> list<u32>; }
world virtio-block-driver { export driver; export block; }";

/// A driver of the right contract that asks for a clock besides.
const WASI_CLOCKS: &str = "package test:asks@1.0.0;
world asks { include cofferdam:driver/virtio-block-driver@0.1.0; import wasi:clocks/monotonic-clock@0.2.6; }
package wasi:clocks@0.2.6 { interface monotonic-clock { type instant = u64; now: func() -> instant; } }";

/// A driver of the right contract that asks for something that no host has.
const UNKNOWN_IMPORT: &str = "package test:asks@1.0.0;
world asks { include cofferdam:driver/virtio-block-driver@0.1.0; import acme:turbo/boost@2.0.0; }
package acme:turbo@2.0.0 { interface boost { engage: func(); } }";

/// Every misfit by name. `core` is a core module that was not made a component.
pub(super) fn all(core: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut all = vec![
        ("core-module".to_owned(), core.to_vec()),
        ("not-wasm".to_owned(), b"#!/bin/sh\necho this is no driver\n".to_vec()),
        ("empty-file".to_owned(), Vec::new()),
        ("truncated".to_owned(), b"\0asm\x0d\0\x01\0\x01".to_vec()),
    ];
    let worlds = [
        ("other-world", OTHER_WORLD),
        ("other-version", OTHER_VERSION),
        ("wasi-clocks", WASI_CLOCKS),
        ("unknown-import", UNKNOWN_IMPORT),
    ];
    for (name, wit) in worlds {
        all.push((name.to_owned(), component(name, wit)?));
    }
    Ok(all)
}

/// A component of the only world in `wit`, whose exports trap.
fn component(name: &str, wit: &str) -> Result<Vec<u8>> {
    let mut resolve = Resolve::default();
    resolve.push_dir(workspace::root().join("wit"))?;
    let package = resolve.push_str(format!("{name}.wit"), wit)?;
    let world = resolve.select_world(&[package], None)?;
    let mut module = dummy_module(&resolve, world, ManglingAndAbi::Standard32);
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8)?;
    ComponentEncoder::default().validate(true).module(&module)?.encode()
}
