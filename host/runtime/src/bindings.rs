//! Bindings generated from `wit/`. Private: what crosses the border of this crate is in `service`, `capability` and `fault`.
#![allow(missing_docs, unreachable_pub, rust_2018_idioms)]

wasmtime::component::bindgen!({
    path: "../../wit",
    world: "virtio-block-driver",
    imports: {
        "cofferdam:driver/virtio": trappable,
    },
    with: {
        "cofferdam:driver/virtio.device": crate::capability::device::DeviceHandle,
    },
});
