//! A virtio-console device (virtio 1.2, section 5.3) and what is on the other side of its ports.
//!
//! A port that is echoed or not read holds its driver back: bytes are left on the ring, none is lost.

mod control;
mod model;

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use control::{
    CONSOLE_PORT, ControlMessage, DEVICE_READY, MESSAGE_BYTES, PORT_ADD, PORT_NAME, PORT_OPEN, PORT_READY, PORT_REMOVE,
    RESIZE,
};
use model::{CONTROL_BIT, Console, MAX_FED_BYTES, bits, lock};

use crate::device::{Behaviour, SimDevice, SimError};
use crate::model::Rings;

/// VIRTIO_CONSOLE_F_SIZE.
pub(crate) const F_SIZE: u32 = 0;
/// VIRTIO_CONSOLE_F_MULTIPORT.
pub(crate) const F_MULTIPORT: u32 = 1;

/// One port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortProfile {
    /// PORT_NAME.
    pub name: Option<String>,
    /// CONSOLE_PORT: it is for a terminal.
    pub console: bool,
}

/// What a console offers. The default is a multiport device with one console of 80 by 25.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleProfile {
    /// VIRTIO_CONSOLE_F_SIZE with these columns and rows.
    pub size: Option<(u16, u16)>,
    /// VIRTIO_CONSOLE_F_MULTIPORT. Without it there is port 0 alone.
    pub multiport: bool,
    /// `max_nr_ports`, 1 to 31.
    pub max_ports: u16,
    /// The ports that there are from the start, by number.
    pub ports: Vec<PortProfile>,
    /// Its rings.
    pub rings: Rings,
}

impl Default for ConsoleProfile {
    fn default() -> Self {
        Self {
            size: Some((80, 25)),
            multiport: true,
            max_ports: 4,
            ports: vec![PortProfile { name: None, console: true }],
            rings: Rings { size: 64, ..Rings::default() },
        }
    }
}

impl ConsoleProfile {
    fn features(&self) -> u64 {
        self.rings.features() | u64::from(self.size.is_some()) << F_SIZE | u64::from(self.multiport) << F_MULTIPORT
    }
}

/// A console and the other side of its ports. Clones are handles of the same one. Levers about a port that cannot be do
/// nothing.
#[derive(Clone)]
pub struct SimConsole {
    device: SimDevice,
    model: Arc<Console>,
}

impl Deref for SimConsole {
    type Target = SimDevice;
    fn deref(&self) -> &SimDevice {
        &self.device
    }
}

impl SimConsole {
    /// A device with no driver yet, every port open on this side.
    pub fn new(profile: ConsoleProfile, behaviour: Behaviour) -> Result<Self, SimError> {
        if profile.max_ports == 0 || profile.max_ports > 31 || profile.ports.len() > usize::from(profile.max_ports) {
            return Err(SimError::Profile("1 to 31 ports"));
        }
        let model = Arc::new(Console::new(profile));
        Ok(Self { device: SimDevice::new(Arc::clone(&model) as _, &behaviour)?, model })
    }

    /// Sends bytes to the driver; they wait until it has opened the port and posted buffers. Returns how many were taken: no
    /// more than 16 MiB wait.
    pub fn feed(&self, port: u16, bytes: &[u8]) -> usize {
        let Some(mut state) = self.model.port(port) else { return 0 };
        let taken = bytes.len().min(MAX_FED_BYTES.saturating_sub(state.fed.len()));
        state.fed.extend(&bytes[..taken]);
        drop(state);
        self.device.machine().wake_queues(bits(port));
        taken
    }

    /// Bytes that were fed or echoed and that the driver has not been given yet.
    pub fn waiting(&self, port: u16) -> usize {
        self.model.port(port).map_or(0, |port| port.fed.len())
    }

    /// What the driver has written to the port since this was last asked. When 16 MiB wait to be asked for, the driver is held
    /// back.
    pub fn written(&self, port: u16) -> Vec<u8> {
        let bytes = self.model.port(port).map(|mut port| std::mem::take(&mut port.written).into());
        self.device.machine().wake_queues(bits(port));
        bytes.unwrap_or_default()
    }

    /// The same, once there are `bytes` bytes; `None` when `limit` is over before (what there is stays).
    pub fn wait_written(&self, port: u16, bytes: usize, limit: Duration) -> Option<Vec<u8>> {
        let enough = || self.model.port(port).is_some_and(|port| port.written.len() >= bytes);
        self.device.machine().wait_for(Instant::now() + limit, enough).then(|| self.written(port))
    }

    /// Whether what the driver writes to the port comes back on it.
    pub fn set_echo(&self, port: u16, echo: bool) {
        if let Some(mut port) = self.model.port(port) {
            port.echo = echo;
        }
        self.device.machine().wake_queues(bits(port));
    }

    /// Whether the port sends bytes without end, as fast as buffers are posted: byte `n` is [`SimConsole::flood_byte`]`(n)`.
    pub fn set_flood(&self, port: u16, flood: bool) {
        if let Some(mut port) = self.model.port(port) {
            port.flood = flood.then_some(0);
        }
        self.device.machine().wake_queues(bits(port));
    }

    /// Byte `at` of a flood.
    pub fn flood_byte(at: u64) -> u8 {
        model::flood_byte(at)
    }

    /// Opens or closes this side of the port (PORT_OPEN).
    pub fn set_open(&self, port: u16, open: bool) {
        let told = self.model.port(port).is_some_and(|mut port| {
            port.host_open = open;
            port.ready
        });
        if told {
            self.send_control(&Console::message(port, PORT_OPEN, u16::from(open), &[]));
        }
    }

    /// Changes the size: in configuration space, of which the driver in process is told, and by RESIZE for each console port
    /// that the driver has ready.
    pub fn resize(&self, columns: u16, rows: u16) {
        *lock(&self.model.size) = (columns, rows);
        let is_console = |port: &model::Port| port.ready && port.profile.as_ref().is_some_and(|port| port.console);
        for (port, _) in (0..).zip(&self.model.ports).filter(|(_, port)| is_console(&lock(port))) {
            self.send_control(&self.model.resize_message(port));
        }
        self.device.machine().config_changed();
    }

    /// Plugs a port in, open on this side (PORT_ADD).
    pub fn add_port(&self, port: u16, profile: PortProfile) {
        self.change_port(port, Some(profile), PORT_ADD);
    }

    /// Pulls a port out (PORT_REMOVE). Bytes that wait there are lost.
    pub fn remove_port(&self, port: u16) {
        self.change_port(port, None, PORT_REMOVE);
    }

    fn change_port(&self, port: u16, profile: Option<PortProfile>, event: u16) {
        let mut conversation = lock(&self.model.conversation);
        let Some(mut state) = self.model.port(port) else { return };
        *state = model::Port { host_open: profile.is_some(), profile, ..Default::default() };
        drop(state);
        // A driver that is not ready hears of all ports when it is.
        if conversation.ready {
            conversation.say(Console::message(port, event, 1, &[]));
        }
        drop(conversation);
        self.device.machine().wake_queues(CONTROL_BIT);
    }

    /// Sends any bytes as a control message. Beyond 4,096 that wait, they are dropped.
    pub fn send_control(&self, message: &[u8]) {
        lock(&self.model.conversation).say(message.to_vec());
        self.device.machine().wake_queues(CONTROL_BIT);
    }

    /// Sends the same control message `times` times, as fast as buffers are posted and nothing else waits.
    pub fn flood_control(&self, message: &[u8], times: u64) {
        lock(&self.model.conversation).flood(message.to_vec(), times);
        self.device.machine().wake_queues(CONTROL_BIT);
    }

    /// Control messages of drivers so far, the last 4,096.
    pub fn control(&self) -> Vec<ControlMessage> {
        lock(&self.model.conversation).heard.iter().cloned().collect()
    }

    /// Whether the driver has the port open.
    pub fn is_open(&self, port: u16) -> bool {
        self.model.port(port).is_some_and(|port| port.guest_open)
    }

    /// Waits until the driver has the port open, or closed, for `limit` at most.
    pub fn wait_open(&self, port: u16, open: bool, limit: Duration) -> bool {
        self.device.machine().wait_for(Instant::now() + limit, || self.is_open(port) == open)
    }
}
