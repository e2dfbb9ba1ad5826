//! Bindings generated from `wit/`. Private: what crosses the border of this crate is in `service`, `capability` and `fault`.
//!
//! A driver's world is put together from smaller ones, and so are these: `driver` is the same for every virtio driver, and each service adds its own.
#![allow(missing_docs, unreachable_pub, rust_2018_idioms)]

wasmtime::component::bindgen!({
    path: "../../wit",
    world: "virtio-driver",
    imports: {
        "cofferdam:driver/virtio": trappable,
    },
    with: {
        "cofferdam:driver/virtio.device": crate::capability::device::DeviceHandle,
        "cofferdam:driver/virtio.live-device": crate::capability::live::LiveHandle,
    },
});

/// The exports of one service, with the types of the world above.
macro_rules! exports {
    ($module:ident, $world:literal) => {
        pub(crate) mod $module {
            wasmtime::component::bindgen!({
                path: "../../wit",
                world: $world,
                with: {
                    "cofferdam:driver/types": crate::bindings::cofferdam::driver::types,
                },
            });
        }
    };
}

/// The same, for what is handed the live device.
macro_rules! live_exports {
    ($module:ident, $world:literal) => {
        pub(crate) mod $module {
            wasmtime::component::bindgen!({
                path: "../../wit",
                world: $world,
                with: {
                    "cofferdam:driver/types": crate::bindings::cofferdam::driver::types,
                    "cofferdam:driver/virtio": crate::bindings::cofferdam::driver::virtio,
                },
            });
        }
    };
}

exports!(block, "block-service");
exports!(entropy, "entropy-service");
exports!(net, "net-service");
live_exports!(control, "control-lane");
live_exports!(stream, "stream-service");

/// The world of a driver that programs its device itself.
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
