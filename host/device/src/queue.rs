//! The driver side of a split virtqueue (virtio 1.2, section 2.7).
//!
//! ```text
//!            add            publish             (device)              pop
//! free ------------> added ---------> published ---------> used ------------> free, answered once
//!                                         |  a used element that names anything else,
//!                                         |  or says more was written than was offered
//!                                         v
//!                                     poisoned: nothing is believed any more, `outstanding` lists what is still with the device
//! ```
//!
//! All bookkeeping (free list, links, what each chain offered) is in private memory: the ring is written for the device and never read
//! back, but for what the device itself has to say. Header and status bytes lie in areas of the ring's memory that no guest and no client ever sees; they travel by value. Each
//! descriptor has an area for a short header and a short status and one for a long of each, 64 bytes.
//! The short ones are packed, and numbered so that neighbours are used together (`ring::area`):
//! a line of 64 bytes that goes from one core to the other serves four headers or eight statuses.
//!
//! **Direct or indirect.** A direct chain takes a descriptor per segment, an indirect one a single descriptor and a table, which was measured to cost
//! 13 to 15 % of the request rate. So chains are direct while at least a quarter of the ring stays free and none takes more than its fair share (a sixteenth of
//! the ring, at least 4); otherwise they are indirect, if the device does that.
//!
//! **Notifications.** Two stores and two loads cross between the sides, and each side has a full fence between its store and its load, so that at least one of
//! them sees the other's store (section 2.7.7.1 and 2.7.10.1; a store buffer would otherwise let both miss):
//!
//! | host | device | both missing would mean |
//! | --- | --- | --- |
//! | [`publish`](SplitQueue::publish): store `avail.idx`, fence, load `avail_event` or `used.flags` | store `avail_event`, fence, load `avail.idx` | no kick, and the device sleeps |
//! | [`arm`](SplitQueue::arm): store `used_event` or `avail.flags`, fence, load `used.idx` | store `used.idx`, fence, load `used_event` | no call, and the host sleeps |

mod notify;
mod placing;
mod standing;
mod used;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::chain::Chain;
use crate::dma::DmaRegion;
use crate::error::{AddError, DeviceFault, QueueError};
use crate::ring::{self, Ring, SHORT_STATUS_BYTES};
use crate::transport::QueueAddresses;

pub use notify::need_event;
pub use standing::Standing;
pub use used::{Ordinary, Popped, Used};

pub use crate::ring::QUEUE_ALIGN_BYTES;
pub use crate::words::MAX_STATUS_BYTES;

/// What status bytes hold before the device writes them.
pub const STATUS_UNWRITTEN: u8 = 0xff;
/// Largest ring, in entries (section 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// `VIRTQ_USED_F_NO_NOTIFY`: the device wants no available buffer notification.
const USED_NO_NOTIFY: u16 = 1;

/// How a queue is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Queue index at the device.
    pub index: u16,
    /// Entries: a power of two, at most [`MAX_QUEUE_SIZE`].
    pub size: u16,
    /// `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_RING_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
}

/// A chain that was added and not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    /// Its token.
    pub token: u32,
    /// Whether the device was told of it. If not, it has no effect on the medium.
    pub published: bool,
}

/// No chain has its head here: after every chain that was published.
const NO_CHAIN: u64 = u64::MAX;

/// What is known of the chain whose head is this descriptor.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Number of the chain, counting every `add`; below `SplitQueue::published` once the device may use it. Or [`NO_CHAIN`].
    sequence: u64,
    token: u32,
    offered: u32,
    tail: u16,
    /// The second descriptor of a set.
    middle: u16,
    /// Which header and status area is this descriptor's; never changes.
    area: u16,
    /// Descriptors that it holds, at most [`crate::words::MAX_SEGMENTS`].
    descriptors: u8,
    status_len: u8,
    /// It and the two after it are a set: what they say of the header, of the status and of each other is in memory already.
    is_set: bool,
}

impl Slot {
    fn new(area: u16) -> Self {
        Self {
            sequence: NO_CHAIN,
            token: 0,
            offered: 0,
            tail: 0,
            middle: 0,
            area,
            descriptors: 0,
            status_len: 0,
            is_set: false,
        }
    }

    /// What is told of it, but for the status bytes.
    fn used(&self, written: u32) -> Used {
        Used {
            token: self.token,
            written,
            offered: self.offered,
            status: [0; MAX_STATUS_BYTES],
            status_len: self.status_len,
        }
    }
}

/// The driver side of one split virtqueue.
///
/// Invariants: the chains' descriptors, the free sets and the free list partition the table (`free` counts the latter two; a set is three); `in_flight` counts the slots
/// that have a `sequence`; of these, `added - published` are not visible to the device. None of it can be changed by the device.
///
/// Dropping it tells the device nothing: the ring's memory must stay until the device is silent (DESIGN L1).
#[derive(Debug)]
pub struct SplitQueue {
    ring: Ring,
    config: QueueConfig,
    fair_share: u16,
    /// A chain of three is put on the ring directly while so many descriptors are free; `u16::MAX`, which never are, when the queue is poisoned.
    direct_from: u16,
    /// The same for a packet's chain, which takes two.
    pair_from: u16,
    /// Heads of the free sets, `ready_len` of them.
    ready: Box<[u16]>,
    ready_len: u16,
    next: Box<[u16]>,
    slots: Box<[Slot]>,
    free_head: u16,
    free: u16,
    in_flight: u16,
    /// Chains ever added; its low 16 bits are the next position in the available ring.
    added: u64,
    /// Chains ever published; its low 16 bits are `avail.idx`.
    published: u64,
    /// Next position of the used ring to read.
    used_next: u16,
    /// `used.idx` as it was last read and believed.
    used_seen: u16,
    armed: bool,
    /// `used_event` while `armed`.
    armed_at: u16,
    fault: Option<DeviceFault>,
}

impl SplitQueue {
    /// Bytes that a queue of `size` entries takes, a multiple of [`QUEUE_ALIGN_BYTES`]. `size` is from 1 to [`MAX_QUEUE_SIZE`].
    #[must_use]
    pub fn bytes(size: u16, indirect: bool) -> u64 {
        ring::bytes(size, indirect)
    }

    /// Lays a queue out at `offset` of `region`, zeroing it. Nobody else may write there. Device notifications start armed.
    ///
    /// # Errors
    /// [`QueueError`] when size, alignment or place is wrong.
    pub fn new(config: QueueConfig, region: Arc<DmaRegion>, offset: u64) -> Result<Self, QueueError> {
        let mut queue = Self::at(config, Ring::new(config, region, offset)?, 0);
        queue.armed = true;
        Ok(queue)
    }

    /// Goes on with a queue that is at `offset` of `region`, on which nothing is in flight, and that its device runs: [`SplitQueue::position`] told where it stands. The ring's
    /// memory is not written to before the first chain is added or a notification asked for. Device notifications may be armed or not.
    ///
    /// # Errors
    /// As [`SplitQueue::new`], and [`QueueError::Moved`] when the ring stands somewhere else.
    pub fn resume(config: QueueConfig, region: Arc<DmaRegion>, offset: u64, position: u16) -> Result<Self, QueueError> {
        let ring = Ring::there(config, region, offset)?;
        let (available, used) = (ring.available_index(), ring.used_index());
        if (available, used) != (position, position) {
            return Err(QueueError::Moved { available, used, expected: position });
        }
        Ok(Self::at(config, ring, position))
    }

    /// Where a queue stands on which nothing is in flight: `avail.idx` and `used.idx` are both this. `None` while something is, and of a poisoned queue.
    #[must_use]
    pub fn position(&self) -> Option<u16> {
        let is_empty = self.in_flight == 0 && self.added == self.published && self.fault.is_none();
        (is_empty && self.used_next == self.published as u16).then_some(self.used_next)
    }

    /// Nothing is in flight on `ring`, which stands at `position`.
    fn at(config: QueueConfig, ring: Ring, position: u16) -> Self {
        let size = config.size;
        let mut queue = Self {
            ring,
            config,
            fair_share: (size / 16).max(4),
            direct_from: 0,
            pair_from: 0,
            ready: vec![0; usize::from(size / 3)].into(),
            ready_len: 0,
            // The last link is never followed: `free` says when the list ends.
            next: (0..size).map(|index| (index + 1) % size).collect(),
            slots: (0..size).map(|head| Slot::new(ring::area(head, size))).collect(),
            free_head: 0,
            free: size,
            in_flight: 0,
            added: u64::from(position),
            published: u64::from(position),
            used_next: position,
            used_seen: position,
            armed: false,
            armed_at: position,
            fault: None,
        };
        queue.direct_from = (3..=size).find(|&free| queue.is_direct(3, free)).unwrap_or(u16::MAX);
        queue.pair_from = (2..=size).find(|&free| queue.is_direct(2, free)).unwrap_or(u16::MAX);
        queue
    }

    /// How the queue was made.
    #[must_use]
    pub fn config(&self) -> QueueConfig {
        self.config
    }

    /// Where the device finds the ring.
    #[must_use]
    pub fn addresses(&self) -> QueueAddresses {
        self.ring.addresses()
    }

    /// Free descriptors. A chain takes one to [`Chain::segment_count`] of them.
    #[must_use]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// Chains added and not used, published or not.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Chains added and not published.
    #[must_use]
    pub fn unpublished(&self) -> u16 {
        // At most `size`, since each holds a descriptor.
        (self.added - self.published) as u16
    }

    /// The fault that poisoned the queue, if one did.
    #[must_use]
    pub fn fault(&self) -> Option<DeviceFault> {
        self.fault
    }

    /// The chains that were added and not used, in no particular order: what the ladder has to account for. Works on a poisoned queue.
    pub fn outstanding(&self) -> impl Iterator<Item = Outstanding> + '_ {
        let live = self.slots.iter().filter(|slot| slot.sequence != NO_CHAIN);
        live.map(|slot| Outstanding { token: slot.token, published: slot.sequence < self.published })
    }

    /// Puts a chain on the ring. The device does not see it before [`SplitQueue::publish`]. On error nothing has changed.
    ///
    /// # Errors
    /// [`AddError`].
    #[inline]
    pub fn add(&mut self, chain: &Chain<'_>) -> Result<(), AddError> {
        if let Some((header, payload)) = chain.whole()
            && self.free >= self.direct_from
            && chain.queue() == self.config.index
        {
            self.add_whole(chain, header, payload);
            return Ok(());
        }
        if let Some((header, payload)) = chain.packet()
            && self.free >= self.pair_from
            && chain.queue() == self.config.index
        {
            self.add_packet(chain, header, payload);
            return Ok(());
        }
        self.add_any(chain)
    }

    /// The same for a chain of one descriptor: `length` bytes at the I/O address `iova` that the device may write, and which the caller has found to be the binding's own.
    ///
    /// # Errors
    /// [`AddError::NoRoom`] and [`AddError::Poisoned`].
    #[inline]
    pub fn add_buffer(&mut self, token: u32, iova: u64, length: u32) -> Result<(), AddError> {
        if let Some(fault) = self.fault {
            return Err(AddError::Poisoned(fault));
        }
        if self.free == 0 {
            return Err(AddError::NoRoom { needed: 1, free: 0 });
        }
        self.place_buffer(token, iova, length);
        Ok(())
    }

    /// Makes every added chain visible to the device. True: ring the doorbell. A poisoned queue publishes nothing.
    pub fn publish(&mut self) -> bool {
        if self.added == self.published || self.fault.is_some() {
            return false;
        }
        let (old, new) = (self.published as u16, self.added as u16);
        self.ring.publish_available(new);
        self.published = self.added;
        // Pairs with the device's fence between its store of `avail_event` (or `used.flags`) and its load of `avail.idx`; see the table above.
        fence(Ordering::SeqCst);
        if self.config.event_idx {
            need_event(self.ring.available_event(), new, old)
        } else {
            self.ring.used_flags() & USED_NO_NOTIFY == 0
        }
    }

    /// Takes the next chain that the device has used; its descriptors are free afterwards. `None`: nothing is there now.
    ///
    /// # Errors
    /// [`DeviceFault`], now and at every later call: a device that broke the rules once is not believed again.
    pub fn pop(&mut self) -> Result<Option<Used>, DeviceFault> {
        match self.pop_but(None)? {
            Popped::Nothing | Popped::Ordinary(_) => Ok(None),
            Popped::Other(used) => Ok(Some(used)),
        }
    }

    /// The same, but of a chain whose every writable byte the device says it wrote, with `ordinary` in its status bytes, only the token is told: it is checked as
    /// any other, and nothing is copied for it.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`].
    #[inline]
    pub fn pop_but(&mut self, ordinary: Option<&Ordinary>) -> Result<Popped, DeviceFault> {
        // Equal on a poisoned queue, whose fault `look` tells.
        if self.used_next == self.used_seen && !self.look()? {
            return Ok(Popped::Nothing);
        }
        let (id, written) = self.used_element()?;
        let slot = &self.slots[id as usize];
        let short = u64::from_ne_bytes(self.ring.read_short_status(slot.area));
        let is_ordinary = ordinary.is_some_and(|ordinary| {
            ordinary.length == slot.status_len
                && usize::from(ordinary.length) <= SHORT_STATUS_BYTES
                && written == slot.offered
                && (ordinary.short() ^ short) & ordinary.mask == 0
        });
        if !is_ordinary {
            return Ok(self.pop_other(id, written, short, ordinary));
        }
        let token = slot.token;
        // An index of `slots`, so it fits.
        self.release(id as u16);
        Ok(Popped::Ordinary(token))
    }

    /// As [`SplitQueue::pop`], of a queue whose chains have no status: the token, and how many bytes the device says it wrote.
    ///
    /// # Errors
    /// As [`SplitQueue::pop`].
    #[inline]
    pub fn pop_written(&mut self) -> Result<Option<(u32, u32)>, DeviceFault> {
        if self.used_next == self.used_seen && !self.look()? {
            return Ok(None);
        }
        let (id, written) = self.used_element()?;
        let token = self.slots[id as usize].token;
        self.release(id as u16);
        Ok(Some((token, written)))
    }

    /// The next used element, checked: a chain that is in flight, an index of `slots`, and no more bytes than it offers.
    #[inline(always)]
    fn used_element(&mut self) -> Result<(u32, u32), DeviceFault> {
        let (id, written) = self.ring.used_element(self.used_next);
        match self.slots.get(id as usize) {
            // A free slot has no sequence that was published.
            Some(slot) if slot.sequence < self.published && written <= slot.offered => Ok((id, written)),
            _ => Err(self.accuse(id, written)),
        }
    }

    /// Frees the descriptors of the chain whose head is `head`, which the next used element names.
    #[inline(always)]
    fn release(&mut self, head: u16) {
        let slot = &mut self.slots[usize::from(head)];
        slot.sequence = NO_CHAIN;
        // There are as many places as sets.
        if slot.is_set
            && let Some(place) = self.ready.get_mut(usize::from(self.ready_len))
        {
            *place = head;
            self.ready_len += 1;
        } else {
            // The chain's links are as `add` left them, so the whole chain goes to the front of the free list in one step and is used again in the same order.
            self.next[usize::from(slot.tail)] = self.free_head;
            self.free_head = head;
        }
        self.free += u16::from(slot.descriptors);
        self.in_flight -= 1;
        self.used_next = self.used_next.wrapping_add(1);
    }

    /// The rest of `pop_but`, for a used element that was checked. `short` is the status, unless that is long: then it is read here. Either is read once.
    #[inline(never)]
    fn pop_other(&mut self, id: u32, written: u32, short: u64, ordinary: Option<&Ordinary>) -> Popped {
        let slot = self.slots[id as usize];
        let mut used = slot.used(written);
        let length = usize::from(slot.status_len);
        if length <= SHORT_STATUS_BYTES {
            used.status[..length].copy_from_slice(&short.to_ne_bytes()[..length]);
        } else {
            self.ring.read_long_status(slot.area, &mut used.status[..length]);
        }
        self.release(id as u16);
        let is_full = length > SHORT_STATUS_BYTES && written == slot.offered;
        if is_full && ordinary.is_some_and(|ordinary| ordinary.status() == used.status()) {
            return Popped::Ordinary(slot.token);
        }
        Popped::Other(used)
    }

    /// Reads `used.idx` and answers whether it moved.
    fn look(&mut self) -> Result<bool, DeviceFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let index = self.ring.used_index();
        let advanced = index.wrapping_sub(self.used_next);
        let in_flight = self.in_flight - self.unpublished();
        if advanced > in_flight {
            return Err(self.poison(DeviceFault::UsedIndex { queue: self.config.index, advanced, in_flight }));
        }
        self.used_seen = index;
        Ok(advanced > 0)
    }

    /// Poisons the queue for an alleged used element that is none.
    #[cold]
    fn accuse(&mut self, id: u32, written: u32) -> DeviceFault {
        let queue = self.config.index;
        let fault = match self.slots.get(id as usize) {
            None => DeviceFault::UnknownId { queue, id, size: self.config.size },
            Some(slot) if slot.sequence >= self.published => DeviceFault::NotInFlight { queue, id },
            Some(slot) => DeviceFault::Overrun { queue, token: slot.token, written, offered: slot.offered },
        };
        self.poison(fault)
    }

    #[cold]
    fn poison(&mut self, fault: DeviceFault) -> DeviceFault {
        self.fault = Some(fault);
        // The short ways of `pop_but` and `add` are closed.
        self.used_seen = self.used_next;
        self.direct_from = u16::MAX;
        self.pair_from = u16::MAX;
        fault
    }
}
