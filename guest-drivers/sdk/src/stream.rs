//! The service `stream`: the ports of a console.

use crate::device::LiveDevice;
use crate::driver::VirtioDriver;
use crate::error::DriverError;

/// One port as it is now: `stream.port` of the WIT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamPort {
    /// Its number, as in the words.
    pub index: u32,
    /// The set of queues that carries it.
    pub set: u16,
    /// Its name, at most 128 bytes.
    pub name: Option<String>,
    /// Whether it is a console, with a size.
    pub console: bool,
    /// Whether the other side has it open.
    pub open: bool,
    /// Columns and rows, where known.
    pub size: Option<(u16, u16)>,
}

/// What a device of streams has now: `stream.properties` of the WIT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamProperties {
    /// At most 32 ports, numbers not repeated.
    pub ports: Vec<StreamPort>,
    /// Largest single write in bytes, 1 to 65,536.
    pub max_write_bytes: u32,
}

/// A driver of streams.
pub trait StreamDriver: VirtioDriver<Properties = StreamProperties> {
    /// A port was opened or closed by its user on the host's side.
    ///
    /// # Errors
    /// Is logged by the host, and changes nothing.
    fn set_open(&mut self, device: &mut dyn LiveDevice, port: u32, open: bool) -> Result<(), DriverError>;
}
