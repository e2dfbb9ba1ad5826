//! Which ports there are, as the device tells it in control messages.
//!
//! Everything here is the device's allegation: messages about ports that it did not add, or could not have, change nothing. The table has a place for each port that has queues
//! and never grows.

use cofferdam_sdk::StreamPort;

use crate::message::{Message, event};

/// Longest name that is kept in bytes (`wit/stream.wit`); a longer one is cut.
const MAX_NAME_BYTES: usize = 128;

/// What the device said of a port that it added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) name: Option<String>,
    pub(crate) console: bool,
    pub(crate) open: bool,
    pub(crate) size: Option<(u16, u16)>,
}

/// A message that changed nothing, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ignored(pub(crate) &'static str);

/// The ports of a device, by number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    /// A place for each port that has queues.
    places: Vec<Option<Port>>,
    /// Ports that the device may name (`max_nr_ports`), at least as many.
    declared: u32,
}

impl Ports {
    /// No port yet, of `served` that have queues and `declared` that the device may name.
    pub(crate) fn none(served: u32, declared: u32) -> Self {
        Self { places: vec![None; served as usize], declared: declared.max(served) }
    }

    /// The one port of a device that has no control queues: a console that is always there.
    pub(crate) fn only(size: Option<(u16, u16)>) -> Self {
        Self { places: vec![Some(Port { name: None, console: true, open: true, size })], declared: 1 }
    }

    /// The port of this number, if it is there.
    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut Port> {
        self.places.get_mut(usize::try_from(number).ok()?)?.as_mut()
    }

    /// All that are there, for the host.
    pub(crate) fn all(&self) -> Vec<StreamPort> {
        let there = (0..).zip(&self.places).filter_map(|(number, port)| Some((number, port.as_ref()?)));
        let shown = |(number, port): (u16, &Port)| StreamPort {
            index: u32::from(number),
            set: number,
            name: port.name.clone(),
            console: port.console,
            open: port.open,
            size: port.size.filter(|_| port.console),
        };
        there.map(shown).collect()
    }

    /// Takes one message of the device; gives what is to be sent to it.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> Result<Option<Message>, Ignored> {
        let (message, rest) = Message::decode(bytes).ok_or(Ignored("it ends within its header"))?;
        if message.event == event::DEVICE_ADD {
            return self.add(message.id).map(Some);
        }
        let port = self.get_mut(message.id).ok_or(Ignored("there is no such port"))?;
        match message.event {
            event::DEVICE_REMOVE => self.places[message.id as usize] = None,
            event::CONSOLE_PORT => {
                port.console = true;
                // Section 5.3.6.2.2 asks for exactly this, whether or not somebody has it open here.
                return Ok(Some(Message { id: message.id, event: event::PORT_OPEN, value: 1 }));
            }
            event::RESIZE => {
                let &[a, b, c, d, ..] = rest else { return Err(Ignored("it ends within the size")) };
                // Columns first, as the specification has it. Linux took rows first for years.
                let (cols, rows) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
                port.size = (cols != 0 && rows != 0).then_some((cols, rows));
            }
            event::PORT_OPEN => port.open = message.value != 0,
            event::PORT_NAME => port.name = name(rest),
            _ => return Err(Ignored("it is no event that a device sends")),
        }
        Ok(None)
    }

    /// A port that is there already keeps what was said of it: a device says everything again when another instance of the driver announces itself.
    fn add(&mut self, number: u32) -> Result<Message, Ignored> {
        let ready = |value| Message { id: number, event: event::PORT_READY, value };
        match self.places.get_mut(usize::try_from(number).unwrap_or(usize::MAX)) {
            Some(place) => {
                place.get_or_insert_default();
                Ok(ready(1))
            }
            // It may exist, but has no queues here: the device is told of the failure.
            None if number < self.declared => Ok(ready(0)),
            None => Err(Ignored("the port is not below max_nr_ports")),
        }
    }
}

/// The name in a message, at most [`MAX_NAME_BYTES`]. QEMU ends it with a NUL, which the specification forbids.
fn name(bytes: &[u8]) -> Option<String> {
    let mut name = String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    name.truncate(name.floor_char_boundary(MAX_NAME_BYTES));
    (!name.is_empty()).then_some(name)
}
