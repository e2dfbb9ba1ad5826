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

/// The world of a driver that programs its device itself; types and log are those of the world above.
pub(crate) mod function {
    wasmtime::component::bindgen!({
        path: "../../wit",
        world: "function-driver",
        imports: {
            "cofferdam:driver/mmio": trappable,
            "cofferdam:driver/dma": trappable,
            "cofferdam:driver/interrupt": trappable,
        },
        with: {
            "cofferdam:driver/log": crate::bindings::cofferdam::driver::log,
            "cofferdam:driver/types": crate::bindings::cofferdam::driver::types,
            "cofferdam:driver/mmio.function": crate::capability::function::FunctionHandle,
            "cofferdam:driver/dma.region": crate::capability::function::RegionHandle,
        },
    });
}
