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
//! back, but for what the device itself has to say. Header and status bytes lie in areas of the ring's memory, one of 64 bytes each per
//! descriptor, that no guest and no client ever sees; they travel by value.
//!
//! **Direct or indirect.** A direct chain takes a descriptor per segment, an indirect one a single descriptor and a table, which was measured to cost
//! 13 to 15 % of the request rate. So chains are direct while at least half of the ring stays free and none takes more than its fair share (a sixteenth of
//! the ring, at least 4); otherwise they are indirect, if the device does that.
//!
//! **Notifications.** Two stores and two loads cross between the sides, and each side has a full fence between its store and its load, so that at least one of
//! them sees the other's store (section 2.7.7.1 and 2.7.10.1; a store buffer would otherwise let both miss):
//!
//! | host | device | both missing would mean |
//! | --- | --- | --- |
//! | [`publish`](SplitQueue::publish): store `avail.idx`, fence, load `avail_event` or `used.flags` | store `avail_event`, fence, load `avail.idx` | no kick, and the device sleeps |
//! | [`arm`](SplitQueue::arm): store `used_event` or `avail.flags`, fence, load `used.idx` | store `used.idx`, fence, load `used_event` | no call, and the host sleeps |

mod used;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::chain::{Chain, Kind, Segment};
use crate::dma::DmaRegion;
use crate::error::{AddError, DeviceFault, QueueError};
use crate::ring::{self, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Ring, SHORT_STATUS_BYTES};
use crate::transport::QueueAddresses;

pub use used::{Ordinary, Popped, Used};

pub use crate::ring::QUEUE_ALIGN_BYTES;
pub use crate::words::MAX_STATUS_BYTES;

/// What status bytes hold before the device writes them.
pub const STATUS_UNWRITTEN: u8 = 0xff;
/// Largest ring, in entries (section 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the host wants no used buffer notification.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`: the device wants no available buffer notification.
const USED_NO_NOTIFY: u16 = 1;

/// Whether moving an index from `old` to `new` passes `event`: the specification's `vring_need_event` (section 2.7.10.1), right across the wrap at 2^16.
#[must_use]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

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

/// What is known of the chain whose head is this descriptor.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    token: u32,
    offered: u32,
    /// Number of the chain, counting every `add`; below `SplitQueue::published` once the device may use it.
    sequence: u64,
    /// Descriptors that it holds; 0: no chain has its head here.
    descriptors: u16,
    tail: u16,
    status_len: u8,
}

impl Slot {
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

/// I/O address, bytes and flag of a segment; `areas` are the addresses that its kind counts from.
#[inline]
fn place(areas: &[u64; 4], segment: &Segment) -> (u64, u32, u16) {
    let write = match segment.kind {
        Kind::Header | Kind::PayloadOut => 0,
        Kind::PayloadIn | Kind::Status => DESC_WRITE,
    };
    (areas[segment.kind as usize] + segment.place, segment.length, write)
}

/// The driver side of one split virtqueue.
///
/// Invariants: the chains' descriptors and the free list partition the table (`free` counts the latter); `in_flight` counts the slots
/// whose `descriptors` is not 0; of these, `added - published` are not visible to the device. None of it can be changed by the device.
///
/// Dropping it tells the device nothing: the ring's memory must stay until the device is silent (DESIGN L1).
#[derive(Debug)]
pub struct SplitQueue {
    ring: Ring,
    config: QueueConfig,
    fair_share: u16,
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
        let ring = Ring::new(config, region, offset)?;
        let size = config.size;
        Ok(Self {
            ring,
            config,
            fair_share: (size / 16).max(4),
            // The last link is never followed: `free` says when the list ends.
            next: (0..size).map(|index| (index + 1) % size).collect(),
            slots: vec![Slot::default(); usize::from(size)].into(),
            free_head: 0,
            free: size,
            in_flight: 0,
            added: 0,
            published: 0,
            used_next: 0,
            used_seen: 0,
            armed: true,
            fault: None,
        })
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
        let live = self.slots.iter().filter(|slot| slot.descriptors > 0);
        live.map(|slot| Outstanding { token: slot.token, published: slot.sequence < self.published })
    }

    /// Puts a chain on the ring. The device does not see it before [`SplitQueue::publish`]. On error nothing has changed.
    ///
    /// # Errors
    /// [`AddError`].
    pub fn add(&mut self, chain: &Chain<'_>) -> Result<(), AddError> {
        if let Some(fault) = self.fault {
            return Err(AddError::Poisoned(fault));
        }
        if chain.queue() != self.config.index {
            return Err(AddError::WrongQueue { chain: chain.queue(), queue: self.config.index });
        }
        let segments = chain.segment_count();
        if segments > self.config.size {
            return Err(AddError::TooLong { segments, size: self.config.size });
        }
        let direct = segments == 1 || !self.config.indirect || self.is_fair(segments);
        let needed = if direct { segments } else { 1 };
        if needed > self.free {
            return Err(AddError::NoRoom { needed, free: self.free });
        }
        let head = self.free_head;
        let tail = if direct { self.write_direct(chain, head) } else { self.write_indirect(chain, head) };
        self.ring.write_header(head, chain.header());
        self.ring.fill_status(head, chain.status_bytes(), STATUS_UNWRITTEN);
        self.ring.write_available(self.added as u16, head);
        self.slots[usize::from(head)] = Slot {
            token: chain.token(),
            offered: chain.writable_bytes(),
            sequence: self.added,
            descriptors: needed,
            tail,
            status_len: chain.status_bytes() as u8,
        };
        self.free_head = self.next[usize::from(tail)];
        self.free -= needed;
        self.in_flight += 1;
        self.added += 1;
        Ok(())
    }

    /// Whether a direct chain of `segments` leaves enough for others.
    fn is_fair(&self, segments: u16) -> bool {
        segments <= self.fair_share && self.free.saturating_sub(segments) >= self.config.size / 2
    }

    /// Writes a chain along the free list and answers its last descriptor.
    #[inline]
    fn write_direct(&self, chain: &Chain<'_>, head: u16) -> u16 {
        let areas = [self.ring.header_iova(head), 0, 0, self.ring.status_iova(head)];
        let mut index = head;
        // A chain has one segment at least, so there is a last one.
        let Some((last, others)) = chain.segments().split_last() else { return head };
        for segment in others {
            let next = self.next[usize::from(index)];
            let (iova, length, write) = place(&areas, segment);
            self.ring.write_descriptor(index, iova, length, write | DESC_NEXT, next);
            index = next;
        }
        let (iova, length, write) = place(&areas, last);
        self.ring.write_descriptor(index, iova, length, write, 0);
        index
    }

    /// Writes a chain into the table of its head and answers its only descriptor.
    fn write_indirect(&self, chain: &Chain<'_>, head: u16) -> u16 {
        let count = chain.segment_count();
        let areas = [self.ring.header_iova(head), 0, 0, self.ring.status_iova(head)];
        for (position, segment) in (0..count).zip(chain.segments()) {
            let (iova, length, write) = place(&areas, segment);
            let (more, next) = if position + 1 < count { (DESC_NEXT, position + 1) } else { (0, 0) };
            self.ring.write_table_entry(head, position, iova, length, write | more, next);
        }
        self.ring.write_descriptor(head, self.ring.table_iova(head), u32::from(count) * 16, DESC_INDIRECT, 0);
        head
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
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        if self.used_next == self.used_seen && !self.look().map_err(|fault| self.poison(fault))? {
            return Ok(Popped::Nothing);
        }
        let (id, written) = self.ring.used_element(self.used_next);
        match self.check(id, written) {
            Ok((head, slot)) => {
                self.used_next = self.used_next.wrapping_add(1);
                Ok(self.take(head, slot, written, ordinary))
            }
            Err(fault) => Err(self.poison(fault)),
        }
    }

    /// Reads `used.idx` and answers whether it moved.
    fn look(&mut self) -> Result<bool, DeviceFault> {
        let index = self.ring.used_index();
        let advanced = index.wrapping_sub(self.used_next);
        let in_flight = self.in_flight - self.unpublished();
        if advanced > in_flight {
            return Err(DeviceFault::UsedIndex { queue: self.config.index, advanced, in_flight });
        }
        self.used_seen = index;
        Ok(advanced > 0)
    }

    /// Turns an alleged used element into the head of a chain that the device may use.
    #[inline]
    fn check(&self, id: u32, written: u32) -> Result<(u16, Slot), DeviceFault> {
        let queue = self.config.index;
        let unknown = DeviceFault::UnknownId { queue, id, size: self.config.size };
        let head = u16::try_from(id).map_err(|_| unknown)?;
        let slot = self.slots.get(usize::from(head)).ok_or(unknown)?;
        if slot.descriptors == 0 || slot.sequence >= self.published {
            return Err(DeviceFault::NotInFlight { queue, id });
        }
        if written > slot.offered {
            return Err(DeviceFault::Overrun { queue, token: slot.token, written, offered: slot.offered });
        }
        Ok((head, *slot))
    }

    #[inline]
    fn take(&mut self, head: u16, slot: Slot, written: u32, ordinary: Option<&Ordinary>) -> Popped {
        let popped = self.read_used(head, &slot, written, ordinary);
        self.slots[usize::from(head)].descriptors = 0;
        // The chain's links are as `add` left them, so the whole chain goes to the front of the free list in one step and is used again in the same order.
        self.next[usize::from(slot.tail)] = self.free_head;
        self.free_head = head;
        self.free += slot.descriptors;
        self.in_flight -= 1;
        popped
    }

    /// Reads the status bytes, each of them once.
    #[inline]
    fn read_used(&self, head: u16, slot: &Slot, written: u32, ordinary: Option<&Ordinary>) -> Popped {
        let length = usize::from(slot.status_len);
        let full = ordinary.filter(|ordinary| written == slot.offered && ordinary.length == slot.status_len);
        if length > SHORT_STATUS_BYTES {
            return self.read_long(head, slot, written, full);
        }
        let short = self.ring.read_short_status(head);
        if full.is_some_and(|ordinary| (ordinary.short() ^ u64::from_ne_bytes(short)) & ordinary.mask == 0) {
            return Popped::Ordinary(slot.token);
        }
        let mut used = slot.used(written);
        used.status[..length].copy_from_slice(&short[..length]);
        Popped::Other(used)
    }

    #[cold]
    fn read_long(&self, head: u16, slot: &Slot, written: u32, ordinary: Option<&Ordinary>) -> Popped {
        let mut used = slot.used(written);
        self.ring.read_status(head, &mut used.status[..usize::from(slot.status_len)]);
        if ordinary.is_some_and(|ordinary| ordinary.status() == used.status()) {
            return Popped::Ordinary(slot.token);
        }
        Popped::Other(used)
    }

    #[cold]
    fn poison(&mut self, fault: DeviceFault) -> DeviceFault {
        self.fault = Some(fault);
        fault
    }

    /// Asks the device to notify the host of the next used chain. True: something is there already (or the queue is poisoned), so `pop` before sleeping.
    #[must_use = "sleeping while something is there waits for ever"]
    pub fn arm(&mut self) -> bool {
        self.arm_after(1)
    }

    /// As [`SplitQueue::arm`], but for the `count`th used chain from here, to gather completions. `count` is cut to 1 to what is published, so that the device
    /// always gets there. Without `VIRTIO_RING_F_EVENT_IDX` it is the same as `arm`.
    #[must_use = "sleeping while something is there waits for ever"]
    pub fn arm_after(&mut self, count: u16) -> bool {
        if self.fault.is_some() {
            return true;
        }
        if self.config.event_idx {
            let count = count.min(self.in_flight - self.unpublished()).max(1);
            self.ring.store_used_event(self.used_next.wrapping_add(count - 1));
        } else {
            self.ring.store_available_flags(0);
        }
        self.armed = true;
        // Pairs with the device's fence between its store of `used.idx` and its load of `used_event` (or `avail.flags`); see the table above.
        fence(Ordering::SeqCst);
        self.ring.used_index() != self.used_next
    }

    /// Tells the device that no notification is wanted while the host polls. A hint: one may come all the same, and with
    /// `VIRTIO_RING_F_EVENT_IDX` one in 65,536 chains does. Cheap when nothing is armed. Needs no fence: a late notification is only superfluous.
    pub fn disarm(&mut self) {
        if !self.armed {
            return;
        }
        self.armed = false;
        if self.config.event_idx {
            // Behind the index: passed again only after a whole turn.
            self.ring.store_used_event(self.used_next.wrapping_sub(1));
        } else {
            self.ring.store_available_flags(AVAIL_NO_INTERRUPT);
        }
    }
}
