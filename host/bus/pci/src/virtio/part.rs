//! A part of a BAR.

use std::sync::Arc;

use cofferdam_device::{TransportError, Width};

use super::layout::Place;
use crate::registers::Registers;

/// Registers from `first` on, `bytes` of them: nothing outside can be reached, whatever the rest of the BAR is.
#[derive(Clone)]
pub(super) struct Part {
    registers: Arc<dyn Registers>,
    first: u64,
    bytes: u64,
}

impl Part {
    /// # Errors
    /// `Invalid` when what was mapped is shorter than the BAR was said to be.
    pub(super) fn new(registers: Arc<dyn Registers>, place: Place) -> Result<Self, TransportError> {
        let bytes = registers.bytes();
        if place.first.checked_add(place.bytes).is_none_or(|end| end > bytes) {
            let Place { bar, first, bytes: wanted } = place;
            let why = format!("{wanted} bytes at {first:#x} of BAR {bar}, of which {bytes} bytes are mapped");
            return Err(TransportError::Invalid(why));
        }
        Ok(Self { registers, first: place.first, bytes: place.bytes })
    }

    /// Length in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// `at` counts from the start of the part.
    pub(super) fn read(&self, at: u64, width: Width) -> Result<u64, TransportError> {
        self.registers.read(self.place(at, width)?, width)
    }

    /// As `read`.
    pub(super) fn write(&self, at: u64, width: Width, value: u64) -> Result<(), TransportError> {
        self.registers.write(self.place(at, width)?, width, value)
    }

    fn place(&self, at: u64, width: Width) -> Result<u64, TransportError> {
        match at.checked_add(width.bytes()) {
            Some(end) if end <= self.bytes => Ok(self.first + at),
            _ => Err(TransportError::Invalid(format!("{} bytes at {at} of {}", width.bytes(), self.bytes))),
        }
    }
}
