//! What a device of byte streams has.

use super::breach;
use crate::bindings::stream::exports::cofferdam::driver::stream as wit;
use crate::fault::GuestFault;
use crate::text::clean;

/// Most ports (`wit/stream.wit`).
const MAX_PORTS: usize = 32;
/// Longest name of a port in bytes.
const MAX_NAME_BYTES: usize = 128;

/// One port as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamPort {
    /// Its number.
    pub index: u32,
    /// The data lane that carries it.
    pub set: u16,
    /// Its name: the device's allegation, fit to be shown.
    pub name: Option<String>,
    /// Whether it is a console, with a size.
    pub console: bool,
    /// Whether the other side has it open.
    pub open: bool,
    /// Columns and rows, where known.
    pub size: Option<(u16, u16)>,
}

/// What a device of streams has now, checked against the bounds in `wit/stream.wit`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamProperties {
    /// At most 32, neither numbers nor sets repeated.
    pub ports: Vec<StreamPort>,
    /// Largest single write in bytes, 1 to 65,536.
    pub max_write_bytes: u32,
}

impl StreamProperties {
    pub(crate) fn check(words: wit::Properties) -> Result<StreamProperties, GuestFault> {
        if !(1..=65_536).contains(&words.max_write_bytes) {
            return breach("max-write-bytes", words.max_write_bytes);
        }
        if words.ports.len() > MAX_PORTS {
            return breach("number of ports", words.ports.len());
        }
        for (position, port) in words.ports.iter().enumerate() {
            if words.ports[..position].iter().any(|other| other.index == port.index || other.set == port.set) {
                return breach("repeated port", port.index);
            }
            if port.name.as_ref().is_some_and(|name| name.len() > MAX_NAME_BYTES) {
                return breach("length of the name of port", port.index);
            }
        }
        let port = |port: wit::Port| StreamPort {
            index: port.index,
            set: port.set,
            name: port.name.map(|name| clean(&name, MAX_NAME_BYTES)),
            console: port.console,
            open: port.open,
            size: port.size,
        };
        let ports = words.ports.into_iter().map(port).collect();
        Ok(StreamProperties { ports, max_write_bytes: words.max_write_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(index: u32, set: u16) -> wit::Port {
        wit::Port { index, set, name: None, console: true, open: false, size: Some((80, 25)) }
    }

    #[test]
    fn ports_are_few_and_told_apart() {
        let check = |ports, max_write_bytes| StreamProperties::check(wit::Properties { ports, max_write_bytes });
        assert_eq!(check(vec![port(0, 0), port(1, 1)], 4096).unwrap().ports.len(), 2);
        assert!(check((0..33).map(|n| port(n, n as u16)).collect(), 4096).is_err());
        assert!(check(vec![port(0, 0), port(0, 1)], 4096).is_err());
        assert!(check(vec![port(0, 0), port(1, 0)], 4096).is_err());
        assert!(check(vec![], 0).is_err() && check(vec![], 65_537).is_err());
        let named = |name: &str| wit::Port { name: Some(name.to_owned()), ..port(0, 0) };
        assert!(check(vec![named(&"x".repeat(129))], 1).is_err());
        let shown = check(vec![named("a\x1b[2Jb")], 1).unwrap().ports.remove(0).name.unwrap();
        assert!(!shown.contains('\x1b'), "{shown:?}");
    }
}
