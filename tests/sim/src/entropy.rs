//! A virtio entropy device (virtio 1.2, section 5.4): fills what it is given with the bytes of one seeded stream.
//!
//! Which bytes come next depends on the seed and on how many were given out before, not on how they were asked for, so a
//! test knows them beforehand ([`SimRng::stream`]). Faults that belong to it: `slow`, `lie:answer-short`, `lie:length-zero`
//! (none placed, which section 5.4.6.2 forbids), `lie:length-long` (more claimed than was offered), `lie:payload-unwritten`.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::device::{Behaviour, SimDevice, SimError};
use crate::kinds::{Lie, Op};
use crate::memory::Memory;
use crate::model::{Accepted, Context, DeviceModel, Rings, Work};
use crate::ring::{Chain, Violation};
use crate::rng::Rng;

/// Most bytes of one answer. The device may place fewer than it was offered (section 5.4.6.2), and a chain may offer more
/// than any memory holds.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// What an entropy device offers: it has no features of its own and no configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntropyProfile {
    /// Its one ring.
    pub rings: Rings,
}

/// An entropy device. Clones are handles of the same one.
#[derive(Clone)]
pub struct SimRng {
    device: SimDevice,
    model: Arc<Entropy>,
}

struct Entropy {
    profile: EntropyProfile,
    stream: Mutex<Stream>,
    placed: AtomicU64,
}

/// The bytes of one generator, least significant first.
struct Stream {
    rng: Rng,
    word: u64,
    left: u32,
}

impl Stream {
    fn new(seed: u64) -> Self {
        Self { rng: Rng::part(seed, 500), word: 0, left: 0 }
    }

    fn take(&mut self, bytes: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes + 8);
        while self.left > 0 && out.len() < bytes {
            out.push(self.word as u8);
            self.word >>= 8;
            self.left -= 1;
        }
        while out.len() < bytes {
            let word = self.rng.next_u64();
            out.extend_from_slice(&word.to_le_bytes());
            // What is too much of the last word is for the next answer.
            let over = out.len().saturating_sub(bytes) as u32;
            self.left = over;
            self.word = word.checked_shr(8 * (8 - over)).unwrap_or(0);
        }
        out.truncate(bytes);
        out
    }
}

impl Deref for SimRng {
    type Target = SimDevice;
    fn deref(&self) -> &SimDevice {
        &self.device
    }
}

impl SimRng {
    /// A device with no driver yet.
    pub fn new(profile: EntropyProfile, behaviour: Behaviour) -> Result<Self, SimError> {
        let stream = Mutex::new(Stream::new(behaviour.seed));
        let model = Arc::new(Entropy { profile, stream, placed: AtomicU64::new(0) });
        Ok(Self { device: SimDevice::new(Arc::clone(&model) as _, &behaviour)?, model })
    }

    /// The first `bytes` bytes that a device with this seed gives out, for a test's oracle.
    pub fn stream(seed: u64, bytes: usize) -> Vec<u8> {
        Stream::new(seed).take(bytes)
    }

    /// Bytes given out so far, whatever was claimed.
    pub fn placed_bytes(&self) -> u64 {
        self.model.placed.load(Ordering::SeqCst)
    }
}

impl DeviceModel for Entropy {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        self.profile.rings.features()
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn queues(&self) -> u16 {
        1
    }

    fn queue_size(&self) -> u16 {
        self.profile.rings.size
    }

    fn accept(&self, _queue: u16, _memory: &Memory, chain: &Chain) -> Result<Accepted, Violation> {
        // The driver must not offer device-readable buffers (section 5.4.6.1).
        if chain.readable_bytes > 0 || chain.writable_bytes == 0 {
            let Chain { head, readable_bytes, writable_bytes, .. } = *chain;
            return Err(Violation::NotARequest { head, readable_bytes, writable_bytes });
        }
        Ok(Accepted { op: Op::Entropy, tag: 0, remark: None })
    }

    fn serve(&self, work: &Work, context: &mut Context<'_>) -> u64 {
        let offered = work.chain.writable_bytes.min(MAX_ANSWER_BYTES);
        let fate = context.fate;
        if fate.lies(Lie::LengthZero) || fate.lies(Lie::PayloadUnwritten) {
            return offered;
        }
        let bytes = if fate.lies(Lie::AnswerShort) { 1 + context.rng.below(offered - 1) } else { offered };
        // Held until the bytes are counted: their order is the stream's.
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let placed = work.scatter(context.memory, &stream.take(bytes as usize));
        self.placed.fetch_add(placed, Ordering::SeqCst);
        placed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_same_however_it_is_asked_for() {
        let whole = SimRng::stream(7, 1000);
        assert_ne!(whole, SimRng::stream(8, 1000));
        let mut stream = Stream::new(7);
        let mut parts = Vec::new();
        for bytes in (1..).take_while(|bytes| bytes * (bytes + 1) / 2 <= 1000) {
            parts.extend(stream.take(bytes));
        }
        assert_eq!(parts[..], whole[..parts.len()]);
        assert!(parts.len() > 900);
    }
}
