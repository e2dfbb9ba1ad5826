//! Control messages (virtio 1.2, section 5.3.6.2) and what is known of the conversation that they make up.
//!
//! ```text
//! driver                          device
//! DEVICE_READY 1          ──>
//!                         <──     PORT_ADD, for each port
//! PORT_READY 1            ──>
//!                         <──     CONSOLE_PORT and RESIZE (of a console), PORT_NAME (if it has one), PORT_OPEN (if open)
//! PORT_OPEN 0 or 1        ──>     PORT_OPEN 0 or 1, RESIZE, PORT_REMOVE at any time
//! ```

use std::collections::VecDeque;

/// DEVICE_READY, from the driver.
pub const DEVICE_READY: u16 = 0;
/// PORT_ADD, to the driver.
pub const PORT_ADD: u16 = 1;
/// PORT_REMOVE, to the driver.
pub const PORT_REMOVE: u16 = 2;
/// PORT_READY, from the driver.
pub const PORT_READY: u16 = 3;
/// CONSOLE_PORT, to the driver.
pub const CONSOLE_PORT: u16 = 4;
/// RESIZE, to the driver, with columns and rows behind it.
pub const RESIZE: u16 = 5;
/// PORT_OPEN, both ways.
pub const PORT_OPEN: u16 = 6;
/// PORT_NAME, to the driver, with the name behind it.
pub const PORT_NAME: u16 = 7;

/// Bytes of a message without what is behind it.
pub const MESSAGE_BYTES: usize = 8;

/// Most messages that wait for buffers; more are dropped, and counted.
const MAX_WAITING: usize = 4096;
/// Most messages of the driver that are kept; the oldest go.
const MAX_HEARD: usize = 4096;

/// One message (`struct virtio_console_control`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlMessage {
    /// Port.
    pub id: u32,
    /// [`DEVICE_READY`] to [`PORT_NAME`].
    pub event: u16,
    /// What about it.
    pub value: u16,
    /// What is behind it.
    pub rest: Vec<u8>,
}

impl ControlMessage {
    /// As it lies in memory.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend_from_slice(&self.event.to_le_bytes());
        bytes.extend_from_slice(&self.value.to_le_bytes());
        bytes.extend_from_slice(&self.rest);
        bytes
    }

    /// From memory; `None`: too short.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (&[a, b, c, d, e, f, g, h], rest) = bytes.split_first_chunk::<MESSAGE_BYTES>()?;
        Some(Self {
            id: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
            rest: rest.to_vec(),
        })
    }
}

/// The state of the conversation with one driver.
#[derive(Default)]
pub(super) struct Conversation {
    /// The driver has said DEVICE_READY.
    pub(super) ready: bool,
    /// Messages to the driver that wait for buffers.
    waiting: VecDeque<Vec<u8>>,
    /// This message so many times more, once nothing else waits.
    flood: (Vec<u8>, u64),
    pub(super) heard: VecDeque<ControlMessage>,
    pub(super) dropped: u64,
}

impl Conversation {
    pub(super) fn say(&mut self, message: Vec<u8>) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_back(message);
        } else {
            self.dropped += 1;
        }
    }

    pub(super) fn flood(&mut self, message: Vec<u8>, times: u64) {
        self.flood = (message, times);
    }

    pub(super) fn hear(&mut self, message: ControlMessage) {
        if self.heard.len() == MAX_HEARD {
            self.heard.pop_front();
        }
        self.heard.push_back(message);
    }

    pub(super) fn has_next(&self) -> bool {
        !self.waiting.is_empty() || self.flood.1 > 0
    }

    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        self.waiting.pop_front().or_else(|| {
            self.flood.1 = self.flood.1.checked_sub(1)?;
            Some(self.flood.0.clone())
        })
    }

    /// Forgets the driver.
    pub(super) fn end(&mut self) {
        self.ready = false;
        self.waiting.clear();
        self.flood = Default::default();
    }
}
