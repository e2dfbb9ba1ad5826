//! The registers (virtio 1.2, section 4.1.4.3), as a device would have them that checks how it is spoken to.

use std::sync::Arc;

use cofferdam_device::{TransportError, Width};
use parking::Mutex;

use super::{BAR_BYTES, DEVICE, Did, Gone, ISR, Model, NOTIFY};
use crate::registers::Registers;
use crate::virtio::common::at;
use crate::virtio::fields;

/// `std`'s, for which a panic elsewhere is no news.
pub(super) mod parking {
    pub(crate) struct Mutex<T>(std::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(std::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> std::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}

/// A mapped BAR of the model: the one with the registers, or one that is not part of the transport.
pub(super) struct Bar {
    pub(super) model: Arc<Mutex<Model>>,
    pub(super) bytes: u64,
}

impl Bar {
    fn access(&self, offset: u64, width: Width, value: Option<u64>) -> Result<u64, TransportError> {
        let mut model = self.model.lock();
        let model = &mut *model;
        if offset.checked_add(width.bytes()).is_none_or(|end| end > self.bytes) || !offset.is_multiple_of(width.bytes())
        {
            model.violations.push(format!("{width:?} at {offset:#x} of a BAR of {:#x}", self.bytes));
            return Err(TransportError::Invalid("outside".to_owned()));
        }
        model.accesses += 1;
        match model.gone() {
            Some(Gone::Zero) => return Ok(0),
            Some(Gone::Ones) => return Ok(u64::MAX >> (64 - 8 * width.bytes())),
            None => {}
        }
        // A random layout has the registers anywhere.
        if self.bytes != BAR_BYTES {
            return Ok(0);
        }
        Ok(match (offset, value) {
            (0..0x1000, None) => model.read_common(offset, width),
            (0..0x1000, Some(value)) => {
                model.write_common(offset, width, value);
                0
            }
            (0x1000..0x2000, None) if offset == u64::from(ISR) => u64::from(std::mem::take(&mut model.isr)),
            (0x2000..0x3000, None) => model.read_device(offset - u64::from(DEVICE), width),
            (0x3000.., Some(value)) => {
                model.did.push(Did::Notify(offset - u64::from(NOTIFY), value));
                0
            }
            _ => {
                model.violations.push(format!("{width:?} at {offset:#x}, {value:?} written"));
                0
            }
        })
    }
}

impl Registers for Bar {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&self, offset: u64, width: Width) -> Result<u64, TransportError> {
        self.access(offset, width, None)
    }

    fn write(&self, offset: u64, width: Width, value: u64) -> Result<(), TransportError> {
        self.access(offset, width, Some(value)).map(drop)
    }
}

impl Model {
    fn check_width(&mut self, offset: u64, width: Width) {
        let right = match offset {
            0..16 | 32..56 => Width::U32,
            at::STATUS | at::GENERATION => Width::U8,
            _ => Width::U16,
        };
        if width != right || !offset.is_multiple_of(width.bytes()) || offset >= 56 {
            self.violations.push(format!("{width:?} access to the common configuration at {offset}"));
        }
    }

    fn read_common(&mut self, offset: u64, width: Width) -> u64 {
        self.check_width(offset, width);
        let queue = self.queues.get(usize::from(self.queue)).copied().unwrap_or_default();
        match offset {
            at::DEVICE_FEATURE => match self.selects[0] {
                0 => self.offered & 0xffff_ffff,
                1 => self.offered >> 32,
                _ => 0,
            },
            at::CONFIG_VECTOR => u64::from(self.config_vector),
            at::NUM_QUEUES => u64::from(self.num_queues),
            at::STATUS => {
                if self.looks > 0 {
                    self.looks -= 1;
                    if self.looks == 0 {
                        self.reset();
                    }
                }
                u64::from(self.status)
            }
            at::GENERATION => {
                if self.faults.restless || self.faults.changes > 0 {
                    self.faults.changes = self.faults.changes.saturating_sub(1);
                    self.generation = self.generation.wrapping_add(1);
                }
                u64::from(self.generation)
            }
            at::QUEUE_SIZE => u64::from(queue.size),
            at::QUEUE_VECTOR => u64::from(queue.vector),
            at::QUEUE_ENABLE => u64::from(queue.enabled),
            at::QUEUE_NOTIFY_OFF => u64::from(self.faults.notify_off.unwrap_or(self.queue)),
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, width: Width, value: u64) {
        self.check_width(offset, width);
        let index = self.queue;
        let vectors_end = self.faults.vectors_end.unwrap_or(self.msix);
        let vector = if value < u64::from(vectors_end) { value as u16 } else { 0xffff };
        let faults = &self.faults;
        match offset {
            at::DEVICE_FEATURE_SELECT => self.selects[0] = value as u32,
            at::DRIVER_FEATURE_SELECT => self.selects[1] = value as u32,
            at::DRIVER_FEATURE => match self.selects[1] {
                0 => self.accepted = self.accepted & !0xffff_ffff | value,
                1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
                _ => {}
            },
            at::STATUS => self.write_status(value as u8),
            at::QUEUE_SELECT => self.queue = value as u16,
            at::CONFIG_VECTOR => {
                self.config_vector = vector;
                self.did.push(Did::ConfigVector(value as u16));
            }
            _ => {
                let Some(queue) = self.queues.get_mut(usize::from(index)) else { return };
                match offset {
                    at::QUEUE_SIZE if !faults.refuses_size => queue.size = value as u16,
                    at::QUEUE_VECTOR => {
                        queue.vector = vector;
                        self.did.push(Did::QueueVector(index, value as u16));
                    }
                    at::QUEUE_ENABLE => {
                        queue.enabled = if faults.refuses_enable { 0 } else { value as u16 };
                        self.did.push(Did::Enable(index));
                    }
                    at::QUEUE_DESC.. => queue.words[((offset - at::QUEUE_DESC) / 4) as usize % 6] = value as u32,
                    _ => {}
                }
            }
        }
    }

    fn write_status(&mut self, value: u8) {
        self.did.push(Did::Status(value));
        if value == 0 {
            match (self.faults.never_resets, self.faults.slow_reset) {
                (true, _) => {}
                (false, 0) => self.reset(),
                (false, looks) => self.looks = looks,
            }
            return;
        }
        self.status = value | self.faults.extra_status;
        if self.faults.refuses_features {
            self.status &= !8;
        }
    }

    fn read_device(&mut self, offset: u64, width: Width) -> u64 {
        if width != fields::width_at(2, offset) {
            self.violations.push(format!("{width:?} access to the device configuration at {offset}"));
        }
        let mut value = [0; 8];
        for (byte, at) in value.iter_mut().zip(offset..offset + width.bytes()) {
            *byte = self.device_config.get(at as usize).copied().unwrap_or(0);
        }
        u64::from_le_bytes(value)
    }
}
