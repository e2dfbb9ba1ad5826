//! A posted queue on its way to another process.
//!
//! | a buffer that is | is |
//! | --- | --- |
//! | with the device, or used and not looked at | as it is: whoever goes on finds it on the ring |
//! | looked into, and the rest of its arrival is not there, or its driver broke down | shown to the next driver, as after a crash |
//! | a client's, or let go of | posted again. A client that goes to the other process, too, takes the bytes with it |

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use cofferdam_device::arrivals::Given;
use cofferdam_device::{Buffer, Doorbell, SplitQueue};
use serde::{Deserialize, Serialize};

use super::{Pool, Posted, Shown};
use crate::lane::handover::{PostedState, channels};
use crate::lane::revive::POISON;

/// A used buffer that a driver is to be shown again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ShownState {
    buffer: u16,
    written: u32,
    words: Vec<u32>,
    crashes: u8,
}

impl Posted {
    /// Everything of it; nothing changes.
    pub(in crate::lane) fn export(
        &self,
        call: BorrowedFd<'_>,
    ) -> Result<(PostedState, Vec<ShownState>, [OwnedFd; 2]), String> {
        if self.broken || self.is_away {
            return Err("the device broke its ring, or is away".to_owned());
        }
        let state = PostedState::of(&self.ring, self.places.iter().map(|(iova, _)| *iova))?;
        let shown = self.begun_of.iter().chain(&self.again).map(|shown| ShownState {
            buffer: shown.given.buffer,
            written: shown.given.written,
            words: shown.words.clone(),
            crashes: shown.crashes,
        });
        Ok((state, shown.collect(), channels(self.doorbell.as_ref(), call)?))
    }

    /// The queue that another process exported, with its ring and its buffers. Nothing is posted before the first look.
    ///
    /// # Errors
    /// A sentence.
    pub(crate) fn adopt(
        ring: SplitQueue,
        doorbell: Box<dyn Doorbell>,
        buffers: Vec<Buffer>,
        head_bytes: u8,
        state: &PostedState,
        shown: Vec<ShownState>,
    ) -> Result<Posted, String> {
        let mut posted = Posted::unfilled(ring, doorbell, buffers, head_bytes);
        for buffer in state.tokens().chain(shown.iter().map(|shown| u32::from(shown.buffer))) {
            if !posted.pool.take(buffer) {
                return Err(format!("posted buffer {buffer} is in two places, or does not exist"));
            }
        }
        let word_count = 2 + usize::from(head_bytes).div_ceil(4);
        let again = shown.into_iter().map(|ShownState { buffer, written, words, crashes }| {
            let fits = posted.places.get(usize::from(buffer)).is_some_and(|(_, bytes)| written <= *bytes);
            let is_it = words.len() == word_count && words.starts_with(&[u32::from(buffer), written]);
            if !fits || !is_it || crashes >= POISON {
                return Err(format!("posted buffer {buffer} cannot be shown again"));
            }
            Ok(Shown { given: Given { buffer, written }, words, crashes })
        });
        posted.again = again.collect::<Result<_, String>>()?;
        Ok(posted)
    }
}

impl Pool {
    /// It is not to be posted again; false if there is no such buffer, or it was not to be posted anyway.
    fn take(&self, buffer: u32) -> bool {
        if buffer as usize >= self.held.len() {
            return false;
        }
        let bit = 1 << (buffer % 64);
        self.back.get(buffer as usize / 64).is_some_and(|back| back.fetch_and(!bit, Ordering::Relaxed) & bit != 0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use cofferdam_device::queue::QueueConfig;
    use cofferdam_device::{DmaArena, DmaRegion};
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::arrival::Arrivals;

    const HEAD_BYTES: u8 = 4;
    const COUNT: u16 = 4;

    struct Bell(OwnedFd);

    impl Doorbell for Bell {
        fn ring(&self) {}

        fn descriptor(&self) -> Option<BorrowedFd<'_>> {
            Some(self.0.as_fd())
        }
    }

    fn bell() -> Box<dyn Doorbell> {
        Box::new(Bell(eventfd(0, EventfdFlags::CLOEXEC).unwrap()))
    }

    fn buffers(region: &Arc<DmaRegion>) -> (DmaArena, Vec<Buffer>) {
        let arena = DmaArena::new(Arc::clone(region)).unwrap();
        let buffers = (0..COUNT).map(|_| arena.lease(2048).unwrap()).collect();
        (arena, buffers)
    }

    fn config() -> QueueConfig {
        QueueConfig { index: 0, size: COUNT, event_idx: false, indirect: false }
    }

    struct Bed {
        rings: Arc<DmaRegion>,
        memory: Arc<DmaRegion>,
        posted: Posted,
        used: u16,
    }

    impl Bed {
        fn new() -> Bed {
            let rings = Arc::new(
                DmaRegion::new("rings", SplitQueue::bytes(COUNT, false).next_multiple_of(4096), 0x1000).unwrap(),
            );
            let memory = Arc::new(DmaRegion::new("memory", 1 << 20, 0x100_0000).unwrap());
            let ring = SplitQueue::new(config(), Arc::clone(&rings), 0).unwrap();
            let posted = Posted::new(ring, bell(), buffers(&memory).1, HEAD_BYTES);
            Bed { rings, memory, posted, used: 0 }
        }

        /// The device uses the buffer that was posted under this head.
        fn use_one(&mut self, head: u32, written: u32) {
            let used = self.posted.ring.addresses().used - 0x1000;
            let element = used + 4 + 8 * u64::from(self.used % COUNT);
            self.rings.write_at(element, &head.to_le_bytes()).unwrap();
            self.rings.write_at(element + 4, &written.to_le_bytes()).unwrap();
            self.used += 1;
            self.rings.write_at(used + 2, &self.used.to_le_bytes()).unwrap();
        }

        /// One look whose buffers the driver says this of.
        fn look(&mut self, says: &[u32], out: &mut Arrivals) {
            self.posted.take().unwrap();
            let Posted { arrivals, given, .. } = &mut self.posted;
            arrivals.parse(says, given).unwrap();
            self.posted.deliver(out);
            self.posted.arrivals.clear();
        }

        fn export(&self) -> (PostedState, Vec<ShownState>) {
            let call = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let (state, shown, _) = self.posted.export(call.as_fd()).unwrap();
            (state, shown)
        }

        fn adopt(&self, state: &PostedState, shown: Vec<ShownState>) -> Result<Posted, String> {
            let standing = state.standing();
            let ring =
                SplitQueue::resume_posted(config(), Arc::clone(&self.rings), 0, &standing, |_| Some(2048)).unwrap();
            Posted::adopt(ring, bell(), buffers(&self.memory).1, HEAD_BYTES, state, shown)
        }
    }

    #[test]
    fn the_beginning_of_an_arrival_is_shown_again_and_what_a_client_has_is_posted_again() {
        let mut bed = Bed::new();
        let mut out = Arrivals::new();
        // A whole one, which the client keeps; then the beginning of another, and one that nobody has looked at.
        bed.use_one(0, 60);
        bed.look(&[1, 0, 0, 0, 4, 56], &mut out);
        bed.use_one(1, 2048);
        bed.look(&[1 | 1 << 16, 0, 0, 1, 4, 2044], &mut out);
        bed.use_one(2, 100);
        assert_eq!(out.len(), 1);
        let (state, shown) = bed.export();
        assert_eq!(shown, [ShownState { buffer: 1, written: 2048, words: vec![1, 2048, 0], crashes: 0 }]);
        let mut posted = bed.adopt(&state, shown.clone()).unwrap();
        assert_eq!(posted.export(posted.doorbell.descriptor().unwrap()).unwrap().1, shown, "it can be handed on again");
        posted.take().unwrap();
        assert_eq!(posted.words, [1, 2048, 0], "first what it had begun with");
        posted.take().unwrap();
        assert_eq!(posted.words, [2, 100, 0], "then what is new");
        assert_eq!(posted.post(), 1, "the client's");
        assert_eq!(posted.post(), 0, "no buffer is in two places");
        // Nothing came of it: whoever had them goes on.
        bed.look(&[1, 0, 0, 2, 4, 96], &mut out);
        assert_eq!(out.iter().map(|arrival| arrival.len()).collect::<Vec<_>>(), [56, 2044 + 96]);
    }

    #[test]
    fn what_is_to_be_shown_again_has_to_be_what_was_shown() {
        let mut bed = Bed::new();
        bed.use_one(0, 60);
        bed.look(&[1 | 1 << 16, 0, 0, 0, 4, 56], &mut Arrivals::new());
        let (state, shown) = bed.export();
        type Change = fn(&mut ShownState);
        let changes: [(&str, Change); 6] = [
            ("a buffer that is with the device", |shown| shown.buffer = 1),
            ("a buffer that there is not", |shown| shown.buffer = COUNT),
            ("more than fits", |shown| (shown.written, shown.words[1]) = (2049, 2049)),
            ("other words", |shown| shown.words[1] = 7),
            ("fewer words", |shown| shown.words.truncate(2)),
            ("what has broken too many", |shown| shown.crashes = POISON),
        ];
        assert!(bed.adopt(&state, shown.clone()).is_ok());
        for (what, change) in changes {
            let mut shown = shown.clone();
            change(&mut shown[0]);
            assert!(bed.adopt(&state, shown).is_err(), "{what}");
        }
        assert!(bed.adopt(&state, [shown.clone(), shown].concat()).is_err(), "twice");
    }
}
