//! A device whose driver programs it itself: registers, memory of its own, interrupts. DESIGN section 8 says what each of them is worth without an IOMMU.

use std::sync::Arc;
use std::time::Instant;

use crate::dma::DmaRegion;
use crate::error::TransportError;

/// How a device is kept to the memory that it was given (DESIGN section 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confinement {
    /// D1: only the host gives the device addresses.
    Host,
    /// D2: an IOMMU domain holds this binding's memory and nothing else.
    Iommu,
    /// Neither: the operator trusts the driver (`--trust-dma`).
    Trusted,
}

impl Confinement {
    /// The word that `ls` shows: `host`, `iommu`, `trusted`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Confinement::Host => "host",
            Confinement::Iommu => "iommu",
            Confinement::Trusted => "trusted",
        }
    }
}

/// What a function says that it is (PCI Local Bus 3.0, section 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionIds {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Base class, subclass, programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// One range of registers: a memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterRegion {
    /// BAR number, 0 to 5.
    pub bar: u8,
    /// Length in bytes.
    pub bytes: u64,
}

/// Width of one register access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    U8,
    /// 16 bits.
    U16,
    /// 32 bits.
    U32,
    /// 64 bits.
    U64,
}

impl Width {
    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Width::U8 => 1,
            Width::U16 => 2,
            Width::U32 => 4,
            Width::U64 => 8,
        }
    }
}

/// What a driver that programs a device itself can do with it. Whoever implements it checks every offset and length; nothing blocks without a bound.
pub trait Function: Send {
    /// What it is.
    fn ids(&self) -> FunctionIds;

    /// The registers that there are; I/O ports are not among them.
    fn regions(&self) -> Vec<RegisterRegion>;

    /// Reads one register: little-endian, `offset` a multiple of `width`.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] when there is no such place, [`TransportError::Lost`] when the function is gone: what a removed function's registers read is no data.
    fn read(&mut self, bar: u8, offset: u64, width: Width) -> Result<u64, TransportError>;

    /// Writes one register; what `value` has over `width` is cut off.
    ///
    /// # Errors
    /// As [`Function::read`].
    fn write(&mut self, bar: u8, offset: u64, width: Width, value: u64) -> Result<(), TransportError>;

    /// Whether an IOMMU keeps the function to what [`Function::allocate`] gave it.
    fn is_isolated(&self) -> bool;

    /// Lets the function write to memory at all (bus mastering, PCI 3.0 section 6.2.2), and says in what confidence. Off until this is called. What
    /// [`Function::allocate`] makes has a name in `/proc/PID/maps` that begins with `memory` and `-`.
    ///
    /// # Errors
    /// [`TransportError`].
    fn allow_dma(&mut self, confidence: Confinement, memory: &str) -> Result<(), TransportError>;

    /// Memory of `bytes` bytes (a multiple of 4,096, in one run), mapped for the function for as long as the binding has it.
    ///
    /// # Errors
    /// [`TransportError::Exhausted`] past the bound of a binding, [`TransportError::Refused`] before [`Function::allow_dma`].
    fn allocate(&mut self, bytes: u64) -> Result<Arc<DmaRegion>, TransportError>;

    /// How many interrupts it can raise; vectors are numbered from 0.
    fn interrupts(&self) -> u16;

    /// Waits until `deadline` for interrupt `vector`; whether it came, however often, since it was last waited for.
    ///
    /// # Errors
    /// [`TransportError::Invalid`] for a vector that there is not, [`TransportError::Lost`].
    fn wait_interrupt(&mut self, vector: u16, deadline: Instant) -> Result<bool, TransportError>;
}
