//! `cofferdam:driver/{mmio, dma, interrupt}`: a device that its driver programs itself. Registers and interrupts are in reach during `attach`; memory stays with the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cofferdam_device::{DmaRegion, Function, TransportError, Width};
use wasmtime::component::{HasSelf, Linker, Resource};

use crate::activity::Import;
use crate::bindings::function::cofferdam::driver::{dma, interrupt, mmio};
use crate::state::LaneState;
use crate::text::{MAX_MESSAGE_BYTES, clean};

/// Regions of one binding (`wit/dma.wit`).
const MAX_REGIONS: usize = 64;
/// Bytes of all of them.
const MAX_TOTAL_BYTES: u64 = 64 << 20;
/// Bytes of one: what fits a huge page, so that it is in one run wherever it is.
const MAX_REGION_BYTES: u32 = 2 << 20;
/// Bytes of one copy.
const MAX_COPY_BYTES: usize = 65_536;
/// Longest wait for an interrupt in milliseconds (`wit/interrupt.wit`).
const MAX_WAIT_MS: u32 = 1_000;
/// How often a waiting guest is looked after.
const SLICE: Duration = Duration::from_millis(20);

/// What `resource function` is in the host: a name for the one function in the lane's state.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it inside a private module")]
pub struct FunctionHandle(());

/// What `resource region` is in the host: a number in the lane's state.
#[derive(Debug)]
#[allow(unreachable_pub, reason = "the generated bindings re-export it inside a private module")]
pub struct RegionHandle(());

/// What a guest holds of its function.
#[derive(Default)]
pub(crate) struct FunctionState {
    function: Option<Box<dyn Function>>,
    /// Never shortened: a number stays good, and at most [`MAX_REGIONS`].
    regions: Vec<Arc<DmaRegion>>,
    /// The function is gone; what its registers read since is no data.
    gone: bool,
}

impl FunctionState {
    /// From here on the function is in reach.
    pub(crate) fn open(&mut self, function: Box<dyn Function>) {
        self.function = Some(function);
    }

    /// From here on it is not.
    pub(crate) fn close(&mut self) {
        self.function = None;
    }
}

/// The representation of the one function that a lane can hold.
pub(crate) fn the_function() -> Resource<FunctionHandle> {
    Resource::new_own(0)
}

pub(crate) fn link(linker: &mut Linker<LaneState>) -> wasmtime::Result<()> {
    mmio::add_to_linker::<_, HasSelf<LaneState>>(linker, |state| state)?;
    dma::add_to_linker::<_, HasSelf<LaneState>>(linker, |state| state)?;
    interrupt::add_to_linker::<_, HasSelf<LaneState>>(linker, |state| state)
}

fn text(error: &TransportError) -> String {
    clean(&error.to_string(), MAX_MESSAGE_BYTES)
}

impl LaneState {
    fn with_function<R>(&mut self, import: Import, call: impl FnOnce(&mut dyn Function) -> R) -> wasmtime::Result<R> {
        let Some(function) = self.function.function.as_deref_mut() else {
            return Err(wasmtime::Error::msg("the function is not in reach outside of attach"));
        };
        Ok(self.watch.host_call(import, || call(function))?)
    }

    /// One access. Once the function is gone it stays gone, whatever its registers read.
    fn access<R>(
        &mut self,
        import: Import,
        call: impl FnOnce(&mut dyn Function) -> Result<R, TransportError>,
    ) -> wasmtime::Result<Result<R, mmio::MmioError>> {
        if self.function.gone {
            return Ok(Err(mmio::MmioError::Gone));
        }
        Ok(match self.with_function(import, call)? {
            Ok(value) => Ok(value),
            Err(TransportError::Lost) => {
                self.function.gone = true;
                Err(mmio::MmioError::Gone)
            }
            Err(error @ TransportError::Invalid(_)) => Err(mmio::MmioError::Invalid(text(&error))),
            Err(error) => Err(mmio::MmioError::Failed(text(&error))),
        })
    }

    fn region(&self, handle: &Resource<RegionHandle>) -> wasmtime::Result<&Arc<DmaRegion>> {
        let found = self.function.regions.get(handle.rep() as usize);
        found.ok_or_else(|| wasmtime::Error::msg("a region that there is not"))
    }
}

fn width(width: mmio::Width) -> Width {
    match width {
        mmio::Width::W8 => Width::U8,
        mmio::Width::W16 => Width::U16,
        mmio::Width::W32 => Width::U32,
        mmio::Width::W64 => Width::U64,
    }
}

impl mmio::Host for LaneState {}

impl mmio::HostFunction for LaneState {
    fn ids(&mut self, _: Resource<FunctionHandle>) -> wasmtime::Result<mmio::Ids> {
        let ids = self.with_function(Import::MmioRead, |function| function.ids())?;
        Ok(mmio::Ids {
            vendor: ids.vendor,
            device: ids.device,
            subsystem_vendor: ids.subsystem_vendor,
            subsystem: ids.subsystem,
            class: ids.class,
            revision: ids.revision,
        })
    }

    fn bar_bytes(&mut self, _: Resource<FunctionHandle>, bar: u8) -> wasmtime::Result<u64> {
        let regions = self.with_function(Import::MmioRead, |function| function.regions())?;
        Ok(regions.iter().find(|region| region.bar == bar).map_or(0, |region| region.bytes))
    }

    fn read(
        &mut self,
        _: Resource<FunctionHandle>,
        bar: u8,
        offset: u64,
        of: mmio::Width,
    ) -> wasmtime::Result<Result<u64, mmio::MmioError>> {
        self.access(Import::MmioRead, |function| function.read(bar, offset, width(of)))
    }

    fn write(
        &mut self,
        _: Resource<FunctionHandle>,
        bar: u8,
        offset: u64,
        of: mmio::Width,
        value: u64,
    ) -> wasmtime::Result<Result<(), mmio::MmioError>> {
        self.access(Import::MmioWrite, |function| function.write(bar, offset, width(of), value))
    }

    fn drop(&mut self, _: Resource<FunctionHandle>) -> wasmtime::Result<()> {
        // The guest only ever borrows: what it drops is its name for the function.
        Ok(())
    }
}

impl dma::Host for LaneState {
    fn allocate(&mut self, bytes: u32) -> wasmtime::Result<Result<Resource<RegionHandle>, dma::DmaError>> {
        if bytes == 0 || bytes > MAX_REGION_BYTES {
            let message = format!("{bytes} bytes; 1 to {MAX_REGION_BYTES} can be had at once");
            return Ok(Err(dma::DmaError::Invalid(message)));
        }
        let bytes = u64::from(bytes).next_multiple_of(4096);
        let taken: u64 = self.function.regions.iter().map(|region| region.len()).sum();
        if self.function.regions.len() >= MAX_REGIONS || taken + bytes > MAX_TOTAL_BYTES {
            let message = format!("{MAX_REGIONS} regions and {MAX_TOTAL_BYTES} bytes are the most");
            return Ok(Err(dma::DmaError::Exhausted(message)));
        }
        let made = self.with_function(Import::DmaAllocate, |function| function.allocate(bytes))?;
        Ok(match made {
            Ok(region) => {
                self.function.regions.push(region);
                Ok(Resource::new_own(self.function.regions.len() as u32 - 1))
            }
            Err(error @ TransportError::Exhausted(_)) => Err(dma::DmaError::Exhausted(text(&error))),
            Err(error) => Err(dma::DmaError::Failed(text(&error))),
        })
    }
}

impl dma::HostRegion for LaneState {
    fn bytes(&mut self, region: Resource<RegionHandle>) -> wasmtime::Result<u32> {
        Ok(u32::try_from(self.region(&region)?.len()).unwrap_or(u32::MAX))
    }

    fn address(&mut self, region: Resource<RegionHandle>) -> wasmtime::Result<u64> {
        Ok(self.region(&region)?.iova())
    }

    fn read(
        &mut self,
        region: Resource<RegionHandle>,
        offset: u32,
        length: u32,
    ) -> wasmtime::Result<Result<Vec<u8>, dma::DmaError>> {
        if length == 0 || length as usize > MAX_COPY_BYTES {
            let message = format!("{length} bytes; 1 to {MAX_COPY_BYTES} can be read at once");
            return Ok(Err(dma::DmaError::Invalid(message)));
        }
        let mut bytes = vec![0; length as usize];
        let read = self.region(&region)?.read_at(offset.into(), &mut bytes);
        Ok(read.map(|()| bytes).map_err(|error| dma::DmaError::Invalid(error.to_string())))
    }

    fn write(
        &mut self,
        region: Resource<RegionHandle>,
        offset: u32,
        bytes: Vec<u8>,
    ) -> wasmtime::Result<Result<(), dma::DmaError>> {
        if bytes.len() > MAX_COPY_BYTES {
            let message = format!("{} bytes; {MAX_COPY_BYTES} can be written at once", bytes.len());
            return Ok(Err(dma::DmaError::Invalid(message)));
        }
        let written = self.region(&region)?.write_at(offset.into(), &bytes);
        Ok(written.map_err(|error| dma::DmaError::Invalid(error.to_string())))
    }

    fn drop(&mut self, _: Resource<RegionHandle>) -> wasmtime::Result<()> {
        // The device may be using it: it stays until the binding has left.
        Ok(())
    }
}

impl interrupt::Host for LaneState {
    fn count(&mut self) -> wasmtime::Result<u16> {
        self.with_function(Import::InterruptWait, |function| function.interrupts())
    }

    fn wait(&mut self, vector: u16, timeout_ms: u32) -> wasmtime::Result<Result<bool, interrupt::InterruptError>> {
        if timeout_ms > MAX_WAIT_MS {
            let message = format!("{timeout_ms} ms; {MAX_WAIT_MS} are the most");
            return Ok(Err(interrupt::InterruptError::Invalid(message)));
        }
        let deadline = Instant::now() + Duration::from_millis(timeout_ms.into());
        loop {
            // In slices: between them the kill switch is looked at, and the ladder can have the device.
            let until = deadline.min(Instant::now() + SLICE);
            let came = self.with_function(Import::InterruptWait, |function| function.wait_interrupt(vector, until))?;
            match came {
                Ok(false) if Instant::now() < deadline => {}
                Ok(came) => return Ok(Ok(came)),
                Err(TransportError::Lost) => {
                    self.function.gone = true;
                    return Ok(Err(interrupt::InterruptError::Gone));
                }
                Err(error @ TransportError::Invalid(_)) => {
                    return Ok(Err(interrupt::InterruptError::Invalid(text(&error))));
                }
                Err(error) => return Ok(Err(interrupt::InterruptError::Failed(text(&error)))),
            }
        }
    }
}
