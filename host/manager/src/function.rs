//! A driver that programs its device itself: what it is given, and on whose word (DESIGN section 8, D1 and D2).

use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::{Confinement, DmaRegion, Function, FunctionIds, RegisterRegion, TransportError, Width};
use cofferdam_runtime::{Instance, LaneId};

use crate::binding::Binding;
use crate::device::SharedTransport;
use crate::error::LoadError;
use crate::events::EventKind;
use crate::maker::Maker;

/// Lets the driver of `maker` look at the function behind `transport`. The function masters the bus only behind an IOMMU, or when the operator trusts the driver.
pub(crate) fn attach(
    binding: &Binding,
    maker: &Maker,
    transport: &SharedTransport,
    trust: bool,
    memory: &str,
) -> Result<Instance, LoadError> {
    let device = binding.device().to_owned();
    let confidence = {
        let mut transport = transport.lock();
        let Some(function) = transport.function() else {
            let (driver, needs) = ("a driver that programs its device itself", "a PCI function that is not virtio");
            return Err(LoadError::Kind { device, driver, needs });
        };
        let confidence = match (function.is_isolated(), trust) {
            (true, _) => Confinement::Iommu,
            (false, true) => Confinement::Trusted,
            (false, false) if maker.module().wants_dma() => return Err(LoadError::NeedsTrust { device }),
            (false, false) => Confinement::Host,
        };
        if confidence != Confinement::Host {
            let allowed = function.allow_dma(confidence, memory);
            allowed.map_err(|source| LoadError::Device { device: device.clone(), source })?;
        }
        confidence
    };
    let _ = binding.confinement.set(confidence);
    if confidence == Confinement::Trusted {
        tracing::warn!(binding = binding.name(), device, "the driver is trusted with all of this machine's memory");
        binding.record(EventKind::Trusted { driver: binding.driver().to_string(), device: device.clone() });
    }
    let mut control = maker.make(binding, LaneId::Control)?;
    let window = FunctionWindow { transport: Arc::clone(transport) };
    control.attach_function(Box::new(window)).map_err(|source| LoadError::Attach { device, source })?;
    Ok(control)
}

/// The function as a guest's capability: the device is taken for one access at a time, so that the ladder can have it between two.
struct FunctionWindow {
    transport: SharedTransport,
}

impl FunctionWindow {
    fn with<R>(&self, call: impl FnOnce(&mut dyn Function) -> Result<R, TransportError>) -> Result<R, TransportError> {
        self.transport.lock().function().map_or(Err(TransportError::Lost), call)
    }
}

impl Function for FunctionWindow {
    fn ids(&self) -> FunctionIds {
        let none =
            FunctionIds { vendor: 0xffff, device: 0xffff, subsystem_vendor: 0, subsystem: 0, class: 0, revision: 0 };
        self.with(|function| Ok(function.ids())).unwrap_or(none)
    }

    fn regions(&self) -> Vec<RegisterRegion> {
        self.with(|function| Ok(function.regions())).unwrap_or_default()
    }

    fn read(&mut self, bar: u8, offset: u64, width: Width) -> Result<u64, TransportError> {
        self.with(|function| function.read(bar, offset, width))
    }

    fn write(&mut self, bar: u8, offset: u64, width: Width, value: u64) -> Result<(), TransportError> {
        self.with(|function| function.write(bar, offset, width, value))
    }

    fn is_isolated(&self) -> bool {
        self.with(|function| Ok(function.is_isolated())).unwrap_or(false)
    }

    /// The host decides that, and has.
    fn allow_dma(&mut self, _: Confinement, _: &str) -> Result<(), TransportError> {
        Err(TransportError::Invalid("a driver does not decide on its own confinement".to_owned()))
    }

    fn allocate(&mut self, bytes: u64) -> Result<Arc<DmaRegion>, TransportError> {
        self.with(|function| function.allocate(bytes))
    }

    fn interrupts(&self) -> u16 {
        self.with(|function| Ok(function.interrupts())).unwrap_or(0)
    }

    fn wait_interrupt(&mut self, vector: u16, deadline: Instant) -> Result<bool, TransportError> {
        self.with(|function| function.wait_interrupt(vector, deadline))
    }
}
