//! QEMU's edu device (docs/specs/edu.rst of QEMU) in this process: registers, an interrupt, a DMA engine. Its driver programs it itself.
//!
//! The bus between it and memory is here too: without bus mastering nothing is written; behind an IOMMU only what was mapped is; else [`SimEdu::physical`] stands for all
//! of the machine's memory.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use cofferdam_device::{
    Confinement, DmaRegion, Function, FunctionIds, QueueEvents, QueueSetup, RegisterRegion, Silence, Transport,
    TransportError, Width,
};

const BUFFER: u64 = 0x4_0000;
const BUFFER_BYTES: u64 = 4096;
const START: u64 = 1;
const TO_MEMORY: u64 = 2;
const INTERRUPT: u64 = 4;

#[derive(Default)]
struct State {
    isolated: bool,
    removed: bool,
    bus_master: Option<Confinement>,
    liveness: u32,
    factorial: u32,
    registers: BTreeMap<u64, u64>,
    buffer: Vec<u8>,
    interrupts: u32,
    interrupt_status: u32,
    regions: Vec<Arc<DmaRegion>>,
    /// Physical memory beside the regions, by address of its bytes.
    physical: BTreeMap<u64, u8>,
    faults: Vec<u64>,
    accesses: u64,
}

/// One edu device. Clones are the same device: one is handed to the manager, another stays with the test.
#[derive(Clone)]
pub struct SimEdu(Arc<Mutex<State>>);

impl SimEdu {
    /// Behind an IOMMU, or not.
    #[must_use]
    pub fn new(isolated: bool) -> Self {
        let state = State { isolated, buffer: vec![0x5a; BUFFER_BYTES as usize], ..State::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In what confidence it masters the bus, if it does.
    #[must_use]
    pub fn bus_master(&self) -> Option<Confinement> {
        self.state().bus_master
    }

    /// What was written to physical memory outside of its regions.
    #[must_use]
    pub fn physical(&self) -> BTreeMap<u64, u8> {
        self.state().physical.clone()
    }

    /// Addresses that the IOMMU refused.
    #[must_use]
    pub fn faults(&self) -> Vec<u64> {
        self.state().faults.clone()
    }

    /// Regions that it still has.
    #[must_use]
    pub fn regions(&self) -> usize {
        self.state().regions.len()
    }

    /// Register accesses so far.
    #[must_use]
    pub fn accesses(&self) -> u64 {
        self.state().accesses
    }

    /// Pulls it out: its registers read zero from now on.
    pub fn remove(&self) {
        self.state().removed = true;
    }
}

impl State {
    fn register(&self, offset: u64) -> u64 {
        self.registers.get(&offset).copied().unwrap_or(0)
    }

    fn load(&self, offset: u64) -> u64 {
        match offset {
            0x00 => 0x0100_00ed,
            0x04 => u64::from(!self.liveness),
            0x08 => u64::from(self.factorial),
            0x24 => u64::from(self.interrupt_status),
            _ => self.register(offset),
        }
    }

    fn store(&mut self, offset: u64, value: u64) {
        match offset {
            0x04 => self.liveness = value as u32,
            0x08 => self.factorial = (1..=value as u32).fold(1, u32::wrapping_mul),
            0x64 => self.interrupt_status &= !(value as u32),
            0x98 => self.transfer(value),
            _ => drop(self.registers.insert(offset, value)),
        }
    }

    fn transfer(&mut self, command: u64) {
        if command & START == 0 || self.bus_master.is_none() {
            return;
        }
        let (from, to, count) = (self.register(0x80), self.register(0x88), self.register(0x90));
        let (device, memory) = if command & TO_MEMORY == 0 { (to, from) } else { (from, to) };
        let Some(start) = device.checked_sub(BUFFER).filter(|at| at.saturating_add(count) <= BUFFER_BYTES) else {
            return;
        };
        for number in 0..count {
            let (at, address) = ((start + number) as usize, memory + number);
            let found = self.regions.iter().find_map(|region| Some((region, region.offset_of(address, 1)?)));
            match (found, command & TO_MEMORY != 0) {
                (Some((region, offset)), true) => drop(region.write_at(offset, &self.buffer[at..=at])),
                (Some((region, offset)), false) => drop(region.read_at(offset, &mut self.buffer[at..=at])),
                (None, _) if self.isolated => self.faults.push(address),
                (None, true) => drop(self.physical.insert(address, self.buffer[at])),
                (None, false) => self.buffer[at] = self.physical.get(&address).copied().unwrap_or(0),
            }
        }
        if command & INTERRUPT != 0 {
            self.interrupt_status |= 0x100;
            self.interrupts += 1;
        }
    }
}

fn no_virtio() -> TransportError {
    TransportError::Unsupported("it is no virtio device".to_owned())
}

impl Transport for SimEdu {
    fn address(&self) -> &str {
        "sim:edu"
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
        self.bus_master().unwrap_or(Confinement::Host)
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
        None
    }

    fn is_lost(&mut self) -> bool {
        self.state().removed
    }

    fn quiesce(&mut self, _: usize, _: Instant) -> Silence {
        self.state().bus_master = None;
        Silence::Confirmed
    }

    fn release(&mut self) {
        self.state().regions.clear();
    }
}

impl Function for SimEdu {
    fn ids(&self) -> FunctionIds {
        FunctionIds {
            vendor: 0x1234,
            device: 0x11e8,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x00_ff00,
            revision: 0x10,
        }
    }

    fn regions(&self) -> Vec<RegisterRegion> {
        vec![RegisterRegion { bar: 0, bytes: 1 << 20 }]
    }

    fn read(&mut self, bar: u8, offset: u64, width: Width) -> Result<u64, TransportError> {
        let mut state = self.state();
        state.accesses += 1;
        match state.removed {
            true => Err(TransportError::Lost),
            false if bar != 0 || offset >= 1 << 20 || !offset.is_multiple_of(width.bytes()) => {
                Err(TransportError::Invalid(format!("BAR {bar}, offset {offset:#x}")))
            }
            false => Ok(state.load(offset)),
        }
    }

    fn write(&mut self, bar: u8, offset: u64, width: Width, value: u64) -> Result<(), TransportError> {
        self.read(bar, offset, width)?;
        self.state().store(offset, value);
        Ok(())
    }

    fn is_isolated(&self) -> bool {
        self.state().isolated
    }

    fn allow_dma(&mut self, confidence: Confinement, _: &str) -> Result<(), TransportError> {
        self.state().bus_master = Some(confidence);
        Ok(())
    }

    fn allocate(&mut self, bytes: u64) -> Result<Arc<DmaRegion>, TransportError> {
        let mut state = self.state();
        let iova = 0x100_0000 + ((state.regions.len() as u64) << 21);
        let region = DmaRegion::new("sim-edu", bytes, iova);
        let region = Arc::new(region.map_err(|error| TransportError::Exhausted(error.to_string()))?);
        state.regions.push(Arc::clone(&region));
        Ok(region)
    }

    fn interrupts(&self) -> u16 {
        1
    }

    fn wait_interrupt(&mut self, vector: u16, _: Instant) -> Result<bool, TransportError> {
        if vector != 0 {
            return Err(TransportError::Invalid(format!("interrupt {vector} of 1")));
        }
        Ok(std::mem::take(&mut self.state().interrupts) > 0)
    }
}
