//! Control messages (section 5.3.6.2): eight bytes, and for some events more behind them.

/// Bytes of `struct virtio_console_control`.
pub(crate) const HEADER_BYTES: usize = 8;

/// Values of `event`.
pub(crate) mod event {
    /// To the device: the driver listens.
    pub(crate) const DEVICE_READY: u16 = 0;
    /// Of the device: there is a port. Also called PORT_ADD.
    pub(crate) const DEVICE_ADD: u16 = 1;
    /// Of the device: a port is gone. Also called PORT_REMOVE.
    pub(crate) const DEVICE_REMOVE: u16 = 2;
    /// To the device, about each port that it added.
    pub(crate) const PORT_READY: u16 = 3;
    /// Of the device: the port is a console.
    pub(crate) const CONSOLE_PORT: u16 = 4;
    /// Of the device: the console's size, `struct virtio_console_resize`, follows.
    pub(crate) const RESIZE: u16 = 5;
    /// Of both: the own side opened or closed the port.
    pub(crate) const PORT_OPEN: u16 = 6;
    /// Of the device: the port's name follows.
    pub(crate) const PORT_NAME: u16 = 7;
}

/// `struct virtio_console_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// The port.
    pub(crate) id: u32,
    /// One of [`event`].
    pub(crate) event: u16,
    /// What the event says of it.
    pub(crate) value: u16,
}

impl Message {
    /// The message at the beginning of `bytes`, and what is behind it. None where they are too few.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let (&[a, b, c, d, e, f, g, h], rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let message = Self {
            id: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        };
        Some((message, rest))
    }

    /// Its bytes.
    pub(crate) fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.id.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.event.to_le_bytes());
        bytes[6..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }
}
