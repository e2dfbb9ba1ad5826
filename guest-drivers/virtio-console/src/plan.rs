//! The control lane: whose device it is, what is negotiated, which queues are set up, and what is said between device and host about ports.

use cofferdam_sdk::{
    Attachment, ControlBuffers, DriverError, ExportedState, LaneSetup, LiveDevice, Posting, QueueOwner, QueuePlan,
    StreamDriver, StreamProperties, VirtioDevice, VirtioDriver, log,
};

use crate::config::Config;
use crate::lane::VirtioConsoleLane;
use crate::message::{Message, event};
use crate::ports::{Ignored, Ports, STATE_VERSION};
use crate::{DEVICE_TYPE, MAX_PORTS, MAX_WRITE_BYTES, RECEIVE_BUFFER_BYTES, feature};

/// The control queues (section 5.3.2).
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;
/// Queues of a device with control queues and one port.
const MULTIPORT_QUEUES: u16 = 4;

/// Most entries of a port's queue. What is written goes out one by one, and 64 KiB of posted buffers are more than a terminal shows.
const PORT_QUEUE_SIZE: u16 = 16;
/// Most entries of a control queue, all of them posted: QEMU drops a message for which there is no buffer, and announces all its ports at once.
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Bytes of each posted buffer of the control queue: a message and a name (section 5.3.6.2), which is cut to 128 bytes anyway.
const CONTROL_BUFFER_BYTES: u32 = 256;
/// Lines that one instance logs about messages that it ignored.
const MAX_LINES_ABOUT_IGNORED: u32 = 8;

/// The control lane of the driver.
#[derive(Debug)]
pub struct VirtioConsole {
    features: u64,
    ports: Ports,
    /// Lines that may still be logged about messages that are ignored.
    lines_left: u32,
}

impl VirtioDriver for VirtioConsole {
    type Lane = VirtioConsoleLane;
    type Properties = StreamProperties;

    fn attach(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        match device.device_type() {
            Some(DEVICE_TYPE) => Self::claim(device),
            Some(other) => Err(DriverError::NotMine(format!("device id {other}; virtio-console is {DEVICE_TYPE}"))),
            None => {
                // The transport cannot tell, so whatever does not fit means that the device is of another kind.
                let strange = device.offered_features() & !feature::OF_A_CONSOLE;
                if strange != 0 {
                    return Err(not_mine(&format!("it offers features {strange:#x}")));
                }
                Self::claim(device).map_err(|error| match error {
                    DriverError::Device(text) => not_mine(&text),
                    other => other,
                })
            }
        }
    }

    fn properties(&self) -> StreamProperties {
        StreamProperties { ports: self.ports.all(), max_write_bytes: MAX_WRITE_BYTES }
    }

    /// With MULTIPORT sizes come in messages, and the number of ports does not change.
    fn config_changed(&mut self, device: &mut dyn VirtioDevice) -> Result<(), DriverError> {
        if self.features & feature::MULTIPORT == 0
            && let Some(port) = self.ports.get_mut(0)
        {
            port.size = Config::read(device, self.features)?.size;
        }
        Ok(())
    }

    /// The ports, which the device would have to be asked for.
    fn suspend(&self) -> ExportedState {
        ExportedState { version: STATE_VERSION, bytes: self.ports.encode() }
    }

    /// The ports stay where the other instance knew them; the device tells everything again nevertheless. Without control queues the configuration says more than the hint.
    fn resume(device: &mut dyn VirtioDevice, state: &ExportedState) -> Result<(Self, Attachment), DriverError> {
        let (mut driver, attachment) = Self::attach(device)?;
        if state.version == STATE_VERSION && driver.features & feature::MULTIPORT != 0 {
            // A hint that makes no sense is none.
            let _ = driver.ports.take_over(&state.bytes);
        }
        Ok((driver, attachment))
    }

    fn start(setup: &LaneSetup) -> Result<VirtioConsoleLane, DriverError> {
        VirtioConsoleLane::new(setup)
    }

    /// The device then tells everything about its ports, also to an instance that came after a crash.
    fn live(&mut self, device: &mut dyn LiveDevice) -> Result<(), DriverError> {
        if self.features & feature::MULTIPORT != 0 {
            send(device, Message { id: 0, event: event::DEVICE_READY, value: 1 })?;
        }
        Ok(())
    }

    fn control_events(&mut self, device: &mut dyn LiveDevice, buffers: ControlBuffers<'_>) -> Result<(), DriverError> {
        for bytes in buffers {
            match self.ports.take(&bytes) {
                Ok(Some(answer)) => send(device, answer)?,
                Ok(None) => {}
                Err(Ignored(why)) => {
                    if let Some(line) = self.about_ignored(&bytes, why) {
                        log::warn(&line);
                    }
                }
            }
        }
        Ok(())
    }
}

impl StreamDriver for VirtioConsole {
    fn set_open(&mut self, device: &mut dyn LiveDevice, port: u32, open: bool) -> Result<(), DriverError> {
        if self.ports.get_mut(port).is_none() {
            return Err(DriverError::Host(format!("there is no port {port} to open or close")));
        }
        // Without MULTIPORT the device has nobody to tell.
        if self.features & feature::MULTIPORT != 0 {
            send(device, Message { id: port, event: event::PORT_OPEN, value: u16::from(open) })?;
        }
        Ok(())
    }
}

impl VirtioConsole {
    fn claim(device: &mut dyn VirtioDevice) -> Result<(Self, Attachment), DriverError> {
        let features = choose_features(device);
        device.negotiate(features)?;
        let config = Config::read(device, features)?;
        let mut queues = port_plans(device, config.max_ports)?;
        // One set of two queues for each port.
        let served = (queues.len() / 2) as u32;
        let ports = if features & feature::MULTIPORT == 0 {
            Ports::only(config.size)
        } else {
            queues.extend(control_plans(device)?);
            if served < config.max_ports {
                log::info(&format!("ports 0 to {} of {} have queues and are served", served - 1, config.max_ports));
            }
            Ports::none(served, config.max_ports)
        };
        let attachment = Attachment { features, queues, state: Vec::new() };
        Ok((Self { features, ports, lines_left: MAX_LINES_ABOUT_IGNORED }, attachment))
    }

    /// The line about a message that is ignored, for the first few: the device can send such messages without end.
    #[cold]
    fn about_ignored(&mut self, bytes: &[u8], why: &str) -> Option<String> {
        self.lines_left = self.lines_left.checked_sub(1)?;
        let head = Message::decode(bytes).map(|(message, _)| message);
        let last = if self.lines_left == 0 { "; further ones are not told" } else { "" };
        Some(format!("a control message is ignored, {why}: {} bytes, {head:?} (5.3.6.2){last}", bytes.len()))
    }
}

/// What to accept of what is on offer. Without room for the control queues a device is used as one that has none: port 0 does not need them.
fn choose_features(device: &dyn VirtioDevice) -> u64 {
    let features = device.offered_features() & feature::WANTED;
    if device.max_queues() < MULTIPORT_QUEUES { features & !feature::MULTIPORT } else { features }
}

/// Receive and transmit queue of a port (section 5.3.2); none for a port whose queues have no index.
pub(crate) fn port_queues(port: u32) -> Option<(u16, u16)> {
    let receive = match port {
        0 => 0,
        other => u16::try_from(other.checked_mul(2)?.checked_add(2)?).ok()?,
    };
    Some((receive, receive.checked_add(1)?))
}

/// The queues of as many ports as device and operator allow, two each: port n is set n.
fn port_plans(device: &dyn VirtioDevice, of_the_device: u32) -> Result<Vec<QueuePlan>, DriverError> {
    let mut plans = Vec::new();
    for port in 0..of_the_device.min(MAX_PORTS).min(device.max_lanes().into()) {
        let sizes = port_queues(port).and_then(|(receive, transmit)| {
            let size = |queue: u16| queue_size(device, queue, PORT_QUEUE_SIZE).map(|size| (queue, size));
            size(receive).zip(size(transmit))
        });
        let Some(((receive, receive_size), (transmit, transmit_size))) = sizes else {
            break;
        };
        let set = port as u16;
        let posting = Posting { buffer_bytes: RECEIVE_BUFFER_BYTES, buffers: receive_size, head_bytes: 0 };
        plans.push(QueuePlan::posted(receive, receive_size, QueueOwner::Set(set), posting));
        // The device writes nothing, so a buffer that it used is a success that needs no look.
        plans.push(QueuePlan::requests(transmit, transmit_size, Some(Vec::new()), set));
    }
    if plans.is_empty() {
        return Err(DriverError::Device("port 0 has no receiveq and transmitq (section 5.3.2)".into()));
    }
    Ok(plans)
}

/// The queues of the control lane.
fn control_plans(device: &dyn VirtioDevice) -> Result<[QueuePlan; 2], DriverError> {
    let size = |queue: u16| {
        let missing = || DriverError::Device(format!("MULTIPORT, and no control queue {queue} (section 5.3.2)"));
        queue_size(device, queue, CONTROL_QUEUE_SIZE).ok_or_else(missing)
    };
    let (receive, transmit) = (size(CONTROL_RECEIVE)?, size(CONTROL_TRANSMIT)?);
    let posting = Posting { buffer_bytes: CONTROL_BUFFER_BYTES, buffers: receive, head_bytes: 0 };
    let commands = QueuePlan {
        index: CONTROL_TRANSMIT,
        size: transmit,
        ordinary_response: None,
        owner: QueueOwner::Control,
        posting: None,
    };
    Ok([QueuePlan::posted(CONTROL_RECEIVE, receive, QueueOwner::Control, posting), commands])
}

/// The largest power of two that the device and `most` allow; none for a queue that does not exist.
fn queue_size(device: &dyn VirtioDevice, queue: u16, most: u16) -> Option<u16> {
    if queue >= device.max_queues() {
        return None;
    }
    Some(1 << device.max_queue_size(queue).min(most).checked_ilog2()?)
}

/// Sends one message. The device writes nothing back: its messages come on a queue of their own.
fn send(device: &mut dyn LiveDevice, message: Message) -> Result<(), DriverError> {
    device.command(&message.encode(), 0)?;
    Ok(())
}

fn not_mine(why: &str) -> DriverError {
    DriverError::NotMine(format!("this does not look like virtio-console: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_nonsense_is_told_in_a_few_short_lines() {
        let mut driver = VirtioConsole { features: 0, ports: Ports::none(1, 1), lines_left: MAX_LINES_ABOUT_IGNORED };
        let floods =
            [vec![0; 7], Message { id: u32::MAX, event: u16::MAX, value: u16::MAX }.encode().to_vec(), vec![0xff; 256]];
        let mut lines = Vec::new();
        for bytes in floods.iter().cycle().take(100) {
            let Ignored(why) = driver.ports.take(bytes).unwrap_err();
            lines.extend(driver.about_ignored(bytes, why));
        }
        assert_eq!(lines.len(), MAX_LINES_ABOUT_IGNORED as usize);
        assert!(lines.iter().all(|line| line.len() < 256), "{lines:?}");
        let says_so: Vec<_> = lines.iter().map(|line| line.ends_with("further ones are not told")).collect();
        assert_eq!(says_so.iter().position(|says| *says), Some(lines.len() - 1));
    }

    #[test]
    fn the_queues_of_a_port_are_those_of_the_specification_as_far_as_indices_go() {
        assert_eq!([0, 1, 2, 30].map(port_queues), [Some((0, 1)), Some((4, 5)), Some((6, 7)), Some((62, 63))]);
        assert_eq!(port_queues(32_766), Some((65_534, 65_535)));
        assert_eq!([32_767, u32::MAX / 2, u32::MAX].map(port_queues), [None; 3]);
    }
}
