//! Registers of a function: a mapped BAR.

use cofferdam_device::{TransportError, Width};

/// A range of registers. Little-endian, every access of its own width, checked.
pub(crate) trait Registers: Send + Sync {
    /// Length in bytes.
    fn bytes(&self) -> u64;

    /// Reads at `offset`, a multiple of `width`.
    ///
    /// # Errors
    /// `Invalid` when it is outside or misaligned.
    fn read(&self, offset: u64, width: Width) -> Result<u64, TransportError>;

    /// Writes at `offset`, a multiple of `width`.
    ///
    /// # Errors
    /// As `read`.
    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), TransportError>;
}
