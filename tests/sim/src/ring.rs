//! The device's side of a split virtqueue (virtio 1.2, section 2.7): it takes chains and gives back used elements, and it
//! can be told to do the second part wrong.
//!
//! What the driver wrote is checked, and a breach of the specification is a [`Violation`]: a queue that met one stops, as a
//! real device's would, and the sim keeps the record for the test that looks at it.

mod batch;
mod violation;

use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use crate::memory::{Area, Memory, Segment};

pub use violation::Violation;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Largest ring of a split virtqueue (virtio 1.2, section 2.7).
pub const MAX_QUEUE_SIZE: u16 = 32_768;

/// How a driver set a ring up.
#[derive(Clone, Copy, Debug)]
pub struct RingSetup {
    /// Entries.
    pub size: u16,
    /// I/O address of the descriptor table.
    pub descriptors: u64,
    /// I/O address of the available ring.
    pub available: u64,
    /// I/O address of the used ring.
    pub used: u64,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// The available index to start at.
    pub next_available: u16,
    /// The used index to start at.
    pub next_used: u16,
}

/// One chain, checked: every segment is inside the memory, and the readable ones come first.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// First descriptor: what the used element names.
    pub head: u16,
    /// What the device reads, in order.
    pub readable: Vec<Segment>,
    /// What the device writes, in order.
    pub writable: Vec<Segment>,
    /// Sum of `readable`.
    pub readable_bytes: u64,
    /// Sum of `writable`.
    pub writable_bytes: u64,
}

/// The device's side of one split virtqueue.
pub struct Ring {
    memory: Arc<Memory>,
    size: u16,
    descriptors: Area,
    available: Area,
    used: Area,
    event_idx: bool,
    indirect: bool,
    next_available: u16,
    /// The available index as last read; between it and `next_available` there is something to take.
    seen_available: u16,
    next_used: u16,
    /// What the driver can see of `next_used`.
    published_used: u16,
    /// The used index at which the driver was last considered for an interrupt.
    signalled_used: u16,
}

impl Ring {
    /// A ring in `memory`, checked for size, bounds and alignment.
    pub fn new(memory: Arc<Memory>, setup: RingSetup) -> Result<Self, Violation> {
        let size = setup.size;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(Violation::RingSize(size));
        }
        let entries = usize::from(size);
        let area = |part, address, bytes, align| {
            memory.area(address, bytes, align).ok_or(Violation::RingAddress { part, address })
        };
        Ok(Self {
            descriptors: area("descriptor table", setup.descriptors, 16 * entries, 16)?,
            available: area("available ring", setup.available, 6 + 2 * entries, 2)?,
            used: area("used ring", setup.used, 6 + 8 * entries, 4)?,
            size,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            next_available: setup.next_available,
            seen_available: setup.next_available,
            next_used: setup.next_used,
            published_used: setup.next_used,
            signalled_used: setup.next_used,
            memory,
        })
    }

    /// Entries in the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// From now on chains are looked up in `memory`; the ring itself stays where it is.
    pub fn set_memory(&mut self, memory: Arc<Memory>) {
        self.memory = memory;
    }

    /// What the driver lets the device reach.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// The available index up to which chains were taken: what GET_VRING_BASE answers.
    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// The next chain that the driver made available, by its head.
    #[inline]
    pub fn take(&mut self) -> Result<Option<u16>, Violation> {
        if self.next_available == self.seen_available {
            // Acquire: pairs with the driver's release of the index, so that the chain it covers is seen whole.
            let index = self.available.u16(2).load(Acquire);
            if index.wrapping_sub(self.next_available) > self.size {
                return Err(Violation::AvailableIndex { from: self.next_available, to: index, size: self.size });
            }
            self.seen_available = index;
            if index == self.next_available {
                return Ok(None);
            }
        }
        let head = self.available.u16(4 + 2 * self.slot(self.next_available)).load(Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Puts the `count` chains that were taken last back, to be taken again.
    pub fn put_back(&mut self, count: u16) {
        self.next_available = self.next_available.wrapping_sub(count);
    }

    /// Goes through the chain at `head` and calls `each` with every checked segment and whether the device writes it.
    #[inline]
    fn walk(&self, head: u16, mut each: impl FnMut(Segment, bool)) -> Result<(), Violation> {
        let mut table: Option<u64> = None;
        let mut entries = u32::from(self.size);
        let mut index = head;
        let mut left = entries;
        let mut writable_seen = false;
        loop {
            if u32::from(index) >= entries {
                return Err(Violation::DescriptorIndex { index, size: entries });
            }
            if left == 0 {
                return Err(Violation::Loop { head });
            }
            left -= 1;
            let [address, rest] = match table {
                None => {
                    let at = 16 * usize::from(index);
                    [self.descriptors.u64(at).load(Relaxed), self.descriptors.u64(at + 8).load(Relaxed)]
                }
                Some(base) => self
                    .memory
                    .read_descriptor(base + 16 * u64::from(index))
                    .ok_or(Violation::Indirect { head, why: "is outside the memory" })?,
            };
            let bytes = rest as u32;
            let flags = (rest >> 32) as u16;
            let next = (rest >> 48) as u16;
            if flags & DESC_F_INDIRECT != 0 {
                let why = if !self.indirect {
                    "was not negotiated"
                } else if table.is_some() {
                    "is nested"
                } else if flags & DESC_F_NEXT != 0 {
                    "has a next descriptor"
                } else if bytes == 0 || !bytes.is_multiple_of(16) || bytes / 16 > u32::from(u16::MAX) + 1 {
                    "has a bad length"
                } else if !self.memory.holds(Segment { address, bytes }) {
                    "is outside the memory"
                } else {
                    table = Some(address);
                    entries = bytes / 16;
                    left = entries;
                    index = 0;
                    continue;
                };
                return Err(Violation::Indirect { head, why });
            }
            let segment = Segment { address, bytes };
            if !self.memory.holds(segment) {
                return Err(Violation::Address { head, address, bytes });
            }
            let writable = flags & DESC_F_WRITE != 0;
            if writable_seen && !writable {
                return Err(Violation::Order { head });
            }
            writable_seen |= writable;
            each(segment, writable);
            if flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = next;
        }
    }

    /// The chain at `head`, checked.
    pub fn chain(&self, head: u16) -> Result<Chain, Violation> {
        let mut chain = Chain { head, ..Chain::default() };
        self.walk(head, |segment, writable| {
            let bytes = u64::from(segment.bytes);
            if writable {
                chain.writable.push(segment);
                chain.writable_bytes += bytes;
            } else {
                chain.readable.push(segment);
                chain.readable_bytes += bytes;
            }
        })?;
        Ok(chain)
    }

    /// Writes the next used element. The driver does not see it before [`Ring::publish`].
    #[inline]
    pub fn put(&mut self, id: u32, written: u32) {
        let at = 4 + 8 * self.slot(self.next_used);
        self.used.u32(at).store(id, Relaxed);
        self.used.u32(at + 4).store(written, Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Makes every element put so far visible.
    #[inline]
    pub fn publish(&mut self) {
        if self.published_used != self.next_used {
            self.published_used = self.next_used;
            // Release: elements, payload and status bytes come before the index that announces them.
            self.used.u16(2).store(self.published_used, Release);
        }
    }

    /// Whether the driver wants a used buffer notification for what was published since the last call (section 2.7.7.2 and,
    /// without EVENT_IDX, 2.7.7.1).
    #[inline]
    pub fn wants_signal(&mut self) -> bool {
        let (old, new) = (self.signalled_used, self.published_used);
        if old == new {
            return false;
        }
        // Pairs with the driver's fence between arming and looking at the used index once more: either it sees the new
        // index there, or this load sees what it armed.
        fence(SeqCst);
        self.signalled_used = new;
        if self.event_idx {
            let event = self.available.u16(4 + 2 * usize::from(self.size)).load(Relaxed);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.available.u16(0).load(Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver for a notification with the next chain beyond those that were seen (all of which were taken, or put
    /// back for want of more). True: something is there already, so do not sleep.
    pub fn arm(&mut self) -> bool {
        if self.event_idx {
            self.used.u16(4 + 8 * usize::from(self.size)).store(self.seen_available, Relaxed);
        } else {
            self.used.u16(0).store(0, Relaxed);
        }
        // Pairs with the driver's fence between its new index and its look at what the device wants.
        fence(SeqCst);
        self.available.u16(2).load(Acquire) != self.seen_available
    }

    /// Whether there is a chain to take.
    pub fn has_available(&self) -> bool {
        self.available.u16(2).load(Acquire) != self.next_available
    }

    /// Tells the driver that it need not notify. With EVENT_IDX an old event index does that by itself.
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.used.u16(0).store(USED_F_NO_NOTIFY, Relaxed);
        }
    }

    /// Lie: shows a used index that is `by` away from the true one, elements or not.
    pub fn show_used_index(&mut self, by: u16) {
        self.used.u16(2).store(self.published_used.wrapping_add(by), Release);
    }

    /// Lie: overwrites descriptor `index` with `words`. The table is the driver's, but the device can reach it.
    pub fn scribble_descriptor(&mut self, index: u16, words: [u64; 2]) {
        let at = 16 * self.slot(index);
        self.descriptors.u64(at).store(words[0], Relaxed);
        self.descriptors.u64(at + 8).store(words[1], Relaxed);
    }

    /// Lie: overwrites the available ring's entry that was taken last.
    pub fn scribble_available(&mut self, head: u16) {
        let at = 4 + 2 * self.slot(self.next_available.wrapping_sub(1));
        self.available.u16(at).store(head, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::memory::Region;

    const BASE: u64 = 0x4000;
    const SETUP: RingSetup = RingSetup {
        size: 4,
        descriptors: BASE,
        available: BASE + 0x100,
        used: BASE + 0x200,
        event_idx: false,
        indirect: true,
        next_available: 0,
        next_used: 0,
    };

    fn memory() -> Arc<Memory> {
        let file = rustix::fs::memfd_create("ring-test", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, 4096).expect("a length");
        Arc::new(Memory::new(vec![Arc::new(Region::map(BASE, 4096, file.as_fd()).expect("a mapping"))]))
    }

    /// One descriptor: address, length, flags, next.
    type Descriptor = (u64, u32, u16, u16);

    fn put(memory: &Memory, at: u64, (address, bytes, flags, next): Descriptor) {
        memory.write(at, &address.to_le_bytes()).expect("inside");
        memory
            .write(at + 8, &(u64::from(bytes) | u64::from(flags) << 32 | u64::from(next) << 48).to_le_bytes())
            .expect("inside");
    }

    /// Makes `table` available by its first descriptor and says what the device makes of it.
    fn outcome(indirect: bool, table: &[Descriptor], inner: &[Descriptor]) -> Result<Chain, Violation> {
        let memory = memory();
        for (at, descriptor) in (BASE..).step_by(16).zip(table) {
            put(&memory, at, *descriptor);
        }
        for (at, descriptor) in (BASE + 0x800..).step_by(16).zip(inner) {
            put(&memory, at, *descriptor);
        }
        let mut ring = Ring::new(Arc::clone(&memory), RingSetup { indirect, ..SETUP })?;
        assert_eq!(ring.take(), Ok(None));
        memory.write(BASE + 0x102, &1u16.to_le_bytes()).expect("inside");
        let head = ring.take()?.expect("one chain");
        ring.chain(head)
    }

    #[test]
    fn good_chains_are_taken_whole() {
        let direct =
            outcome(false, &[(BASE + 0x400, 16, 1, 2), (0, 0, 0, 0), (BASE + 0x500, 9, 2, 0)], &[]).expect("a chain");
        assert_eq!((direct.readable_bytes, direct.writable_bytes), (16, 9));
        let indirect = outcome(true, &[(BASE + 0x800, 32, 4, 0)], &[(BASE + 0x400, 16, 1, 1), (BASE + 0x500, 9, 2, 0)])
            .expect("a chain");
        assert_eq!((indirect.readable, indirect.writable), (direct.readable, direct.writable));
    }

    #[test]
    fn every_breach_of_the_specification_is_named() {
        let inner: &[Descriptor] = &[(BASE + 0x400, 16, 0, 0)];
        let indirect = |why| Err::<(), _>(Violation::Indirect { head: 0, why });
        let check = |negotiated, table: &[Descriptor], inner: &[Descriptor], expected: Result<(), Violation>| {
            assert_eq!(outcome(negotiated, table, inner).map(drop), expected);
        };
        check(true, &[(BASE, 16, 1, 0)], &[], Err(Violation::Loop { head: 0 }));
        check(true, &[(BASE, 16, 1, 4)], &[], Err(Violation::DescriptorIndex { index: 4, size: 4 }));
        check(true, &[(BASE, 16, 3, 1), (BASE, 16, 0, 0)], &[], Err(Violation::Order { head: 0 }));
        check(
            true,
            &[(BASE + 4090, 7, 0, 0)],
            &[],
            Err(Violation::Address { head: 0, address: BASE + 4090, bytes: 7 }),
        );
        check(true, &[(u64::MAX, 7, 0, 0)], &[], Err(Violation::Address { head: 0, address: u64::MAX, bytes: 7 }));
        check(false, &[(BASE + 0x800, 16, 4, 0)], inner, indirect("was not negotiated"));
        check(true, &[(BASE + 0x800, 16, 5, 1)], inner, indirect("has a next descriptor"));
        check(true, &[(BASE + 0x800, 17, 4, 0)], inner, indirect("has a bad length"));
        check(true, &[(BASE + 0x800, 0, 4, 0)], inner, indirect("has a bad length"));
        check(true, &[(BASE + 0x8000, 16, 4, 0)], inner, indirect("is outside the memory"));
        check(true, &[(BASE + 0x800, 16, 4, 0)], &[(BASE, 16, 4, 0)], indirect("is nested"));
        check(
            true,
            &[(BASE + 0x800, 16, 4, 0)],
            &[(BASE, 16, 1, 1)],
            Err(Violation::DescriptorIndex { index: 1, size: 1 }),
        );
    }

    #[test]
    fn a_ring_that_cannot_be_is_refused() {
        let refused = |change: fn(&mut RingSetup)| {
            let mut setup = SETUP;
            change(&mut setup);
            Ring::new(memory(), setup).err()
        };
        assert_eq!(refused(|_| {}), None);
        assert_eq!(refused(|setup| setup.size = 0), Some(Violation::RingSize(0)));
        assert_eq!(refused(|setup| setup.size = 6), Some(Violation::RingSize(6)));
        let address = |part, address| Some(Violation::RingAddress { part, address });
        assert_eq!(refused(|setup| setup.descriptors += 8), address("descriptor table", BASE + 8));
        assert_eq!(refused(|setup| setup.available += 1), address("available ring", BASE + 0x101));
        assert_eq!(refused(|setup| setup.used = BASE + 4096 - 8), address("used ring", BASE + 4096 - 8));
    }

    #[test]
    fn an_available_index_that_jumps_is_seen() {
        let memory = memory();
        let mut ring = Ring::new(Arc::clone(&memory), SETUP).expect("a ring");
        memory.write(BASE + 0x102, &5u16.to_le_bytes()).expect("inside");
        assert_eq!(ring.take(), Err(Violation::AvailableIndex { from: 0, to: 5, size: 4 }));
    }

    #[test]
    fn indices_wrap_at_2_to_16() {
        let memory = memory();
        let setup = RingSetup { event_idx: true, next_available: u16::MAX, next_used: u16::MAX, ..SETUP };
        memory.write(BASE + 0x102, &u16::MAX.to_le_bytes()).expect("inside");
        let mut ring = Ring::new(Arc::clone(&memory), setup).expect("a ring");
        // The driver wants to hear of used index u16::MAX, the next to come.
        memory.write(BASE + 0x104 + 8, &u16::MAX.to_le_bytes()).expect("inside");
        memory.write(BASE + 0x102, &1u16.to_le_bytes()).expect("inside");
        assert_eq!((ring.take(), ring.take(), ring.take()), (Ok(Some(0)), Ok(Some(0)), Ok(None)));
        ring.put(0, 1);
        ring.put(0, 1);
        ring.publish();
        assert!(ring.wants_signal());
        assert!(!ring.wants_signal());
        ring.put(0, 1);
        ring.publish();
        assert!(!ring.wants_signal(), "not asked for again");
        assert!(!ring.arm());
        let mut event = [0; 2];
        memory.read(BASE + 0x204 + 32, &mut event).expect("inside");
        assert_eq!(u16::from_le_bytes(event), 1);
    }
}
