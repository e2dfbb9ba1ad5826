//! A device that its driver programs itself: registers, memory of its own, interrupts (`wit/mmio.wit`, `wit/dma.wit`, `wit/interrupt.wit`).
//!
//! A driver asks for as little as it can: one that never calls `dma::Region::allocate` imports no `dma`, and can be loaded without an IOMMU.

use crate::error::DriverError;

/// What a function says that it is (PCI Local Bus 3.0, section 6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ids {
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

/// Why the host refused something, or the function is gone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FunctionError {
    /// An argument is out of its bound.
    #[error("invalid argument: {0}")]
    Invalid(String),
    /// No more memory is to be had.
    #[error("exhausted: {0}")]
    Exhausted(String),
    /// The function is gone; what its registers read would be no data.
    #[error("the function is gone")]
    Gone,
    /// The host could not.
    #[error("{0}")]
    Failed(String),
}

impl From<FunctionError> for DriverError {
    fn from(error: FunctionError) -> Self {
        match error {
            FunctionError::Gone => Self::Device(error.to_string()),
            other => Self::Host(other.to_string()),
        }
    }
}

/// The registers of a function, during `attach`. Offsets are in bytes and multiples of the width; everything is little-endian.
pub trait Registers {
    /// What it is.
    fn ids(&self) -> Ids;

    /// Length in bytes of memory BAR 0 to 5; 0 for one that is not there.
    fn bar_bytes(&self, bar: u8) -> u64;

    /// Reads 32 bits.
    ///
    /// # Errors
    /// [`FunctionError`].
    fn read32(&self, bar: u8, offset: u64) -> Result<u32, FunctionError>;

    /// Writes 32 bits.
    ///
    /// # Errors
    /// [`FunctionError`].
    fn write32(&self, bar: u8, offset: u64, value: u32) -> Result<(), FunctionError>;

    /// Reads 64 bits.
    ///
    /// # Errors
    /// [`FunctionError`].
    fn read64(&self, bar: u8, offset: u64) -> Result<u64, FunctionError>;

    /// Writes 64 bits.
    ///
    /// # Errors
    /// [`FunctionError`].
    fn write64(&self, bar: u8, offset: u64, value: u64) -> Result<(), FunctionError>;
}

/// A driver that programs its device itself. [`export_function_driver!`](crate::export_function_driver) makes the component around it.
pub trait FunctionDriver: Sized + 'static {
    /// Decides whether the function is one of its own, and sets it up.
    ///
    /// # Errors
    /// [`DriverError::NotMine`] for a function of another kind.
    fn attach(function: &dyn Registers) -> Result<Self, DriverError>;
}
