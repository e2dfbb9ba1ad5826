//! Small guests, written as core modules in WebAssembly text and made components of this project's world the way the SDK's drivers are.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::path::Path;

use cofferdam_gate::Gate;
use cofferdam_runtime::{
    CallView, DeviceCapability, DeviceError, Grants, GuestLimits, Instance, InstanceSpec, KillSwitch, LaneId,
    LaneSetup, Module, Runtime, RuntimeConfig,
};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// Bodies of a guest's exports, as WebAssembly text. [`Guest::default`] answers everything in the plainest way that is right.
///
/// Helpers in the module: `$alloc (param size align) (result pointer)`, which grows the memory when it must, `$log (level pointer length)`, and the device's imports
/// `$negotiate (device features result)`, `$read-config (device offset length result)`, `$drop-device (device)`.
pub struct Guest {
    /// `(param $dev i32) (result i32)`; the result points to result<attachment, driver-error>.
    pub attach: String,
    /// `(result i32)`; points to (version, pointer, length) of an exported-state.
    pub suspend: String,
    /// `(result i32)`; the offset of the window.
    pub window: String,
    /// `(param $n i32) (result i32)`, with the words at [`WINDOW`]; the result points to (pointer, length) of a list<u32>.
    pub submit: String,
    /// As `submit`.
    pub complete: String,
    /// `(result i32)`; points to result<properties, driver-error>.
    pub properties: String,
    /// The start function's body.
    pub start_function: String,
    /// Declarations more, such as imports of a world that is wider.
    pub imports: String,
    /// Functions, globals and data more.
    pub more: String,
    /// Pages of memory at the start.
    pub pages: u32,
    /// Imports to add to the world, as WIT.
    pub world: String,
}

/// One queue of 128 entries, no state, features 0x20 negotiated.
const ATTACH: &str = "
    (call $negotiate (local.get $dev) (i64.const 0x20) (i32.const 512))
    (call $drop-device (local.get $dev))
    (i32.store8 (i32.const 256) (i32.const 0))
    (i64.store (i32.const 264) (i64.const 0x20))
    (i32.store (i32.const 272) (i32.const 320)) (i32.store (i32.const 276) (i32.const 1))
    (i32.store (i32.const 280) (i32.const 0)) (i32.store (i32.const 284) (i32.const 0))
    (i32.store16 (i32.const 320) (i32.const 0)) (i32.store16 (i32.const 322) (i32.const 128))
    (i32.store8 (i32.const 324) (i32.const 0))
    (i32.const 256)";

/// Where the words are that the host writes.
pub const WINDOW: usize = 65536;

/// For each request one chain: its token, queue 0, one status byte.
const SUBMIT: &str = "
    (local $i i32) (local $out i32)
    (local.set $out (call $alloc (i32.mul (local.get $n) (i32.const 12)) (i32.const 4)))
    (i32.store (i32.const 256) (local.get $out))
    (i32.store (i32.const 260) (i32.mul (local.get $n) (i32.const 3)))
    (block $done (loop $next
        (br_if $done (i32.ge_u (local.get $i) (local.get $n)))
        (i32.store (local.get $out) (i32.load offset=65536 (i32.mul (local.get $i) (i32.const 24))))
        (i32.store offset=4 (local.get $out) (i32.const 0x10000))
        (i32.store offset=8 (local.get $out) (i32.const 0x13))
        (local.set $out (i32.add (local.get $out) (i32.const 12)))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br $next)))
    (i32.const 256)";

/// No answers.
const COMPLETE: &str = "(i64.store (i32.const 256) (i64.const 0)) (i32.const 256)";

/// A writable device of 1 MiB with blocks of 512 bytes.
const PROPERTIES: &str = "
    (memory.fill (i32.const 256) (i32.const 0) (i32.const 64))
    (i64.store (i32.const 264) (i64.const 1048576))
    (i32.store (i32.const 272) (i32.const 512)) (i32.store (i32.const 276) (i32.const 512)) (i32.store (i32.const 280) (i32.const 65536))
    (i32.const 256)";

/// The body of a `suspend` that exports so many bytes.
pub fn exported(version: u32, bytes: u32) -> String {
    format!(
        "(i32.store (i32.const 256) (i32.const {version})) (i32.store (i32.const 260) (i32.const 0))
         (i32.store (i32.const 264) (i32.const {bytes})) (i32.const 256)"
    )
}

impl Default for Guest {
    fn default() -> Guest {
        Guest {
            attach: ATTACH.into(),
            suspend: exported(7, 0),
            window: format!("(i32.const {WINDOW})"),
            submit: SUBMIT.into(),
            complete: COMPLETE.into(),
            properties: PROPERTIES.into(),
            start_function: String::new(),
            imports: String::new(),
            more: String::new(),
            pages: 2,
            world: String::new(),
        }
    }
}

impl Guest {
    /// A guest whose `submit` has this body.
    pub fn submit(body: &str) -> Guest {
        Guest { submit: body.into(), ..Guest::default() }
    }

    /// The component.
    pub fn component(&self) -> Vec<u8> {
        let mut resolve = Resolve::default();
        let (package, _) =
            resolve.push_dir(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../wit"))).expect("wit/ parses");
        encode(resolve, package, &self.world, &self.core())
    }

    /// The core module as text.
    pub fn core(&self) -> String {
        let Guest {
            attach, suspend, window, submit, complete, properties, start_function, imports, more, pages, ..
        } = self;
        format!(
            r#"(module $guest
            (import "cofferdam:driver/log@0.1.0" "write" (func $log (param i32 i32 i32)))
            (import "cofferdam:driver/virtio@0.1.0" "[method]device.negotiate" (func $negotiate (param i32 i64 i32)))
            (import "cofferdam:driver/virtio@0.1.0" "[method]device.read-config" (func $read-config (param i32 i32 i32 i32)))
            (import "cofferdam:driver/virtio@0.1.0" "[resource-drop]device" (func $drop-device (param i32)))
            {imports}
            (memory (export "memory") {pages})
            (global $heap (mut i32) (i32.const 4096))
            (func $alloc (param $size i32) (param $align i32) (result i32) (local $at i32)
                (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 15)) (i32.const -16)))
                (global.set $heap (i32.add (local.get $at) (local.get $size)))
                (block $fits (loop $grow
                    (br_if $fits (i32.le_u (global.get $heap) (i32.mul (memory.size) (i32.const 65536))))
                    (br_if $grow (i32.ne (memory.grow (i32.const 1)) (i32.const -1)))
                    (unreachable)))
                (local.get $at))
            (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (call $alloc (local.get 3) (local.get 2)))
            ;; A call's memory is its own: the next one begins anew. What was answered is spoilt, as by an allocator that gets it back: nobody may read it after post-return.
            (func $reset
                (if (i32.load (i32.const 260)) (then (i32.store (i32.load (i32.const 256)) (i32.const -1))))
                (global.set $heap (i32.const 4096)))
            (func $attach (export "cofferdam:driver/driver@0.1.0#attach") (param $dev i32) (result i32) {attach})
            (func (export "cofferdam:driver/driver@0.1.0#config-changed") (param $dev i32) (result i32)
                (call $drop-device (local.get $dev)) (i32.store8 (i32.const 256) (i32.const 0)) (i32.const 256))
            (func (export "cofferdam:driver/driver@0.1.0#suspend") (result i32) {suspend})
            (func (export "cofferdam:driver/driver@0.1.0#resume") (param i32 i32 i32 i32) (result i32)
                (call $attach (local.get 0)))
            (func (export "cofferdam:driver/driver@0.1.0#start") (param i64 i32 i32 i32 i32) (result i32)
                (i32.store8 (i32.const 256) (i32.const 0)) (i32.const 256))
            (func (export "cofferdam:driver/block@0.1.0#get-properties") (result i32) {properties})
            (func (export "cofferdam:driver/block@0.1.0#window") (result i32) {window})
            (func $submit (export "cofferdam:driver/block@0.1.0#submit") (param $n i32) (result i32) {submit})
            (func (export "cabi_post_cofferdam:driver/block@0.1.0#submit") (param i32) (call $reset))
            (func (export "cofferdam:driver/block@0.1.0#complete") (param $n i32) (result i32) {complete})
            (func (export "cabi_post_cofferdam:driver/block@0.1.0#complete") (param i32) (call $reset))
            (func $initialize {start_function})
            (start $initialize)
            {more})"#
        )
    }
}

/// A component of any world: `wit` holds the packages it needs with `world other`, `core` its core module.
pub fn component_of(wit: &str, core: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let package = resolve.push_str("other.wit", wit).expect("the world parses");
    let world = resolve.select_world(&[package], Some("other")).expect("world other");
    embed(&resolve, world, core)
}

fn encode(mut resolve: Resolve, package: wit_parser::PackageId, extra: &str, core: &str) -> Vec<u8> {
    if extra.is_empty() {
        let world = resolve.select_world(&[package], Some("virtio-block-driver")).expect("the world is there");
        return embed(&resolve, world, core);
    }
    let wide = format!(
        "package test:wide; {}",
        extra.replace("THE-DRIVER", "include cofferdam:driver/virtio-block-driver@0.1.0;")
    );
    let package = resolve.push_str("wide.wit", &wide).expect("the wider world parses");
    let world = resolve.select_world(&[package], Some("wide")).expect("world wide");
    embed(&resolve, world, core)
}

fn embed(resolve: &Resolve, world: wit_parser::WorldId, core: &str) -> Vec<u8> {
    let mut module = wat::parse_str(core).expect("the core module parses");
    embed_component_metadata(&mut module, resolve, world, StringEncoding::UTF8).expect("metadata");
    ComponentEncoder::default().module(&module).expect("module").validate(true).encode().expect("a valid component")
}

/// A device that grants everything.
pub struct FakeDevice;

impl DeviceCapability for FakeDevice {
    fn device_type(&mut self) -> Option<u32> {
        Some(2)
    }
    fn offered_features(&mut self) -> u64 {
        0x20
    }
    fn negotiate(&mut self, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn read_config(&mut self, _: u32, length: u32) -> Result<Vec<u8>, DeviceError> {
        Ok(vec![0; length as usize])
    }
    fn max_lanes(&mut self) -> u16 {
        64
    }

    fn max_queues(&mut self) -> u16 {
        1
    }
    fn max_queue_size(&mut self, _: u16) -> u16 {
        128
    }
}

/// A runtime without a cache.
pub fn runtime() -> Runtime {
    Runtime::new(RuntimeConfig::default()).expect("a runtime")
}

/// What [`instantiate`] makes instances for.
pub fn spec() -> InstanceSpec {
    InstanceSpec {
        binding: "disk0".into(),
        driver: "guest".into(),
        device: "fake:0".into(),
        generation: 1,
        lane: LaneId::Data(0),
        gate: Gate::new(),
        grants: Grants::default(),
        limits: GuestLimits::default(),
        kill: KillSwitch::new(),
        view: CallView::new(),
    }
}

/// An instance of `guest` with ordinary limits.
pub fn instance(runtime: &Runtime, guest: &Guest) -> Instance {
    module(runtime, guest).instantiate(spec()).expect("an instance")
}

/// A module of `guest`.
pub fn module(runtime: &Runtime, guest: &Guest) -> Module {
    runtime.load(&guest.component()).expect("a driver")
}

/// What a data lane of the fake device is started with.
pub fn setup() -> LaneSetup {
    LaneSetup { features: 0x20, state: Vec::new(), queues: vec![0] }
}

/// `count` reads of one block each, tokens from 7 on.
pub fn requests(count: u64) -> Vec<u64> {
    (0..count).flat_map(|i| [7 + i, 512 * i, 512]).collect()
}
