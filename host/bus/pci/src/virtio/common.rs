//! Common configuration (virtio 1.2, section 4.1.4.3) and the status that says how far the device is (section 2.1).

use std::time::{Duration, Instant};

use cofferdam_device::{QueueAddresses, TransportError, Width};

use super::part::Part;

/// A vector that is none (section 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Bits of `device_status` (section 2.1).
pub(super) mod status {
    pub(in crate::virtio) const ACKNOWLEDGE: u8 = 1;
    pub(in crate::virtio) const DRIVER: u8 = 2;
    pub(in crate::virtio) const DRIVER_OK: u8 = 4;
    pub(in crate::virtio) const FEATURES_OK: u8 = 8;
    pub(in crate::virtio) const NEEDS_RESET: u8 = 64;
    pub(in crate::virtio) const FAILED: u8 = 128;
    /// What a function reads that is not there. Two of its bits are reserved: no device says so.
    pub(in crate::virtio) const NOBODY: u8 = 0xff;
}

/// Offsets of the fields.
pub(super) mod at {
    pub(in crate::virtio) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(in crate::virtio) const DEVICE_FEATURE: u64 = 4;
    pub(in crate::virtio) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(in crate::virtio) const DRIVER_FEATURE: u64 = 12;
    pub(in crate::virtio) const CONFIG_VECTOR: u64 = 16;
    pub(in crate::virtio) const NUM_QUEUES: u64 = 18;
    pub(in crate::virtio) const STATUS: u64 = 20;
    pub(in crate::virtio) const GENERATION: u64 = 21;
    pub(in crate::virtio) const QUEUE_SELECT: u64 = 22;
    pub(in crate::virtio) const QUEUE_SIZE: u64 = 24;
    pub(in crate::virtio) const QUEUE_VECTOR: u64 = 26;
    pub(in crate::virtio) const QUEUE_ENABLE: u64 = 28;
    pub(in crate::virtio) const QUEUE_NOTIFY_OFF: u64 = 30;
    pub(in crate::virtio) const QUEUE_DESC: u64 = 32;
    pub(in crate::virtio) const QUEUE_DRIVER: u64 = 40;
    pub(in crate::virtio) const QUEUE_DEVICE: u64 = 48;
}

/// Longest pause between two looks at the status while a reset is waited for.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// What a device that was asked to reset says when it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reset {
    /// The status reads 0 (section 2.4).
    Done,
    /// All ones: nobody answers.
    Nobody,
    /// The status reads 0 whatever is written to it.
    Deaf,
    /// The status as it still was when time was up.
    Pending(u8),
}

/// The registers, and which status bits were set there.
pub(super) struct Common {
    part: Part,
    set: u8,
}

impl Common {
    pub(super) fn new(part: Part) -> Self {
        Self { part, set: 0 }
    }

    /// Of a device that runs: the status bits that another process has set.
    pub(super) fn found(part: Part, set: u8) -> Self {
        Self { part, set }
    }

    /// The status bits that were set.
    pub(super) fn set(&self) -> u8 {
        self.set
    }

    /// Asks for a reset; `wait_reset` is how it ends.
    pub(super) fn begin_reset(&mut self) {
        self.set = 0;
        // Cannot fail: the place was checked. If it could, the status would not read 0.
        let _ = self.write(at::STATUS, Width::U8, 0);
    }

    /// Waits until `until` for a reset that was begun, and looks at least once.
    pub(super) fn wait_reset(&self, until: Instant) -> Reset {
        let mut pause = Duration::from_micros(100);
        loop {
            let status = self.status();
            match status {
                0 => return Reset::Done,
                status::NOBODY => return Reset::Nobody,
                _ => {}
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Reset::Pending(status);
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// As `wait_reset`, and shows that the 0 is the device's word, and not what a function reads that is gone or whose memory is not decoded: the status keeps a bit, and gives it up
    /// again.
    pub(super) fn confirm_reset(&mut self, until: Instant) -> Reset {
        match self.wait_reset(until) {
            Reset::Done => {}
            other => return other,
        }
        let _ = self.set_status(status::ACKNOWLEDGE);
        let kept = self.status() == status::ACKNOWLEDGE;
        self.begin_reset();
        if kept { self.wait_reset(until) } else { Reset::Deaf }
    }

    /// Sets status bits on top of those that were set.
    pub(super) fn set_status(&mut self, bits: u8) -> Result<(), TransportError> {
        self.set |= bits;
        self.write(at::STATUS, Width::U8, u64::from(self.set))
    }

    /// Forgets a bit that the device did not take, so that its absence is not taken for removal.
    pub(super) fn forget_status(&mut self, bits: u8) {
        self.set &= !bits;
    }

    /// The status; all ones when it cannot be read.
    pub(super) fn status(&self) -> u8 {
        self.read(at::STATUS, Width::U8).map_or(status::NOBODY, |status| status as u8)
    }

    /// Whether the device is there and is what was made of it: what was read before this counts when it is.
    ///
    /// # Errors
    /// `Lost` when nobody answers, or when the status is 0 and bits were set there: removed (QEMU), or reset by itself, which is as bad. `Refused` when it asks for a reset, `Protocol` when
    /// only some of the bits are left.
    pub(super) fn alive(&self) -> Result<(), TransportError> {
        let status = self.status();
        if status == status::NOBODY || (status == 0 && self.set != 0) {
            return Err(TransportError::Lost);
        }
        if status & status::NEEDS_RESET != 0 {
            return Err(TransportError::Refused("it met an error and needs a reset (DEVICE_NEEDS_RESET)".to_owned()));
        }
        if status & self.set != self.set {
            let why = format!("device_status is {status:#x} where {:#x} was set", self.set);
            return Err(TransportError::Protocol(why));
        }
        Ok(())
    }

    /// All 64 feature bits.
    pub(super) fn offered(&self) -> Result<u64, TransportError> {
        let half = |select| {
            self.write(at::DEVICE_FEATURE_SELECT, Width::U32, select)?;
            self.read(at::DEVICE_FEATURE, Width::U32)
        };
        Ok(half(0)? & 0xffff_ffff | half(1)? << 32)
    }

    /// Writes what is accepted.
    pub(super) fn accept(&self, features: u64) -> Result<(), TransportError> {
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(at::DRIVER_FEATURE_SELECT, Width::U32, select)?;
            self.write(at::DRIVER_FEATURE, Width::U32, half)?;
        }
        Ok(())
    }

    pub(super) fn num_queues(&self) -> Result<u16, TransportError> {
        self.read16(at::NUM_QUEUES)
    }

    pub(super) fn generation(&self) -> Result<u8, TransportError> {
        Ok(self.read(at::GENERATION, Width::U8)? as u8)
    }

    /// The queue that the fields below are about.
    pub(super) fn select(&self, queue: u16) -> Result<(), TransportError> {
        self.write(at::QUEUE_SELECT, Width::U16, u64::from(queue))
    }

    /// The size of the selected queue: its largest one after a reset; 0 if there is no such queue.
    pub(super) fn queue_size(&self) -> Result<u16, TransportError> {
        self.read16(at::QUEUE_SIZE)
    }

    /// Sets the size of the selected queue; whether it was taken.
    pub(super) fn set_queue_size(&self, entries: u16) -> Result<bool, TransportError> {
        self.stays(at::QUEUE_SIZE, entries)
    }

    /// Tells the device where the selected queue's ring is. 64-bit fields are written as two of 32 bits (section 4.1.3.1).
    pub(super) fn set_queue_addresses(&self, addresses: QueueAddresses) -> Result<(), TransportError> {
        let QueueAddresses { descriptors, available, used } = addresses;
        for (field, address) in [(at::QUEUE_DESC, descriptors), (at::QUEUE_DRIVER, available), (at::QUEUE_DEVICE, used)]
        {
            self.write(field, Width::U32, address & 0xffff_ffff)?;
            self.write(field + 4, Width::U32, address >> 32)?;
        }
        Ok(())
    }

    /// The selected queue's place among the notification addresses.
    pub(super) fn notify_off(&self) -> Result<u16, TransportError> {
        self.read16(at::QUEUE_NOTIFY_OFF)
    }

    /// Gives the selected queue a vector; whether the device took it: it says `NO_VECTOR` where it has no room (section 4.1.5.1.2).
    pub(super) fn set_queue_vector(&self, vector: u16) -> Result<bool, TransportError> {
        self.stays(at::QUEUE_VECTOR, vector)
    }

    /// As [`Common::set_queue_vector`], for changes of the configuration.
    pub(super) fn set_config_vector(&self, vector: u16) -> Result<bool, TransportError> {
        self.stays(at::CONFIG_VECTOR, vector)
    }

    /// Enables the selected queue; whether it is.
    pub(super) fn enable_queue(&self) -> Result<bool, TransportError> {
        self.stays(at::QUEUE_ENABLE, 1)
    }

    /// Writes and reads back.
    fn stays(&self, field: u64, value: u16) -> Result<bool, TransportError> {
        self.write(field, Width::U16, u64::from(value))?;
        Ok(self.read16(field)? == value)
    }

    fn read16(&self, field: u64) -> Result<u16, TransportError> {
        Ok(self.read(field, Width::U16)? as u16)
    }

    fn read(&self, field: u64, width: Width) -> Result<u64, TransportError> {
        self.part.read(field, width)
    }

    fn write(&self, field: u64, width: Width, value: u64) -> Result<(), TransportError> {
        self.part.write(field, width, value)
    }
}
