//! A function that its driver programs itself.
//!
//! Bus mastering is off until the host decides otherwise ([`Function::allow_dma`]): a driver that may write registers could program any address (DESIGN section 8, D1).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use cofferdam_device::{
    Confinement, DmaRegion, Function, FunctionIds, QueueEvents, QueueSetup, RegisterRegion, Silence, Transport,
    TransportError, Width,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::claimed::{Claimed, Interrupts, Reach};
use crate::registers::Registers;

/// Regions of one function.
const MAX_REGIONS: usize = 64;
/// Interrupt vectors that are wired.
const MAX_VECTORS: u16 = 8;
/// I/O address of the first region behind an IOMMU, and from one to the next: low, because there are functions that drive 28 address lines only.
const FIRST_IOVA: u64 = 0x100_0000;
const IOVA_STEP: u64 = 0x20_0000;

/// One function without virtio.
pub(crate) struct Raw {
    claimed: Box<dyn Claimed>,
    address: String,
    bars: [Option<Arc<dyn Registers>>; 6],
    /// In what confidence it may write to memory, and how that memory is called.
    dma: Option<(Confinement, String)>,
    regions: usize,
    /// An eventfd for each vector, once they are wired.
    interrupts: Vec<OwnedFd>,
    silent: bool,
}

impl Raw {
    /// `address` is as the operator wrote it.
    ///
    /// # Errors
    /// When bus mastering cannot be switched off.
    pub(crate) fn open(mut claimed: Box<dyn Claimed>, address: String) -> Result<Self, TransportError> {
        claimed.set_bus_master(false)?;
        // It writes nowhere any more, so what a host that was killed had given it is nobody's. What cannot be freed, or looked for, stays where it is.
        if let Err(error) = claimed.take_back() {
            tracing::debug!(address, %error, "nothing of an earlier host freed");
        }
        Ok(Self {
            claimed,
            address,
            bars: Default::default(),
            dma: None,
            regions: 0,
            interrupts: Vec::new(),
            silent: false,
        })
    }

    fn bar(&mut self, bar: u8) -> Result<Arc<dyn Registers>, TransportError> {
        let Some(place) = self.bars.get_mut(usize::from(bar)) else {
            return Err(TransportError::Invalid(format!("BAR {bar}: there are 0 to 5")));
        };
        if let Some(registers) = place {
            return Ok(Arc::clone(registers));
        }
        let registers = self.claimed.bar(bar).map_err(|error| match error {
            TransportError::Refused(why) => TransportError::Invalid(why),
            other => other,
        })?;
        *place = Some(Arc::clone(&registers));
        Ok(registers)
    }

    fn is_gone(&mut self) -> bool {
        self.claimed.is_lost() || self.claimed.is_absent()
    }

    fn wire(&mut self) -> Result<(), TransportError> {
        if !self.interrupts.is_empty() {
            return Ok(());
        }
        let event = || {
            let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
            made.map_err(|errno| TransportError::Io { what: "eventfd".to_owned(), source: errno.into() })
        };
        let count = self.interrupts();
        let events = (0..count).map(|_| event()).collect::<Result<Vec<_>, _>>()?;
        let copy = |fd: &OwnedFd| {
            let copied = rustix::io::fcntl_dupfd_cloexec(fd, 0);
            copied
                .map_err(|errno| TransportError::Io { what: "fcntl(F_DUPFD_CLOEXEC)".to_owned(), source: errno.into() })
        };
        let mut copies = events.iter().map(copy).collect::<Result<Vec<_>, _>>()?;
        let line = if self.claimed.has_line() { copies.pop() } else { None };
        self.claimed.wire(line.map_or(Interrupts::Vectors(copies), |signal| Interrupts::Masked { signal }))?;
        self.interrupts = events;
        Ok(())
    }
}

/// What a virtio driver would ask for.
fn no_virtio() -> TransportError {
    TransportError::Unsupported("it is no virtio device".to_owned())
}

impl Transport for Raw {
    fn address(&self) -> &str {
        &self.address
    }

    fn device_type(&self) -> Option<u32> {
        None
    }

    fn offered_features(&self) -> u64 {
        0
    }

    fn negotiate(&mut self, _: u64) -> Result<(), TransportError> {
        Err(no_virtio())
    }

    fn read_config(&mut self, _: u32, _: &mut [u8]) -> Result<(), TransportError> {
        Err(no_virtio())
    }

    fn max_queues(&self) -> u16 {
        1
    }

    fn max_queue_size(&self, _: u16) -> u16 {
        1
    }

    fn confinement(&self) -> Confinement {
        self.dma.as_ref().map_or(Confinement::Host, |(confidence, _)| *confidence)
    }

    fn function(&mut self) -> Option<&mut dyn Function> {
        Some(self)
    }

    fn map(&mut self, _: Arc<DmaRegion>) -> Result<(), TransportError> {
        Err(no_virtio())
    }

    fn setup_queue_with(&mut self, _: QueueSetup, _: OwnedFd) -> Result<QueueEvents, TransportError> {
        Err(no_virtio())
    }

    fn start(&mut self) -> Result<(), TransportError> {
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.claimed.event_fd()
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.claimed.descriptors()
    }

    fn is_lost(&mut self) -> bool {
        self.claimed.is_lost()
    }

    /// Reset where the function has one, then interrupts and bus mastering off, which is read back. No client's request can be on its way: such a function has none, so memory is all
    /// that there is to be kept.
    fn quiesce(&mut self, _: usize, deadline: Instant) -> Silence {
        if self.silent {
            return Silence::Confirmed;
        }
        if let Err(error) = self.claimed.reset(deadline) {
            tracing::debug!(address = self.address, %error, "not reset");
        }
        let silence = self.claimed.quiet(deadline);
        self.silent = silence == Silence::Confirmed;
        silence
    }

    fn release(&mut self) {
        self.bars = Default::default();
        self.claimed.release();
        self.interrupts.clear();
    }
}

impl Function for Raw {
    fn ids(&self) -> FunctionIds {
        self.claimed.ids()
    }

    fn regions(&self) -> Vec<RegisterRegion> {
        let bars = self.claimed.bar_bytes().into_iter().zip(0..);
        bars.filter(|(bytes, _)| *bytes > 0).map(|(bytes, bar)| RegisterRegion { bar, bytes }).collect()
    }

    fn read(&mut self, bar: u8, offset: u64, width: Width) -> Result<u64, TransportError> {
        let value = self.bar(bar)?.read(offset, width)?;
        let ones = u64::MAX >> (64 - 8 * width.bytes());
        // What a removed function reads (all ones on hardware, zero in QEMU) may also be a register's value: configuration space tells.
        if (value == 0 || value == ones) && self.is_gone() { Err(TransportError::Lost) } else { Ok(value) }
    }

    fn write(&mut self, bar: u8, offset: u64, width: Width, value: u64) -> Result<(), TransportError> {
        if self.claimed.is_lost() {
            return Err(TransportError::Lost);
        }
        self.bar(bar)?.write(offset, width, value)
    }

    fn is_isolated(&self) -> bool {
        self.claimed.is_isolated()
    }

    fn allow_dma(&mut self, confidence: Confinement, memory: &str) -> Result<(), TransportError> {
        self.claimed.set_bus_master(true)?;
        self.dma = Some((confidence, memory.to_owned()));
        Ok(())
    }

    fn allocate(&mut self, bytes: u64) -> Result<Arc<DmaRegion>, TransportError> {
        let Some((_, memory)) = &self.dma else {
            return Err(TransportError::Refused("the function may not write to memory".to_owned()));
        };
        if self.regions >= MAX_REGIONS || bytes > IOVA_STEP {
            return Err(TransportError::Exhausted(format!("{MAX_REGIONS} regions of {IOVA_STEP} bytes")));
        }
        let name = format!("{memory}-function-{}", self.regions);
        let iova = FIRST_IOVA + self.regions as u64 * IOVA_STEP;
        let reach = if self.claimed.is_isolated() { Reach::Iommu } else { Reach::Physical };
        let region = self.claimed.memory(&name, bytes, iova, reach);
        let region = region.map_err(|error| TransportError::Exhausted(error.to_string()))?;
        if region.run_bytes(0) < bytes {
            return Err(TransportError::Exhausted(format!("no {bytes} bytes in one run")));
        }
        self.regions += 1;
        self.claimed.map(Arc::clone(&region))?;
        Ok(region)
    }

    fn interrupts(&self) -> u16 {
        // A message is a write to memory: without bus mastering there are none.
        let vectors = if self.dma.is_some() { self.claimed.msix_vectors().min(MAX_VECTORS) } else { 0 };
        if self.claimed.has_line() { 1 } else { vectors }
    }

    fn wait_interrupt(&mut self, vector: u16, deadline: Instant) -> Result<bool, TransportError> {
        if vector >= self.interrupts() {
            return Err(TransportError::Invalid(format!("interrupt {vector} of {}", self.interrupts())));
        }
        self.wire()?;
        if self.claimed.has_line() {
            self.claimed.unmask()?;
        }
        let Some(event) = self.interrupts.get(usize::from(vector)) else {
            return Err(TransportError::Invalid(format!("interrupt {vector}")));
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let wait = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let _ = poll(&mut [PollFd::new(&event.as_fd(), PollFlags::IN)], Some(&wait));
        let came = rustix::io::read(event, &mut [0; 8]).is_ok();
        if !came && self.claimed.is_lost() { Err(TransportError::Lost) } else { Ok(came) }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.release();
    }
}
