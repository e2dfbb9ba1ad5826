//! What is called in a guest: the exports of its world, found by name and compared by type.

use wasmtime::Store;
use wasmtime::component::InstancePre;

use crate::bindings::block::{BlockService, BlockServicePre};
use crate::bindings::control::{ControlLane, ControlLanePre};
use crate::bindings::entropy::{EntropyService, EntropyServicePre};
use crate::bindings::function::{FunctionDriver, FunctionDriverPre};
use crate::bindings::net::{NetService, NetServicePre};
use crate::bindings::stream::{StreamService, StreamServicePre};
use crate::bindings::{VirtioDriver, VirtioDriverPre};
use crate::lifted::{Window, Words};
use crate::state::LaneState;
use crate::world::Service;

/// Compares the types of what a driver of `service` exports; that the names are there was looked at before.
pub(crate) fn compare(service: Service, pre: &InstancePre<LaneState>) -> wasmtime::Result<()> {
    let pre = || pre.clone();
    if service == Service::Function {
        return FunctionDriverPre::new(pre()).map(drop);
    }
    VirtioDriverPre::new(pre())?;
    match service {
        Service::Block => drop(BlockServicePre::new(pre())?),
        Service::Entropy => drop(EntropyServicePre::new(pre())?),
        Service::Stream => {
            ControlLanePre::new(pre())?;
            StreamServicePre::new(pre())?;
        }
        Service::Net => {
            ControlLanePre::new(pre())?;
            NetServicePre::new(pre())?;
        }
        Service::Function => {}
    }
    Ok(())
}

/// The exports of an instance.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each instance, and the large one is the one on the data path"
)]
pub(crate) enum Guest {
    Virtio(VirtioGuest),
    Function(FunctionDriver),
}

/// Those of a driver of a virtio device.
pub(crate) struct VirtioGuest {
    pub(crate) driver: VirtioDriver,
    pub(crate) service: ServiceExports,
    control: Option<ControlLane>,
    /// The data path, for which the generated functions would allocate.
    pub(crate) submit: Words<u64>,
    pub(crate) complete: Words<u32>,
    received: Option<Words<u32>>,
    window: wasmtime::component::TypedFunc<(), (u32,)>,
    /// Where they find their words; `None` until the guest was asked.
    pub(crate) place: Option<Window>,
}

/// What only one service has.
pub(crate) enum ServiceExports {
    Block(BlockService),
    Entropy(EntropyService),
    Stream(StreamService),
    Net(NetService),
}

impl Guest {
    pub(crate) fn new(
        service: Service,
        store: &mut Store<LaneState>,
        made: &wasmtime::component::Instance,
    ) -> wasmtime::Result<Guest> {
        let exports = match service {
            Service::Function => return Ok(Guest::Function(FunctionDriver::new(store, made)?)),
            Service::Block => ServiceExports::Block(BlockService::new(&mut *store, made)?),
            Service::Entropy => ServiceExports::Entropy(EntropyService::new(&mut *store, made)?),
            Service::Stream => ServiceExports::Stream(StreamService::new(&mut *store, made)?),
            Service::Net => ServiceExports::Net(NetService::new(&mut *store, made)?),
        };
        let has_posted = matches!(service, Service::Stream | Service::Net);
        let control = if has_posted { Some(ControlLane::new(&mut *store, made)?) } else { None };
        let mut find = |name: &str| {
            let interface = format!("cofferdam:driver/{}@0.1.0", service.as_str());
            let (_, found) = made
                .get_export(&mut *store, None, &interface)
                .ok_or_else(|| wasmtime::format_err!("no interface {interface}"))?;
            let (_, func) =
                made.get_export(&mut *store, Some(&found), name).ok_or_else(|| wasmtime::format_err!("no {name}"))?;
            made.get_func(&mut *store, func).ok_or_else(|| wasmtime::format_err!("no function {name}"))
        };
        let (submit, complete, window) = (find("submit")?, find("complete")?, find("window")?);
        let received = if has_posted { Some(find("received")?) } else { None };
        Ok(Guest::Virtio(VirtioGuest {
            driver: VirtioDriver::new(&mut *store, made)?,
            service: exports,
            control,
            submit: Words::new(&*store, submit)?,
            complete: Words::new(&*store, complete)?,
            received: received.map(|received| Words::new(&*store, received)).transpose()?,
            window: window.typed(&*store)?,
            place: None,
        }))
    }

    #[inline]
    pub(crate) fn virtio(&self) -> wasmtime::Result<&VirtioGuest> {
        match self {
            Guest::Virtio(guest) => Ok(guest),
            Guest::Function(_) => Err(wasmtime::Error::msg("this driver drives no virtio device")),
        }
    }

    pub(crate) fn function(&self) -> wasmtime::Result<&FunctionDriver> {
        match self {
            Guest::Function(guest) => Ok(guest),
            Guest::Virtio(_) => Err(wasmtime::Error::msg("this driver programs no function")),
        }
    }
}

impl VirtioGuest {
    pub(crate) fn control(&self) -> wasmtime::Result<&ControlLane> {
        self.control.as_ref().ok_or_else(|| wasmtime::Error::msg("this driver's control lane has no queues"))
    }

    pub(crate) fn received(&self) -> wasmtime::Result<&Words<u32>> {
        self.received.as_ref().ok_or_else(|| wasmtime::Error::msg("this driver has no posted queues"))
    }

    pub(crate) fn stream(&self) -> wasmtime::Result<&StreamService> {
        match &self.service {
            ServiceExports::Stream(stream) => Ok(stream),
            _ => Err(wasmtime::Error::msg("this driver has no streams")),
        }
    }

    pub(crate) fn call_window(&self, store: &mut Store<LaneState>) -> wasmtime::Result<u32> {
        self.window.call(store, ()).map(|(offset,)| offset)
    }
}
