//! A block driver that can fall asleep in a host call, which no driver of this project does: it imports `wasi:clocks`. Written in WebAssembly text.
//!
//! It serves reads, writes and flushes of a disk of 16 MiB over one or two queues, and takes the commands of `tests/guests/hostile` that concern `submit`, and one more.

use std::path::{Path, PathBuf};

use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// The grant that it needs.
pub const GRANT: &str = "wasi:clocks";

/// The command, counted as in `guest_hostile::COMMANDS`, that sends it to sleep for an hour.
pub const SLEEP: u64 = 6;

const WORLD: &str = "package test:sleeper;
package wasi:io@0.2.6 { interface poll { resource pollable { block: func(); } } }
package wasi:clocks@0.2.6 { interface monotonic-clock { use wasi:io/poll@0.2.6.{pollable}; subscribe-duration: func(when: u64) -> pollable; } }
world sleeper { include cofferdam:driver/virtio-block-driver@0.1.0; import wasi:clocks/monotonic-clock@0.2.6; }";

/// Where the results of the exports are: at 256; plans of 32 bytes at 320, the ordinary response (one byte, 0) at 400. The window is the last page.
const CORE: &str = r#"(module $sleeper
  (import "cofferdam:driver/virtio@0.1.0" "[method]device.negotiate" (func $negotiate (param i32 i64 i32)))
  (import "cofferdam:driver/virtio@0.1.0" "[method]device.max-queues" (func $max-queues (param i32) (result i32)))
  (import "cofferdam:driver/virtio@0.1.0" "[method]device.max-lanes" (func $max-lanes (param i32) (result i32)))
  (import "cofferdam:driver/virtio@0.1.0" "[resource-drop]device" (func $drop-device (param i32)))
  (import "wasi:clocks/monotonic-clock@0.2.6" "subscribe-duration" (func $subscribe (param i64) (result i32)))
  (import "wasi:io/poll@0.2.6" "[method]pollable.block" (func $block (param i32)))
  (import "wasi:io/poll@0.2.6" "[resource-drop]pollable" (func $drop-pollable (param i32)))
  (memory (export "memory") 4)
  (global $heap (mut i32) (i32.const 4096))
  (global $queue (mut i32) (i32.const 0))
  (func $alloc (param $size i32) (result i32) (local $at i32)
    (local.set $at (i32.and (i32.add (global.get $heap) (i32.const 15)) (i32.const -16)))
    (global.set $heap (i32.add (local.get $at) (local.get $size)))
    (if (i32.gt_u (global.get $heap) (i32.mul (memory.size) (i32.const 65536))) (then (unreachable)))
    (local.get $at))
  (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (call $alloc (local.get 3)))
  (func $reset (global.set $heap (i32.const 4096)))
  (func $nap (local $p i32)
    (local.set $p (call $subscribe (i64.const 3600000000000)))
    (call $block (local.get $p)) (call $drop-pollable (local.get $p)))

  (func $attach (export "cofferdam:driver/driver@0.1.0#attach") (param $dev i32) (result i32) (local $queues i32)
    ATTACH-FIRST
    (local.set $queues (call $max-queues (local.get $dev)))
    (if (i32.gt_u (local.get $queues) (call $max-lanes (local.get $dev))) (then (local.set $queues (call $max-lanes (local.get $dev)))))
    (if (i32.gt_u (local.get $queues) (i32.const 2)) (then (local.set $queues (i32.const 2))))
    (memory.fill (i32.const 320) (i32.const 0) (i32.const 64))
    ;; VIRTIO_BLK_F_FLUSH
    (call $negotiate (local.get $dev) (i64.const 0x200) (i32.const 512))
    (call $drop-device (local.get $dev))
    (i32.store8 (i32.const 256) (i32.const 0))
    (i64.store (i32.const 264) (i64.const 0x200))
    (i32.store (i32.const 272) (i32.const 320)) (i32.store (i32.const 276) (local.get $queues))
    (i64.store (i32.const 280) (i64.const 0))
    (i32.store16 (i32.const 320) (i32.const 0)) (i32.store16 (i32.const 322) (i32.const 128))
    (i32.store8 (i32.const 324) (i32.const 1)) (i32.store (i32.const 328) (i32.const 400)) (i32.store (i32.const 332) (i32.const 1))
    ;; The second plan: queue 1 of set 1. Neither is posted.
    (i32.store16 (i32.const 352) (i32.const 1)) (i32.store16 (i32.const 354) (i32.const 128))
    (i32.store8 (i32.const 356) (i32.const 1)) (i32.store (i32.const 360) (i32.const 400)) (i32.store (i32.const 364) (i32.const 1))
    (i32.store16 (i32.const 370) (i32.const 1))
    (i32.const 256))
  (func (export "cofferdam:driver/driver@0.1.0#config-changed") (param $dev i32) (result i32)
    (call $drop-device (local.get $dev)) (i32.store8 (i32.const 256) (i32.const 0)) (i32.const 256))
  (func (export "cofferdam:driver/driver@0.1.0#suspend") (result i32)
    (memory.fill (i32.const 256) (i32.const 0) (i32.const 12)) (i32.const 256))
  (func (export "cofferdam:driver/driver@0.1.0#resume") (param i32 i32 i32 i32) (result i32)
    (call $attach (local.get 0)))
  (func (export "cofferdam:driver/driver@0.1.0#start") (param i64 i32 i32 i32 i32) (result i32)
    (global.set $queue (i32.load16_u (local.get 3)))
    (i32.store8 (i32.const 256) (i32.const 0)) (i32.const 256))
  (func (export "cofferdam:driver/block@0.1.0#get-properties") (result i32)
    (memory.fill (i32.const 256) (i32.const 0) (i32.const 64))
    (i64.store (i32.const 264) (i64.const 16777216))
    (i32.store (i32.const 272) (i32.const 512)) (i32.store (i32.const 276) (i32.const 512)) (i32.store (i32.const 280) (i32.const 1048576))
    (i32.store8 (i32.const 285) (i32.const 1))
    (i32.const 256))

  ;; What a command does; 1 if submit is to answer no words.
  (func $obey (param $n i64) (result i32)
    (if (i64.eq (local.get $n) (i64.const 0)) (then (unreachable)))
    (if (i64.eq (local.get $n) (i64.const 1)) (then (loop $forever (br $forever))))
    (if (i64.eq (local.get $n) (i64.const 2)) (then
      (loop $more (br_if $more (i32.ne (memory.grow (i32.const 16)) (i32.const -1)))) (unreachable)))
    (if (i64.eq (local.get $n) (i64.const 3)) (then (return (i32.const 1))))
    (if (i64.eq (local.get $n) (i64.const 6)) (then (call $nap)))
    (i32.const 0))

  (func $word (param $at i32) (param $value i32) (result i32)
    (i32.store (local.get $at) (local.get $value)) (i32.add (local.get $at) (i32.const 4)))

  (func (export "cofferdam:driver/block@0.1.0#window") (result i32) (i32.const 196608))
  (func (export "cofferdam:driver/block@0.1.0#submit") (param $n i32) (result i32)
    (local $ptr i32) (local $end i32) (local $out i32) (local $begin i32) (local $op i32) (local $offset i64) (local $sector i64) (local $mute i32)
    (local.set $ptr (i32.const 196608))
    (local.set $end (i32.add (local.get $ptr) (i32.mul (local.get $n) (i32.const 24))))
    (local.set $begin (call $alloc (i32.mul (local.get $n) (i32.const 48))))
    (local.set $out (local.get $begin))
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $ptr) (local.get $end)))
      (local.set $op (i32.load8_u offset=4 (local.get $ptr)))
      (local.set $offset (i64.load offset=8 (local.get $ptr)))
      (if (i32.and (i32.eq (local.get $op) (i32.const 1)) (i64.ge_u (local.get $offset) (i64.const 15728640)))
        (then (if (call $obey (i64.div_u (i64.sub (local.get $offset) (i64.const 15728640)) (i64.const 4096)))
          (then (local.set $mute (i32.const 1))))))
      (local.set $sector (i64.div_u (local.get $offset) (i64.const 512)))
      (local.set $out (call $word (local.get $out) (i32.load (local.get $ptr))))
      (if (i32.gt_u (local.get $op) (i32.const 2))
        ;; Refused: unsupported.
        (then (local.set $out (call $word (local.get $out) (i32.const 0x0200ffff))))
        (else
          (local.set $out (call $word (local.get $out) (i32.or (global.get $queue)
            (select (i32.const 0x20000) (i32.const 0x30000) (i32.eq (local.get $op) (i32.const 2))))))
          (local.set $out (call $word (local.get $out) (i32.const 0x100)))
          ;; VIRTIO_BLK_T_IN, _OUT, _FLUSH are 0, 1, 4.
          (local.set $out (call $word (local.get $out) (select (i32.const 4) (local.get $op) (i32.eq (local.get $op) (i32.const 2)))))
          (local.set $out (call $word (local.get $out) (i32.const 0)))
          (i64.store align=4 (local.get $out) (local.get $sector))
          (local.set $out (i32.add (local.get $out) (i32.const 8)))
          (if (i32.lt_u (local.get $op) (i32.const 2)) (then
            (local.set $out (call $word (local.get $out) (i32.or
              (i32.shl (i32.load offset=16 (local.get $ptr)) (i32.const 4))
              (select (i32.const 1) (i32.const 2) (local.get $op)))))
            (local.set $out (call $word (local.get $out) (i32.const 0)))))
          (local.set $out (call $word (local.get $out) (i32.const 0x13)))))
      (local.set $ptr (i32.add (local.get $ptr) (i32.const 24)))
      (br $next)))
    (if (local.get $mute) (then (local.set $out (local.get $begin))))
    (i32.store (i32.const 256) (local.get $begin))
    (i32.store (i32.const 260) (i32.shr_u (i32.sub (local.get $out) (local.get $begin)) (i32.const 2)))
    (i32.const 256))
  (func (export "cabi_post_cofferdam:driver/block@0.1.0#submit") (param i32) (call $reset))

  ;; Whatever is out of the ordinary is an error of the device.
  (func (export "cofferdam:driver/block@0.1.0#complete") (param $len i32) (result i32)
    (local $ptr i32) (local $end i32) (local $out i32) (local $begin i32)
    (local.set $ptr (i32.const 196608))
    (local.set $end (i32.add (local.get $ptr) (i32.mul (local.get $len) (i32.const 4))))
    (local.set $begin (call $alloc (i32.mul (local.get $len) (i32.const 8))))
    (local.set $out (local.get $begin))
    (block $done (loop $next
      (br_if $done (i32.ge_u (local.get $ptr) (local.get $end)))
      (local.set $out (call $word (local.get $out) (i32.load (local.get $ptr))))
      (local.set $out (call $word (local.get $out) (i32.const 1)))
      (local.set $ptr (i32.add (local.get $ptr) (i32.add (i32.const 12)
        (i32.and (i32.add (i32.load offset=8 (local.get $ptr)) (i32.const 3)) (i32.const -4)))))
      (br $next)))
    (i32.store (i32.const 256) (local.get $begin))
    (i32.store (i32.const 260) (i32.shr_u (i32.sub (local.get $out) (local.get $begin)) (i32.const 2)))
    (i32.const 256))
  (func (export "cabi_post_cofferdam:driver/block@0.1.0#complete") (param i32) (call $reset)))"#;

/// The component. It sleeps when told to; or, `in_attach`, before it looks at the device.
#[must_use]
pub fn component(in_attach: bool) -> Vec<u8> {
    let mut resolve = Resolve::default();
    resolve.push_dir(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../wit"))).expect("wit/ parses");
    let package = resolve.push_str("sleeper.wit", WORLD).expect("the sleeper's world parses");
    let world = resolve.select_world(&[package], Some("sleeper")).expect("world sleeper");
    let text = CORE.replace("ATTACH-FIRST", if in_attach { "(call $nap)" } else { "" });
    let mut module = wat::parse_str(text).expect("the sleeper's module parses");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("metadata");
    ComponentEncoder::default().module(&module).expect("a module").validate(true).encode().expect("a valid component")
}

/// The component as a file for `load`, in `folder`.
#[must_use]
pub fn file(folder: &Path) -> PathBuf {
    let path = folder.join("sleeper.wasm");
    std::fs::write(&path, component(false)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}
