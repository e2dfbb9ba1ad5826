//! The seam between the rings and a class of device.
//!
//! What is common to all classes is on the other side: taking chains and checking them, faults and their order, threads,
//! silence, both ways in. A class says what it offers, what a chain asks for, and what it does with it. It is asked once or
//! twice per chain, never per byte; see [`DeviceModel::answer_quick`] for not even that.

use crate::memory::{Memory, Segment};
use crate::ring::{Chain, Ring, Violation};
use crate::rng::Rng;
use crate::script::Fate;
use crate::store::PowerCut;
use crate::{Lie, Op};

/// Who has the word on a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The driver: each chain is a request.
    Serves,
    /// The device: chains are posted buffers, which stay on the ring until there is something to put into them.
    Delivers,
}

/// What a chain turned out to ask for.
pub(crate) struct Accepted {
    pub(crate) op: Op,
    /// What the class read of it now, so that it is read once.
    pub(crate) tag: u64,
    /// A breach that goes on record and does not stop the queue.
    pub(crate) remark: Option<Violation>,
}

/// What a device puts into posted buffers next.
pub(crate) enum Delivery {
    /// Nothing. The queue is looked at again when the class wakes it.
    Nothing,
    /// Something, but not into what was taken so far: one more chain.
    More,
    /// These bytes, over the chains that were taken.
    Ready {
        op: Op,
        data: Vec<u8>,
        /// A breach that goes on record and does not stop the queue.
        remark: Option<Violation>,
    },
}

/// One unit of work: a request, or a delivery.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) queue: u16,
    pub(crate) chain: Chain,
    /// The further chains of a delivery that did not fit into one.
    pub(crate) more: Vec<Chain>,
    pub(crate) op: Op,
    pub(crate) tag: u64,
    /// What is delivered.
    pub(crate) data: Vec<u8>,
}

/// What work is done with.
pub(crate) struct Context<'a> {
    pub(crate) memory: &'a Memory,
    /// Negotiated.
    pub(crate) features: u64,
    pub(crate) fate: &'a Fate,
    pub(crate) rng: &'a mut Rng,
    /// Which driver, counted from 1.
    pub(crate) session: u64,
    /// Set by the class: queues that have something to do now, a bit each.
    pub(crate) wake: u64,
}

/// One class of device. Methods may be called from several threads at once, those about one queue from one at a time.
pub(crate) trait DeviceModel: Send + Sync {
    /// The virtio device id.
    fn device_type(&self) -> u32;

    /// All feature bits on offer.
    fn features(&self) -> u64;

    /// Configuration space, honest.
    fn config(&self) -> Vec<u8>;

    /// Number of queues, 1 to 64.
    fn queues(&self) -> u16;

    /// Largest ring, a power of two.
    fn queue_size(&self) -> u16;

    /// A new driver has claimed the device: what the last one set is forgotten.
    fn claimed(&self) {}

    /// The driver has accepted these features. Before any queue starts.
    fn negotiated(&self, _features: u64) {}

    /// Asked when a queue starts.
    fn role(&self, _queue: u16) -> Role {
        Role::Serves
    }

    /// Whether the next request of `queue` can be taken. After no, the class has to wake the queue.
    fn accepts(&self, _queue: u16) -> bool {
        true
    }

    /// What `chain` asks for. Only [`Role::Serves`].
    fn accept(&self, queue: u16, memory: &Memory, chain: &Chain) -> Result<Accepted, Violation>;

    /// What to put into `chains`, which is empty at first. Only [`Role::Delivers`].
    fn deliver(&self, _queue: u16, _chains: &[Chain]) -> Delivery {
        Delivery::Nothing
    }

    /// Does it; the answer is how many bytes from the start of the writable part were written.
    fn serve(&self, work: &Work, context: &mut Context<'_>) -> u64;

    /// Whether [`DeviceModel::answer_quick`] is for `queue` now. Only asked while no fault could touch a request.
    fn is_quick(&self, _queue: u16) -> bool {
        false
    }

    /// Takes and answers up to `limit` chains in one go; the answer is how many.
    fn answer_quick(&self, _queue: u16, _ring: &mut Ring, _limit: u16) -> Result<u16, Violation> {
        Ok(0)
    }

    /// The device loses power: of what was not flushed, a part is lost, drawn from `rng`.
    fn power_cut(&self, _rng: &mut Rng) -> PowerCut {
        PowerCut::default()
    }
}

impl Work {
    /// A delivery's or request's chains, in order.
    pub(crate) fn chains(&self) -> impl Iterator<Item = &Chain> {
        std::iter::once(&self.chain).chain(&self.more)
    }

    /// Puts `data` over the writable parts of all chains. Returns how many bytes fitted.
    pub(crate) fn scatter(&self, memory: &Memory, data: &[u8]) -> u64 {
        let mut rest = data;
        for segment in self.chains().flat_map(|chain| &chain.writable) {
            let (now, later) = rest.split_at((segment.bytes as usize).min(rest.len()));
            // The segments were checked when the chain was taken; memory that went away since takes nothing.
            let _ = memory.write(segment.address, now);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        (data.len() - rest.len()) as u64
    }

    /// Puts `status` into the last writable byte, lies about it included. Block requests and net commands end so
    /// (sections 5.2.6 and 5.1.6.5); empty segments may follow.
    pub(crate) fn write_status(&self, context: &mut Context<'_>, status: u8) {
        if context.fate.lies(Lie::StatusUnwritten) {
            return;
        }
        let unknown = context.fate.lies(Lie::StatusUnknown);
        let status = if unknown { 3 + context.rng.below(250) as u8 } else { status };
        if let Some(last) = self.chain.writable.iter().rev().find(|segment| segment.bytes > 0) {
            let _ = context.memory.write(last.address + u64::from(last.bytes) - 1, &[status]);
        }
    }
}

/// The segments of `segments` without the first `skip` bytes and cut to `take`. Where one segment ends means nothing
/// (section 2.7.4): header, payload and status may be split in any way.
pub(crate) fn slice(segments: &[Segment], mut skip: u64, mut take: u64) -> Vec<Segment> {
    let mut out = Vec::with_capacity(segments.len());
    for segment in segments {
        let bytes = u64::from(segment.bytes);
        let skipped = skip.min(bytes);
        skip -= skipped;
        let taken = (bytes - skipped).min(take);
        take -= taken;
        if taken > 0 {
            out.push(Segment { address: segment.address + skipped, bytes: taken as u32 });
        }
    }
    out
}

/// Copies the bytes of segments that were checked already; `into` is as long as they are together, or shorter.
pub(crate) fn gather(memory: &Memory, segments: &[Segment], into: &mut [u8]) {
    let mut rest = into;
    for segment in segments {
        let (now, later) = rest.split_at_mut((segment.bytes as usize).min(rest.len()));
        // A chain's segments were checked when it was taken, and regions do not change under a ring.
        let _ = memory.read(segment.address, now);
        rest = later;
    }
}

/// What every class offers of its rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rings {
    /// Largest ring, a power of two.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
}

impl Default for Rings {
    fn default() -> Self {
        Self { size: 256, event_idx: true, indirect: true }
    }
}

impl Rings {
    /// The feature bits, VIRTIO_F_VERSION_1 among them.
    pub(crate) fn features(self) -> u64 {
        use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
        use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
        1 << VIRTIO_F_VERSION_1
            | u64::from(self.event_idx) << VIRTIO_RING_F_EVENT_IDX
            | u64::from(self.indirect) << VIRTIO_RING_F_INDIRECT_DESC
    }
}
