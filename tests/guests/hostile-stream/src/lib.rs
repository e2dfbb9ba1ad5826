//! A console driver that misbehaves in `received` and in `config-changed`, around one that does not (`cofferdam-virtio-console`).
//!
//! What it does is told by how many bytes the device put into a buffer, because nothing else of what arrives is shown to a driver of streams: [`COMMANDS`].

use cofferdam_sdk::words::{Arrivals, Received};
use cofferdam_sdk::{
    Answers, Attachment, ChainWriter, ControlBuffers, DriverError, ExportedState, Lane, LaneSetup, LiveDevice, Piece,
    Requests, Responses, StreamDriver, StreamProperties, VirtioDevice, VirtioDriver,
};
use cofferdam_virtio_console::{VirtioConsole, VirtioConsoleLane};

/// The number of bytes that the first command has; each next one has one more.
pub const FIRST_COMMAND_BYTES: u32 = 1001;

/// What it does, in the order of the numbers of bytes.
pub const COMMANDS: [&str; 13] = [
    "trap",
    "loop",
    "eat",
    "truncated-words",
    "huge-list",
    "reserved-bits",
    "no-pieces",
    "unknown-buffer",
    "beyond-written",
    "twice",
    "empty-piece",
    // These two are allowed.
    "nothing-arrived",
    "goes-on",
];

/// The control lane: the well-behaved one, but that it panics whenever it is told of a change.
#[derive(Debug)]
pub struct HostileStream(VirtioConsole);

/// The data lane.
#[derive(Debug)]
pub struct HostileStreamLane(VirtioConsoleLane);

impl VirtioDriver for HostileStream {
    type Lane = HostileStreamLane;
    type Properties = StreamProperties;

    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        let (inner, attachment) = VirtioConsole::attach(device)?;
        Ok((Self(inner), attachment))
    }

    fn properties(&self) -> StreamProperties {
        self.0.properties()
    }

    fn config_changed(&mut self, _: &mut dyn VirtioDevice) -> Result<(), DriverError> {
        panic!("this driver panics in config-changed")
    }

    fn suspend(&self) -> ExportedState {
        self.0.suspend()
    }

    fn resume(device: &mut dyn VirtioDevice, state: &ExportedState) -> Result<(Self, Attachment), DriverError> {
        let (inner, attachment) = VirtioConsole::resume(device, state)?;
        Ok((Self(inner), attachment))
    }

    fn start(setup: &LaneSetup) -> Result<HostileStreamLane, DriverError> {
        VirtioConsole::start(setup).map(HostileStreamLane)
    }

    fn live(&mut self, device: &mut dyn LiveDevice) -> Result<(), DriverError> {
        self.0.live(device)
    }

    fn control_events(&mut self, device: &mut dyn LiveDevice, buffers: ControlBuffers<'_>) -> Result<(), DriverError> {
        self.0.control_events(device, buffers)
    }
}

impl StreamDriver for HostileStream {
    fn set_open(&mut self, device: &mut dyn LiveDevice, port: u32, open: bool) -> Result<(), DriverError> {
        self.0.set_open(device, port, open)
    }
}

/// The command that so many bytes are.
#[must_use]
pub fn command(bytes: u32) -> Option<&'static str> {
    let number = bytes.checked_sub(FIRST_COMMAND_BYTES)?;
    COMMANDS.get(number as usize).copied()
}

impl Lane for HostileStreamLane {
    fn submit(&mut self, requests: Requests<'_>, chains: &mut ChainWriter<'_>) {
        self.0.submit(requests, chains);
    }

    fn complete(&mut self, responses: Responses<'_>, answers: &mut Answers<'_>) {
        self.0.complete(responses, answers);
    }

    fn received(&mut self, buffers: Received<'_>, arrivals: &mut Arrivals<'_>) {
        let told = buffers.clone().find_map(|buffer| Some((command(buffer.written)?, buffer.buffer, buffer.written)));
        let Some((command, buffer, written)) = told else { return self.0.received(buffers, arrivals) };
        let piece = Piece { buffer, offset: 0, length: written };
        match command {
            "trap" => panic!("this driver was told to panic in received"),
            "loop" => loop {
                std::hint::black_box(());
            },
            "eat" => {
                let mut eaten = Vec::new();
                loop {
                    eaten.push(vec![1_u8; 1 << 20]);
                    std::hint::black_box(&eaten);
                }
            }
            "nothing-arrived" => return,
            "goes-on" => {
                arrivals.arrival(0, 0, true, &[piece]);
                return;
            }
            "beyond-written" => {
                arrivals.arrival(0, 0, false, &[Piece { length: written + 1, ..piece }]);
            }
            "unknown-buffer" => {
                arrivals.arrival(0, 0, false, &[Piece { buffer: buffer ^ 0x4000, ..piece }]);
            }
            "twice" => {
                arrivals.arrival(0, 0, false, &[piece, piece]);
            }
            "empty-piece" => {
                arrivals.arrival(0, 0, false, &[Piece { length: 0, ..piece }]);
            }
            _ => {
                arrivals.arrival(0, 0, false, &[piece]);
            }
        }
        let words = arrivals.words_mut();
        match command {
            "truncated-words" => words.truncate(words.len() - 1),
            "huge-list" => words.resize(4 << 20, 0),
            "reserved-bits" => words[0] |= 1 << 17,
            "no-pieces" => words[0] &= !0xffff,
            _ => {}
        }
    }
}

cofferdam_sdk::export_stream_driver!(HostileStream, devices: [cofferdam_sdk::DeviceId::virtio(3)]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_does_something_else() {
        let code = include_str!("lib.rs");
        for name in COMMANDS {
            assert!(code.contains(&format!("{name:?} =>")), "{name} is in no code");
        }
        assert_eq!((command(1000), command(1001), command(1014)), (None, Some("trap"), None));
    }
}
