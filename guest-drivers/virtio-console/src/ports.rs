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

/// What the ports of one instance are told to the next in, which may be another version of the driver: its number.
///
/// ```text
/// port   number u8 | flags u8 (console, open, has a size) | columns u16 | rows u16 | bytes of the name u8 | name, UTF-8
/// ```
pub(crate) const STATE_VERSION: u32 = 1;
/// Most bytes of all of them (`exported-state`).
const MAX_STATE_BYTES: usize = 4096;
const CONSOLE: u8 = 1;
const OPEN: u8 = 2;
const SIZED: u8 = 4;

impl Ports {
    /// For another instance. A name for which there is no room is left out: the device tells it again.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, port) in (0_u8..).zip(&self.places) {
            let Some(port) = port else { continue };
            let flag = |set: bool, flag: u8| if set { flag } else { 0 };
            let flags = flag(port.console, CONSOLE) | flag(port.open, OPEN) | flag(port.size.is_some(), SIZED);
            bytes.extend([number, flags]);
            let (columns, rows) = port.size.unwrap_or_default();
            bytes.extend(columns.to_le_bytes());
            bytes.extend(rows.to_le_bytes());
            // Each port that follows needs its seven bytes.
            let reserved = 7 * self.places.len();
            let name = port.name.as_deref().filter(|name| bytes.len() + reserved + name.len() < MAX_STATE_BYTES);
            let name = name.unwrap_or_default();
            bytes.push(name.len() as u8);
            bytes.extend(name.as_bytes());
        }
        bytes
    }

    /// Takes over what another instance knew. Of what is no such state, or of other ports than there are, nothing is taken.
    pub(crate) fn take_over(&mut self, mut bytes: &[u8]) -> Option<()> {
        let mut places = vec![None; self.places.len()];
        while let Some((&[number, flags, a, b, c, d, length], rest)) = bytes.split_first_chunk() {
            let (name, rest) = rest.split_at_checked(usize::from(length))?;
            let name = std::str::from_utf8(name).ok()?;
            let place = places.get_mut(usize::from(number))?;
            if flags & !(CONSOLE | OPEN | SIZED) != 0 || name.len() > MAX_NAME_BYTES || place.is_some() {
                return None;
            }
            let size = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
            if flags & SIZED == 0 && size != (0, 0) {
                return None;
            }
            *place = Some(Port {
                name: (!name.is_empty()).then(|| name.to_owned()),
                console: flags & CONSOLE != 0,
                open: flags & OPEN != 0,
                size: (flags & SIZED != 0).then_some(size),
            });
            bytes = rest;
        }
        if !bytes.is_empty() {
            return None;
        }
        self.places = places;
        Some(())
    }
}

/// The name in a message, at most [`MAX_NAME_BYTES`]. QEMU ends it with a NUL, which the specification forbids.
fn name(bytes: &[u8]) -> Option<String> {
    let mut name = String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    name.truncate(name.floor_char_boundary(MAX_NAME_BYTES));
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Ports {
        let mut ports = Ports::none(31, 31);
        ports.places[0] = Some(Port { name: None, console: true, open: true, size: Some((80, 25)) });
        ports.places[7] = Some(Port { name: Some("org.example.7".into()), ..Port::default() });
        ports
    }

    #[test]
    fn what_one_instance_leaves_the_next_one_takes_over_or_nothing_of_it() {
        let (before, mut after) = (some(), Ports::none(31, 31));
        assert_eq!(after.take_over(&before.encode()), Some(()));
        assert_eq!(after, before);
        let state = before.encode();
        // Cut anywhere but between two ports, and with any byte changed: it is taken whole or not at all, and what is taken can be told again.
        for cut in (0..state.len()).filter(|cut| ![0, 7].contains(cut)) {
            assert_eq!(Ports::none(31, 31).take_over(&state[..cut]), None, "cut at {cut}");
        }
        for place in 0..state.len() {
            let mut changed = state.clone();
            changed[place] ^= 0xff;
            let mut ports = Ports::none(31, 31);
            match ports.take_over(&changed) {
                Some(()) => assert_eq!(ports.encode(), changed, "byte {place}"),
                None => assert_eq!(ports, Ports::none(31, 31), "byte {place}"),
            }
        }
        // A device that has fewer ports now.
        assert_eq!(Ports::none(7, 7).take_over(&state), None);
        // One port twice.
        assert_eq!(Ports::none(31, 31).take_over(&[&state[..7], &state[..7]].concat()), None);
    }

    #[test]
    fn as_many_ports_and_names_as_there_can_be_fit() {
        let port = Port { name: Some("n".repeat(MAX_NAME_BYTES)), console: true, open: true, size: Some((1, 2)) };
        let ports = Ports { places: vec![Some(port); 31], declared: 31 };
        let state = ports.encode();
        assert!(state.len() <= MAX_STATE_BYTES, "{}", state.len());
        let mut after = Ports::none(31, 31);
        assert_eq!(after.take_over(&state), Some(()));
        assert!(after.places.iter().all(Option::is_some));
        assert!(after.places.iter().flatten().filter(|port| port.name.is_some()).count() >= 28);
    }
}
