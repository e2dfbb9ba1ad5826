//! The net device behind the rings: receive queues 0, 2, ..., transmit queues 1, 3, ..., and the control queue after them
//! (virtio 1.2, section 5.1.2).

use std::collections::VecDeque;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
};

use super::control::{self, Control};
use super::header::{Frame, HEADER_BYTES, NEEDS_CHECKSUM, NetHeader};
use super::{NetProfile, Transmit};
use crate::kinds::{Lie, Op};
use crate::memory::Memory;
use crate::model::{Accepted, Context, Delivery, DeviceModel, Role, Work, gather, slice};
use crate::ring::{Chain, Ring, Violation};
use crate::rng::Rng;

/// Longest frame that is looked at: a segmentable one, with its Ethernet header (section 5.1.6.3.1).
const MAX_FRAME_BYTES: u64 = 65_550;
/// Most buffers that one frame is laid over.
const MAX_BUFFERS: usize = 1024;
/// Most bytes of frames that wait in one place; more are dropped, as on a real wire.
const MAX_WAITING_BYTES: usize = 16 << 20;
/// Longest command.
const MAX_COMMAND_BYTES: u64 = 64 << 10;

pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// Frames in order, bounded in bytes.
#[derive(Default)]
pub(super) struct Waiting {
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Waiting {
    fn push(&mut self, frame: Frame) -> bool {
        // The allowance is for what a frame costs beside its bytes.
        let bytes = frame.bytes.len() + 64;
        if self.bytes + bytes > MAX_WAITING_BYTES {
            return false;
        }
        self.bytes += bytes;
        self.frames.push_back(frame);
        true
    }

    fn pop(&mut self) -> Option<Frame> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.bytes.len() + 64;
        Some(frame)
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn drain(&mut self) -> Vec<Frame> {
        self.bytes = 0;
        std::mem::take(&mut self.frames).into()
    }
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) transmitted: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) dropped: AtomicU64,
}

pub(super) struct Net {
    pub(super) profile: NetProfile,
    features: AtomicU64,
    transmit: AtomicU8,
    generates: AtomicBool,
    /// Header and frame that the generator puts into every buffer.
    pattern: Mutex<Arc<[u8]>>,
    link_up: AtomicBool,
    /// By pair.
    inbound: Vec<Mutex<Waiting>>,
    pub(super) sent: Mutex<Waiting>,
    pub(super) control: Mutex<Control>,
    pub(super) counts: Counts,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Receive(u16),
    Transmit(u16),
    Control,
    Unused,
}

impl Net {
    pub(super) fn new(profile: NetProfile) -> Self {
        Self {
            inbound: (0..profile.pairs).map(|_| Mutex::default()).collect(),
            features: AtomicU64::new(0),
            transmit: AtomicU8::new(Transmit::Record as u8),
            generates: AtomicBool::new(false),
            pattern: Mutex::new(Arc::from([])),
            link_up: AtomicBool::new(true),
            sent: Mutex::default(),
            control: Mutex::default(),
            counts: Counts::default(),
            profile,
        }
    }

    fn features_now(&self) -> u64 {
        self.features.load(SeqCst)
    }

    fn kind(&self, queue: u16) -> Kind {
        let features = self.features_now();
        let pairs = if has(features, VIRTIO_NET_F_MQ) { self.profile.pairs } else { 1 };
        match queue {
            _ if queue < 2 * pairs && queue.is_multiple_of(2) => Kind::Receive(queue / 2),
            _ if queue < 2 * pairs => Kind::Transmit(queue / 2),
            _ if queue == 2 * pairs && has(features, VIRTIO_NET_F_CTRL_VQ) => Kind::Control,
            _ => Kind::Unused,
        }
    }

    pub(super) fn set_transmit(&self, transmit: Transmit) {
        self.transmit.store(transmit as u8, SeqCst);
    }

    fn transmits(&self, transmit: Transmit) -> bool {
        self.transmit.load(Relaxed) == transmit as u8
    }

    pub(super) fn set_generator(&self, frame: Option<&[u8]>) {
        if let Some(frame) = frame {
            let header = NetHeader { num_buffers: 1, ..NetHeader::default() };
            *lock(&self.pattern) = [&header.to_bytes(), frame].concat().into();
        }
        self.generates.store(frame.is_some(), SeqCst);
    }

    pub(super) fn is_link_up(&self) -> bool {
        self.link_up.load(SeqCst)
    }

    pub(super) fn set_link(&self, up: bool) {
        self.link_up.store(up, SeqCst);
    }

    /// Pairs that frames may come by.
    pub(super) fn active_pairs(&self) -> u16 {
        lock(&self.control).state.pairs
    }

    /// Queues up a frame for the driver.
    pub(super) fn push(&self, frame: Frame) -> bool {
        let queued = self.is_link_up()
            && frame.pair < self.active_pairs()
            && self.inbound.get(usize::from(frame.pair)).is_some_and(|waiting| lock(waiting).push(frame));
        if !queued {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
        queued
    }

    pub(super) fn waiting(&self) -> usize {
        self.inbound.iter().map(|waiting| lock(waiting).len()).sum()
    }

    /// Sends a transmitted frame back, with what the driver did not offer to complete completed.
    fn echo(&self, mut frame: Frame, features: u64) -> Option<u16> {
        if frame.pair >= self.active_pairs() {
            frame.pair = 0;
        }
        let pair = frame.pair;
        let segments = match frame.header.gso_type & 0x7f {
            0 => true,
            1 => has(features, VIRTIO_NET_F_GUEST_TSO4),
            4 => has(features, VIRTIO_NET_F_GUEST_TSO6),
            _ => false,
        };
        let needs = frame.header.flags & NEEDS_CHECKSUM != 0;
        let sound = segments && (!needs || has(features, VIRTIO_NET_F_GUEST_CSUM) || frame.complete_checksum());
        if !sound {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
        (sound && self.push(frame)).then_some(pair)
    }

    fn serve_transmit(&self, pair: u16, work: &Work, context: &mut Context<'_>) {
        self.counts.transmitted.fetch_add(1, Relaxed);
        let bytes = work.chain.readable_bytes - HEADER_BYTES as u64;
        if !self.is_link_up() || bytes > MAX_FRAME_BYTES {
            self.counts.dropped.fetch_add(1, Relaxed);
            return;
        }
        if self.transmits(Transmit::Sink) {
            return;
        }
        let mut header = [0; HEADER_BYTES];
        gather(context.memory, &slice(&work.chain.readable, 0, HEADER_BYTES as u64), &mut header);
        let mut frame = Frame { pair, header: NetHeader::from_bytes(&header), bytes: vec![0; bytes as usize] };
        gather(context.memory, &slice(&work.chain.readable, HEADER_BYTES as u64, bytes), &mut frame.bytes);
        if self.transmits(Transmit::Echo) {
            if let Some(pair) = self.echo(frame, context.features) {
                context.wake |= 1 << (2 * pair);
            }
        } else if !lock(&self.sent).push(frame) {
            self.counts.dropped.fetch_add(1, Relaxed);
        }
    }

    fn serve_receive(&self, work: &Work, context: &mut Context<'_>) -> u64 {
        self.counts.received.fetch_add(1, Relaxed);
        if context.fate.lies.is_empty() {
            return work.scatter(context.memory, &work.data);
        }
        if context.fate.lies(Lie::PayloadUnwritten) {
            return work.data.len() as u64;
        }
        let mut data = work.data.clone();
        if context.fate.lies(Lie::FrameEmpty) {
            data.truncate(HEADER_BYTES);
        }
        if let Some((header, _)) = data.split_first_chunk_mut::<HEADER_BYTES>() {
            let mut fields = NetHeader::from_bytes(header);
            lie(&mut fields, &context.fate.lies, context.rng);
            *header = fields.to_bytes();
        }
        work.scatter(context.memory, &data)
    }

    fn serve_control(&self, work: &Work, context: &mut Context<'_>) -> u64 {
        let mut command = vec![0; work.chain.readable_bytes.min(MAX_COMMAND_BYTES) as usize];
        gather(context.memory, &work.chain.readable, &mut command);
        let fail = context.fate.status.is_some();
        let ack = lock(&self.control).carry_out(&command, context.features, self.profile.pairs, fail);
        work.write_status(context, ack);
        debug_assert!(ack == control::OK || ack == control::ERROR);
        work.chain.writable_bytes
    }

    /// What the driver should have posted (section 5.1.6.3.1).
    fn check_buffer(&self, chain: &Chain) -> Option<Violation> {
        let features = self.features_now();
        let Chain { head, readable_bytes, writable_bytes, .. } = *chain;
        let tso = has(features, VIRTIO_NET_F_GUEST_TSO4) || has(features, VIRTIO_NET_F_GUEST_TSO6);
        let least_bytes = match has(features, VIRTIO_NET_F_MRG_RXBUF) {
            true => HEADER_BYTES as u64,
            false if tso => 65_562,
            false => 1526,
        };
        if readable_bytes > 0 {
            return Some(Violation::NotARequest { head, readable_bytes, writable_bytes });
        }
        (writable_bytes < least_bytes).then_some(Violation::Buffer { head, writable_bytes, least_bytes })
    }
}

/// Puts lies into a received frame's header.
fn lie(header: &mut NetHeader, lies: &[Lie], rng: &mut Rng) {
    for lie in lies {
        match lie {
            Lie::BuffersZero => header.num_buffers = 0,
            Lie::BuffersMore => header.num_buffers += 1,
            Lie::BuffersHuge => header.num_buffers = u16::MAX,
            // Bits 0 to 2 have a meaning.
            Lie::FlagsUnknown => header.flags |= 8 << rng.below(5),
            // 1, 3, 4 and 5 have a meaning, and bit 7.
            Lie::GsoUnknown => header.gso_type = 6 + rng.below(120) as u8,
            Lie::GsoUnasked => (header.gso_type, header.gso_size) = (1 + 3 * rng.below(2) as u8, 0),
            Lie::ChecksumBeyond => {
                header.flags |= NEEDS_CHECKSUM;
                (header.csum_start, header.csum_offset) = (0xff00 + rng.below(255) as u16, rng.next_u64() as u16);
            }
            _ => {}
        }
    }
}

impl DeviceModel for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.profile.features()
    }

    fn config(&self) -> Vec<u8> {
        self.profile.config(self.is_link_up())
    }

    fn queues(&self) -> u16 {
        self.profile.pairs.saturating_mul(2).saturating_add(u16::from(self.profile.control))
    }

    fn queue_size(&self) -> u16 {
        self.profile.rings.size
    }

    fn claimed(&self) {
        self.features.store(0, SeqCst);
        lock(&self.control).state = control::ControlState::default();
    }

    fn negotiated(&self, features: u64) {
        self.features.store(features, SeqCst);
    }

    fn role(&self, queue: u16) -> Role {
        if matches!(self.kind(queue), Kind::Receive(_)) { Role::Delivers } else { Role::Serves }
    }

    fn accept(&self, queue: u16, _memory: &Memory, chain: &Chain) -> Result<Accepted, Violation> {
        let Chain { head, readable_bytes, writable_bytes, .. } = *chain;
        let op = match self.kind(queue) {
            Kind::Transmit(_) if readable_bytes >= HEADER_BYTES as u64 && writable_bytes == 0 => Op::Transmit,
            Kind::Control if readable_bytes >= 2 && writable_bytes > 0 => Op::Control,
            _ => return Err(Violation::NotARequest { head, readable_bytes, writable_bytes }),
        };
        Ok(Accepted { op, tag: 0, remark: None })
    }

    fn deliver(&self, queue: u16, chains: &[Chain]) -> Delivery {
        let Kind::Receive(pair) = self.kind(queue) else { return Delivery::Nothing };
        if !self.is_link_up() {
            return Delivery::Nothing;
        }
        let remark = chains.last().and_then(|chain| self.check_buffer(chain));
        let room: u64 = chains.iter().map(|chain| chain.writable_bytes).sum();
        if self.generates.load(Relaxed) {
            let data = if chains.is_empty() { Vec::new() } else { lock(&self.pattern).to_vec() };
            return if chains.is_empty() { Delivery::More } else { Delivery::Ready { op: Op::Receive, data, remark } };
        }
        let merges = has(self.features_now(), VIRTIO_NET_F_MRG_RXBUF);
        let mut waiting = lock(&self.inbound[usize::from(pair)]);
        while let Some(frame) = waiting.frames.front() {
            if chains.is_empty() {
                return Delivery::More;
            }
            let fits = room >= (HEADER_BYTES + frame.bytes.len()) as u64;
            if !fits && merges && chains.len() < MAX_BUFFERS {
                return Delivery::More;
            }
            let frame = waiting.pop().unwrap_or_default();
            if fits {
                let header = NetHeader { num_buffers: chains.len() as u16, ..frame.header };
                let data = [&header.to_bytes()[..], &frame.bytes].concat();
                return Delivery::Ready { op: Op::Receive, data, remark };
            }
            self.counts.dropped.fetch_add(1, Relaxed);
        }
        Delivery::Nothing
    }

    fn serve(&self, work: &Work, context: &mut Context<'_>) -> u64 {
        match self.kind(work.queue) {
            Kind::Receive(_) => self.serve_receive(work, context),
            Kind::Control => self.serve_control(work, context),
            Kind::Transmit(pair) => {
                self.serve_transmit(pair, work, context);
                0
            }
            Kind::Unused => 0,
        }
    }

    fn is_quick(&self, queue: u16) -> bool {
        self.is_link_up()
            && match self.kind(queue) {
                Kind::Transmit(_) => self.transmits(Transmit::Sink),
                Kind::Receive(_) => self.generates.load(Relaxed),
                _ => false,
            }
    }

    fn answer_quick(&self, queue: u16, ring: &mut Ring, limit: u16) -> Result<u16, Violation> {
        if queue.is_multiple_of(2) {
            let pattern = Arc::clone(&lock(&self.pattern));
            let count = ring.fill_all(limit, &pattern)?;
            self.counts.received.fetch_add(u64::from(count), Relaxed);
            return Ok(count);
        }
        let count = ring.swallow_all(limit)?;
        self.counts.transmitted.fetch_add(u64::from(count), Relaxed);
        Ok(count)
    }
}
