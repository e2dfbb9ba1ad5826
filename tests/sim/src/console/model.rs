//! The console behind the rings: port 0 has queues 0 and 1, control 2 and 3, port 1 has 4 and 5, and so on (virtio 1.2,
//! section 5.3.2).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::control::{
    CONSOLE_PORT, ControlMessage, Conversation, DEVICE_READY, MESSAGE_BYTES, PORT_ADD, PORT_NAME, PORT_OPEN,
    PORT_READY, RESIZE,
};
use super::{ConsoleProfile, F_MULTIPORT, PortProfile};
use crate::kinds::{Lie, Op};
use crate::memory::Memory;
use crate::model::{Accepted, Context, Delivery, DeviceModel, Role, Work, gather};
use crate::ring::{Chain, Violation};

/// Most bytes that wait for the driver, per port; beyond it, what is fed is refused and what is echoed waits on the ring.
pub(super) const MAX_FED_BYTES: usize = 16 << 20;
/// Echoed bytes beyond which nothing more is taken from the driver before it has read some.
const MAX_ECHO_BYTES: usize = 1 << 20;
/// Bytes that nobody asked for, per port, beyond which nothing more is taken from the driver.
const MAX_WRITTEN_BYTES: usize = 16 << 20;
/// Most bytes that one chain can carry; what is more is lost.
const MAX_CHAIN_BYTES: u64 = 16 << 20;
/// Most bytes put into one posted buffer.
const MAX_DELIVERY_BYTES: u64 = 64 << 10;

/// The two directions of control.
const CONTROL_TO_DRIVER: u16 = 2;
const CONTROL_FROM_DRIVER: u16 = 3;

#[derive(Default)]
pub(super) struct Port {
    /// `None`: no such port now.
    pub(super) profile: Option<PortProfile>,
    /// The driver has said PORT_READY.
    pub(super) ready: bool,
    /// The device's side is open.
    pub(super) host_open: bool,
    /// The driver's side is.
    pub(super) guest_open: bool,
    pub(super) fed: VecDeque<u8>,
    pub(super) written: VecDeque<u8>,
    pub(super) echo: bool,
    /// Bytes without end; counted.
    pub(super) flood: Option<u64>,
}

pub(super) struct Console {
    pub(super) profile: ConsoleProfile,
    features: AtomicU64,
    pub(super) size: Mutex<(u16, u16)>,
    pub(super) ports: Vec<Mutex<Port>>,
    /// Never taken while a port's lock is held.
    pub(super) conversation: Mutex<Conversation>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    ToDriver(u16),
    FromDriver(u16),
    ControlToDriver,
    ControlFromDriver,
    Unused,
}

/// The queue to the driver of port `port`; the one from it is the next.
pub(super) fn queue_of(port: u16) -> u16 {
    if port == 0 { 0 } else { 2 * port + 2 }
}

/// Everything on its own: a bit for a queue.
fn bit(queue: u16) -> u64 {
    1u64.checked_shl(u32::from(queue)).unwrap_or(0)
}

/// The bits of both queues of a port.
pub(super) fn bits(port: u16) -> u64 {
    bit(queue_of(port)) | bit(queue_of(port) + 1)
}

/// The bit of the control queue to the driver.
pub(super) const CONTROL_BIT: u64 = 1 << CONTROL_TO_DRIVER;

impl Console {
    pub(super) fn new(profile: ConsoleProfile) -> Self {
        let port = |index: usize| {
            let profile = profile.ports.get(index).cloned();
            Mutex::new(Port { host_open: profile.is_some(), profile, ..Port::default() })
        };
        Self {
            ports: (0..usize::from(profile.max_ports)).map(port).collect(),
            features: AtomicU64::new(0),
            size: Mutex::new(profile.size.unwrap_or_default()),
            conversation: Mutex::default(),
            profile,
        }
    }

    pub(super) fn is_multiport(&self) -> bool {
        self.features.load(SeqCst) & 1 << F_MULTIPORT != 0
    }

    fn kind(&self, queue: u16) -> Kind {
        let multiport = self.is_multiport();
        let port = if queue < 2 { 0 } else { (queue / 2).saturating_sub(1) };
        match queue {
            0 => Kind::ToDriver(0),
            1 => Kind::FromDriver(0),
            CONTROL_TO_DRIVER if multiport => Kind::ControlToDriver,
            CONTROL_FROM_DRIVER if multiport => Kind::ControlFromDriver,
            _ if !multiport || usize::from(port) >= self.ports.len() => Kind::Unused,
            _ if queue.is_multiple_of(2) => Kind::ToDriver(port),
            _ => Kind::FromDriver(port),
        }
    }

    pub(super) fn port(&self, port: u16) -> Option<MutexGuard<'_, Port>> {
        self.ports.get(usize::from(port)).map(lock)
    }

    pub(super) fn message(id: u16, event: u16, value: u16, rest: &[u8]) -> Vec<u8> {
        ControlMessage { id: u32::from(id), event, value, rest: rest.to_vec() }.to_bytes()
    }

    /// RESIZE of `port`: columns, then rows (section 5.3.6.2).
    pub(super) fn resize_message(&self, port: u16) -> Vec<u8> {
        let (columns, rows) = *lock(&self.size);
        Self::message(port, RESIZE, 1, &[columns.to_le_bytes(), rows.to_le_bytes()].concat())
    }

    /// Acts on a message of the driver. The answer is which queues have something to do now.
    fn hear(&self, message: ControlMessage) -> u64 {
        let mut wake = CONTROL_BIT;
        let mut say = Vec::new();
        // Held from the look at the ports on, so that one that comes or goes is told of once.
        let mut conversation = lock(&self.conversation);
        let id = u16::try_from(message.id).ok();
        match message.event {
            DEVICE_READY if message.value == 1 => {
                for (port, _) in (0..).zip(&self.ports).filter(|(_, port)| lock(port).profile.is_some()) {
                    say.push(Self::message(port, PORT_ADD, 1, &[]));
                }
            }
            PORT_READY if message.value == 1 => {
                if let Some(id) = id
                    && let Some(mut port) = self.port(id)
                    && let Some(profile) = port.profile.clone()
                {
                    port.ready = true;
                    if profile.console {
                        say.push(Self::message(id, CONSOLE_PORT, 1, &[]));
                        if self.profile.size.is_some() {
                            say.push(self.resize_message(id));
                        }
                    }
                    if let Some(name) = &profile.name {
                        say.push(Self::message(id, PORT_NAME, 1, name.as_bytes()));
                    }
                    if port.host_open {
                        say.push(Self::message(id, PORT_OPEN, 1, &[]));
                    }
                }
            }
            PORT_OPEN => {
                if let Some(id) = id
                    && let Some(mut port) = self.port(id)
                {
                    port.guest_open = message.value != 0;
                    wake |= bits(id);
                }
            }
            _ => {}
        }
        conversation.ready |= message.event == DEVICE_READY && message.value == 1;
        conversation.hear(message);
        say.into_iter().for_each(|message| conversation.say(message));
        wake
    }

    fn deliver_bytes(&self, port: u16, chains: &[Chain]) -> Delivery {
        let Some(mut port) = self.port(port) else { return Delivery::Nothing };
        // Without control queues a port is always there and open.
        let open = !self.is_multiport() || port.profile.is_some() && port.guest_open;
        if !open || port.fed.is_empty() && port.flood.is_none() {
            return Delivery::Nothing;
        }
        let Some(chain) = chains.first() else { return Delivery::More };
        let room = chain.writable_bytes.min(MAX_DELIVERY_BYTES) as usize;
        let mut data: Vec<u8> = Vec::new();
        let fed = room.min(port.fed.len());
        data.extend(port.fed.drain(..fed));
        if let Some(at) = &mut port.flood {
            let more = (room - data.len()) as u64;
            data.extend((*at..*at + more).map(flood_byte));
            *at += more;
        }
        Delivery::Ready { op: Op::Receive, data, remark: check_buffer(chain, 1) }
    }

    fn deliver_message(&self, chains: &[Chain]) -> Delivery {
        let mut conversation = lock(&self.conversation);
        if !conversation.has_next() {
            return Delivery::Nothing;
        }
        let Some(chain) = chains.first() else { return Delivery::More };
        let data = conversation.next().unwrap_or_default();
        let remark = check_buffer(chain, data.len() as u64);
        Delivery::Ready { op: Op::Message, data, remark }
    }

    fn take_bytes(&self, port: u16, work: &Work, context: &mut Context<'_>) {
        let mut bytes = vec![0; work.chain.readable_bytes.min(MAX_CHAIN_BYTES) as usize];
        gather(context.memory, &work.chain.readable, &mut bytes);
        let Some(mut state) = self.port(port) else { return };
        if state.echo {
            state.fed.extend(bytes);
            context.wake |= bit(queue_of(port));
        } else {
            state.written.extend(bytes);
        }
    }

    fn say_lies(&self, work: &Work, context: &mut Context<'_>) -> u64 {
        let mut data = work.data.clone();
        for lie in &context.fate.lies {
            match lie {
                Lie::MessageGarbage => data.iter_mut().for_each(|byte| *byte = context.rng.next_u64() as u8),
                Lie::MessageShort => data.truncate(1 + context.rng.below(MESSAGE_BYTES as u64 - 1) as usize),
                Lie::PortUnknown if data.len() >= 4 => {
                    let known = u64::from(self.profile.max_ports);
                    let id = known + context.rng.below((1 << 32) - known);
                    data[..4].copy_from_slice(&(id as u32).to_le_bytes());
                }
                Lie::EventUnknown if data.len() >= 6 => {
                    let event = 8 + context.rng.below((1 << 16) - 8);
                    data[4..6].copy_from_slice(&(event as u16).to_le_bytes());
                }
                _ => {}
            }
        }
        work.scatter(context.memory, &data)
    }
}

/// Byte `at` of a flood: lines of printable characters, so that a terminal that shows it is none the worse.
pub(super) fn flood_byte(at: u64) -> u8 {
    if at % 64 == 63 { b'\n' } else { b' ' + (at % 95) as u8 }
}

fn check_buffer(chain: &Chain, least_bytes: u64) -> Option<Violation> {
    let Chain { head, readable_bytes, writable_bytes, .. } = *chain;
    if readable_bytes > 0 {
        return Some(Violation::NotARequest { head, readable_bytes, writable_bytes });
    }
    (writable_bytes < least_bytes).then_some(Violation::Buffer { head, writable_bytes, least_bytes })
}

impl DeviceModel for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        self.profile.features()
    }

    fn config(&self) -> Vec<u8> {
        let (columns, rows) = *lock(&self.size);
        let ports = u32::from(if self.profile.multiport { self.profile.max_ports } else { 0 });
        // Columns, rows, max_nr_ports, emerg_wr (section 5.3.4).
        [&columns.to_le_bytes()[..], &rows.to_le_bytes(), &ports.to_le_bytes(), &[0; 4]].concat()
    }

    fn queues(&self) -> u16 {
        if self.profile.multiport { 2 * self.profile.max_ports + 2 } else { 2 }
    }

    fn queue_size(&self) -> u16 {
        self.profile.rings.size
    }

    fn claimed(&self) {
        self.features.store(0, SeqCst);
        lock(&self.conversation).end();
        for port in &self.ports {
            let mut port = lock(port);
            (port.ready, port.guest_open) = (false, false);
        }
    }

    fn negotiated(&self, features: u64) {
        self.features.store(features, SeqCst);
    }

    fn role(&self, queue: u16) -> Role {
        match self.kind(queue) {
            Kind::ToDriver(_) | Kind::ControlToDriver => Role::Delivers,
            _ => Role::Serves,
        }
    }

    fn accepts(&self, queue: u16) -> bool {
        let Kind::FromDriver(port) = self.kind(queue) else { return true };
        self.port(port).is_none_or(|port| match port.echo {
            true => port.fed.len() < MAX_ECHO_BYTES,
            false => port.written.len() < MAX_WRITTEN_BYTES,
        })
    }

    fn accept(&self, queue: u16, _memory: &Memory, chain: &Chain) -> Result<Accepted, Violation> {
        let Chain { head, readable_bytes, writable_bytes, .. } = *chain;
        let op = match self.kind(queue) {
            Kind::FromDriver(_) if writable_bytes == 0 => Op::Transmit,
            Kind::ControlFromDriver if readable_bytes >= MESSAGE_BYTES as u64 && writable_bytes == 0 => Op::Control,
            _ => return Err(Violation::NotARequest { head, readable_bytes, writable_bytes }),
        };
        Ok(Accepted { op, tag: 0, remark: None })
    }

    fn deliver(&self, queue: u16, chains: &[Chain]) -> Delivery {
        match self.kind(queue) {
            Kind::ToDriver(port) => self.deliver_bytes(port, chains),
            Kind::ControlToDriver => self.deliver_message(chains),
            _ => Delivery::Nothing,
        }
    }

    fn serve(&self, work: &Work, context: &mut Context<'_>) -> u64 {
        match self.kind(work.queue) {
            Kind::ToDriver(port) => {
                // What was echoed made room; the driver's own bytes may be waiting for it.
                context.wake |= bit(queue_of(port) + 1);
                if context.fate.lies(Lie::PayloadUnwritten) {
                    return work.data.len() as u64;
                }
                work.scatter(context.memory, &work.data)
            }
            Kind::ControlToDriver => self.say_lies(work, context),
            Kind::FromDriver(port) => {
                self.take_bytes(port, work, context);
                0
            }
            Kind::ControlFromDriver => {
                let mut bytes = [0; MESSAGE_BYTES];
                gather(context.memory, &work.chain.readable, &mut bytes);
                if let Some(message) = ControlMessage::from_bytes(&bytes) {
                    context.wake |= self.hear(message);
                }
                0
            }
            Kind::Unused => 0,
        }
    }
}
